"""Progress of the Hub's client: its bars are shown, hidden, or turned into calls of a `progress.Report`."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Generator
from typing import Any

from jaxadapt.core.progress import Report


def progress_bar_class(name: str, report: Report) -> Any:
    """Return a class of progress bars for the client that draw nothing and call `report`."""
    from huggingface_hub.utils import tqdm

    class Meter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})
            self.bytes_done = int(options.get("initial") or 0)
            self.bytes_total = int(options.get("total") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.bytes_done += int(n or 0)
            report(name, self.bytes_done, max(self.bytes_total, self.bytes_done))
            return None

    return Meter


def counted_operation(report: Report, total: int) -> type[Any]:
    """Return a class of the client's add operations that reports the bytes sent.

    Uploads through hf_xet are not reported, since hf_xet reads the file itself.
    """
    from huggingface_hub import CommitOperationAdd

    lock = threading.Lock()  # several threads send files
    sent: dict[str, int] = {}

    class Counted(CommitOperationAdd):
        @contextlib.contextmanager
        def as_file(self, with_tqdm: bool = False) -> Generator[Any]:
            with super().as_file() as file:
                if not with_tqdm:  # the file is read for its digest, not sent
                    yield file
                    return

                def report_position(position: int) -> None:
                    with lock:
                        sent[self.path_in_repo] = max(position, sent.get(self.path_in_repo, 0))
                        report("upload", sum(sent.values()), total)

                yield _CountedFile(file, report_position)

    return Counted


class _CountedFile(io.BufferedReader):
    """A file that reports how far it was read. A part that is sent again counts once."""

    def __init__(self, file: Any, report_position: Callable[[int], None]) -> None:
        super().__init__(file)
        self._report_position = report_position

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._report_position(self.tell())
        return data


@contextlib.contextmanager
def client_bars(show: bool) -> Generator[None]:
    """Show or hide the client's own bars while it uploads (it has no callback for uploads)."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    off = are_progress_bars_disabled()
    if show or off:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
