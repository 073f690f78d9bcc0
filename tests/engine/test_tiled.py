"""A layer that offloads its input, takes tokens in tiles, or both, is the same layer."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.adapters.inject import LoraConfig, add_lora
from halfbyte.engine.attention import Layout
from halfbyte.engine.layer import FusedLayer
from halfbyte.engine.offload import Offload, Passage
from halfbyte.quant.linear import NF4Linear

TOKENS = 11
PACKED = Layout(1, TOKENS, torch.tensor([0, 4, 5, 11], dtype=torch.int32), 6)
LAYOUTS = {"one": Layout(1, TOKENS, max_length=TOKENS), "packed": PACKED}


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["f64", "f32"])
def layer(request):
    """A layer with dropout, of dense weights in float64 and of 4-bit ones in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(request.param)
    if request.param == torch.float32:
        for part in (model.model.layers[0].self_attn, model.model.layers[0].mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(part, name, NF4Linear.from_linear(module))
    model = add_lora(model, LoraConfig(r=4, lora_dropout=0.2)).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(request.param)
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return FusedLayer(model.get_base_model().model.layers[0], config, 0)


def run(layer, keep, *, layout=LAYOUTS["one"], tile=0, seed=(7, 3)):
    """Return y, and the gradients of x and of every adapter."""
    generator = torch.Generator().manual_seed(1)
    dtype = layer.adapters[0].dtype
    x, weight, angle = (
        torch.randn(TOKENS, n, generator=generator, dtype=torch.float64) for n in (64, 64, 8)
    )
    cos, sin = (angle.repeat(1, 2).cos().to(dtype), angle.repeat(1, 2).sin().to(dtype))
    x = x.to(dtype).requires_grad_()
    passage = Passage(Offload(x.device, piece_bytes=1000), tile)
    seeds = None if seed is None else torch.tensor(seed)
    y = layer.run(x, cos, sin, layout, keep, seeds, passage)
    return y, *torch.autograd.grad(y, [x, *layer.adapters], weight.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tile", [0, 4])
def test_an_offloaded_input_changes_no_bit(layer, tile, layout):
    kept, away = (
        run(layer, keep, tile=tile, layout=LAYOUTS[layout]) for keep in ("input", "offload")
    )
    assert all(map(torch.equal, kept, away))
    if not tile:
        assert all(map(torch.equal, run(layer, "all", layout=LAYOUTS[layout]), away))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("keep", "tile"), [*itertools.product(["attention", "offload"], [1, 4, 10]), ("input", 6)]
)
def test_tiles_differ_in_the_order_of_sums_only(layer, keep, tile, layout):
    whole = run(layer, "all", layout=LAYOUTS[layout])
    tiled = run(layer, keep, tile=tile, layout=LAYOUTS[layout])
    for actual, expected in zip(tiled, whole, strict=True):
        scale = expected.abs().max()
        tolerance = 1e-12 if actual.dtype == torch.float64 else 2e-6
        assert (actual - expected).abs().max() <= tolerance * scale


def test_without_dropout_and_in_tiles_as_large_as_all(layer):
    whole = run(layer, "all", seed=None)
    assert all(map(torch.equal, run(layer, "attention", seed=None, tile=TOKENS), whole))
    close = zip(run(layer, "offload", seed=None, tile=3), whole, strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in close)


def test_wide_matrices_go_after_the_tiles_unless_they_are_to_stay(layer):
    run(layer, "offload", tile=4)
    assert all(siblings.stay.matrix is None for siblings in layer.all_siblings)
    for siblings in layer.all_siblings:
        siblings.stay.granted = True
    stayed = run(layer, "offload", tile=4)
    assert all(siblings.stay.matrix is not None for siblings in layer.all_siblings)
    for siblings in layer.all_siblings:
        siblings.stay.end()
    assert all(map(torch.equal, stayed, run(layer, "offload", tile=4)))


def test_in_tiles_nothing_of_the_mlp_is_saved(layer):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(layer, "attention", tile=4)
        tiled = max(kept.values())
    assert tiled <= TOKENS * (64 + 2 * 32) * layer.adapters[0].element_size()
