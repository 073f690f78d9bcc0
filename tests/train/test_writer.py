"""Checkpoints are written beside training, one at a time, and tell how it went."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.checkpoint.publish import verify
from halfbyte.errors import CheckpointError
from halfbyte.optim.adamw import AdamW
from halfbyte.train import writer as module
from halfbyte.train.adapter_norms import AdapterProbe
from halfbyte.train.directory import checkpoints
from halfbyte.train.state import Progress, load_checkpoint, read_checkpoint
from halfbyte.train.writer import CheckpointWriter


@pytest.fixture
def saving(make_lora, tmp_path):
    """A model, its optimizer, and a writer of checkpoints."""

    def make(limit=None):
        model = make_lora()
        optimizer = AdamW(model.named_parameters())
        identity = {"data": {"fingerprint": "f"}}
        return (
            model,
            optimizer,
            CheckpointWriter(tmp_path, model, optimizer, identity, steps_per_epoch=3, limit=limit),
        )

    return make


@pytest.fixture
def held_up(monkeypatch):
    """An event that the writing thread waits for before it writes."""
    go = threading.Event()
    write = module.write_checkpoint

    def wait_and_write(*arguments):
        assert go.wait(30)
        return write(*arguments)

    monkeypatch.setattr(module, "write_checkpoint", wait_and_write)
    return go


def test_what_is_saved_is_what_was_when_it_was_asked_for(saving, held_up, tmp_path):
    model, optimizer, writer = saving()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with writer:
        writer.save(Progress(step=4, tokens=9))
        assert writer.finished(wait=False) is None
        assert checkpoints(tmp_path) == []
        for parameter in model.parameters():  # training goes on meanwhile
            parameter.data.add_(1)
        optimizer.steps_done = 77
        held_up.set()
        saved = writer.finished(wait=True)
        assert writer.finished(wait=True) is None
    assert saved.path == tmp_path / "checkpoint-4"
    verify(saved.path)
    found = read_checkpoint(saved.path)
    assert found.progress == Progress(step=4, tokens=9)
    load_checkpoint(found, model, optimizer)
    assert optimizer.steps_done == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert "step" in load_file(saved.path / "optimizer.safetensors")


def test_end_of_the_block_waits_for_the_write(saving, held_up, tmp_path):
    _, _, writer = saving()
    with writer:
        writer.save(Progress(step=1))
        held_up.set()
    verify(tmp_path / "checkpoint-1")


def test_one_write_at_a_time(saving):
    _, _, writer = saving()
    with writer:
        writer.save(Progress(step=1))
        with pytest.raises(RuntimeError, match="ask for the result"):
            writer.save(Progress(step=2))


def test_case_83_failure_is_told_once_and_the_next_write_is_free(saving, monkeypatch, tmp_path):
    def fail(*arguments):
        raise CheckpointError("the disk is full")

    _, _, writer = saving()
    with writer, monkeypatch.context() as patch:
        patch.setattr(module, "write_checkpoint", fail)
        writer.save(Progress(step=1))
        with pytest.raises(CheckpointError, match="full"):
            writer.finished(wait=True)
        assert writer.finished(wait=True) is None
        patch.undo()
        writer.save(Progress(step=2))
        assert writer.finished(wait=True).step == 2
    assert [step for step, _ in checkpoints(tmp_path)] == [2]


def test_lost_directory_is_not_made_again(saving, tmp_path):
    _, _, writer = saving()
    with writer:
        tmp_path.rmdir()
        writer.save(Progress(step=1))
        with pytest.raises(CheckpointError, match="is gone"):
            writer.finished(wait=True)
    assert not tmp_path.exists()


@pytest.mark.gpu
def test_saving_and_measuring_do_not_wait_for_a_gpu(make_lora, tmp_path):
    model = make_lora().cuda()
    optimizer = AdamW(model.named_parameters())
    probe = AdapterProbe(model)
    with CheckpointWriter(tmp_path, model, optimizer, {}, steps_per_epoch=3, limit=None) as writer:
        torch.cuda.set_sync_debug_mode("error")
        try:
            writer.save(Progress(step=1))
            probe.measure()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert writer.finished(wait=True).step == 1
    assert len(probe.read()) == 14


def test_old_ones_go(saving, tmp_path):
    _, _, writer = saving(limit=2)
    with writer:
        for step in range(1, 5):
            writer.save(Progress(step=step))
            writer.finished(wait=True)
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 3]
