"""Tokens one after another by the fused step: recorded as a CUDA graph, read a few steps behind.

The host never waits for the token that it has just asked for: it launches ahead, and looks at
tokens when they are `_BEHIND` steps old. A few steps after a stop token are run for nothing.

Shape letters: B sequences, V vocabulary, n tokens so far.
"""

import importlib.util
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.device import tensor_bytes
from halfbyte.engine import obstacle as engine_obstacle
from halfbyte.engine.decode_step import DecodeStep
from halfbyte.engine.families import parts_of
from halfbyte.memory.host_copy import HostBuffers, HostCopy

# Layers whose every detail the step computes; the training engine may know more.
_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
# Rotations whose angles do not depend on how long a sequence is.
_ROPES = {"default", "linear", "llama3", "yarn"}
_BEHIND = 4
_SHARE_OF_FREE_MEMORY = 0.8
_TOKENS = "tokens"

Choose = Callable[[Tensor, Tensor], Tensor]


def obstacle(model: nn.Module) -> str | None:
    """Return why the fused step cannot serve a causal language model, or None where it can."""
    configs = getattr(model, "peft_config", {})
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        return "its adapter changes the prompt"
    body, head = _parts(model)
    if body is None or head is None:
        return "it is not a body with a head"
    reason = engine_obstacle.obstacle(body)
    if reason is not None:
        return reason
    kinds = {type(layer).__name__ for layer in body.layers}
    if not kinds <= _LAYERS:
        return f"its layers are {', '.join(sorted(kinds))}"
    if any(parts_of(layer, body.config).window is not None for layer in body.layers):
        return "its attention slides over a window"
    if body.rotary_emb.rope_type not in _ROPES:
        return f"its rope_type is {body.rotary_emb.rope_type}"
    size = int(body.layers[0].self_attn.head_dim)
    if not 16 <= size <= 256 or size & (size - 1):
        return f"its head size is {size}"
    devices = {tensor.device for tensor in model.parameters()}
    if len(devices) > 1:
        return "it is spread over several devices"
    if devices.pop().type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def cache_fits(model: nn.Module, batch: int, length: int) -> bool:
    """Whether the device has room for the cache of a decoder."""
    body, _ = _parts(model)
    weight, config = body.embed_tokens.weight, body.config
    if weight.device.type != "cuda":
        return True
    heads = config.num_key_value_heads * int(body.layers[0].self_attn.head_dim)
    needed = 2 * len(body.layers) * batch * length * heads * weight.element_size()
    return needed < _SHARE_OF_FREE_MEMORY * (tensor_bytes(weight.device) or 0)


class Decoder:
    """Answers to up to B prompts at a time.

    Args:
        model: A causal language model without an `obstacle`, in evaluation mode.
        batch: B.
        length: Room for each prompt and its answer.
    """

    def __init__(self, model: nn.Module, *, batch: int, length: int) -> None:
        body, head = _parts(model)
        self._signature = _signature(model)
        self._step = DecodeStep(body, head, batch, length)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        if self._step.tokens.is_cuda:
            self._record()

    def serves(self, model: nn.Module, *, batch: int, length: int) -> bool:
        """Whether it can answer for this model, as it is now, and has the room."""
        step = self._step
        has_room = batch <= step.batch and length <= step.length
        return has_room and _signature(model) == self._signature

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Collection[int],
        choose: Choose | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Return the tokens that follow each prompt, up to and with one of `stop`.

        Args:
            prompts: Token ids; with `max_new_tokens` more, each has room.
            max_new_tokens: 1 or more.
            stop: Tokens that end an answer.
            choose: From the ids so far `[B, n]` (short prompts are filled up with their first
                token, on the left) and logits `[B, V]` to the next ids `[B]`, on the device. None:
                the likeliest, which the step chooses itself.
            on_token: Called with each token of the first answer.
        """
        step = self._step
        rows = [list(prompt) for prompt in prompts]
        rows += [rows[0]] * (step.batch - len(rows))
        chosen = None
        if choose is not None:
            chosen = _Chosen(choose, rows, max_new_tokens, step.tokens)
        answers = _Answers(len(prompts), frozenset(stop), on_token)
        fetched: deque[HostCopy] = deque()
        step.refresh()
        logits = step.prefill(rows)
        for left in reversed(range(max_new_tokens)):
            if chosen is not None:
                chosen.next_(logits)
            fetched.append(HostBuffers().copy({_TOKENS: step.tokens}))
            if len(fetched) > _BEHIND and not answers.take(fetched.popleft()):
                break
            if left:
                logits = self._advance()
        while fetched and answers.take(fetched.popleft()):
            pass
        return answers.tokens

    def _advance(self) -> Tensor:
        if self._graph is None or self._logits is None:
            return self._step()
        self._graph.replay()
        return self._logits

    def _record(self) -> None:
        """Record the step, after a run on the side that compiles its kernels."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step()


class _Chosen:
    """The ids so far, and how the next ones are chosen: they go into the step's `tokens`."""

    def __init__(
        self, choose: Choose, rows: list[list[int]], max_new_tokens: int, tokens: Tensor
    ) -> None:
        self._choose, self._tokens = choose, tokens
        self._count = max(map(len, rows))
        self._ids = tokens.new_zeros(len(rows), self._count + max_new_tokens)
        filled = [[row[0]] * (self._count - len(row)) + row for row in rows]
        self._ids[:, : self._count] = torch.tensor(filled, device=tokens.device)

    def next_(self, logits: Tensor) -> None:
        """Choose one more id for each row."""
        self._tokens.copy_(self._choose(self._ids[:, : self._count], logits))
        self._ids[:, self._count] = self._tokens
        self._count += 1


class _Answers:
    """What has come of each answer."""

    def __init__(
        self, count: int, stop: frozenset[int], on_token: Callable[[int], None] | None
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self._open = set(range(count))
        self._stop = stop
        self._on_token = on_token

    def take(self, fetched: HostCopy) -> bool:
        """Add one token to each open answer; return whether any is still open."""
        new = fetched.wait()[_TOKENS].tolist()
        for row in sorted(self._open):
            self.tokens[row].append(new[row])
            if new[row] in self._stop:
                self._open.remove(row)
            if row == 0 and self._on_token is not None:
                self._on_token(new[row])
        return bool(self._open)


def _parts(model: Any) -> tuple[Any, Any]:
    """Return the body and the head of a causal language model, under an adapter or not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, "model", None), getattr(base, "lm_head", None)


def _signature(model: nn.Module) -> tuple[Any, ...]:
    """Return what a decoder relies on: where the tensors are, and which adapters count how much.

    It is asked for before each answer. `model.modules()` goes through a generator for each level,
    and takes a 32-layer model several times as long.
    """
    places: list[int] = []
    adapters: list[Any] = []
    rest: list[Any] = [model]
    seen: set[int] = set()
    while rest:
        module = rest.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children = module._modules
        rest += [child for child in children.values() if child is not None]
        places += [
            tensor.data_ptr() for tensor in module._parameters.values() if tensor is not None
        ]
        if "lora_A" in children:
            adapters.append(
                (
                    tuple(module.active_adapters),
                    tuple(module.merged_adapters),
                    module.disable_adapters,
                    tuple(module.scaling.items()),
                )
            )
    return places, adapters
