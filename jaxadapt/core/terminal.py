"""Safe printing of untrusted text (names of tensors and modules, values, a server's messages) on a terminal."""

from __future__ import annotations


def escape_text(text: str, keep: str = "") -> str:
    r"""Return the text with every non-printable character written as an escape sequence.

    A terminal obeys control characters: they move the cursor, change colours or rename the window. Direction marks show
    a name backwards, and zero-width characters make two names look the same.

    Args:
        keep: characters to leave unescaped, such as "\n" in a text of several lines.

    >>> print(escape_text("q\x1b[2J\u202e.weight\n"), escape_text("Gewicht ü × 重み"))
    q\x1b[2J\u202e.weight\n Gewicht ü × 重み
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
