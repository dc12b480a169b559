"""Matching of names, compared with PEFT (if it is installed) and by example."""

from __future__ import annotations

import itertools
import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxadapt import ConfigError, GenericConfig, IA3Config, LoraConfig, TargetError, init
from jaxadapt.adapters.selection import doubtful_selection, unmatched_targets
from jaxadapt.configs.frozen import PatternIndex, find_pattern_value
from jaxadapt.configs.matching import (
    is_feedforward,
    is_target,
    resolve_targets,
    select_names,
    with_default_targets,
)

LEAVES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.3.up_proj", "q_proj")
NAMES = (
    *(f"{head}layers.{l}.{leaf}" for head in ("", "model.", "base.") for l in (0, 1, 11) for leaf in LEAVES),
    *(f"transformer.h.{l}.attn.c_attn" for l in (0, 2, 12)),
    "lm_head", "model.lm_head", "q_proj", "xq_proj", "model.embed_tokens", "layers.1.q_proj.extra",
    "score", "h.1",
)  # fmt: skip

TARGETS: tuple[Any, ...] = (
    ["q_proj"],
    ["self_attn.q_proj", "down_proj"],
    ["roj"],
    ["model.layers.1.self_attn.q_proj", "v_proj"],
    ["lm_head", "c_attn", "score"],
    [],
    r".*\.(q|v)_proj",
    r"q_proj",
    r".*layers\.[01]\..*",
    "",
)
EXCLUDES: tuple[Any, ...] = (None, [], "", ["layers.0.self_attn.q_proj", "lm_head"], r".*\.11\..*")
SAVES: tuple[Any, ...] = (None, [], ["lm_head"], ["layers.1"], [r"emb\w+", "score"])
LAYERS: tuple[tuple[Any, Any], ...] = (
    (None, None),
    ([], None),
    (1, None),
    ([0, 11], None),
    ([1], "layers"),
    ([1, 2], ["h", "layers"]),
    ([3], "experts"),
    ([1], []),
    (0, r"lay\w*|h"),
)


def _table() -> list[dict[str, Any]]:
    rows = itertools.product(TARGETS, EXCLUDES, SAVES, LAYERS)
    return [
        {
            "target_modules": t,
            "exclude_modules": e,
            "modules_to_save": m,
            "layers_to_transform": l,
            "layers_pattern": p,
        }
        for t, e, m, (l, p) in rows
        if not (isinstance(t, str) and (l is not None or p is not None))
    ]


@pytest.mark.peft
def test_matches_as_peft_does():
    pytest.importorskip("peft")
    from peft import LoraConfig as PeftLora
    from peft.tuners.tuners_utils import check_target_module_exists

    compared = hits = 0
    for row in _table()[::3]:
        ours, theirs = LoraConfig(**row), PeftLora(**row)
        for name in NAMES:
            expected = bool(check_target_module_exists(theirs, name))
            assert is_target(ours, name) == expected, (row, name)
            compared += 1
            hits += expected
    print(f"{compared} names compared, {hits} of them targets")
    assert compared > 20_000
    assert 0.02 < hits / compared < 0.9


SEGMENT = st.sampled_from(["model", "layers", "h", "0", "1", "12", "q", "v", "xq", "mlp", "q_proj"])
NAME = st.lists(SEGMENT, min_size=1, max_size=6).map(".".join)


@pytest.mark.peft
@settings(max_examples=200, deadline=None)
@given(
    names=st.lists(NAME, min_size=1, max_size=12),
    targets=st.lists(NAME, min_size=1, max_size=4),
    excluded=st.none() | st.lists(NAME, max_size=2),
    layers=st.none() | st.integers(0, 1) | st.lists(st.sampled_from([0, 1, 12]), max_size=2),
)
def test_matches_as_peft_does_on_any_names(names: Any, targets: Any, excluded: Any, layers: Any):
    pytest.importorskip("peft")
    from peft import LoraConfig as PeftLora
    from peft.tuners.tuners_utils import check_target_module_exists

    row = {"target_modules": targets, "exclude_modules": excluded, "layers_to_transform": layers}
    ours, theirs = LoraConfig(**row), PeftLora(**row)
    chosen = [name for name in names if is_target(ours, name)]
    assert chosen == [name for name in names if check_target_module_exists(theirs, name)]
    # An entry is unmatched exactly if it selects nothing on its own.
    alone = [
        t for t in dict.fromkeys(targets) if not any(is_target(ours.replace(target_modules=[t]), n) for n in names)
    ]
    assert list(dict.fromkeys(unmatched_targets(ours, names))) == alone


@pytest.mark.peft
def test_pattern_value_as_peft_does():
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    keys = (
        "q_proj",
        r"layers\.1\..*",
        "proj",
        "model.layers.0.self_attn.q_proj",
        "a+b",
        "q.proj",
        "x|v_proj",
        "",
    )
    for first, second in itertools.permutations(keys, 2):
        patterns = {first: 1, second: 2}
        for name in (*NAMES, "a+b", "m.a+b"):
            assert find_pattern_value(patterns, name, 8) == patterns.get(get_pattern_key(list(patterns), name), 8)


@pytest.mark.peft
def test_all_linear_is_resolved_as_peft_stores_it():
    pytest.importorskip("peft")
    from peft.tuners.tuners_utils import _find_minimal_target_modules

    config = LoraConfig(target_modules="all-linear")
    for layers, extra in ((2, []), (30, []), (30, ["vision.q_proj"]), (30, ["a.norm", "b.self_attn.q_proj"])):
        linear = [f"model.layers.{l}.{leaf}" for l in range(layers) for leaf in LEAVES[:3]]
        names = [*linear, *(f"model.layers.{l}" for l in range(layers)), "model.norm", "lm_head", *extra]
        got = resolve_targets(config, names, linear={*linear, "lm_head"}, output="lm_head").target_modules
        expected = _find_minimal_target_modules(linear, set(names) - set(linear)) if layers == 30 else set(linear)
        assert set(got or ()) == expected
        chosen = select_names(config, names, linear={*linear, "lm_head"}, output="lm_head")
        assert chosen == tuple(linear)
    # "0" would mean the blocks as well, in which PEFT finds no linear layer.
    linear = [f"model.blocks.{b}.mlp.{i}" for b in range(10) for i in (0, 2)]
    held = {name[:i] for name in linear for i, c in enumerate(name) if c == "."}
    got = resolve_targets(config, linear, linear=linear).target_modules
    assert set(got or ()) == _find_minimal_target_modules(linear, held) == {"mlp.0", "mlp.2"}


@pytest.mark.parametrize(
    ("task", "chosen"), [("SEQ_CLS", ("m.q",)), ("TOKEN_CLS", ("m.q", "score")), (None, ("m.q", "score"))]
)
def test_all_linear_leaves_the_head_of_a_classifier_out(task: str | None, chosen: tuple[str, ...]):
    """PEFT's result for a sequence classifier of transformers; a model with an output layer keeps its `score`."""
    config = LoraConfig(target_modules="all-linear", task_type=task)
    assert resolve_targets(config, ["m.q", "score"], linear=["m.q", "score"], output="lm_head").target_modules == chosen
    names = ["m.q", "score", "lm_head"]
    assert resolve_targets(config, names, linear=names, output="lm_head").target_modules == ("m.q", "score")


@pytest.mark.peft
def test_feedforward_as_peft_does():
    pytest.importorskip("peft")
    from peft.tuners.ia3.model import IA3Model

    for inputs in (["down_proj"], ["roj"], [], r".*\.down_proj", "down_proj"):
        config = IA3Config(target_modules=r".*", feedforward_modules=inputs)
        for name in NAMES:
            assert is_feedforward(config, name) == IA3Model._check_target_module_feedforward(config, name)


def test_select_keeps_the_order_of_names():
    config = LoraConfig(target_modules=["v_proj", "q_proj"], exclude_modules=["layers.1.q_proj"])
    names = ["m.layers.1.q_proj", "m.layers.0.v_proj", "m.layers.0.q_proj", "m.norm"]
    assert select_names(config, names) == ("m.layers.0.v_proj", "m.layers.0.q_proj")


def test_nothing_matched_lists_near_misses_and_what_there_is():
    names = [f"model.layers.{l}.self_attn.{p}_proj" for l in range(40) for p in "qkvo"] + ["model.norm"]
    with pytest.raises(TargetError) as caught:
        select_names(LoraConfig(target_modules=["q_porj", "Norm"]), names)
    text = str(caught.value)
    assert "'q_porj', 'Norm'" in text
    assert re.search(r"near misses: .*norm.*q_proj|near misses: .*q_proj.*norm", text)
    assert "the last segments k_proj, norm, o_proj, q_proj, v_proj" in text


def test_nothing_similar_is_no_near_miss():
    with pytest.raises(TargetError) as caught:
        select_names(LoraConfig(target_modules=["q_proj"]), ["model.norm"])
    assert "near misses" not in str(caught.value)


def test_a_name_written_as_a_string_is_explained():
    with pytest.raises(TargetError, match="to give names, write a list"):
        select_names(LoraConfig(target_modules="q_proj"), ["m.q_proj"])


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"exclude_modules": ["q"]}, "exclude_modules=['q']"),
        ({"modules_to_save": ["m"]}, "modules_to_save=['m']"),
        ({"layers_to_transform": 0}, "layers_to_transform=0"),
        ({"layers_to_transform": [7], "layers_pattern": "h"}, "layers_to_transform=[7], layers_pattern='h'"),
    ],
)
def test_what_leaves_everything_out_is_named(rule: dict[str, Any], says: str):
    with pytest.raises(TargetError, match=re.escape(f"1 modules match but are excluded by {says}: m.h.1.q")):
        select_names(LoraConfig(target_modules=["q"], **rule), ["m.h.1.q", "m.h.1.k"])


def test_null_targets():
    assert not is_target(LoraConfig(), "q")
    with pytest.raises(TargetError, match=r"found null.*last segments k, q"):
        select_names(LoraConfig(), ["m.q", "m.k"])
    assert select_names(LoraConfig(target_parameters=["experts.w"]), ["m.q"]) == ()
    with pytest.raises(TargetError, match="no modules at all"):
        select_names(LoraConfig(target_modules=["q"]), [])


@pytest.mark.peft
@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj", "bert", "roberta", "t5", "mistral", "mixtral", "qwen3"])
def test_null_targets_of_a_family_are_pefts(family: str):
    pytest.importorskip("peft")
    from peft.utils import constants

    own = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[family]
    assert with_default_targets(LoraConfig(), family).target_modules == tuple(own)
    if family.startswith(("gpt", "bert", "roberta")):
        ia3 = with_default_targets(IA3Config(), family)
        assert ia3.target_modules == tuple(constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[family])
        assert ia3.feedforward_modules == tuple(
            constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[family]
        )


def test_all_linear_needs_to_know_what_is_linear():
    config = LoraConfig(target_modules="All-Linear", exclude_modules=["k"])
    names = ["m.q", "m.k", "m.norm", "lm_head"]
    assert select_names(config, names, linear={"m.q", "m.k", "lm_head"}, output="lm_head") == ("m.q",)
    assert select_names(config, names, linear=["m.q", "lm_head"]) == ("m.q", "lm_head")
    with pytest.raises(TargetError, match="all-linear"):
        select_names(config, names)
    with pytest.raises(TargetError, match="no linear layer"):
        select_names(config, names, linear={"lm_head"}, output="lm_head")
    # IA3's feedforward modules must stay a subset of the targets.
    ia3 = IA3Config(target_modules="all-linear", feedforward_modules=["k"])
    assert resolve_targets(ia3, names, linear=["m.q", "m.k"]).feedforward_modules == ("m.k",)


def test_generic_configurations_match_by_the_same_keys():
    config = GenericConfig(peft_type="XLORA", extra={"target_modules": ["q"], "layers_to_transform": [1]})
    names = ["m.h.0.q", "m.h.1.q", "m.h.1.k"]
    assert select_names(config, names) == ("m.h.1.q",)
    linear = config.replace(extra={"target_modules": "all-linear"})
    assert select_names(linear, names, linear=names[:2]) == ("m.h.0.q", "m.h.1.q")
    assert not is_target(GenericConfig(peft_type="XLORA"), "q")


def test_all_linear_with_a_head_that_is_saved_whole_is_no_doubt():
    """As in PEFT, "all-linear" resolves to a list with the head, and modules_to_save takes precedence."""
    names = ["a.q", "head"]
    config = LoraConfig(target_modules="all-linear", modules_to_save=["head"])
    config = resolve_targets(config, names, linear=names)
    assert config.target_modules == ("a.q", "head")
    assert select_names(config, names) == ("a.q",)
    assert doubtful_selection(config, names, ("a.q",)) == []
    assert len(doubtful_selection(config.replace(modules_to_save=["other"]), ["a.q"], ("a.q",))) == 1


def test_many_names_that_are_not_here_are_counted():
    config = LoraConfig(target_modules=["q", *(f"vision.{i}.q" for i in range(20))])
    *some, last = doubtful_selection(config, ["a.q"], ["a.q"])
    assert [line.partition(";")[0] for line in some[:2]] == [
        "target_modules: 'vision.0.q' matches no module",
        "target_modules: 'vision.1.q' matches no module",
    ]
    assert last == f"target_modules: {20 - len(some)} more entries match no module"
    config = LoraConfig(target_modules=["q"], rank_pattern={f"vision.{i}.q": 2 for i in range(20)})
    *some, last = doubtful_selection(config, ["a.q"], ["a.q"])
    assert some[1] == "rank_pattern: 'vision.1.q' matches none of the targets"
    assert last == f"rank_pattern: {20 - len(some)} more match none of the targets"


def test_invalid_expressions_are_named():
    with pytest.raises(ConfigError, match=r"rank_pattern: .*'\('"):
        find_pattern_value({"(": 1}, "q", 8)
    with pytest.raises(ConfigError, match=r"modules_to_save: .*'\('"):
        is_target(GenericConfig(peft_type="XLORA", extra={"target_modules": ["q"], "modules_to_save": ["("]}), "q")


def test_null_feedforward_is_refused():
    with pytest.raises(TargetError, match="feedforward_modules"):
        is_feedforward(IA3Config(target_modules=["q"]), "q")


def test_thousands_of_names():
    names = [f"model.layers.{l}.self_attn.{p}_proj" for l in range(500) for p in "qkvo"]
    config = LoraConfig(target_modules=names[::2], rank_pattern={re.escape(name): 4 for name in names[:400]})
    assert list(select_names(config, names)) == names[::2]
    assert unmatched_targets(config, names) == ()


HEADLESS = "task_type: QUESTION_ANS trains its head, qa_outputs, in full, and the model has none"


@pytest.mark.parametrize(("entries", "task", "said"), [
    (["head"], None, []), (["head", "haed"], None, ["modules_to_save: 'haed' matches no module"]),
    (["table"], None, ["modules_to_save: 'table' matches no module"]), (["model"], None, []),
    (None, "SEQ_CLS", []), (None, "QUESTION_ANS", [HEADLESS]), (["head"], "QUESTION_ANS", []),
])  # fmt: skip
@pytest.mark.filterwarnings("default")
def test_what_modules_to_save_does_not_find_is_said(entries, task, said, recwarn):
    """Such a module would be neither trained nor saved; PEFT does not warn."""
    kernel = {"kernel": np.ones((4, 4), "float32")}
    params = {"model": {"q": kernel, "head": kernel, "score": kernel, "table": np.ones((3, 4), "float32")}}
    config = LoraConfig(r=2, target_modules=["q"], modules_to_save=entries, task_type=task)
    if entries == ["model"]:
        params = {"q": kernel, "model": {"a": kernel}}
    init(params, config, key=jax.random.key(0))
    assert [str(w.message) for w in recwarn.list] == said


@pytest.mark.filterwarnings("default")
def test_the_task_decides_what_is_said_not_what_was_asked_before(recwarn):
    params = {"q": {"kernel": np.ones((4, 4), "float32")}, "classifier": {"kernel": np.ones((4, 2), "float32")}}
    config = LoraConfig(r=2, target_modules=["q"], modules_to_save=["classifier", "score"])
    init(params, config.replace(task_type="SEQ_CLS"), key=jax.random.key(0))
    assert not recwarn.list  # of PEFT's two guesses one is here
    init(params, config, key=jax.random.key(0))
    assert [str(w.message) for w in recwarn.list] == ["modules_to_save: 'score' matches no module"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"h.{i}.q" for i in range(20)], ["q"]),
        ([f"h.{i}.q" for i in range(19)], [f"h.{i}.q" for i in range(19)]),  # PEFT shortens from 20 names on
        ([f"h.q{i}" for i in range(20)], [f"h.q{i}" for i in range(20)]),  # and only if that makes them fewer
    ],
)
def test_many_names_become_few_suffixes(names, expected):
    found = resolve_targets(LoraConfig(target_modules="all-linear"), names, linear=set(names), output=None)
    assert found.target_modules == tuple(sorted(expected))


def test_an_index_refuses_an_invalid_expression_when_it_is_made():
    """Not only when a name is compared with it."""
    with pytest.raises(ConfigError, match=r"rank_pattern.*'\(q'"):
        PatternIndex("rank_pattern", ["q_proj", "(q"])
