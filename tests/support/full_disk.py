"""Saves where the disk refuses: `python -m tests.support.full_disk KIND FAULT FOLDER`, in a process of its own.

KIND is "adapter", "orbax" or "manager" (which saves in the background). FAULT is

- "disk": the folder is on a small file system, which is filled to the last page
- "kernel": the kernel answers every larger write of this process with ENOSPC (a seccomp filter, for which nobody needs
  any right; a faithful stand-in where no file system can be mounted: it meets Python and Orbax's C++ alike)
- "permission": the folder is not for this user to write to

Version 0 is saved before, version 1 must be refused, and version 0 be there, whole, with nothing beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import jaxadapt
from tests.support import leave

_ = jaxadapt.Config  # loaded before the process changes its user, who may not read this folder

# write, pwrite64, writev, pwritev, and seccomp itself
_CALLS = {"x86_64": (1, 18, 20, 296, 317), "aarch64": (64, 68, 66, 70, 277)}


def no_space_for_large_writes(limit: int = 4096) -> None:
    """From now on, in all threads, a write of more than `limit` bytes, or of several pieces, fails with ENOSPC."""
    write, pwrite, writev, pwritev, seccomp = _CALLS[platform.machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    program = [
        (load, 0, 0, 0),  # the call's number
        (equal, 5, 0, writev), (equal, 4, 0, pwritev), (equal, 1, 0, write), (equal, 0, 3, pwrite),
        (load, 0, 0, 32),  # its third argument: how many bytes
        (at_least, 0, 1, limit + 1),
        (answer, 0, 0, 0x50000 | errno.ENOSPC),
        (answer, 0, 0, 0x7FFF0000),  # all others go on
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    libc = ctypes.CDLL(None, use_errno=True)
    held = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    if libc.prctl(38, 1, 0, 0, 0) or libc.syscall(seccomp, 1, 1, held):
        raise OSError(ctypes.get_errno(), "seccomp")


@contextlib.contextmanager
def small_file_system(folder: Path, size: str, instead: str) -> Iterator[None]:
    """A file system of that size at a folder; skips the test where none can be mounted, and says what runs instead."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip(f"cannot mount a file system here; {instead!r} needs none and runs everywhere")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves nothing of the file system that the folder is on."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return ballast


def adapter(version: int) -> jaxadapt.Adapter:
    return leave.adapter(version, width=4000)


def save(kind: str, folder: Path, version: int) -> None:
    if kind == "manager":
        with jaxadapt.CheckpointManager(folder) as manager:
            manager.save(version, adapter(version))
    else:
        path = folder if kind == "adapter" else folder / str(version)
        jaxadapt.save(adapter(version), path, format={"adapter": "safetensors"}.get(kind, kind))


def check(kind: str, folder: Path, version: int) -> None:
    """The version is there, and no later one."""
    want = {float(version)}
    if kind == "manager":
        manager = jaxadapt.CheckpointManager(folder)
        assert manager.latest == version
        found = manager.adapter().flat()
    else:
        found = jaxadapt.read(folder if kind == "adapter" else folder / str(version)).tensors
    assert {float(v) for x in found.values() for v in (np.min(x), np.max(x))} == want


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def main() -> None:
    kind, fault, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    save(kind, folder, 0)
    before = names(folder)
    ballast = None
    if fault == "disk":
        ballast = fill(folder.parent)
    elif fault == "kernel":
        no_space_for_large_writes()
    else:
        folder.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write everywhere
    try:
        save(kind, folder, 1)
    except jaxadapt.FileError as error:
        print(error)
    else:
        sys.exit("nothing was refused")
    assert names(folder) == before, names(folder)
    check(kind, folder, 0)
    if ballast is not None:
        ballast.unlink()
        save(kind, folder, 1)
        check(kind, folder, 1)


if __name__ == "__main__":
    main()
