import pytest

from halfbyte.errors import ConfigError
from halfbyte.plan.cards import CARDS, card_bytes, parse_size, usable_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GiB", 24 * GIB), ("24", 24 * GIB), ("8 gb", 8 * 10**9), ("512MiB", GIB // 2)],
)
def test_sizes_are_read(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["much", "", "0", "-3GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="24GiB"):
        parse_size(text)


def test_cards_are_known_by_name():
    assert card_bytes("RTX 4090") == 24 * GIB
    with pytest.raises(ConfigError, match="rtx9999"):
        card_bytes("rtx9999")
    assert all(4 < size < 200 for size in CARDS.values())


def test_the_context_and_slack_are_taken_off():
    assert usable_bytes(24 * GIB) < 23 * GIB
    assert usable_bytes(0) == 0
