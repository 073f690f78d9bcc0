"""How long a first step takes where nothing was ever compiled, and what later lengths compile.

    python benchmarks/compile_time.py [--model llama8b]

Triton's and torch's caches are empty folders. Steps of several lengths follow the first one, then
30 optimizer batches as long as Alpaca's examples; every kernel that is compiled is counted, by
Triton's own listener, and those after the first pass over a kind of step are named. Prints one JSON
line.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

SHAPES = ("2x1024", "4x2048", "2x1000", "3x777", "1x4096", "1x513", "2x1024")
LATER = ("1x640", "5x333", "1x2999", "2x1023")


class Compilations:
    """Collects the names of the kernels that Triton compiles, and the seconds that it takes."""

    def __init__(self) -> None:
        import triton

        self.names: list[str] = []
        self.seconds = 0.0
        triton.knobs.compilation.listener = self

    def __call__(self, *, src, metadata, metadata_group, times, cache_hit) -> None:
        if not cache_hit:
            self.names.append(src.name)
            self.seconds += times.total / 1e6


def measure(name: str, memory: str) -> dict:
    import gpu_step
    import torch

    import halfbyte as hb
    from halfbyte.optim.adamw import AdamW
    from halfbyte.train.loss import LanguageModel
    from halfbyte.train.step import train_step

    compiled = Compilations()
    model = gpu_step.random_model(name, torch.device("cuda"))
    model = hb.add_lora(model, hb.LoraConfig(r=16, lora_alpha=32)).train()
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-4)
    language_model = LanguageModel.of(model, memory=memory)
    lengths = json.loads(Path(__file__).with_name("alpaca_lengths.json").read_text())
    made = len(compiled.names)
    steps = 0

    def step(shape: str) -> float:
        nonlocal steps
        data = gpu_step.batches_of(shape, lengths, model.config.vocab_size, steps)
        begin = time.perf_counter()
        train_step(
            language_model, optimizer, data, step=steps, learning_rate=1e-4, max_grad_norm=1.0,
            seed=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        steps += 1
        return time.perf_counter() - begin

    first = step(SHAPES[0])
    found = {
        "model": name, "memory": memory, "first_step_s": round(first, 2),
        "compiled_while_loading": made, "compiled_in_first_step": len(compiled.names) - made,
        "compiling_s": round(compiled.seconds, 2), "second_step_s": round(step(SHAPES[0]), 3),
    }  # fmt: skip
    for key, shapes in (
        ("compiled_by_other_shapes", SHAPES),
        ("compiled_by_lengths", ["lengths"] * 30),
        ("compiled_after_that", [*LATER, *["lengths"] * 30]),
    ):
        before = len(compiled.names)
        slowest = max(step(shape) for shape in shapes)
        found |= {key: compiled.names[before:], f"slowest_step_s_{key}": round(slowest, 2)}
    graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return found | {"torch_compile_graphs": graphs, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama8b")
    parser.add_argument("--memory", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Read when triton and torch are imported.
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        print(json.dumps(measure(args.model, args.memory)), flush=True)


if __name__ == "__main__":
    main()
