"""SIGTERM as a wish: schedulers send it some time before they kill."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopSignal:
    """While it is entered, SIGTERM sets `asked` and does nothing else.

    Python takes signals in the main thread alone; in another one this waits for none.
    """

    def __init__(self) -> None:
        self.asked = False
        self._listens = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopSignal:
        if self._listens:
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._previous)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
