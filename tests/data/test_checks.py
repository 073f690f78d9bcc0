"""Each way to ruin a model is found, counted and shown; sound data are not accused."""

import pytest

from halfbyte.data.checks import check, snippet
from halfbyte.data.config import DataConfig
from halfbyte.data.findings import Level
from halfbyte.data.gather import gather

GOOD = [
    (f"What is {n} plus two, for {n * 7919}?", f"It is {n + 2}, by {n * 104729}.")
    for n in range(40)
]


def talk(question, answer, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


@pytest.fixture
def found(tokenizer, tmp_path):
    """Return the findings on rows by name; `good` rows are added."""

    def call(rows=(), *, good=40, of=tokenizer, eval_rows=None, **settings):
        settings = {"chat_template": "plain", "cache_dir": str(tmp_path), **settings}
        config = DataConfig(**settings)
        all_rows = [*rows, *(talk(*turns) for turns in GOOD[:good])]
        gathered = gather(config, of, seed=0, rows=all_rows, eval_rows=eval_rows, progress=False)
        return {finding.name: finding for finding in check(gathered, config)}

    return call


def test_sound_rows_are_not_accused(found):
    assert found() == {}


@pytest.mark.parametrize(
    ("row", "name", "level"),
    [
        (talk("a\ufffdb", "x"), "undecodable_text", Level.WARNING),
        (talk("a\x00b", "x"), "control_characters", Level.WARNING),
        (talk(" ", "x"), "empty_turns", Level.WARNING),
        (talk("<|im_start|>x", "x"), "unknown_special_tokens", Level.WARNING),
        (talk("end </s> now", "x"), "special_token_text", Level.INFO),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "roles_out_of_order",
            Level.WARNING,
        ),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unreadable_rows", Level.RUINS),
        ({"prompt": "x"}, "unreadable_rows", Level.RUINS),
        (talk("half \ud83d", "x"), "unreadable_rows", Level.RUINS),
        (talk(*GOOD[5]), "duplicates", Level.INFO),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_bad_row_is_named(found, row, name, level):
    findings = found([talk("first", "row"), row])
    assert set(findings) == {name}
    assert findings[name].level == level
    assert findings[name].count == 1
    place = "row 8" if name == "duplicates" else "row 2"
    assert findings[name].examples[0].startswith(place)


def test_rows_that_teach_nothing_ruin_when_they_are_many(found):
    quiet = {"messages": [{"role": "user", "content": "hello"}]}
    few = found([quiet] * 2)["nothing_supervised"]
    assert (few.level, few.count) == (Level.WARNING, 2)
    many = found([quiet] * 6)["nothing_supervised"]
    assert (many.level, many.count) == (Level.RUINS, 6)
    assert "allow: [nothing_supervised]" in many.hint
    allowed = found([quiet] * 6, allow=["nothing_supervised"])["nothing_supervised"]
    assert (allowed.level, allowed.allowed) == (Level.WARNING, True)


def test_an_answer_without_stop_token_is_found(found, make_tokenizer):
    # Neither the text nor the tokenizer has a stop token.
    rows = [{"text": f"The cat {n} sat."} for n in range(5)]
    finding = found(rows, good=0, of=make_tokenizer(eos=None))["no_stop"]
    assert (finding.level, finding.count) == (Level.RUINS, 5)
    assert "no_stop" not in found(rows, good=0)
    assert "no_stop" not in found(loss_on="all")


def test_stop_tokens_of_every_turn_are_looked_at(found):
    # The template's mark leaves the stop token of all but the last turn out.
    broken = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}|{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    turns = [*talk("a", "b")["messages"], *talk("c", "d")["messages"]]
    findings = found([{"messages": turns}] * 3, good=0, chat_template=broken)
    assert "no_stop" not in findings  # such turns become rows of their own, which end in it
    assert findings["rewritten_conversations"].count == 3


def test_rows_that_are_too_long_count_what_would_be_lost(found):
    long = talk("Why?", "The cat sat on the mat. " * 50)
    finding = found([long], max_length=64)["over_length"]
    assert (finding.level, finding.count) == (Level.RUINS, 1)
    assert "the stop token of 1 rows" in finding.text
    levels = {"truncate": Level.WARNING, "drop": Level.WARNING, "split": Level.INFO}
    for policy, level in levels.items():
        assert found([long], max_length=64, over_length=policy)["over_length"].level == level


def test_bos_missing_and_doubled(found, make_tokenizer):
    adds = make_tokenizer(adds_bos=True)
    no_bos = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    assert found(of=adds, chat_template=no_bos)["bos_missing"].count == 40
    assert "bos_missing" not in found(chat_template=no_bos)
    twice = "{{ bos_token }}" * 2 + no_bos
    assert found(chat_template=twice)["bos_doubled"].count == 40


def test_a_template_of_another_model_is_named(found):
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    finding = found(chat_template=chatml)["template_tokens"]
    assert "<|im_end|>, <|im_start|>" in finding.text
    assert finding.level == Level.WARNING


def test_padding_with_the_stop_token_is_said_to_be_harmless(found, make_tokenizer):
    tokenizer = make_tokenizer(special=("<pad>",))
    tokenizer.pad_token = "</s>"
    assert found(of=tokenizer)["pad_is_eos"].level == Level.INFO
    tokenizer.pad_token = "<pad>"
    assert "pad_is_eos" not in found(of=tokenizer)


def test_a_source_that_has_nearly_all_tokens_is_named(found):
    rows = [talk(f"q {n} {n * 31}", f"a {n * 77} {n}", source="big") for n in range(40)]
    rare = talk("q of the other", "a", source="small")
    assert "'big'" in found([*rows, rare], good=0)["dominating_source"].text
    assert "dominating_source" not in found(rows, good=0)
    assert "dominating_source" not in found([*rows[:20], rare, *rows[:0]] + [rare] * 20, good=0)


def test_a_special_token_that_cannot_stay_text_is_a_warning(found):
    # The template itself reads the text, so it cannot be hidden from it.
    reads = (
        "{% for m in messages %}{{ m.content | replace('</s>', '</s>!') + eos_token }}{% endfor %}"
    )
    finding = found([talk("a </s> b", "x")], chat_template=reads)["special_token_injected"]
    assert (finding.level, finding.count) == (Level.WARNING, 1)


def test_snippets_are_one_printable_line():
    assert snippet("a\n b\x00\x1b") == "a b\\x00\\x1b"
    assert len(snippet("x" * 500)) == 72
    assert snippet("x" * 500).endswith("…")
