import math

import bitsandbytes.functional as bnb
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import QuantizationError
from halfbyte.kernels import codebooks, native, nf4, nf4_cpu

SHAPES = [
    (1,), (2,), (63,), (64,), (65,), (127,), (129,), (4096,), (1, 64), (64, 1), (2, 33), (3, 5, 7),
    (7, 1000), (128, 96), (130, 300), (77, 515),
]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def poisoned():
    """New tensors start as NaN, or 255 for bytes: an element that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_weight(shape, dtype, *, zero_block=True):
    generator = torch.Generator().manual_seed(math.prod(shape))
    weight = torch.randn(shape, generator=generator).mul(0.02).to(dtype)
    if zero_block and weight.numel() > 256:
        weight.view(-1)[64:200] = 0
    return weight


def bnb_quantize(weight, block_size, quant_type):
    return torch.ops.bitsandbytes.quantize_4bit(weight, block_size, quant_type, torch.uint8)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def nested(absmax):
    return (*nf4.quantize_absmax(absmax)[:2], codebooks.dynamic_map(), absmax.mean())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_equal_bitsandbytes(shape, dtype, quant_type):
    weight = random_weight(shape, dtype)
    for block_size in (64, 128, 256, 512, 4096):
        packed, absmax = nf4.quantize_4bit(weight, block_size=block_size, quant_type=quant_type)
        expected_packed, expected_absmax = bnb_quantize(weight, block_size, quant_type)
        assert torch.equal(packed, expected_packed)
        assert same_bits(absmax, expected_absmax)
        absmax_u8, nested_absmax, offset = nf4.quantize_absmax(absmax)
        codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
        assert torch.equal(absmax_u8, codes)
        assert same_bits(nested_absmax, state.absmax)
        assert offset == absmax.mean()


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [64, 128, 256, 512])
def test_dequantized_weights_equal_bitsandbytes(block_size, dtype, quant_type):
    # bitsandbytes' AVX-512 code is only right where rows are whole blocks.
    shape = (24, 1024)
    packed, absmax = bnb_quantize(random_weight(shape, dtype), block_size, quant_type)
    codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    settings = {"block_size": block_size, "quant_type": quant_type}
    ours = nf4.dequantize_4bit(packed, absmax, shape=shape, dtype=dtype, **settings)
    theirs = torch.ops.bitsandbytes.dequantize_4bit
    assert same_bits(ours, theirs(packed, absmax, block_size, quant_type, shape, dtype))
    scales = bnb.dequantize_blockwise(codes, state) + absmax.mean()
    offset = absmax.mean()
    assert same_bits(nf4.dequantize_absmax(codes, state.absmax, state.code, offset), scales)
    ours = nf4.dequantize_nested(
        packed, codes, state.absmax, state.code, offset, shape=shape, dtype=dtype, **settings
    )
    assert same_bits(ours, theirs(packed, scales, block_size, quant_type, shape, dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_cpu_path_equals_the_reference(shape, dtype, quant_type):
    weight = random_weight(shape, dtype)
    for block_size in (64, 256, 4096):
        settings = {"block_size": block_size, "quant_type": quant_type}
        packed, absmax = nf4.reference_quantize_4bit(weight, **settings)
        ours = nf4.quantize_4bit(weight, **settings)
        assert torch.equal(ours[0], packed)
        assert same_bits(ours[1], absmax)
        settings |= {"shape": shape, "dtype": dtype}
        dense = nf4.reference_dequantize_4bit(packed, absmax, **settings)
        assert same_bits(nf4.dequantize_4bit(packed, absmax, **settings), dense)
        assert same_bits(nf4_cpu.torch_dequantize_4bit(packed, absmax, **settings), dense)
        dense = nf4.reference_dequantize_nested(packed, *nested(absmax), **settings)
        assert same_bits(nf4.dequantize_nested(packed, *nested(absmax), **settings), dense)


def test_without_a_compiler_the_results_are_the_same(monkeypatch):
    weight = random_weight((300, 515), torch.bfloat16)
    settings = {"shape": weight.shape, "dtype": weight.dtype}
    packed, absmax = nf4.quantize_4bit(weight)
    dense = nf4.dequantize_nested(packed, *nested(absmax), **settings)
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(nf4.quantize_4bit(weight)[0], packed)
    assert same_bits(
        nf4.dequantize_4bit(packed, absmax, **settings).view(-1)[:0], dense.view(-1)[:0]
    )
    assert same_bits(nf4.dequantize_nested(packed, *nested(absmax), **settings), dense)


def test_views_are_quantized_as_their_contiguous_copies():
    weight = random_weight((128, 96), torch.bfloat16)
    for view in (weight.T, weight[:, ::2], weight[3:]):
        ours, copied = nf4.quantize_4bit(view), nf4.quantize_4bit(view.contiguous())
        assert torch.equal(ours[0], copied[0])
        assert torch.equal(ours[1], copied[1])


@pytest.mark.parametrize("rule", ["cpu", "cuda"])
def test_a_zero_block_is_code_7_and_decodes_to_zeros(rule):
    packed, absmax = nf4.reference_quantize_4bit(torch.zeros(3, 64), rule=rule)
    assert packed.unique().tolist() == [0x77]
    dense = nf4.dequantize_nested(packed, *nested(absmax), shape=(3, 64), dtype=torch.float32)
    assert torch.equal(dense, torch.zeros(3, 64))


def test_the_cuda_rule_gives_bfloat16_weights_the_same_codes():
    weight = random_weight((512, 512), torch.bfloat16)
    on_cpu = nf4.reference_quantize_4bit(weight, rule="cpu")
    on_cuda = nf4.reference_quantize_4bit(weight, rule="cuda")
    assert torch.equal(on_cpu[0], on_cuda[0])
    assert torch.equal(on_cpu[1], on_cuda[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantize", [nf4.quantize_4bit, nf4.reference_quantize_4bit])
def test_a_weight_that_is_not_finite_shows_in_its_absmax(quantize, value):
    weight = torch.randn(256)
    weight[70] = value
    _, absmax = quantize(weight)
    assert absmax.isfinite().tolist() == [True, False, True, True]


@settings(max_examples=30, deadline=None)
@given(
    values=hnp.arrays(
        np.float32,
        st.integers(1, 400),
        elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
    ),
    block_size=st.sampled_from([64, 128]),
)
def test_a_round_trip_stays_within_half_a_gap(values, block_size):
    weight = torch.from_numpy(values)
    packed, absmax = nf4.quantize_4bit(weight, block_size=block_size)
    options = {"shape": weight.shape, "dtype": torch.float32, "block_size": block_size}
    dense = nf4.dequantize_4bit(packed, absmax, **options)
    half_gap = codebooks.levels("nf4").diff().max() / 2 * 1.0001
    bound = absmax.repeat_interleave(block_size)[: weight.numel()] * half_gap
    assert bool(((dense - weight).abs() <= bound).all())
    # What was decoded is made of levels, so coding it again changes nothing.
    again = nf4.quantize_4bit(dense, block_size=block_size)
    redone = nf4.dequantize_4bit(*again, **options)
    torch.testing.assert_close(redone, dense, rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(
        np.float32, st.integers(1, 600), elements=st.floats(0, 10, width=32, allow_subnormal=False)
    )
)
def test_double_quantization_keeps_scales_within_its_largest_step(values):
    absmax = torch.from_numpy(values)
    absmax_u8, nested_absmax, offset = nf4.quantize_absmax(absmax)
    table = codebooks.dynamic_map()
    decoded = nf4.dequantize_absmax(absmax_u8, nested_absmax, table, offset)
    # Half the widest step of the map, and the bins in which bitsandbytes looks codes up.
    step = table.diff().max() / 2 + 2**-15
    bound = nested_absmax.repeat_interleave(256)[: absmax.numel()] * step + 1e-5
    assert bool(((decoded - absmax).abs() <= bound).all())


def test_ops_pass_opcheck():
    weight = torch.randn(7, 33, dtype=torch.bfloat16)
    packed, absmax = nf4.quantize_4bit(weight)
    ops, options = torch.ops.halfbyte, {"shape": [7, 33], "dtype": torch.bfloat16}
    torch.library.opcheck(ops.quantize_4bit.default, (weight,))
    torch.library.opcheck(ops.quantize_blockwise.default, (absmax,))
    torch.library.opcheck(ops.dequantize_4bit.default, (packed, absmax), options)
    torch.library.opcheck(ops.dequantize_nested.default, (packed, *nested(absmax)), options)


def test_compiles_without_a_graph_break():
    weight = torch.randn(8, 96, dtype=torch.bfloat16)
    packed, absmax = nf4.quantize_4bit(weight)
    scales = nested(absmax)

    def twice(packed):
        return nf4.dequantize_nested(packed, *scales, shape=(8, 96), dtype=torch.bfloat16) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed), twice(packed))


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (torch.zeros(0), {}),
        (torch.zeros(64, dtype=torch.float64), {}),
        (torch.zeros(64, dtype=torch.int32), {}),
        (torch.zeros(64), {"block_size": 63}),
        (torch.zeros(64), {"block_size": 8192}),
        (torch.zeros(64), {"quant_type": "int4"}),
    ],
)
def test_refuses_what_it_cannot_quantize(weight, options):
    with pytest.raises(QuantizationError, match="got"):
        nf4.quantize_4bit(weight, **options)


def test_refuses_scales_of_another_length():
    packed, absmax = nf4.quantize_4bit(torch.randn(4, 64))
    absmax_u8, nested_absmax, table, offset = nested(absmax)
    options = {"shape": (4, 64), "dtype": torch.float32}
    with pytest.raises(QuantizationError, match="got 128 uint8, 3 float32"):
        nf4.dequantize_4bit(packed, absmax[:3], **options)
    with pytest.raises(QuantizationError, match="got 127 uint8"):
        nf4.dequantize_4bit(packed[:-1], absmax, **options)
    with pytest.raises(QuantizationError, match="255 float32"):
        nf4.dequantize_nested(packed, absmax_u8, nested_absmax, table[:255], offset, **options)
    with pytest.raises(QuantizationError, match="0 float32"):
        nf4.dequantize_nested(packed, absmax_u8, nested_absmax[:0], table, offset, **options)


def test_refuses_scales_of_another_width():
    packed, absmax = nf4.quantize_4bit(torch.randn(4, 64))
    absmax_u8, nested_absmax, table, offset = nested(absmax)
    options = {"shape": (4, 64), "dtype": torch.float32}
    with pytest.raises(QuantizationError, match="got 128 uint8, 4 bfloat16"):
        nf4.dequantize_4bit(packed, absmax.bfloat16(), **options)
    with pytest.raises(QuantizationError, match="got 128 int8"):
        nf4.dequantize_4bit(packed.view(torch.int8), absmax, **options)
    with pytest.raises(QuantizationError, match="1 float16"):
        nf4.dequantize_nested(packed, absmax_u8, nested_absmax.half(), table, offset, **options)


@pytest.mark.parametrize("numel", [1, 255, 256, 1300])
def test_codes_of_scales_equal_the_reference_on_a_cpu(numel):
    torch.manual_seed(0)
    values = torch.randn(numel) * 10.0 ** torch.randint(-6, 1, (numel,))
    values[256:512] = 0
    expected = nf4.reference_quantize_blockwise(values)
    for ours, theirs in zip(nf4_cpu.quantize_blockwise(values), expected, strict=True):
        assert same_bits(ours, theirs)
    values[0] = torch.nan
    assert nf4_cpu.quantize_blockwise(values)[1][0].isnan()
