"""Text from tokens, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # what a decoder writes for a character whose bytes are not all there


class TextStream:
    """The text of growing tokens. A piece is returned when later tokens cannot change or end it.

    Args:
        decode: returns the text of token ids.
        stop: strings that end the text, which does not contain them.

    Attributes:
        stopped: True after a stop string.

    >>> stream = TextStream(lambda ids: "".join(map(chr, ids)), ["END"])
    >>> [stream.push(ord(c)) for c in "a EaEND"], stream.stopped
    (['a', ' ', '', 'Ea', '', '', ''], True)
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, [text for text in stop if text]
        self._ids: list[int] = []
        self._begin = 0  # ids before it are decoded for good; those from it on give the next characters their context
        self._read = 0  # ids before it are in the text
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now."""
        self._ids.append(token)
        before = self._decode(self._ids[self._begin : self._read])
        now = self._decode(self._ids[self._begin :])
        if now.endswith(INCOMPLETE) or len(now) <= len(before):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :], final=False)

    def finish(self) -> str:
        """Return the rest of the text; no token follows."""
        before = self._decode(self._ids[self._begin : self._read])
        return self._release(self._decode(self._ids[self._begin :])[len(before) :], final=True)

    def _release(self, text: str, *, final: bool) -> str:
        held = self._held + text
        ends = [place for place in (held.find(stop) for stop in self._stop) if place >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return held[: min(ends)]
        kept = 0 if final else max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of a stop string, but not all of it, that a text ends in.

    >>> _overlap("the EN", "END"), _overlap("the", "END")
    (2, 0)
    """
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
