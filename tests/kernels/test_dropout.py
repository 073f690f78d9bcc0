import math

import pytest
import torch

from halfbyte.kernels import dropout
from halfbyte.kernels.dropout import Mask, kept

ROWS, COLUMNS = 256, 1024


def _seed(seed, first_row=0):
    return torch.tensor([seed, first_row])


def _centred(p, seed=7, salt=3, first_row=0):
    """Return what is dropped with the mean taken off and divided by its deviation."""
    mask = Mask(p, _seed(seed, first_row), salt)
    share = mask.threshold / 2**16
    dropped = 1 - kept(mask, ROWS, COLUMNS).double()
    return (dropped - share) / math.sqrt(share * (1 - share))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2**61 + 5])
def test_rates_of_all_rows_and_of_columns_are_binomial(p, seed):
    z = _centred(p, seed)
    assert abs(z.sum()) < 4 * math.sqrt(z.numel())
    for sums, count in ((z.sum(1), COLUMNS), (z.sum(0), ROWS)):
        deviations = sums / math.sqrt(count)
        assert deviations.abs().max() < 5.5
        assert deviations.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / len(sums)))


def test_no_two_places_are_correlated_at_any_distance():
    z = _centred(0.1)
    spectrum = torch.fft.fft2(z).abs().square()
    products = torch.fft.ifft2(spectrum).real / math.sqrt(z.numel())
    products[0, 0] = 0
    assert products.abs().max() < 6  # of 262,144 distances; 4.8 is expected
    assert products.std().item() == pytest.approx(1, abs=0.02)


def test_seeds_and_salts_have_nothing_in_common():
    masks = [_centred(0.1, 7 + s, 0) for s in range(6)]
    masks += [_centred(0.1, 7 + (s << 32), 0) for s in range(1, 6)]
    masks += [_centred(0.1, 7, s) for s in range(1, 6)]
    masks = torch.stack(masks).flatten(1)
    products = masks @ masks.t() / math.sqrt(masks.shape[1])
    assert products.fill_diagonal_(0).abs().max() < 4.5


@pytest.mark.parametrize("bits", [slice(0, 4), slice(4, 8)])
def test_sixteen_bits_are_uniform(bits):
    """Thresholds with few steps between them cut the 16 bits at every place."""
    steps = range(0, 2**16, 4096) if bits.start == 0 else range(2**15, 2**15 + 4096, 256)
    shares = [t / 2**16 for t in steps if t]
    rates = [1 - kept(Mask(p, _seed(3), 1), ROWS, COLUMNS).double().mean().item() for p in shares]
    cells = torch.tensor(rates).diff() * ROWS * COLUMNS
    expected = (shares[1] - shares[0]) * ROWS * COLUMNS
    assert ((cells - expected).square() / expected).sum() < 40  # chi-square, 14 cells


def test_rows_of_a_cut_batch_drop_what_they_would_whole():
    whole = kept(Mask(0.5, _seed(5), 1), 10, 41)
    for first in (0, 3, 7):
        assert torch.equal(kept(Mask(0.5, _seed(5, first), 1), 10 - first, 41), whole[first:])
    assert torch.equal(kept(Mask(0.5, _seed(5), 1), 10, 30), whole[:, :30])


def test_what_stays_is_scaled_by_the_exact_rate():
    mask = Mask(0.05, _seed(1), 0)
    assert mask.scale == 65536 / (65536 - 3277)
    x = torch.ones(64, 300)
    assert dropout.dropout(x, mask).unique().tolist() == pytest.approx([0.0, mask.scale])
    assert Mask(0.999999, _seed(1), 0).scale == 65536
    assert kept(Mask(1e-6, _seed(1), 0), 64, 64).all()


def test_the_gradient_uses_the_mask_of_the_forward():
    mask = Mask(0.4, _seed(11), 2)
    gb, lora_A, grad = (torch.randn(s, dtype=torch.float64) for s in ((7, 3), (3, 9), (7, 9)))
    expected = grad + kept(mask, 7, 9) * (gb @ lora_A) * mask.scale
    torch.testing.assert_close(dropout.add_masked_product_(grad, gb, lora_A, mask), expected)
