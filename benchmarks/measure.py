"""What the benchmarks share: arguments, interleaved timings, in one process or several, versions, Markdown tables."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


def parsed(options: argparse.ArgumentParser, **smallest: Any) -> argparse.Namespace:
    """The arguments of a benchmark; with `--smoke` these instead of what was given."""
    options.add_argument("--smoke", action="store_true", help="only see that it runs: smallest sizes, no target judged")
    given = options.parse_args()
    if given.smoke:
        vars(given).update(smallest)
    return given


def judge(missed: Sequence[str], given: argparse.Namespace) -> None:
    """Leave with exit status 1 if a target is missed."""
    if missed and not given.smoke:
        raise SystemExit("\nmissed:\n" + "\n".join(missed))


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def peer(name: str, wanted: bool, *packages: str) -> bool:
    """Whether the rows of a peer are wanted and can be; says so if they cannot."""
    missing = [package for package in packages if not installed(package)] if wanted else []
    if missing:
        print(f"{' and '.join(missing)} not installed: the rows of {name} are left out")
    return wanted and not missing


@dataclass(frozen=True)
class Way:
    """One way to do a thing: `run` is timed, `before` is not and its result is handed to `run`."""

    run: Callable[[Any], object]
    before: Callable[[], Any] = lambda: None


@dataclass
class Times:
    """Seconds of each round, on the clock and of the processor (all threads); on the clock, of the first time."""

    clock: list[float] = field(default_factory=list[float])
    processor: list[float] = field(default_factory=list[float])
    first: float = float("nan")


def interleave(ways: Mapping[str, Way], rounds: int) -> dict[str, Times]:
    """The times of each way, `rounds` times, after one round to warm up.

    The machine's speed drifts while a benchmark runs, so every round does every way once, and every second
    round goes backwards: what follows what matters to page cache and allocator.
    """
    times = {name: Times() for name in ways}
    names = list(ways)
    for number in range(rounds + 1):
        for name in names[:: 1 if number % 2 else -1]:
            elapsed, busy = _once(ways[name])
            if number:
                times[name].clock.append(elapsed)
                times[name].processor.append(busy)
    return times


def _once(way: Way) -> tuple[float, float]:
    given = way.before()
    gc.collect()
    start, busy = time.perf_counter(), time.process_time()
    result = way.run(given)
    elapsed, busy = time.perf_counter() - start, time.process_time() - busy
    del result, given
    return elapsed, busy


def serve(way: Way) -> None:
    """In a process of its own: says that it is there, then does it once for each line, and says what it took."""
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(_once(way)), flush=True)


def apart(commands: Mapping[str, Sequence[Sequence[str]]], rounds: int, env: Mapping[str, str]) -> dict[str, Times]:
    """`interleave` with each way in processes of its own, which call `serve`: one way works, the others wait.

    So no way lives on memory that another gave back, nor in its modules and threads. The first time counts apart. Of
    several processes of a way the slowest counts.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": dict(env)}
    times = {name: Times() for name in commands}
    started: dict[str, list[Any]] = {
        name: [subprocess.Popen(list(words), **pipes) for words in all_of_it] for name, all_of_it in commands.items()
    }

    def answers(name: str) -> list[Any]:
        lines = [next((line for line in process.stdout if "Gloo" not in line), "") for process in started[name]]
        if not all(lines):
            raise SystemExit(f"{' '.join(commands[name][0])} failed")
        return [json.loads(line) for line in lines]

    try:
        for name in started:
            answers(name)
        for number in range(rounds + 1):
            for name in list(started)[:: 1 if number % 2 else -1]:
                for process in started[name]:
                    print(file=process.stdin, flush=True)
                elapsed, busy = (max(each) for each in zip(*answers(name), strict=True))
                if number:
                    times[name].clock.append(elapsed)
                    times[name].processor.append(busy)
                else:
                    times[name].first = elapsed
    finally:
        for processes in started.values():
            for process in processes:
                process.stdin.close()
            for process in processes:
                process.wait()
    return times


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of this way's time by the base's in the same round: drift cancels."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def environment(*packages: str) -> str:
    """The date, the machine and the versions of what was measured."""
    found: list[str] = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    where = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return ", ".join([f"{datetime.date.today()}: Python {platform.python_version()}", *found, where])


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, padded so that it reads in a terminal too."""
    cells = [list(map(str, head)), *[list(map(str, row)) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [cells[0], rule, *cells[1:]]
    body: list[str] = []
    for line in lines:
        padded = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        body.append(f"| {' | '.join(padded)} |")
    return "\n".join(["", title, "", *body])
