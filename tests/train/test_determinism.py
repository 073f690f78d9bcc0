"""Strict mode is on inside the block only, and refuses what is not deterministic."""

import pytest
import torch

from halfbyte.train.determinism import determinism


def test_on_inside_and_back_afterwards():
    with determinism(enabled=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_put_back_after_an_error_too():
    with pytest.raises(KeyError), determinism(enabled=True):
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_disabled_it_does_nothing(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with determinism(enabled=False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_what_is_not_deterministic_is_refused():
    with determinism(enabled=True), pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
