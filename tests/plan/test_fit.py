"""What fits fits, one more does not, and the changes offered are true."""

from dataclasses import replace

from halfbyte.plan.fit import changes, max_tokens, table
from halfbyte.plan.predict import Setting

GIB = 2**30
LEAN = Setting(memory="lean")


def test_the_most_tokens_fit_and_a_few_more_do_not(llama_planner):
    tokens = max_tokens(llama_planner, LEAN, 12 * GIB)
    at = replace(LEAN, length=tokens, total_bytes=12 * GIB)
    assert llama_planner.predict(at).fits
    assert not llama_planner.predict(replace(at, length=int(tokens * 1.02) + 64)).fits


def test_larger_cards_take_more(llama_planner):
    found = list(table(llama_planner, LEAN).values())
    assert found == sorted(found)
    assert found[0] > 2000
    assert max_tokens(llama_planner, LEAN, 4 * GIB) == 0


def test_each_change_makes_the_step_fit(llama_planner):
    setting = Setting(rows=4, length=4096, memory="fast", is_paged=False, total_bytes=12 * GIB)
    prediction = llama_planner.predict(setting)
    assert not prediction.fits
    found = changes(llama_planner, prediction)
    texts = [change.text for change in found]
    assert [text.split()[0] for text in texts] == ["per_device_train_batch_size:", "a"]
    tokens = next(int(t.split()[-1]) for t in texts if t.startswith("per_device")) * 4096
    assert llama_planner.predict(replace(setting, rows=tokens // 4096, memory="lean")).fits


def test_a_card_that_is_far_too_small_is_answered_with_a_larger_one(llama_planner):
    prediction = llama_planner.predict(Setting(length=2048, total_bytes=5 * GIB))
    assert [c.text for c in changes(llama_planner, prediction)] == ["a card of 8 GB"]


def test_without_a_card_nothing_needs_to_change(llama_planner):
    assert changes(llama_planner, llama_planner.predict(LEAN)) == []
