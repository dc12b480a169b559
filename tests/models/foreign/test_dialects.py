"""Every dialect, both ways: what it computes written out by hand (`cases.py`) is what a PEFT file of it computes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import KeyMap, Weight
from jaxadapt.models import LoraTree
from jaxadapt.models.foreign import DIALECTS, Dialect, Pair, forms, import_dialect, survey
from tests.models.foreign.cases import CASES, Case, D, E, F, R, flat, nest

ALPHA = 2.0 * R  # a scale of 2, exact in every format
PREFIX = "base_model.model."
each = pytest.mark.parametrize("case", CASES, ids=str)


def alpha(case: Case) -> dict[str, Any]:
    """What the verbs need to be told of the scale."""
    return {} if DIALECTS[case.dialect].unscaled else {"lora_alpha": ALPHA}


def scale(case: Case) -> float:
    return 1.0 if DIALECTS[case.dialect].unscaled else 2.0


def wanted(case: Case, tree: dict[str, Any]) -> dict[str, Any]:
    """`{module: delta of PyTorch's weight}`, by hand."""
    leaves = flat(tree)
    return {k: scale(case) * x for k, x in case.torch(case.delta(leaves[case.a[0]], leaves[case.b[0]])).items()}


def computed(tensors: jaxadapt.PeftTensors) -> dict[str, Any]:
    """`{module: s·B·A}` of a file's tensors, as PEFT computes it."""
    found = {key: np.asarray(x) for key, x in tensors.tensors.items()}
    modules = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in found}
    config = tensors.config
    pairs = {m: (found[f"{PREFIX}{m}.lora_B.weight"], found[f"{PREFIX}{m}.lora_A.weight"]) for m in modules}
    return {m: config.get("lora_alpha") / config.get("r") * b @ a for m, (b, a) in pairs.items()}


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for key, x in expected.items():
        # float32 sums over the rank in another order
        np.testing.assert_allclose(found[key], x, rtol=0, atol=2e-6 * abs(x).max(), err_msg=key)


def equal(found: Any, expected: Any) -> None:
    a, b = flat(found), flat(expected)
    assert set(a) == set(b)
    for path, x in b.items():
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(x), err_msg=path)


def test_every_dialect_has_cases():
    """(Those with slots have their own, in `test_others.py`, and openpi's heads in `test_openpi.py`.)"""
    others = {name for name, dialect in DIALECTS.items() if dialect.has_slots or dialect.heads == "own"}
    assert {case.dialect for case in CASES} == DIALECTS.keys() - others


@each
def test_out(case: Case):
    tree = case.tree()
    tensors = jaxadapt.to_peft(LoraTree(tree, **alpha(case)), keymap=case.table)
    assert tensors.config.r == R
    close(computed(tensors), wanted(case, tree))


@each
def test_file_and_back(case: Case, tmp_path):
    """Into a tree of other values: exact, and the base untouched."""
    tree, other = case.tree(0), case.tree(1)
    jaxadapt.save(LoraTree(tree, **alpha(case)), tmp_path, keymap=case.table)
    back = jaxadapt.load(tmp_path, LoraTree(other, **alpha(case)), keymap=case.table)
    expected = flat(tree) | {case.base[0]: flat(other)[case.base[0]]}
    equal(back, nest(expected))
    assert set(jaxadapt.read(tmp_path).tensors) == set(
        jaxadapt.to_peft(LoraTree(tree, **alpha(case)), keymap=case.table).tensors
    )


@each
def test_as_an_adapter_of_ours(case: Case):
    """`extract` gives our layout (`merge` computes the same delta), and `inject` the very tree again."""
    tree = case.tree()
    adapter = jaxadapt.extract(LoraTree(tree, **alpha(case)), keymap=case.table)
    leaf = case.leaf or case.base[0]
    zero = nest({leaf: np.zeros(case.base[1], np.float32)})
    merged = flat(jaxadapt.merge(zero, adapter))[leaf]
    leaves = flat(tree)
    expected = scale(case) * case.delta(leaves[case.a[0]], leaves[case.b[0]])
    np.testing.assert_allclose(merged, expected, rtol=0, atol=2e-6 * abs(expected).max())
    other = case.tree(1)
    back = jaxadapt.inject(LoraTree(other, **alpha(case)), adapter)
    equal(back, nest(leaves | {case.base[0]: flat(other)[case.base[0]]}))


@each
def test_without_the_base(case: Case):
    """LoRA leaves alone do too, where PyTorch flattens as the dialect does."""
    tree = case.tree(base=False)
    tensors = jaxadapt.to_peft(LoraTree(tree, **alpha(case)), keymap=case.table)
    close(computed(tensors), wanted(case, tree))


@each
def test_inside_jit(case: Case):
    """A plan is static: `to_peft` traces, without a copy to the host."""
    tree = jax.tree.map(jnp.asarray, case.tree())
    other = jax.tree.map(jnp.asarray, case.tree(1))

    @jax.jit
    def out(tree: Any) -> Any:
        return dict(jaxadapt.to_peft(LoraTree(tree, **alpha(case)), keymap=case.table).tensors)

    outside = jaxadapt.to_peft(LoraTree(tree, **alpha(case)), keymap=case.table)
    equal(out(tree), dict(outside.tensors))

    @jax.jit
    def through(adapter: Any, other: Any) -> Any:
        return jaxadapt.inject(LoraTree(other, **alpha(case)), adapter)

    adapter = jaxadapt.extract(LoraTree(tree, **alpha(case)), keymap=case.table)
    if case.shared:
        with pytest.raises(jaxadapt.MismatchError, match="cannot compare the shared A tensors inside jit"):
            through(adapter, other)
    else:
        back = through(adapter, other)
        equal(back, nest(flat(tree) | {case.base[0]: flat(other)[case.base[0]]}))


def test_heads_with_one_constant_a_inside_jit():
    """B alone may be traced, as where only B is trained: then the As of heads can be compared."""
    keymap = KeyMap("heads", (Weight("q.kernel", "q.weight", "d n h -> (n h) d"),))
    a, b = np.ones((6, 3, 2), "float32"), jnp.arange(8.0).reshape(2, 4)

    def out(b: Any) -> Any:
        tree = {"q": {"kernel": np.ones((6, 3, 4)), "lora_kernel_a": a, "lora_kernel_b": b}}
        return dict(jaxadapt.to_peft(LoraTree(tree, lora_alpha=4), keymap=keymap).tensors)

    equal(jax.jit(out)(b), out(b))


@each
def test_the_scale(case: Case):
    """A dialect that scales must be told its alpha; one that does not refuses another than its rank."""
    tree = case.tree()
    if DIALECTS[case.dialect].unscaled:
        assert jaxadapt.to_peft(tree, keymap=case.table).config.lora_alpha == R
        with pytest.raises(jaxadapt.ConfigError, match="does not scale"):
            jaxadapt.to_peft(LoraTree(tree, lora_alpha=3), keymap=case.table)
    else:
        with pytest.raises(
            jaxadapt.ConfigError, match=r"Pass .*, for example jaxadapt.models.LoraTree\(tree, lora_alpha=16\)"
        ):
            jaxadapt.to_peft(tree, keymap=case.table)
        config = jaxadapt.LoraConfig(lora_alpha=5, task_type="CAUSAL_LM")
        found = jaxadapt.to_peft(jaxadapt.models.LoraTree(tree, config=config), keymap=case.table).config
        assert (found.r, found.lora_alpha, found.task_type) == (R, 5, "CAUSAL_LM")
        with pytest.raises(jaxadapt.ConfigError, match="lora_alpha=16 contradicts lora_alpha=5 of the configuration"):
            jaxadapt.to_peft(LoraTree(tree, lora_alpha=16, config=config), keymap=case.table)


@each
def test_another_scale_in_the_file(case: Case, tmp_path):
    """The file's scale over the tree's own goes into B: exactly for a power of two, else with a warning."""
    tree = case.tree()
    jaxadapt.save(LoraTree(tree, **alpha(case)), tmp_path, keymap=case.table)
    tensors = jaxadapt.read(tmp_path)
    for factor, told in ((4, False), (3, True)):
        changed = tensors.config.replace(lora_alpha=factor * tensors.config.lora_alpha)
        jaxadapt.write(jaxadapt.PeftTensors(changed, tensors.tensors), tmp_path / str(factor))

        def load(path=tmp_path / str(factor)) -> Any:
            return jaxadapt.load(path, LoraTree(case.tree(1), **alpha(case)), keymap=case.table)

        if told:
            with pytest.warns(UserWarning, match="rounded once"):
                back = load()
        else:
            back = load()
        np.testing.assert_array_equal(flat(back)[case.b[0]], flat(tree)[case.b[0]] * np.float32(factor))
        np.testing.assert_array_equal(flat(back)[case.a[0]], flat(tree)[case.a[0]])


@each
def test_a_tree_of_larger_rank_takes_a_smaller_file(case: Case, tmp_path):
    tree = case.tree()
    jaxadapt.save(LoraTree(tree, **alpha(case)), tmp_path, keymap=case.table)
    large = case.tree(1, rank=11)
    told = {} if not alpha(case) else {"lora_alpha": 22.0}
    back = jaxadapt.load(tmp_path, LoraTree(large, **told), keymap=case.table)
    leaves = {path: np.asarray(x) for path, x in flat(back).items()}
    delta = case.delta(leaves[case.a[0]], leaves[case.b[0]])
    expected = case.delta(flat(tree)[case.a[0]], flat(tree)[case.b[0]])
    np.testing.assert_allclose(delta, expected, rtol=0, atol=2e-6 * abs(expected).max())
    with pytest.raises(jaxadapt.MismatchError, match=f"rank 2, needed {R}\nBuild it with rank={R}"):
        jaxadapt.load(tmp_path, LoraTree(case.tree(1, rank=2), **told and {"lora_alpha": 4}), keymap=case.table)


@pytest.mark.parametrize("case", [case for case in CASES if case.shared], ids=str)
class TestShared:
    """One array for several modules: exact where the file agrees, else refused or put side by side."""

    def differing(self, case: Case, path) -> jaxadapt.PeftTensors:
        jaxadapt.save(LoraTree(case.tree(), **alpha(case)), path / "same", keymap=case.table)
        tensors = jaxadapt.read(path / "same")
        changed = {key: np.array(x) for key, x in tensors.tensors.items()}
        rng = np.random.RandomState(3)
        changed = {key: rng.standard_normal(x.shape).astype(x.dtype) for key, x in changed.items()}
        jaxadapt.write(jaxadapt.PeftTensors(tensors.config, changed), path / "other")
        return jaxadapt.read(path / "other")

    def test_refused(self, case: Case, tmp_path):
        self.differing(case, tmp_path)
        with pytest.raises(jaxadapt.MismatchError, match='(?s)several tensors of the file.*on_shared="concat"'):
            jaxadapt.load(tmp_path / "other", LoraTree(case.tree(1), **alpha(case)), keymap=case.table)
        with pytest.raises(jaxadapt.MismatchError, match="on_shared: expected"):
            jaxadapt.load(
                tmp_path / "other",
                LoraTree(case.tree(1), on_shared="x", **alpha(case)),
                keymap=case.table,
            )

    def test_concat(self, case: Case, tmp_path):
        tensors = self.differing(case, tmp_path)
        count = len(tensors.tensors) // 2
        with pytest.raises(jaxadapt.MismatchError, match=f"Build it with rank={count * R}"):
            jaxadapt.load(
                tmp_path / "other",
                LoraTree(case.tree(1), on_shared="concat", **alpha(case)),
                keymap=case.table,
            )
        told = {} if not alpha(case) else {"lora_alpha": 2.0 * count * R}
        large = case.tree(1, rank=count * R)
        back = jaxadapt.load(tmp_path / "other", LoraTree(large, on_shared="concat", **told), keymap=case.table)
        leaves = flat(back)
        found = case.torch(scale(case) * case.delta(leaves[case.a[0]], leaves[case.b[0]]))
        close(found, computed(tensors))


def test_one_part_of_a_fused_weight(tmp_path):
    """A file for k alone: v keeps its A, and its B is zero."""
    (case,) = (c for c in CASES if str(c) == "qwix-einsum-kv")
    tree = case.tree()
    jaxadapt.save(LoraTree(tree, lora_alpha=ALPHA), tmp_path / "both", keymap=case.table)
    tensors = jaxadapt.read(tmp_path / "both")
    mine = {key: x for key, x in tensors.tensors.items() if ".k." in key}
    config = tensors.config.replace(target_modules=["k"])
    jaxadapt.write(jaxadapt.PeftTensors(config, mine), tmp_path / "k")
    back = flat(jaxadapt.load(tmp_path / "k", LoraTree(case.tree(1), lora_alpha=ALPHA), keymap=case.table))
    expected = flat(tree)[case.b[0]].copy()
    expected[:, 1] = 0
    np.testing.assert_array_equal(back[case.b[0]], expected)
    np.testing.assert_array_equal(back[case.a[0]], flat(tree)[case.a[0]])


# ---- nothing is dropped, nothing is guessed --------------------------------------------------------------


def dense(**more: Any) -> dict[str, Any]:
    (case,) = (c for c in CASES if str(c) == "qwix-dense")
    return nest(flat(case.tree()) | more)


TABLE = jaxadapt.KeyMap("case", (jaxadapt.Weight("{path}.kernel", "m.{path}.weight", "i o -> o i"),))


def test_a_leaf_nobody_claims_is_listed():
    tree = dense(**{"up.kernel_lora_magnitude": np.zeros(F), "x.lora_B": np.zeros((R, F))})
    with pytest.raises(jaxadapt.KeyMapError, match=r"(?s)no dialect matches these.*up.kernel_lora_magnitude.*x.lora_B"):
        jaxadapt.to_peft(LoraTree(tree, lora_alpha=ALPHA), keymap=TABLE)


def test_half_a_pair_is_listed():
    tree = dense(**{"down.kernel_lora_a": np.zeros((D, R))})
    with pytest.raises(jaxadapt.KeyMapError, match=r"down.kernel_lora_a"):
        jaxadapt.to_peft(LoraTree(tree, lora_alpha=ALPHA), keymap=TABLE)


def test_two_dialects_in_one_tree():
    tree = dense(**{"x.kernel": np.zeros((D, F)), "x.lora.a": np.zeros((D, R)), "x.lora.b": np.zeros((R, F))})
    with pytest.raises(jaxadapt.KeyMapError, match=r"(?s)x.lora.a.*x.lora.b"):
        jaxadapt.to_peft(LoraTree(tree, lora_alpha=ALPHA), keymap=TABLE)


def test_a_leaf_without_a_line_is_listed():
    tree = dense(**{"x.w": np.zeros((D, F)), "x.w_lora_a": np.zeros((D, R)), "x.w_lora_b": np.zeros((R, F))})
    with pytest.raises(jaxadapt.KeyMapError, match=r"x.w_lora_a, x.w_lora_b: the keymap 'case' has no entry for 'x.w'"):
        jaxadapt.to_peft(LoraTree(tree, lora_alpha=ALPHA), keymap=TABLE)


def test_ragged_dot_is_refused():
    """Qwix's ragged_dot makes an A of (E·D, r), of which nothing can be made."""
    line = jaxadapt.Weight("e.w", "m.experts.{e}.up.weight", "{e} d f -> f d")
    tree = nest({"e.w": np.zeros((E, D, F)), "e.w_lora_a": np.zeros((E * D, R)), "e.w_lora_b": np.zeros((R, F))})
    with pytest.raises(jaxadapt.KeyMapError, match=r"e.w_lora_a \(60, 7\).*expected .*A \(\{e\} d r\), B \(r f\)"):
        jaxadapt.to_peft(LoraTree(tree, lora_alpha=ALPHA), keymap=jaxadapt.KeyMap("case", (line,)))


def test_a_configuration_that_contradicts_the_tree():
    tree = dense(**{"down.kernel": np.zeros((F, D), np.float32)})
    for config, what in (
        (jaxadapt.LoraConfig(r=3), "m.up: rank 7 in the tree, 3 in the configuration"),
        (jaxadapt.LoraConfig(target_modules=["down"]), "m.up: adapted in the tree, but not in target_modules"),
        (jaxadapt.LoraConfig(target_modules=["up", "down"]), "m.down: in target_modules, but has no LoRA parameters"),
        (jaxadapt.LoraConfig(use_rslora=True), "use_rslora"),
        (jaxadapt.LoraConfig(use_dora=True), "use_dora"),
        (jaxadapt.LoraConfig(bias="all"), "bias='all'"),
        (jaxadapt.LoraConfig(kasa_config={}), "kasa_config"),
        (jaxadapt.LoraConfig(alora_invocation_tokens=[1]), "adapts every token"),
    ):
        with pytest.raises(jaxadapt.ConfigError, match=what):
            jaxadapt.to_peft(jaxadapt.models.LoraTree(tree, config=config), keymap=TABLE)
    with pytest.raises(jaxadapt.ConfigError, match="expected a LoraConfig"):
        jaxadapt.to_peft(
            jaxadapt.models.LoraTree(tree, config=jaxadapt.IA3Config(target_modules=["up"], feedforward_modules=[])),
            keymap=TABLE,
        )


def test_target_modules_name_what_is_adapted_and_nothing_else():
    """In short where a short name means the same, else in full; in full where the base is not at hand."""
    flat_tree = {
        f"{layer}.{name}.kernel": np.zeros((D, F), np.float32) for layer in range(2) for name in ("up", "gate", "q")
    }
    for leaf in ("0.up", "1.up", "1.gate"):
        flat_tree |= {
            f"{leaf}.kernel_lora_a": np.zeros((D, R), np.float32), f"{leaf}.kernel_lora_b": np.zeros((R, F), np.float32)
        }  # fmt: skip
    found = jaxadapt.to_peft(LoraTree(nest(flat_tree), lora_alpha=1), keymap=TABLE).config
    assert set(found.target_modules) == {"up", "1.gate"}
    bare = {path: x for path, x in flat_tree.items() if not path.endswith("kernel")}
    found = jaxadapt.to_peft(LoraTree(nest(bare), lora_alpha=1), keymap=TABLE).config
    assert set(found.target_modules) == {"m.0.up", "m.1.up", "m.1.gate"}


def test_ranks_that_differ_become_a_pattern():
    tree = dense(**{
        "down.kernel": np.zeros((F, D), np.float32),
        "down.kernel_lora_a": np.ones((F, 3), np.float32), "down.kernel_lora_b": np.ones((3, D), np.float32),
        "x.kernel": np.zeros((F, D), np.float32),
        "x.kernel_lora_a": np.ones((F, 3), np.float32), "x.kernel_lora_b": np.ones((3, D), np.float32),
    })  # fmt: skip
    tensors = jaxadapt.to_peft(LoraTree(tree, lora_alpha=4), keymap=TABLE)
    assert (tensors.config.r, dict(tensors.config.rank_pattern)) == (3, {"up": R})
    adapter = jaxadapt.extract(LoraTree(tree, lora_alpha=4), keymap=TABLE)
    assert {p: x.shape for p, x in adapter.flat().items()}["up.kernel.lora_A"] == (R, D)


def test_dtypes_are_kept_or_refused(tmp_path):
    """bfloat16 into float32 leaves is exact; the other way is rounding, which must be asked for."""
    (case,) = (c for c in CASES if str(c) == "qwix-dense")
    told, table = {"lora_alpha": ALPHA}, case.table
    jaxadapt.save(LoraTree(case.tree(dtype="bfloat16"), **told), tmp_path / "16", keymap=table)
    jaxadapt.save(LoraTree(case.tree(), **told), tmp_path / "32", keymap=table)
    up = flat(jaxadapt.load(tmp_path / "16", LoraTree(case.tree(1), **told), keymap=table))[case.a[0]]
    assert up.dtype == "float32"
    np.testing.assert_array_equal(up, np.asarray(flat(case.tree(dtype="bfloat16"))[case.a[0]], np.float32))
    with pytest.raises(jaxadapt.MismatchError, match="(?s)represent these tensors exactly. Pass dtype=.*bfloat16"):
        jaxadapt.load(tmp_path / "32", LoraTree(case.tree(1, dtype="bfloat16"), **told), keymap=table)
    target = LoraTree(case.tree(1, dtype="bfloat16"), **told)
    down = jaxadapt.load(tmp_path / "32", target, keymap=table, dtype="bfloat16")
    assert flat(down)[case.a[0]].dtype == "bfloat16"


def test_a_file_of_another_model_changes_nothing(tmp_path):
    (case,) = (c for c in CASES if str(c) == "qwix-dense")
    jaxadapt.save(LoraTree(case.tree(), lora_alpha=ALPHA), tmp_path, keymap=case.table)
    wide = {"up.kernel": (D, F + 1), "up.kernel_lora_a": (D, R), "up.kernel_lora_b": (R, F + 1)}
    other = nest({path: np.zeros(shape) for path, shape in wide.items()})
    wrong = r"(?s)wrongly shaped.*m.up.lora_B.weight: expected \[15, any\], found \[14, 7\]"
    with pytest.raises(jaxadapt.MismatchError, match=wrong):
        jaxadapt.load(tmp_path, LoraTree(other, lora_alpha=ALPHA), keymap=case.table)
    renamed = jaxadapt.KeyMap("other", (jaxadapt.Weight("up.kernel", "n.up.weight", "i o -> o i"),))
    with pytest.raises(jaxadapt.MismatchError, match=r"(?s)missing.*n.up.lora_A.*unexpected.*m.up.lora_A"):
        jaxadapt.load(tmp_path, LoraTree(case.tree(1), lora_alpha=ALPHA), keymap=renamed)


def test_an_adapter_that_begins_at_a_token_does_not_fit_where_every_token_is_adapted(tmp_path):
    tree = dense()
    config = jaxadapt.LoraConfig(r=R, target_modules=["up"], alora_invocation_tokens=[1])
    adapter = jaxadapt.init({"up": tree["up"]}, config, key=jax.random.key(0), keymap=TABLE)
    jaxadapt.save(adapter, tmp_path)
    with pytest.raises(jaxadapt.ConfigError, match="qwix adapts every token"):
        jaxadapt.load(tmp_path, LoraTree(tree, lora_alpha=ALPHA), keymap=TABLE)
    jaxadapt.save(LoraTree(tree, lora_alpha=ALPHA), tmp_path / "plain", keymap=TABLE)
    with pytest.raises(jaxadapt.ConfigError, match="in qwix parameters with lora_alpha=0"):
        jaxadapt.load(tmp_path / "plain", LoraTree(tree, lora_alpha=0), keymap=TABLE)


def test_arguments_for_other_trees_are_refused(tmp_path):
    tree = dense()
    jaxadapt.save(LoraTree(tree, lora_alpha=ALPHA), tmp_path, keymap=TABLE)
    with pytest.raises(jaxadapt.AttachError, match="rngs"):
        jaxadapt.load(tmp_path, LoraTree(tree, lora_alpha=ALPHA), keymap=TABLE, rngs=1)
    plain = {"params": {"up": {"kernel": jnp.zeros((D, F))}}}
    with pytest.raises(jaxadapt.AttachError, match="lora_alpha: applies only to trees of other libraries"):
        jaxadapt.load(tmp_path, LoraTree(plain, lora_alpha=ALPHA), keymap=TABLE)
    adapter = jaxadapt.extract(LoraTree(tree, lora_alpha=ALPHA), keymap=TABLE)
    with pytest.raises(jaxadapt.AttachError, match="store their own"):
        jaxadapt.to_peft(LoraTree(adapter, lora_alpha=3))


@pytest.mark.parametrize("size", [D - 1, D + 1])
def test_arrays_that_contradict_their_base_are_refused(size):
    shapes = {"up.kernel": (D, F), "up.kernel_lora_a": (size, R), "up.kernel_lora_b": (R, F)}
    tree = nest({path: np.zeros(shape) for path, shape in shapes.items()})
    with pytest.raises(jaxadapt.KeyMapError, match=rf"up.kernel_lora_a \({size}, {R}\)(.|\n)*expected A \(i r\)"):
        jaxadapt.to_peft(LoraTree(tree, lora_alpha=ALPHA), keymap=TABLE)


def test_arrays_that_can_be_read_in_two_ways_are_refused():
    """Square ones, of a library that has both orders; beside the base's shape one is right."""
    pair = Pair("{module}.a", "{module}.b", "{module}.kernel", (("in r", "r out"), ("r in", "out r")))
    dialect = Dialect("both", (pair,))
    table = jaxadapt.KeyMap("t", (jaxadapt.Weight("up.kernel", "up.weight", "i o -> o i"),))
    with pytest.raises(jaxadapt.KeyMapError, match="ambiguous between 2 layouts"):
        survey.survey_sites(dialect, table, {"up.a": (4, 4), "up.b": (4, 4)}, {})
    sites = survey.survey_sites(dialect, table, {"up.a": (6, 4), "up.b": (4, 8)}, {"up.kernel": (6, 8)})
    assert [site.a.rank for site in sites.sites] == [4]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: Pair("{modul}.a", "{modul}.b", "{modul}.w"),
            r"must have the same holes, each one of \{module\}\..*\{modul\}",
        ),
        (lambda: Pair("{module}.a", "{leaf}.b", "{module}.w"), "must have the same holes"),
        (lambda: Pair("{module}_a", "{module}_b", "{module}"), "must have the same holes"),
        (lambda: Pair("{leaf}_a", "{leaf}_b", "{leaf}", (("inn r", "r out"),)), "also in parentheses; found:\n  inn$"),
        (lambda: Pair("{leaf}_a", "{leaf}_b", "{leaf}", (("(in r", "r out"),)), r"found:\n  \(in$"),
        (lambda: Dialect("d", (), moved=(("{leaf}.w", "{module}.w"),)), "must have the same holes"),
        (lambda: Dialect("d", (), heads="both"), "expected shared or own, found 'both'"),
        (lambda: import_dialect("acme"), "'acme' of the dialects: expected a file acme.py that defines DIALECT"),
    ],
)
def test_a_dialect_that_contradicts_itself_is_refused(make: Any, says: str):
    with pytest.raises(jaxadapt.KeyMapError, match=says):
        make()


# ---- a scale among the leaves ----------------------------------------------------------------------------


DOWN_UP = r"\.(down|up)$"


@pytest.fixture
def acme() -> Any:
    """A library that stores alpha/r beside its factors, under a name that `like` leaves out: one row of the table."""
    names = ("{module}.down", "{module}.up", "{module}.kernel")
    DIALECTS["acme"] = Dialect("acme", (Pair(*names, scale_leaf="{module}.gain"),), DOWN_UP)

    def tree(gain: Any, seed: int = 0) -> dict[str, Any]:
        rng = np.random.RandomState(seed)
        shapes = {"kernel": (D, F), "down": (D, R), "up": (R, F)}
        leaves = {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
        return {"q": leaves if gain is None else {**leaves, "gain": gain}}

    yield tree
    del DIALECTS["acme"]


@pytest.mark.parametrize("gain", [2.0, np.float32(2), np.full(3, 2, "float32"), jnp.asarray(2.0)], ids=repr)
def test_a_scale_leaf_is_read(acme: Any, gain: Any, tmp_path):
    """An array of a number, one for each layer, or a number: alpha is the scale times the rank."""
    tree = acme(gain)
    jaxadapt.save(tree, tmp_path, keymap=TABLE)
    assert jaxadapt.read(tmp_path).config.lora_alpha == 2 * R
    back = jaxadapt.load(tmp_path, acme(0.5, seed=1), keymap=TABLE)["q"]
    assert back["gain"] == 0.5
    np.testing.assert_array_equal(back["up"], 4 * tree["q"]["up"])  # the file's scale is four times the tree's
    np.testing.assert_array_equal(back["down"], tree["q"]["down"])
    with pytest.raises(jaxadapt.ConfigError, match="acme stores its alpha; leave it out"):
        jaxadapt.to_peft(LoraTree(tree, lora_alpha=3), keymap=TABLE)


@pytest.mark.parametrize(("leaf", "gain"), [("scale_leaf", 2.0), ("alpha_leaf", 2.0 * R)])
def test_a_scale_beside_factors_in_pytorchs_layout_is_read(acme: Any, leaf: str, gain: float, tmp_path):
    """On whichever axis the rank is: the file has the product of the tree, and fills another tree with it."""
    names: Any = {"layouts": (("r in", "out r"),), leaf: "{module}.gain"}
    DIALECTS["acme"] = Dialect("acme", (Pair("{module}.down", "{module}.up", "{module}.kernel", **names),), DOWN_UP)
    source, target = (acme(None, seed)["q"] for seed in (0, 1))
    for leaves in (source, target):
        leaves |= {"down": leaves["down"].T, "up": leaves["up"].T, "gain": np.float32(gain)}
    jaxadapt.save({"q": source}, tmp_path, keymap=TABLE)
    close(computed(jaxadapt.read(tmp_path)), {"m.q": 2 * source["up"] @ source["down"]})
    back = jaxadapt.load(tmp_path, {"q": {**target, "gain": gain / 4}}, keymap=TABLE)["q"]
    close({"q": gain / 4 * back["up"] @ back["down"]}, {"q": gain * source["up"] @ source["down"]})


def test_a_scale_leaf_of_a_model_is_read(acme: Any):
    """In an NNX model it is a variable that is no parameter, an array or a number."""

    class Net(nnx.Module):
        def __init__(self, gain: Any):
            self.q = nnx.Dict({name: nnx.Param(jnp.asarray(x)) for name, x in acme(None)["q"].items()})
            self.q["gain"] = nnx.Variable(gain)

    for gain in (2.0, jnp.asarray(2.0)):
        assert jaxadapt.to_peft(Net(gain), keymap=TABLE).config.lora_alpha == 2 * R


@pytest.mark.parametrize(
    ("gain", "says"),
    [
        (None, "q.gain: missing"),
        (jax.ShapeDtypeStruct((), "float32"), "q.gain: expected a concrete array"),
    ],
    ids=repr,
)
def test_a_scale_leaf_that_cannot_be_read_is_reported(acme: Any, gain: Any, says: str, tmp_path):
    """What failed, why, and the way out, which works."""
    says = (
        f"(?s)alpha of this tree is unknown.*its scale cannot be read:\n  {says}.*Pass .*LoraTree.tree, lora_alpha=16"
    )
    jaxadapt.save(acme(2.0), tmp_path, keymap=TABLE)
    with pytest.raises(jaxadapt.ConfigError, match=says):
        jaxadapt.load(tmp_path, acme(gain), keymap=TABLE)
    back = jaxadapt.load(tmp_path, LoraTree(acme(gain, seed=1), lora_alpha=R), keymap=TABLE)
    np.testing.assert_array_equal(back["q"]["up"], 2 * acme(gain)["q"]["up"])


def test_a_scale_that_cannot_be_read_is_not_the_default_of_a_configuration(acme: Any):
    """lora_alpha=8 may be what the caller left out; inside jit the array of the scale has no value."""

    def out(gain: Any, **options: Any) -> Any:
        config = jaxadapt.LoraConfig(task_type="CAUSAL_LM", **options)
        return dict(jaxadapt.to_peft(LoraTree(acme(gain), config=config), keymap=TABLE).tensors)

    for call, gain in ((out, None), (jax.jit(out), 2.0)):
        with pytest.raises(jaxadapt.ConfigError, match="its scale cannot be read"):
            call(gain)
    assert len(jax.jit(lambda gain: out(gain, lora_alpha=16))(2.0)) == 2


def test_several_scales_of_one_array_are_refused(acme: Any, tmp_path):
    """No alpha is right for all layers, neither one that the caller passes."""
    jaxadapt.save(acme(2.0), tmp_path, keymap=TABLE)
    tree = LoraTree(acme(np.array([1, 2], "float32")), lora_alpha=R)
    says = (
        r"(?s)one scale for each.*q\.gain: expected one number for all stacked layers, found \[1\.0, 2\.0\]\nMultiply B"
    )
    with pytest.raises(jaxadapt.MismatchError, match=says):
        jaxadapt.to_peft(tree, keymap=TABLE)
    with pytest.raises(jaxadapt.MismatchError, match=says):
        jaxadapt.load(tmp_path, tree, keymap=TABLE)


@pytest.mark.parametrize("scale", [2.0, np.float32(2)])
def test_a_scale_that_no_dialect_knows_is_no_leaf_to_ignore(scale: Any):
    """It may be an array or a number; the advice is to pass it."""
    tree = dense(**{"up.lora_scaling": scale})
    says = r"(?s)up\.lora_scaling.*If they hold its scale.*LoraTree\(tree, lora_alpha=…\)"
    with pytest.raises(jaxadapt.KeyMapError, match=says):
        jaxadapt.to_peft(LoraTree(tree, lora_alpha=ALPHA), keymap=TABLE)


def test_equal_rows_of_one_head_stay_apart():
    """A row of B is shared by heads, each at most once: two equal rows of one head multiply two columns of A."""
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 3))
    b = np.stack([np.stack([one, one]), np.stack([one, other])])  # (r, heads, last)
    a = rng.standard_normal((5, 2))
    weight = jaxadapt.Weight("q.kernel", "q.weight", "d n h -> (n h) d")
    pair = forms.HeadPair("a", "b", weight, {"d": 5, "n": 2, "h": 3}, True)
    by_head, rows, _ = pair.narrow(a, b)
    np.testing.assert_allclose(np.einsum("dnk,kh->dnh", by_head, rows), np.einsum("dr,rnh->dnh", a, b), rtol=1e-12)


@pytest.mark.parametrize("hidden", DIALECTS)
def test_a_dialect_hidden_leaves_the_rest_working(hidden: str, monkeypatch, tmp_path):
    """Nothing outside its file and its row needs it: the other dialects, and adapters of jaxadapt."""
    monkeypatch.delitem(DIALECTS, hidden)
    first = {case.dialect: case for case in reversed(CASES) if case.leaf == ""}
    for case in (case for name, case in first.items() if name != hidden):
        scale = {} if DIALECTS[case.dialect].unscaled or case.dialect == "lorax" else {"lora_alpha": ALPHA}
        assert jaxadapt.to_peft(LoraTree(case.tree(), **scale), keymap=case.table).config.r == R
    if hidden in first:
        with pytest.raises(jaxadapt.AdapterError):
            jaxadapt.to_peft(first[hidden].tree(), keymap=first[hidden].table)
    base = {"up": {"kernel": np.ones((4, 6), "float32")}}
    adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=2, target_modules=["up"]), key=jax.random.key(0))
    jaxadapt.save({"params": base, **adapter.collection}, tmp_path)
    back = jaxadapt.extract(jaxadapt.load(tmp_path, {"params": base}))
    jax.tree.map(np.testing.assert_array_equal, back.params, adapter.params)
