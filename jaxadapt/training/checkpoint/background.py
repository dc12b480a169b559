"""One piece of work at a time behind the training loop, which is done however the program is left."""

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
    """A thread of its own for each piece of work.

    Not a daemon: the interpreter joins it before it ends. An error stays until `wait` raises it; if nobody asks
    until the program ends, it is printed, and the exit status is 1.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.what: Any = None  # what the last work was about; None if it failed
        self._error: BaseException | None = None
        self._early = False

    @property
    def running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def start(self, name: str, work: Callable[[], None], early: bool, what: Any = None) -> None:
        """Begins, when what was begun before is over.

        `early`: it needs executors, which take no more work once the main thread has ended. (Orbax's saves run on some,
        and a store's package looks up host names on one.)
        """
        self.wait()
        if early and not self._early:
            self._early = True
            # `atexit` and a thread that is joined are both too late: the interpreter's own hook, by which executors are
            # closed, is the only place (tests/training/test_background.py). The last to be registered is called first:
            # so theirs
            # must be there already, which importing them does.
            importlib.import_module("concurrent.futures.thread")
            threading._register_atexit(self._join)  # pyright: ignore  # noqa: PGH003 (neither public nor in the stubs)
        atexit.unregister(self._leave)
        atexit.register(self._leave)
        begin = threading.Event()
        thread = threading.Thread(target=self._run, args=(begin, work), name=name, daemon=False)
        try:
            thread.start()
            self.thread, self.what = thread, what
        finally:
            begin.set()  # not before: the two would share the interpreter, and the loop stand still for longer

    def _run(self, begin: threading.Event, work: Callable[[], None]) -> None:
        begin.wait()
        try:
            work()
        except BaseException as error:  # whatever it is: it is raised at the next call
            self.what, self._error = None, error

    def wait(self) -> None:
        """Waits until the work is done. Raises what went wrong, once."""
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _leave(self) -> None:
        """At the end of the program: an error that nobody was there to hear must not end in exit status 0."""
        self._join()
        if self._error is None:
            return
        sys.stderr.write("a checkpoint was not saved:\n")
        traceback.print_exception(self._error)
        atexit.unregister(self._leave)
        # The others', which leaving like this would skip. (Raising from here changes no exit status.)
        atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
