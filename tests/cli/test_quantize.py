"""halfbyte quantize: a 4-bit checkpoint, or one line about why not."""

import json


def test_it_writes_a_4_bit_checkpoint(run, tiny_base, tmp_path):
    result = run("quantize", tiny_base, "out", "--quant-type", "fp4", "--no-double-quant")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert not config["quantization_config"]["bnb_4bit_use_double_quant"]


def test_what_cannot_be_is_said(run, tiny_base, tmp_path):
    for arguments in (["--quant-type", "int4"], ["--block-size", "3"]):
        result = run("quantize", tiny_base, "out", *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
    assert run("quantize", "./nowhere", "out").exit_code == 2
    assert not (tmp_path / "out").exists()
