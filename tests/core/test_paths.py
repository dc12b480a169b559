"""Dotted paths: nested mappings to flat ones and back; paths that exclude each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxadapt import AdapterError
from jaxadapt.core import paths

NAMES = st.text("ab0_", min_size=1, max_size=2)
TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=9)


@given(st.dictionaries(NAMES, TREES, max_size=3))
def test_a_tree_that_was_flattened_comes_back(tree: dict[str, object]):
    flat = paths.flatten(tree)
    assert not any(isinstance(leaf, dict) for leaf in flat.values())
    assert paths.unflatten(flat) == tree


@pytest.mark.parametrize("leaf", [1, {}, {"c": 1}])
@pytest.mark.parametrize("path", ["a.b", "a.b.c"])
def test_a_path_through_another_paths_leaf_is_refused(leaf: object, path: str):
    with pytest.raises(AdapterError, match=f"path '{path}' passes through 'a', the value of another path"):
        paths.unflatten({"a": leaf, path: 2})
    with pytest.raises(AdapterError, match="path 'a' has a value and other paths below it"):
        paths.unflatten({path: 2, "a": leaf})
