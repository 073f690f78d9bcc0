"""The peak of a run's step, by owner, on a card of a given size."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from peft import PeftModel

from halfbyte.engine import policy
from halfbyte.engine.body import FusedBody
from halfbyte.engine.families import text_part
from halfbyte.engine.graph import LARGE_SHARE, LARGE_TOKENS, MAX_TOKENS
from halfbyte.engine.layer import Fp8Layer, FusedLayer
from halfbyte.engine.obstacle import obstacle, require_fused
from halfbyte.engine.projections_fp8 import require_bfloat16
from halfbyte.memory.activations import checkpoint_activations
from halfbyte.memory.fused_step import FusedStep
from halfbyte.memory.ledger import Ledger, Peak
from halfbyte.plan.cards import CONTEXT_BYTES, usable_bytes
from halfbyte.plan.fused import fused_shape
from halfbyte.plan.owners import (
    OPTIMIZER,
    ROW_SCALES,
    library_bytes,
    optimizer_bytes,
    persistent_bytes,
    slot_bytes,
    trainable_elements,
)
from halfbyte.plan.traced import trace_step

# As `kernels/cross_entropy.py` cuts logits on a GPU.
_CHUNK_BYTES, _CHUNK_ROWS = 32 * 2**20, 1024


@dataclass(frozen=True)
class Setting:
    """What a step's bytes depend on, beside the model.

    Attributes:
        rows: Sequences of a micro-step.
        length: Tokens of each.
        memory: "auto", "lean", "fast", or bytes for saved activations.
        compute: "bf16", or "fp8".
        state_bits: Of the optimizer's moments, 32 or 8.
        is_paged: Whether these may leave for the host.
        is_checkpointed: `gradient_checkpointing`: every layer is computed twice.
        total_bytes: Of the card; None where it is not known: then nothing is short.
        host_bytes: Free host memory; None: enough for every layer's input.
    """

    rows: int = 1
    length: int = 2048
    memory: str | int = "auto"
    compute: str = "bf16"
    state_bits: int = 32
    is_paged: bool = True
    is_checkpointed: bool = False
    total_bytes: int | None = None
    host_bytes: int | None = None

    @property
    def tokens(self) -> int:
        """Of a micro-step."""
        return self.rows * self.length


@dataclass(frozen=True)
class Prediction:
    """What a step will need.

    Attributes:
        setting: Of the step.
        peak: Bytes of tensors at the worst moment, as `max_memory_allocated` counts them.
        persistent: Bytes by owner that stay for the whole run.
        paged_bytes: Optimizer state that must be in host memory for the step to fit.
        kept: What the layers keep: name to number of layers; empty where not fused.
        tile: Tokens that an MLP takes at a time; 0: all.
        offloaded_bytes: Inputs of layers that are in host memory at once.
        why_unfused: Why the model's own layers run, or None.
    """

    setting: Setting
    peak: Peak
    persistent: Mapping[str, int]
    paged_bytes: int
    kept: Mapping[str, int]
    why_unfused: str | None
    tile: int = 0
    offloaded_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether the card has room for the peak, CUDA's context and the allocator's slack."""
        total = self.setting.total_bytes
        return total is None or self.peak.nbytes <= usable_bytes(total)


class Planner:
    """Predicts steps of one model.

    Args:
        model: Adapted; real, or a blueprint on the meta device.
        device_type: Where it will run.
    """

    def __init__(self, model: PeftModel, *, device_type: str = "cuda") -> None:
        self.model = model
        causal: Any = cast(Any, model).get_base_model()
        self.causal = causal
        self.body: Any = text_part(causal)
        self.why_unfused = obstacle(self.body)
        self.persistent = persistent_bytes(model)
        self.persistent["library workspaces"] = library_bytes(device_type)
        self.elements = trainable_elements(model)
        head = causal.get_output_embeddings()
        self._vocabulary = int(head.weight.shape[0])
        self._itemsize = int(causal.dtype.itemsize)
        self._input_bytes = int(causal.get_input_embeddings().weight.shape[1]) * self._itemsize
        self._fused: dict[tuple[str | int, str], FusedBody] = {}
        self._traced: dict[tuple[int, int, bool], Peak] = {}

    def predict(self, setting: Setting) -> Prediction:
        """Return the peak of a step.

        Paged state counts as on the card where the step fits with it, else as away; with "lean" it
        is always away.

        Raises:
            ConfigError: `compute` is "fp8", and the model does not run fused, or not in bfloat16.
        """
        if setting.compute == "fp8":
            require_fused(self.why_unfused)
            require_bfloat16(self.causal.dtype)
        state = optimizer_bytes(self.elements, setting.state_bits)
        if setting.is_checkpointed and self.why_unfused is None:
            setting = replace(setting, memory="lean")
        if setting.is_paged and setting.memory == "lean" and self.why_unfused is None:
            return self._predict(setting, 0, state)
        prediction = self._predict(setting, state, 0)
        if setting.is_paged and not prediction.fits:
            # A step that fits neither way is shown as small as it gets.
            prediction = self._predict(setting, 0, state)
        return prediction

    def _predict(self, setting: Setting, resident: int, paged: int) -> Prediction:
        persistent = {**self.persistent, OPTIMIZER: resident}
        choice = policy.Choice([])
        if self.why_unfused is None:
            shape = fused_shape(self._fused_body(setting), self._itemsize)
            persistent[ROW_SCALES] = shape.scale_bytes() * len(self.body.layers)
            choice = self._choose(setting, sum(persistent.values()))
            peak = self._fused_peak(setting, choice, persistent)
        else:
            ledger = Ledger(persistent)
            self._write_traced(ledger, setting)
            peak = ledger.peak
        if paged:
            update = sum(persistent.values()) + slot_bytes(self.elements, setting.state_bits)
            if update > peak.nbytes:
                owners = {
                    **persistent,
                    "optimizer pages on their way": update - sum(persistent.values()),
                }
                peak = Peak(update, "the update", owners)
        kept = {level: choice.levels.count(level) for level in dict.fromkeys(choice.levels)}
        kept |= {"weights": choice.num_staying} if choice.num_staying else {}
        offloaded = choice.levels.count("offload") * setting.tokens * self._input_bytes
        return Prediction(
            setting, peak, persistent, paged, kept, self.why_unfused, choice.tile, offloaded
        )

    def _choose(self, setting: Setting, persistent: int) -> policy.Choice:
        """Return what the layers keep on this card."""
        free = persistent * 100  # no card: nothing is short
        if setting.total_bytes is not None:
            free = max(setting.total_bytes - CONTEXT_BYTES - persistent, 0)
        body = self._fused_body(setting)
        return body.choose(setting.tokens, self._itemsize, free, setting.host_bytes)

    def _fused_body(self, setting: Setting) -> FusedBody:
        key = setting.memory, setting.compute
        if key not in self._fused:
            kind = Fp8Layer if setting.compute == "fp8" else FusedLayer
            self._fused[key] = FusedBody(self.body, memory=setting.memory, kind=kind)
        return self._fused[key]

    def _fused_peak(
        self, setting: Setting, choice: policy.Choice, persistent: Mapping[str, int]
    ) -> Peak:
        """Return the peak of a step as recorded graphs, where there are some; else without."""
        plain = self._write_fused(setting, choice, persistent, is_recorded=False)
        total = setting.total_bytes
        is_small = setting.tokens <= LARGE_TOKENS
        if not is_small:
            has_room = total is None or plain.nbytes <= LARGE_SHARE * total
            is_small = setting.memory != "lean" and setting.tokens <= MAX_TOKENS and has_room
        if not is_small:
            return plain
        recorded = self._write_fused(setting, choice, persistent, is_recorded=True)
        # Without room for a recording, a run does without.
        return recorded if total is None or recorded.nbytes <= usable_bytes(total) else plain

    def _write_fused(
        self,
        setting: Setting,
        choice: policy.Choice,
        persistent: Mapping[str, int],
        *,
        is_recorded: bool,
    ) -> Peak:
        ledger = Ledger(persistent)
        step = FusedStep(
            ledger,
            fused_shape(self._fused_body(setting), self._itemsize),
            setting.tokens,
            choice.levels,
            choice.num_staying,
            tile=choice.tile,
            is_recorded=is_recorded,
        )
        labels, chunk = self._labels(setting)
        chunk = policy.logit_rows(setting.memory, choice.tile) or chunk
        step.write(labels=labels, vocabulary=self._vocabulary, chunk_rows=chunk)
        return ledger.peak

    def _write_traced(self, ledger: Ledger, setting: Setting) -> None:
        key = (setting.rows, setting.length, setting.is_checkpointed)
        if key not in self._traced:
            labels, chunk = self._labels(setting)
            own = Ledger()
            with _checkpointing(self.causal, enabled=setting.is_checkpointed):
                trace_step(
                    own, self.causal, batch=setting.rows, length=setting.length,
                    labels=labels, chunk_rows=chunk,
                )  # fmt: skip
            self._traced[key] = own.peak
        peak = self._traced[key]
        ledger.moment = peak.moment
        for owner, nbytes in peak.owners.items():
            ledger.take(owner, nbytes)

    def _labels(self, setting: Setting) -> tuple[int, int]:
        chunk = max(_CHUNK_BYTES // (self._itemsize * self._vocabulary), _CHUNK_ROWS)
        return setting.rows * max(setting.length - 1, 1), chunk


@contextlib.contextmanager
def _checkpointing(causal: Any, *, enabled: bool) -> Iterator[None]:
    """Let the layers be computed twice inside the block, or once."""
    modules = [m for m in causal.modules() if hasattr(m, "gradient_checkpointing")]
    before = [m.gradient_checkpointing for m in modules]
    was_training = causal.training
    causal.train()
    if enabled:
        checkpoint_activations(causal)
    else:
        for module in modules:
            module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.gradient_checkpointing = value
        causal.train(was_training)
