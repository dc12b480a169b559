"""The public names, pinned: adding or removing one is a decision, seen in this file and in CHANGELOG.md."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxadapt

PUBLIC = {
    # configuration
    "Config", "IA3Config", "LoraConfig",
    # values
    "Adapter", "PeftTensors", "KeyMap", "Weight",
    # on a model
    "adapt", "init", "start", "for_original_base", "extract", "inject", "slot", "detach",
    "activate", "disable", "delete", "summary", "invoke",
    "export_base", "import_base", "merge", "unmerge", "combine", "rescale", "resize_rank",
    "to_lora", "plain_lora", "AdapterParam", "BaseParam", "LayerNumber",
    # its base in 4 or 8 bits
    "quantize", "dequantize", "from_qwix",
    # files
    "save", "load", "read", "write", "inspect", "read_config", "to_peft", "from_peft",
    # while training
    "CheckpointManager",
    # the Hub
    "push", "pull",
    # errors
    "AdapterError", "AttachError", "ConfigError", "FileError", "FormatError", "KeyMapError", "MismatchError",
    "TargetError",
}  # fmt: skip


def test_public_names():
    assert set(jaxadapt.__all__) == PUBLIC
    assert sorted(jaxadapt.__all__) == jaxadapt.__all__
    assert set(dir(jaxadapt)) == PUBLIC | {"__version__", "optim"}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_name_is_there(name: str):
    value = getattr(jaxadapt, name)
    assert callable(value)
    assert name == "BaseParam" or value.__doc__, f"{name} has no docstring"  # a filter is a value


@pytest.mark.parametrize("name", sorted(PUBLIC - {"BaseParam"}))
def test_each_docstring_has_an_example_and_says_what_is_raised(name: str):
    """Examples run as doctests, but for those that need the Hub or another library."""
    value = getattr(jaxadapt, name)
    if isinstance(value, type) and issubclass(value, Exception):
        return
    text = inspect.getdoc(value) or ""
    assert ">>>" in text or f"jaxadapt.{name}(" in text
    if inspect.isfunction(value):
        assert any(word in text for word in ("Raises", "raises", "errors as there", "refused")), "what is raised?"


def test_typed_imports_equal_the_table(root: Path):
    """What type checkers see under TYPE_CHECKING is what `__getattr__` serves."""
    seen: dict[str, str] = {}
    for node in ast.walk(ast.parse((root / "jaxadapt" / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxadapt."):
            seen |= {alias.name: str(node.module).removeprefix("jaxadapt.") for alias in node.names}
    assert seen == jaxadapt._HOME
    assert set(seen) == PUBLIC


def test_no_public_name_is_also_a_module(root: Path):
    """Importing a submodule binds its name on the package, over a public function of that name."""
    modules = {path.stem for path in (root / "jaxadapt").iterdir()}
    assert not modules & PUBLIC, "rename these modules (merge.py -> merging.py, say)"


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


def test_errors_load_nothing_heavy(root: Path):
    done = fresh(root, "import sys, jaxadapt; jaxadapt.AdapterError; print(*sys.modules)")
    assert not HEAVY & {name.split(".")[0] for name in done.stdout.split()}
