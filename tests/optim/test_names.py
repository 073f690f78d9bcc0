"""Optimizers are called what transformers calls them."""

from transformers.training_args import OptimizerNames

from halfbyte.optim.names import OPTIMIZERS

OURS = {"adamw", "adamw_32bit", "adamw_8bit", "paged_adamw_32bit"}  # also bitsandbytes' and QLoRA's


def test_usual_names_are_known():
    names = {"adamw", "adamw_torch", "adamw_32bit", "adamw_8bit", "paged_adamw_32bit"}
    assert names <= OPTIMIZERS.keys()


def test_the_rest_are_transformers_names():
    assert OPTIMIZERS.keys() - OURS <= {name.value for name in OptimizerNames}


def test_names_say_bits_and_paging():
    for name, (bits, paged) in OPTIMIZERS.items():
        assert bits == (8 if "8bit" in name else 32)
        assert paged == name.startswith("paged")
