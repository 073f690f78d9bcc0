import contextlib
import subprocess
import sys
import types

import torch

from halfbyte.kernels import nf4_cpu, registry


def test_ops_serve_each_device_from_its_twin(monkeypatch):
    called = []
    library = nf4_cpu.native.library
    monkeypatch.setattr(nf4_cpu.native, "library", lambda: called.append(True) or library())
    torch.ops.halfbyte.quantize_4bit(torch.randn(64))
    assert called


def test_a_twin_may_lack_an_op_and_the_reference_serves():
    serve = registry._lazy(nf4_cpu.__name__, "quantize_3bit", lambda x: ("reference", x))
    x = torch.ones(1)
    assert serve(x) == ("reference", x)


def test_a_twin_runs_on_the_gpu_of_its_tensor(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def enter(device):
        entered.append(device.index)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    serve = registry._lazy(nf4_cpu.__name__, "quantize_3bit", lambda x: entered.append("ran"))
    for index in (0, 1):
        serve(types.SimpleNamespace(device=torch.device("cuda", index)))
    assert entered == ["ran", 1, "ran", "left"]


def test_shapes_are_known_without_data():
    packed, absmax = torch.ops.halfbyte.quantize_4bit(torch.empty(7, 33, device="meta"))
    assert (packed.shape, absmax.shape) == ((116, 1), (4,))


def test_importing_the_ops_needs_no_triton_and_compiles_nothing():
    code = (
        "import sys, halfbyte.kernels.nf4\n"
        "loaded = [m for m in sys.modules if m.startswith('halfbyte.kernels.')]\n"
        "assert not any(m.endswith(('_triton', '_cpu', 'native')) for m in loaded), loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
