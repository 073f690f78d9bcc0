"""What stays for the whole run is what the real tensors take."""

import torch

import halfbyte as hb
from halfbyte.optim.adamw import AdamW
from halfbyte.plan import owners
from halfbyte.plan.blueprint import blueprint


def test_llama_8b_in_gibibytes(llama_planner):
    found = llama_planner.persistent
    # 6.979e9 weights in 4.127 bits: performance of double quantization (QLoRA, section 3)
    bits = 8 * (found[owners.CODES] + found[owners.SCALES]) / 6.979e9
    assert 4.126 < bits < 4.129
    embeddings = 2 * 128256 * 4096 * 2
    assert 0 <= found[owners.DENSE] - embeddings < 2**20  # and the norms
    assert found[owners.ADAPTERS] == found[owners.GRADIENTS] == 4 * 41_943_040


def test_a_blueprint_counts_what_the_loaded_model_does(tiny_base):
    lora = hb.LoraConfig(r=4)
    model, _ = hb.load(tiny_base, device="cpu")
    planned = blueprint(tiny_base, quant=hb.NF4Config(), lora=lora, dtype=model.dtype)
    expected, found = (
        owners.persistent_bytes(hb.add_lora(model, lora)),
        dict(owners.persistent_bytes(planned)),
    )
    # Of the rotary frequencies a real model may hold a second copy.
    assert abs(expected.pop(owners.DENSE) - found.pop(owners.DENSE)) < 1024
    assert found == expected


def test_the_optimizer_takes_what_is_planned(tiny_base):
    model, _ = hb.load(tiny_base, device="cpu")
    model = hb.add_lora(model, hb.LoraConfig(r=4))
    elements = owners.trainable_elements(model)
    planned = owners.persistent_bytes(model)
    for bits in (32, 8):
        optimizer = AdamW(model.named_parameters(), state_bits=bits)
        assert optimizer.resident_bytes == owners.optimizer_bytes(elements, bits)
        flat = optimizer._moments[0].flat
        assert flat.values.nbytes == planned[owners.ADAPTERS]
        assert flat.gradients.nbytes == planned[owners.GRADIENTS]
        optimizer.release()


def test_tied_weights_count_once():
    linear = torch.nn.Linear(8, 4, bias=False).requires_grad_(requires_grad=False)
    twin = torch.nn.Linear(8, 4, bias=False)
    twin.weight = linear.weight
    assert owners.persistent_bytes(torch.nn.Sequential(linear, twin)) == {owners.DENSE: 128}
