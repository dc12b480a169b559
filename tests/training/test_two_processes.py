"""Two real processes over loopback: Orbax saves and loads, asynchronous ones too, one process killed, SIGTERM."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import jaxadapt
from jaxadapt.storage import safetensors

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, what: str, count: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.support.two_processes"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    rest = [port, str(folder), what, str(count)]
    return [subprocess.Popen([*command, str(i), *rest], cwd=ROOT, **pipes) for i in range(count)]


def finish(processes: list[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str, str]]:
    """Return codes and what they said; a process that does not end in time is a failure, never a hang."""
    end, out = time.monotonic() + timeout, []
    try:
        for process in processes:
            said, errors = process.communicate(timeout=max(1.0, end - time.monotonic()))
            out.append((process.returncode, said, errors[-3000:]))
    finally:
        for process in processes:
            process.kill()  # a stuck one ignores SIGTERM
    return out


@pytest.mark.slow
@pytest.mark.network
def test_two_processes_train_die_resume_and_stop(tmp_path: Path) -> None:
    train_die_resume_and_stop(tmp_path, count=2)


def train_die_resume_and_stop(tmp_path: Path, count: int) -> None:
    manager = jaxadapt.CheckpointManager(tmp_path / "run")

    ends = finish(start(tmp_path, "train", count), 900)
    assert [end[0] for end in ends] == [0] * count, ends
    assert all("leaves" in end[1] for end in ends)
    wrote = [int(end[1].split("wrote ")[1].split()[0]) for end in ends]  # as each was told
    step = safetensors.read_header(tmp_path / "run" / "step-000000003.safetensors").tensors.values()
    assert min(wrote) > 0
    assert sum(wrote) == sum(tensor.nbytes for tensor in step)
    assert manager.steps == [3, 4]  # two are kept, and the last landed though nobody waited for it
    exported = jaxadapt.read(tmp_path / "peft").tensors  # opened by one process
    assert exported["base_model.model.q_proj.lora_A.weight"][0, :2].tolist() == [3.0, 4.0]
    assert manager.adapter(4).flat()["q_proj.kernel.lora_B"][0, 0] == 4.0

    ends = finish(start(tmp_path, "die", count), 900)
    assert ends[1][0] == -signal.SIGKILL, ends
    assert all(end[0] != 0 for end in ends), "the survivors must not end as if all were well"
    assert manager.steps == [3, 4]

    ends = finish(start(tmp_path, "resume", count), 900)
    assert [end[0] for end in ends] == [0] * count, ends
    assert manager.steps == [3, 5]
    left = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert left == ["step-000000003.safetensors", "step-000000005.safetensors"]  # what the killed one left is swept

    both = start(tmp_path, "term", count)
    for process in both:
        assert process.stdout is not None
        while process.stdout.readline() != "training\n":
            assert process.poll() is None
    both[1].send_signal(signal.SIGTERM)
    ends = finish(both, 900)
    assert [end[0] for end in ends] == [143] * count, ends
    assert [end[1].splitlines()[-1] for end in ends] == [f"stopped at {manager.latest}"] * count
