"""A fused layer in numbers: what its tensors have of columns, and what it saves.

Shape letters as in `fused_step`.
"""

from dataclasses import dataclass


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
            + self.gate_up.outputs + 2 * self.gate_up.rank
        )  # fmt: skip
        # In float32: log-sum-exp of attention, and each norm's factor of a row.
        numbers = {"input": 0, "attention": self.heads + 1, "all": self.heads + 2}
        return tokens * (columns[level] * self.itemsize + 4 * numbers[level])

    def weight_bytes(self) -> int:
        """Return the bytes of all of a layer's dequantized matrices."""
        return sum(group.wide_elements() for group in self.groups) * self.itemsize
