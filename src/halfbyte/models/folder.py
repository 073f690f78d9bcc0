"""Find the folder of a model: on this machine, or downloaded from the hub.

Only what is read is downloaded: JSON, safetensors and tokenizer files, no pickles and no code.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from halfbyte.errors import CheckpointError

_DESCRIBED = ("*.json", "*.model", "*.txt", "*.jinja")
_READ = (*_DESCRIBED, "*.safetensors")
# Second copies of the weights, in folders or formats of their makers.
_IGNORED = ("*/*", "consolidated*.safetensors")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_folder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    with_weights: bool = True,
) -> Path:
    """Return the folder of the model called `name_or_path`, downloading it if it is not here.

    Args:
        name_or_path: A folder, or a name on the hub such as `Qwen/Qwen3-8B`.
        revision: Branch, tag or commit on the hub.
        token: Access token for the hub; by default the one that is logged in.
        with_weights: Without, only what describes the model and its tokenizer is downloaded.

    Raises:
        CheckpointError: there is no such folder, and the hub has or gives no such model.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    is_path = path.is_absolute() or name.startswith((".", "~")) or not _HUB_NAME.fullmatch(name)
    if is_path or path.exists():
        raise CheckpointError(
            f"expected the folder of a model, got {name!r}, which is "
            f"{'no folder' if path.exists() else 'not there'}",
            hint="check the path, or give a name on the hub such as Qwen/Qwen3-8B",
        )
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            allow_patterns=list(_READ if with_weights else _DESCRIBED),
            ignore_patterns=list(_IGNORED),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"there is no folder {name!r}, and the hub does not give it: {reason}",
            hint="check the name and the network; for a gated model run `hf auth login` first",
        ) from error
    return Path(folder)
