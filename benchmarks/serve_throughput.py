"""Tokens per second of the server: requests one by one, then from many clients at once.

    python benchmarks/serve_throughput.py                      # the embedded base, four adapters
    python benchmarks/serve_throughput.py --model Qwen/Qwen3-8B --clients 32

The same requests (greedy, of mixed lengths, over the base and random adapters in turn) go through
HTTP both times. Beside speed it counts answers that differ between the two. Prints JSON.
"""

import argparse
import concurrent.futures
import json
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path

import openai
import peft
import torch

import halfbyte
from halfbyte.adapters.inject import add_lora
from halfbyte.adapters.io import save_adapter
from halfbyte.config import resolve_model
from halfbyte.models.load import load
from halfbyte.serve.app import create_app
from halfbyte.serve.engine import EngineConfig
from halfbyte.serve.server import Address, Server
from halfbyte.serve.service import open_service


def write_adapters(model, count, rank, folder):
    """Write random adapters of the model, small enough to leave its answers sensible."""
    adapted = add_lora(model, peft.LoraConfig(r=rank, target_modules="all-linear"), seed=0)
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        save_adapter(adapted, folder / f"adapter-{index}")
    return adapted.unload()


def start(options, folder):
    """Serve the model; return the URL, the names and what ends the server."""
    dtype = options.dtype and getattr(torch, options.dtype)
    model, tokenizer = load(resolve_model(options.model), device=options.device, dtype=dtype)
    model = write_adapters(model, options.adapters, options.rank, folder)
    service = open_service(
        model,
        tokenizer,
        name="base",
        adapters={path.name: path for path in sorted(folder.iterdir())},
        config=EngineConfig(max_batch_size=options.clients, max_queue=options.requests),
        max_model_len=options.max_model_len,
    )
    ready = threading.Event()
    urls = []

    def on_ready(url):
        urls.append(url)
        ready.set()

    server = Server(create_app(service), service, Address(port=0), on_ready=on_ready)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ready.wait()

    def stop():
        server.should_exit = True
        thread.join()
        service.close(timeout=0)

    facts = {"device": str(model.device), "dtype": str(model.dtype), "dense": service.is_dense}
    return urls[0], [name.name for name in service.catalog.names()], facts, stop


def measure(url, names, options, clients):
    """Send all requests from so many clients; return answers, seconds and latencies."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)

    def one(index):
        began = time.monotonic()
        response = client.completions.create(
            model=names[index % len(names)],
            prompt="Once upon a time there was a number " + f"{index} " * (1 + index % 24),
            max_tokens=options.tokens // 2 + 7 * index % options.tokens,
            temperature=0,
        )
        choice = response.choices[0]
        return choice.text, response.usage.completion_tokens, time.monotonic() - began

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(clients)))  # warm
        began, cpu_began = time.monotonic(), time.process_time()
        results = list(pool.map(one, range(options.requests)))
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
    texts, counts, latencies = zip(*results, strict=True)
    ordered = sorted(latencies)
    return texts, {
        "clients": clients,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),  # of clients and server: fair on a busy machine too
        "generated_tokens": sum(counts),
        "tokens_per_second": round(sum(counts) / seconds, 1),
        "requests_per_second": round(len(results) / seconds, 2),
        "latency_p50_seconds": round(ordered[len(ordered) // 2], 3),
        "latency_p95_seconds": round(ordered[int(len(ordered) * 0.95)], 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64, help="mean length of an answer")
    parser.add_argument("--max-model-len", type=int, default=512)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url, names, facts, stop = start(options, Path(folder))
        alone, one_by_one = measure(url, names, options, 1)
        together, batched = measure(url, names, options, options.clients)
        stop()
    differing = sum(a != b for a, b in zip(alone, together, strict=True))
    report = {
        "benchmark": "serve_throughput",
        "model": options.model,
        **facts,
        "adapters": options.adapters,
        "rank": options.rank,
        "requests": options.requests,
        "one_by_one": one_by_one,
        "batched": batched,
        "speedup": round(batched["tokens_per_second"] / one_by_one["tokens_per_second"], 2),
        "answers_that_differ": differing,
        "versions": {
            "halfbyte": halfbyte.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
    }
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
