"""Regular expressions of names with holes, such as `layers.{l}.{path}.kernel`."""

from __future__ import annotations

import re
from collections.abc import Mapping

_HOLE = re.compile(r"(\{\w+\})")


def template_regex(template: str, names: Mapping[str, tuple[str, ...]]) -> re.Pattern[str]:
    """Return the expression of a text with holes: digits, any path for `{path}`, or one of the names of a hole."""
    seen: set[str] = set()

    def part_regex(text: str) -> str:
        name = text[1:-1]
        if not text.startswith("{"):
            return re.escape(text)
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        default = ".+" if name == "path" else r"\d+"
        return f"(?P<{name}>{'|'.join(map(re.escape, names[name])) if name in names else default})"

    return re.compile("".join(map(part_regex, _HOLE.split(template))))


def name_regex(template: str) -> str:
    """Return the regular expression of a name with holes for numbers, which excludes leading zeros.

    Without leading zeros, no two names denote the same expert.

    >>> [bool(re.fullmatch(name_regex("experts.{e}.w1"), f"experts.{e}.w1")) for e in ("0", "12", "012")]
    [True, True, False]
    """
    return "".join(
        rf"(?P<{p[1:-1]}>0|[1-9][0-9]*)" if p.startswith("{") else re.escape(p) for p in _HOLE.split(template)
    )
