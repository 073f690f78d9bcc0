"""One token of each sequence through a Llama-shaped model, over a static key-value cache.

Everything a step reads or writes stays where it is: token ids, positions, cache and logits are
tensors of fixed size on the device. So a step can be recorded once as a CUDA graph and replayed
for every token. The weights stay in four bits (`kernels.matvec_4bit`); adapters are copied to the
model's dtype, side by side, since they are read whole for every token. Prompts go through the
training engine's halves of a layer, a few launches each, which leave their keys and values here.

Shape letters: B sequences, L room for each, V vocabulary, D head size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from halfbyte.engine.attention import Layout, attention
from halfbyte.engine.block import IntoAttention, Keep, OutOfAttention
from halfbyte.engine.layer import FusedLayer
from halfbyte.engine.projections import Siblings
from halfbyte.kernels.decode_attention import decode_attention_
from halfbyte.kernels.matvec_4bit import matvec_4bit
from halfbyte.kernels.matvec_4bit_parts import Gate, Group
from halfbyte.kernels.rms_norm import Norm

# Without cuDNN's, which is planned anew for each length of a prompt.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Kernels are compiled once for lengths that are multiples of it, and again for others.
_STEP_OF_LENGTH = 16
# Of prompts that go through a layer at once: what it makes of them on its way is a gigabyte for
# Llama 8B, however many prompts there are.
_TOKENS_AT_ONCE = 8192


@dataclass
class _Copies:
    """Where copies of a layer's adapters are, and of which state they are.

    Args:
        lora_A, lora_B: Places within the groups, in the order of `FusedLayer.adapters`.
        scaling: What each B is multiplied with.
        versions: Of what was copied last, where they say whether it has changed since.
    """

    lora_A: list[Tensor] = field(default_factory=list)
    lora_B: list[Tensor] = field(default_factory=list)
    scaling: list[float] = field(default_factory=list)
    versions: list[int] | None = None

    def group(self, siblings: Siblings, like: Tensor) -> Group:
        """Return the group that shares the siblings' weights, with places in it like `like`."""
        parts = siblings.projections
        rank, bias = max(p.rank for p in parts), None
        if siblings.has_bias:
            empty = [like.new_zeros(p.weight.shape[0]) for p in parts]
            both = zip(parts, empty, strict=True)
            bias = torch.cat([zeros if p.bias is None else p.bias.detach() for p, zeros in both])
        weights = tuple(p.weight for p in parts)
        if not rank:
            return Group(weights, bias=bias)
        lora_A = like.new_zeros(len(parts) * rank, siblings.inputs)
        lora_B = like.new_zeros(siblings.outputs, rank)
        for index, (p, end) in enumerate(zip(parts, siblings.columns, strict=True)):
            if p.rank:
                self.lora_A.append(lora_A[index * rank : index * rank + p.rank])
                self.lora_B.append(lora_B[end - p.weight.shape[0] : end, : p.rank])
                self.scaling.append(p.scaling)
        return Group(weights, lora_A, lora_B, bias)

    def refresh(self, adapters: tuple[Tensor, ...]) -> None:
        """Copy the adapters in three launches, if they may have changed."""
        versions = _versions(adapters)
        if not adapters or (versions is not None and versions == self.versions):
            return
        torch._foreach_copy_(self.lora_A, adapters[0::2])
        torch._foreach_copy_(self.lora_B, torch._foreach_mul(adapters[1::2], self.scaling))
        self.versions = versions


def _versions(adapters: tuple[Tensor, ...]) -> list[int] | None:
    """Return numbers that differ once any is written to, or None where none say so.

    Optimizers write through pointers, unseen by torch (ours does, and bitsandbytes'): whatever can
    be trained may have changed.
    """
    if any(tensor.requires_grad or tensor.is_inference() for tensor in adapters):
        return None
    return [tensor._version for tensor in adapters]


class _Layer:
    """What a step needs of a decoder layer."""

    def __init__(self, layer: FusedLayer, like: Tensor) -> None:
        self.fused = layer
        self.scale = layer.scale
        self.before_attention = layer.into.norm
        self.before_mlp = layer.out.norm
        self.gate = Gate(layer.shape.activation)
        self._copies = _Copies()
        groups = (self._copies.group(siblings, like) for siblings in layer.all_siblings)
        self.qkv, self.o, self.gate_up, self.down = groups

    def refresh(self) -> None:
        """Copy the adapters as they are now."""
        self._copies.refresh(self.fused.adapters)


class DecodeStep:
    """The static tensors of a step, and the step.

    Args:
        body: The transformers body (`LlamaModel` and its like).
        head: What makes logits of its hidden states.
        batch: B.
        length: L.
    """

    def __init__(self, body: Any, head: Any, batch: int, length: int) -> None:
        self.body, self.head = body, head
        self.batch, self.length = batch, length
        like = body.embed_tokens.weight.detach()
        self.layers = [
            _Layer(FusedLayer(layer, body.config, index), like)
            for index, layer in enumerate(body.layers)
        ]
        size = int(body.layers[0].self_attn.head_dim)
        cache = (len(self.layers), 2, batch, body.config.num_key_value_heads, length, size)
        self.cache = like.new_empty(cache)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.positions = torch.zeros(batch, dtype=torch.int32, device=like.device)
        places = torch.arange(length, device=like.device).unsqueeze(0)
        cos, sin = body.rotary_emb(like, position_ids=places)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()
        self.final = Norm(body.norm.weight.detach().float(), float(body.norm.variance_epsilon))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the adapters as they are now: a frozen one is copied again where it was written to.

        Others in their place, and another scaling, need another step.
        """
        for layer in self.layers:
            layer.refresh()

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Fill the cache with B prompts and return the logits after each, `[B, V]`.

        `tokens` are the likeliest then, too.
        """
        longest = max(map(len, prompts))
        self.positions.copy_(torch.tensor([len(prompt) for prompt in prompts]))
        width = min(-(-longest // _STEP_OF_LENGTH) * _STEP_OF_LENGTH, self.length)
        count = max(_TOKENS_AT_ONCE // width, 1)
        with sdpa_kernel(_BACKENDS, set_priority=True):
            cuts = [slice(start, start + count) for start in range(0, self.batch, count)]
            last = [self._prefill(prompts[cut], self.cache[:, :, cut], width) for cut in cuts]
        return self._logits(torch.cat(last))

    def _prefill(self, prompts: list[list[int]], caches: Tensor, width: int) -> Tensor:
        """Fill the caches of b prompts and return the hidden states after each, `[b, H]`."""
        device, batch = self.tokens.device, len(prompts)
        # Padding on the right: no token sees what comes after it, and the next ones overwrite it.
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]
        x = self.body.embed_tokens(torch.tensor(padded, device=device)).flatten(0, 1)
        # Sent before the layers are queued: such a copy waits for what is.
        ends = [row * width + len(prompt) - 1 for row, prompt in enumerate(prompts)]
        lasts = torch.tensor(ends, device=device)
        angles = (self.cos[:width].repeat(batch, 1), self.sin[:width].repeat(batch, 1))
        layout = Layout(batch, width, max_length=width)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = _prefill_layer(layer.fused, x, angles, layout, cache)
        return x[lasts]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Take `tokens` in at `positions`, move on by one, and return the logits `[B, V]`.

        `tokens` are then the likeliest next ones; whoever wants others writes them there.
        """
        x = self.body.embed_tokens(self.tokens)
        for layer, (keys, values) in zip(self.layers, self.cache, strict=True):
            qkv = matvec_4bit(x, layer.qkv, before=layer.before_attention)
            mixed, parts = decode_attention_(
                qkv, self.cos, self.sin, self.positions, keys, values, layer.scale
            )
            x = matvec_4bit(mixed, layer.o, before=parts, residual=x)
            gate_up = matvec_4bit(x, layer.gate_up, before=layer.before_mlp)
            x = matvec_4bit(gate_up, layer.down, before=layer.gate, residual=x)
        self.positions += 1
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        """Return the logits `[B, V]` of hidden states, and put the likeliest into `tokens`."""
        logits: Tensor = self.head(self.final(x))
        torch.argmax(logits, -1, out=self.tokens)
        return logits


def _prefill_layer(
    layer: FusedLayer, x: Tensor, angles: tuple[Tensor, Tensor], layout: Layout, cache: Tensor
) -> Tensor:
    """Return the next hidden states `[T, H]`; fill `cache` `[2, B, M, L, D]`: keys, values."""
    into, out = layer.into, layer.out
    x, query, key, value = IntoAttention.apply(
        x, into, layer.shape, *angles, None, *into.qkv.adapters
    )
    for tensor, place in zip((key, value), cache, strict=True):
        heads = tensor.unflatten(0, (layout.batch, layout.length)).transpose(1, 2)
        place[:, :, : layout.length] = heads
    mixed = attention(query, key, value, layout, layer.scale)
    y: Tensor = OutOfAttention.apply(
        mixed, x, out, layer.shape, Keep(everything=False), None, *out.adapters
    )
    return y
