"""Counters of a server, in Prometheus' text format."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Mapping

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""The upper ends of the histograms' buckets."""

_HELP = {
    "requests_total": "Requests by HTTP status; 499 if the client left.",
    "prompt_tokens_total": "Tokens of prompts that were read.",
    "generated_tokens_total": "Tokens that were generated.",
    "steps_total": "Decoding steps of the batch.",
    "first_token_seconds": "Seconds from a request to its first token.",
    "request_seconds": "Seconds from a request to the end of its answer.",
    "rows": "Rows of the batch.",
    "rows_active": "Rows that hold a request.",
    "queue_length": "Requests that wait for a row.",
    "adapters": "Adapters that can be asked for.",
    "adapters_resident": "Adapters in slots of the bank.",
    "compiled_programs": "Compiled programs of the batch; it does not grow with requests.",
}


class Metrics:
    """Counters and histograms. All methods may be called from several threads.

    >>> metrics = Metrics()
    >>> metrics.count("steps_total", 2)
    >>> metrics.text({"rows": 8}).splitlines()[2]
    'jaxadapt_steps_total 2'
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._sums: Counter[str] = Counter()

    def count(self, name: str, amount: int = 1, labels: str = "") -> None:
        """Add to a counter; `labels` in Prometheus' form, 'status="200"'."""
        with self._lock:
            self._counts[name, labels] += amount

    def observe(self, name: str, seconds: float) -> None:
        """Add a time to a histogram."""
        with self._lock:
            buckets = self._buckets.setdefault(name, [0] * (len(SECONDS) + 1))
            buckets[bisect.bisect_left(SECONDS, seconds)] += 1
            self._sums[name] += seconds  # pyright: ignore[reportArgumentType]

    def text(self, gauges: Mapping[str, int]) -> str:
        """Return all numbers, with gauges `{name: value}` of the present."""
        lines: list[str] = []

        def begin(name: str, kind: str) -> None:
            lines.extend([f"# HELP jaxadapt_{name} {_HELP[name]}", f"# TYPE jaxadapt_{name} {kind}"])

        with self._lock:
            for name in sorted({name for name, _ in self._counts}):
                begin(name, "counter")
                of = sorted((labels, n) for (other, labels), n in self._counts.items() if other == name)
                lines += [f"jaxadapt_{name}{{{labels}}} {n}" if labels else f"jaxadapt_{name} {n}" for labels, n in of]
            for name, buckets in sorted(self._buckets.items()):
                begin(name, "histogram")
                total = 0
                for end, n in zip((*map(str, SECONDS), "+Inf"), buckets, strict=True):
                    total += n
                    lines.append(f'jaxadapt_{name}_bucket{{le="{end}"}} {total}')
                lines += [f"jaxadapt_{name}_sum {self._sums[name]}", f"jaxadapt_{name}_count {total}"]
        for name, value in gauges.items():
            begin(name, "gauge")
            lines.append(f"jaxadapt_{name} {value}")
        return "\n".join([*lines, ""])
