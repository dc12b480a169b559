"""The public names, pinned: adding or removing one is a decision, seen in this file and in CHANGELOG.md."""

from __future__ import annotations

import ast
import compileall
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest

import jaxadapt
from jaxadapt.configs import table
from jaxadapt.methods import adalora

VALUES = {"jaxadapt.models.BaseParam", "jaxadapt.methods.METHODS"}
# Functions return these, and methods are built from those of `jaxadapt.methods` (CONTRIBUTING.md has the example).
RETURNED = {"jaxadapt.serving.Bank", "jaxadapt.serving.Lease", "jaxadapt.serving.Rows"} | {
    f"jaxadapt.methods.{name}"
    for name in (
        *("AppliedMethod", "Change", "Drop", "Effects", "MatrixMethod", "Method", "MethodInfo", "Start", "Target"),
        *("describe_methods", "get_method"),
    )
}
CLASSES = {facts.config for facts in table.FACTS.values()}
PUBLIC = {
    # configuration
    "Config", "GenericConfig", *CLASSES,
    # values
    "Adapter", "Card", "MultihostFolder", "PeftTensors", "KeyMap", "Weight", "AdapterParam",
    # on a model
    "adapt", "init", "extract", "inject", "detach", "activate", "disable", "delete", "summary", "select",
    "merge", "unmerge", "combine",
    # files
    "save", "load", "read", "write", "inspect", "read_config", "to_peft", "from_peft", "verify", "repair",
    # while training
    "CheckpointManager",
    # the Hub
    "push", "pull",
    # errors
    "AdapterError", "AttachError", "ConfigError", "FileError", "FormatError", "KeyMapError", "MismatchError",
    "TargetError",
}  # fmt: skip
PACKAGES = {
    "analysis": {"compare_logprobs", "diff", "measure_norms", "norms_png"},
    "export": {"export_adapter", "export_base", "import_base"},
    "initializers": {"Batches", "for_original_base", "start"},
    "merging": {"convert_variant", "plain_lora", "resize_rank", "to_lora"},
    "methods": {
        "METHODS", "AppliedMethod", "Change", "Drop", "Effects", "MatrixMethod", "Method", "MethodInfo", "Start",
        "Target", "describe_methods", "get_method", "register",
    },
    "models": {
        "BaseParam", "FrozenParam", "LayerNumber", "SharedParam", "dequantize", "from_qwix", "invoke", "quantize",
        "rescale", "LoraTree", "Selection", "Target", "attention", "TakesEmbeddings", "TakesKeys", "RelativeBias",
        "extend_labels",
        "AdaptedTree",
        "Function",
        "adapter_filter",
    },
    "serving": {
        "AdapterPool", "Bank", "Decoder", "KVCache", "Lease", "Rows", "Sampling", "attach", "create", "detach", "get",
        "linen_forward", "nnx_forward", "prepare", "put", "route",
    },
}  # fmt: skip
EVERY = {f"jaxadapt.{name}" for name in PUBLIC} | {
    f"jaxadapt.{package}.{name}" for package, names in PACKAGES.items() for name in names
}


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_type_checkers_see_the_names_that_load(root: Path, package: str):
    """`__init__.pyi` lists the names of `__init__.py`, from the same modules."""
    found: dict[str, str] = {}
    for node in ast.parse((root / "jaxadapt" / package / "__init__.pyi").read_text(encoding="utf-8")).body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if alias.name != "*":
                found[alias.name] = str(getattr(node, "module", ""))
    loaded = importlib.import_module(f"jaxadapt.{package}".rstrip("."))
    assert found.keys() | (CLASSES if not package else set()) == set(loaded.__all__)
    for name, module in found.items():
        value = getattr(loaded, name)
        assert value is getattr(importlib.import_module(module), name)


def value_of(path: str) -> Any:
    """`jaxadapt.models.quantize` -> that function."""
    value: Any = jaxadapt
    for name in path.split(".")[1:]:
        value = getattr(value, name)
    return value


def test_public_names():
    assert set(jaxadapt.__all__) == PUBLIC | PACKAGES.keys() | {"optim"}
    assert sorted(jaxadapt.__all__) == jaxadapt.__all__
    assert set(dir(jaxadapt)) == {*jaxadapt.__all__, "__version__"}


@pytest.mark.parametrize("package", PACKAGES)
def test_names_of_a_package(package: str):
    assert set(getattr(jaxadapt, package).__all__) == PACKAGES[package]


@pytest.mark.parametrize("name", sorted(EVERY))
def test_each_name_is_there(name: str):
    value = value_of(name)
    assert name in VALUES or callable(value)
    assert name in VALUES or value.__doc__, f"{name} has no docstring"  # a filter is a value


@pytest.mark.parametrize("name", sorted(EVERY - VALUES))
def test_the_types_of_each_name_can_be_looked_up(name: str):
    """Builders of documentation do so; a type that only a type checker imports has no value."""
    typing.get_type_hints(value_of(name))


@pytest.mark.parametrize("name", sorted(EVERY - VALUES - RETURNED))
def test_each_docstring_has_an_example_and_says_what_is_raised(name: str):
    """Examples run as doctests, but for those that need the Hub or another library."""
    value = value_of(name)
    if isinstance(value, type) and issubclass(value, Exception):
        return
    text = inspect.getdoc(value) or ""
    assert ">>>" in text or f"{name}(" in text
    if inspect.isfunction(value):
        assert any(word in text for word in ("Raises", "raises", "errors as there", "refused")), "what is raised?"


def test_args_name_the_parameters_in_their_order():
    """`Args:` may leave out parameters; "keymap, dtype:" describes two of them."""
    wrong: list[str] = []
    for name in sorted(EVERY - VALUES):
        value = value_of(name)
        methods = vars(value).items() if isinstance(value, type) else ()
        for path, each in [(name, value), *((f"{name}.{n}", x) for n, x in methods if n[0] != "_")]:
            part = re.search(r"^Args:\n((?: .*\n|\n)+)", f"{inspect.getdoc(each) or ''}\n", re.MULTILINE)
            if part is not None and callable(each):
                entries = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", part[1], re.MULTILINE)
                named = [word.lstrip("*") for entry in entries for word in entry.split(", ")]
                order = list(inspect.signature(each).parameters)
                if not named or named != [word for word in order if word in named]:
                    wrong.append(f"{path}: Args has {named}, the signature {order}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_no_public_name_is_also_a_module(root: Path, package: str):
    """Importing a submodule binds its name on the package, over a public function of that name.

    Nor is a name of the root a module of a public package, which says for such a name that the root has it.
    """
    names = PUBLIC | PACKAGES.get(package, set())
    assert not {path.stem for path in (root / "jaxadapt" / package).iterdir()} & names, "rename these modules"


def test_names_of_modules_that_are_public():
    assert set(jaxadapt.optim.__all__) == {
        "decay_mask", "kasa_loss", "lora_fa", "lora_plus", "per_slot", "riemannian", "roles", "scale_by_rank"
    }  # fmt: skip
    assert set(adalora.__all__) == {"Allocation", "allocate_ranks", "orthogonality_loss", "prune"}


def test_optim_is_reached_through_the_package(root: Path):
    fresh(root, "import jaxadapt; jaxadapt.optim.lora_plus")  # in a process that has not imported it


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing_here'"):
        _ = jaxadapt.nothing_here


def test_version_is_one_number(root: Path):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert jaxadapt.__version__ == project["version"]
    assert f"## [{jaxadapt.__version__}]" in (root / "CHANGELOG.md").read_text()


HEAVY = set("jax jaxlib numpy flax optax orbax safetensors huggingface_hub rich click torch".split())


def fresh(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], env=env, text=True, capture_output=True, check=True
    )


def test_import_loads_nothing_heavy(root: Path):
    """In a new process: neither sys.modules nor the import log knows a heavy library."""
    done = fresh(root, "import sys, jaxadapt; jaxadapt.LoraConfig; print(*sys.modules)")
    assert not HEAVY & {name.split(".")[0] for name in done.stdout.split()}
    logged = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "jaxadapt" in logged
    assert not HEAVY & logged


def test_the_package_imports_without_its_sources(root: Path, tmp_path: Path):
    """Packagers ship compiled files only."""
    shutil.copytree(root / "jaxadapt", tmp_path / "jaxadapt", ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    assert compileall.compile_dir(tmp_path / "jaxadapt", quiet=2, legacy=True)
    for path in (tmp_path / "jaxadapt").rglob("*.py"):
        path.unlink()
    fresh(tmp_path, "import jaxadapt; jaxadapt.LoraConfig(r=2), jaxadapt.load, jaxadapt.methods.METHODS['VERA']")


def test_errors_load_nothing_heavy(root: Path):
    done = fresh(root, "import sys, jaxadapt; jaxadapt.AdapterError; print(*sys.modules)")
    assert not HEAVY & {name.split(".")[0] for name in done.stdout.split()}
