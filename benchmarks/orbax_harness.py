"""The rows of `benchmarks.io` in the benchmark harness that Orbax brings, measured by it.

    python -m benchmarks.io --with-orbax-harness

The harness (`orbax.checkpoint._src.testing.benchmarks`) makes the tree from a YAML file: here the tensors of an adapter
of `benchmarks.io`. It runs Orbax's own benchmark of saving and loading, and the class below for jaxadapt, one after the
other. It needs TensorFlow and TensorBoard, which clu, its writer of summaries, imports.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint._src.testing.benchmarks.core import config_parsing, core, metric

import jaxadapt
from benchmarks import io

ROWS = {
    "Orbax v1, Orbax's own benchmark": "orbax.checkpoint._src.testing.benchmarks.v1.benchmark.Benchmark",
    "jaxadapt, in Orbax's harness": "benchmarks.orbax_harness.Jaxadapt",
}


@dataclasses.dataclass(frozen=True)
class Options(core.BenchmarkOptions):
    """The size of the adapter, whose rank the harness cannot know."""

    megabytes: int = 50


@core.benchmark_options(Options)
class Jaxadapt(core.BenchmarksGenerator):
    """Saves and loads the tree as an adapter in PEFT's folder."""

    def test_fn(self, context: core.TestContext) -> core.TestResult:
        found = metric.Metrics()
        like = io.abstract(context.options.megabytes)
        leaves = [context.pytree[name] for name in sorted(context.pytree)]
        adapter = jax.tree.unflatten(jax.tree.structure(like), leaves)
        target = io.base()
        with found.measure("save"):
            jaxadapt.save(adapter, Path(context.path) / "ours")
        jax.tree.map(lambda x: x.delete(), adapter)
        with found.measure("load"):
            jax.block_until_ready(io.arrays(jaxadapt.load(Path(context.path) / "ours", target, keymap="llama")))
        return core.TestResult(metrics=found)


def configuration(megabytes: int, rounds: int) -> dict[str, Any]:
    """The harness's configuration; YAML reads it as JSON."""
    leaves = jax.tree.leaves(io.abstract(megabytes))
    spec = {f"t{i:04}": {"dtype": str(x.dtype), "shape": list(x.shape)} for i, x in enumerate(leaves)}
    options = {name: {"megabytes": megabytes} if "jaxadapt" in name else {} for name in ROWS}
    return {
        "suite_name": f"an adapter of {megabytes} MB",
        "num_repeats": rounds + 1,
        "checkpoint_config": {"spec": spec},
        "benchmarks": [{"generator": generator, "options": options[name]} for name, generator in ROWS.items()],
    }


def rows(megabytes: int, rounds: int, folder: Path) -> list[list[object]]:
    """What the harness measured in a process of its own: the medians after the first time, and the first time."""
    (folder / "harness.yaml").write_text(json.dumps(configuration(megabytes, rounds)))
    words = [sys.executable, "-m", "benchmarks.orbax_harness", str(folder / "harness.yaml"), str(folder / "harness")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    times = json.loads(done.stdout.strip().splitlines()[-1])
    out: list[list[object]] = []
    for name, (save, load) in zip(ROWS, zip(*[iter(times)] * 2, strict=True), strict=True):
        cells = [f"{1e3 * x:.0f}" for t in (save, load) for x in (statistics.median(t[1:]), min(t[1:]), t[0])]
        out.append([name, *cells])
    return out


def measured(config: str, folder: str) -> list[list[float]]:
    """Seconds of saving, then of loading, of each row in turn."""
    results = config_parsing.create_test_suite_from_config(config, output_dir=folder, remove_repeated_dir=True).run()
    if wrong := [result.error for result in results if result.error]:
        raise wrong[0]
    each = len(results) // len(ROWS)
    return [
        [result.metrics.results[f"{what}::0_basics/time_s"][0] for result in results[start : start + each]]
        for start in range(0, len(results), each)
        for what in ("save", "load")
    ]


if __name__ == "__main__":
    print("\n" + json.dumps(measured(*sys.argv[1:])))
