"""The summed token loss of a causal language model, without its logits where that is proven right.

Most models are a body (embedding, decoder layers, norm) and an output embedding, perhaps with a
scale or a soft cap on the logits. Then the body's hidden states go straight into
`linear_cross_entropy`, which never holds [tokens, vocabulary]. Whether a model is like that is not
looked up by name: one forward pass of a few tokens must give the same logits both ways. Otherwise
(an adapted output embedding, an unknown last step) the model's own logits are used.

Shapes: B rows, S positions, N = B * S, h hidden size, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from halfbyte.data.loader import Batch
from halfbyte.engine.body import FusedBody, layer_kind
from halfbyte.engine.families import text_part
from halfbyte.engine.graph import MAX_TOKENS
from halfbyte.engine.layer import Fp8Layer, FusedLayer
from halfbyte.engine.obstacle import obstacle, require_fused
from halfbyte.engine.packed import Packed, merge, pack
from halfbyte.engine.projections_fp8 import require_bfloat16, require_fp8
from halfbyte.kernels.cross_entropy import linear_cross_entropy
from halfbyte.models.attention import use_cpu_attention

IGNORE_INDEX = -100
# Several of these fill an 80 GB card; the policy recomputes where they do not fit. A CPU gains
# nothing from more, and a small micro-batch is how its user keeps memory small.
_TOKENS_AT_ONCE = 8192
_TOKENS_AT_ONCE_CPU = 1024
_PROBE_TOKENS = 8
_PROBE_TOLERANCE = (
    0.02  # of the largest logit; two roundings of bf16 stay below, a forgotten scale does not
)


@dataclass(frozen=True)
class _Head:
    """logits = cap(scale * (hidden W^T + bias)), with cap(x) = softcap * tanh(x / softcap)."""

    linear: nn.Linear
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden).float() * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, taken apart for its loss.

    Attributes:
        model: What was given: a transformers model or a peft model around one.
        body: Maps token ids to hidden states; `None` where the model's own logits are used.
        head: Maps hidden states to logits.
    """

    model: nn.Module
    body: nn.Module | FusedBody | None = None
    head: _Head | None = None

    @classmethod
    def of(
        cls, model: nn.Module, *, memory: str | int = "auto", compute: str = "bf16"
    ) -> "LanguageModel":
        """Take `model` apart if one small forward pass proves that the parts give its logits.

        The body runs fused where it has the shape for it and the machine has the means.

        Args:
            model: A causal language model, adapted or not.
            memory: What the fused body spends on saved activations: "auto", "lean", "fast" or a
                number of bytes.
            compute: "bf16", or "fp8": the fused body's large products are then in eight bits.

        Raises:
            ConfigError: `compute` is "fp8", and the GPU or the model cannot do it.
        """
        parts = cls._apart(model, memory)
        return parts if compute == "bf16" else parts._in_fp8()

    @classmethod
    def _apart(cls, model: nn.Module, memory: str | int) -> "LanguageModel":
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(causal, PreTrainedModel):
            return cls(model)
        use_cpu_attention(causal)
        body = text_part(causal)
        linear = causal.get_output_embeddings()
        # Exactly nn.Linear: an adapted or quantized output embedding has a forward of its own
        if body is None or body is causal or type(linear) is not nn.Linear:
            return cls(model)
        head = _Head(linear, _logit_scale(causal.config), _softcap(causal.config))
        if not _proves(causal, body, head):
            return cls(model)
        kind = layer_kind(linear.weight)
        if kind is not None and obstacle(body) is None:
            fused = FusedBody(body, memory=memory, kind=kind)
            if fused.agrees():
                return cls(model, fused, head)
        return cls(model, body, head)

    def _in_fp8(self) -> "LanguageModel":
        embedding: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        require_fp8(embedding.device)
        require_bfloat16(embedding.dtype)
        if isinstance(self.body, FusedBody):
            return dataclasses.replace(self, body=self.body.with_kind(Fp8Layer))
        reason = None if self.body is None else obstacle(self.body)
        require_fused(reason or "its values are not those of the fused layers")
        return self

    def in_bf16(self) -> "LanguageModel":
        """Return the model as it is used when it is trained: its products in 16 bits."""
        if not isinstance(self.body, FusedBody) or not self.is_fp8:
            return self
        return dataclasses.replace(self, body=self.body.with_kind(FusedLayer))

    @property
    def is_fused(self) -> bool:
        """Whether the decoder layers run fused."""
        return isinstance(self.body, FusedBody)

    @property
    def is_fp8(self) -> bool:
        """Whether they multiply in eight bits."""
        return isinstance(self.body, FusedBody) and self.body.kind is Fp8Layer

    def micro_steps(self, batches: Sequence[Batch]) -> list[list[Batch]]:
        """Return the micro-batches in the groups that go through the model together.

        Fused, packed rows cost only their tokens, so short micro-batches are put together; the
        loss is a sum over tokens and does not change.
        """
        if not self.is_fused or self.head is None:
            return [[batch] for batch in batches]
        is_cpu = self.head.linear.weight.device.type == "cpu"
        at_once = _TOKENS_AT_ONCE_CPU if is_cpu else _TOKENS_AT_ONCE
        return merge(batches, max(at_once, *(batch.num_tokens for batch in batches)))

    def with_memory(self, memory: str | int, *, max_tile: int | None = None) -> "LanguageModel":
        """Return the model with another choice of what its fused body saves; see `FusedBody`."""
        if not isinstance(self.body, FusedBody):
            return self
        return dataclasses.replace(self, body=self.body.with_memory(memory, max_tile=max_tile))

    def prepare(self, batches: Sequence[Batch]) -> Packed | None:
        """Return micro-batches packed, on the device or on their way; None where nothing packs.

        What else a step would begin with, while the device waits for its host, is queued here, too.
        """
        if not isinstance(self.body, FusedBody) or self.head is None:
            return None
        packed = pack(batches).to(self.head.linear.weight.device)
        if packed.position_ids.numel() > MAX_TOKENS:  # then the wait does not count, memory does
            return packed
        return dataclasses.replace(packed, angles=self.body.angles(packed.position_ids))

    def loss_sum(
        self, *batches: Batch, first_token: int = 0, packed: Packed | None = None
    ) -> Tensor:
        """Return the summed loss of the supervised tokens: float32 scalar, on the last device.

        Args:
            batches: Token ids and unshifted labels [B, S] on the CPU: one micro-batch, or several
                where `micro_steps` put them together.
            first_token: Tokens before these where a micro-batch was cut: fused, dropout goes on.
            packed: What `prepare` made of the batches, if that was done before.
        """
        packed = packed or self.prepare(batches)
        if packed is not None and isinstance(self.body, FusedBody) and self.head is not None:
            # CUDA graphs are recorded on the current device, which may be another.
            with torch.cuda.device_of(self.head.linear.weight):
                return self._packed_loss(self.body, self.head, packed, first_token)
        (batch,) = batches
        inputs = _inputs(batch, self.model.get_input_embeddings().weight.device)  # type: ignore[operator]
        labels = F.pad(batch.labels, (0, 1), value=IGNORE_INDEX)[:, 1:].reshape(
            -1
        )  # position t predicts t + 1
        if self.body is None or self.head is None:
            logits = self.model(**inputs, use_cache=False).logits.flatten(0, 1).float()
            labels = labels.to(logits.device, non_blocking=True)
            return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        body: Any = self.body
        hidden: Tensor = body(**inputs, use_cache=False)[0].flatten(0, 1)
        return linear_cross_entropy(
            hidden,
            self.head.linear.weight,
            labels.to(hidden.device, non_blocking=True),
            bias=self.head.linear.bias,
            logit_scale=self.head.logit_scale,
            softcap=self.head.softcap,
        )

    def _packed_loss(
        self, body: FusedBody, head: _Head, packed: Packed, first_token: int
    ) -> Tensor:
        ids, positions, layout = packed.input_ids, packed.position_ids, packed.layout
        hidden = body(ids, positions, layout, angles=packed.angles, first_token=first_token)[0]
        hidden = hidden.flatten(0, 1)
        return linear_cross_entropy(
            hidden.index_select(0, packed.rows),
            head.linear.weight,
            packed.labels,
            bias=head.linear.bias,
            chunk_rows=body.logit_rows(hidden),
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            all_labelled=True,
        )


def _inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return the model's arguments, on `device`, without a mask where none is needed.

    Rows padded on the right need no mask: a causal model's real tokens never see what comes after
    them, and padding has no labels. That spares a [S, S] mask and keeps the fast attention kernels.
    Packed rows come without a mask too: from positions that start again, transformers builds the
    block-diagonal one.
    """
    inputs = {"input_ids": batch.input_ids}
    if batch.attention_mask is None:
        inputs["position_ids"] = batch.position_ids
    elif not bool(batch.attention_mask[:, 0].all()):
        inputs |= {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    if device.type == "cuda":
        inputs = {
            name: tensor if tensor.is_cuda else tensor.contiguous().pin_memory()
            for name, tensor in inputs.items()
        }
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def _logit_scale(config: Any) -> float:
    """Return the factor on the logits: Cohere's or Falcon H1's, or one over Granite's divisor."""
    text = config.get_text_config()
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            return float(getattr(text, name))
    divisor = getattr(text, "logits_scaling", None)
    return 1.0 if divisor is None else 1.0 / float(divisor)


def _softcap(config: Any) -> float | None:
    """Return the soft cap on the logits (Gemma 2)."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


@torch.no_grad()
def _proves(causal: PreTrainedModel, body: nn.Module, head: _Head) -> bool:
    """Whether `head` on `body` gives the logits of `causal` on a few tokens."""
    embedding: Tensor = causal.get_input_embeddings().weight  # type: ignore[assignment]
    ids = torch.arange(_PROBE_TOKENS, device=embedding.device).unsqueeze(0) % embedding.shape[0]
    was_training = causal.training
    causal.eval()
    try:
        expected = causal(input_ids=ids, use_cache=False).logits.float()
        actual = head.logits(body(input_ids=ids, use_cache=False)[0])
    finally:
        causal.train(was_training)
    error = (actual - expected).abs().max()
    return bool(error <= _PROBE_TOLERANCE * expected.abs().max())
