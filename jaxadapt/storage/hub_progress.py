"""Where the client is with a file: its progress bars turned into `progress.Report`s, or shown, or not."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Generator
from typing import Any

from jaxadapt.core.progress import Report


def progress_bar_class(name: str, report: Report) -> Any:
    """The client's progress bar, drawing nothing and telling `report`."""
    from huggingface_hub.utils import tqdm

    class Meter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})
            self.so_far = int(options.get("initial") or 0)
            self.of = int(options.get("total") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.so_far += int(n or 0)
            report(name, self.so_far, max(self.of, self.so_far))
            return None

    return Meter


def counted_operation(report: Report, total: int) -> type[Any]:
    """The client's operation that adds a file to a commit, telling `report` how much is sent.

    Of what goes by hf_xet nothing is told, since that reads the file itself.
    """
    from huggingface_hub import CommitOperationAdd

    lock = threading.Lock()  # files are sent by several threads
    sent: dict[str, int] = {}

    class Counted(CommitOperationAdd):
        @contextlib.contextmanager
        def as_file(self, with_tqdm: bool = False) -> Generator[Any]:
            with super().as_file() as file:
                if not with_tqdm:  # read for its digest, not sent
                    yield file
                    return

                def told(place: int) -> None:
                    with lock:
                        sent[self.path_in_repo] = max(place, sent.get(self.path_in_repo, 0))
                        report("upload", sum(sent.values()), total)

                yield _CountedFile(file, told)

    return Counted


class _CountedFile(io.BufferedReader):
    """A file that says how far it was read. A part that is sent again counts once."""

    def __init__(self, file: Any, told: Callable[[int], None]) -> None:
        super().__init__(file)
        self._told = told

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._told(self.tell())
        return data


@contextlib.contextmanager
def client_bars(wanted: bool) -> Generator[None]:
    """The client's own bars while it uploads (it has no callback for this), or none."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    off = are_progress_bars_disabled()
    if wanted or off:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
