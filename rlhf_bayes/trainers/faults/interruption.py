"""Holds Ctrl-C and SIGTERM back while a checkpoint is written, so that they cannot leave half of one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def finished_before_signals() -> Iterator[None]:
    """
    A context that holds SIGINT and SIGTERM back, and delivers the first of them at its end.

    Trainer writes a checkpoint in place, and a run is resumed from the newest folder, so half a checkpoint does harm.
    Only the main thread may handle signals; in another thread the context does nothing.
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
