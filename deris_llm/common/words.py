"""Numbers and nouns in messages."""


def count_of(number: int, noun: str) -> str:
    """Says how many: `1 phrase`, `2,300 phrases`.

    Args:
        number: at least 0.
        noun: in the singular; its plural ends in s or, after a consonant and y, in ies.
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1]}ies" if noun.endswith(("ry", "ty")) else f"{number:,} {noun}s"
