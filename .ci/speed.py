"""Print how this machine compares with the usual one: `import jax` in a new process, and one matmul in NumPy."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

# Seconds on the usual machine, idle: two cores of an Intel Xeon, Python 3.11, jax 0.10.
USUAL_IMPORT, USUAL_MATMUL = 0.45, 0.02


def best(count: int, run: Callable[[], object]) -> float:
    """The least of `count` timings, in seconds."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    x = np.random.default_rng(0).random((1024, 1024), dtype=np.float32)
    imported = best(4, lambda: subprocess.run([sys.executable, "-c", "import jax"], check=True))
    matmul = best(8, lambda: x @ x)
    times = max(imported / USUAL_IMPORT, matmul / USUAL_MATMUL)
    sys.stdout.write(
        f"{times:.1f} times the usual time (import jax {imported:.2f} s, usual {USUAL_IMPORT}; "
        f"matmul of 1024 {1000 * matmul:.0f} ms, usual {1000 * USUAL_MATMUL:.0f})\n"
    )


if __name__ == "__main__":
    main()
