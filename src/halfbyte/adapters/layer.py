"""peft's LoRA layer with a fast path: one fused product with a frozen, often 4-bit, weight.

`LoraLinear` is peft's `lora.Linear`, so saving, loading, merging into dense weights, several
adapters, rsLoRA, rank patterns and variants are peft's. Only the forward of the usual case, one
plain active adapter, goes through `kernels.lora_linear`; everything else takes peft's own path.
"""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from halfbyte.errors import AdapterError
from halfbyte.kernels.lora_linear import lora_linear
from halfbyte.quant.linear import NF4Linear


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward (offloading, tensor parallelism...)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks) or (
        hasattr(module, "_hf_hook")
    )


class LoraLinear(lora.Linear):
    """peft's LoRA layer on an `nn.Linear` or an `NF4Linear`.

    Forward: `[..., in]` to `[..., out]`, in the dtype that the base layer would return.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the active adapters' updates."""
        name = self._fast_adapter(x, *args, *kwargs.values())
        if name is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        lora_A: Any = self.lora_A[name]
        lora_B: Any = self.lora_B[name]
        dropout = self.lora_dropout[name]
        # As the base layer alone: autocast's dtype, or compute_dtype and back to that of x.
        is_autocast = torch.is_autocast_enabled(x.device.type)
        dtype = x.dtype if is_autocast else getattr(base, "compute_dtype", None) or x.dtype
        y = lora_linear(
            x.to(dtype),
            base.quantized if isinstance(base, NF4Linear) else base.weight,
            base.bias,
            lora_A.weight,
            lora_B.weight,
            self.scaling[name],
            dropout_p=getattr(dropout, "p", 0.0),
            training=dropout.training,
        )
        return y if is_autocast else y.to(x.dtype)

    def _fast_adapter(self, x: Tensor, *extras: Any) -> str | None:
        """Return the one adapter that `kernels.lora_linear` can apply here, or None."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        name, base = active[0], self.base_layer
        is_plain = (
            name not in self.lora_variant
            and not self.lora_bias[name]
            and not any(extra is not None for extra in extras)
            and type(base) in (nn.Linear, NF4Linear)
            and not base.weight.requires_grad
            and base.weight.device == x.device
        )
        parts = (base, self.lora_dropout[name], self.lora_A[name], self.lora_B[name])
        if not is_plain or any(_is_hooked(part) for part in parts):
            return None
        is_same_dtype = isinstance(base, NF4Linear) or x.dtype == base.weight.dtype
        return name if is_same_dtype or torch.is_autocast_enabled(x.device.type) else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: FBT001, FBT002
        """Merge adapters into a dense weight (peft's arguments).

        Raises:
            AdapterError: the base layer is in four bits.
        """
        if isinstance(self.get_base_layer(), NF4Linear):
            raise AdapterError(
                "an adapter cannot be merged into a 4-bit weight: rounding back to sixteen levels "
                "would erase most of the update",
                hint="save the adapter and run `halfbyte merge ADAPTER OUT`: it merges into a "
                "16-bit copy of the base",
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
