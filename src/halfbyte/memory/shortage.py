"""What is known of a failure to get memory: that it was one, and how the memory stood."""

from dataclasses import dataclass, replace

import torch

# As PyTorch, its CPU allocator, cuBLAS, cuDNN and the driver say it.
_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_host_allocation_failed",
)
# Cached bytes without a use that make a failure one of fragmentation.
_FRAGMENTED_SHARE = 0.1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).lower()
        if isinstance(seen, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(seen, RuntimeError) and any(message in text for message in _MESSAGES):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@dataclass(frozen=True)
class Shortage:
    """How memory stood when it ran out.

    Attributes:
        device: Where.
        reason: What the allocator said.
        allocated_bytes: In tensors at that moment (CUDA; else 0).
        cached_bytes: Held by the allocator without a use.
        free_bytes: Free on the device beside that.
        total_bytes: Of the device.
        activation_bytes: Of the allocated, what the failed attempt had made.
    """

    device: torch.device
    reason: str
    allocated_bytes: int = 0
    cached_bytes: int = 0
    free_bytes: int = 0
    total_bytes: int = 0
    activation_bytes: int = 0

    @classmethod
    def measure(cls, device: torch.device, error: BaseException) -> "Shortage":
        """Look at the device while the failed attempt's tensors are still there."""
        reason = str(error).partition("\n")[0]
        if device.type != "cuda":
            return cls(device, reason)
        allocated = torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        return cls(
            device,
            reason,
            allocated_bytes=allocated,
            cached_bytes=torch.cuda.memory_reserved(device) - allocated,
            free_bytes=free,
            total_bytes=total,
        )

    def after_cleanup(self) -> "Shortage":
        """Return it with what the attempt had made, now that its tensors are gone."""
        if self.device.type != "cuda":
            return self
        made = self.allocated_bytes - torch.cuda.memory_allocated(self.device)
        return replace(self, activation_bytes=max(made, 0))

    @property
    def is_fragmented(self) -> bool:
        """Whether much memory was cached, and yet in too small pieces."""
        return self.cached_bytes > _FRAGMENTED_SHARE * (self.allocated_bytes + self.cached_bytes)
