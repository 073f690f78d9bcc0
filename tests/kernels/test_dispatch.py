import sys
import types

import pytest
import torch

from halfbyte.kernels.dispatch import accelerated, implementation


@pytest.fixture
def kernel(monkeypatch):
    """A reference in a module of its own, whose CPU twin has a function of that name."""

    def double(x):
        return ("reference", x)

    double.__module__ = "made_up_kernel"
    twin = types.ModuleType("made_up_kernel_cpu")
    twin.__spec__ = types.SimpleNamespace(name="made_up_kernel_cpu")
    twin.double = lambda x: ("twin", x)
    monkeypatch.setitem(sys.modules, "made_up_kernel_cpu", twin)
    return double


def test_the_twin_of_the_first_arguments_device_is_called(kernel):
    name, _ = accelerated(kernel)(torch.zeros(1))
    assert name == "twin"


def test_a_device_without_a_twin_gets_the_reference(kernel):
    name, _ = accelerated(kernel)(torch.zeros(1, device="meta"))
    assert name == "reference"


def test_a_twin_may_lack_the_function(kernel):
    kernel.__name__ = "triple"
    assert implementation(kernel, "cpu") is kernel


def test_the_reference_stays_within_reach_of_tests(kernel):
    assert accelerated(kernel).__wrapped__ is kernel


def test_a_gpu_that_is_not_the_current_one_is_entered(kernel, monkeypatch):
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    call = accelerated(kernel)
    for index in (0, 1):
        call(types.SimpleNamespace(device=torch.device("cuda", index)))
    assert entered == [torch.device("cuda", 1), "left"]
