"""A run, a merged model or GGUF files to the Hugging Face hub.

What is uploaded is what others need to load the model, by a list of names; everything else stays
(checkpoints, optimizer states, caches, files of settings that name local paths). A text file that
holds what looks like a secret stops the upload.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from halfbyte.adapters.files import CONFIG_FILE
from halfbyte.checkpoint.header import read_json
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.train.card import write_card

_UPLOADED = (
    "README.md", "LICENSE*", "config.json", "generation_config.json", "adapter_config.json",
    "adapter_model.safetensors", "model.safetensors", "model-*.safetensors",
    "model.safetensors.index.json", "tokenizer*.json", "tokenizer.model", "vocab.*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "preprocessor_config.json",
    "processor_config.json", "halfbyte.json", "merge_report.json", "metrics.jsonl", "*.gguf",
    "*.Modelfile",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".gguf")
_SECRETS = {
    "a Hugging Face token": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "an API key": re.compile(rb"\bsk-[A-Za-z0-9_-]{20,}"),
    "a GitHub token": re.compile(rb"\bgh[pousr]_[A-Za-z0-9]{36,}"),
    "an AWS key": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


@dataclass(frozen=True)
class Upload:
    """What would be, or was, uploaded.

    Args:
        folder: From where.
        repo: To where.
        files: Size of each file in bytes, by name.
        left_out: What stays here.
        notices: What the user should know.
        url: Where it is now; None if it was not uploaded.
    """

    folder: Path
    repo: str
    files: dict[str, int]
    left_out: list[str]
    notices: list[str] = field(default_factory=list)
    url: str | None = None


def push(folder: str | Path, repo: str, *, private: bool = False, dry_run: bool = False) -> Upload:
    """Upload a folder to the hub.

    Args:
        folder: A run's, an adapter's or a model's folder, or one with GGUF files.
        repo: Its name there, such as me/my-model; it is made if it is not there.
        private: Make it a private one.
        dry_run: Say what would be uploaded, and touch neither folder nor network.

    Raises:
        CheckpointError: there is nothing to upload, a file holds a secret, or the hub refuses.
        ConfigError: `repo` is no name on the hub.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(
            f"{repo!r} is no name on the hub: {error}", hint="write it as user/name"
        ) from error
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder", hint="check the path")
    if not dry_run and (path / CONFIG_FILE).is_file():
        write_card(path)  # scores may have come since
    upload = _plan(path, repo)
    if dry_run:
        return upload
    try:
        api = HfApi(library_name="halfbyte")
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=path,
            repo_id=made.repo_id,
            allow_patterns=list(upload.files),
            commit_message="Upload with halfbyte push",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"the hub did not take {path}: {reason}", hint="run `hf auth login`, check the name"
        ) from error
    return Upload(path, repo, upload.files, upload.left_out, upload.notices, str(made))


def _plan(folder: Path, repo: str) -> Upload:
    """Choose the files, and look into them."""
    names = {path for pattern in _UPLOADED for path in folder.glob(pattern) if path.is_file()}
    chosen = sorted(path for path in names if not path.is_symlink())
    if not any(path.suffix in _WEIGHTS for path in chosen):
        raise CheckpointError(
            f"{folder} holds no weights to upload",
            hint="give the folder of a finished run, a merged model or GGUF files",
        )
    for path in chosen:
        _check_secrets(path)
    rest = sorted(path.name for path in folder.iterdir() if path not in chosen)
    files = {path.name: path.stat().st_size for path in chosen}
    return Upload(folder, repo, files, rest, _notices(folder))


def _check_secrets(path: Path) -> None:
    if path.suffix in _WEIGHTS:
        return
    content = path.read_bytes()
    for what, pattern in _SECRETS.items():
        if pattern.search(content):
            raise CheckpointError(
                f"{path} holds what looks like {what}; nothing was uploaded",
                hint="take it out, and make it invalid where it was issued",
            )


def _notices(folder: Path) -> list[str]:
    path = folder / CONFIG_FILE
    base = str(read_json(path).get("base_model_name_or_path") or "") if path.is_file() else ""
    if base and Path(base).is_dir():
        return [
            f"{CONFIG_FILE} names its base as a folder of this machine, {base}: others must say "
            "which base it is"
        ]
    return []
