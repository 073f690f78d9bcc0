import subprocess
import sys

import torch

from halfbyte.kernels import nf4, nf4_cpu


def test_ops_serve_each_device_from_its_twin(monkeypatch):
    called = []
    library = nf4_cpu.native.library
    monkeypatch.setattr(nf4_cpu.native, "library", lambda: called.append(True) or library())
    torch.ops.halfbyte.quantize_4bit(torch.randn(64))
    assert called


def test_a_twin_may_lack_an_op_and_the_reference_serves():
    assert not hasattr(nf4_cpu, "quantize_blockwise")
    values = torch.randn(300)
    ours = torch.ops.halfbyte.quantize_blockwise(values)
    expected = nf4.reference_quantize_blockwise(values)
    assert all(map(torch.equal, ours, expected))


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
