"""What paging costs an update on one GPU: python benchmarks/paging_cost.py [million parameters]

Per bits (32, 8): ms of an update flat ("device"), paged with room ("auto"), all on the host
("host"), the last with and without prefetch; GB/s each way on the host; bitwise equality after 5
updates, after leaving and coming back; launches. Then: pages leave under pressure and come back
after 8 steps with room.
"""

import json
import statistics
import sys
import time

import torch
from torch import nn

from halfbyte.optim import adamw as module
from halfbyte.optim.adamw import AdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MILLION = float(sys.argv[1]) if len(sys.argv) > 1 else 41.9 if DEVICE == "cuda" else 2
MATRICES = 64


def sync():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make(bits, placement):
    torch.manual_seed(0)
    rows = int(MILLION * 1e6) // MATRICES // 1024
    shapes = [(rows, 1024)] * MATRICES + [(512,)]
    params = [(f"p{i}", nn.Parameter(torch.randn(s, device=DEVICE))) for i, s in enumerate(shapes)]
    return AdamW(params, lr=1e-3, weight_decay=0.1, state_bits=bits, placement=placement)


def set_gradients(optimizer, step):
    torch.manual_seed(100 + step)
    flat = optimizer._moments[0].flat
    flat.gradients.copy_(torch.randn(flat.gradients.shape, device=DEVICE))


def timed(function, count=20):
    times = []
    for _ in range(count):
        sync()
        start = time.perf_counter()
        function()
        sync()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[2:]), 3)


def gpu_ms(function, count=20):
    """Return ms between events on the stream, as a step would see it."""
    if DEVICE != "cuda":
        return None
    times = []
    for _ in range(count):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        sync()
        a.record()
        function()
        b.record()
        sync()
        times.append(a.elapsed_time(b))
    return round(statistics.median(times[2:]), 3)


def prefetched(optimizer):
    """An update whose state began to come while the host waited for the norm."""
    optimizer.prefetch()
    optimizer.grad_norm().item()
    optimizer.step(1e-3)


def compare(bits):
    found = {"bits": bits, "million": MILLION}
    calls = []
    name = "adamw_step_" if bits == 32 else "adamw8bit_step_"
    real = getattr(module, name)
    setattr(module, name, lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    states = {}
    for placement in ("device", "auto", "host"):
        optimizer = make(bits, placement)
        for step in range(5):
            set_gradients(optimizer, step)
            calls.clear()
            if step % 2:
                optimizer.prefetch()
            optimizer.step(1e-3, grad_scale=0.5)
            if placement == "auto" and step == 2:
                optimizer.evict()
        found[f"{placement}_launches"] = len(calls)
        values = optimizer._moments[0].flat.values.clone()
        states[placement] = {
            "values": values.cpu(),
            **{k: v.clone().cpu() for k, v in optimizer.state_dict().items()},
        }
        if placement == "auto":  # back again, as one
            optimizer.place("device")
            optimizer.place("auto")
            set_gradients(optimizer, 5)
            optimizer.step(1e-3)
            found["auto_is_back_on_device"] = optimizer.host_bytes == 0
        mib = (optimizer.resident_bytes + optimizer.host_bytes) / 2**20
        found["state_mib"] = round(mib)
        found[f"{placement}_resident_mib"] = round(optimizer.resident_bytes / 2**20)
        found[f"{placement}_update_ms"] = timed(lambda o=optimizer: o.step(1e-3))
        found[f"{placement}_update_gpu_ms"] = gpu_ms(lambda o=optimizer: o.step(1e-3))
        if placement == "host":
            seconds = found["host_update_ms"] / 1e3
            found["host_gb_s_each_way"] = round(mib * 2**20 / 1e9 / seconds, 1)
            found["host_norm_and_update_ms"] = timed(
                lambda o=optimizer: (o.grad_norm().item(), o.step(1e-3))
            )
            found["host_norm_and_prefetched_update_ms"] = timed(lambda o=optimizer: prefetched(o))
        else:
            found[f"{placement}_norm_and_update_ms"] = timed(
                lambda o=optimizer: (o.grad_norm().item(), o.step(1e-3))
            )
        optimizer.release()
        del optimizer
    first = states["device"]
    found["bitwise_equal"] = {
        p: all(torch.equal(first[k], s[k]) for k in first) for p, s in states.items()
    }
    setattr(module, name, real)
    return found


def bus():
    """Return GB/s of one pinned copy in, out, and of both at once."""
    if DEVICE != "cuda":
        return {}
    size = 256 * 2**20
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    card = [torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def copy(which):
        for index in which:
            with torch.cuda.stream(streams[index]):
                a, b = (card[0], host[0]) if index == 0 else (host[1], card[1])
                a.copy_(b, non_blocking=True)

    rates = {
        name: round(size / 1e6 / timed(lambda w=w: copy(w), 8), 1)
        for name, w in {"in": [0], "out": [1], "both (each way)": [0, 1]}.items()
    }
    return {"pcie_gb_s": rates}


def comes_back():
    """Pages leave under pressure, stay while there is none free, come back after eight steps."""
    optimizer = make(32, "auto")
    optimizer.evict()
    away = []
    for step in range(12):
        set_gradients(optimizer, step)
        optimizer.step(1e-3)
        away.append(round(optimizer.host_bytes / 2**20))
    found = {"host_mib_by_step": away}
    if DEVICE == "cuda":
        optimizer.evict()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        ballast = torch.empty(free - 300 * 2**20, dtype=torch.uint8, device=DEVICE)
        for _ in range(18):
            optimizer.step(1e-3)
        found["host_mib_squeezed_after_18"] = round(optimizer.host_bytes / 2**20)
        del ballast
    return found


def main():
    start = time.time()
    print(json.dumps({"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}))
    for line in (bus(), compare(32), compare(8), comes_back()):
        print(json.dumps(line), flush=True)
    print(f"took {time.time() - start:.1f} s")


if __name__ == "__main__":
    main()
