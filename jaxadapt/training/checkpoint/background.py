"""Background work for the training loop, one task at a time, which is completed even if the program ends."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any


class Background:
    """A runner that starts one thread for each task.

    The thread is not a daemon, so the interpreter joins it before it ends. An error is kept until `wait` raises it. If
    the program ends before that, the error is printed and the exit status is 1.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.subject: Any = None  # given to `start` with the last task; None if it failed
        self._error: BaseException | None = None
        self._joins_early = False

    @property
    def running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def start(self, name: str, work: Callable[[], None], needs_executors: bool, subject: Any = None) -> None:
        """Wait for the previous task and start a new one.

        Args:
            name: the name of the thread.
            work: the task.
            needs_executors: join the task before executors shut down. Orbax's saves run on executors, and packages of
                object stores look up host names on one; they accept no work after the main thread has ended.
            subject: a value to keep in `subject`.
        """
        self.wait()
        if needs_executors and not self._joins_early:
            self._joins_early = True
            # `atexit` and joining the thread are both too late. Executors are closed by a hook of the interpreter, so
            # the task must be joined in the same kind of hook (tests/training/test_background.py). Hooks run in reverse
            # order, so the executors' hook must be registered first; importing the module does this.
            importlib.import_module("concurrent.futures.thread")
            threading._register_atexit(self._join)  # pyright: ignore  # noqa: PGH003 (neither public nor in the stubs)
        atexit.unregister(self._exit)
        atexit.register(self._exit)
        may_begin = threading.Event()
        thread = threading.Thread(target=self._run, args=(may_begin, work), name=name, daemon=False)
        try:
            thread.start()
            self.thread, self.subject = thread, subject
        finally:
            may_begin.set()  # only now, so that the task does not delay the training loop by sharing the interpreter

    def _run(self, may_begin: threading.Event, work: Callable[[], None]) -> None:
        may_begin.wait()
        try:
            work()
        except BaseException as error:  # raised by the next call of `wait`
            self.subject, self._error = None, error

    def wait(self) -> None:
        """Wait until the task is done. Raise its error, once, if it failed."""
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _exit(self) -> None:
        """Print an error that was never raised, and exit with status 1."""
        self._join()
        if self._error is None:
            return
        sys.stderr.write("a checkpoint was not saved:\n")
        traceback.print_exception(self._error)
        atexit.unregister(self._exit)
        # Run the other exit functions, which `os._exit` would skip. An exception here would not change the status.
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
