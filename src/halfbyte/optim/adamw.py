"""AdamW over one flat state, in 32 or 8 bits.

The update is torch.optim.AdamW's (Loshchilov and Hutter, "Decoupled Weight Decay Regularization"):
decay before the step, bias correction, epsilon outside the root. With 8-bit state both moments are
stored in blocks of 256 under bitsandbytes' dynamic maps (Dettmers et al., "8-bit Optimizers via
Block-wise Quantization"). Gradient clipping is a factor inside the update, not a pass of its own.

Weight decay applies to matrices and not to biases and norms, as in transformers' Trainer.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.kernels.adamw import adamw8bit_step_, adamw_step_
from halfbyte.optim.flat import ALIGNMENT, FlatParameters, Slot


class _Moments:
    """Both moments of one device's parameters, flat, in 32 or 8 bits."""

    def __init__(self, flat: FlatParameters, state_bits: int) -> None:
        self.flat = flat
        size, device = flat.values.numel(), flat.values.device
        dtype = torch.float32 if state_bits == 32 else torch.uint8
        self.exp_avg = torch.zeros(size, dtype=dtype, device=device)
        self.exp_avg_sq = torch.zeros(size, dtype=dtype, device=device)
        blocks = 0 if state_bits == 32 else size // ALIGNMENT
        self.absmax1 = torch.zeros(blocks, dtype=torch.float32, device=device)
        self.absmax2 = torch.zeros(blocks, dtype=torch.float32, device=device)

    def update(self, start: int, stop: int, **hyper: Any) -> None:
        """Update elements `start` to `stop`, both multiples of the block."""
        if start == stop:
            return
        values, gradients = self.flat.values[start:stop], self.flat.gradients[start:stop]
        exp_avg, exp_avg_sq = self.exp_avg[start:stop], self.exp_avg_sq[start:stop]
        if self.exp_avg.dtype == torch.float32:
            adamw_step_(values, gradients, exp_avg, exp_avg_sq, **hyper)
        else:
            blocks = slice(start // ALIGNMENT, stop // ALIGNMENT)
            absmax1, absmax2 = self.absmax1[blocks], self.absmax2[blocks]
            adamw8bit_step_(values, gradients, exp_avg, exp_avg_sq, absmax1, absmax2, **hyper)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by parameter: views, named `<kind>.<parameter>`."""
        found = {}
        for slot in self.flat.slots:
            if self.exp_avg.dtype == torch.float32:
                found[f"exp_avg.{slot.name}"] = slot.of(self.exp_avg)
                found[f"exp_avg_sq.{slot.name}"] = slot.of(self.exp_avg_sq)
            else:  # whole blocks: the code of the gap behind a parameter is not 0
                found[f"exp_avg.{slot.name}"] = self.exp_avg[slot.start : slot.stop]
                found[f"exp_avg_sq.{slot.name}"] = self.exp_avg_sq[slot.start : slot.stop]
                found[f"exp_avg_absmax.{slot.name}"] = _blocks_of(slot, self.absmax1)
                found[f"exp_avg_sq_absmax.{slot.name}"] = _blocks_of(slot, self.absmax2)
            if slot.has_master:
                found[f"master.{slot.name}"] = slot.of(self.flat.values)
        return found


def _blocks_of(slot: Slot, absmax: Tensor) -> Tensor:
    return absmax[slot.start // ALIGNMENT : slot.stop // ALIGNMENT]


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
        paged: Whether the state may leave the device when memory is short. The flag is kept with
            the state; moving pages is the business of the memory part.

    Raises:
        ConfigError: nothing to train, or `state_bits` is neither 32 nor 8.
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
        paged: bool = False,
    ) -> None:
        if state_bits not in (32, 8):
            raise ConfigError(f"expected state_bits 32 or 8, got {state_bits}")
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
        self.state_bits, self.paged = state_bits, paged
        self.steps_done = 0
        self._moments = [
            _Moments(FlatParameters(named), state_bits) for named in by_device.values()
        ]
        self.zero_grad()

    @property
    def num_parameters(self) -> int:
        """Trainable elements."""
        return sum(slot.numel for moments in self._moments for slot in moments.flat.slots)

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        for moments in self._moments:
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
    def step(self, lr: float | None = None, *, grad_scale: float = 1.0) -> None:
        """Update every parameter from its gradient times `grad_scale` (the clipping factor)."""
        self.steps_done += 1
        hyper = {
            "step": self.steps_done,
            "lr": self.lr if lr is None else lr,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "eps": self.eps,
            "grad_scale": grad_scale,
        }
        for moments in self._moments:
            decayed, end = moments.flat.num_decayed, moments.flat.values.numel()
            moments.update(0, decayed, weight_decay=self.weight_decay, **hyper)
            moments.update(decayed, end, weight_decay=0.0, **hyper)
            moments.flat.publish_masters()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as plain tensors by parameter name: views, ready for safetensors.

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
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.steps_done = int(state["step"])
        for moments in self._moments:
            moments.flat.publish_masters()
