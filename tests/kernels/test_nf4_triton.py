"""The Triton kernels against the reference: on the GPU, or through Triton's interpreter."""

import pytest
import torch

from halfbyte.kernels import codebooks, nf4

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
twin = pytest.importorskip("halfbyte.kernels.nf4_triton")

# Short blocks, odd counts, several programs, blocks longer and shorter than a row.
SHAPES = [(1,), (65,), (3, 5, 7), (33, 127)]


@pytest.fixture(autouse=True)
def poisoned():
    """New tensors start as NaN, or 255 for bytes: an element that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("quant_type", "block_size"), [("nf4", 64), ("fp4", 64), ("nf4", 4096)])
@pytest.mark.parametrize("shape", SHAPES)
def test_twin_equals_reference(shape, quant_type, block_size, triton_device, half_dtype):
    torch.manual_seed(0)
    settings = {"block_size": block_size, "quant_type": quant_type}
    for dtype in (torch.bfloat16, half_dtype):
        weight = (torch.randn(shape) * 0.02).to(dtype)
        weight.view(-1)[:64] *= 0 if weight.numel() > 64 else 1
        # The reference's reciprocal is exact, CUDA's is not: only bfloat16 codes are promised.
        packed, absmax = nf4.reference_quantize_4bit(weight, rule="cuda", **settings)
        ours = [t.cpu() for t in twin.quantize_4bit(weight.to(triton_device), **settings)]
        if dtype == torch.bfloat16 or triton_device.type == "cpu":
            assert torch.equal(ours[0], packed)
        assert torch.equal(ours[1], absmax)
    on_device = [t.to(triton_device) for t in (packed, absmax)]
    settings |= {"shape": shape, "dtype": half_dtype}
    dense = twin.dequantize_4bit(*on_device, **settings).cpu()
    assert torch.equal(dense, nf4.reference_dequantize_4bit(packed, absmax, **settings))
    offset, table = absmax.mean(), codebooks.dynamic_map()
    codes, nested_absmax = nf4.reference_quantize_blockwise(absmax - offset, rule="cuda")
    scales = [codes, nested_absmax, table, offset]
    nested = [t.to(triton_device) for t in scales]
    dense = twin.dequantize_nested(on_device[0], *nested, **settings).cpu()
    assert torch.equal(dense, nf4.reference_dequantize_nested(packed, *scales, **settings))


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("numel", [1, 255, 256, 1300])
def test_nested_codes_equal_the_exact_rule(numel, triton_device):
    torch.manual_seed(0)
    values = torch.randn(numel) * 10.0 ** torch.randint(-6, 1, (numel,))
    values[256:512] = 0
    codes, absmax = twin.quantize_blockwise(values.to(triton_device))
    expected_codes, expected_absmax = nf4.reference_quantize_blockwise(values, rule="cuda")
    assert torch.equal(absmax.cpu(), expected_absmax)
    # On a GPU the approximate reciprocal may move a value across a threshold.
    differing = int((codes.cpu() != expected_codes).sum())
    assert differing <= (0 if triton_device.type == "cpu" else 2)
    offset = values.mean()
    subtracted = twin.quantize_blockwise((values - offset).to(triton_device))
    at_once = twin.quantize_blockwise(values.to(triton_device), offset.to(triton_device))
    assert all(torch.equal(one, two) for one, two in zip(subtracted, at_once, strict=True))


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_denormal_blocks_are_zero_blocks(triton_device):
    weight = torch.full((128,), 1e-39)
    weight[64:] = 1.0
    packed, absmax = twin.quantize_4bit(weight.to(triton_device))
    assert absmax.tolist() == [0.0, 1.0]
    assert packed.view(-1)[:32].unique().tolist() == [0x77]


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
def test_every_threshold_parts_its_neighbours(quant_type, triton_device):
    at = codebooks.thresholds(quant_type, "cuda")
    ends = torch.tensor([-1.0, 1.0, torch.nan])
    above, below = (at.nextafter(torch.full_like(at, end)) for end in (torch.inf, -torch.inf))
    weight = torch.cat([ends[:1].expand(17), below, at, above, ends[:2]])
    packed, _ = twin.quantize_4bit(weight.to(triton_device), quant_type=quant_type)
    expected, _ = nf4.reference_quantize_4bit(weight, quant_type=quant_type, rule="cuda")
    assert torch.equal(packed.cpu(), expected)
    _, absmax = twin.quantize_4bit(ends.to(triton_device), quant_type=quant_type)
    assert absmax.isnan().all()


@triton.jit
def _asks_for_nothing(ptr, first, num_bytes, LINES: tl.constexpr):
    pass


@pytest.mark.parametrize("numel", [2048 * 5, 2048 * 10 + 1, 2048 * 13 - 77])
def test_turns_leave_out_no_tile(numel, triton_device, half_dtype, monkeypatch):
    """As on a GPU, where programs that fetch codes stand before those of each turn's tiles."""
    if triton_device.type == "cpu":  # whose interpreter has no inline PTX
        monkeypatch.setattr(twin, "_fetch", _asks_for_nothing)
    monkeypatch.setattr(twin, "_fetchers", lambda *_: 3)
    monkeypatch.setattr(twin, "_TILES_A_TURN", 5)
    torch.manual_seed(0)
    packed, absmax = nf4.reference_quantize_4bit(torch.randn(numel).bfloat16(), rule="cuda")
    settings = {"shape": (numel,), "dtype": half_dtype}
    dense = twin.dequantize_4bit(*(t.to(triton_device) for t in (packed, absmax)), **settings)
    assert torch.equal(dense.cpu(), nf4.reference_dequantize_4bit(packed, absmax, **settings))
