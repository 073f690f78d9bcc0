"""The tables: enough values that a model must copy them."""

from halfbyte.demo.tables import TABLES


def test_every_text_column_has_dozens_of_values_and_none_breaks_a_quote():
    for table in TABLES:
        for column in table.columns:
            if column.values is not None:
                assert len(set(column.values)) == len(column.values) >= 48
                assert not any("'" in value for value in column.values)


def test_every_number_can_be_above_and_below():
    for table in TABLES:
        for name in table.numbers:
            column = next(c for c in table.columns if c.name == name)
            low, high, step = column.span
            assert len(range(low, high, step)) >= 40
            assert len(column.says) == len(column.below) == 3
