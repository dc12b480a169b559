"""Log-probabilities of tokens, in the two forms of OpenAI's interface."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxadapt.serving.sampling import Scores

Spell = Callable[[int], tuple[str, bool]]
"""Returns the text of one token, and False if its bytes are no whole text: the text is then the vocabulary's name."""

_LEAST = -9999.0  # JSON has no infinity; vLLM writes this number, too


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """The log-probability of one token.

    Attributes:
        token: its id.
        logprob: its log-probability; None for the first token of a prompt, which follows nothing.
        top: (id, log-probability) of the most probable tokens at its place, in descending order.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def token_scores(tokens: Sequence[int], scores: Scores, top: int, first: int = 0) -> Iterator[TokenScore]:
    """Yield the scores of tokens that stand at the places from `first` on, each with `top` others."""
    for place, token in enumerate(tokens, first):
        others = zip(scores.ids[place, :top].tolist(), scores.top[place, :top].tolist(), strict=True)
        yield TokenScore(token, _number(scores.logprobs[place]), tuple((i, _number(x)) for i, x in others))


def _number(logprob: Any) -> float:
    return max(float(logprob), _LEAST)


def completion_logprobs(scores: Sequence[TokenScore], spell: Spell, offset: int) -> dict[str, Any]:
    """Return the field `logprobs` of a completion.

    Args:
        scores: of the choice's tokens, in order.
        spell: the text of a token.
        offset: the place of the first token's text in the choice's text.
    """
    texts = [spell(score.token)[0] for score in scores]
    offsets = [offset + before for before in itertools.accumulate(map(len, texts[:-1]), initial=0)]
    tops: list[dict[str, float] | None] = []
    for score, text in zip(scores, texts, strict=True):
        if score.logprob is None:
            tops.append(None)
            continue
        named = {text: score.logprob}
        for token, logprob in score.top:  # two tokens may have one text; the more probable one is shown
            other = spell(token)[0]
            named[other] = max(logprob, named.get(other, logprob))
        tops.append(named)
    return {
        "tokens": texts, "token_logprobs": [score.logprob for score in scores], "top_logprobs": tops,
        "text_offset": offsets,
    }  # fmt: skip


def chat_logprobs(scores: Sequence[TokenScore], spell: Spell) -> dict[str, Any]:
    """Return the field `logprobs` of a chat."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text, whole = spell(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    content = [
        entry(score.token, score.logprob) | {"top_logprobs": [entry(*each) for each in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}
