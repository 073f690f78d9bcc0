"""How the verbs open a model: a folder, a hub name, `demo`, or a run with its adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.errors import AdapterError, ConfigError

Model = Annotated[
    str, typer.Argument(help="A folder, a name on the hub, `demo`, or a run that has an adapter.")
]
Adapter = Annotated[
    str | None, typer.Option(help="An adapter's folder or hub name, to put on MODEL.")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="name=path of an adapter on MODEL; may be given many times."),
]
Quant = Annotated[
    str,
    typer.Option(help="nf4, fp4 or none (16 bits); auto holds the base as its training did."),
]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu; by default the GPU.")]


def open_model(
    model: str, adapter: str | None = None, quant: str = "auto", device: str | None = None
) -> tuple[Any, Any]:
    """Return (model, tokenizer).

    Args:
        model: A base, or the folder of an adapter whose base is then loaded too.
        adapter: An adapter to put on it.
        quant: "nf4", "fp4", "none" or "auto".
        device: Where to.

    Raises:
        HalfbyteError: something is missing, damaged or does not fit.
    """
    from halfbyte.adapters.files import CONFIG_FILE, read_adapter_files
    from halfbyte.config import resolve_model
    from halfbyte.export.record import find_base
    from halfbyte.models.load import load

    base: str | Path = resolve_model(model)
    if adapter is None and (Path(base) / CONFIG_FILE).is_file():
        adapter, base = str(base), find_base(read_adapter_files(base))
    return load(base, quant=_config(quant, adapter), device=device, adapter=adapter)


def named_adapters(values: Sequence[str] | None) -> dict[str, str]:
    """Return where adapters are by their names: `name=path`, or a path that ends in its name.

    Raises:
        ConfigError: a name is empty or there twice.
    """
    found: dict[str, str] = {}
    for value in values or ():
        name, sign, path = value.partition("=")
        path = path if sign else value
        name = name if sign else Path(value).resolve().name
        if not name or not path or name in found:
            raise ConfigError(
                f"--adapter should be name=path with a name of its own, got {value!r}"
            )
        found[name] = path
    return found


def find_model(model: str, adapters: Mapping[str, str]) -> tuple[str | Path, dict[str, str]]:
    """Return the base that MODEL means, and the adapters that go on it.

    Where MODEL is an adapter's folder, the base is that adapter's, and it is the first of them.

    Raises:
        HalfbyteError: the adapter is damaged, or its base is gone.
    """
    from halfbyte.adapters.files import CONFIG_FILE, read_adapter_files
    from halfbyte.config import resolve_model
    from halfbyte.export.record import find_base

    base = resolve_model(model)
    if not (Path(base) / CONFIG_FILE).is_file():
        return base, dict(adapters)
    found = {Path(base).name: base, **adapters}
    return find_base(read_adapter_files(base)), found


def open_base(
    model: str,
    adapters: Mapping[str, str],
    quant: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[Any, Any, dict[str, str]]:
    """Return (model, tokenizer, adapters): the base alone, and what goes on it; see `find_model`.

    Raises:
        HalfbyteError: something is missing, damaged or does not fit.
    """
    from halfbyte.models.load import load

    base, found = find_model(model, adapters)
    first = next(iter(found.values()), None)
    loaded, tokenizer = load(base, quant=_config(quant, first), device=device, dtype=dtype)
    return loaded, tokenizer, found


def open_adapters(model: Any, adapters: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """Put adapters on a base; return it, and the tokenizers of those that have their own.

    The first adapter is the active one.

    Raises:
        HalfbyteError: one is missing, damaged or does not fit.
    """
    from halfbyte.adapters.io import load_adapter
    from halfbyte.models.tokenizer import load_tokenizer

    num_embeddings = model.get_input_embeddings().num_embeddings
    tokenizers = {}
    for name, path in adapters.items():
        model = load_adapter(model, path, adapter=name)
        if (Path(path) / "tokenizer_config.json").is_file():
            tokenizers[name] = load_tokenizer(Path(path), num_embeddings)
    return model, tokenizers


def _config(quant: str, adapter: str | None) -> Any:
    """Return the quantizer's settings, None for 16 bits."""
    from halfbyte.adapters.files import read_adapter_files
    from halfbyte.export.record import recorded_recipe
    from halfbyte.quant.config import NF4Config

    if quant not in ("auto", "nf4", "fp4", "none"):
        raise ConfigError(f"--quant should be auto, nf4, fp4 or none, got {quant!r}")
    if quant == "auto" and adapter is not None:
        try:
            recipe = recorded_recipe(read_adapter_files(adapter))
        except AdapterError:  # peft saved it, and says nothing of 4 bits
            return NF4Config()
        return recipe and recipe.config
    return None if quant == "none" else NF4Config(quant_type="fp4" if quant == "fp4" else "nf4")
