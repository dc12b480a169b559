"""What every test runs under: CPU, eight devices, exact matmuls, no silent broadcasting, no network."""

from __future__ import annotations

import os

# Before anything imports jax, numpy or torch: they read these once.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads on a busy machine are slower than one
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import gc
import importlib.util
import sys
from pathlib import Path

import jax
import pytest

from tests.support import compiling, matrices

jax.config.update("jax_default_matmul_precision", "highest")
# Two shapes of different rank never meet by accident; other people's models may: see `foreign_model`.
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def foreign_model():
    """For tests that run another library's model, which may broadcast across ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


# Seconds of test time for each folder, both workers together, on two idle cores. What goes over is printed, not failed:
# these machines differ. Doctests count as "jaxadapt".
BUDGETS = {
    "adapters": 60, "analysis": 10, "arrays": 65, "cli": 30, "configs": 10, "core": 15, "demo": 90, "export": 90,
    "initializers": 15, "jaxadapt": 50, "keymaps": 50, "merging": 105, "methods": 530, "models": 460,
    "persistence": 150, "reference": 420, "serving": 190, "server": 40, "storage": 240, "system": 190, "training": 120,
}  # fmt: skip


class PrintFailures:
    """Print each failure when it happens, with the end of its traceback: a run that is cut short still names it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line(f"\nFAILED at {report.when}: {report.nodeid}")
            terminal.write_line("\n".join(report.longreprtext.splitlines()[-30:]))


FOLDER = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Choose how the test's programs are compiled. Each folder begins without programs, which otherwise take 6 GB."""
    compiling.optimize(not compiling.is_quick(item.nodeid))
    folder = item.nodeid.split("/")[1 if item.nodeid.startswith("tests/") else 0]
    if item.config.stash.get(FOLDER, folder) != folder:
        jax.clear_caches()
    item.config.stash[FOLDER] = folder


def pytest_collection_finish() -> None:
    """Let the garbage collector skip the imported libraries, which otherwise take it a fifth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("JAXADAPT_BUDGETS") and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(PrintFailures(config))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each folder's tests took beside its budget, where the variable JAXADAPT_BUDGETS is set."""
    if not os.environ.get("JAXADAPT_BUDGETS"):
        return
    spent: dict[str, float] = {}
    files: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                parts = report.nodeid.split("/")
                folder = parts[1] if parts[0] == "tests" and len(parts) > 2 else parts[0]
                spent[folder] = spent.get(folder, 0.0) + report.duration
                file = report.nodeid.partition("::")[0]
                files[file] = files.get(file, 0.0) + report.duration
    terminalreporter.section("seconds by folder, beside the budget")
    for folder, seconds in sorted(spent.items()):
        budget = BUDGETS.get(folder)
        over = "" if budget is None or seconds <= budget else "  OVER"
        terminalreporter.write_line(f"{folder:14} {seconds:7.0f} {'' if budget is None else budget:>7}{over}")
    terminalreporter.section("seconds of the 40 slowest files")
    for file, seconds in sorted(files.items(), key=lambda item: -item[1])[:40]:
        terminalreporter.write_line(f"{seconds:7.0f}  {file}")


def _real_adapters() -> Path | None:
    named = os.environ.get("JAXADAPT_REAL_ADAPTERS")
    places = [Path(named)] if named else [ROOT / "shared" / "real-adapters", ROOT.parent / "shared" / "real-adapters"]
    return next((p for p in places if (p / "configs").is_dir()), None)


@pytest.fixture(scope="session")
def real_adapters() -> Path:
    """A folder of adapter files found in public repositories; their licences keep them out of this project.

    `JAXADAPT_REAL_ADAPTERS` names it; else `shared/real-adapters` in the checkout or beside it.
    """
    found = _real_adapters()
    if found is None:
        pytest.skip("no real-adapters folder: set JAXADAPT_REAL_ADAPTERS")
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long cases to tests/full, torch one thread, and tests marked `peft` to where the extra `test` is."""
    second = matrices.second_halves(item.nodeid for item in items if not matrices.is_long(item.nodeid))
    for item in items:
        if item.nodeid in second:
            item.add_marker("second_half")
        if matrices.is_long(item.nodeid):
            item.add_marker("full")
        if matrices.is_of_another_method(item.nodeid):
            item.add_marker("another_method")
    named = any("::" in argument for argument in config.args)
    if not named and "full" not in (config.option.markexpr or ""):
        long = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if all(importlib.util.find_spec(name) for name in ("torch", "peft", "transformers")):
        return
    skip = pytest.mark.skip(reason="needs the extra `test` (torch, transformers, peft)")
    for item in items:
        if item.get_closest_marker("peft"):
            item.add_marker(skip)
