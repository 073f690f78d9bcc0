"""Read a model's tensors from a folder, one at a time.

Only safetensors are read, in one file or in shards with an index; pickled weights are refused. No
name in an index reaches outside the folder, and what an index says must be what the shards hold.
"""

import reprlib
from io import RawIOBase
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.checkpoint.header import AGAIN, TensorInfo, read_header, read_json
from halfbyte.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointReader:
    """The tensors of a model's folder, described at once and read on demand.

    Args:
        folder: A folder with `model.safetensors`, or with shards and their index.

    Raises:
        CheckpointError: the folder or its weights are missing, damaged, pickled, or elsewhere.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is no folder",
                hint="check the path, or give the name of a hub model",
            )
        if (self.folder / SINGLE_FILE).exists():
            self.files = [inside(self.folder, SINGLE_FILE)]
            self._tensors = read_header(self.files[0])
        elif (self.folder / INDEX_FILE).exists():
            self._tensors = self._read_shards()
            self.files = sorted({info.file for info in self._tensors.values()})
        else:
            raise _no_weights(self.folder)

    def names(self) -> list[str]:
        """Return the names of all tensors, file by file, in the order of their bytes."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and place of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}", hint=AGAIN)
        return self._tensors[name]

    def tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor; nothing else of its file enters memory.

        Raises:
            CheckpointError: there is no such tensor, or the file ends early.
        """
        return read_tensor(name, self.info(name)).to(device)

    def _read_shards(self) -> dict[str, TensorInfo]:
        index = inside(self.folder, INDEX_FILE)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: expected an object 'weight_map'", hint=AGAIN)
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index} maps {reprlib.repr(name)} to {reprlib.repr(shard)}, no safetensors "
                    "file"
                )
        tensors: dict[str, TensorInfo] = {}
        for shard in sorted(set(weight_map.values())):
            held = read_header(inside(self.folder, shard))
            listed = {name for name, file in weight_map.items() if file == shard}
            odd = sorted(listed ^ set(held))
            if odd:
                raise CheckpointError(
                    f"{index} and {shard} disagree about {len(odd)} tensors, such as "
                    f"{reprlib.repr(odd[0])}",
                    hint=AGAIN,
                )
            tensors |= held
        return tensors


def read_tensor(name: str, info: TensorInfo) -> Tensor:
    """Read the tensor that `info` describes; `name` is for the message.

    Raises:
        CheckpointError: the file ends early.
    """
    tensor = torch.empty(info.shape, dtype=info.dtype)
    target = tensor.view(-1).view(torch.uint8).numpy().data
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.start)
        read_into(file, target, name, info)
    return tensor


def read_into(file: RawIOBase, target: memoryview, name: str, info: TensorInfo) -> None:
    """Fill `target` from where `file` stands; `name` and `info` are for the message.

    Raises:
        CheckpointError: the file ends early.
    """
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])
        if not count:
            raise CheckpointError(f"{info.file} ends within {name!r}", hint=AGAIN)
        done += count


def read_file(path: Path) -> dict[str, Tensor]:
    """Read every tensor of one safetensors file, by name in the order of the alphabet.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    header = read_header(path)
    return {name: read_tensor(name, header[name]) for name in sorted(header)}


def inside(folder: Path, name: str) -> Path:
    """Return the path of the file `name` in `folder`.

    The hub's cache is the one place where links may lead out of a folder: from
    `snapshots/<revision>` to `blobs` beside it.

    Raises:
        CheckpointError: the name has a folder in it, or is a link that leads elsewhere.
    """
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(
            f"{folder}: the file name {reprlib.repr(name)} leads out of the folder"
        )
    try:
        real, allowed = path.resolve(), [folder.resolve()]
    except (OSError, ValueError, RuntimeError) as error:  # half a character, a NUL, links in a ring
        raise CheckpointError(
            f"{folder}: {reprlib.repr(name)} can be no file there: {error}"
        ) from error
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent.resolve() / "blobs")
    if real.parent not in allowed:
        raise CheckpointError(
            f"{path} is a link to {real}, out of its folder", hint="put the file itself there"
        )
    return path


def _no_weights(folder: Path) -> CheckpointError:
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return CheckpointError(
            f"{folder} has its weights only in {pickled[0]}, a pickle, which can run any code",
            hint="take a revision with safetensors, or convert it where you trust it",
        )
    return CheckpointError(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}",
        hint="copy the weights there, or give the folder or hub model that has them",
    )
