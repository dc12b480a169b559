"""Text that somebody else wrote, as a terminal may show it: names of tensors and modules, values, a server's words."""

from __future__ import annotations


def escape_text(text: str, keep: str = "") -> str:
    r"""The text with everything that is no letter, sign or blank written out.

    A terminal obeys control characters: they move the cursor, colour, rename the window. Marks of direction show a
    name backwards, and those without width make two names look like one.

    Args:
        keep: characters that stay as they are: "\n" in a text of several lines.

    >>> print(escape_text("q\x1b[2J\u202e.weight\n"), escape_text("Gewicht ü × 重み"))
    q\x1b[2J\u202e.weight\n Gewicht ü × 重み
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
