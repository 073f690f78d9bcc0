"""Rows as they are shown: every character, in the colour of its mask, and never as markup."""

import html
import re

import pytest
from rich.console import Console

from halfbyte.data.audit import audit
from halfbyte.data.config import DataConfig
from halfbyte.data.show import page, pieces, shown_rows, visible

EVIL = "<script>alert(1)</script> [bold]x[/bold] \U0001f408 \x1b[31m"


@pytest.fixture
def audited(tokenizer, tmp_path):
    rows = [{"prompt": EVIL, "completion": "The cat\n\tsat."}, {"prompt": "b", "completion": "c"}]
    config = DataConfig(chat_template="plain", cache_dir=str(tmp_path))
    return audit(config, tokenizer, rows=rows, progress=False)


def test_pieces_are_the_whole_text_and_split_no_character(tokenizer, make_sentencepiece):
    for each in (tokenizer, make_sentencepiece()):
        text = "The cat \u2019s \U0001f408 sat" if each is tokenizer else "The cat sat on"
        ids = each(text, add_special_tokens=False)["input_ids"] + [each.eos_token_id]
        found = list(pieces(each, ids, [-100] * 3 + ids[3:]))
        assert [id_ for piece in found for id_ in piece.ids] == ids
        assert "".join(piece.text for piece in found).strip() == f"{text}</s>"
        assert "\ufffd" not in "".join(piece.text for piece in found)
        assert [piece.learned for piece in found[:4]] == [False] * 3 + [True]
        assert [piece.special for piece in found[-2:]] == [False, True]


def test_bytes_that_are_no_character_are_still_shown(tokenizer):
    ids = tokenizer("\U0001f408", add_special_tokens=False)["input_ids"][:2]
    assert [piece.ids for piece in pieces(tokenizer, ids, ids)] == [(ids[0],), (ids[1],)]


def test_rows_are_printed_in_colour_and_hold_no_escape_of_the_data(audited):
    _report, gathered = audited
    row, other = shown_rows(gathered, gathered.train, 5)
    assert (row.where, other.where) == ("row 1", "row 2")
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(row)
    text = capture.get()
    assert "\x1b[32m" in text  # green
    assert "\x1b[31m" not in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).replace("|", "")
    assert "<script>alert(1)</script> [bold]x[/bold] \U0001f408 \\x1b[31m" in plain
    assert "The cat↵\n⇥sat.</s>" in plain


def test_the_page_is_one_file_in_which_data_are_text(audited):
    report, gathered = audited
    rows = {"train": shown_rows(gathered, gathered.train, 2)}
    text = page(report, rows, "<b>run</b>")
    assert "<script" not in text
    assert "&lt;b&gt;run&lt;/b&gt;" in text
    assert not re.search(r"(src|href)=", text)
    shown = re.findall(r'<span class="([ls ]*)" title="[\d ]+">(.*?)</span>', text)
    learned = "".join(html.unescape(inner) for kinds, inner in shown if "l" in kinds.split())
    assert learned == "The cat↵⇥sat.</s>c</s>"
    assert text.count("<html") == text.count("</html>") == 1


def test_half_characters_do_not_break_the_page(audited):
    report, _gathered = audited
    page(report, {}, "\ud800").encode()


def test_what_cannot_be_printed_is_spelled_out():
    assert visible("a\n\t b\x00\u200b") == "a↵⇥ b\\x00\\x200b"
