"""Ctrl-C and SIGTERM, at a moment when they cannot leave half a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def finished_before_signals() -> Iterator[None]:
    """
    Within, SIGINT and SIGTERM wait: they are delivered at the end.

    Trainer writes a checkpoint in place, and the newest folder is the one that a run is resumed from. Outside of the
    main thread, which alone may handle signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in received[:1]:
            signal.raise_signal(number)
