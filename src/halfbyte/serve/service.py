"""A model in service: weights, engine and names, from a folder to the first answer."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.errors import ConfigError
from halfbyte.generate.dense import dense_weights
from halfbyte.generate.prompts import stop_token_ids
from halfbyte.serve.adapter import ServedModel
from halfbyte.serve.catalog import Catalog
from halfbyte.serve.engine import Engine, EngineConfig
from halfbyte.serve.forward import BatchedModel
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.probe import SMALLEST_LENGTH, check_model

_DEFAULT_LENGTH = 4096


@dataclass(eq=False)
class Service:
    """What answers requests, whatever they come through; `close` it at the end.

    Args:
        catalog: Names and their adapters.
        engine: Generates.
        metrics: Counts.
        max_model_len: Longest prompt with its answer, in tokens.
        vocabulary: Number of token ids.
        cache_bytes: What keys and values take.
        is_dense: Whether 4-bit weights were dequantized for a CPU.
    """

    catalog: Catalog
    engine: Engine
    metrics: Metrics
    max_model_len: int
    vocabulary: int
    cache_bytes: int = 0
    is_dense: bool = False
    _exits: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def close(self, timeout: float = 30.0) -> None:
        """End what runs after at most `timeout` seconds, and give the model back as it was."""
        self.engine.stop(timeout)
        self._exits.close()


def open_service(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    adapters: Mapping[str, str | Path] | None = None,
    config: EngineConfig | None = None,
    max_model_len: int | None = None,
) -> Service:
    """Put a model into service, which changes it; nothing else may use it meanwhile.

    Args:
        model: A base that `load` returned, without adapters.
        tokenizer: Its tokenizer.
        name: What requests call the base alone.
        adapters: Folders or hub names of adapters, by what requests call them.
        config: Limits of the engine.
        max_model_len: Longest prompt with its answer; by default what the model was trained for,
            up to 4096 tokens.

    Raises:
        ConfigError: the model cannot be served, or a limit does not fit it.
        AdapterError: an adapter does not fit the model.
    """
    config, metrics = config or EngineConfig(), Metrics()
    length = _length(model, max_model_len)
    model.eval().requires_grad_(requires_grad=False)
    batched = BatchedModel(model, num_rows=config.max_batch_size, num_tokens=length)
    engine = Engine(batched, config, metrics)
    stops = frozenset(stop_token_ids(model, tokenizer))
    base = ServedModel(name, Path(str(model.name_or_path)), tokenizer, stops)
    catalog = Catalog(model, tokenizer, base, engine, batched.bank)
    embeddings: Any = model.get_input_embeddings()
    service = Service(catalog, engine, metrics, length, embeddings.num_embeddings)
    service.is_dense = service._exits.enter_context(dense_weights(model))
    check_model(model, batched)
    service.cache_bytes = batched.cache.nbytes
    engine.start()
    try:
        for adapter, folder in (adapters or {}).items():
            catalog.load(adapter, folder)
    except Exception:
        service.close()
        raise
    metrics.adapters.set_function(lambda: len(catalog.names()) - 1)
    return service


def _length(model: PreTrainedModel, wanted: int | None) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        return min(positions or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
    if wanted < SMALLEST_LENGTH or (positions is not None and wanted > positions):
        raise ConfigError(
            f"max_model_len should be from {SMALLEST_LENGTH} to the model's {positions} positions, "
            f"got {wanted}"
        )
    return wanted
