"""The body of a Llama-shaped model, run fused: embedding, layers, final norm.

`FusedBody.of(model)` says whether a model has the shape, and why not. Training then calls the body
instead of the model's own forward; the model itself is not changed, and generates as ever.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halfbyte.device import available_bytes, tensor_bytes
from halfbyte.engine import policy
from halfbyte.engine.angles import Angles
from halfbyte.engine.attention import Layout, backends
from halfbyte.engine.cpu_layer import CpuLayer
from halfbyte.engine.final_norm import final_norm
from halfbyte.engine.graph import Graphs
from halfbyte.engine.layer import FusedLayer
from halfbyte.engine.offload import Offload, Passage
from halfbyte.errors import ConfigError
from halfbyte.kernels import native

_log = logging.getLogger(__name__)

_MEMORY = ("auto", "lean", "fast")
# Of the free memory, what the plan leaves for workspaces and fragmentation.
_RESERVE = 0.12
# Of the host's free memory, what inputs of layers may take.
_HOST_SHARE = 0.7
_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 0.02  # of the norm; roundings of one layer in bf16 stay below a half of it


class FusedBody:
    """Hidden states of a causal language model, from token ids.

    Args:
        model: The transformers body (`LlamaModel` and its like).
        memory: "auto" spends the free memory on saved activations, "lean" the least, "fast" saves
            all; or a budget for saved activations in bytes.
        kind: How a layer runs: `FusedLayer`, `Fp8Layer`, or `CpuLayer` where it is.
        max_tile: Most tokens that an MLP may take at a time; None: what memory allows.
    """

    def __init__(
        self,
        model: Any,
        *,
        memory: str | int = "auto",
        kind: type[FusedLayer] = FusedLayer,
        max_tile: int | None = None,
    ) -> None:
        if isinstance(memory, str) and memory not in _MEMORY:
            raise ConfigError(f"expected memory of {_MEMORY} or a number of bytes, got {memory!r}")
        self.model = model
        self.memory, self.max_tile, self.kind = memory, max_tile, kind
        self.layers = [kind(layer, model.config, index) for index, layer in enumerate(model.layers)]
        self._angles = Angles(model.rotary_emb, [layer.rope for layer in self.layers])
        self._choices: dict[tuple[int, bool], policy.Choice] = {}
        self._num_staying = len(self.layers)
        adapters = [t for layer in self.layers for t in layer.adapters if t.requires_grad]
        self._graphs = Graphs(adapters, is_thrifty=memory == "lean")
        # Recorded backwards add the gradients of adapters only.
        self._graphs.is_stopped = any(p.requires_grad for p in model.norm.parameters())
        self._offload: Offload | None = None
        self._has_warned = False

    def with_memory(self, memory: str | int, *, max_tile: int | None = None) -> "FusedBody":
        """Return a body over the same layers that saves more or less."""
        body = FusedBody(self.model, memory=memory, kind=self.kind, max_tile=max_tile)
        body._graphs.is_stopped = self._graphs.is_stopped
        body._offload = self._offload
        return body

    def with_kind(self, kind: type[FusedLayer]) -> "FusedBody":
        """Return a body over the same layers that runs them in another way."""
        return FusedBody(self.model, memory=self.memory, kind=kind, max_tile=self.max_tile)

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
        *,
        angles: tuple[Tensor, Tensor] | None = None,
        first_token: int = 0,
        **_: Any,
    ) -> tuple[Tensor]:
        """Return `(hidden,)` with hidden `[B, S, H]`.

        Args:
            input_ids: `[B, S]` int64.
            position_ids: `[B, S]` or `[1, S]`, restarting for packed documents; None counts from 0.
            layout: Bounds of packed documents; None: every row is one sequence.
            angles: What `angles` returned for these positions, if it was asked before.
            first_token: Tokens before these, where a batch that did not fit was cut: what is
                dropped stays the same.
        """
        batch, length = input_ids.shape
        hidden = self.model.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(length, device=hidden.device).unsqueeze(0)
        cos, sin = angles or self.angles(position_ids.expand(batch, length))
        layout = layout or Layout(batch, length, max_length=length)
        seed = self._seed(hidden.device, first_token)
        if self._offload is not None:
            self._offload.settle()
        x = self._graphs(self._run_layers, hidden.flatten(0, 1), cos, sin, layout, seed)
        return (x.view(batch, length, -1),)

    def angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of positions `[B, S]`, `[tables, B * S, R]` each (see `Angles`)."""
        return self._angles(self.model.embed_tokens.weight, position_ids)

    def _seed(self, device: torch.device, first_token: int) -> Tensor | None:
        """Return a seed for this forward's dropout masks, drawn from torch's CPU generator."""
        if not self.model.training or not any(layer.has_dropout for layer in self.layers):
            return None
        seed = torch.cat([torch.randint(2**62, (1,)), torch.tensor([first_token])])
        seed = seed.pin_memory() if device.type == "cuda" else seed
        return seed.to(device, non_blocking=True)

    def _run_layers(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, seed: Tensor | None
    ) -> Tensor:
        choice = self._choice_for(x)
        passage = self._passage(x.device, choice)
        levels = choice.levels if torch.is_grad_enabled() else ["attention"] * len(self.layers)
        with backends():
            for layer, table, keep in zip(self.layers, self._angles.tables, levels, strict=True):
                x = layer.run(x, cos[table], sin[table], layout, keep, seed, passage)
        if x.requires_grad:
            x.register_hook(passage.begin_return)
        return final_norm(self.model.norm, x)

    @torch.no_grad()
    def agrees(self) -> bool:
        """Whether every layer gives, from the same input, what transformers' own layer gives.

        Layer by layer, since in 16 bits the roundings of many layers add up to more than a small
        mistake in one of them. Nothing is dropped.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            return self._agrees()
        finally:
            self.model.train(was_training)

    def _agrees(self) -> bool:
        device = self.model.embed_tokens.weight.device
        size = self.model.embed_tokens.weight.shape[0]
        positions = torch.arange(_PROBE_TOKENS, device=device).unsqueeze(0)
        x = self.model.embed_tokens(positions % size)
        all_cos, all_sin = self.angles(positions)
        layout = Layout(1, _PROBE_TOKENS, max_length=_PROBE_TOKENS)
        for layer, table in zip(self.layers, self._angles.tables, strict=True):
            cos, sin = all_cos[table], all_sin[table]
            expected = layer.layer(
                x,
                attention_mask=self._mask(x, layer.window),
                position_embeddings=(cos[None], sin[None]),
            )
            with backends():
                actual = layer.run(x.flatten(0, 1), cos, sin, layout, "all").view(x.shape)
            error = (actual.float() - expected.float()).norm() / expected.float().norm()
            if not bool(error < _PROBE_TOLERANCE):
                return False
            x = expected
        return True

    def _mask(self, x: Tensor, window: int | None) -> Tensor | None:
        """Return what transformers' attention adds to its scores, None where it knows itself."""
        if "flash" in self.model.config._attn_implementation:
            return None
        length = x.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        seen = seen if window is None else seen.triu(1 - window)
        return x.new_zeros(1, 1, length, length).masked_fill(~seen, -torch.inf)

    def _passage(self, device: torch.device, choice: policy.Choice) -> Passage:
        if self._offload is None and "offload" in choice.levels:
            self._offload = Offload(device)
        return Passage(self._offload, choice.tile)

    def logit_rows(self, hidden: Tensor) -> int | None:
        """Return how many rows of logits are to be made at once; None where that is free.

        Args:
            hidden: `[T, H]`, what this body returned.
        """
        if not hidden.is_cuda:
            return None
        return policy.logit_rows(self.memory, self._choice_for(hidden).tile)

    def _choice_for(self, x: Tensor) -> policy.Choice:
        """Return what the layers keep for this many tokens, planned once a size."""
        key = self._key(x.shape[0])
        if key not in self._choices:
            self._choices[key] = self._plan(x)
            if torch.is_grad_enabled():
                self._let_stay(self._choices[key].num_staying)
        return self._choices[key]

    def _key(self, num_tokens: int) -> tuple[int, bool]:
        """Return what shares a plan: sizes within an eighth, so that it is not made each time."""
        unit = 1 << max(num_tokens.bit_length() - 4, 0)
        return -(-num_tokens // unit) * unit, torch.is_grad_enabled()

    def _plan(self, x: Tensor) -> policy.Choice:
        # On a CPU there is no telling: it plans as if there were no end.
        free = (tensor_bytes(x.device) or 0) if x.is_cuda else 1 << 62
        free += self._staying_bytes()
        # On a CPU the host is the device: nothing is gained by moving.
        host = available_bytes("cpu") if x.is_cuda else 0
        if host is not None and self._offload is not None:
            host += self._offload.host_bytes
        choice = self.choose(x.shape[0], x.element_size(), free, host)
        if x.is_cuda and self.memory == "lean" and "offload" not in choice.levels:
            if not self._has_warned:
                _log.warning(
                    "inputs of layers stay on the GPU: host memory (%.1f GiB free) is too short "
                    "for them", (host or 0) / 2**30,
                )  # fmt: skip
            self._has_warned = True
        # A CPU's weights are contiguous and made faster than it multiplies.
        return choice if x.is_cuda else replace(choice, num_staying=0)

    def choose(
        self, num_tokens: int, itemsize: int, free_bytes: int, host_bytes: int | None = None
    ) -> policy.Choice:
        """Return what the layers keep for so many tokens where so many bytes are free.

        Args:
            num_tokens: Of a micro-step.
            itemsize: Bytes of an activation.
            free_bytes: Of the device, beside weights, adapters and optimizer.
            host_bytes: Of host memory that is free; None: enough.
        """
        layer, count = self.layers[0], len(self.layers)
        shape, hidden_size = layer.shape, layer.qkv.inputs
        tokens = num_tokens * 9 // 8
        sizes = policy.LayerBytes.of(shape, hidden_size, tokens, itemsize)
        on_host = count
        if host_bytes is not None:
            on_host = min(int(host_bytes * _HOST_SHARE) // sizes.input, count)
        largest = max(layer.largest_weight_bytes(itemsize) for layer in self.layers)
        all_weights = max(layer.weight_bytes(itemsize) for layer in self.layers)
        left = tile = 0
        for tile in policy.tiles(num_tokens, self.max_tile):
            working = policy.working_bytes(shape, hidden_size, tokens, itemsize, tile)
            working += max(layer.quantized_bytes(tokens, tile) for layer in self.layers)
            left = int(free_bytes * (1 - _RESERVE)) - working - (all_weights if tile else largest)
            if left >= policy.least_bytes(count, sizes, on_host):
                break
        budget = self.memory if isinstance(self.memory, int) else left
        choice = policy.plan(self.memory, count, sizes, all_weights, budget, host_layers=on_host)
        return replace(choice, tile=tile)

    def smaller_tile(self, num_tokens: int) -> int | None:
        """Return the next smaller tile than what so many tokens are taken in, None for none."""
        if isinstance(self.layers[0], CpuLayer):  # which takes all
            return None
        now = min(self.max_tile or num_tokens, num_tokens)
        chosen = self._choices.get(self._key(num_tokens))
        if chosen is not None and chosen.tile:
            now = min(now, chosen.tile)
        return next((tile for tile in policy.tiles(num_tokens) if 0 < tile < now), None)

    def stop_recording(self) -> bool:
        """Give the memory of CUDA graphs back, for good; return whether there were any."""
        return self._graphs.stop()

    def _let_stay(self, count: int) -> None:
        """Let the weights of the first layers stay, of never more than an earlier size allowed."""
        if count < self._num_staying and self._staying_bytes():
            # Recorded graphs read the matrices that go.
            self._graphs.forget()
        self._num_staying = min(count, self._num_staying)
        for index, layer in enumerate(self.layers):
            for siblings in layer.all_siblings:
                if index < self._num_staying:
                    siblings.stay.granted = True
                else:
                    siblings.stay.end()

    def _staying_bytes(self) -> int:
        return sum(s.stay.nbytes for layer in self.layers for s in layer.all_siblings)


def layer_kind(weight: Tensor) -> type[FusedLayer] | None:
    """Return how layers run fused where and as `weight` is, or None where that gains nothing."""
    if weight.is_cuda:
        return FusedLayer
    is_quick = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return CpuLayer if is_quick and native.library() is not None else None
