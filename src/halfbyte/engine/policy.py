"""What each layer keeps of its forward for its backward, within a budget of bytes.

    keep         saved a token and layer (elements)         computed again in the backward
    "all"        x, q k v, attention, mid, gate, up         norms, gated product
    "attention"  x, q k v, attention                        also o, gate and up
    "input"      x                                          also q, k, v and attention
    "offload"    x, in host memory                          the same

Down's product is never computed again. Per byte, all matrix products cost about the same to repeat,
and attention costs more the longer the sequence is: so `auto` first lifts every layer from "input"
to "attention", then as many as fit to "all". What is left after that holds dequantized weights,
which spares a layer two dequantizations a step: per byte that gains least.

Where not even every layer's input fits, and where the least is wanted, inputs go to the host, of as
many layers as it has room for. What they leave is for "attention" of as many layers as fit. If that
is not enough either, the MLP runs over tiles of tokens.
"""

from dataclasses import dataclass

from halfbyte.engine.block import BlockShape

LEVELS = ("offload", "input", "attention", "all")
TILES = (8192, 4096, 2048, 1024, 512)
"""Tokens of a tile, the largest first: smaller ones cost matrix products their speed."""
_LOGIT_ROWS = 512
# Inputs on the device while others are on the host: the one at work and the one on its way.
_STAGED = 2


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
        branch = hidden_size if shape.has_branch_norms else 0
        attention = hidden_size + heads + _normed_heads(shape) + width + branch
        everything = attention + hidden_size + branch + 2 * shape.intermediate_size
        unit = num_tokens * itemsize
        return cls(hidden_size * unit, attention * unit, everything * unit)

    def at(self, level: str) -> int:
        """Return the bytes of a level on the device."""
        return 0 if level == "offload" else int(getattr(self, level))


@dataclass(frozen=True)
class Choice:
    """What the layers keep.

    Args:
        levels: Of the activations, one a layer.
        num_staying: How many layers keep their dequantized weights.
        tile: Tokens that an MLP takes at a time; 0: all.
    """

    levels: list[str]
    num_staying: int = 0
    tile: int = 0


def tiles(num_tokens: int, max_tile: int | None = None) -> list[int]:
    """Return the tiles that so many tokens may be taken in, the largest first; 0 takes all."""
    # Tiles of more than a half would spare less than what tiles need beside them.
    smaller = [tile for tile in TILES if tile <= num_tokens // 2]
    if max_tile is None or max_tile >= num_tokens:
        return [0, *smaller]
    return [max_tile, *(tile for tile in smaller if tile < max_tile)]


def working_bytes(
    shape: BlockShape, hidden_size: int, num_tokens: int, itemsize: int, tile: int
) -> int:
    """Return what the backward of one layer has at once, beside what is saved and weights.

    Untiled: gate, up and hidden with their gradients, four hidden states. Tiled: those of a tile;
    and of all tokens q, k, v and attention with their gradients, that of q in float32 as well, and
    the gradients of x and y. Those of shared k and v for each query head, which the plan counts,
    are left to the reserve.
    """
    mlp = 6 * shape.intermediate_size + 8 * hidden_size
    if not tile:
        return mlp * num_tokens * itemsize
    width = shape.num_heads * shape.head_dim
    heads = width + 2 * shape.num_key_value_heads * shape.head_dim
    attention = 2 * hidden_size + 2 * heads + _normed_heads(shape) + 4 * width
    return (mlp * tile + attention * num_tokens) * itemsize


def _normed_heads(shape: BlockShape) -> int:
    """Return the elements of a token's q and k that are there twice, as they were before a norm."""
    heads = shape.num_heads + shape.num_key_value_heads
    return heads * shape.head_dim if shape.has_head_norms else 0


def logit_rows(memory: str | int, tile: int) -> int | None:
    """Return how many rows of logits are made at once where memory is short; else None."""
    return _LOGIT_ROWS if memory == "lean" or tile else None


def least_bytes(num_layers: int, sizes: LayerBytes, host_layers: int) -> int:
    """Return what all layers save at least where the host has room for so many inputs."""
    # The last input stays: it is read again at once.
    resident = max(num_layers - host_layers, 1)
    staged = _STAGED if host_layers else 0
    return min(num_layers, resident + staged) * sizes.input


def plan(
    memory: str | int,
    num_layers: int,
    sizes: LayerBytes,
    weight_bytes: int,
    free_bytes: int,
    *,
    host_layers: int = 0,
) -> Choice:
    """Return what the layers keep.

    Args:
        memory: "lean" keeps the least, "fast" all activations; "auto" and a number of bytes, as
            much as fits.
        num_layers: Of the model.
        sizes: Of a layer's activations.
        weight_bytes: Of a layer's dequantized weights.
        free_bytes: What may be spent.
        host_layers: How many layers' inputs the host has room for.
    """
    if memory == "lean":
        return Choice(choose(num_layers, sizes, 0, offload_below="input", host_layers=host_layers))
    is_fast = memory == "fast"
    levels = ["all"] * num_layers
    if not is_fast:
        # Who names a number of bytes gets the most out of them; `auto` leaves the host alone.
        below = "attention" if isinstance(memory, int) else "input"
        levels = choose(num_layers, sizes, free_bytes, offload_below=below, host_layers=host_layers)
    left = free_bytes - sum(sizes.at(level) for level in levels)
    return Choice(levels, min(max(left, 0) // weight_bytes, num_layers))


def choose(
    num_layers: int,
    sizes: LayerBytes,
    budget_bytes: int,
    *,
    offload_below: str = "input",
    host_layers: int = 0,
) -> list[str]:
    """Return what each layer keeps so that the sum stays within `budget_bytes`.

    Where that is less than the least, the least is returned all the same.

    Args:
        num_layers: Of the model.
        sizes: Of a layer's activations.
        budget_bytes: What they may take.
        offload_below: Inputs go to the host where not all layers can have this level.
        host_layers: How many of them it has room for.
    """
    left = budget_bytes - num_layers * sizes.input
    if host_layers and budget_bytes < num_layers * sizes.at(offload_below):
        return _with_host(num_layers, sizes, budget_bytes, host_layers)
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


def _with_host(
    num_layers: int, sizes: LayerBytes, budget_bytes: int, host_layers: int
) -> list[str]:
    """Return levels of which the lower ones are on the host, of as many layers as are needed."""
    resident = max(num_layers - host_layers, 0)
    room = budget_bytes - _STAGED * sizes.input
    lifted = room // sizes.attention
    if lifted < resident:  # then some of the others stay, too
        lifted = (room - resident * sizes.input) // (sizes.attention - sizes.input)
    lifted = max(lifted, 0)
    inputs = max(resident - lifted, 0 if lifted else 1)
    levels = ["input"] * inputs + ["attention"] * lifted
    return ["offload"] * (num_layers - len(levels)) + levels
