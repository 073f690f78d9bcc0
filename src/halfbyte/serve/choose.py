"""The next token of every row, and its log-probability.

One sort serves top_k, top_p and the draw itself: the probabilities that are left, likeliest first,
are added up until they pass a number that the row's own generator drew. So a row's tokens depend on
its seed and its logits, not on who else is in the batch.

Shape letters: B rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.generate.sampling import Sampling


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability, before temperature."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenChoice:
    """The token that was chosen, and the likeliest ones that were asked for."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...]


def choose(logits_BV: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """Return one token a row.

    Args:
        logits_BV: float32.
        samplings: How each row chooses; temperature 0 takes the likeliest token.
        draws: A number in [0, 1) for each row; greedy rows do not use theirs.
    """
    tokens_B = logits_BV.argmax(-1)
    sampled = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if sampled:
        rows = torch.tensor(sampled, device=logits_BV.device)
        chosen = [samplings[row] for row in sampled]
        tokens_B[rows] = _draw(logits_BV[rows], chosen, [draws[row] for row in sampled])
    return tokens_B.tolist()


def _draw(logits_BV: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits_BV.device, dtype=torch.float32)[:, None]

    vocabulary = logits_BV.shape[-1]
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(vocabulary, device=logits_BV.device)
    top_k = column([sampling.top_k or vocabulary for sampling in samplings])
    scaled_BV = sorted_BV / column([sampling.temperature for sampling in samplings])
    probs_BV = scaled_BV.masked_fill(ranks_V >= top_k, -torch.inf).softmax(-1)
    # A token stays while those before it do not reach top_p; the likeliest always stays.
    before_BV = probs_BV.cumsum(-1) - probs_BV
    is_out = (before_BV >= column([sampling.top_p for sampling in samplings])) & (ranks_V > 0)
    sums_BV = probs_BV.masked_fill(is_out, 0.0).cumsum(-1)
    target_B1 = column(draws) * sums_BV[:, -1:]
    index_B1 = torch.searchsorted(sums_BV, target_B1, right=True).clamp(max=vocabulary - 1)
    # Rounding may pass the last token that is left, never go beyond it in probability.
    last_B1 = (probs_BV.masked_fill(is_out, 0.0) > 0).sum(-1, keepdim=True) - 1
    return order_BV.gather(-1, torch.minimum(index_B1, last_B1))[:, 0]


def describe(logits_V: Tensor, token_id: int, num_top: int) -> TokenChoice:
    """Return a chosen token's log-probability, and those of the `num_top` likeliest tokens."""
    logprobs_V = logits_V.log_softmax(-1)
    values, indices = logprobs_V.topk(num_top)
    top = zip(indices.tolist(), values.tolist(), strict=True)
    return TokenChoice(
        TokenLogprob(token_id, float(logprobs_V[token_id])),
        tuple(TokenLogprob(index, value) for index, value in top),
    )
