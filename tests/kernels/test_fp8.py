from types import SimpleNamespace

import pytest
import torch

from halfbyte.kernels import fp8
from halfbyte.kernels.fp8 import Rows


def _implementations(name):
    twin = pytest.importorskip("halfbyte.kernels.fp8_triton")
    return getattr(fp8, name).__wrapped__, getattr(twin, name)


def _error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def _padded(x, columns):
    """Return x as a slice of a wider matrix."""
    wide = x.new_full((x.shape[0], x.shape[1] + columns), torch.nan)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@pytest.mark.parametrize("balance", [None, 0.25])
@pytest.mark.parametrize(
    ("tokens", "features", "ranks"),
    [(1, 16, 0), (5, 64, 8), (3, 96, 48), (2, 64, 192), (2, 16448, 16)],
)
def test_rows_are_quantized_and_the_border_split(
    tokens, features, ranks, balance, triton_device, half_dtype
):
    torch.manual_seed(0)
    x = torch.randn(tokens, features + ranks, device=triton_device) * torch.logspace(
        -6, 4, tokens, device=triton_device
    ).unsqueeze(1)
    x = _padded(x.to(half_dtype), 8)
    c = None if balance is None or not ranks else torch.full((1,), balance, device=triton_device)
    for quantize_rows in _implementations("quantize_rows"):
        values, scale = quantize_rows(x[:, :features], x[:, features:], c)
        assert values.shape == (tokens, features + fp8.border_columns(ranks))
        back = values.double() * scale.double().unsqueeze(1)
        assert _error(back[:, :features], x[:, :features]) < 0.035
        magnitude = values[:, : features + ranks].float().abs().amax(1)
        assert ((magnitude > 415) & (magnitude <= 448)).all()
        high, low, again, rest = back[:, features:].split(
            [ranks] * 3 + [values.shape[1] - features - 3 * ranks], 1
        )
        assert torch.equal(high, again)
        assert not rest.any()
        if c is None:
            assert not high.any()
            assert not low.any()
        else:
            assert _error((high + low) * balance, x[:, features:]) < 2**-8


def test_both_implementations_round_alike(triton_device):
    torch.manual_seed(0)
    x = torch.randn(7, 144, device=triton_device) * 3
    c = torch.full((1,), 2.0, device=triton_device)
    one, other = (
        quantize(x[:, :128], x[:, 128:], c) for quantize in _implementations("quantize_rows")
    )
    torch.testing.assert_close(one.scale, other.scale, rtol=1e-6, atol=0)
    assert (one.values.float() != other.values.float()).float().mean() < 0.002


def test_rows_of_zeros_stay_zeros(triton_device):
    x = torch.zeros(2, 24, device=triton_device)
    for quantize_rows in _implementations("quantize_rows"):
        values, scale = quantize_rows(x[:, :16], x[:, 16:], torch.ones(1, device=triton_device))
        assert not values.float().any()
        assert scale.isfinite().all()
        assert (scale > 0).all()


def test_a_number_that_is_none_stays_one():
    x = torch.ones(2, 16)
    x[1, 3] = torch.nan
    values, _ = fp8.quantize_rows(x, x[:, :0], None)
    assert values[1].float().isnan().any()
    assert not values[0].float().isnan().any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("magnitude", [0.0, 1e-5, 1e-3, 1.0, 100.0])
def test_a_factor_is_split_so_that_nothing_overflows(magnitude, transposed, triton_device):
    torch.manual_seed(0)
    rows, features, ranks = (70, 32, 96) if magnitude == 1 else (150, 32, 24)
    shape = (ranks, rows) if transposed else (rows, ranks)
    factor = torch.randn(shape, device=triton_device) * magnitude
    factor = factor.t() if transposed else factor
    scale = torch.rand(rows, device=triton_device) * 1e-3 + 1e-4
    for split_borders_ in _implementations("split_borders_"):
        columns = fp8.border_columns(ranks)
        values = torch.full((rows, features + columns), 7.0, device=triton_device)
        values = values.to(fp8.DTYPE)
        balance = fp8.balance_of((factor / scale[:, None]).abs().max()).view(1)
        split_borders_(balance, [Rows(values, scale)], [factor])
        assert torch.frexp(balance).mantissa.item() == 0.5
        assert (values[:, :features].float() == 7).all()
        border = values[:, features:].double()
        high, again, low, rest = border.split([ranks] * 3 + [columns - 3 * ranks], 1)
        assert torch.equal(high, again)
        assert not rest.any()
        back = (high + low) * scale.double().unsqueeze(1) / balance.double()
        if magnitude:
            assert _error(back, factor) < 0.01
        else:
            assert not back.any()


def test_two_borders_are_those_of_each(triton_device):
    torch.manual_seed(0)
    factors = [torch.randn(n, 8, device=triton_device) for n in (70, 33)]
    scales = [
        torch.full((len(f),), s, device=triton_device)
        for f, s in zip(factors, (0.5, 2), strict=True)
    ]
    balances = torch.tensor([8.0, 0.5], device=triton_device)
    found = []
    for split_borders_ in _implementations("split_borders_"):
        for sides in ((slice(0, 2),), (slice(0, 1), slice(1, 2))):
            shape = (64 + fp8.border_columns(8),)
            values = [f.new_zeros((len(f), *shape)).to(fp8.DTYPE) for f in factors]
            matrices = [Rows(*pair) for pair in zip(values, scales, strict=True)]
            for side in sides:
                split_borders_(balances[side], matrices[side], factors[side])
            found.append(torch.cat([m.values.float() for m in matrices]))
            assert not found[-1][:, :64].any()
            assert found[-1][:, 64:88].any(1).all()
    assert all(torch.equal(one, found[0]) for one in found)


def test_the_balance_shares_the_range_between_both_factors():
    found = [fp8.balance_of(torch.tensor(m)).item() for m in (0.0, 1.0, 64.0, 1e4)]
    assert found == [2.0**18, 8.0, 1.0, 2.0**-5]
    for m, balance in zip((1.0, 64.0, 1e4), found[1:], strict=True):
        assert m * balance <= 448


def test_the_product_is_that_of_the_values(triton_device, half_dtype):
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 64, device=triton_device) for n in (5, 32))
    rows = [fp8.quantize_rows(m, m[:, :0], None) for m in (x, weight)]
    out = torch.full((5, 40), torch.nan, device=triton_device, dtype=half_dtype)[:, :32]
    found = fp8.product_(*rows, out)
    assert found.data_ptr() == out.data_ptr()
    exact = [r.values.double() * r.scale.double().unsqueeze(1) for r in rows]
    assert _error(out, exact[0] @ exact[1].t()) < 0.003
    assert _error(out, x @ weight.t()) < 0.06


@pytest.mark.parametrize(
    ("capability", "cuda", "heeds"),
    [
        ((9, 0), "13.0", True),
        ((9, 0), "12.8", False),
        ((8, 9), "13.0", False),
        ((10, 0), None, False),
    ],
)
def test_where_torch_loses_the_pitch_rows_are_written_apart(capability, cuda, heeds, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(fp8, "_heeds_pitch", fp8._heeds_pitch.__wrapped__)
    written = []

    def multiply(a, b, *scales, out, **_):
        # As torch's own kernels do: one row right behind the other.
        written.append(out)
        flat = out.as_strided((out.numel(),), (1,))
        flat.copy_(torch.mm(a.float(), b.float()).flatten() * (scales[0] * scales[1]).flatten())

    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    rows = [fp8.quantize_rows(m, m[:, :0], None) for m in (torch.randn(3, 16), torch.randn(8, 16))]
    expected = fp8.product_(*rows, torch.empty(3, 8))
    values = SimpleNamespace(is_cuda=True, float=rows[0].values.float)
    wide = torch.zeros(3, 16)
    found = fp8.product_(rows[0]._replace(values=values), rows[1], wide[:, :8])
    assert (written[0].data_ptr() == wide.data_ptr()) == heeds
    assert torch.equal(found, wide[:, :8])
    if not heeds:
        torch.testing.assert_close(found, expected)
        assert not wide[:, 8:].any()


def test_lora_inside_a_product_is_as_good_as_in_bf16(triton_device):
    """Where the weight is zero, the product is LoRA's part alone."""
    torch.manual_seed(0)
    x, u = torch.randn(40, 128, device=triton_device), torch.randn(40, 16, device=triton_device)
    for magnitude in (1e-5, 1e-3, 0.1):
        B = torch.randn(64, 16, device=triton_device) * magnitude
        values = torch.zeros(64, 128 + fp8.border_columns(16), device=triton_device).to(fp8.DTYPE)
        scale = torch.full((64,), 1e-3, device=triton_device)
        balance = fp8.balance_of((B / scale[:, None]).abs().max()).view(1)
        fp8.split_borders_(balance, [Rows(values, scale)], [B])
        rows = fp8.quantize_rows(x, u, balance)
        out = torch.empty(40, 64, device=triton_device, dtype=torch.bfloat16)
        fp8.product_(rows, Rows(values, scale), out)
        assert _error(out, u @ B.t()) < 0.01
