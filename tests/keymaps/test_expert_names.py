"""Names of single experts in a folder, and the tensors that hold all of them."""

from __future__ import annotations

import pytest

from jaxadapt import KeyMap, MismatchError
from jaxadapt.keymaps import pytorch

KEYMAP = KeyMap(
    "t",
    (),
    expert_modules=(
        ("h.{l}.experts.gate_up", ("h.{l}.e.{e}.w1", "h.{l}.e.{e}.w3")),
        ("h.{l}.experts.down", ("h.{l}.e.{e}.w2",)),
        ("h.{l}.router", ("h.{l}.gate",)),
    ),
)
SINGLE = [f"h.{l}.e.{e}.w{n}.weight" for l in range(2) for e in range(3) for n in (1, 2, 3)]
GATES = [f"h.{l}.gate.weight" for l in range(2)]
ROWS = {
    f"h.{l}.experts.{name}": tuple(tuple(f"h.{l}.e.{e}.w{n}.weight" for n in numbers) for e in range(3))
    for l in range(2)
    for name, numbers in (("gate_up", (1, 3)), ("down", (2,)))
}
RENAMED = {f"h.{l}.router": f"h.{l}.gate.weight" for l in range(2)}


def test_rows_of_a_folder_and_the_folder_of_a_model():
    assert pytorch.expert_rows(KEYMAP, [*SINGLE[::-1], *GATES, "other.weight"], "it") == (ROWS, RENAMED)
    shapes = dict.fromkeys([*ROWS, *RENAMED, "other"], (3, 4, 5))
    assert pytorch.folder_names(KEYMAP, shapes) == (ROWS, RENAMED)


def test_a_folder_that_holds_all_experts_in_one_has_nothing_to_join():
    joined = [*ROWS, *RENAMED]
    assert pytorch.expert_rows(KEYMAP, joined, "it") == ({}, {})
    assert pytorch.expert_rows(KEYMAP, [*joined, *SINGLE, *GATES], "it") == ({}, {})


def test_every_missing_part_is_listed():
    held = [name for name in SINGLE if name not in ("h.0.e.1.w3.weight", "h.1.e.0.w2.weight")]
    with pytest.raises(MismatchError) as caught:
        pytorch.expert_rows(KEYMAP, held, "it")
    assert "h.0.experts.gate_up: part 1 of expert 1" in str(caught.value)
    assert "h.1.experts.down: part 0 of expert 0" in str(caught.value)
    assert str(caught.value).count("part ") == 2


def test_at_most_16_missing_numbers_are_counted():
    assert pytorch.expert_numbers([2, 0]) == [0, 1, 2]
    assert pytorch.expert_numbers([100]) == [*range(16), 100]
    assert pytorch.expert_numbers([0]) == [0]
