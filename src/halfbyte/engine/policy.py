"""What each layer keeps of its forward for its backward, within a budget of bytes.

    keep         saved a token and layer (elements)         computed again in the backward
    "all"        x, q k v, attention, mid, gate, up         norms, gated product
    "attention"  x, q k v, attention                        also o, gate and up
    "input"      x                                          also q, k, v and attention

Down's product is never computed again. Per byte, all matrix products cost about the same to repeat,
and attention costs more the longer the sequence is: so `auto` first lifts every layer from "input"
to "attention", then as many as fit to "all". What is left after that holds dequantized weights,
which spares a layer two dequantizations a step: per byte that gains least.
"""

from dataclasses import dataclass

from halfbyte.engine.block import BlockShape

LEVELS = ("input", "attention", "all")


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one layer saves at each level, for a number of tokens."""

    input: int
    attention: int
    all: int

    @classmethod
    def of(
        cls, shape: BlockShape, hidden_size: int, num_tokens: int, itemsize: int
    ) -> "LayerBytes":
        """Count the large saved tensors (LoRA's `x A^T` is below one percent of them)."""
        width = shape.num_heads * shape.head_dim
        heads = width + 2 * shape.num_key_value_heads * shape.head_dim
        attention = hidden_size + heads + width
        everything = attention + hidden_size + 2 * shape.intermediate_size
        unit = num_tokens * itemsize
        return cls(hidden_size * unit, attention * unit, everything * unit)

    def at(self, level: str) -> int:
        """Return the bytes of a level."""
        return {"input": self.input, "attention": self.attention, "all": self.all}[level]


@dataclass(frozen=True)
class Choice:
    """What the layers keep.

    Args:
        levels: Of the activations, one a layer.
        num_staying: How many layers keep their dequantized weights.
    """

    levels: list[str]
    num_staying: int = 0


def plan(
    memory: str | int,
    num_layers: int,
    sizes: LayerBytes,
    weight_bytes: int,
    free_bytes: int,
) -> Choice:
    """Return what the layers keep.

    Args:
        memory: "lean" keeps inputs only, "fast" all activations; "auto" and a number of bytes, as
            much as fits.
        num_layers: Of the model.
        sizes: Of a layer's activations.
        weight_bytes: Of a layer's dequantized weights.
        free_bytes: What may be spent.
    """
    if memory == "lean":
        return Choice(["input"] * num_layers)
    is_fast = memory == "fast"
    levels = ["all"] * num_layers if is_fast else choose(num_layers, sizes, free_bytes)
    left = free_bytes - sum(sizes.at(level) for level in levels)
    return Choice(levels, min(max(left, 0) // weight_bytes, num_layers))


def choose(num_layers: int, sizes: LayerBytes, budget_bytes: int) -> list[str]:
    """Return what each layer keeps so that the sum stays within `budget_bytes`.

    Where not even every layer's input fits, "input" is still returned for all: nothing smaller
    exists here.
    """
    left = budget_bytes - num_layers * sizes.input
    levels = ["input"] * num_layers
    for better, cost in (
        ("attention", sizes.attention - sizes.input),
        ("all", sizes.all - sizes.attention),
    ):
        worse = LEVELS[LEVELS.index(better) - 1]
        # Later layers first: their backward comes first, so what they hold is freed first.
        for index in reversed(range(num_layers)):
            if left < cost:
                break
            if levels[index] == worse:
                levels[index] = better
                left -= cost
    return levels
