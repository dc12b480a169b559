"""The model card of an adapter (README.md): text from values, and how it meets a card that is there already.

The front matter is what PEFT writes. A card carries the digests of its two parts in its last line, so that one a person
has edited is known and never overwritten: of it, only the front matter gets what it lacks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, cast

from jaxadapt.configs import Config
from jaxadapt.core.errors import ConfigError
from jaxadapt.persistence import consumers

_PIPELINES = {
    "CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering", "FEATURE_EXTRACTION": "feature-extraction",
}  # fmt: skip
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification", "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "FEATURE_EXTRACTION": "AutoModel",
}  # fmt: skip
# Configuration fields worth a line, with the value that says nothing.
FIELDS: dict[str, Any] = {
    "target_parameters": None, "exclude_modules": None, "layers_to_transform": None, "layer_replication": None,
    "r": None, "lora_alpha": None, "use_rslora": False, "lora_dropout": 0.0, "bias": "none", "rank_pattern": {},
    "alpha_pattern": {}, "use_dora": False, "lora_bias": False, "trainable_token_indices": None,
    "modules_to_save": None, "feedforward_modules": None, "num_virtual_tokens": None, "init_lora_weights": True,
    "init_ia3_weights": True, "fan_in_fan_out": False,
}  # fmt: skip
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_MARK = re.compile(r"\n<!-- jaxadapt card ([0-9a-f]{12}) ([0-9a-f]{12}): [^\n]*-->\n?\Z")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WORD = re.compile(r"[A-Za-z][\w./-]*(:[\w./-]+)*")
_NO_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}  # to one YAML or the other


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card says beside the configuration. `nbytes` is the weights' size; `image` a file beside the card."""

    tensors: Mapping[str, tuple[int, ...]]
    dtypes: tuple[str, ...]
    nbytes: int
    repo: str | None = None
    subfolder: str = ""
    license: str | None = None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    image: str | None = None

    @property
    def parameters(self) -> int:
        total = 0
        for shape in self.tensors.values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total


def card_text(config: Config, facts: Facts) -> str:
    """A card in full, with valid front matter."""
    refused = consumers.refusals(config, facts.tensors)
    parts = [*_title(config), *_use(config, facts, bool(refused["vLLM"])), *_what(config, facts)]
    body = "\n".join([*parts, *_readers(config, refused)])
    return _marked(_front(config, facts), body)


def refresh_card(old: str | None, new: str) -> str:
    """What a folder's card becomes when the adapter is saved again: the new one, unless a person wrote in the old."""
    if old is None:
        return new
    front, plain, _, mine = _parts(old)
    return old if not mine else new if plain or front is None else _with_front(front, new)


def merge_card(old: str | None, new: str) -> str:
    """What the Hub's card becomes: as `refresh_card`, but a person's card gets the front matter that it lacks."""
    if old is None:
        return new
    front, _, body, mine = _parts(old)
    if mine:
        return refresh_card(old, new)
    wanted, _, _, _ = _parts(new)
    if front is None:
        return f"---\n{wanted or ''}---\n\n{old.lstrip()}"
    return f"---\n{_with_missing(front, wanted or '')}---\n{body}"


def is_edited(card: str) -> bool:
    """Whether a person wrote in it, or all of it."""
    return not _parts(card)[3]


def size_text(count: int) -> str:
    """
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
    lines = "\n".join(line.rstrip() for line in part.strip().splitlines())
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def _marked(front: str, body: str) -> str:
    body = f"\n{body.strip()}\n"
    mark = f"<!-- jaxadapt card {_digest(front)} {_digest(body)}: written anew until you edit it; then it is yours -->"
    return f"---\n{front}---\n{body}\n{mark}\n"


def _parts(card: str) -> tuple[str | None, bool, str, bool]:
    """Front matter (None: there is none) and whether it is as we wrote it; the rest, and whether that is."""
    card = card.replace("\r\n", "\n")
    head = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$\n?", card, re.S | re.M)
    front, body = (head[1], card[head.end() :]) if head else (None, card)
    mark = _MARK.search(card)
    if mark is None:
        return front, False, body, False
    inner = _MARK.sub("", body)
    return front, front is not None and mark[1] == _digest(front), body, mark[2] == _digest(inner)


def _with_front(front: str, new: str) -> str:
    """The new card; what a person wrote in the old one's front matter stays."""
    wanted, _, body, _ = _parts(new)
    return f"---\n{_with_missing(front, wanted or '')}---\n{body}"


def _with_missing(front: str, wanted: str) -> str:
    """Front matter with the keys, and the tags, that it lacks. Text only, so that nothing in it is reformatted."""
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
    found = re.search(r"^tags[ \t]*:[ \t]*+(\[(?P<row>[^\]\n]*)\])?[ \t]*\n(?P<list>([ \t]*- .*\n)*)", front, re.M)
    if found is None:
        return front  # a form of its own: a person's
    if found["row"] is not None:
        have = [t.strip().strip("\"'") for t in found["row"].split(",")]
        more = [t for t in tags if t not in have]
        row = ", ".join([*filter(None, [found["row"].strip()]), *more])
        return front[: found.start("row")] + row + front[found.end("row") :]
    items = found["list"]
    have = [line.strip().removeprefix("- ").strip().strip("\"'") for line in items.splitlines()]
    indent = re.match(r"[ \t]*", items)
    pad = indent[0] if indent else ""
    more = "".join(f"{pad}- {t}\n" for t in tags if t not in have)
    return front[: found.end("list")] + more + front[found.end("list") :]


# ---------------------------------------------------------------- what it says


def _plain(value: str) -> str:
    """A YAML scalar that is this text."""
    return value if _WORD.fullmatch(value) and value.lower() not in _NO_WORDS else json.dumps(value)


def _base(config: Config) -> str | None:
    """The base model, if it is one of the Hub: a path on somebody's disk is no name for others."""
    base = config.base_model_name_or_path
    return base if base and _HUB_NAME.fullmatch(base) and ".." not in base else None


def _front(config: Config, facts: Facts) -> str:
    base = _base(config)
    lines = [f"base_model: {_plain(base)}"] if base else []
    lines += ["library_name: peft"]
    if facts.license:
        lines.append(f"license: {_plain(facts.license)}")
    pipeline = _PIPELINES.get(config.task_type or "")
    if pipeline:
        lines.append(f"pipeline_tag: {pipeline}")
    tags = [f"base_model:adapter:{base}"] if base else []
    lines += ["tags:", *(f"- {_plain(t)}" for t in [*tags, config.peft_type.lower(), "jax", "jaxadapt"])]
    return "\n".join(lines) + "\n"


def _title(config: Config) -> list[str]:
    base = _base(config)
    of = f" for [{base}](https://huggingface.co/{base})" if base else ""
    return [
        f"# {config.peft_type} adapter{f' for {base}' if base else ''}",
        "",
        f"An adapter{of} in PEFT's format, saved by jaxadapt: it loads in JAX and in PyTorch.",
        "",
    ]


def _use(config: Config, facts: Facts, refused: bool) -> list[str]:
    base = _base(config)
    below = f"/{facts.subfolder}" if facts.subfolder else ""
    here = json.dumps(f"hf://{facts.repo}{below}" if facts.repo else "path/to/this/folder")
    there = json.dumps(facts.repo or "path/to/this/folder")
    there += f", subfolder={json.dumps(facts.subfolder)}" if facts.repo and facts.subfolder else ""
    name = _CLASSES.get(config.task_type or "")
    if base and name:
        torch = [
            "from peft import PeftModel",
            f"from transformers import {name}",
            "",
            f"base_model = {name}.from_pretrained({json.dumps(base)})",
        ]
    else:
        torch = ["from peft import PeftModel", ""]
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
        *torch,
        f"model = PeftModel.from_pretrained(base_model, {there})",
        "```",
        "",
        *([] if refused else _vllm(config, facts, base)),
    ]


def _vllm(config: Config, facts: Facts, base: str | None) -> list[str]:
    where = facts.repo or "path/to/this/folder"
    called = (facts.subfolder or where).rpartition("/")[2]
    if facts.repo and facts.subfolder:
        where = f"$(jaxadapt pull {facts.repo}/{facts.subfolder})"
    rank = max(config.get("r") or 0, *(config.get("rank_pattern") or {"": 0}).values())
    room = next((r for r in _VLLM_RANKS if r >= rank), rank)
    more = f" --max-lora-rank {room}" if rank > 16 else ""
    return [
        "In vLLM:",
        "",
        "```bash",
        f"vllm serve {base or 'path/to/the/base/model'} --enable-lora{more} --lora-modules {called}={where}",
        "```",
        "",
    ]


def _what(config: Config, facts: Facts) -> list[str]:
    rows = [("method", config.peft_type + (f", {config.task_type}" if config.task_type else ""))]
    target = config.get("target_modules")
    if target is not None:
        rows.append(("target_modules", target if isinstance(target, str) else ", ".join(sorted(target))))
    values = config.to_dict()
    rows += [(k, _value(values[k])) for k, plain in FIELDS.items() if k in values and values[k] != plain]
    size = f"{facts.parameters:,} parameters in {len(facts.tensors)} tensors, {'/'.join(facts.dtypes)}"
    rows.append(("size", f"{size}, {size_text(facts.nbytes)}"))
    lines = ["## What it is", "", *_table(("setting", "value"), rows)]
    if facts.metrics:
        results = [(name, _value(_plain_number(name, value))) for name, value in facts.metrics.items()]
        lines += ["## Results", "", *_table(("metric", "value"), results)]
    if facts.image:
        alt = "How much the adapter changes each weight, layer by module"
        lines += ["## How much it changes", "", f"![{alt}]({facts.image})", "", *_explained(config), ""]
    return lines


def _explained(config: Config) -> list[str]:
    if config.peft_type != "LORA":
        return ["Layer by module: how far the trained factors are from 1, which would change nothing."]
    return [
        "Layer by module: how much is added to each weight (Frobenius norm), in how many directions (effective rank)."
    ]


def _readers(config: Config, refused: Mapping[str, list[str]]) -> list[str]:
    found = {reader: why for reader, why in refused.items() if why}
    if not found:
        return []
    lines = ["## Who cannot read it as it is", ""]
    lines += [f"- {reader}: {'; '.join(map(_reason, why))}" for reader, why in found.items()]
    scales = [f"`{name}`" for name in ("use_rslora", "alpha_pattern", "rank_pattern") if config.get(name)]
    if config.peft_type == "LORA" and scales and not config.get("use_dora"):
        way = f"multiplies the scales into B, and {' and '.join(scales)} {'are' if scales[1:] else 'is'} gone."
        lines += ["", f"`jaxadapt.merging.resize_rank(adapter, r)` with its largest rank {way}"]
    return [*lines, ""]


def _reason(why: str) -> str:
    name, _, effect = why.partition(": ")
    return f"`{name}` ({effect})" if effect else why


def _plain_number(name: str, value: Any) -> Any:
    """A metric as JSON has it: of arrays, numpy's or JAX's, the one number that they hold."""
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


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    def cell(value: str) -> str:
        return value.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")

    lines = [f"| {cell(a)} | {cell(b)} |" for a, b in rows]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *lines, ""]
