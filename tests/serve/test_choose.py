"""Tokens are drawn as transformers filters them, and each row by its own number."""

import pytest
import torch
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from halfbyte.generate.sampling import Sampling
from halfbyte.serve.choose import choose, describe


def probabilities(logits, sampling):
    """Return what transformers' own filters leave."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    return TopPLogitsWarper(sampling.top_p)(None, scores).softmax(-1)[0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"top_p": 0.7}, {"top_k": 3}, {"top_k": 6, "top_p": 0.6}],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(settings):
    sampling = Sampling(**{"temperature": 1.0, **settings})
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(3))
    draws = [(i + 0.5) / 4000 for i in range(4000)]  # evenly, so that counting is exact
    tokens = choose(logits.expand(4000, -1), [sampling] * 4000, draws)
    share = torch.bincount(torch.tensor(tokens), minlength=12) / 4000
    torch.testing.assert_close(share, probabilities(logits, sampling), atol=5e-4, rtol=0)


def test_rows_choose_each_in_their_own_way():
    logits = torch.tensor([[0.0, 5.0, 1.0, 4.0]]).expand(3, -1)
    samplings = [Sampling(), Sampling(temperature=100.0), Sampling(temperature=9.0, top_k=1)]
    assert choose(logits, samplings, [0.0, 0.99, 0.99]) == [1, 0, 1]


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_are_tokens_that_are_left(draw):
    logits = torch.tensor([[-torch.inf, 3.0, 3.0, -torch.inf]])
    assert choose(logits, [Sampling(temperature=1.0)], [draw])[0] in (1, 2)
    assert choose(logits, [Sampling(temperature=1.0, top_p=0.1)], [draw]) == [1]


def test_logprobs_are_those_before_temperature():
    logits = torch.tensor([1.0, 3.0, 2.0])
    choice = describe(logits, 0, 2)
    expected = logits.log_softmax(-1)
    assert choice.token.logprob == pytest.approx(float(expected[0]))
    assert [top.token_id for top in choice.top] == [1, 2]
    assert choice.top[0].logprob == pytest.approx(float(expected[1]))
    assert describe(logits, 1, 0).top == ()
