"""What bitsandbytes accepts, or crashes on, is refused: the numbers are those of the fault list."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch

from halfbyte.errors import CheckpointError
from halfbyte.quant import layout
from halfbyte.quant.weight import QuantizedWeight

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.fixture(params=[True, False], ids=["double", "single"])
def weight(request):
    torch.manual_seed(0)
    matrix = torch.randn(192, 128).bfloat16()
    return QuantizedWeight.quantize(matrix, double_quant=request.param)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    weight = QuantizedWeight.quantize(torch.randn(1024, 64).bfloat16())
    return layout.to_tensors(NAME, weight)


def with_state(tensors, **changes):
    state = json.loads(bytes(tensors[STATE].tolist()))
    return with_blob(tensors, json.dumps(state | changes).encode())


def with_blob(tensors, blob: bytes):
    return tensors | {STATE: torch.frombuffer(bytearray(blob), dtype=torch.uint8)}


def refused(tensors, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        layout.from_tensors(NAME, tensors)
    assert NAME in caught.value.message


def test_comes_back_unchanged(weight):
    again = layout.from_tensors(NAME, layout.to_tensors(NAME, weight))
    assert again.tensors().keys() == weight.tensors().keys()
    assert all(torch.equal(again.tensors()[key], weight.tensors()[key]) for key in again.tensors())
    assert (again.shape, again.dtype) == (weight.shape, weight.dtype)


def test_writes_what_bitsandbytes_writes(weight):
    _, state = bnb.quantize_4bit(
        torch.zeros(1, 64), quant_type="nf4", compress_statistics=weight.nested is not None
    )
    expected = {f"{NAME}.{key}" for key in state.as_dict(packed=True)} | {NAME}
    assert set(layout.to_tensors(NAME, weight)) == expected


def test_bitsandbytes_reads_it(weight):
    tensors = layout.to_tensors(NAME, weight)
    packed = tensors.pop(NAME)
    named = {key.removeprefix(NAME + "."): tensor for key, tensor in tensors.items()}
    state = bnb.QuantState.from_dict(named, device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(packed, state), weight.dequantize())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_case_34_any_storage_dtype_gives_the_same_codes(tensors, storage):
    stored = tensors | {NAME: tensors[NAME].view(-1).view(storage).view(-1, 1)}
    assert torch.equal(layout.from_tensors(NAME, stored).packed, tensors[NAME])


def test_case_35_both_kinds_of_zero_blocks_load(tensors):
    for code in (0x00, 0x77):
        zero = tensors | {NAME: torch.full_like(tensors[NAME], code)}
        assert (layout.from_tensors(NAME, zero).packed == code).all()


@pytest.mark.parametrize("suffix", ["", *layout.SCALE_SUFFIXES, layout.STATE_SUFFIXES[0]])
def test_a_missing_tensor(tensors, suffix):
    del tensors[NAME + suffix]
    refused(tensors, "missing|expected one quant_state")


def test_an_unknown_tensor(tensors):
    refused(tensors | {f"{NAME}.extra": torch.zeros(1)}, "unknown tensors")


@pytest.mark.parametrize("suffix", ["", ".absmax"])
def test_case_25_codes_or_absmax_one_short(tensors, suffix):
    refused(tensors | {NAME + suffix: tensors[NAME + suffix][:-1]}, "expected")


@pytest.mark.parametrize("suffix", [".nested_absmax", ".nested_quant_map", ".quant_map"])
def test_case_26_nested_scales_or_a_map_one_short(tensors, suffix):
    refused(tensors | {NAME + suffix: tensors[NAME + suffix][:-1]}, "expected torch.float32")


@pytest.mark.parametrize(
    "blob",
    [b"\xff\xfe", b"{", b"[" * 3000, b"[]", b"null", b" " * 10_000_000, b'{"quant_type": NaN}'],
    ids=["utf8", "json", "deep", "list", "null", "huge", "nan"],
)
def test_case_27_a_state_that_is_no_small_object(tensors, blob):
    refused(with_blob(tensors, blob), "quant_state")


def test_case_27_a_state_with_an_unknown_key(tensors):
    refused(with_state(tensors, evil=1), "keys")


def test_a_state_without_a_key(tensors):
    blob = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"}).encode()
    refused(with_blob(tensors, blob), "keys")


@pytest.mark.parametrize("dtype", ["load", "int8", "__class__", "float64", 16, ["bfloat16"]])
def test_case_28_a_dtype_that_is_none(tensors, dtype):
    refused(with_state(tensors, dtype=dtype), "dtype")


@pytest.mark.parametrize(
    "shape", [[64, 512], [1024], [1024, -64], [1024, 64.0], [], "1024", [True, 65536], [2**62, 4]]
)
def test_case_29_a_shape_that_does_not_fit(tensors, shape):
    with pytest.raises(CheckpointError, match=r"shape|expected"):
        layout.from_tensors(NAME, with_state(tensors, shape=shape), shape=(1024, 64))


def test_case_29_the_same_elements_in_another_shape_fit_no_model(tensors):
    with pytest.raises(CheckpointError, match="as in the model"):
        layout.from_tensors(NAME, tensors, shape=(64, 1024))


@pytest.mark.parametrize("size", [0, -1, 63, 2**40, 64.0, "64", True])
def test_case_30_a_block_size_that_is_none(tensors, size):
    refused(with_state(tensors, blocksize=size), "block size|expected")


def test_case_30_nested_blocks_of_another_size(tensors):
    refused(with_state(tensors, nested_blocksize=64), "nested")


@pytest.mark.parametrize("offset", ["0.5", 1e300, None, [0.1], True])
def test_case_31_an_offset_that_is_no_float32(tensors, offset):
    refused(with_state(tensors, nested_offset=offset), "nested_offset")


def test_case_31_an_offset_that_is_nan(tensors):
    blob = bytes(tensors[STATE].tolist()).decode()
    head, _, _ = blob.partition('"nested_offset": ')
    refused(with_blob(tensors, f'{head}"nested_offset": NaN}}'.encode()), "nested_offset|JSON")


def test_case_32_a_map_that_is_not_nf4(tensors):
    refused(tensors | {f"{NAME}.quant_map": torch.linspace(-1, 1, 16)}, "quant_map")


def test_case_33_fp4_under_the_name_of_nf4(tensors):
    refused(with_state(tensors, quant_type="fp4"), "says 'fp4'")


@pytest.mark.parametrize("suffix", [".nested_absmax", ".nested_quant_map", ".quant_map"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite(tensors, suffix, bad):
    damaged = tensors[NAME + suffix].clone()
    damaged[0] = bad
    refused(tensors | {NAME + suffix: damaged}, "NaN or Inf")


def test_a_nested_map_that_is_not_sorted(tensors):
    turned = tensors[f"{NAME}.nested_quant_map"].flip(0)
    refused(tensors | {f"{NAME}.nested_quant_map": turned}, "sorted")


@pytest.mark.parametrize("suffix", layout.SCALE_SUFFIXES)
def test_a_scale_of_another_dtype(tensors, suffix):
    refused(tensors | {NAME + suffix: tensors[NAME + suffix].double()}, "expected")
