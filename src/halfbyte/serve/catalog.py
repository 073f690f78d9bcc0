"""The names that the server answers to; adapters come, go and are swapped while it runs.

A name means one adapter at a time. Answers hold the adapter that they began with, so a swap or an
unload never changes or loses one that is under way: the old weights leave after its last token.
"""

import contextlib
import threading
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.adapters.files import AdapterFiles, read_adapter_files
from halfbyte.adapters.identity import base_fingerprint, is_same_base
from halfbyte.errors import AdapterError, ConfigError, HalfbyteError
from halfbyte.generate.prompts import stop_token_ids
from halfbyte.models.tokenizer import load_tokenizer
from halfbyte.serve.adapter import ServedModel
from halfbyte.serve.bank import AdapterBank, read_pairs
from halfbyte.serve.engine import Engine, StoppingError


class UnknownModelError(HalfbyteError):
    """A request names a model that is not served."""


class Catalog:
    """Names and what they mean.

    Args:
        model: The base, before any adapter is on it.
        tokenizer: Its tokenizer.
        base: What requests call the base alone.
        engine: Runs changes between two steps.
        bank: Where adapters stand.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        base: ServedModel,
        engine: Engine,
        bank: AdapterBank,
    ) -> None:
        self._model, self._tokenizer, self._base = model, tokenizer, base
        self._engine, self._bank = engine, bank
        self._fingerprint = base_fingerprint(model)
        self._models = {base.name: base}
        self._lock = threading.Lock()  # of the names
        self._loading = threading.Lock()  # one adapter at a time

    def names(self) -> list[ServedModel]:
        """Return all that is served, the base first."""
        with self._lock:
            return list(self._models.values())

    def hold(self, name: str) -> ServedModel:
        """Return what `name` means now; the caller lets it go.

        Raises:
            UnknownModelError: nothing has that name.
        """
        with self._lock:
            found = self._models.get(name)
            if found is None:
                raise UnknownModelError(
                    f"the model {name!r} does not exist; there are {sorted(self._models)}"
                )
            found.hold()
            return found

    def load(self, name: str, folder: str | Path, *, replace: bool = False) -> ServedModel:
        """Put an adapter into service; returns when new requests get it.

        Args:
            name: What requests will call it.
            folder: A folder, or a name on the hub.
            replace: Take the name from the adapter that has it, which ends its answers first.

        Raises:
            AdapterError: it does not fit the base, or the name is taken.
            ConfigError: the name is empty or the base's.
        """
        with self._loading:
            self._check_name(name, replace=replace)
            found = read_adapter_files(folder)
            self._check_base(found)
            pairs = read_pairs(found)
            self._bank.check(pairs, found.folder)
            tokenizer = self._tokenizer_of(found.folder)
            slot = self._engine.between_steps(lambda: self._bank.install(pairs)).result()
            new = ServedModel(
                name,
                found.folder,
                tokenizer,
                frozenset(stop_token_ids(self._model, tokenizer)),
                slot=slot,
                parent=self._base.name,
                on_free=lambda: self._remove(slot),
            )
            with self._lock:
                old = self._models.get(name)
                self._models[name] = new
        if old is not None:
            old.retire()
        return new

    def unload(self, name: str) -> None:
        """Take a name out of service; its answers under way are ended first.

        Raises:
            UnknownModelError: no adapter has that name.
            ConfigError: the name is the base's.
        """
        if name == self._base.name:
            raise ConfigError(f"{name!r} is the base, which cannot be unloaded")
        with self._lock:
            found = self._models.pop(name, None)
        if found is None:
            raise UnknownModelError(f"the adapter {name!r} does not exist")
        found.retire()

    def _remove(self, slot: int) -> None:
        with contextlib.suppress(StoppingError):
            self._engine.between_steps(lambda: self._bank.remove(slot))

    def _check_name(self, name: str, *, replace: bool) -> None:
        if not name or name == self._base.name:
            raise ConfigError(
                f"expected a name for the adapter, got {name!r}"
                + (", which is the base's" if name else ""),
                hint="choose another one",
            )
        if name in self._models and not replace:
            raise AdapterError(
                f"the adapter {name!r} has already been loaded",
                hint="unload it first, or load with load_inplace: true to swap it",
            )

    def _check_base(self, found: AdapterFiles) -> None:
        recorded = (found.identity.get("base") or {}).get("fingerprint")
        if recorded and self._fingerprint and not is_same_base(recorded, self._fingerprint):
            raise AdapterError(
                f"the adapter in {found.folder} was trained on another base than "
                f"{self._base.name!r}: their weights differ",
                hint="serve it on its own base",
            )

    def _tokenizer_of(self, folder: Path) -> PreTrainedTokenizerBase:
        if not (folder / "tokenizer_config.json").is_file():
            return self._tokenizer
        model: Any = self._model
        return load_tokenizer(folder, model.get_input_embeddings().num_embeddings)
