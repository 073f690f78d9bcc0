"""A step over the cache gives the logits of the whole sequence at once."""

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch.utils._python_dispatch import TorchDispatchMode
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

ONE_ADAPTER = "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"


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
            assert step.tokens[row] == expected[row, n - 1].argmax()
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


def _logits(step, ids):
    """Return a step's logits after the last of the ids, with adapters as they are now."""
    step.refresh()
    step.prefill([ids[:-1]])
    step.tokens.fill_(ids[-1])
    return step()


class _Launches(TorchDispatchMode):
    """Counts the operations that reach a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def _optimizer(model):
    adapters = [p for name, p in model.named_parameters() if "lora" in name]
    for parameter in adapters:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(adapters, lr=0.5).step()


def _load(model):
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, {name: -1.5 * value for name, value in state.items()})


def _unseen(model):
    """As an optimizer that writes through pointers does."""
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.mul_(-1.5)


@pytest.mark.parametrize(
    ("change", "trainable"),
    [(_optimizer, True), (_unseen, True), (_optimizer, False), (_load, False), (_load, True)],
)
def test_refresh_takes_the_adapters_as_they_are_now(change, trainable):
    model = make(rank_pattern={"v_proj": 2})
    if not trainable:
        model.requires_grad_(False)
    base = model.get_base_model()
    step = DecodeStep(base.model, base.lm_head, batch=1, length=8)
    before = None
    for _ in range(3):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits[:, -1]
        assert before is None or not torch.allclose(expected, before, rtol=0.1)
        torch.testing.assert_close(_logits(step, [1, 2, 3, 4]), expected, rtol=1e-4, atol=1e-4)
        change(model)
        before = expected


def test_refresh_copies_frozen_adapters_once():
    model = make().requires_grad_(False)
    base = model.get_base_model()
    step = DecodeStep(base.model, base.lm_head, batch=1, length=8)
    counts = []
    for changes in (False, False, True, False):
        if changes:
            model.get_parameter(ONE_ADAPTER).mul_(2)
        with _Launches() as launches:
            step.refresh()
        counts.append(launches.count)
    assert counts == [2 * 3, 0, 3, 0]  # three a layer


def test_refresh_takes_adapters_made_for_inference():
    with torch.inference_mode():
        model = make()
        base = model.get_base_model()
        step = DecodeStep(base.model, base.lm_head, batch=1, length=8)
        for _ in range(2):
            expected = model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits[:, -1]
            torch.testing.assert_close(_logits(step, [1, 2, 3, 4]), expected, rtol=1e-4, atol=1e-4)
            model.get_parameter(ONE_ADAPTER).mul_(-2)


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

    prompts = ids[:, :9].tolist()
    likeliest = decoder.generate(prompts, max_new_tokens=11, stop=[])
    assert likeliest == decoder.generate(
        prompts, max_new_tokens=11, stop=[], choose=lambda _, logits: logits.argmax(-1)
    )
