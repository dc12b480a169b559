"""Several real processes at length: four of them, and one killed at every moment of every kind of save."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.persistence import test_processes as files
from tests.support import killed
from tests.training import test_two_processes as managers


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["adapter", "gathered", "manager", "orbax"])
def test_killed_at_every_moment(kind: str, count: int, tmp_path: Path) -> None:
    """What was there is whole, the others end with an error in bounded time, and as many processes go on from there."""
    cases = [case for case in killed.CASES if case.kind == kind]
    killed.all_of(cases, tmp_path, count, at_once={2: 4, 4: 3}[count], next_run=count)


def test_four_processes_write_the_file_of_one(tmp_path: Path) -> None:
    files.write_the_file_of_one(tmp_path, count=4)


def test_what_fails_in_one_of_four_fails_in_all(tmp_path: Path) -> None:
    files.what_fails_in_one_fails_in_all(tmp_path, count=4)


def test_four_processes_train_die_resume_and_stop(tmp_path: Path) -> None:
    managers.train_die_resume_and_stop(tmp_path, count=4)
