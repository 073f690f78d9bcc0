"""The loss without logits is the loss that transformers computes, for every kind of output head."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Phi3Config,
    Qwen2Config,
)

from halfbyte.errors import ConfigError
from halfbyte.train import loss as loss_module
from halfbyte.train.loss import LanguageModel

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "cohere": CohereConfig(**SMALL, logit_scale=0.0625),
    "gemma2": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "granite": GraniteConfig(**SMALL, logits_scaling=8.0),
    "phi3": Phi3Config(**SMALL),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
}


def transformers_loss_sum(model, batch):
    mask = batch.attention_mask
    return model(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=batch.position_ids if mask is None else None,
        labels=batch.labels,
        num_items_in_batch=torch.tensor(1.0),
        use_cache=False,
    ).loss


def widen(model):
    """Make logits large enough that a forgotten scale or cap would show."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_with_the_logits_never_made(family, batch_of):
    torch.manual_seed(0)
    model = widen(AutoModelForCausalLM.from_config(FAMILIES[family]))
    parts = LanguageModel.of(model)
    assert parts.head is not None, "a known family must not need its logits"
    batch = batch_of([9, 5, 7])
    torch.testing.assert_close(
        parts.loss_sum(batch), transformers_loss_sum(model, batch), rtol=1e-5, atol=1e-4
    )


def test_lora_inside_the_body_is_part_of_it(make_lora, batch_of):
    model = make_lora()
    batch = batch_of([9, 5, 7])
    parts = LanguageModel.of(model)
    assert parts.head is not None
    torch.testing.assert_close(
        parts.loss_sum(batch), transformers_loss_sum(model, batch), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    "config", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_adapted_head_uses_the_models_own_logits(config, make_llama, batch_of):
    model = get_peft_model(make_llama(), LoraConfig(**{"target_modules": ["q_proj"], **config}))
    parts = LanguageModel.of(model)
    assert parts.head is None
    batch = batch_of([9, 5])
    loss = parts.loss_sum(batch)
    torch.testing.assert_close(loss, transformers_loss_sum(model, batch), rtol=1e-5, atol=1e-4)
    loss.backward()
    trained = [p for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad]
    assert trained
    assert any(p.grad is not None and p.grad.any() for p in trained)


def test_unknown_last_step_is_noticed(make_llama, batch_of):
    base = make_llama()
    base.config.logit_scale = 3.0  # claims a scale that its forward does not apply
    parts = LanguageModel.of(base)
    assert parts.head is None
    batch = batch_of([9, 5])
    torch.testing.assert_close(
        parts.loss_sum(batch), transformers_loss_sum(base, batch), rtol=1e-5, atol=1e-4
    )


def test_probe_leaves_the_mode_alone(make_lora):
    for training in (True, False):
        model = make_lora().train(training)
        LanguageModel.of(model)
        assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_unpacked_per_example(attention, make_lora, batch_of):
    parts = LanguageModel.of(make_lora(attn_implementation=attention))
    lengths = [9, 5, 12, 3]
    torch.testing.assert_close(
        parts.loss_sum(batch_of(lengths, packed=True)),
        parts.loss_sum(batch_of(lengths)),
        rtol=1e-5,
        atol=1e-4,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_neighbours_do_not_see_each_other(attention, make_lora, batch_of):
    parts = LanguageModel.of(make_lora(attn_implementation=attention))
    batch = batch_of([9, 5, 12], packed=True)
    changed = batch.input_ids.clone()
    changed[0, 9:14] = (changed[0, 9:14] + 1) % 97  # the middle document
    outputs = [
        parts.body(input_ids=ids, position_ids=batch.position_ids, use_cache=False)[0]
        for ids in (batch.input_ids, changed)
    ]
    assert torch.equal(outputs[0][:, :9], outputs[1][:, :9])
    assert torch.equal(outputs[0][:, 14:], outputs[1][:, 14:])
    assert not torch.equal(outputs[0][:, 9:14], outputs[1][:, 9:14])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_right_padding_needs_no_mask(attention, make_lora, batch_of):
    model = make_lora(attn_implementation=attention)
    parts = LanguageModel.of(model)
    together = parts.loss_sum(batch_of([9, 5, 12]))
    torch.testing.assert_close(
        together, transformers_loss_sum(model, batch_of([9, 5, 12])), rtol=1e-5, atol=1e-4
    )


def test_left_padding_keeps_its_mask(make_lora, batch_of):
    model = make_lora()
    batch = batch_of([5, 5])
    pad = torch.zeros(2, 3, dtype=torch.int64)
    left = type(batch)(
        torch.cat([pad, batch.input_ids], 1),
        torch.cat([pad - 100, batch.labels], 1),
        torch.cat([pad, batch.position_ids], 1),
        torch.cat([pad, batch.attention_mask], 1),
        batch.num_supervised,
        batch.num_tokens,
    )
    parts = LanguageModel.of(model)
    torch.testing.assert_close(parts.loss_sum(left), parts.loss_sum(batch), rtol=1e-5, atol=1e-4)


def test_eight_bits_need_a_gpu_and_a_model_that_runs_fused(make_lora, monkeypatch):
    model = make_lora()
    with pytest.raises(ConfigError, match=r"compute: fp8 needs a GPU .* got cpu"):
        LanguageModel.of(model, compute="fp8")
    monkeypatch.setattr(loss_module, "require_fp8", lambda _: None)
    with pytest.raises(ConfigError, match=r"bfloat16, got torch\.float32"):
        LanguageModel.of(model, compute="fp8")
    model.bfloat16()
    model.get_base_model().config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"runs fused.* attention_dropout is 0\.1") as error:
        LanguageModel.of(model, compute="fp8")
    assert "bf16" in error.value.hint


def test_eight_bits_stay_whatever_memory_is_and_are_left_for_evaluation(
    make_lora, batch_of, fp8_anywhere
):
    model = make_lora()
    exact, parts = LanguageModel.of(model), LanguageModel.of(model, compute="fp8", memory="fast")
    assert (exact.is_fp8, parts.is_fp8) == (False, True)
    assert exact.in_bf16() is exact
    batch = batch_of([9, 5, 12])
    expected, actual = exact.loss_sum(batch).item(), parts.loss_sum(batch).item()
    assert 1e-6 < abs(actual - expected) / expected < 0.01
    leaner = parts.with_memory("lean", max_tile=8)
    assert leaner.is_fp8
    assert leaner.loss_sum(batch).item() == pytest.approx(actual, rel=0.01)
    assert parts.in_bf16().loss_sum(batch).item() == expected
    left = leaner.in_bf16()
    assert (left.is_fp8, left.body.memory, left.body.max_tile) == (False, "lean", 8)
