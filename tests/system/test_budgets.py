"""Budgets of the house: its size, the files and moves of a call, and what the tests know of its inside. Each only goes
down.

A change that exceeds a budget is mended, or makes room elsewhere. A change that leaves room lowers the budget.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

import jaxadapt
from tests.support import house

PACKAGE = Path(jaxadapt.__file__).parent
# Of the package's source, as it stands.
FILES, STATEMENTS, IMPORTS = 189, 25_346, 0.0858
ANY_PYTREE = 1, 461  # what the tree of any pytree adds: files and statements
# {leaf: its statements}: one file for one program, library or family. No other file imports it when it loads: a table
# names it, or a function imports it. The core is what remains.
LEAVES = {
    "analysis/heat_maps.py": 81,
    "analysis/logprobs.py": 72,
    "cli/served.py": 27,
    "keymaps/families/bonsai.py": 41,
    "keymaps/families/falcon.py": 4,
    "keymaps/families/gpt_neox.py": 3,
    "keymaps/families/keras.py": 30,
    "keymaps/families/keras_encoder.py": 23,
    "keymaps/families/keras_fused.py": 11,
    "keymaps/families/keras_gemma.py": 16,
    "keymaps/families/maxtext_deepseek2.py": 15,
    "keymaps/families/maxtext_gemma4.py": 13,
    "keymaps/families/maxtext_gpt3.py": 5,
    "keymaps/families/maxtext_llama4.py": 13,
    "keymaps/families/maxtext_olmo3.py": 9,
    "keymaps/families/maxtext_qwen3_next.py": 12,
    "keymaps/families/nemotron_h.py": 5,
    "keymaps/families/qwen3_next.py": 6,
    "keymaps/families/sigmoid_moe.py": 9,
    "keymaps/families/stablelm.py": 3,
    "persistence/formats/tinker_files.py": 237,
}
OVER_15_BRANCHES, OVER_25_BRANCHES, OVER_10_PARAMETERS = 40, 0, 1
CHAIN, CIRCLES = 17, ()
# {call on a warm NNX model of two layers: (files, moves into a function of another file)}.
WALKS = {
    "load": (25, 240),
    "save": (22, 233),
    "to_peft": (9, 27),
    "adapt": (20, 155),
    "inject": (8, 17),
    "merge": (17, 174),
}
# What the tests name of the inside (`house.inner_modules`), and the places where they replace something of it.
INNER_MODULES, REPLACED = 57, 25


@pytest.fixture(scope="module")
def numbers() -> house.House:
    return house.measure(PACKAGE)


def over(counts: Any, limit: int) -> list[str]:
    """The functions with more than `limit`, the largest first."""
    return [f"{name}: {count}" for name, count in counts.most_common() if count > limit]


def test_the_number_of_files_and_statements(numbers: house.House):
    apart = {name: len(house.statements(ast.parse((PACKAGE / name).read_text()))) for name in LEAVES}
    assert {name: count for name, count in apart.items() if count > LEAVES[name]} == {}
    assert numbers.files - len(apart) <= FILES + ANY_PYTREE[0]
    assert numbers.statements - sum(apart.values()) <= STATEMENTS + ANY_PYTREE[1]
    assert numbers.imports <= IMPORTS


def test_no_other_file_imports_a_leaf_when_it_loads():
    names = {name.removesuffix(".py").replace("/", ".") for name in LEAVES}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).as_posix() in LEAVES:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxadapt."):
                module = (node.module or "").removeprefix("jaxadapt.")
                imported = {module, *(f"{module}.{each.name}" for each in node.names)}
                found += [f"{path.name}: {name}" for name in sorted(imported & names)]
    assert found == []


def test_the_functions_with_many_branches_or_parameters(numbers: house.House):
    many = over(numbers.branching, 15)
    assert len(many) <= OVER_15_BRANCHES, many
    most = over(numbers.branching, 25)
    assert len(most) <= OVER_25_BRANCHES, most
    long = over(numbers.taking, 10)
    assert len(long) <= OVER_10_PARAMETERS, long


def test_tests_go_through_the_doors(root: Path):
    inner = house.inner_modules(root)
    assert len(inner) <= INNER_MODULES, inner
    replaced = house.replaced_internals(root)
    assert len(replaced) <= REPLACED, replaced


def test_the_longest_chain_of_imports_and_the_circles(numbers: house.House):
    assert numbers.chain <= CHAIN
    assert sum(numbers.circles) <= sum(CIRCLES), numbers.circles


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q_proj, self.v_proj = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(nnx.relu(self.up(self.q_proj(x) + self.v_proj(x))))


class Net(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.List([Block(nnx.Rngs(0)) for _ in range(2)])

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + layer(x)
        return x


def walks(folder: Path) -> dict[str, house.Walk]:
    """The walk of each call, on one new model."""
    config, model, other = jaxadapt.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), Net(), Net()
    follow = functools.partial(house.walk, PACKAGE)
    found = {
        "adapt": follow(lambda: jaxadapt.adapt(model, config, rngs=nnx.Rngs(1))),
        "to_peft": follow(lambda: jaxadapt.to_peft(model)),
        "save": follow(lambda: jaxadapt.save(model, folder)),
        "load": follow(lambda: jaxadapt.load(folder, model)),
    }
    jaxadapt.load(folder, other)
    adapter = jaxadapt.extract(model)
    found["inject"] = follow(lambda: jaxadapt.inject(other, adapter))
    found["merge"] = follow(lambda: jaxadapt.merge(model))
    return found


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, house.Walk]:
    """The walks of the third round; the first ones fill caches."""
    return [walks(tmp_path_factory.mktemp("walk")) for _ in range(3)][-1]


@pytest.mark.parametrize("call", WALKS)
def test_the_files_and_moves_of_a_call(call: str, warm: dict[str, house.Walk]):
    files, moves = WALKS[call]
    names = sorted(str(Path(name).relative_to(PACKAGE)) for name in warm[call].files)
    assert len(names) <= files, names
    assert warm[call].moves <= moves
