import pytest

from deris_llm.common.words import count_of


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [(0, "phrase", "0 phrases"), (1, "entry", "1 entry"), (2, "entry", "2 entries"), (12345, "image", "12,345 images")],
)
def test_count_of(number, noun, said):
    assert count_of(number, noun) == said
