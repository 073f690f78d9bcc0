"""halfbyte serve: one base in 4 bits and many adapters behind OpenAI's HTTP interface."""

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli.opening import Adapters, Device, Model, Quant
from halfbyte.errors import ConfigError

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: Model,
    adapter: Adapters = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What requests call the base; by default MODEL.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the API key.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File that holds the API key, alone.")
    ] = None,
    adapter_dir: Annotated[
        Path | None,
        typer.Option(help="Folder below which clients may load adapters while the server runs."),
    ] = None,
    max_batch_size: Annotated[int, typer.Option(help="Most answers at once.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Most answers that wait; more get 429.")] = 256,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Longest prompt with its answer; by default up to 4096 tokens."),
    ] = None,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds from a request to its last token.")
    ] = 600.0,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that requests under way get at the end.")
    ] = 30.0,
    quant: Quant = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; by default what is fast.")
    ] = None,
    device: Device = None,
    print_vllm: Annotated[
        bool, typer.Option("--print-vllm", help="Print vLLM's command for these files, and end.")
    ] = False,
) -> None:
    """Serve MODEL and its adapters to OpenAI clients, chosen by `model` in each request.

    Ctrl-C or SIGTERM ends it: requests under way are completed, new ones refused.
    """
    if print_vllm:
        _print_vllm(model, adapter, served_model_name, max_model_len)
        return
    _check_is_installed()
    from halfbyte.cli.display import quieten

    quieten()
    from halfbyte.cli.opening import named_adapters, open_base
    from halfbyte.serve.app import create_app
    from halfbyte.serve.engine import EngineConfig
    from halfbyte.serve.server import Address, Server
    from halfbyte.serve.service import open_service

    config = EngineConfig(max_batch_size=max_batch_size, max_queue=max_queue)
    address = Address(host=host, port=port, shutdown_timeout=shutdown_timeout)
    api_key = read_api_key(api_key_env, api_key_file)
    if adapter_dir is not None and not adapter_dir.is_dir():
        raise ConfigError(f"--adapter-dir should be a folder, got {str(adapter_dir)!r}")
    if api_key is None and not address.is_loopback:
        warning = f"warning: anybody who reaches {host} can use this server; see --api-key-env"
        print(warning, file=sys.stderr)
    loaded, tokenizer, adapters = open_base(model, named_adapters(adapter), quant, device, dtype)
    service = open_service(
        loaded,
        tokenizer,
        name=served_model_name or model,
        adapters=adapters,
        config=config,
        max_model_len=max_model_len,
    )
    app = create_app(
        service, api_key=api_key, adapter_dir=adapter_dir, request_timeout=request_timeout
    )
    server = Server(app, service, address, on_ready=lambda url: _announce(url, service))
    server.run_until_signal()
    print("stopped", file=sys.stderr)


def _print_vllm(
    model: str, adapter: list[str] | None, name: str | None, max_model_len: int | None
) -> None:
    from halfbyte.cli.opening import find_model, named_adapters
    from halfbyte.serve.vllm import vllm_command

    base, adapters = find_model(model, named_adapters(adapter))
    command = vllm_command(str(base), adapters, served_model_name=name, max_model_len=max_model_len)
    print(shlex.join(command))


def read_api_key(variable: str | None, file: Path | None) -> str | None:
    """Return the key that clients must send, None where none is asked for.

    Raises:
        ConfigError: it is named twice, or not where it should be.
    """
    if variable is not None and file is not None:
        raise ConfigError("give --api-key-env or --api-key-file, not both")
    if variable is not None:
        key, where = os.environ.get(variable, "").strip(), f"the environment variable {variable}"
    elif file is not None:
        try:
            key, where = file.read_text(encoding="utf-8").strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API key cannot be read from {file}: {error}") from error
    else:
        return None
    if not key:
        raise ConfigError(f"expected an API key in {where}, found none")
    return key


def _check_is_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serving needs {', '.join(missing)}", hint="pip install 'halfbyte[serve]'"
        )


def _announce(url: str, service: Any) -> None:
    from halfbyte.cli.display import print_facts, size

    cache = service.cache_bytes
    facts = {
        "models": ", ".join(model.name for model in service.catalog.names()),
        "longest context": f"{service.max_model_len} tokens",
        "keys and values": f"up to {size(cache)}",
    }
    print_facts(f"serving at {url}/v1", facts)
    sys.stdout.flush()
