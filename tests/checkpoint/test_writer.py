import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.checkpoint.header import DTYPES
from halfbyte.checkpoint.journal import JOURNAL_FILE, Journal
from halfbyte.checkpoint.reader import CheckpointReader
from halfbyte.checkpoint.writer import ShardedWriter
from halfbyte.errors import CheckpointError


def write(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    with ShardedWriter(folder, **settings) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


def test_one_file_equals_that_of_safetensors(tmp_path):
    torch.manual_seed(0)
    tensors = {
        f"{prefix}{code}": torch.randint(0, 2, (3, length)).to(dtype)
        for length, (code, dtype) in enumerate(DTYPES.items(), start=1)
        for prefix in ("z", "a.", 'quote"', "ünïcode.")
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 7)}
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    ours = (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()


def test_shards_hold_what_fits_and_an_index_tells_where(tmp_path, tensors):
    folder = write(tmp_path / "out", tensors, max_shard_bytes=300)
    shards = sorted(folder.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    reader = CheckpointReader(folder)
    assert all(torch.equal(reader.tensor(name), tensors[name]) for name in tensors)
    assert not list(folder.glob("*.partial"))


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    tensors = {name: torch.zeros(100) for name in "abc"}
    folder = write(tmp_path / "out", tensors, max_shard_bytes=1)
    assert len(list(folder.glob("*.safetensors"))) == 3


def test_takes_views_and_gradients(tmp_path):
    matrix = torch.arange(12.0).view(3, 4).requires_grad_()
    folder = write(tmp_path / "out", {"turned": matrix.T})
    assert torch.equal(load_file(folder / "model.safetensors")["turned"], matrix.detach().T)


def test_a_name_can_be_written_once(tmp_path):
    writer = ShardedWriter(tmp_path)
    writer.add("a", torch.zeros(1))
    with pytest.raises(CheckpointError, match="twice"):
        writer.add("a", torch.zeros(1))


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor"):
        ShardedWriter(tmp_path).close()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="failed"):
        ShardedWriter(tmp_path / "nowhere").add("a", torch.zeros(1))


def start(folder, tensors, stop_after, **settings):
    """Write as far as `stop_after` tensors, as a process does that is killed then."""
    folder.mkdir(exist_ok=True)
    writer = ShardedWriter(folder, max_shard_bytes=300, journal=Journal(folder, settings))
    for name, tensor in list(tensors.items())[:stop_after]:
        writer.add(name, tensor, notes={name: name.upper()})
    return writer


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != JOURNAL_FILE}


@pytest.mark.parametrize("stop_after", range(1, 6))
def test_goes_on_where_an_interrupted_writer_was(tmp_path, tensors, stop_after):
    start(tmp_path / "whole", tensors, 99).close()
    start(tmp_path / "out", tensors, stop_after)
    again = start(tmp_path / "out", tensors, 99)
    assert again.notes == {name: name.upper() for name in tensors}
    again.close()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_whole_shards_are_not_written_again(tmp_path, tensors):
    start(tmp_path, tensors, 99)
    first = tmp_path / "model-00001.partial"
    before = first.stat()
    start(tmp_path, tensors, 99).close()
    after = (tmp_path / "model-00001-of-00002.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_interruption_while_shards_get_their_names(tmp_path, tensors):
    start(tmp_path / "whole", tensors, 99).close()
    writer = start(tmp_path / "out", tensors, 99)
    writer.close()  # everything is named, and the process dies before the folder is published
    (tmp_path / "out" / "config.json").write_text("half")
    start(tmp_path / "out", tensors, 99).close()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["changed", "short", "gone"])
def test_a_damaged_shard_is_written_again(tmp_path, tensors, damage):
    start(tmp_path / "whole", tensors, 99).close()
    start(tmp_path / "out", tensors, 99)
    shard = tmp_path / "out" / "model-00001.partial"
    content = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(content[:-1] + (b"" if damage == "short" else b"\x7f"))
    start(tmp_path / "out", tensors, 99).close()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_another_purpose_left_is_discarded(tmp_path, tensors):
    start(tmp_path / "whole", tensors, 99, dtype="float16").close()
    start(tmp_path / "out", tensors, 99, dtype="float32")
    writer = start(tmp_path / "out", {}, 0, dtype="float16")
    assert writer.notes == {}
    assert contents(tmp_path / "out") == {}
