"""Being asked to end: SIGINT and SIGTERM wait for a good moment, the second one does not."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM)


def interrupt(number: int, frame: FrameType | None) -> None:
    """What a signal does outside of ``stoppable``: KeyboardInterrupt, from which commands exit."""
    raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Whether a signal has asked to end; a second one raises KeyboardInterrupt at once.

    Outside the main thread, where Python allows no handlers, nothing is ever asked.
    """
    asked = list[int]()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, ask) for number in ENDING} if main else {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
