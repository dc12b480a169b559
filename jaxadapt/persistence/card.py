"""The model card of an adapter (README.md): its text, and its merge with an existing card.

The front matter is the same as PEFT's. The last line of a card stores digests of its two parts. They show if a person
edited the card; an edited card is never overwritten, and only missing front matter is added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxadapt.arrays.tensor_source import Kinds
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import ConfigError
from jaxadapt.persistence import consumers
from jaxadapt.storage.location import HubAddress

_PIPELINES = {
    "CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering", "FEATURE_EXTRACTION": "feature-extraction",
}  # fmt: skip
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification", "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "FEATURE_EXTRACTION": "AutoModel",
}  # fmt: skip
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_MARK = re.compile(r"\n<!-- jaxadapt card ([0-9a-f]{12}) ([0-9a-f]{12}): [^\n]*-->\n?\Z")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WORD = re.compile(r"[A-Za-z][\w./-]*(:[\w./-]+)*")
_NO_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}  # not strings in YAML 1.1 or 1.2


@dataclasses.dataclass(frozen=True)
class Card:
    """Texts and results for a model card, which states the facts of the adapter's files by itself.

    Args:
        license: the license, such as "apache-2.0".
        metrics: `{name: value}` of results.
        picture: True for a picture of how much each weight is changed; None: if matplotlib is installed.

    >>> Card(metrics={"loss": 3.2})
    Card(license=None, metrics={'loss': 3.2}, picture=None)
    """

    license: str | None = None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    picture: bool | None = None


def card_text(
    config: Config,
    tensors: Kinds,
    nbytes: int,
    page: Card,
    place: HubAddress | None = None,
    image: str | None = None,
) -> str:
    """Return a complete card, with valid front matter.

    Args:
        config: the configuration.
        tensors: those of the file.
        nbytes: the size of the weights' file in bytes.
        page: what the card says beside the facts of the files.
        place: the repository that the card is for, if there is one.
        image: the name of an image file beside the card.
    """
    readers = consumers.judge_readers(config, tensors)
    refused = any(reader.name == "vLLM" and reader.verdict != consumers.RIGHT for reader in readers)
    base = _base(config)
    title, link = (f" for {base}", f" for [{base}](https://huggingface.co/{base})") if base else ("", "")
    lines = [
        f"# {config.peft_type} adapter{title}",
        "",
        f"An adapter{link} in PEFT's format, saved by jaxadapt: it loads in JAX and in PyTorch.",
        "",
        *_usage(config, place, refused),
        *_settings(config, tensors, nbytes, page, image),
        *_readers(readers),
    ]
    text = "\n".join(lines).strip()
    front, body = _front_matter(config, page.license), f"\n{text}\n"
    mark = f"<!-- jaxadapt card {_digest(front)} {_digest(body)}: written anew until you edit it; then it is yours -->"
    return f"---\n{front}---\n{body}\n{mark}\n"


def refresh_card(old: str | None, new: str) -> str:
    """Return a folder's card after another save: the new card, unless a person edited the old one."""
    return old if old is not None and is_edited(old) else merge_card(old, new)


def merge_card(old: str | None, new: str) -> str:
    """Return the Hub's card after an upload: like `refresh_card`, but add missing front matter to an edited card."""
    if old is None:
        return new
    front, front_is_ours, body, body_is_ours = _parts(old)
    if body_is_ours and (front_is_ours or front is None):
        return new
    wanted, _, new_body, _ = _parts(new)
    if front is None:
        return f"---\n{wanted or ''}---\n\n{old.lstrip()}"
    return f"---\n{_with_missing(front, wanted or '')}---\n{new_body if body_is_ours else body}"


def is_edited(card: str) -> bool:
    """Return True if a person wrote the card or edited its body."""
    return not _parts(card)[3]


def size_text(count: int) -> str:
    """Return a number of bytes as text.

    >>> size_text(9_820_000), size_text(12)
    ('9.8 MB', '12 bytes')
    """
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "bytes" else f"{count} bytes"


# ---------------------------------------------------------------- a card's parts


def _digest(part: str) -> str:
    return hashlib.sha256("\n".join(map(str.rstrip, part.strip().splitlines())).encode()).hexdigest()[:12]


def _parts(card: str) -> tuple[str | None, bool, str, bool]:
    """Split a card: front matter (or None), True if it is unedited, the body, True if the body is unedited."""
    card = card.replace("\r\n", "\n")
    head = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$\n?", card, re.S | re.M)
    front, body = (head[1], card[head.end() :]) if head else (None, card)
    mark = _MARK.search(card)
    if mark is None:
        return front, False, body, False
    return front, front is not None and mark[1] == _digest(front), body, mark[2] == _digest(_MARK.sub("", body))


def _with_missing(front: str, wanted: str) -> str:
    """Add missing keys and tags to front matter. Works on the text, so that the rest is not reformatted."""
    blocks = re.split(r"^(?=[A-Za-z_])", wanted, flags=re.M)
    have = set(re.findall(r"^([A-Za-z_][\w-]*)[ \t]*:", front, re.M))
    front = front if not front or front.endswith("\n") else f"{front}\n"
    for block in filter(None, blocks):
        name = block.split(":")[0]
        if name not in have:
            front += block
        elif name == "tags":
            front = _with_tags(front, re.findall(r"^- (.*)$", block, re.M))
    return front


def _with_tags(front: str, tags: list[str]) -> str:
    match = re.search(r"^tags[ \t]*:[ \t]*+(\[(?P<row>[^\]\n]*)\])?[ \t]*\n(?P<list>([ \t]*- .*\n)*)", front, re.M)
    if match is None:
        return front  # another form, which a person wrote
    if match["row"] is not None:
        have = [t.strip().strip("\"'") for t in match["row"].split(",")]
        row = ", ".join([*filter(None, [match["row"].strip()]), *(t for t in tags if t not in have)])
        return front[: match.start("row")] + row + front[match.end("row") :]
    items = match["list"]
    have = [line.strip().removeprefix("- ").strip().strip("\"'") for line in items.splitlines()]
    pad = items[: len(items) - len(items.lstrip(" \t"))]
    missing = "".join(f"{pad}- {t}\n" for t in tags if t not in have)
    return front[: match.end("list")] + missing + front[match.end("list") :]


# ---------------------------------------------------------------- its text


def _plain(value: str) -> str:
    """Return a text as a YAML scalar."""
    return value if _WORD.fullmatch(value) and value.lower() not in _NO_WORDS else json.dumps(value)


def _base(config: Config) -> str | None:
    """Return the base model if it is a name on the Hub; a local path means nothing to other readers."""
    base = config.base_model_name_or_path
    return base if base and _HUB_NAME.fullmatch(base) and ".." not in base else None


def _front_matter(config: Config, license_name: str | None) -> str:
    base, pipeline = _base(config), _PIPELINES.get(config.task_type or "")
    fields = {"base_model": base, "library_name": "peft", "license": license_name, "pipeline_tag": pipeline}
    tags = [*([f"base_model:adapter:{base}"] if base else []), config.peft_type.lower(), "jax", "jaxadapt"]
    lines = [f"{name}: {_plain(value)}" for name, value in fields.items() if value]
    return "\n".join([*lines, "tags:", *(f"- {_plain(tag)}" for tag in tags)]) + "\n"


def _usage(config: Config, place: HubAddress | None, refused: bool) -> list[str]:
    base = _base(config)
    here = there = json.dumps("path/to/this/folder")
    if place is not None:
        here = json.dumps(str(place._replace(revision=None)))
        there = json.dumps(place.repo) + (f", subfolder={json.dumps(place.subfolder)}" if place.subfolder else "")
    name = _CLASSES.get(config.task_type or "")
    load_base = f"from transformers import {name}\n\nbase_model = {name}.from_pretrained({json.dumps(base)})"
    return [
        "## Use it",
        "",
        "In JAX (`pip install jaxadapt`), into a Flax model of the base:",
        "",
        "```python",
        "import jaxadapt",
        "",
        f"model = jaxadapt.load({here}, model)  # NNX, in place",
        f'variables = jaxadapt.load({here}, {{"params": params}})  # Linen',
        "```",
        "",
        "In PyTorch (`pip install peft`):",
        "",
        "```python",
        "from peft import PeftModel",
        load_base if base and name else "",
        f"model = PeftModel.from_pretrained(base_model, {there})",
        "```",
        "",
        *([] if refused else _vllm(config, place, base)),
    ]


def _vllm(config: Config, place: HubAddress | None, base: str | None) -> list[str]:
    source, subfolder = ("path/to/this/folder", "") if place is None else (place.repo, place.subfolder)
    called = (subfolder or source).rpartition("/")[2]
    if subfolder:
        source = f"$(jaxadapt pull {source}/{subfolder})"
    rank = config.largest_rank if isinstance(config, LoraConfig) else 0
    option = f" --max-lora-rank {next((r for r in _VLLM_RANKS if r >= rank), rank)}" if rank > 16 else ""
    return [
        "In vLLM:",
        "",
        "```bash",
        f"vllm serve {base or 'path/to/the/base/model'} --enable-lora{option} --lora-modules {called}={source}",
        "```",
        "",
    ]


def _settings(config: Config, tensors: Kinds, nbytes: int, page: Card, image: str | None) -> list[str]:
    rows = [("method", config.peft_type + (f", {config.task_type}" if config.task_type else ""))]
    target = config.get("target_modules")
    if target is not None:
        rows.append(("target_modules", target if isinstance(target, str) else ", ".join(sorted(target))))
    rows += [(name, _value(value)) for name, value in config.shown_fields().items()]
    size = f"{sum(math.prod(shape) for _, shape in tensors.values()):,} parameters in {len(tensors)} tensors"
    dtypes = "/".join(sorted({dtype for dtype, _ in tensors.values()}))
    rows.append(("size", f"{size}, {dtypes}, {size_text(nbytes)}"))
    lines = ["## What it is", "", *_table(("setting", "value"), rows)]
    if page.metrics:
        results = [(name, _value(_plain_number(name, value))) for name, value in page.metrics.items()]
        lines += ["## Results", "", *_table(("metric", "value"), results)]
    if image:
        from jaxadapt.methods.registry import METHODS  # imports JAX, which a card without a picture does not need

        method, alt = METHODS.get(config.peft_type), "How much the adapter changes each weight, layer by module"
        what = None if method is None else method.describe_change(config)
        caption = f"Layer by module: how much each weight changes{f' ({what})' if what else ''}."
        lines += ["## How much it changes", "", f"![{alt}]({image})", "", caption, ""]
    return lines


def _readers(readers: Sequence[consumers.Reader]) -> list[str]:
    """List the programs that read the adapter rightly, and the others with the reasons and the ways out."""
    right = [reader.name for reader in readers if reader.verdict == consumers.RIGHT]
    lines = ["## Who reads it", ""]
    lines += [f"As it is: {', '.join(right)}.", ""] if right else []
    rows = [
        (names, consumers.WORDS[verdict], "; ".join(map(_reason, reasons)), _code(remedy))
        for verdict, names, reasons, remedy in consumers.grouped(readers)
    ]
    lines += _table(("program", "what it does", "why", "what helps"), rows)
    return [*lines, f"These rules hold for {', '.join(f'{reader.name} ({reader.version})' for reader in readers)}.", ""]


def _code(remedy: str) -> str:
    """Return a way out with its commands as code."""
    steps = (step.partition(": ") for step in remedy.split("; then "))
    return "; then ".join(f"`{command}`{colon}{rest}" for command, colon, rest in steps) if remedy else ""


def _reason(reason: str) -> str:
    name, _, effect = reason.partition(": ")
    return f"`{name}`: {effect}" if "=" in name or name.isidentifier() else reason


def _plain_number(name: str, value: Any) -> Any:
    """Return a metric as a JSON value; convert a numpy or JAX array of one number to that number."""
    if value is None or isinstance(value, str | int | float | list | tuple | dict):
        return cast("Any", value)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metrics: {name}: expected a number or text, found {type(value).__name__}") from error


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    def cell(value: str) -> str:
        return value.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")

    lines = [f"| {' | '.join(map(cell, row))} |" for row in (head, *rows)]
    return [lines[0], f"|{'---|' * len(head)}", *lines[1:], ""]
