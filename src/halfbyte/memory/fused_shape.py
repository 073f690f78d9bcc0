"""A fused layer in numbers: what its tensors have of columns, and what it saves.

Shape letters as in `fused_step`.
"""

from dataclasses import dataclass

from halfbyte.kernels.border import pitch
from halfbyte.kernels.fp8 import border_columns, factor_bytes


@dataclass(frozen=True)
class Group:
    """Projections of one input: inputs K, outputs N, ranks R (as padded), adapters in elements.

    With `is_fp8` they multiply in eight bits: rows of what is multiplied have P more columns and a
    float32 scale, and the backward reads another matrix than the forward (`kernels/fp8.py`).
    """

    inputs: int
    outputs: int
    rank: int
    adapter_elements: int
    is_fp8: bool = False

    def wide_bytes(self, itemsize: int) -> int:
        """Return the bytes of the dequantized matrix with its border; of LoRA's factors in fp8."""
        if self.is_fp8:
            return factor_bytes(self.inputs, self.outputs, self.rank, itemsize)
        return (self.outputs + self.rank) * pitch(self.inputs, self.rank, itemsize) * itemsize

    def matrix_bytes(self, *, is_backward: bool) -> int:
        """Return the bytes of a matrix in eight bits, `[N, K + P]` or `[K, N + P]`."""
        read, given = self._sizes(is_backward=is_backward)
        return given * self._row_bytes(read)

    def quantized_bytes(self, tokens: int, *, is_backward: bool) -> int:
        """Return the bytes of what is multiplied with it, with scales."""
        read, _ = self._sizes(is_backward=is_backward)
        return tokens * (self._row_bytes(read) + 4 * self.is_fp8)

    def staying_bytes(self, itemsize: int) -> int:
        """Return the bytes of what stays where weights do."""
        nbytes = self.wide_bytes(itemsize)
        if self.is_fp8:
            nbytes += self.matrix_bytes(is_backward=False) + self.matrix_bytes(is_backward=True)
        return nbytes

    def scale_bytes(self) -> int:
        """Return the bytes of the scales of both matrices, which always stay."""
        return 4 * (self.inputs + self.outputs) if self.is_fp8 else 0

    def _sizes(self, *, is_backward: bool) -> tuple[int, int]:
        """Return the columns that a product reads and that it gives."""
        sizes = self.inputs, self.outputs
        return sizes[::-1] if is_backward else sizes

    def _row_bytes(self, columns: int) -> int:
        return columns + border_columns(self.rank) if self.is_fp8 else 0


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
        normed_heads: Query and key heads, where these are normed; else 0.
        has_branch_norms: Whether what o and down give is normed.
        num_rotations: Tables of cos and sin.
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
    normed_heads: int = 0
    has_branch_norms: bool = False
    num_rotations: int = 1

    @property
    def groups(self) -> tuple[Group, ...]:
        """All projections."""
        return (self.qkv, self.o, self.gate_up, self.down)

    @property
    def width(self) -> int:
        """A."""
        return self.heads * self.head_dim

    @property
    def branch(self) -> int:
        """Columns that are saved because what a branch gave is normed."""
        return self.hidden if self.has_branch_norms else 0

    def pitch(self, width: int, columns: int) -> int:
        """Return the elements of a row of activations with a border."""
        return pitch(width, columns, self.itemsize)

    def attention_bytes(self, tokens: int) -> int:
        """Return what the gradient of attention makes for itself: that of q in float32, a sum a
        head, and the gradients of k and v for each query head where heads share them.
        """
        shared = self.qkv.outputs < 3 * self.width
        return tokens * (4 * self.width + 4 * self.heads + 2 * shared * self.width * self.itemsize)

    def saved_bytes(self, level: str, tokens: int) -> int:
        """Return what a layer saves on the device at a level of `engine.policy`, untiled."""
        if level == "offload":
            return 0
        columns = {"input": self.hidden}
        columns["attention"] = (
            self.hidden
            + self.qkv.outputs
            + self.qkv.rank
            + self.normed_heads * self.head_dim
            + self.width
            + self.down.rank
            + self.branch
        )
        columns["all"] = (
            columns["attention"] + self.hidden + self.o.rank + self.branch
            + self.gate_up.rank + self.pitch(self.gate_up.outputs, self.gate_up.rank)
        )  # fmt: skip
        # In float32: log-sum-exp of attention, and each norm's factor of a row.
        numbers = {"input": 0, "attention": self.heads + 1, "all": self.heads + 2}
        return tokens * (columns[level] * self.itemsize + 4 * numbers[level])

    def weight_bytes(self) -> int:
        """Return the bytes of all of a layer's dequantized matrices that stay."""
        return sum(group.staying_bytes(self.itemsize) for group in self.groups)

    def scale_bytes(self) -> int:
        """Return the bytes of a layer's scales of rows in eight bits."""
        return sum(group.scale_bytes() for group in self.groups)
