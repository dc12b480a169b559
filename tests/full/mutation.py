"""Measure the tests of the pure core by mutation: `python tests/full/mutation.py [--count N] [--seed S] [--file TEXT]`.

Makes N small random changes, one at a time, in a scratch copy, and runs the tests that execute the changed line (the
module's doctests first, then the fastest ones, at most `SECONDS` of them). A change that no test notices survives; its
diff is printed. A change that makes a test hang counts as killed. Exits with 1 if fewer than 85 % are killed.

The first run also records which test executes which line, once for each test file and version of the library. The
records and the compiled programs stay in `build/mutation`. Two cores: about 5 minutes for the records and 5 seconds a
mutant.

These changes are left out, because no test can or should see them:

- messages: f-strings, what is raised or warned, and names used only there;
- annotations, decorators (cache sizes, frozen dataclasses), docstrings, imports, asserts, `__repr__` and `__hash__`;
- `strict=` of `zip`, `stacklevel=`; swapped arguments of functions that are symmetric, such as `min` (`SYMMETRIC`);
- a method's `examples`, which are the tests' own input;
- the tables of families (data, proved by tests/keymaps/families) and the lines of `EQUIVALENT`, each with its reason.
"""

from __future__ import annotations

import argparse
import ast
import collections
import compileall
import contextlib
import copy
import dataclasses
import difflib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutation"
# PEFT is imported before pytest starts, and with it modules that pytest's plugins would rewrite.
PYTEST_OPTIONS = ["-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported"]
SECONDS = 45  # of tests for one mutant, by their recorded times
TARGET = 0.85
CORE = [
    "jaxadapt/configs/*.py", "jaxadapt/keymaps/*.py", "jaxadapt/methods/*.py", "jaxadapt/merging/pairs.py",
    "jaxadapt/arrays/layout.py", "jaxadapt/arrays/products.py", "jaxadapt/arrays/regions.py",
    "jaxadapt/core/paths.py", "jaxadapt/storage/safetensors.py", "jaxadapt/storage/local_files.py",
    "jaxadapt/storage/torch_bin.py",
]  # fmt: skip
POOL = [
    "tests/arrays/test_*.py", "tests/configs/test_*.py", "tests/keymaps/test_*.py", "tests/methods/test_*.py",
    "tests/methods/prompt/test_*.py",
    "tests/core/test_*.py", "tests/adapters/test_joint_tensors.py", "tests/storage/test_safetensors*.py",
    "tests/storage/test_strided.py", "tests/storage/test_torch_bin*.py", "tests/storage/test_checksum.py",
    "tests/storage/test_location.py", "tests/storage/test_source.py", "tests/persistence/test_bad_lora.py",
    "tests/persistence/test_narrow_dtypes.py", "tests/merging/test_pairs.py", "tests/merging/test_resize.py",
    "tests/merging/test_low_rank_form.py", "tests/merging/test_combine.py", "tests/files/test_files_of_releases.py",
    "tests/analysis/test_norms.py", "tests/adapters/test_leaves.py", "tests/reference/test_tied.py",
    "tests/reference/test_attention_versions.py",
    "tests/reference/test_fields.py", "tests/reference/test_embeddings.py", "tests/persistence/test_load_values.py",
    "tests/reference/test_adaption_prompt.py", "tests/reference/test_prompts.py", "tests/serving/test_row_methods.py",
]  # fmt: skip
# (file, the beginning of the line, before or after the change): why the change cannot be seen.
EQUIVALENT = {
    ("jaxadapt/arrays/products.py", "if a.shape[rank_axis] > _MAX_TERMS:"): "both ways compute the same sum",
    (
        "jaxadapt/methods/tinylora.py",
        "return start.w.astype(a.dtype) @ a.T",
    ): "the product is zero where the divisor is",
    ("jaxadapt/keymaps/check.py", "layers[prefix] = max("): "no layer is none, however far below zero",
    ("jaxadapt/arrays/products.py", "_MAX_TERMS ="): "a matter of speed, which benchmarks/ measures",
    ("jaxadapt/keymaps/plan.py", "match = _PART_KEY.fullmatch(key) if"): "a matter of speed: a part's key ends in ]",
    ("jaxadapt/methods/unilora.py", "return indices.astype("): "no parameter uses an index that was dealt to none",
    ("jaxadapt/configs/table.py", "accuracy="): "a figure that benchmarks/ measures",
    ("jaxadapt/configs/table.py", "time="): "a figure that benchmarks/ measures",
    ("jaxadapt/configs/table.py", "learning_rate="): "the demo's value, which benchmarks/ found",
    ("jaxadapt/methods/miss.py", "return jnp.tile(d, (2,"): "D twice, one below the other, is tiled to the same weight",
    ("jaxadapt/arrays/products.py", "if (groups >= 1):"): "one group computes the same",
    ("jaxadapt/storage/local_files.py", "count = 1 if step > 2 and"): "a matter of speed: how much one call reads",
    ("jaxadapt/merging/pairs.py", "wide = values if"): "a cast to float32 of float32 changes nothing",
    ("jaxadapt/storage/local_files.py", "_GAP ="): "a matter of speed, which benchmarks/ measures",
}


# ---- mutants -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: a part of a file, as byte offsets, and the text that replaces it."""

    file: str
    line: int
    begin: int
    end: int
    text: str
    kind: str

    def source(self, original: str) -> str:
        data = original.encode()
        return (data[: self.begin] + self.text.encode() + data[self.end :]).decode()

    def diff(self, original: str) -> str:
        lines = original.splitlines(), self.source(original).splitlines()
        return "\n".join(difflib.unified_diff(*lines, self.file, self.file, lineterm="", n=2))


COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
CALLED = {"any": "all", "all": "any", "min": "max", "max": "min", "sorted": "list", "reversed": "list"}
UNTOUCHED_CALLS = {"warn", "cast", "TypeVar", "NamedTuple"}
UNTOUCHED_FUNCTIONS = {"__repr__", "__hash__", "__str__"}
UNTOUCHED_KEYWORDS = {"strict", "stacklevel", "maxsize"}
SYMMETRIC = {"isinstance", "issubclass", "getattr", "min", "max", "zip", "swapaxes", "_without_fit"}


def mutants(file: str, source: str) -> list[Mutant]:
    """Every mutant of one file."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = source.splitlines()

    def made(node: ast.AST, text: str, kind: str) -> Mutant:
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        return Mutant(file, node.lineno, begin, end, text, kind)

    found = [made(node, text, kind) for node, text, kind in _changes(ast.parse(source))]
    left_out = tuple(start for name, start in EQUIVALENT if name == file)

    def is_equivalent(m: Mutant) -> bool:
        versions = (lines, m.source(source).splitlines())
        return any(each[m.line - 1].strip().startswith(left_out) for each in versions)

    return [m for m in found if not left_out or not is_equivalent(m)]


def _changes(tree: ast.Module) -> Iterator[tuple[ast.AST, str, str]]:
    messages = _message_values(tree)
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if node in messages:
            continue
        yield from _expression_changes(node)
        yield from _statement_changes(node)
        waiting += _visited_children(node)


def _visited_children(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)):
        return []
    if isinstance(node, ast.Call) and _called(node) in UNTOUCHED_CALLS:
        return []
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        if node.name in UNTOUCHED_FUNCTIONS:
            return []
        defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
        return [*node.body, *defaults]
    if isinstance(node, ast.ClassDef):
        return [x for x in node.body if not ast.unparse(x).startswith(("examples =", "examples:"))]
    if isinstance(node, ast.AnnAssign):
        return [node.value] if node.value is not None else []
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return []
    if isinstance(node, ast.keyword) and node.arg in UNTOUCHED_KEYWORDS:
        return []
    return list(ast.iter_child_nodes(node))


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def _message_values(tree: ast.Module) -> set[ast.AST]:
    """The values of names that are used in messages only: in f-strings, and in what is raised or warned."""
    values: set[ast.AST] = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        messages = {
            name
            for node in ast.walk(function)
            if isinstance(node, (ast.Raise, ast.JoinedStr)) or (isinstance(node, ast.Call) and _called(node) == "warn")
            for name in ast.walk(node)
            if isinstance(name, ast.Name)
        }
        read = [n for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
        elsewhere = {n.id for n in read if n not in messages}
        inside = {n.id for n in messages}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in inside and name not in elsewhere:
                    values.add(node)
    return values


def _expression_changes(node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield node, _unparsed(node, ops=[*node.ops[:i], COMPARED[type(op)](), *node.ops[i + 1 :]]), "comparison"
    elif isinstance(node, ast.BinOp) and type(node.op) in COMPUTED and not _is_text(node):
        yield node, _unparsed(node, op=COMPUTED[type(node.op)]()), "arithmetic"
    elif isinstance(node, ast.BoolOp):
        yield node, _unparsed(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or()), "and/or"
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            yield node, f"({ast.unparse(rest[0])})" if len(rest) == 1 else _unparsed(node, values=rest), "condition"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, f"({ast.unparse(node.operand)})", "not"
    elif isinstance(node, ast.IfExp):
        yield node, f"({ast.unparse(node.body)})", "choice"
        yield node, f"({ast.unparse(node.orelse)})", "choice"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, repr(not node.value), "constant"
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield node, repr(node.value + 1), "constant"
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
        for i, generator in enumerate(node.generators):
            if generator.ifs:
                other = copy.deepcopy(node)
                other.generators[i].ifs = []
                text = ast.unparse(other)
                yield node, text if isinstance(node, ast.GeneratorExp) else f"({text})", "filter"
    elif isinstance(node, ast.Call):
        name = _called(node)
        if isinstance(node.func, ast.Name) and name in CALLED and len(node.args) == 1 and not node.keywords:
            yield node.func, CALLED[name], "function"
        plain = not any(isinstance(a, ast.Starred) for a in node.args)
        if len(node.args) >= 2 and plain and name not in SYMMETRIC and not _is_text(node.args[0]):
            swapped = [node.args[1], node.args[0], *node.args[2:]]
            yield node, _unparsed(node, args=swapped), "swapped arguments"


def _statement_changes(node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
        yield node.test, "False", "condition"
        if not isinstance(node.body[-1], ast.Raise):
            yield node.test, "True", "condition"
    elif isinstance(node, ast.Expr):
        if not isinstance(node.value, (ast.Constant, ast.Yield, ast.YieldFrom)):
            yield node, "pass", "removed statement"
    elif isinstance(node, (ast.AugAssign, ast.Continue, ast.Break, ast.Delete)) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))
    ):
        yield node, "pass", "removed statement"


def _unparsed(node: ast.expr, **changes: object) -> str:
    other = copy.copy(node)
    for name, value in changes.items():
        setattr(other, name, value)
    return f"({ast.unparse(other)})"


def _is_text(node: ast.AST) -> bool:
    """True if an operand is a text, whose arithmetic makes names or messages and fails at once when changed."""
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


# ---- tests in a process of their own -----------------------------------------------------------------------


def prepare() -> None:
    """Import what the tests import, once; each run is a fork. Starts no thread and no JAX backend."""
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=8", OMP_NUM_THREADS="1")
    os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="agg", HYPOTHESIS_STORAGE_DIRECTORY=str(BUILD / "hypothesis"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(BUILD / "compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    sys.dont_write_bytecode = True
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "tests" / "full")]
    warnings.simplefilter("ignore")
    import coverage  # noqa: F401
    import flax.linen
    import flax.nnx  # noqa: F401
    import jax  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.numpy  # noqa: F401

    with contextlib.suppress(ImportError):  # the extra `test`: ten seconds, which no test should be left out for
        import peft  # noqa: F401


def run_tests(folder: Path, arguments: list[str], limit: float, record: Path | None = None) -> int | None:
    """Run pytest in a fork, in this copy of the project; return its exit code, or None if it took too long.

    With `record`, the lines that each test executes and the times of the tests are written beside this path.
    """
    log = folder.with_suffix(".log")
    process = os.fork()
    if not process:
        _run_as_child(folder, arguments, log, record)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def _run_as_child(folder: Path, arguments: list[str], log: Path, record: Path | None) -> None:
    code = 99
    try:
        os.setsid()
        with log.open("wb") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        import pytest

        if record is None:
            code = int(pytest.main(["-x", *PYTEST_OPTIONS, *arguments]))
        else:
            import coverage

            recorder = coverage.Coverage(data_file=str(record), config_file=False, source=["jaxadapt"])
            cases = _Cases(recorder)
            recorder.start()
            code = int(pytest.main([*PYTEST_OPTIONS, *arguments], plugins=[cases]))
            recorder.stop()
            recorder.save()
            Path(f"{record}.json").write_text(json.dumps(cases.seconds))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Cases:
    """A plugin of pytest that names the case which executes a line, and takes the times of the cases.

    A case of a parametrized test counts alone: the cases of one method are a small part of the tests of all methods.
    """

    def __init__(self, recorder: Any) -> None:
        self.recorder = recorder
        self.seconds: dict[str, float] = collections.defaultdict(float)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.recorder.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration

    def pytest_runtest_logfinish(self) -> None:
        self.recorder.switch_context("")


def copy_project(folder: Path) -> None:
    """Copy what the tests need, compiled once: a changed file is compiled anew at each run."""
    skip = shutil.ignore_patterns("__pycache__", ".git", "build", ".*cache", ".hypothesis", "out", "demo-out")
    shutil.copytree(ROOT, folder, ignore=skip)
    compileall.compile_dir(folder / "jaxadapt", quiet=1)


# ---- which test executes which line ------------------------------------------------------------------------


@dataclasses.dataclass
class Records:
    """`lines[file][line]`: the tests that execute it, or "" for an import; `seconds[test]`: its time."""

    lines: dict[str, dict[int, set[str]]]
    seconds: dict[str, float]

    def tests_for(self, mutant: Mutant, budget: float) -> list[str]:
        """The module's doctests, then the tests that execute the line, its package's first, up to a time."""
        of_file = self.lines.get(mutant.file, {})
        tests = of_file.get(mutant.line, set()) - {""}
        if not tests:  # executed at import: everything that uses the module
            tests = {test for tests in of_file.values() for test in tests} - {""}
        chosen: list[str] = []
        own, package = _stem(mutant.file), f"tests/{Path(mutant.file).parts[1]}/"
        tests = tests or {test for test in self.seconds if test.startswith(package)}  # a table, or defaults of a class
        of = {t: (own not in t, not t.startswith(package), round(self.seconds.get(t, 1.0), 1), t) for t in tests}
        for test in sorted(tests, key=of.__getitem__):
            if chosen and budget < self.seconds.get(test, 1.0):
                continue
            budget -= self.seconds.get(test, 1.0)
            chosen.append(test)
        return [mutant.file, *chosen]


def _stem(file: str) -> str:
    """What the test file that mirrors a module is called by."""
    return f"test_{Path(file).stem}"


def record_lines(folder: Path) -> Records:
    """Run every test file of the pool under coverage, or read what an earlier run of the same files recorded."""
    library = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.glob("jaxadapt/**/*.py"))))
    lines: dict[str, dict[int, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    seconds: dict[str, float] = {}
    for path in (p for pattern in POOL for p in sorted(folder.glob(pattern))):
        file = path.relative_to(folder).as_posix()
        state = library.copy()
        state.update(path.read_bytes())
        record = BUILD / f"{path.stem}-{state.hexdigest()[:16]}.json"
        if not record.exists():
            print(f"recording {file}", flush=True)
            record.write_text(json.dumps(_record_file(folder, file)))
        recorded = json.loads(record.read_text())
        seconds |= recorded["seconds"]
        for source, by_line in recorded["lines"].items():
            for line, tests in by_line.items():
                lines[source][int(line)] |= set(tests)
    return Records(lines, seconds)


def _record_file(folder: Path, file: str) -> dict[str, object]:
    import coverage

    data = folder.with_suffix(".coverage")
    code = run_tests(folder, [file], 1200, data)
    if code != 0:
        sys.exit(f"{file} does not pass on the unchanged code:\n{folder.with_suffix('.log').read_text()[-3000:]}")
    recorded = coverage.CoverageData(str(data))
    recorded.read()
    lines: dict[str, dict[int, list[str]]] = {}
    for source in recorded.measured_files():
        by_line = recorded.contexts_by_lineno(source)
        name = Path(source).resolve().relative_to(folder.resolve()).as_posix()
        lines[name] = {n: list(contexts) for n, contexts in by_line.items()}
    data.unlink()
    return {"seconds": json.loads(Path(f"{data}.json").read_text()), "lines": lines}


# ---- the command -------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", action="append", default=[], help="only files whose path contains this text")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no mutant after this time")
    parser.add_argument("--list", action="store_true", help="print the mutants and their tests, and run none")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    prepare()
    files = sorted({p.relative_to(ROOT).as_posix() for pattern in CORE for p in ROOT.glob(pattern)})
    files = [f for f in files if not options.file or any(text in f for text in options.file)]
    sources = {file: (ROOT / file).read_text() for file in files}
    every = [m for file in files for m in mutants(file, sources[file])]
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        copy_project(folder)
        records = record_lines(folder)
        print(f"{len(chosen)} of {len(every)} mutants of {len(files)} files, seed {options.seed}", flush=True)
        if options.list:
            for m in chosen:
                print(m.kind, m.diff(sources[m.file]), *records.tests_for(m, SECONDS), sep="\n")
            return 0
        outcomes = collections.Counter[str]()
        for number, m in enumerate(chosen, 1):
            if time.monotonic() - began > 60 * options.minutes:
                break
            outcome, seconds = try_mutant(folder, m, sources[m.file], records)
            outcomes[outcome] += 1
            print(f"{number:4} {outcome:8} {seconds:5.1f} s  {m.file}:{m.line} ({m.kind})", flush=True)
            if outcome == "survived":
                print(m.diff(sources[m.file]), flush=True)
    killed = outcomes["killed"] + outcomes["hung"]
    share = killed / max(1, outcomes.total())
    print(f"{killed} of {outcomes.total()} mutants killed ({share:.0%}; {outcomes['hung']} by the time limit)")
    return 0 if share >= TARGET else 1


def try_mutant(folder: Path, mutant: Mutant, source: str, records: Records) -> tuple[str, float]:
    """Run the tests of one mutant: "killed", "hung" or "survived", and the seconds."""
    path = folder / mutant.file
    tests = records.tests_for(mutant, SECONDS)
    expected = sum(records.seconds.get(test, 1.0) for test in tests)
    path.write_text(mutant.source(source))
    # The cached code is told from its source by size and time, and a mutant may have both.
    cached = path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"
    cached.unlink(missing_ok=True)
    began = time.monotonic()
    code = run_tests(folder, tests, 60 + 8 * expected)
    path.write_text(source)
    if code == 99:
        sys.exit(f"the tests did not run:\n{folder.with_suffix('.log').read_text()[-3000:]}")
    outcome = "hung" if code is None else "survived" if code in (0, 5) else "killed"
    return outcome, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
