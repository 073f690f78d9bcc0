"""llama.cpp itself runs what was exported, and says what transformers says.

These run where `npm install --ignore-scripts --no-package-lock --prefix tests/gguf/llama_cpp` was
done: it brings llama.cpp prebuilt.
"""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.adapters.inject import add_lora
from halfbyte.data.config import DataConfig
from halfbyte.demo.base import base_path
from halfbyte.demo.task import make_task, write_task
from halfbyte.export.merge import merge
from halfbyte.gguf.adapter import export_adapter
from halfbyte.gguf.tokenizer import GgufTokenizer
from halfbyte.gguf.write import export_gguf
from halfbyte.models.load import load
from halfbyte.train.config import TrainConfig
from halfbyte.train.loop import train

pytestmark = pytest.mark.slow

FAMILIES = [
    "llama",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
]
TEXTS = [
    "The cat sat on the mat.\n\n\n  12345 + 678 = ?\t'tis I'LL",
    "Größe 北京 🙂 नमस्ते <|im_end|>\n<|im_start|>x",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # x",
]
NUM_ANSWERS, NUM_ROWS = 6, 12


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same(make_model, llama_cpp, tmp_path, family):
    folder = make_model(family)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[(i * 37) % 258 for i in range(200)]])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert llama_cpp(tmp_path / "m.gguf", score=ids.tolist())["score"][0] == pytest.approx(
        expected, abs=2e-4
    )


@pytest.mark.parametrize("kind", ["byte level", "with prefix", "without prefix"])
def test_tokens_are_those_of_our_reader(
    make_byte_level, make_sentencepiece, make_model, llama_cpp, tmp_path, kind
):
    folder = make_model("llama", vocab_size=400)
    if kind != "byte level":
        make_sentencepiece(prefix=kind == "with prefix").save_pretrained(folder)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    served = GgufTokenizer(tmp_path / "m.gguf")
    texts = [*TEXTS, "the cat sat on  the hat", "<turn>the cat<end>the"]
    found = llama_cpp(tmp_path / "m.gguf", tokenize=texts)["tokenize"]
    bos = [served.bos_id] if served.adds_bos else []  # the binding leaves it out
    assert [bos + ids for ids in found] == [served.encode(text) for text in texts]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of forty steps on the embedded base, its task, and the merged model."""
    folder = tmp_path_factory.mktemp("run")
    train_path, _ = write_task(folder / "task", make_task())
    model, tokenizer = load(base_path(), attn_implementation="eager")
    config = TrainConfig(
        output_dir=str(folder / "run"),
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = DataConfig(path=str(train_path), packing=True, max_length=128)
    train(add_lora(model, r=16, lora_alpha=32, seed=0), tokenizer, data, config)
    merge(folder / "run", folder / "merged", onto="dequantized")
    rows = [json.loads(line) for line in train_path.read_text().splitlines()[:40]]
    return folder, rows


@pytest.fixture(scope="module")
def reference(trained):
    """What transformers makes of the merged model: prompts, answers, whole rows, their loss."""
    folder, rows = trained
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    questions = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    answers = [[{"role": "assistant", "content": row["completion"]}] for row in rows]

    def ids(messages, **settings):
        return tokenizer.apply_chat_template(messages, **settings)["input_ids"]

    prompts = [ids(each, add_generation_prompt=True) for each in questions]
    whole = [ids(q + a) for q, a in zip(questions, answers, strict=True)][:NUM_ROWS]
    with torch.no_grad():
        losses = [model(torch.tensor([x]), labels=torch.tensor([x])).loss.item() for x in whole]
        greedy = [
            model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=60)[0].tolist()
            for prompt in prompts[:NUM_ANSWERS]
        ]
    answers = [g[len(p) :] for g, p in zip(greedy, prompts, strict=False)]
    return {"questions": questions, "prompts": prompts, "answers": answers, "whole": whole,
            "losses": losses, "tokenizer": tokenizer}  # fmt: skip


def perplexity(losses, rows):
    counts = [len(row) - 1 for row in rows]
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True))
    return math.exp(total / sum(counts))


def job(reference):
    generate = [{"tokens": prompt, "max": 60} for prompt in reference["prompts"][:NUM_ANSWERS]]
    return {"generate": generate, "score": reference["whole"], "render": reference["questions"]}


@pytest.mark.parametrize(("kind", "limit"), [("f16", 0.01), ("q8_0", 0.02), ("q4_k_m", 0.15)])
def test_a_trained_and_merged_model_says_the_same(
    trained, reference, llama_cpp, tmp_path, kind, limit
):
    export_gguf(trained[0] / "merged", tmp_path / "m.gguf", kind)
    found = llama_cpp(tmp_path / "m.gguf", **job(reference))
    expected = perplexity(reference["losses"], reference["whole"])
    assert perplexity(found["score"], reference["whole"]) == pytest.approx(expected, rel=limit)
    if kind == "f16":
        assert [one["tokens"] for one in found["generate"]] == reference["answers"]
        stops = GgufTokenizer(tmp_path / "m.gguf").stop_ids
        ended = [answer[-1] in stops for answer in reference["answers"]]
        assert [one["ended"] for one in found["generate"]] == ended
        assert any(ended)  # the stop token stops it


def test_prompts_of_a_run_are_llama_cpps(trained, reference, llama_cpp, tmp_path):
    """Template and tokenizer of the file, run by others: JavaScript's Jinja and llama.cpp."""
    export_gguf(trained[0] / "run", tmp_path / "m.gguf", "q8_0")
    texts = llama_cpp(tmp_path / "m.gguf", render=reference["questions"])["render"]
    found = llama_cpp(tmp_path / "m.gguf", tokenize=texts)["tokenize"]
    assert found == reference["prompts"]


def test_the_adapter_on_its_base_says_the_same(trained, reference, llama_cpp, tmp_path):
    run = trained[0] / "run"
    export_gguf(run, tmp_path / "base.gguf", "f16", base_only=True)
    export_adapter(run, tmp_path / "adapter.gguf", "f16")
    found = llama_cpp(tmp_path / "base.gguf", lora=str(tmp_path / "adapter.gguf"), **job(reference))
    expected = perplexity(reference["losses"], reference["whole"])
    assert perplexity(found["score"], reference["whole"]) == pytest.approx(expected, rel=0.01)
    assert [one["tokens"] for one in found["generate"]] == reference["answers"]
