import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from halfbyte.models import attention
from halfbyte.models.attention import NAME, use_cpu_attention

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def calls(monkeypatch):
    """Counts the kernel's calls."""
    made = []
    real = attention.causal_attention
    monkeypatch.setattr(
        attention, "causal_attention", lambda *a, **k: (made.append(1), real(*a, **k))[1]
    )
    return made


@pytest.fixture(params=["llama", "qwen2"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**TINY))
    return Qwen2ForCausalLM(Qwen2Config(**TINY))


def step(model, **inputs):
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def check(model, **inputs):
    loss, grads = step(model, **inputs)
    assert use_cpu_attention(model)
    assert model.config._attn_implementation == NAME
    ours_loss, ours = step(model, **inputs)
    torch.testing.assert_close(ours_loss, loss)
    for mine, expected in zip(ours, grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def input_ids():
    return torch.randint(0, 64, (2, 70), generator=torch.Generator().manual_seed(0))


def test_training_agrees_with_sdpa_and_uses_the_kernel(model, input_ids, calls):
    check(model, input_ids=input_ids)
    assert len(calls) == 2


def test_left_padding_goes_to_sdpa(model, input_ids, calls):
    mask = torch.ones_like(input_ids)
    mask[0, :9] = 0
    check(model, input_ids=input_ids, attention_mask=mask)
    assert not calls


def test_packed_documents_go_to_sdpa(model, input_ids, calls):
    positions = torch.cat([torch.arange(30), torch.arange(40)]).expand(2, -1)
    check(model, input_ids=input_ids, position_ids=positions)
    assert not calls


def test_generation_is_unchanged(model, input_ids):
    prompt = input_ids[:1, :5]
    want = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    use_cpu_attention(model)
    assert torch.equal(
        model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0), want
    )


def test_gradient_checkpointing(model, input_ids):
    use_cpu_attention(model)
    model.train()
    plain = step(model, input_ids=input_ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = step(model, input_ids=input_ids)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))


def test_another_choice_of_attention_is_left_alone():
    model = LlamaForCausalLM(LlamaConfig(**TINY, attn_implementation="eager"))
    assert not use_cpu_attention(model)
    assert model.config._attn_implementation == "eager"


def test_the_choice_is_not_saved(model, tmp_path):
    use_cpu_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"
