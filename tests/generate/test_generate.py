"""One answer: right, streamed, seeded, and without a trace left on the model."""

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.generate.generate import evaluating, generate, seeded
from halfbyte.generate.sampling import Sampling

QUESTION = [{"role": "user", "content": "3+3?"}]


def test_it_answers_and_stops(taught, tokenizer):
    assert generate(taught, tokenizer, QUESTION) == "six and no more"


def test_a_stream_gets_the_same_text_in_pieces(taught, tokenizer):
    pieces = []
    answer = generate(taught, tokenizer, QUESTION, stream=pieces.append)
    assert "".join(pieces) == answer
    assert len(pieces) > 1


def test_plain_text_is_continued(taught, tokenizer):
    prompt = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nfo"
    assert generate(taught, tokenizer, prompt) == "ur"


def test_max_new_tokens_ends_the_answer(taught, tokenizer):
    assert generate(taught, tokenizer, QUESTION, max_new_tokens=3) == "six"


def test_the_seed_decides_and_the_callers_generator_is_left_alone(taught, tokenizer):
    hot = Sampling(temperature=5.0, max_new_tokens=20)
    state = torch.get_rng_state()
    first = generate(taught, tokenizer, QUESTION, sampling=hot, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert generate(taught, tokenizer, QUESTION, sampling=hot, seed=1) == first
    assert generate(taught, tokenizer, QUESTION, sampling=hot, seed=2) != first


def test_a_model_in_training_goes_back_to_it(taught, tokenizer):
    taught.train()
    try:
        assert generate(taught, tokenizer, QUESTION) == "six and no more"
        assert taught.training
    finally:
        taught.eval()
    with evaluating(taught):
        assert not taught.training


def test_the_models_own_sampling_defaults_do_not_leak_in(taught, tokenizer):
    own = taught.generation_config
    own.do_sample, own.temperature = True, 100.0
    try:
        assert generate(taught, tokenizer, QUESTION) == "six and no more"
    finally:
        own.do_sample, own.temperature = False, 1.0


def test_unknown_settings_are_errors(taught, tokenizer):
    with pytest.raises(TypeError, match="beams"):
        generate(taught, tokenizer, QUESTION, beams=3)
    with pytest.raises(ConfigError, match="temperature"):
        generate(taught, tokenizer, QUESTION, temperature=-1)


def test_seeded_restores():
    state = torch.get_rng_state()
    with seeded(3, torch.device("cpu")):
        first = torch.rand(2)
    with seeded(3, torch.device("cpu")):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), state)
