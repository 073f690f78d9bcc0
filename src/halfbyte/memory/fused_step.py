"""The bytes of one micro-step through fused layers, tensor by tensor, in the order of the engine.

It says again in sizes what `engine/block.py` does with tensors: what a half of a block makes, what
it saves and when each is let go. Whoever changes one changes the other; `benchmarks/memory_plan.py`
compares the peak with what a GPU measures.

Shape letters: T tokens, H hidden size, A = heads * head size, N outputs and K inputs of siblings,
I intermediate size, R LoRA ranks of siblings together, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.memory.ledger import Ledger

SAVED = "saved activations"
WORK = "working activations"
WEIGHTS = "dequantize workspace"
ADAPTER_GRADS = "gradients of one layer's adapters"
LOGITS = "logits"
# Launch shape of `kernels/gated_triton.py`: programs wanted, columns and tokens of a tile.
_PROGRAMS, _TILE_COLUMNS, _TILE_TOKENS = 2048, 64, 32
_LARGE_RANK = 64


@dataclass(frozen=True)
class Group:
    """Projections of one input: inputs K, outputs N, ranks R (as padded), adapters in elements."""

    inputs: int
    outputs: int
    rank: int
    adapter_elements: int

    def wide_elements(self) -> int:
        """Return the elements of the dequantized matrix with its border."""
        return (self.outputs + self.rank) * (self.inputs + self.rank)


@dataclass(frozen=True)
class FusedShape:
    """A fused layer in numbers.

    Attributes:
        hidden: H.
        heads: Query heads.
        head_dim: Elements of a head; cos and sin have as many columns.
        intermediate: I.
        qkv, o, gate_up, down: The projections.
        itemsize: Bytes of an activation.
    """

    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    itemsize: int = 2

    @property
    def groups(self) -> tuple[Group, ...]:
        """All projections."""
        return (self.qkv, self.o, self.gate_up, self.down)

    @property
    def width(self) -> int:
        """A."""
        return self.heads * self.head_dim

    def saved_bytes(self, level: str, tokens: int) -> int:
        """Return what a layer saves for its backward at a level of `engine.policy`."""
        columns = {"input": self.hidden}
        columns["attention"] = (
            self.hidden + self.qkv.outputs + self.qkv.rank + self.width + self.down.rank
        )
        columns["all"] = (
            columns["attention"] + self.hidden + self.o.rank
            + self.gate_up.outputs + 2 * self.gate_up.rank
        )  # fmt: skip
        log_sum_exp = 0 if level == "input" else 4 * self.heads
        return tokens * (columns[level] * self.itemsize + log_sum_exp)

    def weight_bytes(self) -> int:
        """Return the bytes of all of a layer's dequantized matrices."""
        return sum(group.wide_elements() for group in self.groups) * self.itemsize


class FusedStep:
    """Writes a micro-step into a ledger.

    Args:
        ledger: Holds what is there before.
        shape: Of every layer.
        tokens: T.
        levels: What each layer saves.
        num_staying: How many of the first layers keep their dequantized weights.
    """

    def __init__(
        self,
        ledger: Ledger,
        shape: FusedShape,
        tokens: int,
        levels: Sequence[str],
        num_staying: int = 0,
    ) -> None:
        self.ledger, self.shape, self.tokens = ledger, shape, tokens
        self.levels, self.num_staying = levels, num_staying
        self._staying = False

    def write(self, *, labels: int, vocabulary: int, chunk_rows: int) -> None:
        """Write forward, loss and backward of a micro-step with so many labelled tokens."""
        ledger, shape = self.ledger, self.shape
        ledger.take("inputs", 32 * self.tokens + 2 * self._rows(shape.head_dim))
        ledger.take(SAVED, self._rows(shape.hidden))  # the embedding
        for index, level in enumerate(self.levels):
            ledger.moment = f"forward of layer {index + 1}"
            self._staying = index < self.num_staying
            self._forward(keep=level)
            if self._staying:
                ledger.take("dequantized weights that stay", shape.weight_bytes())
        self._head(labels, vocabulary, min(chunk_rows, labels))
        for index in reversed(range(len(self.levels))):
            self._staying = index < self.num_staying
            ledger.moment = f"backward of layer {index + 1}"
            self._backward(self.levels[index], is_first=index == 0)
        ledger.give("inputs", 32 * self.tokens + 2 * self._rows(shape.head_dim))

    def _rows(self, columns: int, itemsize: int | None = None) -> int:
        return self.tokens * columns * (itemsize or self.shape.itemsize)

    def _wide(self, group: Group) -> int:
        return 0 if self._staying else group.wide_elements() * self.shape.itemsize

    def _saved_in_attention(self) -> list[int]:
        shape = self.shape
        return [
            self._rows(shape.qkv.rank), self._rows(shape.qkv.outputs),
            self._rows(shape.width), 4 * self.tokens * shape.heads,
        ]  # fmt: skip

    def _saved_in_mlp(self) -> list[int]:
        shape = self.shape
        return [
            self._rows(shape.hidden), self._rows(shape.o.rank),
            self._rows(shape.gate_up.rank), self._rows(shape.gate_up.outputs + shape.gate_up.rank),
        ]  # fmt: skip

    def _forward(self, keep: str) -> None:
        """From x, held already, to y, with what `keep` says of the layer held too."""
        ledger, shape = self.ledger, self.shape
        with (
            ledger.hold(WEIGHTS, self._wide(shape.qkv)),
            ledger.hold(WORK, self._rows(shape.hidden + shape.qkv.rank)),
        ):
            self._take(self._saved_in_attention()[:2])
        self._take(self._saved_in_attention()[2:])
        self._middle_and_mlp()
        with (
            ledger.hold(WORK, self._rows(shape.intermediate + shape.down.rank)),
            ledger.hold(WEIGHTS, self._wide(shape.down)),
        ):
            ledger.take(SAVED, self._rows(shape.down.rank))
            ledger.take(SAVED, self._rows(shape.hidden))  # y
        if keep != "all":
            self._give(self._saved_in_mlp())
        if keep == "input":
            self._give([*self._saved_in_attention(), self._rows(shape.down.rank)])

    def _middle_and_mlp(self) -> None:
        """O, the norm, gate and up: what a layer that saves only attention computes again."""
        ledger, shape = self.ledger, self.shape
        normed = self._rows(shape.hidden + shape.gate_up.rank)
        border = self._rows(shape.width + shape.o.rank) if shape.o.rank else 0
        mid, o_xa, gate_up_xa, gate_up = self._saved_in_mlp()
        with (
            ledger.hold(WEIGHTS, self._wide(shape.o)),
            ledger.hold(WORK, border, self._rows(shape.hidden)),
        ):
            self._take([o_xa, mid])
            ledger.take(WORK, normed)
        with ledger.hold(WEIGHTS, self._wide(shape.gate_up)):
            ledger.take(SAVED, gate_up_xa)
            ledger.take(SAVED, gate_up)
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
        ledger, shape = self.ledger, self.shape
        hidden = self._rows(shape.hidden)
        if level == "input":
            ledger.moment = ledger.moment.replace("backward", "recomputation")
            self._forward(keep="all")
            ledger.give(SAVED, hidden)  # y again, which nobody reads
            ledger.moment = ledger.moment.replace("recomputation", "backward")
        elif level == "attention":
            self._middle_and_mlp()
        self._backward_mlp(frees_early=level == "attention")
        self._backward_attention(is_first=is_first)

    def _backward_mlp(self, *, frees_early: bool) -> None:
        """Down, the gated product, gate and up, the norm, o: the second half of the block."""
        ledger, shape = self.ledger, self.shape
        hidden, gate_up = self._rows(shape.hidden), self._saved_in_mlp()[3]
        grads = 4 * sum(g.adapter_elements for g in (shape.o, shape.gate_up, shape.down))
        border = self._rows(shape.hidden + shape.down.rank) if shape.down.rank else 0
        with (
            ledger.hold(WORK, border),
            ledger.hold(WEIGHTS, self._wide(shape.down)),
            ledger.hold(WORK, self._rows(shape.intermediate)),
            ledger.hold(ADAPTER_GRADS, *self._gated_partials()),
        ):
            pass
        ledger.take(ADAPTER_GRADS, grads)
        with (
            ledger.hold(WEIGHTS, self._wide(shape.gate_up)),
            ledger.hold(WORK, hidden),
        ):
            ledger.take(WORK, hidden)  # the gradient of the norm's output
        if frees_early:
            ledger.give(SAVED, gate_up)
        grad_mid = self._rows(shape.hidden + shape.o.rank)
        ledger.take(WORK, grad_mid)
        ledger.give(WORK, hidden)
        with ledger.hold(WEIGHTS, self._wide(shape.o)):
            ledger.take(WORK, self._rows(shape.width))  # the gradient of attention
        ledger.give(ADAPTER_GRADS, grads)
        self._give(self._saved_in_mlp()[: 3 if frees_early else 4])
        self._give([self._rows(shape.down.rank)])
        ledger.give(WORK, hidden)  # the gradient of y
        ledger.give(WORK, grad_mid)
        ledger.take(WORK, hidden)  # that of x, beside attention

    def _backward_attention(self, *, is_first: bool) -> None:
        """Attention, RoPE, q, k and v, the norm: the first half of the block."""
        ledger, shape = self.ledger, self.shape
        hidden, width = self._rows(shape.hidden), self._rows(shape.width)
        heads = self._rows(shape.qkv.outputs)
        with ledger.hold("attention workspace", self._rows(shape.width, 4)):
            ledger.take(WORK, heads)
        ledger.give(WORK, width)
        self._give(self._saved_in_attention()[1:])
        grads = 4 * shape.qkv.adapter_elements
        with (
            ledger.hold(WORK, self._rows(shape.qkv.outputs + shape.qkv.rank)),
            ledger.hold(WEIGHTS, self._wide(shape.qkv)),
        ):
            if not is_first:
                ledger.take(WORK, hidden)
            with ledger.hold(WORK, hidden):  # x normed
                ledger.take(ADAPTER_GRADS, grads)
        if not is_first:
            ledger.take(WORK, self._rows(shape.qkv.rank))  # the border of the new gradient
            ledger.give(WORK, self._rows(shape.qkv.rank))
        ledger.give(ADAPTER_GRADS, grads)
        ledger.give(WORK, heads)
        ledger.give(WORK, hidden)  # the gradient of x, beside attention
        self._give([self._saved_in_attention()[0], hidden])  # x itself

    def _gated_partials(self) -> list[int]:
        """Return the float32 sums over tokens that `gated_backward_` makes."""
        shape = self.shape
        columns = 2 * shape.gate_up.rank + shape.down.rank
        is_large = max(shape.gate_up.rank, shape.down.rank) > _LARGE_RANK
        blocks = -(-shape.intermediate // (_TILE_COLUMNS // 2 if is_large else _TILE_COLUMNS))
        splits = max(
            1, min(-(-_PROGRAMS // blocks), -(-self.tokens // (4 * _TILE_TOKENS)))
        )  # fmt: skip
        whole = 4 * shape.intermediate * columns
        return [splits * whole, whole if splits > 1 else 0]

    def _take(self, sizes: Sequence[int]) -> None:
        for nbytes in sizes:
            self.ledger.take(SAVED, nbytes)

    def _give(self, sizes: Sequence[int]) -> None:
        for nbytes in sizes:
            self.ledger.give(SAVED, nbytes)
