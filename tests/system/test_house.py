"""The packages: each imports only from packages below it, and each heavy library comes in through few of them.

Imports are read from the source, those inside functions included. Imports under `if TYPE_CHECKING:` do not run; they
only have to name modules that exist.
"""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jaxadapt import AdapterError
from jaxadapt.configs.matching import PEFT_TYPES
from jaxadapt.configs.table import FACTS

PACKAGE = Path(__file__).resolve().parents[2] / "jaxadapt"

# From the bottom to the top; a package imports from those above it in this table.
PACKAGES = (
    "core", "configs", "arrays", "keymaps", "methods", "storage", "adapters", "models", "merging", "initializers",
    "analysis", "persistence", "serving", "training", "export", "demo", "server", "cli",
)  # fmt: skip
RANK = {package: number for number, package in enumerate(PACKAGES)}

# What a package does not import although it lies below: these packages can be read and used without the others.
NEVER = {
    "storage": {"configs", "keymaps", "methods"},  # tensors and bytes; what a plan does to a tensor is passed in
}

# library -> the packages and modules that may import it
DOORS: dict[str, set[str]] = {
    "jax": {*PACKAGES} - {"core", "configs"},
    "flax": {"models", "demo"},
    # The library never imports torch; the demo compares with PEFT in a process of its own.
    "torch": {"demo.finetune"},
    "peft": {"demo.finetune"},
    "transformers": {"demo.finetune"},
    "pickle": set(),  # opcodes are split with pickletools, which executes nothing
    "huggingface_hub": {"storage.hub"},
    "orbax": {"storage.orbax"},
    "fsspec": {"storage.location"},
    "optax": {"demo", "training.optim"},
    "safetensors": {"storage.safetensors"},
    "click": {"cli"},
    "rich": {"cli", "demo", "models.summary_table", "core.errors"},
    "matplotlib": {"demo", "analysis.heat_maps"},
    "gguf": {"demo", "export.gguf_files"},
    "qwix": {"arrays.quantized"},  # where somebody's weights are its arrays
    "tokenizers": {"demo"},
    "starlette": {"server.app"},
    "uvicorn": {"server.app"},
}

LONG = 600  # lines; a longer file is a warning, and a much longer one a failure


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`jaxadapt/storage/orbax.py` -> "storage.orbax"; the package's own `__init__` -> ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str) -> bool:
    place = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def nodes(tree: ast.AST, typing_only: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, with whether it stands under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        yield node, typing_only
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for part in node.body:
                yield part, True
                yield from nodes(part, True)
            for part in node.orelse:
                yield part, typing_only
                yield from nodes(part, typing_only)
        else:
            yield from nodes(node, typing_only)


@functools.cache
def imports(path: Path) -> list[tuple[str, bool, int]]:
    return list(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(dotted name, only for type checkers, line) of every import in a file; relative ones made absolute."""
    here = ["jaxadapt", *module_of(path).split(".")] if module_of(path) else ["jaxadapt"]
    package = here if path.name == "__init__.py" else here[:-1]
    for node, typing_only in nodes(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, typing_only, node.lineno
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = ".".join([*package[: len(package) - node.level + 1], *filter(None, [source])])
            inside = source.removeprefix("jaxadapt").lstrip(".")
            ours = source.split(".")[0] == "jaxadapt"
            names = {f"{inside}.{alias.name}".lstrip(".") for alias in node.names}
            # `from jaxadapt.storage import orbax` imports a module
            modules = {name for name in names if ours and exists(name)}
            for name in sorted(modules):
                yield f"jaxadapt.{name}", typing_only, node.lineno
            if names - modules:
                yield source, typing_only, node.lineno
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name | ast.Attribute)
            and (node.func.id if isinstance(node.func, ast.Name) else node.func.attr) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value), typing_only, node.lineno


def package_of(module: str) -> str:
    return module.split(".")[0]


def test_the_root_folder_holds_packages_alone():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__"}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(PACKAGES), "give a new package its line in this file and in CONTRIBUTING.md"


def test_contributing_draws_every_package(root: Path):
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^    (\w+)/ ", text.partition("\n    jaxadapt/\n")[2].partition("\n\n")[0], re.MULTILINE)
    assert drawn == list(PACKAGES), "CONTRIBUTING.md draws the packages in this order, bottom first"


def test_the_examples_of_contributing_are_right(root: Path):
    """(That of a method is in `tests/methods/test_register.py`.)"""
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")

    def example(heading: str) -> dict[str, Any]:
        section = text.partition(f"### {heading}\n")[2].partition("\n### ")[0].partition("\n## ")[0]
        names: dict[str, Any] = {"__name__": "example"}
        (block,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        exec(compile(block, heading, "exec"), names)
        return names

    keymap = example("A new model family")["ACME"]
    assert keymap.match("block_3.q.w").module({}) == "model.layers.3.self_attn.q_proj"
    dialect = example("A new dialect")["DIALECT"]
    claims = dialect.claim({"q.lora_down", "q.lora_up"})
    assert {leaf: [claim[1:3] for claim in each] for leaf, each in claims.items()} == {
        "q.kernel": [("q.lora_down", "q.lora_up")]
    }
    command = example("A new command")["count_command"]
    folder = root / "tests" / "missing"
    result = CliRunner().invoke(command, [str(folder), "--json"])
    assert isinstance(result.exception, AdapterError)
    assert "jaxadapt count out/" in CliRunner().invoke(command, ["--help"]).output


def test_contributing_names_what_exists(root: Path):
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Add something\n")[2].partition("\n## ")[0]
    named = {name for name in re.findall(r"`((?:\w+/)+\w+\.py|(?:\w+/)+)`", section) if "sketch" not in name}
    missing = {name for name in named if not (root / name).exists() and not (PACKAGE / name).exists()}
    assert not missing, "CONTRIBUTING.md names files that do not exist"
    for package, rest in re.findall(rf"`(?:jaxadapt\.)?({'|'.join(PACKAGES)})\.([\w.]+)`", text):
        module, _, name = f"{package}.{rest}".rpartition(".")
        place = PACKAGE.joinpath(*module.split("."))
        source = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
        assert source.is_file(), f"CONTRIBUTING.md names {module}"
        assert name in re.findall(r"\w+", source.read_text(encoding="utf-8")), f"{module}.{name}"
    code = "\n".join(path.read_text(encoding="utf-8") for path in (*files(), *(root / "tests").rglob("*.py")))
    known = set(re.findall(r"\w+", code))
    tables = set(re.findall(r"`(_?[A-Z][A-Z_]{3,}|test_\w+)`", section))
    assert "DIALECTS" in tables
    assert tables <= known, "CONTRIBUTING.md names tables and tests that do not exist"


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_says_its_purpose(package: str):
    assert ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text(encoding="utf-8")))


def test_packages_import_downwards():
    wrong = []
    for path in files():
        me = module_of(path)
        for name, typing_only, line in imports(path):
            if package_of(name) != "jaxadapt":
                continue
            other = name.removeprefix("jaxadapt").lstrip(".")
            where = f"{path.relative_to(PACKAGE.parent)}:{line}"
            if not exists(other):
                wrong.append(f"{where} imports {name}, which does not exist")
            elif typing_only or me in ("", "__main__") or package_of(me) == package_of(other):
                continue
            elif not other:
                # Applications are written as users write: against the façade.
                if package_of(me) not in ("cli", "demo", "server"):
                    wrong.append(f"{where} imports the façade")
            elif RANK[package_of(other)] > RANK[package_of(me)] or package_of(other) in NEVER.get(package_of(me), ()):
                wrong.append(f"{where} ({package_of(me)}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files():
    """Imports for type checkers count too, but for those of a package's façade, which list its names."""
    above: dict[str, set[str]] = {}
    for path in files():
        me = module_of(path)
        facade = path.name == "__init__.py"
        found = (name for name, typing_only, _ in imports(path) if not (typing_only and facade))
        ours = (name for name in found if package_of(name) == "jaxadapt")
        above[me] = {other for name in ours if (other := name.removeprefix("jaxadapt").lstrip(".")) and other != me}
    left = dict(above)
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"these import each other: {sorted(left)}"


def test_libraries_have_their_doors():
    wrong = []
    for path in files():
        me = module_of(path)
        for name, typing_only, line in imports(path):
            library = package_of(name)
            if library not in DOORS or typing_only:
                continue
            allowed = DOORS[library]
            if me not in allowed and package_of(me) not in allowed:
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line} imports {library}; only {sorted(allowed)} may")
    assert not wrong, "\n".join(wrong)


def test_flax_is_not_reached_through_other_modules():
    """Neither as `graph.nnx.Module`, nor by `from jaxadapt.models.nnx_adapters import nnx`."""
    names, wrong = {"flax", "nnx", "nn", "linen", "meta"}, []
    for path in files():
        me = module_of(path)
        if me in DOORS["flax"] or package_of(me) in DOORS["flax"]:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            reached: set[str] = set()
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                reached = names & {node.attr}
            elif isinstance(node, ast.ImportFrom):
                reached = {
                    alias.name
                    for alias in node.names
                    if alias.name in names and not exists(f"{node.module}.{alias.name}".removeprefix("jaxadapt."))
                }
            wrong += [f"{path.relative_to(PACKAGE.parent)}:{node.lineno} uses {name}" for name in reached]
    assert not wrong, "\n".join(wrong)


def test_nothing_guesses_or_executes():
    """No `hasattr`: what a value is follows from its type. No eval, exec or compile."""
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno} calls {node.func.id}"
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("hasattr", "eval", "exec", "compile")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.filterwarnings("default")
def test_files_stay_short():
    lengths = {path.relative_to(PACKAGE.parent): len(path.read_text(encoding="utf-8").splitlines()) for path in files()}
    long = {str(name): lines for name, lines in lengths.items() if lines > LONG}
    if long:
        warnings.warn(f"over {LONG} lines: {long}", stacklevel=1)
    assert not {name: lines for name, lines in long.items() if lines > LONG + 100}


# Files outside a method's own that name it, and why.
NAMING = {
    "analysis.changes": "compares the changes of LORA and IA3, and the tensors of all other methods",
    "configs.matching": "the types of PEFT",
    "configs.table": "the table of the methods",
    "persistence.consumers": "the methods that other programs read",
    "persistence.formats.image_files": "the methods of kohya-ss and LyCORIS",
    "adapters.peft_tensors": "the types that only pass through, which have no file of their own",
    "persistence.reading": "the method that a file without a configuration may have",
    "server.engine": "IA3's configuration for all modules has a second list of them",
}


def test_only_its_own_files_name_a_method():
    """Neither by its type, nor by its modules or the class of its configuration; LORA is the method of all packages.

    A method's own are its file in `methods` and the class of its configuration, among others in one file.
    """
    own = {peft_type.lower() for peft_type in (*PEFT_TYPES, *FACTS)} - {"lora"}
    types = {(f"configs.{facts.module}", facts.config): peft_type for peft_type, facts in FACTS.items()}
    classes = {name for _, name in types} - {"LoraConfig"}
    found = set()
    for path in files():
        me = module_of(path)
        if path.stem in own or me.startswith("methods.lora"):
            continue
        for part in ast.parse(path.read_text(encoding="utf-8")).body:
            mine = types.get((me, part.name)) if isinstance(part, ast.ClassDef) else None
            for node in (part, *ast.walk(part)):
                if isinstance(node, ast.Constant) and node.value in PEFT_TYPES and node.value not in ("LORA", mine):
                    found.add(me)
                elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxadapt"):
                    parts = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                    if parts & (own | classes):
                        found.add(me)
    assert found == set(NAMING)
