from halfbyte.data.notes import Note


def test_marks_keep_their_values_as_caches_hold_them():
    assert [int(note) for note in Note] == [1 << bit for bit in range(10)]
    assert Note.NONE == 0
    assert Note.EOS_APPENDED == 1
    assert Note.UNKNOWN_SPECIAL == 512
