"""Every table against the real models, in PyTorch and in JAX: a new table is tested by being there.

Base weights go PyTorch → JAX → PyTorch bit for bit, each key of the state dict claimed once, and the JAX model with a
PEFT adapter loaded gives PEFT's logits. Where the JAX class is in another environment, its shapes and logits are those
`record.py` wrote down.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

import jaxadapt
from jaxadapt import KeyMapError
from jaxadapt.keymaps import check, families, keymap
from jaxadapt.keymaps import plan as pieces
from jaxadapt.keymaps.families import FAMILIES
from tests.keymaps.families import jax_side, specimen_arrays
from tests.keymaps.families.specimens import RECORDED, SPECIMENS, Specimen, recorded

if importlib.util.find_spec("peft") is not None:
    from tests.keymaps.families import torch_side
    from tests.support import peft_harness as harness

# Logits are about 4, and two float32 implementations of a tiny model differ by some 1e-5: weights are large here, so
# that the softmax of the attention passes rounding on.
CLOSE = {"rtol": 0, "atol": 1e-4}
EVERY = pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
LIVE = [s for s in SPECIMENS if jax_side.here(s)]
DIFFERING_LAYERS = ("maxtext-gemma4-31b", "maxtext-gemma4-26b", "maxtext-gemma4-e2b")
ELSEWHERE = [s for s in SPECIMENS if (RECORDED / f"{s.name}.json").exists()]


def shapes_of(specimen: Specimen) -> dict[str, tuple[int, ...]]:
    return jax_side.side(specimen).shapes if specimen in LIVE else recorded(specimen.name)["leaves"]


def keys_without_entry(specimen: Specimen) -> set[str]:
    joined = (keys for _, layers in specimen.joined for keys in layers)
    return {key for keys in (*(keys for _, keys in specimen.unmapped), *joined) for key in keys}


def leaves_without_entry(specimen: Specimen) -> set[str]:
    return {leaf for leaf, _ in (*specimen.unmapped, *specimen.joined)}


def without(shapes: Any, names: Any) -> Any:
    return {name: shape for name, shape in shapes.items() if name not in names}


def test_every_proved_table_has_its_proof():
    plain = {s.table.partition("/")[0] for s in SPECIMENS}
    assert plain == {name for name, table in FAMILIES.items() if table.proved}
    for specimen in SPECIMENS:
        assert jax_side.here(specimen) or specimen in ELSEWHERE or specimen.side.startswith("tunix"), specimen.name


@pytest.mark.parametrize("specimen", ELSEWHERE, ids=str)
def test_it_is_recognized_by_names_and_shapes(specimen):
    recognized(specimen, recorded(specimen.name)["leaves"])


def recognized(specimen: Specimen, shapes: Any) -> None:
    if not specimen.rivals:
        assert families.resolve_keymap("auto", shapes).name == specimen.table
        return
    with pytest.raises(KeyMapError, match="fit several keymaps") as caught:
        families.resolve_keymap("auto", shapes)
    for rival in specimen.rivals:
        assert rival in str(caught.value)


@pytest.mark.parametrize("specimen", ELSEWHERE, ids=str)
def test_no_table_covers_more_than_the_ends_of_its_lines_promise(specimen):
    shapes = recorded(specimen.name)["leaves"]
    for table in FAMILIES.values():
        assert keymap.coverage(table, shapes) <= keymap.max_coverage(table, shapes, scanned=False)
        most = keymap.max_coverage(table, shapes, scanned=True)
        assert all(keymap.coverage(table.scanned(axis), shapes) <= most for axis in range(3))


@pytest.mark.parametrize("specimen", [s for s in LIVE if s in ELSEWHERE], ids=str)
@pytest.mark.usefixtures("foreign_model")
def test_what_was_recorded_is_what_the_package_does(specimen, tmp_path):
    side, found = jax_side.side(specimen), recorded(specimen.name)
    assert side.shapes == found["leaves"]
    specimen_arrays.write_adapter(specimen, side.shapes, tmp_path)
    logits, _ = side.adapted(side.make(specimen_arrays.base_leaves(specimen, side.shapes)), tmp_path, specimen.keymap)
    np.testing.assert_allclose(logits.ravel(), found["logits"], **CLOSE)


@pytest.mark.peft
@EVERY
def test_base_weights_go_both_ways_bit_for_bit(specimen):
    weights, shapes = torch_side.state(specimen), shapes_of(specimen)
    made = specimen_arrays.base_plan(specimen, shapes)
    whole = specimen_arrays.whole(made)
    gone = {*specimen.unused, *keys_without_entry(specimen)}
    assert whole == {key: x.shape for key, x in weights.items() if key not in gone}
    tied = dict(families.get_family(specimen.table).tied)
    for key in specimen.unused:
        np.testing.assert_array_equal(weights[key], weights[tied[key]])
    leaves = made.decode(pieces.cut_parts({key: weights[key] for key in whole}, made.keys))
    assert {path: x.shape for path, x in leaves.items()} == without(shapes, leaves_without_entry(specimen))
    back = made.encode(leaves)
    for key, parts in pieces.group_by_file_key(made.keys).items():
        again = pieces.join_parts([back[part] for part in parts], parts, np)
        if not made.keys[parts[0]][0].form.is_exact:  # a factor that is no power of two, a sum 1 + w: rounded twice
            np.testing.assert_allclose(again, weights[key], rtol=2.5e-7, atol=6e-8)
        else:
            np.testing.assert_array_equal(again, weights[key], err_msg=key)
    rounds = specimen.table.startswith(("maxtext:llama3", "maxtext:mi")) and specimen.options["head_dim"] == 6
    holds_more = specimen.table.startswith(("maxtext:gemma2", "maxtext:gemma3", "maxtext:gpt3"))  # norms hold w ± 1
    assert any(not entry.form.is_exact for entry in made.entries) == (rounds or holds_more)


@pytest.mark.peft
@EVERY
def test_modules_are_sorted_as_pytorch_has_them(specimen):
    """The order of a state dict is that of `named_modules`."""
    table = families.get_family(specimen.table)
    weights = [k.removesuffix(".weight") for k, x in torch_side.state(specimen).items() if k.endswith(".weight")]
    known = [m for m in weights if all(part.isdigit() or part in table.order for part in m.split("."))]
    assert len(known) > 3
    assert list(keymap.sort_modules(table, sorted(known))) == known


@pytest.mark.peft
@EVERY
def test_the_check_says_so(specimen):
    """`jaxadapt check-keymap` finds nothing to complain of, and what is taken away it misses."""
    tensors = {key: tuple(x.shape) for key, x in torch_side.state(specimen).items()}
    shapes, table = shapes_of(specimen), families.get_family(specimen.table)
    lost = keys_without_entry(specimen)
    found = check.check_keymap(table, shapes, tensors).problems
    if specimen.joined:  # two modules in one leaf: neither the model nor the checkpoint fits
        assert set(found) == {"unclaimed", "twice", "misshapen"}
        assert set(found["unclaimed"]) == {key for key in lost if "in_proj_qkv" not in key}
        assert {key.partition(":")[0] for key in found["misshapen"]} == {key for key in lost if "in_proj_qkv" in key}
    elif lost:  # they are named, on both sides
        assert {kind: set(names) for kind, names in found.items()} == {"unclaimed": {*lost, *dict(specimen.unmapped)}}
    shapes, tensors = without(shapes, leaves_without_entry(specimen)), without(tensors, lost)
    for leaves, keys in ((shapes, None), (shapes, tensors)):
        assert check.check_keymap(table, leaves, keys).problems == {}
    alone = check.check_keymap(table, None, tensors).problems
    # What only some layers have, a checkpoint alone cannot tell from a loss.
    differing = specimen.name in DIFFERING_LAYERS
    assert alone.keys() == ({"missing"} if differing else set())
    assert not set(alone.get("missing", ())) & set(tensors)
    claimed = check.check_keymap(table, shapes, tensors).claims
    assert {key for keys in claimed.values() for key in keys} == tensors.keys() - set(specimen.unused)
    layer = next(k for k in tensors if ".1." in k and k.endswith(".weight"))
    less = {key: shape for key, shape in tensors.items() if key != layer}
    for leaves, besides in ((shapes, {}), (None, alone)):
        found = check.check_keymap(table, leaves, less).problems
        assert {kind: set(keys) for kind, keys in found.items()} == {"missing": {layer, *besides.get("missing", ())}}


@pytest.mark.peft
@EVERY
def test_a_peft_adapter_gives_pefts_logits(specimen, tmp_path):
    """And what is saved again is what PEFT wrote."""
    torch_side.save(specimen, tmp_path / "peft")
    expected = torch_side.logits(specimen.name, adapter=True)
    assert np.abs(expected - torch_side.logits(specimen.name, adapter=False)).max() > 0.1
    if specimen not in LIVE:
        np.testing.assert_allclose(recorded(specimen.name)["logits"], expected.ravel(), **CLOSE)
        shapes = recorded(specimen.name)["leaves"]
        specimen_arrays.write_adapter(specimen, shapes, tmp_path / "ours")  # what the recording loaded
        same_tensors(tmp_path / "ours", tmp_path / "peft")
        return
    side = jax_side.side(specimen)
    recognized(specimen, side.shapes)
    with jaxadapt_ranks():
        target = side.make(specimen_arrays.base_leaves(specimen, side.shapes))
        np.testing.assert_allclose(side.logits(target), torch_side.logits(specimen.name, adapter=False), **CLOSE)
        logits, carrier = side.adapted(target, tmp_path / "peft", specimen.keymap)
    np.testing.assert_allclose(logits, expected, **CLOSE)
    jaxadapt.save(carrier, tmp_path / "ours")
    same_tensors(tmp_path / "ours", tmp_path / "peft")


def jaxadapt_ranks() -> Any:
    import jax

    return jax.numpy_rank_promotion("allow")  # other people's models broadcast


def same_tensors(ours: Any, theirs: Any) -> None:
    found, expected = harness.read_tensors(ours), harness.read_tensors(theirs)
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
