"""The work behind a training loop ends well however the program is left: which of the interpreter's hooks it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jaxadapt.training.checkpoint import Background

ROOT = Path(__file__).resolve().parents[2]

# Work that looks up a host's name on an executor, as the stores' packages do when they connect, when the main thread
# has ended.
PROGRAM = """
import asyncio, time
{before}
from jaxadapt.training.checkpoint import Background

def work():
    time.sleep(0.5)  # in which the interpreter gets as far as it will
    async def look():
        return await asyncio.get_running_loop().getaddrinfo("localhost", 80)
    print("found" if asyncio.run(look()) else "nothing")

Background().start(work, needs_executors={early})
"""


@pytest.mark.parametrize("before", ["", "import concurrent.futures.thread"], ids=["nothing", "executors"])
@pytest.mark.parametrize("early", [True, False])
def test_work_that_needs_an_executor_after_the_main_thread(early: bool, before: str) -> None:
    """The private hook of `threading` is needed: without it the same work fails; and with it nothing is lost."""
    program = PROGRAM.format(before=before, early=early)
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    if early:
        assert (run.returncode, run.stdout) == (0, "found\n"), run.stderr
    else:
        assert run.returncode == 1
        assert "a checkpoint was not saved" in run.stderr
        assert "after shutdown" in run.stderr or "after interpreter shutdown" in run.stderr


def test_an_exit_in_the_background_is_raised_by_wait() -> None:
    """SystemExit is no Exception, and a thread would end with it in silence."""

    def leave() -> None:
        raise SystemExit(3)

    task = Background()
    task.start(leave, needs_executors=False)
    with pytest.raises(SystemExit):
        task.wait()
