"""The work behind a training loop ends well however the program is left: which of the interpreter's hooks it takes."""

from __future__ import annotations

import subprocess
import sys
import threading
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


# A data loader may fork while a step is written. The new process has no thread that could end its wait. It leaves by
# the hooks of the interpreter alone, because freeing all modules takes long on a busy machine.
FORK = """
import atexit, os, signal, threading, time
from jaxadapt.training.checkpoint import Background

saving, may_end = Background(), threading.Event()
saving.start(may_end.wait, needs_executors={early})
if (child := os.fork()) == 0:
    exits = 7 if saving.running else 5
    saving.wait()
    threading._shutdown()
    atexit._run_exitfuncs()
    os._exit(exits)
ended, status = os.waitpid(child, os.WNOHANG)
until = time.monotonic() + 30
while not ended and time.monotonic() < until:
    time.sleep(0.05)
    ended, status = os.waitpid(child, os.WNOHANG)
if not ended:
    os.kill(child, signal.SIGKILL)
may_end.set()
print(os.waitstatus_to_exitcode(status) if ended else "waits for ever")
"""


@pytest.mark.parametrize("early", [True, False])
def test_a_forked_process_does_not_wait_for_the_task_of_its_parent(early: bool) -> None:
    command = [sys.executable, "-c", FORK.format(early=early)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert (run.returncode, run.stdout) == (0, "5\n"), run.stderr


def test_a_task_of_a_daemon_thread_does_not_die_with_the_process() -> None:
    """A thread inherits this property, and the interpreter does not join daemons."""
    found: list[bool] = []
    task = Background()

    def save() -> None:
        task.start(lambda: found.append(threading.current_thread().daemon), needs_executors=False)
        task.wait()

    caller = threading.Thread(target=save, daemon=True)
    caller.start()
    caller.join()
    assert found == [False]
