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

import importlib.util
import sys
from pathlib import Path

import jax
import pytest

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """torch gets one thread once test modules have imported it; tests marked `peft` need the extra `test`."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if all(importlib.util.find_spec(name) for name in ("torch", "peft", "transformers")):
        return
    skip = pytest.mark.skip(reason="needs the extra `test` (torch, transformers, peft)")
    for item in items:
        if item.get_closest_marker("peft"):
            item.add_marker(skip)
