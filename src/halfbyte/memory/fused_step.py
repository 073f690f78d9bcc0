"""The bytes of one micro-step through fused layers, tensor by tensor, in the order of the engine.

It says again in sizes what `engine/block.py` does with tensors: what a half of a block makes, what
it saves and when each is let go; and what `engine/offload.py`, `tiled.py` and `graph.py` do around
it. Whoever changes one changes the other; `benchmarks/memory_plan.py` compares the peak with what a
GPU measures.

Shape letters: T tokens, H hidden size, A = heads * head size, N outputs and K inputs of siblings,
I intermediate size, R LoRA ranks of siblings together, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence

from halfbyte.kernels.gated import backward_splits
from halfbyte.memory.fused_shape import FusedShape, Group
from halfbyte.memory.ledger import Ledger

SAVED = "saved activations"
WORK = "working activations"
EIGHT_BITS = "activations in eight bits"
WEIGHTS = "dequantize workspace"
ADAPTER_GRADS = "gradients of one layer's adapters"
LOGITS = "logits"
GRAPHS = "recorded graphs"


class FusedStep:
    """Writes a micro-step into a ledger.

    Args:
        ledger: Holds what is there before.
        shape: Of every layer.
        tokens: T.
        levels: What each layer saves.
        num_staying: How many of the first layers keep their dequantized weights.
        tile: Tokens that the second half of a block takes at a time; 0: all.
        is_recorded: Whether the layers run as recorded graphs.
    """

    def __init__(
        self,
        ledger: Ledger,
        shape: FusedShape,
        tokens: int,
        levels: Sequence[str],
        num_staying: int = 0,
        *,
        tile: int = 0,
        is_recorded: bool = False,
    ) -> None:
        self.ledger, self.shape, self.tokens = ledger, shape, tokens
        self.levels, self.num_staying = levels, num_staying
        self.tile, self.is_recorded = tile if tile < tokens else 0, is_recorded
        self._staying = False
        # Layers whose input is on the host, in the order in which it comes back.
        self._away = [index for index, level in enumerate(levels) if level == "offload"]

    def write(self, *, labels: int, vocabulary: int, chunk_rows: int) -> None:
        """Write forward, loss and backward of a micro-step with so many labelled tokens."""
        ledger, shape = self.ledger, self.shape
        angles = 2 * shape.num_rotations * self._rows(shape.head_dim)
        ledger.take("inputs", 32 * self.tokens + angles)
        ledger.take(SAVED, self._rows(shape.hidden))  # the embedding
        with ledger.hold(GRAPHS, *self._recorded()):
            self._layers_and_loss(labels, vocabulary, min(chunk_rows, labels))
        ledger.give("inputs", 32 * self.tokens + angles)

    def _layers_and_loss(self, labels: int, vocabulary: int, chunk_rows: int) -> None:
        ledger, shape = self.ledger, self.shape
        for index, level in enumerate(self.levels):
            ledger.moment = f"forward of layer {index + 1}"
            self._staying = index < self.num_staying
            self._forward(keep=level)
            if level == "offload":
                ledger.give(SAVED, self._rows(shape.hidden))  # x, which is on the host by now
            if self._staying:
                ledger.take("dequantized weights that stay", shape.weight_bytes())
        self._head(labels, vocabulary, chunk_rows)
        self._fetch()
        for index in reversed(range(len(self.levels))):
            self._staying = index < self.num_staying
            ledger.moment = f"backward of layer {index + 1}"
            if self.levels[index] == "offload":
                self._fetch()
            self._backward(self.levels[index], is_first=index == 0)

    def _fetch(self) -> None:
        """The next input comes back from the host, while a layer runs backward."""
        if self._away:
            self._away.pop()
            self.ledger.take(SAVED, self._rows(self.shape.hidden))

    def _recorded(self) -> list[int]:
        """Return what a recorded graph holds beside a step that is not: output and gradient.

        And the embedding, which is copied into the graph's own; and cos and sin likewise.
        """
        if not self.is_recorded:
            return []
        shape = self.shape
        angles = [self._rows(shape.head_dim)] * 2 * shape.num_rotations
        # What the graph was given stays, though its first layer may have sent it away.
        copies = 4 if self.levels[0] == "offload" else 3
        return [*[self._rows(shape.hidden)] * copies, *angles]

    def _rows(self, columns: int, itemsize: int | None = None) -> int:
        return self.tokens * columns * (itemsize or self.shape.itemsize)

    def _bordered(self, width: int, columns: int) -> int:
        return self._rows(self.shape.pitch(width, columns))

    def _wide(self, group: Group) -> int:
        """The dequantized matrix, or in fp8 LoRA's factors, where they do not stay."""
        return 0 if self._staying else group.wide_bytes(self.shape.itemsize)

    def _shared(self, group: Group, *, is_backward: bool) -> int:
        """What all tiles read; in fp8 a backward, which begins with a forward, reads both."""
        if self._staying:
            return 0
        if is_backward:
            return group.staying_bytes(self.shape.itemsize)
        return self._wide(group) + group.matrix_bytes(is_backward=False)

    def _multiply(self, group: Group, *, is_backward: bool = False) -> None:
        """The worst moment of a product in eight bits; one in 16 takes nothing of its own."""
        matrix = 0 if self._staying else group.matrix_bytes(is_backward=is_backward)
        quantized = group.quantized_bytes(self.tokens, is_backward=is_backward)
        with self.ledger.hold(WEIGHTS, matrix), self.ledger.hold(EIGHT_BITS, quantized):
            pass

    def _saved_in_attention(self) -> list[int]:
        """`x A^T` and the norm's factors, then q, k, v; with normed heads twice; then attention."""
        shape = self.shape
        return [
            self._rows(shape.qkv.rank) + 4 * self.tokens, self._rows(shape.qkv.outputs),
            self._rows(shape.normed_heads * shape.head_dim),
            self._rows(shape.width), 4 * self.tokens * shape.heads,
        ]  # fmt: skip

    def _saved_in_mlp(self) -> list[int]:
        shape = self.shape
        return [
            self._rows(shape.hidden), self._rows(shape.o.rank), self._rows(shape.branch),
            self._rows(shape.gate_up.rank) + 4 * self.tokens,
            self._bordered(shape.gate_up.outputs, shape.gate_up.rank),
        ]  # fmt: skip

    def _saved_of_down(self) -> list[int]:
        return [self._rows(self.shape.down.rank), self._rows(self.shape.branch)]

    def _forward(self, keep: str, *, is_again: bool = False) -> None:
        """From x, held already, to y, with what `keep` says of the layer held too.

        Args:
            keep: A level; recomputation keeps "all".
            is_again: Whether it is recomputation, which leaves a tiled half to the backward.
        """
        ledger, shape = self.ledger, self.shape
        with (
            ledger.hold(WEIGHTS, self._wide(shape.qkv)),
            ledger.hold(WORK, self._bordered(shape.hidden, shape.qkv.rank)),
        ):
            self._take(self._saved_in_attention()[:2])
            self._multiply(shape.qkv)
        self._take(self._saved_in_attention()[2:])
        is_tiled = self.tile > 0 and (keep != "all" or is_again)
        if not is_tiled:
            self._second_half(is_again=is_again)
        else:
            ledger.take(SAVED, self._rows(shape.hidden))  # y
            if not is_again:
                with self._in_tile():
                    self._second_half()
                    self._give([*self._saved_in_mlp(), *self._saved_of_down()])
                    ledger.give(SAVED, self._rows(shape.hidden))
        if keep != "all" and not is_tiled:
            self._give(self._saved_in_mlp())
        if keep in ("input", "offload"):
            self._give([*self._saved_in_attention(), *([] if is_tiled else self._saved_of_down())])

    @contextlib.contextmanager
    def _in_tile(self, *, is_backward: bool = False) -> Iterator[None]:
        """Count the tokens of one tile inside the block, and weights that all tiles share."""
        shape, before = self.shape, (self.tokens, self._staying)
        groups = (shape.o, shape.gate_up, shape.down)
        shared = [self._shared(group, is_backward=is_backward) for group in groups]
        with self.ledger.hold(WEIGHTS, *shared):
            self.tokens, self._staying = self.tile, True
            yield
            self.tokens, self._staying = before

    def _second_half(self, *, is_again: bool = False) -> None:
        """From attention to y, with all that is saved for the backward.

        Args:
            is_again: Whether nobody reads y.
        """
        ledger, shape = self.ledger, self.shape
        self._middle_and_mlp()
        with (
            ledger.hold(WORK, self._bordered(shape.intermediate, shape.down.rank)),
            ledger.hold(WEIGHTS, self._wide(shape.down)),
        ):
            self._take(self._saved_of_down())
            with ledger.hold(WORK, self._rows(shape.branch)):
                ledger.take(SAVED, self._rows(shape.hidden))  # y
            if not is_again or shape.has_branch_norms:
                self._multiply(shape.down)

    def _middle_and_mlp(self) -> None:
        """O, the norm, gate and up: what a layer that saves only attention computes again."""
        ledger, shape = self.ledger, self.shape
        normed = self._bordered(shape.hidden, shape.gate_up.rank)
        # In fp8 attention is not copied to have room for o's border beside it.
        if shape.o.is_fp8:
            border = self._rows(shape.o.rank)
        else:
            border = self._bordered(shape.width, shape.o.rank) if shape.o.rank else 0
        mid, o_xa, o_out, gate_up_xa, gate_up = self._saved_in_mlp()
        with (
            ledger.hold(WEIGHTS, self._wide(shape.o)),
            ledger.hold(WORK, border, self._rows(shape.hidden)),
        ):
            ledger.take(SAVED, o_xa)
            self._multiply(shape.o)
            self._take([mid, o_out])
            ledger.take(WORK, normed)
        with ledger.hold(WEIGHTS, self._wide(shape.gate_up)):
            self._take([gate_up_xa, gate_up])
            self._multiply(shape.gate_up)
        ledger.give(WORK, normed)

    def _head(self, labels: int, vocabulary: int, chunk_rows: int) -> None:
        """Final norm, loss in chunks of logits, and their backward; leaves the gradient of y."""
        ledger, shape = self.ledger, self.shape
        hidden = self._rows(shape.hidden)
        ledger.moment = "the final norm"
        ledger.take(WORK, hidden)  # y stays too, for the norm's backward
        ledger.moment = "the loss"
        labelled = labels * shape.hidden * shape.itemsize
        with (
            ledger.hold(WORK, labelled),
            ledger.hold(LOGITS, chunk_rows * vocabulary * shape.itemsize),
        ):
            ledger.take(WORK, labelled)  # the gradient, kept
        ledger.give(WORK, hidden)
        ledger.moment = "backward of the final norm"
        ledger.take(WORK, hidden)  # of all tokens, from that of the labelled
        ledger.give(WORK, labelled)
        ledger.take(WORK, hidden)  # the gradient of y
        ledger.give(WORK, hidden)
        ledger.give(SAVED, hidden)  # y itself

    def _backward(self, level: str, *, is_first: bool) -> None:
        """From the gradient of y to that of x; both have H columns, with a border R wide."""
        ledger, hidden = self.ledger, self._rows(self.shape.hidden)
        if level in ("input", "offload"):
            ledger.moment = ledger.moment.replace("backward", "recomputation")
            self._forward(keep="all", is_again=True)
            ledger.give(SAVED, hidden)  # y again, which nobody reads
            ledger.moment = ledger.moment.replace("recomputation", "backward")
        if self.tile and level != "all":
            self._backward_tiled()
        else:
            if level == "attention":
                self._middle_and_mlp()
            self._backward_mlp(frees_early=level == "attention")
        ledger.give(WORK, hidden)  # the gradient of y
        self._backward_attention(is_first=is_first)

    def _backward_tiled(self) -> None:
        """The second half, a tile at a time: leaves the gradients of attention and of x."""
        ledger, shape = self.ledger, self.shape
        grads = 4 * sum(g.adapter_elements for g in (shape.o, shape.gate_up, shape.down))
        ledger.take(WORK, self._rows(shape.width))
        ledger.take(WORK, self._rows(shape.hidden))
        with self._in_tile(is_backward=True), ledger.hold(ADAPTER_GRADS, grads):  # sums over tiles
            self._second_half(is_again=True)
            self._backward_mlp(frees_early=False)
            ledger.give(SAVED, self._rows(shape.hidden))  # y again
            ledger.give(WORK, self._rows(shape.width))
            ledger.give(WORK, self._rows(shape.hidden))

    def _backward_mlp(self, *, frees_early: bool) -> None:
        """Down, the gated product, gate and up, the norm, o: the second half of the block."""
        ledger, shape = self.ledger, self.shape
        hidden, gate_up = self._rows(shape.hidden), self._saved_in_mlp()[-1]
        grads = 4 * sum(g.adapter_elements for g in (shape.o, shape.gate_up, shape.down))
        border = self._bordered(shape.hidden, shape.down.rank) if shape.down.rank else 0
        with (
            ledger.hold(WORK, border or self._rows(shape.branch)),
            ledger.hold(WEIGHTS, self._wide(shape.down)),
            ledger.hold(WORK, self._rows(shape.intermediate)),
        ):
            self._multiply(shape.down, is_backward=True)
            with ledger.hold(ADAPTER_GRADS, *self._gated_partials()):
                pass
        ledger.take(ADAPTER_GRADS, grads)
        with ledger.hold(WEIGHTS, self._wide(shape.gate_up)):
            ledger.take(WORK, hidden)  # the gradient of the norm's output
            self._multiply(shape.gate_up, is_backward=True)
        if frees_early:
            ledger.give(SAVED, gate_up)
        grad_mid = self._bordered(shape.hidden, shape.o.rank)
        ledger.take(WORK, grad_mid)
        ledger.give(WORK, hidden)
        with (
            ledger.hold(WEIGHTS, self._wide(shape.o)),
            ledger.hold(WORK, grad_mid if shape.has_branch_norms else 0),
        ):
            ledger.take(WORK, self._rows(shape.width))  # the gradient of attention
            self._multiply(shape.o, is_backward=True)
        ledger.give(ADAPTER_GRADS, grads)
        self._give(self._saved_in_mlp()[: -1 if frees_early else None])
        self._give(self._saved_of_down())
        ledger.give(WORK, grad_mid)
        ledger.take(WORK, hidden)  # the gradient of x, beside attention

    def _backward_attention(self, *, is_first: bool) -> None:
        """Attention, RoPE, q, k and v, the norm: the first half of the block."""
        ledger, shape = self.ledger, self.shape
        hidden, width = self._rows(shape.hidden), self._rows(shape.width)
        heads = self._rows(shape.qkv.outputs)
        xa, *saved = self._saved_in_attention()
        before = [saved.pop(0)] if shape.normed_heads else []  # needed once more
        with ledger.hold("attention workspace", shape.attention_bytes(self.tokens)):
            ledger.take(WORK, heads)
        ledger.give(WORK, width)
        self._give(saved)
        grads = 4 * shape.qkv.adapter_elements
        with (
            ledger.hold(WORK, self._bordered(shape.qkv.outputs, shape.qkv.rank)),
            ledger.hold(WEIGHTS, self._wide(shape.qkv)),
        ):
            if not is_first:
                ledger.take(WORK, hidden)
                self._multiply(shape.qkv, is_backward=True)
            ledger.take(ADAPTER_GRADS, grads)
        if not is_first:
            border = self._bordered(shape.hidden, shape.down.rank) - hidden
            ledger.take(WORK, border)  # of the new gradient
            ledger.give(WORK, border)
        ledger.give(ADAPTER_GRADS, grads)
        ledger.give(WORK, heads)
        ledger.give(WORK, hidden)  # the gradient of x, beside attention
        self._give([xa, *before, hidden])  # x itself

    def _gated_partials(self) -> list[int]:
        """Return the float32 sums over tokens that `gated_backward_` makes, gate and up apart."""
        shape = self.shape
        columns = shape.gate_up.rank + shape.down.rank
        ranks = max(shape.gate_up.rank // 2, shape.down.rank)
        splits = backward_splits(self.tokens, shape.intermediate, ranks)
        whole = 4 * shape.intermediate * columns
        return [splits * whole, whole if splits > 1 else 0]

    def _take(self, sizes: Sequence[int]) -> None:
        for nbytes in sizes:
            self.ledger.take(SAVED, nbytes)

    def _give(self, sizes: Sequence[int]) -> None:
        for nbytes in sizes:
            self.ledger.give(SAVED, nbytes)
