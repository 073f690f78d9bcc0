import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from halfbyte.kernels import rope

SHAPES = [(1, 1, 1, 2, 2), (7, 4, 2, 16, 16), (5, 9, 3, 64, 64), (3, 2, 1, 32, 12)]


def _inputs(shape, dtype):
    tokens, heads, kv_heads, size, rotated = shape
    torch.manual_seed(0)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, size, dtype=torch.float64).to(dtype)
    angle = torch.rand(tokens, rotated // 2, dtype=torch.float64) * 6
    angle = torch.cat((angle, angle), -1)
    return qkv, angle.cos().to(dtype), angle.sin().to(dtype)


def _expected(qkv, cos, sin, heads, kv_heads):
    rotated = cos.shape[-1]
    query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
    turned = apply_rotary_pos_emb(
        query[None, ..., :rotated].transpose(1, 2),
        key[None, ..., :rotated].transpose(1, 2),
        cos[None],
        sin[None],
    )
    query, key = (
        torch.cat((t.transpose(1, 2)[0], whole[..., rotated:]), -1)
        for t, whole in zip(turned, (query, key), strict=True)
    )
    return query, key, value


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_equal_transformers_in_float64(shape):
    _, heads, kv_heads, _, _ = shape
    qkv, cos, sin = _inputs(shape, torch.float64)
    leaf = qkv.clone().requires_grad_()
    expected = _expected(leaf, cos, sin, heads, kv_heads)
    actual = rope.rope_(qkv.clone(), cos, sin, heads + kv_heads)
    torch.testing.assert_close(actual, torch.cat(expected, 1).detach(), rtol=1e-12, atol=1e-12)
    grads = [torch.randn_like(t) for t in expected]
    (wanted,) = torch.autograd.grad(expected, leaf, grads)
    out = torch.full((qkv.shape[0], qkv[0].numel() + 3), 7.0, dtype=torch.float64)
    rope.rope_backward(*grads, cos, sin, out)
    torch.testing.assert_close(out[:, :-3], wanted.flatten(1), rtol=1e-12, atol=1e-12)
    assert (out[:, -3:] == 7).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_triton_twin_equals_the_reference(shape, triton_device, half_dtype):
    twin = pytest.importorskip("halfbyte.kernels.rope_triton")
    _, heads, kv_heads, _, _ = shape
    qkv, cos, sin = (t.to(triton_device) for t in _inputs(shape, half_dtype))
    num_rotated = heads + kv_heads
    expected = rope.rope_.__wrapped__(qkv.clone(), cos, sin, num_rotated)
    actual = twin.rope_(qkv.clone(), cos, sin, num_rotated)
    torch.testing.assert_close(actual, expected, rtol=8e-3, atol=1e-2)
    # Heads first and transposed, as attention's backward gives them.
    grads = [
        torch.randn(n, qkv.shape[0], qkv.shape[2], device=triton_device)
        .to(half_dtype)
        .transpose(0, 1)
        for n in (heads, kv_heads, kv_heads)
    ]
    width = qkv[0].numel() + 8
    outs = [torch.full((qkv.shape[0], width), float("nan"), device=triton_device) for _ in "ab"]
    outs = [out.to(half_dtype) for out in outs]
    rope.rope_backward.__wrapped__(*grads, cos, sin, outs[0])
    twin.rope_backward(*grads, cos, sin, outs[1])
    torch.testing.assert_close(outs[1][:, :-8], outs[0][:, :-8], rtol=8e-3, atol=1e-2)
    assert outs[1][:, -8:].isnan().all()
