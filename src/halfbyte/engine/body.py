"""The body of a Llama-shaped model, run fused: embedding, layers, final norm.

`FusedBody.of(model)` says whether a model has the shape, and why not. Training then calls the body
instead of the model's own forward; the model itself is not changed, and generates as ever.
"""

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.engine import policy
from halfbyte.engine.attention import Layout, backends
from halfbyte.engine.cpu_layer import CpuLayer
from halfbyte.engine.final_norm import final_norm
from halfbyte.engine.graph import Graphs
from halfbyte.engine.layer import ACTIVATIONS, FusedLayer, dropout_of
from halfbyte.errors import ConfigError
from halfbyte.kernels import native

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
_PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_MEMORY = ("auto", "lean", "fast")
# Of the free memory, what the plan leaves for workspaces and fragmentation.
_RESERVE = 0.12
_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 0.02  # of the norm; roundings of one layer in bf16 stay below a half of it


class FusedBody:
    """Hidden states of a causal language model, from token ids.

    Args:
        model: The transformers body (`LlamaModel` and its like).
        memory: "auto" spends the free memory on saved activations, "lean" the least, "fast" saves
            all; or a budget for saved activations in bytes.
        kind: How a layer runs: `FusedLayer`, or `CpuLayer` where it is.
    """

    def __init__(
        self, model: Any, *, memory: str | int = "auto", kind: type[FusedLayer] = FusedLayer
    ) -> None:
        if isinstance(memory, str) and memory not in _MEMORY:
            raise ConfigError(f"expected memory of {_MEMORY} or a number of bytes, got {memory!r}")
        self.model = model
        self.memory = memory
        self.layers = [kind(layer, model.config, index) for index, layer in enumerate(model.layers)]
        self._levels: dict[int, list[str]] = {}
        self._num_staying = len(self.layers)
        adapters = [t for layer in self.layers for t in layer.adapters if t.requires_grad]
        self._graphs = Graphs(adapters)

    def with_memory(self, memory: str | int) -> "FusedBody":
        """Return a body over the same layers that saves more or less."""
        body = FusedBody(self.model, memory=memory, kind=type(self.layers[0]))
        body._graphs.is_stopped = self._graphs.is_stopped
        return body

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
        *,
        first_token: int = 0,
        **_: Any,
    ) -> tuple[Tensor]:
        """Return `(hidden,)` with hidden `[B, S, H]`.

        Args:
            input_ids: `[B, S]` int64.
            position_ids: `[B, S]`, restarting for packed documents; None counts from 0.
            layout: Bounds of packed documents; None: every row is one sequence.
            first_token: Tokens before these, where a batch that did not fit was cut: what is
                dropped stays the same.
        """
        batch, length = input_ids.shape
        hidden = self.model.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(length, device=hidden.device).unsqueeze(0)
        embeddings = self.model.rotary_emb(hidden, position_ids=position_ids)
        cos, sin = (t.expand(batch, length, -1).flatten(0, 1).contiguous() for t in embeddings)
        layout = layout or Layout(batch, length, max_length=length)
        seed = self._seed(hidden.device, first_token)
        x = self._graphs(self._run_layers, hidden.flatten(0, 1), cos, sin, layout, seed)
        return (x.view(batch, length, -1),)

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
        levels = self._levels_for(x) if torch.is_grad_enabled() else ["all"] * len(self.layers)
        with backends():
            for layer, keep in zip(self.layers, levels, strict=True):
                x = layer.run(x, cos, sin, layout, keep, seed)
        return final_norm(self.model.norm, x)

    @torch.no_grad()
    def agrees(self) -> bool:
        """Whether every layer gives, from the same input, what transformers' own layer gives.

        Layer by layer, since in 16 bits the roundings of many layers add up to more than a small
        mistake in one of them.
        """
        device = self.model.embed_tokens.weight.device
        size = self.model.embed_tokens.weight.shape[0]
        ids = torch.arange(_PROBE_TOKENS, device=device).unsqueeze(0) % size
        x = self.model.embed_tokens(ids)
        embeddings = self.model.rotary_emb(x, position_ids=ids.new_tensor([range(_PROBE_TOKENS)]))
        cos, sin = (t.flatten(0, 1).contiguous() for t in embeddings)
        layout = Layout(1, _PROBE_TOKENS, max_length=_PROBE_TOKENS)
        mask = None
        if "flash" not in self.model.config._attn_implementation:
            mask = x.new_full((_PROBE_TOKENS, _PROBE_TOKENS), -torch.inf).triu(1)[None, None]
        for layer in self.layers:
            expected = layer.layer(x, attention_mask=mask, position_embeddings=embeddings)
            with backends():
                actual = layer.run(x.flatten(0, 1), cos, sin, layout, "all").view(x.shape)
            error = (actual.float() - expected.float()).norm() / expected.float().norm()
            if not bool(error < _PROBE_TOLERANCE):
                return False
            x = expected
        return True

    def _levels_for(self, x: Tensor) -> list[str]:
        """Return what each layer keeps for this many tokens, planned once a size."""
        # Sizes within an eighth share a plan, so that it is not made anew for every batch.
        unit = 1 << max(x.shape[0].bit_length() - 4, 0)
        key = -(-x.shape[0] // unit) * unit
        if key not in self._levels:
            choice = self._plan(x)
            self._levels[key] = choice.levels
            self._let_stay(choice.num_staying)
        return self._levels[key]

    def _plan(self, x: Tensor) -> policy.Choice:
        free = _free_bytes(x.device) + self._staying_bytes()
        choice = self.choose(x.shape[0], x.element_size(), free)
        # A CPU's weights are contiguous and made faster than it multiplies.
        return choice if x.is_cuda else policy.Choice(choice.levels)

    def choose(self, num_tokens: int, itemsize: int, free_bytes: int) -> policy.Choice:
        """Return what the layers keep for so many tokens where so many bytes are free.

        Args:
            num_tokens: Of a micro-step.
            itemsize: Bytes of an activation.
            free_bytes: Of the device, beside weights, adapters and optimizer.
        """
        shape, hidden_size = self.layers[0].shape, self.layers[0].qkv.inputs
        tokens = num_tokens * 9 // 8
        sizes = policy.LayerBytes.of(shape, hidden_size, tokens, itemsize)
        if isinstance(self.memory, int):
            budget = self.memory
        else:
            # One layer's backward: gate, up and hidden with their gradients, four hidden states.
            working = (6 * shape.intermediate_size + 8 * hidden_size) * tokens * itemsize
            weights = max(layer.largest_weight for layer in self.layers) * itemsize
            budget = int(free_bytes * (1 - _RESERVE)) - working - weights
        layer_bytes = max(layer.weight_elements for layer in self.layers) * itemsize
        return policy.plan(self.memory, len(self.layers), sizes, layer_bytes, budget)

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
        matrices = (s.stay.matrix for layer in self.layers for s in layer.all_siblings)
        return sum(m.nbytes for m in matrices if m is not None)


def _free_bytes(device: torch.device) -> int:
    """Return the bytes that tensors may still take, those cached by the allocator included."""
    if device.type != "cuda":
        return 1 << 62
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def layer_kind(weight: Tensor) -> type[FusedLayer] | None:
    """Return how layers run fused where and as `weight` is, or None where that gains nothing."""
    if weight.is_cuda:
        return FusedLayer
    is_quick = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return CpuLayer if is_quick and native.library() is not None else None


def obstacle(model: nn.Module) -> str | None:
    """Return why a transformers body cannot run fused, or None where it can."""
    config: Any = getattr(model, "config", None)
    layers: Any = getattr(model, "layers", None)
    if layers is None or len(layers) == 0 or not hasattr(model, "rotary_emb"):
        return "its body is not embedding, layers and norm"
    kinds = {type(layer).__name__ for layer in layers}
    if not kinds <= set(_LAYERS):
        return f"its layers are {', '.join(sorted(kinds))}"
    if config.hidden_act not in ACTIVATIONS:
        return f"its activation is {config.hidden_act}"
    if _slides(config):
        return "its attention slides over a window"
    if getattr(config, "attention_dropout", 0.0):
        return f"attention_dropout is {config.attention_dropout}"
    dropouts = set()
    for layer in layers:
        for part, names in _PROJECTIONS.items():
            for name in names:
                module = getattr(getattr(layer, part), name)
                reason = _projection_obstacle(module)
                if reason:
                    return f"{name} {reason}"
                if hasattr(module, "lora_A"):
                    dropouts.add(dropout_of(module))
    return None if len(dropouts) < 2 else "its adapters have different dropouts"


def _slides(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "sliding_window", None))


def _projection_obstacle(module: Any) -> str | None:
    """Return what of a projection's adapter the fused products do not compute, or None."""
    if not hasattr(module, "lora_A"):
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) > 1:
        return f"has {len(active)} active adapters"
    if module.merged:
        return "has a merged adapter"
    for name in active:
        if getattr(module, "use_dora", {}).get(name):
            return "is adapted with DoRA"
        if module.lora_B[name].bias is not None:
            return "has a bias on lora_B"
        if module.lora_A[name].weight.dtype != torch.float32:
            return f"has {module.lora_A[name].weight.dtype} adapters"
    return None
