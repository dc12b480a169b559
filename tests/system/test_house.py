"""The house: a module imports only from floors below its own, and each heavy library has its few doors.

Imports are read from the source, lazy ones inside functions included; `if TYPE_CHECKING:` ones do not
run and are let through, save that they too may only name modules that exist.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "jaxadapt"

# Packages are listed by their first part: "configs" stands for everything under jaxadapt/configs/.
FLOORS = [
    ["errors", "terminal", "progress", "paths", "axes", "pattern", "configs"],
    "pieces weight arrangement keymap generic dialect plan adapter peft_tensors"
    " trace operations layout liveness layers targets drawing factors codecs consumers card hub"
    " quantized near tensor used boxes finite state_dicts".split(),
    "methods families agreeing copies parameters tying replication bind selecting renaming joining embeddings".split()
    + "folder per_expert orbax_folder transfer together vocabulary dialects guests guest_config laying sharding".split()
    + ["slots", "run_folder", "pytorch", "initial", "single_experts", "doubts", "filling", "plain", "heads"],
    "linen linen_call linen_survey linen_tree nnx nnx_survey merging products combining norms trees checking".split()
    + "observing eva nnx_calls nnx_layer nnx_params wholes untying base_weights".split(),
    "foreign planning attach exchange store bases report picture reducing rescaling invoking optim".split()
    + "beginning starting originals quantizing".split(),
    "converting on_disk sharing checkpoint snapshot resuming step_files step_reading".split()
    + "background preemption".split(),
    ["cli", "demo"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
TOP = len(FLOORS)  # __init__ and __main__ see everything

# Imports within one floor, each with its reason. A package's own files may import each other, and everything
# may raise: `errors` lies below floor 0.
SAME_FLOOR = {
    ("plan", "arrangement"): "a plan's entries are arranged",
    ("plan", "keymap"): "a plan is a keymap applied to shapes",
    ("keymap", "weight"): "a table is made of lines",
    ("generic", "weight"): "the lines where no family has one",
    ("generic", "keymap"): "the table where no family has one",
    ("adapter", "peft_tensors"): "the two values are known by one name",
    ("progress", "terminal"): "a bar shows somebody else's names",
    ("state_dicts", "peft_tensors"): "a file's tensors under other names",
    ("adapter", "keymap"): "an adapter carries the table it was made with",
    ("adapter", "weight"): "and writes its lines out as text",
    ("adapter", "generic"): "which is the generic map, unless it is told",
    ("plan", "weight"): "a tensor's layout follows from its line",
    ("plan", "tensor"): "and from what the method says of it",
    ("used", "trace"): "what a trace found is read",
    ("bind", "methods"): "a configuration is bound by its method",
    ("bind", "copies"): "and the leaves it copies are bound too",
    ("bind", "parameters"): "and those that it has by their own names",
    ("selecting", "bind"): "what is selected is bound",
    ("selecting", "methods"): "by its method",
    ("selecting", "copies"): "or as a copy",
    ("selecting", "parameters"): "or by its own name",
    ("copies", "methods"): "a copy is a method of its own",
    ("renaming", "bind"): "it knows an adapter's sites",
    ("renaming", "parameters"): "and by what names they go",
    ("boxes", "arrangement"): "boxes of arranged leaves, and of what is in files",
    ("together", "folder"): "it is written as a folder",
    ("embeddings", "bind"): "an adapter's sites tell which embeddings it has",
    ("selecting", "replication"): "whether a model has the layers that a configuration makes",
    ("selecting", "tying"): "what of a model's weights are one",
    ("copies", "tying"): "and whose copy counts in the lookup alone",
    ("embeddings", "tying"): "what PEFT takes for an embedding",
    ("vocabulary", "initial"): "whether a base leaf is there",
    ("vocabulary", "bind"): "whose rows a file is short of",
    ("vocabulary", "copies"): "and of which table",
    ("vocabulary", "tying"): "or head",
    ("targets", "near"): "an error says what comes near",
    ("selecting", "doubts"): "what may be a mistake in a selection",
    ("filling", "guests"): "what goes into the leaves that were bound",
    ("per_expert", "single_experts"): "names with holes are matched alike",
    ("per_expert", "joining"): "gate and up may share an A",
    ("joining", "bind"): "and which of them share an A in PyTorch",
    ("plan", "pieces"): "and a key of it may be a part of a tensor",
    ("embeddings", "copies"): "what a table of tokens is usually called",
    ("transfer", "sharding"): "arrays go where they belong",
    ("initial", "bind"): "an adapter's parameters are its sites'",
    ("initial", "sharding"): "and are made where they belong",
    ("nnx_calls", "nnx_survey"): "a call is watched by those who own the weights",
    ("orbax_folder", "bind"): "the parameters of a checkpoint get the names of a file",
    ("folder", "orbax_folder"): "whatever lies at a path",
    ("folder", "agreeing"): "which configuration is meant",
    ("folder", "run_folder"): "an error says that a folder holds checkpoints",
    ("quantizing", "planning"): "what it quantises is found where an adapter would be attached",
    ("trace", "layout"): "a trace follows layouts",
    ("trace", "operations"): "and convolutions and lookups",
    ("operations", "layout"): "which it recognises by how their weight lies",
    ("attach", "planning"): "what is attached is planned",
    ("exchange", "planning"): "and what a file holds",
    ("store", "planning"): "of either format",
    ("base_weights", "checking"): "a base's file holds buffers as well",
    ("exchange", "attach"): "what is attached is taken out",
    ("exchange", "foreign"): "of another library's tree too",
    ("store", "attach"): "load attaches before it injects",
    ("store", "exchange"): "files hold what PEFT's names say",
    ("attach", "foreign"): "another library's tree is taken out of, and put into, by the same verbs",
    ("store", "foreign"): "another library's tree is saved and loaded by the same verbs",
    ("dialect", "weight"): "its layouts speak of a weight's roles",
    ("laying", "heads"): "what some dialects have for each head",
    ("laying", "guests"): "a hint is the same for a tree that is made as for one that is read",
    ("guests", "methods"): "a method says how PyTorch lays out its tensors",
    ("guest_config", "methods"): "a method says its scale",
    ("guest_config", "guests"): "a tree tells a part of its configuration",
    ("bases", "planning"): "a base is found where an adapter would be attached",
    ("bases", "exchange"): "and is taken out with the same care",
    ("starting", "attach"): "it extracts, and attaches what it made",
    ("starting", "planning"): "it plans as adapt and init do",
    ("starting", "beginning"): "what each initialisation makes is a file of its own",
    ("originals", "beginning"): "and so is the way back",
    ("originals", "attach"): "which extracts",
    ("factors", "quantized"): "LoftQ quantises",
    ("store", "originals"): "what a base becomes when an adapter is loaded that belongs to a changed one",
    ("observing", "linen"): "it looks into either kind of model",
    ("observing", "linen_call"): "with the hooks that adapters use",
    ("observing", "linen_survey"): "laid beside the weights",
    ("observing", "nnx"): "it looks into either kind of model",
    ("eva", "observing"): "what it needs is seen",
    ("report", "attach"): "a summary extracts",
    ("trees", "nnx"): "a model is a tree",
    ("trees", "linen_tree"): "boxes are opened as Linen opens them",
    ("nnx_survey", "nnx_params"): "which parameters are no base's",
    ("nnx", "nnx_params"): "which are an adapter's",
    ("nnx_layer", "nnx_params"): "and which a layer computes with",
    ("nnx", "nnx_layer"): "a layer that carries an adapter gets a class that applies it",
    ("nnx_layer", "nnx_survey"): "which knows how its own class uses the weight",
    ("nnx", "nnx_survey"): "attaching asks what a model does with its weights",
    ("merging", "nnx_survey"): "and so reads one",
    ("merging", "nnx"): "it takes a model as well as a tree",
    ("merging", "linen_tree"): "and the variables that an adapter lies in",
    ("merging", "linen"): "and tells a module from its variables",
    ("linen", "linen_survey"): "one module's work in three files",
    ("linen", "linen_call"): "one module's work in three files",
    ("linen", "linen_tree"): "and what it reads and makes is such trees",
    ("linen_survey", "linen_call"): "one module's work in three files",
    ("linen_survey", "linen_tree"): "and opens boxes as it does",
    ("rescaling", "attach"): "it extracts",
    ("reducing", "planning"): "a pair of trees is planned as a fresh adapter is",
    ("optim", "attach"): "a penalty is taken of an adapter, wherever it is",
    ("combining", "products"): "it works on the matrices that products reads",
    ("combining", "wholes"): "and on those that are one in PyTorch together",
    ("wholes", "products"): "leaves are put together as pairs of matrices",
    ("merging", "trees"): "boxes are opened and closed alike",
    ("checkpoint", "snapshot"): "one module's work in six files: when, what, and where",
    ("checkpoint", "resuming"): "and back",
    ("checkpoint", "step_files"): "one module's work in six files",
    ("checkpoint", "step_reading"): "and back",
    ("step_reading", "step_files"): "it reads where that has written",
    ("step_reading", "snapshot"): "into what was taken",
    ("checkpoint", "background"): "one module's work in six files",
    ("resuming", "snapshot"): "the way back follows the way out",
    ("checkpoint", "preemption"): "its block ends with the last save",
    ("step_files", "snapshot"): "one module's work in six files",
    ("card", "consumers"): "it says who cannot read the file",
    ("hub", "codecs"): "what a disk refuses is said in one way",
    ("cli", "demo"): "`jaxadapt demo` starts it",
}

# library -> the rooms that may import it
DOORS: dict[str, set[str]] = {
    "flax": {*"linen linen_call linen_survey linen_tree nnx nnx_calls nnx_layer nnx_params nnx_survey".split(), "demo"},
    # The library never imports torch. The demo's comparison with PEFT is a process of its own.
    "torch": {"demo.check"},
    "peft": {"demo.check"},
    "transformers": {"demo.check"},
    "pickle": set(),  # opcodes are split with pickletools, which executes nothing
    "huggingface_hub": {"hub"},
    "orbax": {"codecs.orbax"},
    "fsspec": {"codecs.places"},
    "optax": {"demo", "optim"},
    "safetensors": {"codecs.safetensors"},
    "click": {"cli", "cli.main"},
    "rich": {"cli", "demo", "report", "progress"},
    "matplotlib": {"demo", "picture"},
    "gguf": {"demo"},
    "qwix": {"quantized"},  # where somebody's weights are its arrays
    "tokenizers": {"demo"},
}

LONG = 400  # lines; more is a warning, and much more a failure


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`jaxadapt/storage/orbax.py` -> "codecs.orbax"; the package's own `__init__` -> ""."""
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


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
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
            # `from jaxadapt import keymap` and `from jaxadapt.storage import orbax` import modules
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


def room(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    if module in ("", "__main__"):
        return TOP
    return -1 if module == "errors" else FLOOR[room(module)]


def test_every_module_has_a_floor():
    homeless = {module_of(p) for p in files()} - {"", "__main__"}
    homeless = {m for m in homeless if room(m) not in FLOOR}
    assert not homeless, f"give these a floor in tests/system/test_house.py and CONTRIBUTING.md: {sorted(homeless)}"
    assert not {room for room in FLOOR if not exists(room)}


def test_the_picture_in_contributing_names_every_room(root: Path):
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.partition("\n    jaxadapt/\n")[2].partition("\n\n")[0]
    named = {name.rstrip("/").removesuffix(".py") for name in re.findall(r"\b\w+(?:\.py|/)", picture)}
    assert set(FLOOR) <= named, sorted(set(FLOOR) - named)
    assert named - {"bucket"} <= set(FLOOR), sorted(named - set(FLOOR))


def test_imports_go_down():
    wrong = []
    for path in files():
        me = module_of(path)
        for name, typing_only, line in imports(path):
            if name.split(".")[0] != "jaxadapt":
                continue
            other = name.removeprefix("jaxadapt").lstrip(".")
            where = f"{path.relative_to(PACKAGE.parent)}:{line}"
            if not exists(other):
                wrong.append(f"{where} imports {name}, which does not exist")
            elif typing_only or not me or room(me) == room(other) or (room(me), room(other)) in SAME_FLOOR:
                continue
            elif not other:
                # The top floor is written as a user would write it. A missing module also reads as this.
                if floor(me) < TOP - 1:
                    wrong.append(f"{where} imports the façade, or a module that does not exist")
            elif floor(other) >= floor(me):
                wrong.append(f"{where} (floor {floor(me)}) imports {name} (floor {floor(other)})")
    assert not wrong, "\n".join(wrong)


def test_same_floor_table_is_true():
    for pair in SAME_FLOOR:
        assert FLOOR[pair[0]] == FLOOR[pair[1]], pair


def test_libraries_have_their_doors():
    wrong = []
    for path in files():
        me = module_of(path)
        for name, typing_only, line in imports(path):
            library = name.split(".")[0]
            if library not in DOORS or typing_only:
                continue
            allowed = DOORS[library]
            if me not in allowed and room(me) not in allowed:
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line} imports {library}; only {sorted(allowed)} may")
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
