"""Inputs of layers in host memory between forward and backward, moved beside the computation.

    forward    layer 1        layer 2        layer 3
    copies     x1 ──► host    x2 ──► host
    backward                                 layer 3        layer 2        layer 1
    copies                                   x2 ◄── host    x1 ◄── host

An input leaves while its own layer runs and comes back while the layer above it runs backward, so
the device holds one in the forward and two in the backward, however many layers there are. The host
never waits: streams wait for events. The same code runs on a CPU, with plain copies.

Who may use which memory when:
- Device memory is made and let go on the computing stream; the copying stream touches it between
  two events. It waits for the computing stream before it copies, so what stood there before was
  read; and the computing stream waits for the copy before the memory is let go (forward) or read
  (backward). So the allocator, which knows the computing stream only, may give it on at once, and
  `record_stream` is not needed; inside a CUDA graph that would hold all memory until its end.
- If a step is given up in between, nobody waits for a copy under way. Its target is held here until
  `settle` lets the computing stream wait for it.
- Host memory is pinned, in pieces of one size that are made once, used again and never given back:
  a recorded graph knows their addresses. All copies are on one stream, so a piece may have its next
  use as soon as its last copy is queued.
- Inside of a capture each copy begins behind an event of the recorded stream and is waited for by
  it before the capture ends, which is the fork and join that a graph wants.
"""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

from halfbyte.memory.pools import pool_for

PIECE_BYTES = 16 * 2**20
"""Pinned memory is given out in powers of two: pieces of one size waste least for all lengths."""


class Offload:
    """Moves tensors of one device to the host and back.

    Args:
        device: Where they are computed.
        piece_bytes: Size of the pieces of host memory.
    """

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        self.piece_bytes = piece_bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = pool_for(device)
        self._unused: list[Tensor] = []
        self._arriving: list[Tensor] = []
        self.host_bytes = 0

    def settle(self) -> None:
        """Let what is queued from now on wait for copies of a step that was given up.

        Not to be called inside of a capture, which must not wait for what is outside of it.
        """
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._arriving.clear()

    def pieces(self, nbytes: int) -> list[Tensor]:
        """Return host memory for so many bytes, uint8, of a few tensors."""
        wanted = -(-nbytes // self.piece_bytes)
        while len(self._unused) < wanted:
            self._unused.append(self._pool.on_host(self.piece_bytes))
            self.host_bytes += self.piece_bytes
        return [self._unused.pop() for _ in range(wanted)]

    def take_back(self, pieces: Iterable[Tensor]) -> None:
        """Let host memory be used again."""
        self._unused.extend(pieces)

    def copy(
        self, x: Tensor, pieces: list[Tensor], *, is_leaving: bool
    ) -> "torch.cuda.Event | None":
        """Queue the copies between a contiguous tensor and its pieces; return when they end.

        Args:
            x: On the device.
            pieces: As many as its bytes need.
            is_leaving: From x to the pieces; else back.
        """
        parts = x.view(-1).view(torch.uint8).split(self.piece_bytes)
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            for part, piece in zip(parts, pieces, strict=True):
                piece = piece[: part.numel()]
                target, source = (piece, part) if is_leaving else (part, piece)
                target.copy_(source, non_blocking=True)
        return None if stream is None else stream.record_event()

    def wait(self, event: "torch.cuda.Event | None") -> None:
        """Let what is queued from now on wait for copies."""
        if event is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(event)

    def expect(self, x: Tensor) -> None:
        """Hold a tensor that a copy writes to, until `arrived`."""
        self._arriving.append(x)

    def arrived(self, x: Tensor) -> None:
        """Let go of a tensor, whose copy is waited for."""
        self._arriving = [other for other in self._arriving if other is not x]


class Passage:
    """One pass through all layers: how it saves memory beyond what each layer keeps.

    Args:
        offload: Moves inputs; None where none are moved.
        tile: Tokens that the second half of a block takes at a time; 0: all.
    """

    def __init__(self, offload: Offload | None = None, tile: int = 0) -> None:
        self.offload = offload
        self.tile = tile
        self._last: Away | None = None

    def send(self, x: Tensor) -> "Away":
        """Begin to move a layer's input to the host; layers come in their order."""
        if self.offload is None:
            self.offload = Offload(x.device)
        self._last = Away(self.offload, x, self._last)
        return self._last

    def begin_return(self, _: Tensor) -> None:
        """Fetch the first input that the backward needs: a hook for the gradient of the last."""
        if self._last is not None:
            self._last.fetch()
            self._last = None


class Away:
    """A layer's input, which is in host memory between the layer's forward and its backward.

    Args:
        offload: Moves it.
        x: The input, contiguous.
        before: That of the layer below, whose way back begins when this one is there.
    """

    def __init__(self, offload: Offload, x: Tensor, before: "Away | None" = None) -> None:
        self._offload, self._before = offload, before
        self._shape, self._requires_grad = x.shape, x.requires_grad
        self._dtype, self._device = x.dtype, x.device
        self._x: Tensor | None = x
        self._pieces: list[Tensor] = []
        self._pieces = offload.pieces(x.nbytes)
        self._event = offload.copy(x.detach(), self._pieces, is_leaving=True)
        self._has_left = False

    def leave(self) -> None:
        """Let go of the input on the device: the layer's forward is queued."""
        self._offload.wait(self._event)
        self._x, self._event, self._has_left = None, None, True

    def fetch(self) -> None:
        """Begin the way back."""
        if self._has_left and self._x is None and self._pieces:
            self._x = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._event = self._offload.copy(self._x, self._pieces, is_leaving=False)
            self._offload.expect(self._x)
            self._offload.take_back(self._pieces)
            self._pieces = []

    def tensor(self) -> Tensor:
        """Return the input: in the forward as it came, in the backward once, back from the host.

        Raises:
            RuntimeError: a second backward pass asks for it.
        """
        if not self._has_left:
            assert self._x is not None
            return self._x
        self.fetch()
        x, self._x = self._x, None
        if x is None:
            raise RuntimeError("an offloaded input serves one backward pass, and this is another")
        self._offload.wait(self._event)
        self._offload.arrived(x)
        if self._before is not None:
            self._before.fetch()
            self._before = None
        return x.requires_grad_(self._requires_grad)

    def __del__(self) -> None:
        # A pass that was given up, or that no backward followed.
        self._offload.take_back(self._pieces)
