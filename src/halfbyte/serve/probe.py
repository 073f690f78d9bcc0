"""Does a model, run row by row in a shared cache, say what it says alone?

Serving runs transformers' models with masks and a cache of its own. Before the first request two
prompts of different lengths are read together and continued by a few tokens, and every logit is
compared with the model's own forward of the whole text.
"""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.serve.forward import BatchedModel

_LENGTHS = (9, 5)
_NUM_NEW = 3
SMALLEST_LENGTH = 16
"""Tokens that the cache must have room for."""
_TOLERANCE = 0.05  # of the logits' norm; bf16 rounding of a random 32-layer model stays below 0.02


@torch.no_grad()
def check_model(model: PreTrainedModel, batched: BatchedModel) -> None:
    """Run the comparison; it also takes the memory of the cache.

    Raises:
        ConfigError: the logits differ.
    """
    plain: Any = model
    vocabulary = plain.get_input_embeddings().num_embeddings
    lengths = _LENGTHS[: batched.num_rows]
    texts = [[(7 * i + row) % vocabulary for i in range(n)] for row, n in enumerate(lengths)]
    slots = [0] * len(texts)
    cache = DynamicCache()
    logits = batched.prefill(texts, slots, cache)
    for row, ids in enumerate(texts):
        batched.cache.join(row, cache, row, len(ids))
    for _ in range(_NUM_NEW):
        for row, ids in enumerate(texts):
            whole = torch.tensor([ids], device=model.device)
            expected = plain(input_ids=whole, use_cache=False).logits[0, -1].float()
            error = (logits[row] - expected).norm() / expected.norm()
            if not bool(error < _TOLERANCE):
                raise ConfigError(
                    f"{type(model).__name__} does not give the same logits in a batch as alone "
                    f"(they differ by {float(error):.1%})",
                    hint="serve it with vLLM: docs/serving.md says how",
                )
            ids.append(int(expected.argmax()))
        tokens, positions = [ids[-1] for ids in texts], [len(ids) - 1 for ids in texts]
        logits = batched.decode(tokens, positions, slots)
