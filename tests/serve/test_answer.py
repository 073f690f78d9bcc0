"""An answer draws from its own generator and knows where it stands."""

from halfbyte.generate.sampling import Sampling
from halfbyte.serve.answer import Answer, Event


def make(service, seed):
    model = service.catalog.names()[0]
    return Answer(model, [1, 2, 3], Sampling(seed=seed), lambda event: None)


def test_draws_depend_on_the_seed_alone(service):
    first, second, other = make(service, 1), make(service, 1), make(service, 2)
    numbers = [first.draw() for _ in range(3)]
    assert numbers == [second.draw() for _ in range(3)]
    assert other.draw() != numbers[0]
    assert all(0 <= number < 1 for number in numbers)


def test_its_position_follows_the_prompt(service):
    answer = make(service, 0)
    answer.num_tokens = 1
    assert answer.position == 3


def test_the_last_event_has_a_reason_or_a_failure():
    assert not Event().is_last
    assert Event(finish_reason="stop").is_last
    assert Event(failure="timeout").is_last
