"""Configuration classes: PEFT's fields, defaults and text; 229 real files; refused values and their errors."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

import jaxadapt
from jaxadapt import ConfigError, IA3Config, LoraConfig
from jaxadapt.configs import lora
from jaxadapt.configs.base import Config, GenericConfig, loads
from jaxadapt.configs.frozen import FrozenDict, freeze, thaw
from tests.support.configs import CLASSES

ROOT = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("JAXADAPT_REAL_ADAPTERS") or ROOT.parent / "shared" / "real-adapters") / "configs"


# ---- beside PEFT


@pytest.mark.peft
def test_fields_and_defaults_are_pefts():
    peft = pytest.importorskip("peft")
    for ours, theirs in ((LoraConfig(), peft.LoraConfig()), (IA3Config(), peft.IA3Config())):
        expected = theirs.to_dict()
        got = ours.to_dict()
        assert {**got, "peft_version": None} == {**expected, "peft_version": None}
        assert {key: type(value) for key, value in got.items() if key != "peft_type"} == {
            key: type(value) for key, value in expected.items() if key != "peft_type"
        }


@pytest.mark.peft
def test_every_types_fields_and_defaults_are_pefts():
    mapping = pytest.importorskip("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    absent = {"runtime_config"}  # where PEFT computes; no file has it
    own = {"extra", "peft_version", "peft_type"}  # keys of other versions; what PEFT fills in as it saves

    def defaults(kind: Any) -> dict[str, Any]:
        out = {}
        for field in dataclasses.fields(kind):
            made = field.default_factory is not dataclasses.MISSING
            value = field.default_factory() if made else field.default
            out[field.name] = value.value if isinstance(value, enum.Enum) else value
        return {name: dict(x) if isinstance(x, Mapping) else x for name, x in out.items()}

    compared = 0
    for theirs in mapping.values():
        ours = getattr(jaxadapt, theirs.__name__, None)
        if ours is None:  # a type without a class here is read and written as a `Config`
            continue
        got, want = defaults(ours), defaults(theirs)
        assert set(got) - own == set(want) - own - absent, theirs
        differ = {x: (got[x], want[x]) for x in set(got) - own if got[x] != want[x]}
        assert differ in ({}, {"token_indices": ((), [])}), theirs
        compared += 1
    assert compared == 37


LORA_CASES: tuple[dict[str, Any], ...] = (
    {},
    {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"], "lora_dropout": 0.05, "task_type": "CAUSAL_LM"},
    {"lora_alpha": 8.0, "target_modules": r".*\.(q|v)_proj$", "bias": "lora_only", "use_rslora": True},
    {"target_modules": "all-linear", "exclude_modules": ["lm_head"], "use_dora": True, "revision": "main"},
    {
        "rank_pattern": {r"^model\.layers\.1\.": 2, "q_proj": 4},
        "alpha_pattern": {"v": 1.5},
        "lora_dropout": 0,
    },
    {
        "target_modules": ["a"],
        "layers_to_transform": [1, 2],
        "layers_pattern": ["h"],
        "modules_to_save": ["z", "y"],
    },
    {
        "target_modules": ["a"],
        "layers_to_transform": 3,
        "layers_pattern": "h",
        "init_lora_weights": "pissa_niter_4",
    },
    {"trainable_token_indices": {"embed": [5, 1]}, "layer_replication": [(0, 4), (2, 5)], "lora_bias": True},
    {"target_parameters": ["experts.down"], "trainable_token_indices": [3, 1], "ensure_weight_tying": True},
    {"auto_mapping": {"base_model_class": "Ünit", "parent_library": "x"}, "base_model_name_or_path": "a/b"},
    {
        "kasa_config": {"beta": 0.5, "gamma": 0.25},
        "init_lora_weights": "gaussian",
        "alora_invocation_tokens": [1],
    },
)


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fields", LORA_CASES)
def test_lora_text_is_pefts(fields: dict[str, Any], tmp_path: Path):
    peft = pytest.importorskip("peft")
    peft.LoraConfig(**fields, peft_version="0.21.2").save_pretrained(tmp_path)
    _same_text(LoraConfig(**fields), tmp_path)


@pytest.mark.peft
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": ["k", "v", "down"], "feedforward_modules": ["down"], "modules_to_save": ["head"]},
        {
            "target_modules": ".*k",
            "feedforward_modules": ".*down",
            "fan_in_fan_out": True,
            "init_ia3_weights": False,
        },
    ],
)
def test_ia3_text_is_pefts(fields: dict[str, Any], tmp_path: Path):
    peft = pytest.importorskip("peft")
    peft.IA3Config(**fields, peft_version="0.21.2").save_pretrained(tmp_path)
    _same_text(IA3Config(**fields), tmp_path)


def _same_text(config: Config, folder: Path) -> None:
    text = (folder / "adapter_config.json").read_text()
    read = loads(text)
    # PEFT writes sets in random order, so ours is compared through what was read: it keeps that order.
    assert read == config
    assert read.to_json() == text
    written = json.loads(config.to_json())
    for key, value in json.loads(text).items():
        if key in ("target_modules", "exclude_modules", "feedforward_modules") and isinstance(value, list):
            assert set(written.pop(key)) == set(value)
        else:
            assert written.pop(key) == value
    assert not written


@pytest.mark.peft
@pytest.mark.parametrize("config", [LoraConfig(target_modules=["b", "a"], r=4), IA3Config(target_modules=["k"])])
def test_peft_reads_ours(config: Config, tmp_path: Path):
    peft = pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text(config.to_json())
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path)).to_dict()
    assert Config.from_dict({k: list(v) if isinstance(v, set) else v for k, v in theirs.items()}) == config


@pytest.mark.peft
def test_patterns_stay_in_order_where_it_may_matter(tmp_path: Path):
    """PEFT tries patterns in the given order but sorts them in its file, which changes their meaning."""
    peft = pytest.importorskip("peft")
    patterns = {"z.*": 2, "a.*|z": 4}
    peft.LoraConfig(rank_pattern=patterns).save_pretrained(tmp_path)
    sorted_ = peft.PeftConfig.from_pretrained(str(tmp_path)).rank_pattern
    ours, theirs = (LoraConfig(rank_pattern=x) for x in (patterns, sorted_))
    assert list(ours.rank_pattern) == list(patterns) != list(theirs.rank_pattern) == list(sorted_)
    assert ours != theirs
    assert ours.changed_keys(theirs) == ["rank_pattern"]
    for again in (loads(ours.to_json()), ours.replace(r=8), pickle.loads(pickle.dumps(ours))):
        assert again == ours
        assert list(again.rank_pattern) == list(patterns)
    (tmp_path / "adapter_config.json").write_text(ours.to_json())
    assert list(peft.PeftConfig.from_pretrained(str(tmp_path)).rank_pattern) == list(patterns)


# ---- real files


@pytest.mark.skipif(not REAL.is_dir(), reason="the collection of real files is not here")
def test_every_real_file_is_read_or_refused():
    outcomes: Counter[str] = Counter()
    for path in sorted(REAL.glob("*.json")):
        text = path.read_bytes()
        try:
            config = loads(text, path.name)
        except ConfigError as error:
            message = str(error)
            assert message.startswith(f"{path.name}: expected")
            kinds = {"Git LFS": "LFS pointer", "mlx-lm": "mlx-lm", "peft_type, found none": "no peft_type"}
            outcomes[next(kind for part, kind in kinds.items() if part in message)] += 1
            continue
        outcomes[type(config).__name__] += 1
        once = config.to_json()
        assert loads(once) == config
        assert loads(once).to_json() == once
        written = json.loads(once)
        for key, value in json.loads(text).items():
            if key == "target_modules" and isinstance(value, list):
                assert set(written[key]) == set(value)
            assert json.dumps(written[key], sort_keys=True) == json.dumps(value, sort_keys=True), (
                path.name,
                key,
            )
    refused = {"mlx-lm": 8, "no peft_type": 3, "LFS pointer": 1}
    assert sum(outcomes.values()) >= 229
    if sum(outcomes.values()) == 229:
        # Each type with a class of its own takes files from the generic one.
        others = sum(n for kind, n in outcomes.items() if kind not in ("LoraConfig", "IA3Config", *refused))
        assert outcomes == outcomes | {"LoraConfig": 125, "IA3Config": 3, **refused}
        assert others == 89


# ---- frozen, hashable, equal where the mathematics is


def test_a_configuration_is_frozen_through_and_through():
    config = LoraConfig(
        target_modules={"v", "q"},
        modules_to_save=["b", "a"],
        rank_pattern={"q": 2},
        extra={"x": [{"y": [1]}]},
    )
    assert config.target_modules == ("q", "v")
    assert config.modules_to_save == ("b", "a")
    assert isinstance(config.rank_pattern, FrozenDict)
    assert config.extra["x"][0]["y"] == (1,)
    with pytest.raises(AttributeError):
        setattr(config, "r", 4)  # noqa: B010 (a type checker refuses the plain form)
    with pytest.raises(AttributeError):
        setattr(config.rank_pattern, "z", 4)  # noqa: B010
    with pytest.raises(TypeError):
        cast("Any", config.rank_pattern)["z"] = 4


def test_what_is_given_is_not_shared():
    patterns, names = {"q": 2}, ["a"]
    config = LoraConfig(rank_pattern=patterns, target_modules=names)
    patterns["z"] = 9
    names.append("b")
    assert config.rank_pattern == {"q": 2}
    assert config.target_modules == ("a",)
    config.to_dict()["rank_pattern"]["z"] = 9
    assert config.rank_pattern == {"q": 2}


def test_equality_is_of_the_mathematics():
    config = LoraConfig(r=4, target_modules=["a", "b"], rank_pattern={"a": 1, "b": 2})
    same = config.replace(
        base_model_name_or_path="x", revision="y", inference_mode=True, task_type="CAUSAL_LM",
        peft_version=None, auto_mapping={"a": 1}, target_modules=["b", "a"], rank_pattern={"b": 2, "a": 1},
        lora_alpha=8.0,
    )  # fmt: skip
    assert config == same
    assert hash(config) == hash(same)
    for change in (
        {"r": 5},
        {"lora_alpha": 9},
        {"rank_pattern": {"a": 2}},
        {"extra": {"new": 1}},
        {"bias": "all"},
    ):
        assert config != config.replace(**change)
    assert LoraConfig() != IA3Config()
    assert LoraConfig() != "LORA"
    generic = GenericConfig(peft_type="XLORA", extra={"target_modules": ["a", "b"]})
    assert generic == generic.replace(extra={"target_modules": ["b", "a"]})
    assert generic != generic.replace(peft_type="SHADOW")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["b", "a"], rank_pattern={"q": 2}, extra={"k": [1, {"z": None}]}),
        IA3Config(target_modules="x"),
        GenericConfig(peft_type="XLORA", extra={"r": 2}),
    ],
)
def test_copies_and_pickles(config: Config):
    hash(config)  # fills the cache, which must not travel
    for other in (
        pickle.loads(pickle.dumps(config)),
        copy.copy(config),
        copy.deepcopy(config),
        config.replace(),
    ):
        assert other == config
        assert hash(other) == hash(config)
        assert other.to_json() == config.to_json()
    assert b"_identity" not in pickle.dumps(config)


def test_a_frozen_dict_is_a_mapping():
    d = FrozenDict({"b": [1], "a": {"c": {2, 1}}})
    assert list(d) == ["a", "b"]
    assert d == {"a": {"c": (1, 2)}, "b": (1,)}
    assert d != {"a": 1}
    assert d != 3
    assert thaw(d) == {"a": {"c": [1, 2]}, "b": [1]}
    assert pickle.loads(pickle.dumps(d)) == d
    assert copy.deepcopy(d) is d
    with pytest.raises(AttributeError):
        delattr(d, "_items")
    for bad in ({1: 2}, {"a": float("nan")}, {"a": object()}):
        with pytest.raises(TypeError):
            freeze(bad)


def test_the_targets_are_named_before_the_bias():
    config = jaxadapt.VeraConfig(target_modules=["q"], bias="all")
    assert repr(config) == "VeraConfig(target_modules=['q'], bias='all')"


def test_enums_that_are_strings_become_strings():
    import enum

    class Task(str, enum.Enum):
        CAUSAL_LM = "CAUSAL_LM"

    assert type(LoraConfig(task_type=Task.CAUSAL_LM).task_type) is str


def test_replace_checks_and_names_unknown_fields():
    with pytest.raises(ConfigError, match="no field 'rank'; it is called r"):
        LoraConfig().replace(rank=3)
    with pytest.raises(ConfigError, match="r: expected a positive integer, found 0"):
        LoraConfig().replace(r=0)


def test_numbers_keep_their_kind():
    config = loads('{"peft_type": "LORA", "lora_alpha": 8.0, "lora_dropout": 0, "new": 1.0}')
    assert '"lora_alpha": 8.0' in config.to_json()
    assert '"lora_dropout": 0,' in config.to_json()
    assert '"new": 1.0' in config.to_json()


def test_unknown_keys_are_kept_on_top():
    text = '{"peft_type": "LORA", "enable_lora": [true, false], "extra": 1, "get": {"b": null}}'
    config = loads(text)
    assert config.get("enable_lora") == (True, False)
    assert config.get("extra") == 1
    assert config.get("r") == 8
    assert config.get("nothing", 5) == 5
    assert config.peft_version is None
    assert {**config.to_dict(), **json.loads(text)} == config.to_dict()
    with pytest.raises(ConfigError, match=r"extra\['r'\]: expected no key that is a field of LoraConfig"):
        LoraConfig(extra={"r": 3})


# ---- refusals


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"r": 4.0}, "r: expected a positive integer, found 4.0; write 4"),
        ({"r": True}, "r: expected a positive integer, found true"),
        ({"r": -1}, "r: expected a positive integer, found -1"),
        ({"lora_alpha": None}, "lora_alpha: expected a finite number, found null"),
        ({"lora_alpha": float("inf")}, "lora_alpha: numbers must be finite, found inf"),
        ({"lora_dropout": 1.0}, "lora_dropout: expected a number in [0, 1), found 1.0"),
        ({"bias": "some"}, 'bias: expected one of "none", "all", "lora_only", found \'some\''),
        ({"bias": None}, "bias: expected one of"),
        ({"task_type": "CHAT"}, 'task_type: expected one of "SEQ_CLS"'),
        ({"rank_pattern": None}, "rank_pattern: expected an object (of patterns), found null; write {}"),
        ({"rank_pattern": {"q": 2.0}}, "rank_pattern['q']: expected a positive integer, found 2.0; write 2"),
        ({"alpha_pattern": {"q": "2"}}, "alpha_pattern['q']: expected a finite number, found '2'"),
        (
            {"rank_pattern": {"(q": 2}},
            "rank_pattern: expected a regular expression of Python's `re`, found '(q'",
        ),
        ({"rank_pattern": {3: 2}}, "rank_pattern: keys must be strings, found the key 3 (int)"),
        ({"init_lora_weights": "best"}, "init_lora_weights: expected true, false,"),
        ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights: expected"),
        ({"init_lora_weights": "loftq"}, 'loftq_config: expected an object with init_lora_weights "loftq"'),
        (
            {"target_modules": 3},
            "target_modules: expected a regular expression (string), a list of names, or null",
        ),
        ({"target_modules": ["a", 1]}, "target_modules: expected"),
        (
            {"target_modules": "*.q"},
            "target_modules: expected a regular expression of Python's `re`, found '*.q'",
        ),
        (
            {"modules_to_save": "head"},
            "modules_to_save: expected a list of strings or null, found 'head'; write [",
        ),
        ({"modules_to_save": ["("]}, "modules_to_save: expected a regular expression"),
        ({"layers_pattern": "h"}, "layers_pattern: expected null if layers_to_transform is null"),
        (
            {"layers_pattern": ["("], "layers_to_transform": 1},
            "layers_pattern: expected a regular expression",
        ),
        (
            {"target_modules": "q", "layers_to_transform": 1},
            "layers_to_transform: expected null if target_modules",
        ),
        (
            {"layers_to_transform": 1.0},
            "layers_to_transform: expected an integer, a list of integers, or null",
        ),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number"),
        ({"layer_replication": [[1, 2, 3]]}, "layer_replication: expected a list of [start, end] pairs"),
        ({"layer_replication": [[2, 2]]}, "layer_replication: expected a list of [start, end] pairs"),
        ({"layer_replication": [[-1, 2]]}, "layer_replication: expected a list of [start, end] pairs"),
        ({"trainable_token_indices": {"a": 1}}, "trainable_token_indices: expected"),
        ({"use_dora": True, "megatron_config": {"a": 1}}, "use_dora: expected false with a megatron_config"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias: expected false with use_dora"),
        (
            {"lora_bias": True, "init_lora_weights": "eva"},
            "lora_bias: expected false unless init_lora_weights",
        ),
        ({"eva_config": []}, "eva_config: expected an object or null"),
        ({"use_rslora": None}, "use_rslora: expected true or false, found null"),
        ({"peft_type": "IA3"}, "peft_type: expected \"LORA\", found 'IA3'"),
        ({"extra": 3}, "extra: expected an object of unknown keys"),
        ({"extra": {"a": object()}}, "which JSON cannot hold"),
    ],
)
def test_lora_refuses(fields: dict[str, Any], says: str):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**fields)
    assert says in str(caught.value)
    assert str(caught.value).startswith("LoraConfig: ")


@pytest.mark.parametrize("peft_type", sorted(CLASSES))
def test_every_field_takes_or_refuses_every_value(peft_type: str):
    """No other error than `ConfigError` reaches the reader of a file."""
    for name in {field.name for field in dataclasses.fields(CLASSES[peft_type])} - {"extra"}:
        for value in (None, True, -1, 0.5, "x", [None], {"a": None}, object):
            with contextlib.suppress(ConfigError):
                CLASSES[peft_type](**{name: value})


def test_ia3_and_generic_refuse():
    with pytest.raises(ConfigError, match=r"feedforward_modules: expected a subset of target_modules, found \['b'\]"):
        IA3Config(target_modules=["a"], feedforward_modules=["a", "b"])
    IA3Config(target_modules="a", feedforward_modules=["b"])
    for name, extra in (("LORA", {}), ("xlora", {}), (None, {}), ("XLORA", {"target_modules": 1})):
        with pytest.raises(ConfigError, match="peft_type|target_modules"):
            GenericConfig(peft_type=cast("str", name), extra=extra)
    with pytest.raises(ConfigError, match="base class"):
        Config()


def test_all_problems_stand_in_one_error():
    with pytest.raises(ConfigError) as caught:
        loads('{"peft_type": "LORA", "r": 4.0, "bias": "x", "rank_pattern": null}', "dir/adapter_config.json")
    lines = str(caught.value).splitlines()
    assert lines[0] == "dir/adapter_config.json: LoraConfig: 3 problems"
    assert [line.split(":")[0] for line in lines[1:]] == ["  r", "  bias", "  rank_pattern"]


def test_an_extra_that_is_no_object_hides_no_other_problem():
    with pytest.raises(ConfigError, match="3 problems") as caught:
        LoraConfig(extra=cast("Any", 3), layers_pattern="h", use_dora=True, megatron_config={"a": 1})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  extra",
        "  layers_pattern",
        "  use_dora",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "f: expected JSON, found invalid text: Expecting value at line 1, column 1"),
        ('{\n "a" 1\n}', "line 2, column 6"),
        ("[1]", "f: expected a JSON object, found a list"),
        ("null", "f: expected a JSON object, found null"),
        (b"\xff{}", "f: expected JSON in UTF-8, found an invalid byte at 0"),
        ("\ufeff{}", "f: expected JSON, found invalid text"),
        ("{}", "f: expected a peft_type, found none (keys: no key at all)"),
        ('{"r": 8, "lora_alpha": 8}', 'add "peft_type": "LORA"'),
        ('{"feedforward_modules": []}', 'add "peft_type": "IA3"'),
        (
            '{"num_layers": 4, "lora_parameters": {}}',
            "found an mlx-lm file (no peft_type, but lora_parameters",
        ),
        ('{"peft_type": null}', "f: peft_type: expected a string, found null"),
        ('{"peft_type": "lora"}', "f: peft_type: expected a type in capitals, found 'lora'; write \"LORA\""),
        ('{"peft_type": "PeftType.LORA"}', 'write "LORA"'),
        ('{"peft_type": "prefix-tuning"}', 'write "PREFIX_TUNING"'),
        ('{"peft_type": "?"}', 'write for example "LORA"'),
        ('{"peft_type": "LORA", "r": 1, "r": 2}', "f: expected every key once, found twice: r"),
        ('{"peft_type": "LORA", "rank_pattern": {"a": 1, "a": 1}}', "found twice: a"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "f: expected finite numbers, found NaN"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha: numbers must be finite, found inf"),
        ('{"peft_type": "LORA", "r": ' + "1" * 5000 + "}", "f: expected a configuration, found invalid JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "found a Git LFS pointer"),
    ],
)
def test_loads_refuses(text: str | bytes, says: str):
    with pytest.raises(ConfigError) as caught:
        loads(text, "f")
    assert says in str(caught.value)


@pytest.mark.parametrize("depth", [600, 200_000])
def test_json_nested_too_deeply_is_refused(depth: int):
    with pytest.raises(ConfigError, match="nested too deeply"):
        loads('{"peft_type": "LORA", "x": ' + "[" * depth + "]" * depth + "}")


def test_the_class_follows_from_the_type():
    assert type(Config.from_dict({"peft_type": "IA3"})) is IA3Config
    assert type(Config.from_dict({"peft_type": "FINEGATES", "a": 1})) is GenericConfig
    with pytest.raises(ConfigError, match='expected "IA3"'):
        IA3Config.from_dict({"peft_type": "LORA"})


def test_a_class_is_imported_when_its_type_is_asked_for():
    code = "from jaxadapt.configs.base import class_of; print(*(class_of(t).__name__ for t in ('IA3', 'VERA', 'CPT')))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["IA3Config", "VeraConfig", "CPTConfig"]


@pytest.mark.parametrize("task", [-1, 0.0, True])
def test_a_task_is_a_number_from_zero(task: Any):
    with pytest.raises(ConfigError, match="prompt_tuning_init_task: expected an integer of 0 or more, or null"):
        Config.from_dict({"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 2, "prompt_tuning_init_task": task})


def test_numbers_of_numpy_are_pythons_in_the_file():
    import numpy as np

    made = LoraConfig(
        r=np.int64(4), lora_alpha=np.float32(0.5), layers_to_transform=list(np.arange(2)), target_modules=["q"],
        rank_pattern={"q": np.uint8(2)},
    )  # fmt: skip
    plain = LoraConfig(
        r=4, lora_alpha=0.5, layers_to_transform=[0, 1], target_modules=["q"], rank_pattern={"q": 2}
    )  # fmt: skip
    assert made == plain
    assert made.to_json() == plain.to_json()
    for wrong in (np.bool_(True), np.float64("nan"), np.int64(0), np.ones(1)):
        with pytest.raises(ConfigError, match="LoraConfig: r: "):
            LoraConfig(r=wrong)


def test_the_package_imports_little_and_only_the_standard_library():
    """Modules are counted, not seconds: a busy machine would slow an import. Most are of the standard library."""
    code = (
        "import sys; before = set(sys.modules); import jaxadapt.configs, jaxadapt.configs.matching; "
        "new = set(sys.modules) - before; names = {m.partition('.')[0] for m in new}; "
        "print(sorted(names - sys.stdlib_module_names), len(new))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names, _, count = run.stdout.strip().rpartition(" ")
    assert names == "['jaxadapt']"
    assert 10 < int(count) < 70


def test_a_class_takes_keywords_only():
    with pytest.raises(ConfigError, match=r"LoraConfig takes keyword arguments only.*LoraConfig\(target_modules=…\)"):
        LoraConfig(["q"])  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"GenericConfig\(peft_type=…\)"):
        GenericConfig("VERA")  # type: ignore[misc]


def test_differences_name_the_keys_that_make_configurations_unequal():
    one = LoraConfig(r=2, target_modules=["q"], task_type="CAUSAL_LM")
    other = LoraConfig(r=3, target_modules=["q"], lora_alpha=4, task_type="SEQ_CLS")
    assert one.differences(other) == "lora_alpha (8 attached, 4 in the file), r (2 attached, 3 in the file)"
    assert one.differences(other, "in the tree").endswith("3 in the tree)")
    assert one.differences(one) == ""
    assert one.changed_keys(other) == ["lora_alpha", "r", "task_type"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"alora_invocation_tokens": [1.5]}, "alora_invocation_tokens: expected a list of integers or null"),
        ({"alora_invocation_tokens": "1"}, "alora_invocation_tokens: expected a list of integers or null"),
        ({"bias": 3}, "bias: expected"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication: expected pairs that make at most"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q']: expected"),
        ({"alpha_pattern": {"q": "a"}}, "alpha_pattern['q']: expected"),
        ({"trainable_token_indices": {"a": [1.5]}}, "trainable_token_indices: expected a list of integers, an object"),
        ({"r": 0}, "r: expected"),
        ({"r": 2.5}, "r: expected"),
        ({"r": True}, "r: expected"),
    ],
)
def test_values_of_another_kind_are_refused(fields: dict[str, Any], says: str):
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**fields)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 1}, {"alora_invocation_tokens": [1]}, {"layer_replication": [[0, 1], [0, 4]]},
        {"alpha_pattern": {"q": 0.5}},
        {"trainable_token_indices": {"a": [1]}}, {"trainable_token_indices": [0, 3]}, {"layers_to_transform": 0},
    ],
)  # fmt: skip
def test_the_least_values_are_taken(fields: dict[str, Any]):
    ((name, value),) = fields.items()
    assert LoraConfig(**fields).to_dict()[name] == value


@pytest.mark.parametrize(
    ("fields", "changes", "name"),
    [
        ({}, False, "init_lora_weights=True"),
        ({"init_lora_weights": "pissa"}, True, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, True, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "gaussian"}, False, "init_lora_weights='gaussian'"),
        ({"kasa_config": {}}, True, "kasa_config"),
    ],
)
def test_initializations_that_change_the_base(fields: dict[str, Any], changes: bool, name: str):
    config = LoraConfig(target_modules=["q"], **fields)
    assert lora.changes_base(config) is changes
    assert lora.init_field(config) == name
    if changes:
        with pytest.raises(ConfigError, match=f"it: {name}: .*took a part out of the base"):
            lora.require_original_base(config, "it")
    else:
        lora.require_original_base(config, "it")


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({}, []), ({"use_dora": True}, ["use_dora=True"]), ({"bias": "all"}, ["bias='all'"]),
        ({"bias": "lora_only", "lora_bias": True}, ["lora_bias=True", "bias='lora_only'"]),
    ],
)  # fmt: skip
def test_what_is_more_than_a_product_is_named(fields: dict[str, Any], reasons: list[str]):
    assert lora.reasons_not_a_product(LoraConfig(target_modules=["q"], **fields)) == reasons
    ia3 = IA3Config(target_modules=["q"], feedforward_modules=[])
    assert lora.reasons_not_a_product(ia3) == ["peft_type is IA3"]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_parameters=["experts.down_proj"]),
        LoraConfig(layer_replication=[(0, 2)]),
        jaxadapt.TinyLoraConfig(target_modules=["q"]),
    ],
    ids=["parameters", "layers", "TINYLORA"],
)
def test_an_adapter_that_no_file_merges_is_merged_in_memory(config):
    assert lora.merge_advice(config).startswith("merge it into its model in memory (jaxadapt.export.export_base(")
