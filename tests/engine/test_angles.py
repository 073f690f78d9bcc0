import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding, Gemma3TextConfig
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

from halfbyte.engine.angles import Angles
from halfbyte.engine.families import NO_ROPE

HIDDEN = torch.zeros(2, 3, 8)
POSITIONS = torch.tensor([[0, 1, 2], [5, 6, 7]])


def test_layers_that_rotate_alike_share_a_table():
    rotary = LlamaRotaryEmbedding(LlamaConfig(head_dim=4))
    angles = Angles(rotary, [None, NO_ROPE, None])
    assert angles.tables == [0, 1, 0]
    cos, sin = angles(HIDDEN, POSITIONS)
    assert cos.shape == sin.shape == (2, 6, 4)
    expected = rotary(HIDDEN, POSITIONS)
    assert torch.equal(cos[0], expected[0].flatten(0, 1))
    assert torch.equal(sin[0], expected[1].flatten(0, 1))
    assert (cos[1] == 1).all()
    assert (sin[1] == 0).all()


def test_each_layer_type_has_its_own():
    types = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(head_dim=4, num_hidden_layers=2, layer_types=types)
    rotary = Gemma3RotaryEmbedding(config)
    angles = Angles(rotary, types)
    cos, _ = angles(HIDDEN, POSITIONS)
    for table, kind in zip(angles.tables, types, strict=True):
        assert torch.equal(cos[table], rotary(HIDDEN, POSITIONS, kind)[0].flatten(0, 1))
    assert not torch.equal(cos[0], cos[1])
