"""A journal remembers what is whole, for the same purpose only."""

import json

from halfbyte.checkpoint.journal import JOURNAL_FILE, Journal


def test_entries_are_found_again_for_the_same_purpose(tmp_path):
    journal = Journal(tmp_path, {"what": "merge", "sizes": (1, 2)})
    journal.add({"file": "a"})
    journal.add({"file": "b"})
    again = Journal(tmp_path, {"what": "merge", "sizes": (1, 2)})
    assert again.entries == [{"file": "a"}, {"file": "b"}]
    assert Journal(tmp_path, {"what": "another"}).entries == []
    assert Journal(tmp_path, {"what": "merge", "sizes": (1, 2)}).entries == []


def test_what_a_crash_tore_is_ignored_and_written_over(tmp_path):
    journal = Journal(tmp_path, {"what": "merge"})
    journal.add({"file": "a"})
    with journal.path.open("a") as file:
        file.write('{"file": "b"')
    again = Journal(tmp_path, {"what": "merge"})
    assert again.entries == [{"file": "a"}]
    again.add({"file": "c"})
    lines = (tmp_path / JOURNAL_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"what": "merge"}, {"file": "a"}, {"file": "c"}]


def test_a_damaged_journal_is_an_empty_one(tmp_path):
    (tmp_path / JOURNAL_FILE).write_bytes(b"\xff\xfe{}\n")
    assert Journal(tmp_path, {"what": "merge"}).entries == []


def test_entries_can_be_forgotten(tmp_path):
    journal = Journal(tmp_path, {})
    journal.add({"file": "a"})
    journal.add({"file": "b"})
    journal.keep(1)
    assert Journal(tmp_path, {}).entries == [{"file": "a"}]
