import json

import peft
import pytest
import torch
from safetensors.torch import save_file

from halfbyte.adapters.files import check_finite, read_adapter_files
from halfbyte.errors import AdapterError

NAME = "base_model.model.layers.0.q_proj.lora_A.weight"


@pytest.fixture
def folder(tmp_path):
    """The smallest adapter folder, as a hand may write it: few keys, no identity."""
    content = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    save_file({NAME: torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_reads_what_is_there(folder):
    found = read_adapter_files(str(folder))
    assert (found.config.r, found.config.lora_alpha) == (2, peft.LoraConfig().lora_alpha)
    assert torch.equal(found.tensors[NAME], torch.ones(2, 3))
    assert found.identity == {}


def test_settings_of_a_newer_peft_are_dropped_with_a_warning(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"setting_of_2030": 1}))
    with pytest.warns(UserWarning, match="setting_of_2030"):
        assert read_adapter_files(folder).config.r == 2


def test_identity_must_be_an_object(folder):
    (folder / "halfbyte.json").write_text("[]")
    with pytest.raises(AdapterError, match=r"halfbyte\.json: expected a JSON object, got list"):
        read_adapter_files(folder)


def test_a_rank_far_beyond_the_saved_ones_takes_no_memory(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 2**16}))
    with pytest.raises(AdapterError, match="asks for rank 65536, and the largest saved one is 2"):
        read_adapter_files(folder)


def test_links_that_lead_out_of_the_folder_are_not_followed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    (folder / "adapter_model.safetensors").rename(outside)
    (folder / "adapter_model.safetensors").symlink_to(outside)
    with pytest.raises(AdapterError, match="out of its folder"):
        read_adapter_files(folder)


def test_name_that_is_neither_folder_nor_hub_name(tmp_path):
    with pytest.raises(AdapterError, match="found none at"):
        read_adapter_files("no such adapter")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="found none at"):
        read_adapter_files(tmp_path / "file")


def test_finite_integers_and_floats_pass():
    check_finite({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)}, "here")
    with pytest.raises(AdapterError, match="a of here holds NaN or Inf"):
        check_finite({"a": torch.tensor([1.0, float("-inf")])}, "here")


def test_tensors_may_stay_on_disk(folder):
    held, left = read_adapter_files(folder), read_adapter_files(folder, in_memory=False)
    assert list(left.tensors) == list(held.tensors)
    assert torch.equal(left.tensors[NAME], held.tensors[NAME])
    save_file({NAME: torch.full((2, 3), float("nan"))}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="NaN or Inf"):
        read_adapter_files(folder, in_memory=False)
