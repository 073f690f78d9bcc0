"""A run's parts fit together: steps, strategies and what is due when."""

import pytest

from halfbyte.errors import ConfigError
from halfbyte.train.config import TrainConfig
from halfbyte.train.run import assemble
from halfbyte.train.state import Progress


@pytest.fixture
def assembled(make_lora, tokenizer, rows_of, tmp_path):
    def make(**settings):
        config = TrainConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=2, num_train_epochs=4, **settings
        )
        return assemble(make_lora(), tokenizer, rows_of([5] * 9), None, config)

    return make


def due(run, strategy, every):
    found = []
    for step in range(1, run.total_steps + 1):
        run.progress = Progress(step=step)
        if run.is_due(strategy, every):
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("strategy", "every", "steps"),
    [
        ("no", 1, []),
        ("epoch", 3, [5, 10, 15, 20]),
        ("steps", 8, [8, 16]),
        ("steps", 0.25, [5, 10, 15, 20]),
        ("steps", None, []),
    ],
)
def test_what_is_due_when(assembled, strategy, every, steps):
    run = assembled()
    assert run.total_steps == 20
    assert due(run, strategy, every) == steps


@pytest.mark.parametrize(
    ("optim", "bits", "placement"),
    [
        ("adamw_torch", 32, "device"),
        ("paged_adamw_32bit", 32, "auto"),
        ("paged_adamw_8bit", 8, "auto"),
    ],
)
def test_optimizer_is_the_one_that_was_named(assembled, optim, bits, placement):
    optimizer = assembled(optim=optim).optimizer
    assert (optimizer.state_bits, optimizer.placement) == (bits, placement)
    assert optimizer.num_parameters == 8192


def test_frozen_adapters_cannot_be_trained(make_lora, tokenizer, rows_of, tmp_path):
    model = make_lora().requires_grad_(False)
    with pytest.raises(ConfigError, match="at least one parameter that requires a gradient"):
        assemble(model, tokenizer, rows_of([5]), None, TrainConfig(output_dir=str(tmp_path)))
