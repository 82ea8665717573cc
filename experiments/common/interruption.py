"""Signals that ask training to save and stop: Ctrl-C, and a notice of preemption."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruption() -> Iterator[Callable[[int], bool]]:
    """Whether training shall save and stop after a step, a function of the steps done.

    In one process Ctrl-C or SIGTERM asks for it; a second Ctrl-C stops at once. With several
    processes SIGTERM to any of them does, and jax finds the step after which all stop; each has to
    ask after every step. Ctrl-C then stops at once.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: event.is_set()  # only the main thread may handle signals
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield lambda _: event.is_set()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
