"""The formulas of the ledger save what the engine saves."""

import pytest
import torch

import halfbyte as hb
from halfbyte.engine.attention import Layout
from halfbyte.engine.body import FusedBody
from halfbyte.engine.layer import Fp8Layer
from halfbyte.kernels.fp8 import quantize_rows
from halfbyte.memory.fused_step import FusedStep
from halfbyte.memory.ledger import Ledger
from halfbyte.plan.fused import fused_shape
from halfbyte.quant.linear import NF4Linear

TOKENS = 64


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def body(request):
    """Of Llama, and of the family that differs most from it."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 96,
        "attn_implementation": "sdpa", "pad_token_id": 0,
    }  # fmt: skip
    layer_types = ["full_attention", "sliding_attention"]
    is_llama = request.param == "llama"
    config = (
        LlamaConfig(**sizes) if is_llama else Gemma3TextConfig(**sizes, layer_types=layer_types)
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, NF4Linear.from_linear(module))
    model = hb.add_lora(model, hb.LoraConfig(r=8)).train()
    return FusedBody(model.get_base_model().model)


@pytest.mark.parametrize("level", ["all", "attention", "input", "offload"])
def test_saved_bytes_are_those_that_autograd_keeps(body, level):
    layer = body.layers[1]
    x = torch.randn(TOKENS, 128, requires_grad=True)
    cos = torch.ones(TOKENS, 32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held = {p.untyped_storage().data_ptr() for p in body.model.parameters()}
    held.add(cos.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer.run(x, cos, cos, Layout(1, TOKENS), level)
    saved = sum(nbytes for pointer, nbytes in kept.items() if pointer not in held)
    shape = fused_shape(body, itemsize=4)
    assert y.requires_grad
    expected = shape.saved_bytes(level, TOKENS)
    assert saved == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("level", ["all", "attention", "input"])
def test_a_step_gives_back_all_that_it_takes(body, level):
    ledger = Ledger({"weights": 10**6})
    before = ledger.nbytes
    step = FusedStep(ledger, fused_shape(body, itemsize=2), TOKENS, [level] * 2)
    step.write(labels=TOKENS - 1, vocabulary=96, chunk_rows=16)
    assert ledger.nbytes == before
    assert ledger.peak.nbytes == sum(ledger.peak.owners.values())


def test_keeping_less_needs_less_and_more_tokens_need_more(body):
    shape = fused_shape(body, itemsize=2)

    def peak(level, tokens):
        ledger = Ledger()
        FusedStep(ledger, shape, tokens, [level] * 16).write(
            labels=tokens, vocabulary=96, chunk_rows=64
        )
        return ledger.peak.nbytes

    sizes = [peak(level, 512) for level in ("input", "attention", "all")]
    assert sizes == sorted(sizes)
    assert peak("input", 1024) > 1.8 * sizes[0]


def test_eight_bits_take_what_the_formulas_say(body):
    """What stays after a step, scales, and what a product makes of its rows."""
    fused = body.with_kind(Fp8Layer)
    groups = [group for layer in fused.layers for group in layer.all_siblings]
    for granted in (False, True):  # of its own, a CPU keeps none
        for group in groups:
            group.stay.granted = granted
        fused(torch.arange(TOKENS)[None])[0].sum().backward()
    shape = fused_shape(fused, itemsize=4)
    stays = sum(group.stay.nbytes for group in groups if group.projections[0].rank)
    # Below the first layer is nothing that has a gradient.
    unmade = shape.qkv.matrix_bytes(is_backward=True) + shape.qkv.wide_bytes(4)
    assert stays == len(fused.layers) * shape.weight_bytes() - unmade
    assert fused.layers[0].weight_bytes(4) == shape.weight_bytes()
    scales = [scale.nbytes for group in groups for scale in group.scales]
    assert sum(scales) == len(fused.layers) * shape.scale_bytes()
    for numbers, group in zip(shape.groups, groups, strict=False):
        x, border = torch.randn(TOKENS, group.inputs), torch.randn(TOKENS, group.rank)
        rows = quantize_rows(x, border, torch.ones(1))
        made = sum(part.nbytes for part in rows)
        assert made == numbers.quantized_bytes(TOKENS, is_backward=False)
        largest = max(numbers.quantized_bytes(1, is_backward=side) for side in (False, True))
        assert group.row_bytes == largest
        matrix = max(numbers.matrix_bytes(is_backward=side) for side in (False, True))
        assert group.passing_bytes(4) == numbers.wide_bytes(4) + matrix


def test_rows_in_eight_bits_leave_less_for_activations(body):
    fused = body.with_kind(Fp8Layer)
    layer, tokens = fused.layers[0], 4096
    assert body.layers[0].quantized_bytes(tokens, 0) == 0
    assert layer.quantized_bytes(tokens, 0) == tokens * max(g.row_bytes for g in layer.all_siblings)
    assert layer.quantized_bytes(tokens, 8) == tokens * layer.qkv.row_bytes
    # So much that all is kept in 16 bits, and not a byte more.
    free = next(
        nbytes for nbytes in range(0, 10**8, 10**4)
        if body.choose(tokens, 2, nbytes).levels == ["all"] * 2
    )  # fmt: skip
    assert fused.choose(tokens, 2, free).levels != ["all"] * 2
    assert fused.choose(tokens, 2, free + 2 * layer.quantized_bytes(tokens, 0)).levels == (
        ["all"] * 2
    )
