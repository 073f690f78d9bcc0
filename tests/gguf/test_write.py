"""A GGUF file holds the model: its tensors as llama.cpp wants them, its logits, its tokenizer."""

import os
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte.data.formats import Example
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.gguf import write
from halfbyte.gguf.write import export_gguf

# transformers' own reader of GGUF is the oracle; it does not know factors of rotary embeddings.
READ_BY_TRANSFORMERS = ["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"]


@pytest.mark.parametrize("family", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model_back(make_model, tmp_path, family):
    folder = make_model(family)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Its reader of settings knows only the usual ones; weights, names and turned rows are at stake.
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, config=expected.config
    )
    ids = torch.arange(40).unsqueeze(0) * 5
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_every_weight_is_there(make_model, tmp_path, family):
    folder = make_model(family)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for mine, theirs, shift in (
        ("token_embd", "model.embed_tokens", 0),
        ("blk.1.ffn_down", "model.layers.1.mlp.down_proj", 0),
        ("blk.1.attn_v", "model.layers.1.self_attn.v_proj", 0),
        ("blk.0.attn_norm", "model.layers.0.input_layernorm", family == "gemma"),
        ("output_norm", "model.norm", family == "gemma"),
    ):
        expected = state[f"{theirs}.weight"].numpy() + shift
        np.testing.assert_array_equal(tensors[f"{mine}.weight"], expected)
    count = sum(1 for name in state if name != "lm_head.weight" or family == "llama3")
    assert len(tensors) == count + ("rope_freqs.weight" in tensors)
    assert ("rope_freqs.weight" in tensors) == (family == "llama3")


def test_types_are_those_asked_for_and_keep_what_they_can(make_model, tmp_path):
    folder = make_model("llama", hidden_size=256, intermediate_size=512)
    sizes, errors = {}, {}
    export_gguf(folder, tmp_path / "f32.gguf", "f32")
    exact = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "f32.gguf").tensors}
    for kind in ("f16", "bf16", "q8_0", "q4_0", "q4_k_m"):
        result = export_gguf(folder, tmp_path / f"{kind}.gguf", kind)
        sizes[kind] = result.num_bytes
        tensors = gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors
        found = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in tensors}
        errors[kind] = max(
            np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name])
            for name in found
        )
        vectors = {t.tensor_type for t in tensors if len(t.shape) == 1}
        assert vectors == {gguf.GGMLQuantizationType.F32}
    assert sizes["f16"] == sizes["bf16"] > sizes["q8_0"] > sizes["q4_k_m"] > sizes["q4_0"] * 0.9
    assert errors["f16"] < 3e-4 < errors["bf16"] < 3e-3 < errors["q8_0"] < 0.01
    assert errors["q4_k_m"] < errors["q4_0"] < 0.15


def test_it_says_what_the_file_is(make_model, tmp_path):
    result = export_gguf(make_model("llama"), tmp_path / "m.gguf", "q8_0")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    read = {name: field.contents() for name, field in fields.items()}
    assert result.architecture == read["general.architecture"] == "llama"
    assert read["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert read["llama.attention.head_count_kv"] == 2
    assert read["tokenizer.ggml.eos_token_id"] == 258
    assert read["tokenizer.ggml.add_bos_token"] is False
    assert "im_start" in read["tokenizer.chat_template"]
    assert result.parity.prompts == 5
    assert not result.parity.differences


def test_prompts_that_differ_are_shown_and_nothing_is_written(make_model, tmp_path, monkeypatch):
    real = write.make_vocabulary

    def spoilt(*arguments):
        vocabulary = real(*arguments)
        object.__setattr__(vocabulary, "chat_template", "{{ messages[0].content }}")
        return vocabulary

    monkeypatch.setattr(write, "make_vocabulary", spoilt)
    rows = [Example([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])]
    folder = make_model("llama")
    with pytest.raises(CheckpointError, match="conversation 1, message 2, token 0") as caught:
        export_gguf(folder, tmp_path / "m.gguf", conversations=rows)
    assert "<|im_start|>" in caught.value.message
    assert not list(tmp_path.iterdir())
    result = export_gguf(folder, tmp_path / "m.gguf", conversations=rows, allow_differences=True)
    assert len(result.parity.differences) == 1


def test_wrong_arguments_leave_nothing(make_model, tmp_path, monkeypatch):
    folder = make_model("llama")
    with pytest.raises(ConfigError, match="q4_k_m, got 'q3_k'"):
        export_gguf(folder, tmp_path / "m.gguf", "q3_k")
    with pytest.raises(CheckpointError, match="no folder"):
        export_gguf(folder, tmp_path / "no" / "m.gguf")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists"):
        export_gguf(folder, tmp_path / "m.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(CheckpointError, match="GB free"):
        export_gguf(folder, tmp_path / "m.gguf", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_values_that_float16_cannot_hold_are_named(make_model, tmp_path):
    folder = make_model("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large", safe_serialization=True)
    for path in folder.glob("*oken*"):
        shutil.copy(path, tmp_path / "large")
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight has values of 1e\+06"):
        export_gguf(tmp_path / "large", tmp_path / "m.gguf", "f16")
    export_gguf(tmp_path / "large", tmp_path / "m.gguf", "bf16")


MEASURE = """
import resource, sys
from halfbyte.gguf.write import export_gguf
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
export_gguf(sys.argv[1], sys.argv[2] + "/a.gguf", sys.argv[4])
before = peak()
export_gguf(sys.argv[3], sys.argv[2] + "/b.gguf", sys.argv[4])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "q4_k_m"])
def test_memory_holds_a_few_tensors_and_not_the_model(make_model, tmp_path, kind):
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "dtype": torch.bfloat16}
    small, large = make_model("llama", **sizes), make_model("llama", **sizes, num_hidden_layers=16)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, tmp_path, large, kind],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    model_bytes = (large / "model.safetensors").stat().st_size
    assert model_bytes > 180e6
    assert int(done.stdout) < 0.35 * model_bytes
