"""The CUDA path against the reference, and against bitsandbytes' CUDA kernels where they load."""

import math

import pytest
import torch

from halfbyte.kernels import codebooks, nf4

pytestmark = pytest.mark.gpu

SHAPES = [
    (1,), (2,), (63,), (64,), (65,), (127,), (129,), (4096,), (1, 64), (64, 1), (2, 33), (3, 5, 7),
    (7, 1000), (128, 96), (4096, 1024), (1001, 515), (2049, 2053),
]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BLOCK_SIZES = (64, 128, 256, 512, 4096)


@pytest.fixture(autouse=True)
def poisoned():
    """New tensors start as NaN, or 255 for bytes: an element that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_weight(shape, dtype):
    generator = torch.Generator("cuda").manual_seed(math.prod(shape))
    weight = torch.randn(shape, generator=generator, device="cuda")
    return weight.mul(0.02).to(dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def nested(absmax):
    codes, nested_absmax, offset = nf4.quantize_absmax(absmax)
    return codes, nested_absmax, codebooks.dynamic_map().cuda(), offset


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_codes_equal_those_of_the_cpu(shape):
    """NF4 only: values of bf16 fall on thresholds of FP4, which the two devices place apart."""
    weight = random_weight(shape, torch.bfloat16)
    if weight.numel() > 256:
        weight.view(-1)[64:200] = 0
    for block_size in BLOCK_SIZES:
        packed, absmax = nf4.quantize_4bit(weight, block_size=block_size)
        expected_packed, expected_absmax = nf4.reference_quantize_4bit(
            weight.cpu(), block_size=block_size
        )
        assert torch.equal(packed.cpu(), expected_packed)
        assert torch.equal(absmax.cpu(), expected_absmax)


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_equal_bitsandbytes(shape, dtype, quant_type):
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight(shape, dtype)
    for block_size in BLOCK_SIZES:
        packed, absmax = nf4.quantize_4bit(weight, block_size=block_size, quant_type=quant_type)
        theirs = torch.ops.bitsandbytes.quantize_4bit(weight, block_size, quant_type, torch.uint8)
        assert torch.equal(packed, theirs[0])
        assert same_bits(absmax, theirs[1])
        codes, nested_absmax, offset = nf4.quantize_absmax(absmax)
        their_codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
        assert torch.equal(codes, their_codes)
        assert same_bits(nested_absmax, state.absmax)
        assert torch.equal(offset, absmax.mean())


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantized_weights_equal_the_reference(shape, dtype, quant_type):
    weight = random_weight(shape, dtype)
    for block_size in BLOCK_SIZES:
        settings = {"block_size": block_size, "quant_type": quant_type}
        packed, absmax = nf4.quantize_4bit(weight, **settings)
        settings |= {"shape": shape, "dtype": dtype}
        dense = nf4.reference_dequantize_4bit(packed, absmax, **settings)
        assert same_bits(nf4.dequantize_4bit(packed, absmax, **settings), dense)
        scales = nested(absmax)
        dense = nf4.reference_dequantize_nested(packed, *scales, **settings)
        assert same_bits(nf4.dequantize_nested(packed, *scales, **settings), dense)


@pytest.mark.parametrize("quant_type", nf4.QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [64, 128, 256, 512])
def test_dequantized_weights_equal_bitsandbytes(block_size, dtype, quant_type):
    bnb = pytest.importorskip("bitsandbytes.functional")
    shape = (1000, 1031)
    weight = random_weight(shape, dtype)
    for compress in (False, True):
        packed, state = bnb.quantize_4bit(
            weight, blocksize=block_size, quant_type=quant_type, compress_statistics=compress
        )
        settings = {"shape": shape, "dtype": dtype}
        settings |= {"block_size": block_size, "quant_type": quant_type}
        if compress:
            nested_state = (state.absmax, state.state2.absmax, state.state2.code, state.offset)
            ours = nf4.dequantize_nested(packed, *nested_state, **settings)
        else:
            ours = nf4.dequantize_4bit(packed, state.absmax, **settings)
        assert same_bits(ours, bnb.dequantize_4bit(packed, state))


def test_a_zero_block_is_code_7_unlike_bitsandbytes():
    packed, absmax = nf4.quantize_4bit(torch.zeros(3, 64, device="cuda"))
    assert packed.unique().tolist() == [0x77]
    dense = nf4.dequantize_nested(packed, *nested(absmax), shape=(3, 64), dtype=torch.bfloat16)
    assert not bool(dense.any())


def test_a_weight_that_is_not_finite_shows_in_its_absmax():
    for value in (math.nan, math.inf, -math.inf):
        weight = torch.randn(256, device="cuda")
        weight[70] = value
        assert nf4.quantize_4bit(weight)[1].isfinite().tolist() == [True, False, True, True]


def test_more_than_two_to_the_31_elements():
    numel = 2**31 + 4096 + 63
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    torch.use_deterministic_algorithms(False)
    weight = torch.empty(numel, dtype=torch.bfloat16, device="cuda")
    weight.view(-1)[: 2**20].normal_()
    weight[2**20 :] = 1
    weight[-4096:] = weight[:4096]
    packed, absmax = nf4.quantize_4bit(weight)
    dense = nf4.dequantize_4bit(packed, absmax, shape=(numel,), dtype=torch.bfloat16)
    assert bool((dense[2**20 : -4160] == 1).all())
    tail, scales = nf4.quantize_4bit(weight[-4096 - 63 :].clone())
    expected = nf4.dequantize_4bit(tail, scales, shape=(4159,), dtype=torch.bfloat16)
    assert torch.equal(dense[-(4096 + 63) :], expected)


def test_compiles_without_a_graph_break():
    packed, absmax = nf4.quantize_4bit(random_weight((64, 96), torch.bfloat16))
    scales = nested(absmax)

    def twice(packed):
        return nf4.dequantize_nested(packed, *scales, shape=(64, 96), dtype=torch.bfloat16) * 2

    assert torch.equal(torch.compile(twice, fullgraph=True)(packed), twice(packed))
