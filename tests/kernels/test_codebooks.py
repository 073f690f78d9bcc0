import bitsandbytes.functional as bnb
import pytest
import torch

from halfbyte.kernels import codebooks


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_levels_equal_bitsandbytes(quant_type):
    assert torch.equal(codebooks.levels(quant_type), bnb.get_4bit_type(quant_type, device="cpu"))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_equals_bitsandbytes(signed):
    theirs = bnb.create_dynamic_map(signed=signed)
    ours = codebooks.dynamic_map(signed=signed)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert bool((ours.diff() > 0).all())


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_level_is_its_own_nearest(quant_type, device_type):
    levels = codebooks.levels(quant_type, device_type)
    rank = torch.bucketize(levels, codebooks.thresholds(quant_type, device_type))
    codes = codebooks.codes_by_rank(quant_type, device_type)[rank].tolist()
    expected = list(range(16))
    if quant_type == "fp4":
        # Two codes mean zero; both quantize to 0.
        expected[8] = 0
    assert codes == expected


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_thresholds_find_the_nearest_value(signed):
    table = codebooks.dynamic_map(signed=signed)
    thresholds = codebooks.dynamic_thresholds(signed=signed)
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = torch.cat([x, x * 1e-3, table, torch.tensor([-1.0])])
    found = torch.bucketize(x, thresholds)
    distance = (table[found].double() - x.double()).abs()
    nearest = (table.double() - x.double()[:, None]).abs().amin(dim=1)
    torch.testing.assert_close(distance, nearest, rtol=1e-6, atol=0)


def test_a_midpoint_belongs_to_the_even_index():
    table, thresholds = codebooks.dynamic_map(), codebooks.dynamic_thresholds()
    midpoints = (table[:-1] + table[1:]) * 0.5
    assert bool((torch.bucketize(midpoints, thresholds) % 2 == 0).all())


def test_tables_stay_on_the_cpu_under_a_default_device():
    with torch.device("meta"):
        tables = [
            codebooks.levels("nf4"),
            codebooks.thresholds("fp4", "cuda"),
            codebooks.dynamic_map(),
            codebooks.dynamic_map(signed=False),
        ]
    assert {table.device.type for table in tables} == {"cpu"}
