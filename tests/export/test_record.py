"""What an adapter's folder says about its base is found, and what it does not say is asked for."""

from pathlib import Path

import peft
import pytest
import torch

from halfbyte.adapters.files import AdapterFiles, read_adapter_files
from halfbyte.adapters.inject import add_lora
from halfbyte.adapters.io import save_adapter
from halfbyte.errors import AdapterError, CheckpointError
from halfbyte.export.record import check_base, find_base, recorded_recipe
from halfbyte.models.load import load
from halfbyte.models.skeleton import read_skeleton
from halfbyte.quant.config import NF4Config


def adapter(base=None, identity=None):
    config = peft.LoraConfig(base_model_name_or_path=base, target_modules=["q_proj"])
    return AdapterFiles(Path("folder"), config, {}, identity or {})


def test_the_base_is_where_training_found_it_or_where_the_caller_says(tiny_base, tmp_path):
    assert find_base(adapter(str(tiny_base))) == tiny_base
    assert find_base(adapter("./gone"), tiny_base) == tiny_base
    with pytest.raises(
        CheckpointError, match="the base of the adapter in folder is gone"
    ) as caught:
        find_base(adapter("./gone"))
    assert "--base" in caught.value.hint
    with pytest.raises(AdapterError, match="does not name its base"):
        find_base(adapter())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_saved_adapter_records_is_read_back(tiny_base, tmp_path, dtype):
    config = NF4Config(
        "fp4", block_size=128, double_quant=False, skip_modules=["lm_head", "k_proj"]
    )
    model, _ = load(tiny_base, quant=config, dtype=dtype, device="cpu")
    save_adapter(add_lora(model, r=2), tmp_path / "adapter")
    recipe = recorded_recipe(read_adapter_files(tmp_path / "adapter"))
    assert recipe.dtype == dtype
    found = recipe.config
    assert (found.quant_type, found.block_size, found.double_quant) == ("fp4", 128, False)
    assert found.skip_modules == ["lm_head", "k_proj"]


def test_a_base_in_16_bits_has_no_recipe(tiny_base, tmp_path):
    model, _ = load(tiny_base, quant=None, device="cpu")
    save_adapter(add_lora(model, r=2), tmp_path / "adapter")
    assert recorded_recipe(read_adapter_files(tmp_path / "adapter")) is None


@pytest.mark.parametrize("quant", [None, NF4Config()])
def test_another_base_is_refused(tiny_base, make_base, tmp_path, quant):
    model, _ = load(tiny_base, quant=quant, device="cpu")
    save_adapter(add_lora(model, r=2), tmp_path / "adapter")
    files = read_adapter_files(tmp_path / "adapter")
    check_base(files, read_skeleton(tiny_base))
    with pytest.raises(AdapterError, match="trained on another base"):
        check_base(files, read_skeleton(make_base(initializer_range=0.2)))
    (tmp_path / "adapter" / "halfbyte.json").unlink()
    files = read_adapter_files(tmp_path / "adapter")
    check_base(files, read_skeleton(make_base(initializer_range=0.2)))


def test_an_adapter_that_says_nothing_is_not_guessed_at():
    with pytest.raises(AdapterError, match="says how training held the base") as caught:
        recorded_recipe(adapter())
    assert "--quant nf4" in caught.value.hint
