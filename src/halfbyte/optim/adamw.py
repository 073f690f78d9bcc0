"""AdamW over one flat state, in 32 or 8 bits.

The update is torch.optim.AdamW's (Loshchilov and Hutter, "Decoupled Weight Decay Regularization"):
decay before the step, bias correction, epsilon outside the root. With 8-bit state both moments are
stored in blocks of 256 under bitsandbytes' dynamic maps (Dettmers et al., "8-bit Optimizers via
Block-wise Quantization"). Gradient clipping is a factor inside the update, not a pass of its own.

Weight decay applies to matrices and not to biases and norms, as in transformers' Trainer.
"""

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.kernels.adamw import adamw8bit_step_, adamw_step_
from halfbyte.memory.pager import Pager
from halfbyte.memory.pages import Field, Paging, Placement
from halfbyte.memory.pools import pool_for
from halfbyte.optim.flat import ALIGNMENT, FlatParameters

_FIELDS = {
    32: (Field("exp_avg", torch.float32), Field("exp_avg_sq", torch.float32)),
    8: (
        Field("exp_avg", torch.uint8),
        Field("exp_avg_sq", torch.uint8),
        Field("exp_avg_absmax", torch.float32, ALIGNMENT),
        Field("exp_avg_sq_absmax", torch.float32, ALIGNMENT),
    ),
}


class _Moments:
    """Both moments of one device's parameters, flat, in 32 or 8 bits, in one page or many."""

    def __init__(
        self, flat: FlatParameters, state_bits: int, placement: Placement, paging: Paging
    ) -> None:
        self.flat = flat
        self.state_bits = state_bits
        size, pool = flat.values.numel(), paging.pool or pool_for(flat.values.device)
        self.pager = Pager(size, _FIELDS[state_bits], pool, placement, paging)

    def update(self, weight_decay: float, **hyper: Any) -> None:
        """Update every parameter; after a failure, those that were not updated yet."""

        def update_page(start: int, stop: int, state: dict[str, Tensor]) -> None:
            middle = min(max(self.flat.num_decayed, start), stop)
            for first, last, decay in ((start, middle, weight_decay), (middle, stop, 0.0)):
                if first < last:
                    part = {
                        field.name: state[field.name][
                            (first - start) // field.span : (last - start) // field.span
                        ]
                        for field in self.pager.fields
                    }
                    self._update(first, last, part, weight_decay=decay, **hyper)

        self.pager.visit(update_page)

    def _update(self, start: int, stop: int, state: dict[str, Tensor], **hyper: Any) -> None:
        values, gradients = self.flat.values[start:stop], self.flat.gradients[start:stop]
        step = adamw_step_ if self.state_bits == 32 else adamw8bit_step_
        step(values, gradients, *state.values(), **hyper)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by parameter, named `<kind>.<parameter>`."""
        found = {}
        for slot in self.flat.slots:
            for field in self.pager.fields:
                state = self.pager.read(field.name, slot.start, slot.stop)
                if self.state_bits == 32:  # in 8 bits whole blocks: the gap's code is not 0
                    state = state[: slot.numel].view(slot.parameter.shape)
                found[f"{field.name}.{slot.name}"] = state
            if slot.has_master:
                found[f"master.{slot.name}"] = slot.of(self.flat.values)
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned; pages stay where they are."""
        for slot in self.flat.slots:
            for field in self.pager.fields:
                self.pager.write(
                    field.name, slot.start, state[f"{field.name}.{slot.name}"].flatten()
                )
            if slot.has_master:
                slot.of(self.flat.values).copy_(state[f"master.{slot.name}"])


class AdamW:
    """AdamW over all trainable parameters at once.

    Args:
        params: Named parameters, or parameters (they are then named by their position). Those of
            dtype float32 become views of one flat vector: do not move or cast the model afterwards.
        lr: Learning rate used when `step` is not given one.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of matrices.
        state_bits: 32, or 8 for block-wise quantized moments.
        placement: Where the state is: "device" always; "auto": in pinned host memory while the
            device has no room for it; "host": on the device only while it is updated.
        paging: How state that may leave is cut into pages.

    Raises:
        ConfigError: nothing to train, `state_bits` is neither 32 nor 8, or there is no such place.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_bits: int = 32,
        placement: Placement = "device",
        paging: Paging | None = None,
    ) -> None:
        if state_bits not in (32, 8):
            raise ConfigError(f"expected state_bits 32 or 8, got {state_bits}")
        _require_place(placement)
        by_device: dict[torch.device, list[tuple[str, nn.Parameter]]] = {}
        for position, item in enumerate(params):
            name, parameter = item if isinstance(item, tuple) else (str(position), item)
            if parameter.requires_grad:
                by_device.setdefault(parameter.device, []).append((name, parameter))
        if not by_device:
            raise ConfigError(
                "expected at least one parameter that requires a gradient, got none",
                hint="add adapters first: model = halfbyte.add_lora(model, LoraConfig(...))",
            )
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.state_bits, self.placement = state_bits, placement
        self.steps_done = 0
        self._moments = [
            _Moments(FlatParameters(named), state_bits, placement, paging or Paging())
            for named in by_device.values()
        ]
        # Where a step that failed in between goes on.
        self._is_updating, self._moments_done = False, 0
        self.zero_grad()

    @property
    def num_parameters(self) -> int:
        """Trainable elements."""
        return sum(slot.numel for moments in self._moments for slot in moments.flat.slots)

    def zero_grad(self) -> None:
        """Set every gradient to zero; what `prefetch` began is forgotten."""
        for moments in self._moments:
            moments.pager.land()
            moments.flat.zero_gradients()

    def release(self) -> None:
        """Give the parameters back as they are; this optimizer is done with them."""
        for moments in self._moments:
            moments.flat.release()

    def grad_norm(self) -> Tensor:
        """Return the 2-norm of all gradients together: float32 scalar, on the first device."""
        norms = [torch.linalg.vector_norm(moments.flat.gradients) for moments in self._moments]
        if len(norms) == 1:
            return norms[0]
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    @torch.no_grad()
    def step(self, lr: float | None = None, *, grad_scale: float | Tensor = 1.0) -> None:
        """Update every parameter from its gradient times `grad_scale` (the clipping factor).

        If this fails in between (out of memory), the same call goes on where it stopped. Where
        `grad_scale` is NaN nothing changes but the count of steps, which `take_back` mends: so an
        update can be queued before the host knows whether it should be.

        Args:
            lr: Learning rate; None: that of the constructor.
            grad_scale: A number, or a float32 scalar that stays on its device.
        """
        self.steps_done += not self._is_updating
        self._is_updating = True
        hyper = {
            "step": self.steps_done,
            "lr": self.lr if lr is None else lr,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "eps": self.eps,
        }
        for moments in self._moments[self._moments_done :]:
            scale = grad_scale
            if isinstance(scale, Tensor):
                # Without non_blocking: where parameters are on the CPU, too, it is read at once.
                scale = scale.to(moments.flat.values.device)
            moments.update(self.weight_decay, grad_scale=scale, **hyper)
            moments.flat.publish_masters()
            self._moments_done += 1
        self._moments_done, self._is_updating = 0, False
        for moments in self._moments:
            moments.pager.settle()

    def take_back(self) -> None:
        """Forget that the last `step` was done: its `grad_scale` was NaN."""
        self.steps_done -= 1

    def prefetch(self) -> None:
        """Let state that is on the host begin to come to the device, for the `step` to come.

        To be called once the last backward is queued: memory is free then, and the copies run
        while the norm is computed.
        """
        for moments in self._moments:
            moments.pager.prefetch()

    def place(self, placement: Placement) -> None:
        """Change where the state is, see the class; it moves at once where it must.

        Raises:
            ConfigError: there is no such place.
            torch.OutOfMemoryError: "device", and there is no room; it is as with "auto" then.
        """
        _require_place(placement)
        for moments in self._moments:
            moments.pager.place(placement)
        self.placement = placement

    @property
    def resident_bytes(self) -> int:
        """Bytes of state on the devices."""
        return sum(moments.pager.resident_bytes for moments in self._moments)

    @property
    def host_bytes(self) -> int:
        """Bytes of state that is paged out to host memory."""
        return sum(moments.pager.host_bytes for moments in self._moments)

    @property
    def has_come_back(self) -> bool:
        """Whether state is on a device again that had left it."""
        return any(moments.pager.has_come_back for moments in self._moments)

    def evict(self, nbytes: int | None = None) -> int:
        """Page state out until `nbytes` of each device are free (None: all of it).

        Returns:
            Bytes that became free; 0 where the state may not leave or has left already.
        """
        return sum(
            moments.pager.evict(moments.pager.resident_bytes if nbytes is None else nbytes)
            for moments in self._moments
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as plain tensors by parameter name, ready for safetensors.

        Views, except of what lies across pages: that is copied to the host.

        `step`; `exp_avg.<name>` and `exp_avg_sq.<name>` (float32, or uint8 in whole blocks with
        `..._absmax.<name>`, one float32 a block); `master.<name>` for parameters that are not
        float32.
        """
        state = {"step": torch.tensor(self.steps_done, dtype=torch.int64)}
        for moments in self._moments:
            state |= moments.tensors()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved state; where pages live now stays as it is.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise CheckpointError(
                f"optimizer state does not fit: missing {sorted(own.keys() - state.keys())[:5]}, "
                f"unexpected {sorted(state.keys() - own.keys())[:5]}",
                hint="resume with the adapters and the `optim` that the run was started with",
            )
        for name, tensor in own.items():
            given = state[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise CheckpointError(
                    f"optimizer state {name!r}: expected {tensor.dtype} {tuple(tensor.shape)}, "
                    f"got {given.dtype} {tuple(given.shape)}",
                    hint="resume with the adapters and the `optim` that the run was started with",
                )
        self.steps_done = int(state["step"])
        for moments in self._moments:
            moments.load(state)
            moments.flat.publish_masters()


def _require_place(placement: str) -> None:
    places = get_args(Placement)
    if placement not in places:
        raise ConfigError(f"expected a placement of {', '.join(places)}, got {placement!r}")
