"""The fused decoder's tokens are those of transformers' generate."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from halfbyte.engine.decode import Decoder, cache_fits, obstacle

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
PROMPTS = [[5, 6, 7, 8, 9], [3, 1], [11, 12, 13, 14, 15, 16, 17, 18]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    return model.eval()


def _greedy(_, logits):
    return logits.argmax(-1)


def _expected(model, prompt, count):
    ids = torch.tensor([prompt])
    out = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("choose", [None, _greedy])
def test_prompts_of_different_lengths_answer_as_each_alone(model, choose):
    decoder = Decoder(model, batch=4, length=32)
    seen = []
    answers = decoder.generate(
        PROMPTS, max_new_tokens=12, stop=[], choose=choose, on_token=seen.append
    )
    assert answers == [_expected(model, prompt, 12) for prompt in PROMPTS]
    assert seen == answers[0]


@pytest.mark.parametrize("place", [0, 1, 7])
def test_answers_end_with_a_stop_token(model, place):
    decoder = Decoder(model, batch=2, length=64)
    free = [_expected(model, prompt, 9) for prompt in PROMPTS[:2]]
    stop = free[0][place]
    answers = decoder.generate(PROMPTS[:2], max_new_tokens=9, stop=[stop])
    for answer, whole in zip(answers, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 9
        assert answer == whole[:end]


def test_room_may_be_used_up_to_its_last_place(model):
    decoder = Decoder(model, batch=1, length=10)
    answers = decoder.generate(PROMPTS[:1], max_new_tokens=5, stop=[])
    assert answers == [_expected(model, PROMPTS[0], 5)]


def test_choices_see_all_ids_so_far(model):
    seen = []

    def choose(ids, logits):
        seen.append(ids.tolist())
        return torch.full((2,), 20 + len(seen))

    Decoder(model, batch=2, length=16).generate(
        [[1, 2], [3]], max_new_tokens=3, stop=[], choose=choose
    )
    assert seen[0] == [[1, 2], [3, 3]]
    assert seen[2] == [[1, 2, 21, 22], [3, 3, 21, 22]]


def test_it_knows_when_the_model_is_another(model):
    decoder = Decoder(model, batch=2, length=16)
    assert decoder.serves(model, batch=1, length=16)
    assert not decoder.serves(model, batch=3, length=8)
    assert not decoder.serves(model, batch=1, length=17)
    with model.disable_adapter():
        assert not decoder.serves(model, batch=1, length=8)
    model.merge_adapter()
    assert not decoder.serves(model, batch=1, length=8)
    model.unmerge_adapter()
    assert decoder.serves(model, batch=1, length=8)
    assert cache_fits(model, 1, 1 << 40)


def test_it_knows_when_another_adapter_counts_or_counts_more(model):
    model.add_adapter("other", LoraConfig(r=2))
    decoder = Decoder(model, batch=1, length=16)
    model.set_adapter("other")
    assert not decoder.serves(model, batch=1, length=8)
    model.set_adapter("default")
    assert decoder.serves(model, batch=1, length=8)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    layer.scale_layer(2.0)
    assert not decoder.serves(model, batch=1, length=8)
    layer.unscale_layer()
    model.delete_adapter("other")


def test_what_does_not_fit_is_named(model):
    assert obstacle(model) is None
    tiny = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8)
    assert "body" in obstacle(GPT2LMHeadModel(tiny))
    sliding = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    assert "window" in obstacle(sliding)
    prompts = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    assert "prompt" in obstacle(get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), prompts))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    stretched = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dynamic))
    assert "dynamic" in obstacle(stretched)
    odd = LlamaForCausalLM(LlamaConfig(**{**SIZES, "head_dim": 24}))
    assert "24" in obstacle(odd)
    assert "512" in obstacle(LlamaForCausalLM(LlamaConfig(**{**SIZES, "head_dim": 512})))
