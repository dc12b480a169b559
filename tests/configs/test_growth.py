"""Work grows as what a file holds does: counted in calls and lines of Python, never timed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from jaxadapt import ConfigError, LoraConfig
from jaxadapt.adapters import selection
from jaxadapt.configs import matching
from jaxadapt.configs.frozen import find_pattern_value


def lines(work: Callable[[], Any]) -> int:
    """How many lines and calls of Python a piece of work takes, those of C (a comparison of two names) included."""
    count = 0

    def traced(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return traced

    def profiled(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "c_call"

    before = sys.gettrace(), sys.getprofile()
    sys.settrace(traced)
    sys.setprofile(profiled)
    try:
        work()
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    return count


def grows_with(made: Callable[[int], Callable[[], Any]], size: int = 100) -> None:
    """Ten times the content takes about ten times the work; work that compares all with all takes a hundred times."""
    made(5)()  # what is imported or compiled once is no work of either
    small, large = lines(made(size)), lines(made(10 * size))
    assert large < 20 * small, (small, large)


def names(count: int) -> list[str]:
    return [f"model.layers.{n // 8}.mlp.experts.{n % 8}.gate_proj" for n in range(count)]


class Counted(str):
    """A name that counts what it is compared with."""

    asked = 0
    __slots__ = ()

    def endswith(self, *args: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        ends = args[0] if isinstance(args[0], tuple) else (args[0],)
        Counted.asked += len(ends)
        return super().endswith(*args)


def test_rank_patterns_of_a_name_for_each_module():
    """As EVA writes them."""

    def made(count: int) -> Callable[[], Any]:
        known = {name: 1 + n % 7 for n, name in enumerate(names(count))}

        def work() -> None:
            config = LoraConfig(rank_pattern=known, target_modules=["gate_proj"])
            for name, rank in known.items():
                assert find_pattern_value(config.rank_pattern, name, 8) == rank
            assert not selection.doubtful_selection(config, list(known), list(known))

        return work

    grows_with(made)


def test_thousands_of_targets():
    """The entries of a list are looked up: of a tuple `endswith` and `in` would ask one after the other, in C."""
    every = names(500)
    config = LoraConfig(target_modules=every, exclude_modules=["x." + n for n in every], modules_to_save=["y", "z"])
    Counted.asked = 0
    assert all(matching.is_target(config, Counted("base." + name)) for name in every)
    assert Counted.asked == 0

    def made(count: int) -> Callable[[], Any]:
        held = names(count)
        config = LoraConfig(target_modules=held)
        return lambda: [matching.is_target(config, name) for name in held]

    grows_with(made)


def test_thousands_of_modules_to_save():
    def made(count: int) -> Callable[[], Any]:
        every = [f"head_{n}" for n in range(count)]
        config = LoraConfig(modules_to_save=every, target_modules=["q"])

        def work() -> None:
            assert not any(matching.is_target(config, f"model.{name}.q") for name in every)
            assert all(matching.is_saved(config, f"model.{name}.weight") for name in every)
            assert not selection.unmatched_modules_to_save(config, [f"model.{name}" for name in every], {})

        return work

    grows_with(made)


def test_thousands_of_target_parameters():
    def made(count: int) -> Callable[[], Any]:
        every = [f"layers.{n}.experts.up" for n in range(count)]
        config = LoraConfig(target_parameters=every)

        def work() -> None:
            assert all(matching.is_parameter(config, f"model.{name}") for name in every)
            assert not selection.unmatched_parameters(config, every)

        return work

    grows_with(made)


def test_a_number_of_more_digits_than_python_converts_is_no_layer():
    config = LoraConfig(target_modules=["q"], layers_to_transform=[1])
    assert matching.is_target(config, "model.layers.1.q")
    assert not matching.is_target(config, f"model.layers.{'1' * 5000}.q")


def test_layers_by_the_billion_are_refused():
    """They would be listed one by one."""
    with pytest.raises(ConfigError, match="layer_replication: expected pairs that make at most 100000 layers"):
        LoraConfig(layer_replication=[[0, 10**12]])
    assert LoraConfig(layer_replication=[[0, 50_000], [0, 50_000]]).layer_replication is not None


def test_a_card_of_blanks():
    """Its front matter once took a square of them in time: hours for these."""
    code = (
        "from jaxadapt.persistence import consumers\n"
        "consumers.merge_card('---\\ntags:' + ' ' * 3_000_000 + 'x\\n---\\nmine', '---\\ntags:\\n- a\\n---\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, "")
