import os
import shutil

import pytest
import torch

from halfbyte.checkpoint.reader import CheckpointReader, read_file
from halfbyte.errors import CheckpointError


@pytest.fixture(params=["single", "sharded"])
def folder(request):
    return request.getfixturevalue(request.param)


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match):
        CheckpointReader(folder)


def test_reads_every_tensor(folder, tensors):
    reader = CheckpointReader(folder)
    assert set(reader.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.tensor(name), tensor)
        assert reader.info(name).dtype == tensor.dtype


def test_one_file_is_read_whole(single, tensors):
    found = read_file(single / "model.safetensors")
    assert list(found) == sorted(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_an_unknown_tensor(folder):
    with pytest.raises(CheckpointError, match="no tensor 'other'"):
        CheckpointReader(folder).tensor("other")


def test_a_file_that_shrinks_after_it_was_described(single):
    reader = CheckpointReader(single)
    os.truncate(single / "model.safetensors", 200)
    with pytest.raises(CheckpointError, match="ends within"):
        [reader.tensor(name) for name in reader.names()]


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", "no folder")


def test_a_folder_without_weights(tmp_path):
    refused(tmp_path, "neither")


def test_case_19_pickled_weights_are_not_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "sentinel"), "w"))

    torch.save(Evil(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pickle")
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize(
    "target",
    ["../outside/model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", ".."],
)
def test_case_16_an_index_that_leads_out_of_the_folder(sharded, single, change_index, target):
    shutil.copytree(single, sharded.parent / "outside")
    change_index(sharded, lambda names: dict.fromkeys(names, target))
    refused(sharded, "leads out|no safetensors")


def test_case_16_a_link_that_leads_out_of_the_folder(sharded, single):
    shard = sharded / "model-1.safetensors"
    shard.unlink()
    shard.symlink_to(single / "model.safetensors")
    refused(sharded, "is a link to")


def test_a_link_within_the_folder_is_fine(sharded):
    shard = sharded / "model-1.safetensors"
    shard.rename(sharded / "real.safetensors")
    shard.symlink_to("real.safetensors")
    assert CheckpointReader(sharded).names()


def test_links_of_the_hub_cache_are_fine(single, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.copy(single / "model.safetensors", blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert CheckpointReader(snapshot).names()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_case_16_a_shard_that_is_no_file(sharded, make):
    (sharded / "model-1.safetensors").unlink()
    make(sharded / "model-1.safetensors")
    refused(sharded, "regular file")


def test_case_17_an_index_that_names_a_missing_shard(sharded):
    (sharded / "model-2.safetensors").unlink()
    refused(sharded, "cannot be read")


def test_case_17_a_shard_with_more_than_the_index_says(sharded, change_index):
    change_index(sharded, lambda names: {k: v for k, v in names.items() if k != "codes"})
    refused(sharded, "disagree about 1 tensors, such as 'codes'")


def test_case_17_an_index_with_more_than_the_shards_hold(sharded, change_index):
    change_index(sharded, lambda names: names | {"more": "model-1.safetensors"})
    refused(sharded, "disagree about 1 tensors, such as 'more'")


@pytest.mark.parametrize(
    "change",
    [
        lambda names: list(names),
        lambda names: {},
        lambda names: dict.fromkeys(names, 1),
        lambda names: dict.fromkeys(names, "model.bin"),
        lambda names: {f"tensor.{i}": "model-1.safetensors" for i in range(10**5)},
    ],
    ids=["list", "empty", "numbers", "pickle", "many"],
)
def test_case_18_a_weight_map_that_is_none(sharded, change_index, change):
    change_index(sharded, change)
    refused(sharded, "weight_map|no safetensors|disagree")
