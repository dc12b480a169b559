"""The registry's statements about its modules are true: paths, ranks, stacked axes, and that they run."""

from __future__ import annotations

import flax.linen as nn
import jax
import pytest
from flax import nnx

from tests.support.twins import layers, trees


def check(case: layers.Case, shapes: dict[str, tuple[int, ...]]) -> None:
    for leaf, axes in case.roles.items():
        assert leaf in shapes, (leaf, sorted(shapes))
        own = len(shapes[leaf]) - (leaf in case.stack)
        assert sorted(axes.in_axes + axes.out_axes + axes.batch_axes) == list(range(own)), leaf
    if case.stack:  # three layers; two in the gemma stack and the vmap
        assert {shapes[leaf][axis] for leaf, axis in case.stack.items()} <= {2, 3}


@pytest.mark.parametrize("case", layers.params(layers.NNX))
def test_nnx(case):
    model = case.make()
    check(case, {path: v.shape for path, v in trees.nnx_leaves(model).items()})
    nnx.eval_shape(lambda model, *inputs: model(*inputs), model, *case.inputs())


@pytest.mark.parametrize("case", layers.params(layers.LINEN))
def test_linen(case):
    module, key = case.make(), jax.random.key(0)
    arrays, words = {}, {}  # an equation is an argument too, but not one that can be traced
    for i, value in enumerate(case.inputs()):
        (words if isinstance(value, str) else arrays)[i] = value

    def run(arrays):
        inputs = [value for _, value in sorted({**arrays, **words}.items())]
        rngs = dict.fromkeys(case.rngs, key)
        variables = module.init({"params": key, **rngs}, *inputs)
        return variables, module.apply(variables, *inputs, rngs=rngs, mutable=list(case.mutable) or False)

    params = nn.meta.unbox(jax.eval_shape(run, arrays)[0]["params"])
    leaves = jax.tree_util.tree_leaves_with_path(params)
    check(case, {".".join(k.key for k in path): leaf.shape for path, leaf in leaves})


def test_names_are_unique():
    for cases in (layers.NNX, layers.LINEN):
        names = [case.name for case in cases]
        assert len(names) == len(set(names))


def test_targets_name_modules_or_their_leaves():
    by_name = {case.name: case for case in layers.LINEN}
    assert by_name["block"].targets == ["q", "o"]
    assert by_name["gemma_mlp"].targets == ["layer.gating_einsum", "layer.linear"]
    assert by_name["bare"].targets == [""]
