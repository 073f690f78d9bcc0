"""QLoRA, end to end: load in 4 bits, train adapters, prove the result, merge, ship."""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "NF4Config": "halfbyte.quant.config",
    "LoraConfig": "halfbyte.adapters.inject",
    "DataConfig": "halfbyte.data.config",
    "TrainConfig": "halfbyte.train.config",
    "RunConfig": "halfbyte.config",
    "HalfbyteError": "halfbyte.errors",
    "load": "halfbyte.models.load",
    "quantize": "halfbyte.models.quantize",
    "add_lora": "halfbyte.adapters.inject",
    "load_adapter": "halfbyte.adapters.io",
    "save_adapter": "halfbyte.adapters.io",
    "train": "halfbyte.train.loop",
    "evaluate": "halfbyte.train.evaluate",
    "generate": "halfbyte.generate.generate",
    "merge": "halfbyte.export.merge",
    "MergeConfig": "halfbyte.export.config",
    "adapter_limits": "halfbyte.export.consumers",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import halfbyte` stays light."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


class _Package(ModuleType):
    """Keeps `halfbyte.train` and `halfbyte.generate` the functions that they are said to be."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Importing the part of that name would put its module in the function's place."""
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
