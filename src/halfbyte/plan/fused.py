"""A fused model in numbers, as the ledger's formulas take it."""

from halfbyte.engine.body import FusedBody
from halfbyte.engine.projections import Siblings
from halfbyte.engine.projections_fp8 import Fp8Siblings
from halfbyte.memory.fused_shape import FusedShape, Group


def fused_shape(body: FusedBody, itemsize: int) -> FusedShape:
    """Return the shape of a body's layers, which are all alike.

    Args:
        body: Over a real model, or one on the meta device.
        itemsize: Bytes of an activation.
    """
    layer = body.layers[0]
    shape = layer.shape
    return FusedShape(
        hidden=layer.qkv.inputs,
        heads=shape.num_heads,
        head_dim=shape.head_dim,
        intermediate=shape.intermediate_size,
        qkv=_group(layer.qkv),
        o=_group(layer.out.o),
        gate_up=_group(layer.out.gate_up),
        down=_group(layer.out.down),
        itemsize=itemsize,
        normed_heads=shape.num_heads + shape.num_key_value_heads if shape.has_head_norms else 0,
        has_branch_norms=shape.has_branch_norms,
        num_rotations=len({layer.rope for layer in body.layers}),
    )


def _group(siblings: Siblings) -> Group:
    elements = sum(adapter.numel() for adapter in siblings.adapters)
    is_fp8 = isinstance(siblings, Fp8Siblings)
    return Group(siblings.inputs, siblings.outputs, siblings.rank, elements, is_fp8=is_fp8)
