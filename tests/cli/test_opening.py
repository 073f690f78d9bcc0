"""A model is opened by folder, by run, or with an adapter, and held as its training held it."""

import pytest
from peft import PeftModel

from halfbyte.cli.opening import named_adapters, open_base, open_model
from halfbyte.errors import ConfigError, HalfbyteError
from halfbyte.quant.linear import NF4Linear


def in_four_bits(model):
    return any(isinstance(module, NF4Linear) for module in model.modules())


def test_a_base_is_held_in_4_bits_unless_told(tiny_base):
    assert in_four_bits(open_model(str(tiny_base))[0])
    assert not in_four_bits(open_model(str(tiny_base), quant="none")[0])


def test_a_run_brings_its_base(trained):
    model, tokenizer = open_model(str(trained))
    assert isinstance(model, PeftModel)
    assert in_four_bits(model)
    assert tokenizer.chat_template


def test_a_run_on_16_bits_stays_in_16(run, config, tmp_path):
    assert run("train", config, "quant=none").exit_code == 0
    assert not in_four_bits(open_model(str(tmp_path / "out"))[0])


def test_an_adapter_of_peft_says_nothing_and_gets_4_bits(trained, tiny_base):
    (trained / "halfbyte.json").unlink()
    assert in_four_bits(open_model(str(tiny_base), adapter=str(trained))[0])


def test_what_is_wrong_is_said(tiny_base):
    with pytest.raises(ConfigError, match="--quant should be"):
        open_model(str(tiny_base), quant="int4")
    with pytest.raises(HalfbyteError, match="nowhere"):
        open_model("./nowhere")


def test_adapters_have_names(tmp_path):
    assert named_adapters(None) == {}
    named = named_adapters(["red=runs/a=b", str(tmp_path / "blue")])
    assert named == {"red": "runs/a=b", "blue": str(tmp_path / "blue")}
    for wrong in (["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(ConfigError, match="name=path"):
            named_adapters(wrong)


def test_a_base_is_opened_without_its_adapters(trained, tiny_base):
    model, _, adapters = open_base(str(trained), {"more": "elsewhere"})
    assert not isinstance(model, PeftModel)
    assert adapters == {"out": str(trained), "more": "elsewhere"}
    assert open_base(str(tiny_base), {}, quant="none")[2] == {}
