"""A step over the cache gives the logits of the whole sequence at once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from halfbyte.engine import decode_step
from halfbyte.engine.decode_step import DecodeStep
from halfbyte.quant.linear import NF4Linear

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
}


def make(kind="llama", **lora):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(part, name, NF4Linear.from_linear(module))
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **lora}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {}),
        ("mistral", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ("qwen2", {"rank_pattern": {"v_proj": 3, "up_proj": 1}, "use_rslora": True}),
    ],
)
def test_steps_continue_what_the_whole_sequence_gives(kind, lora):
    model = make(kind, **lora)
    base = model.get_base_model()
    ids = torch.randint(0, 96, (2, 12))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    step = DecodeStep(base.model, base.lm_head, batch=2, length=16)
    step.refresh()
    lengths = [9, 4]
    logits = step.prefill([ids[row, :n].tolist() for row, n in enumerate(lengths)])
    for _ in range(3):
        for row, n in enumerate(lengths):
            torch.testing.assert_close(logits[row], expected[row, n - 1], rtol=1e-4, atol=1e-4)
            step.tokens[row] = ids[row, n]
        lengths = [n + 1 for n in lengths]
        logits = step()
        assert step.positions.tolist() == lengths


def test_prompts_leave_the_keys_and_values_that_transformers_has():
    base = make().get_base_model()
    step = DecodeStep(base.model, base.lm_head, batch=2, length=20)
    prompts = [[1, 2, 3, 4, 5], [6, 7, 8]]
    step.cache.fill_(torch.nan)
    step.prefill(prompts)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            past = base.model(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values
        for (keys, values), layer in zip(step.cache, past.layers, strict=True):
            for ours, theirs in ((keys, layer.keys), (values, layer.values)):
                kept = ours[row, :, : len(prompt)]
                torch.testing.assert_close(kept, theirs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("length", "at_once"), [(64, 8192), (19, 40), (19, 1)])
def test_what_lies_behind_a_prompt_in_the_cache_is_never_seen(monkeypatch, length, at_once):
    """Neither padding, at whatever width, nor how many prompts a layer takes at once, shows."""
    monkeypatch.setattr(decode_step, "_TOKENS_AT_ONCE", at_once)
    base = make("qwen2").get_base_model()
    ids = torch.randint(0, 96, (3, 20))
    lengths = [17, 1, 18]
    with torch.no_grad():
        expected = base(input_ids=ids).logits
    step = DecodeStep(base.model, base.lm_head, batch=3, length=length)
    step.refresh()
    step.cache.fill_(torch.nan)
    logits = step.prefill([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)])
    for row, n in enumerate(lengths):
        assert not step.cache[:, :, row, :, :n].isnan().any()
        step.cache[:, :, row, :, n:] = torch.nan
    at, last = torch.arange(3), torch.tensor(lengths)
    torch.testing.assert_close(logits, expected[at, last - 1], rtol=1e-4, atol=1e-4)
    step.tokens.copy_(ids[at, last])
    torch.testing.assert_close(step(), expected[at, last], rtol=1e-4, atol=1e-4)


def test_a_prompt_may_fill_the_cache():
    base = make().get_base_model()
    prompt = torch.randint(0, 96, (1, 19))
    step = DecodeStep(base.model, base.lm_head, batch=1, length=19)
    with torch.no_grad():
        expected = base(input_ids=prompt).logits[:, -1]
    torch.testing.assert_close(step.prefill(prompt.tolist()), expected, rtol=1e-4, atol=1e-4)


def test_refresh_takes_the_adapters_as_they_are_now():
    model = make()
    base = model.get_base_model()
    step = DecodeStep(base.model, base.lm_head, batch=1, length=8)
    for trained in (False, True):
        if trained:
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.data.mul_(-1.5)
        step.refresh()
        step.prefill([[1, 2, 3]])
        step.tokens.fill_(4)
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits[:, -1]
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_the_kernels_and_the_graph_give_the_plain_paths_logits(batch):
    from halfbyte.engine.decode import Decoder

    model = make().cuda()
    base = model.get_base_model()
    ids = torch.randint(0, 96, (batch, 20), device="cuda")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    step = DecodeStep(base.model, base.lm_head, batch=batch, length=32)
    step.refresh()
    step.prefill(ids[:, :9].tolist())
    for n in range(9, 20):
        step.tokens.copy_(ids[:, n])
        error = (step() - expected[:, n]).norm() / expected[:, n].norm()
        assert error < 1e-2  # several tokens go through tensor cores in TF32

    seen = []

    def choose(so_far, logits):
        seen.append(logits.clone())
        return ids[:, so_far.shape[1]]

    decoder = Decoder(model, batch=batch, length=32)
    decoder.generate(ids[:, :9].tolist(), max_new_tokens=11, stop=[], choose=choose)
    for n, logits in enumerate(seen, start=8):
        assert (logits - expected[:, n]).norm() / expected[:, n].norm() < 1e-2
