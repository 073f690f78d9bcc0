"""The quantizer on a GPU, with bitsandbytes' CUDA code as the oracle."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from halfbyte.errors import QuantizationError
from halfbyte.quant.config import NF4Config
from halfbyte.quant.linear import NF4Linear
from halfbyte.quant.quantizer import nf4_layers

pytestmark = pytest.mark.gpu


@pytest.fixture
def load(make_model):
    def from_pretrained(family="llama", **settings):
        settings = {"quantization_config": NF4Config(), "device_map": {"": 0}} | settings
        return transformers.AutoModelForCausalLM.from_pretrained(make_model(family), **settings)

    return from_pretrained


def test_saves_bitsandbytes_files_byte_for_byte(load, family, tmp_path):
    theirs = load(
        family,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    load(family).save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [tmp_path / who / "model.safetensors" for who in ("ours", "theirs")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_codes_are_those_of_the_cpu(load):
    on_gpu, on_cpu = load(), load(device_map="cpu")
    for (_, first), (_, second) in zip(nf4_layers(on_gpu), nf4_layers(on_cpu), strict=True):
        assert first.weight.device.type == "cuda"
        assert torch.equal(first.weight.cpu(), second.weight)


def test_what_it_saves_loads_again(load, tmp_path, tokens, load_as_halfbyte):
    model = load()
    model.save_pretrained(tmp_path)
    again = load_as_halfbyte(tmp_path, device_map={"": 0})
    assert torch.equal(again(tokens.cuda()).logits, model(tokens.cuda()).logits)


def test_moves_to_the_gpu_and_back():
    layer = NF4Linear.from_linear(torch.nn.Linear(128, 96).bfloat16())
    expected = layer.dequantize()
    assert torch.equal(layer.cuda().dequantize().cpu(), expected)
    assert torch.equal(layer.cpu().dequantize(), expected)


def test_adapters_train(load, tokens):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens.cuda(), labels=tokens.cuda()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(make_model, tmp_path, bad):
    model = transformers.AutoModelForCausalLM.from_pretrained(make_model())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = bad
    model.save_pretrained(tmp_path)
    with pytest.raises(QuantizationError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=NF4Config(), device_map={"": 0}
        )
