"""What fits fits, and one more does not."""

from dataclasses import replace

from halfbyte.plan.fit import max_tokens, table
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
