"""Continuous batching: every answer is what it would be alone, whoever comes and goes beside it."""

import queue
import time

import pytest
import torch

from halfbyte.device import compute_dtype
from halfbyte.errors import ConfigError
from halfbyte.generate.prompts import prompt_ids
from halfbyte.generate.sampling import Sampling
from halfbyte.serve.answer import Answer, Event
from halfbyte.serve.engine import EngineConfig, QueueFullError, StoppingError

NAMES = ["base", "red", "green", "blue"]


def ask(service, name, text, *, max_new_tokens=24, **settings):
    """Return an answer that is not queued yet, and the queue of its news."""
    news = queue.Queue()
    model = service.catalog.hold(name)
    ids = prompt_ids(model.tokenizer, [{"role": "user", "content": text}])
    sampling = {key: settings.pop(key) for key in ("temperature", "seed") if key in settings}
    sampling = Sampling(max_new_tokens=max_new_tokens, **sampling)
    answer = Answer(model, ids, sampling, news.put, **settings)
    model.let_go()
    return answer, news


def gather(news):
    """Return the text, and the last event."""
    text = ""
    while True:
        event = news.get(timeout=60)
        text += event.piece.text
        if event.is_last:
            return text, event


def prompts(count):
    return [f"What is {i} plus {7 * i}?" + " Think." * (i % 5) for i in range(count)]


def test_mixed_answers_equal_those_alone(service, alone):
    asked = [(NAMES[i % 4], text) for i, text in enumerate(prompts(12))]
    answers = [ask(service, *each, max_new_tokens=8 + i % 17) for i, each in enumerate(asked)]
    for answer, _ in answers:
        service.engine.submit([answer])
        time.sleep(0.01)  # so that they join while others run
    for (name, text), (answer, news) in zip(asked, answers, strict=True):
        prompt = [{"role": "user", "content": text}]
        expected = alone(name, prompt, answer.sampling.max_new_tokens)
        got, event = gather(news)
        assert got == expected, (name, text)
        assert event.num_tokens == answer.num_tokens


@pytest.mark.skipif(
    compute_dtype("cpu") != torch.bfloat16, reason="this CPU does not multiply bf16"
)
def test_in_bf16_too_company_changes_nothing(make_service):
    service = make_service(dtype=torch.bfloat16, max_batch_size=8)

    def answers(together):
        pairs = [ask(service, NAMES[i % 4], text) for i, text in enumerate(prompts(12))]
        texts = []
        for answer, news in pairs:
            service.engine.submit([answer])
            if not together:
                texts.append(gather(news)[0])
        return texts or [gather(news)[0] for _, news in pairs]

    assert answers(together=True) == answers(together=False)


def test_long_prompts_are_read_in_pieces(make_service, alone):
    service = make_service(prefill_tokens=16, max_batch_size=2)
    text = "Count the letters of all these words. " * 5
    pairs = [ask(service, name, text) for name in NAMES]
    service.engine.submit([answer for answer, _ in pairs])
    for name, (answer, news) in zip(NAMES, pairs, strict=True):
        assert len(answer.prompt_ids) > 32
        assert gather(news)[0] == alone(name, [{"role": "user", "content": text}])


def test_a_seed_gives_the_same_text_in_any_company(service):
    def sampled(seed, company):
        answer, news = ask(service, "red", "Tell me.", temperature=1.5, seed=seed)
        others = [ask(service, NAMES[i % 4], text)[0] for i, text in enumerate(prompts(company))]
        service.engine.submit([*others, answer])
        return gather(news)[0]

    first = sampled(5, company=0)
    assert sampled(5, company=6) == first
    assert sampled(6, company=0) != first


def test_the_queue_has_an_end_and_takes_all_or_none(make_service):
    service = make_service(max_batch_size=1, max_queue=2)
    pairs = [ask(service, "base", "Go on.", max_new_tokens=200) for _ in range(4)]
    answers = [answer for answer, _ in pairs]
    with pytest.raises(QueueFullError, match="of 2 that may"):
        service.engine.submit(answers)
    service.engine.submit(answers[:3])
    with pytest.raises(QueueFullError):
        service.engine.submit(answers[3:])
    for answer in answers[:3]:
        answer.is_cancelled = True


def test_late_answers_are_given_up_wherever_they_are(make_service):
    service = make_service(max_batch_size=1)
    deadline = time.monotonic() + 0.3
    running, news = ask(service, "red", "Go on.", max_new_tokens=230, deadline=deadline)
    waiting, later = ask(service, "red", "Me too.", deadline=time.monotonic() + 0.05)
    running.model.stop_token_ids = frozenset()
    service.engine.submit([running, waiting])
    assert gather(later) == ("", Event(failure="timeout"))
    assert gather(news)[1].failure in ("timeout", None)
    after, news = ask(service, "red", "And now?", max_new_tokens=3)
    service.engine.submit([after])
    assert gather(news)[1].finish_reason == "length"


def test_cancelled_answers_free_their_rows(make_service, wait_until):
    service = make_service(max_batch_size=2)
    pairs = [ask(service, "red", "Go on.", max_new_tokens=230) for _ in range(3)]
    for answer, _ in pairs:
        answer.model.stop_token_ids = frozenset()
    service.engine.submit([answer for answer, _ in pairs])
    pairs[0][1].get(timeout=60)
    for answer, _ in pairs:
        answer.is_cancelled = True
    after, news = ask(service, "base", "What is 1 plus 1?", max_new_tokens=4)
    service.engine.submit([after])
    gather(news)
    wait_until(lambda: b"halfbyte_answers_running 0.0" in service.metrics.text())
    assert b'outcome="cancelled"} 3.0' in service.metrics.text()


def test_a_step_that_fails_ends_its_answers_and_no_others(make_service, monkeypatch):
    service = make_service(max_batch_size=2)
    batched = service.engine._model
    answer, news = ask(service, "base", "Go on.")
    with monkeypatch.context() as patch:
        patch.setattr(batched, "decode", lambda *_: 1 / 0)
        patch.setattr(batched, "prefill", lambda *_, **__: 1 / 0)
        service.engine.submit([answer])
        assert gather(news)[1].failure == "error"
    answer, news = ask(service, "base", "What is 1 plus 1?")
    service.engine.submit([answer])
    assert gather(news)[1].failure is None


def test_what_runs_is_ended_before_the_engine_stops(make_service):
    service = make_service(max_batch_size=2)
    pairs = [ask(service, name, "Go on.", max_new_tokens=20) for name in NAMES]
    service.engine.submit([answer for answer, _ in pairs])
    service.engine.stop(timeout=60)
    assert all(gather(news)[1].finish_reason for _, news in pairs)
    with pytest.raises(StoppingError):
        service.engine.submit([ask(service, "base", "Late.")[0]])
    with pytest.raises(StoppingError):
        service.engine.between_steps(lambda: None)
    assert not service.engine.is_alive


def test_what_is_not_complete_at_the_limit_is_told_so(make_service):
    service = make_service(max_batch_size=1)
    pairs = [ask(service, "red", "Go on.", max_new_tokens=230) for _ in range(3)]
    for answer, _ in pairs:
        answer.model.stop_token_ids = frozenset()
    service.engine.submit([answer for answer, _ in pairs])
    service.engine.stop(timeout=0.05)
    assert gather(pairs[-1][1])[1].failure == "stopping"


def test_calls_run_between_steps_and_hand_back_what_they_raise(service):
    assert service.engine.between_steps(lambda: 3).result(30) == 3
    with pytest.raises(ZeroDivisionError):
        service.engine.between_steps(lambda: 1 / 0).result(30)


@pytest.mark.parametrize("name", ["max_batch_size", "max_queue", "prefill_tokens"])
def test_limits_are_positive(name):
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{name: 0})
