"""Out of memory at ten places of a step, on one GPU, by ballast: the run goes on, the same.

    python benchmarks/oom.py --out oom.json [--shape tiny]

At a place, once, a ballast tensor takes nearly all free memory, and the next allocation really
fails. After four steps the parameters must be bitwise those of an undisturbed run; a last case
fails often enough that micro-batches are cut, and must agree to float32 rounding of the gradients.
"""

import argparse
import json
from pathlib import Path

import torch
from random_model import batch, random_model, release

from halfbyte.engine import body
from halfbyte.engine.layer import FusedLayer
from halfbyte.errors import DeviceError
from halfbyte.optim import adamw
from halfbyte.optim.adamw import AdamW
from halfbyte.train import loss as loss_module
from halfbyte.train.determinism import determinism
from halfbyte.train.loss import LanguageModel
from halfbyte.train.survive import Survivor

PLACES = (
    "embedding", "first layer forward", "middle layer forward", "last layer forward", "norm",
    "loss", "last layer backward", "first layer backward", "gradient norm", "first page",
)  # fmt: skip
STEPS = 4
LEFT = 2**20


class Fault:
    """Runs out of memory at a place of the second step."""

    def __init__(self, place: str | None, times: int) -> None:
        self.place, self.times, self.is_armed, self.said = place, times, False, ""

    def __call__(self, place: str) -> None:
        if not (self.is_armed and place == self.place and self.times):
            return
        self.times -= 1
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        ballast = torch.empty(max(free - 256 * LEFT, 0), dtype=torch.uint8, device="cuda")
        try:
            torch.empty(free, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            self.said = str(error).partition("\n")[0]
            raise
        finally:
            del ballast


def hooked(model, optimizer, fault: Fault) -> list:
    """Put the places into model and optimizer; return (object, name, before) to put back."""
    base = model.get_base_model()
    layers = base.model.layers
    names = {id(layers[0]): "first", id(layers[len(layers) // 2]): "middle"}
    names[id(layers[-1])] = "last"
    run, head, update = FusedLayer.run, loss_module.linear_cross_entropy, adamw.adamw_step_
    norm, final_norm = optimizer.grad_norm, body.final_norm
    base.model.embed_tokens.register_forward_hook(lambda *_: fault("embedding"))

    def layer_run(self, x, *args):
        which = names.get(id(self.layer), "")
        fault(f"{which} layer forward")
        y = run(self, x, *args)
        if y.requires_grad:
            y.register_hook(lambda _: fault(f"{which} layer backward"))
        return y

    def last_norm(*args):
        fault("norm")
        return final_norm(*args)

    def cross_entropy(*args, **kwargs):
        fault("loss")
        return head(*args, **kwargs)

    def grad_norm():
        fault("gradient norm")
        return norm()

    def page(*args, **kwargs):
        fault("first page")
        update(*args, **kwargs)

    FusedLayer.run, loss_module.linear_cross_entropy = layer_run, cross_entropy
    body.final_norm = last_norm
    adamw.adamw_step_, optimizer.grad_norm = page, grad_norm
    return [
        (FusedLayer, "run", run), (loss_module, "linear_cross_entropy", head),
        (adamw, "adamw_step_", update), (body, "final_norm", final_norm),
    ]  # fmt: skip


def train(shape: str, place: str | None, times: int) -> dict:
    release()
    model = random_model(shape, torch.device("cuda"), rank=16, dropout=0.1)
    optimizer = AdamW(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-3, placement="auto"
    )
    told: list = []
    parts = LanguageModel.of(model, memory="fast")
    survivor = Survivor(parts, optimizer, tell=told.append, explain=lambda s: DeviceError(s.reason))
    fault = Fault(place, times)
    changed = hooked(model, optimizer, fault)
    torch.manual_seed(7)
    # Above the size for CUDA graphs, whose layers run only while they are recorded.
    batches = [batch(5, 2048, model.config.vocab_size)]
    try:
        allocated = []
        for step in range(STEPS):
            fault.is_armed = step == 1
            survivor.step(batches, step=step, learning_rate=1e-3, max_grad_norm=1.0, seed=3)
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated() + optimizer.host_bytes)
    finally:
        for owner, name, before in changed:
            setattr(owner, name, before)
    found = {
        "parameters": {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad},
        "measures": [measure for event in told for measure in event.measures],
        "said": fault.said,
        "unspent": fault.times,
        "grown_mib": round((allocated[-1] - allocated[0]) / 2**20, 1),
    }
    optimizer.release()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    with determinism(enabled=True):
        expected = train(args.shape, None, 0)["parameters"]
        for place, times in (*((place, 1) for place in PLACES), ("last layer forward", 5)):
            found = train(args.shape, place, times)
            pairs = [(found["parameters"][n], expected[n]) for n in expected]
            results.append({
                "place": place, "times": times, "measures": found["measures"],
                "bitwise": all(torch.equal(a, b) for a, b in pairs),
                "largest_difference": max((a - b).abs().max().item() for a, b in pairs),
                "of_norm": (
                    sum((a - b).square().sum() for a, b in pairs) ** 0.5
                    / sum(b.square().sum() for _, b in pairs) ** 0.5
                ).item(),
                "not_injected": found["unspent"], "grown_mib": found["grown_mib"],
                "error": found["said"][:120],
            })  # fmt: skip
            print(json.dumps(results[-1]), flush=True)
    if args.out:
        machine = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
