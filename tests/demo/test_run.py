"""The whole demonstration, as `make demo` runs it."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.demo.run import run_demo


@pytest.mark.slow
@pytest.mark.timeout(1500)  # three minutes on two idle cores
def test_the_demonstration_shows_what_it_promises(tmp_path):
    summary = run_demo(tmp_path / "demo")
    assert summary.exact_match_before < 0.05
    assert summary.exact_match_after > 0.90
    assert abs(summary.exact_match_after - summary.exact_match_16bit) <= 0.02
    assert abs(summary.exact_match_after - summary.exact_match_merged) <= 0.02
    assert summary.eval_loss_after < summary.eval_loss_before / 10
    written = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert written["exact_match_after"] == summary.exact_match_after
    assert {"train_seconds", "peak_rss_bytes", "adapter", "merged"} <= set(written)
    assert (tmp_path / "demo" / "qlora" / "adapter_model.safetensors").exists()
    # What is left is an ordinary checkpoint.
    AutoModelForCausalLM.from_pretrained(written["merged"])
    AutoTokenizer.from_pretrained(written["merged"])
