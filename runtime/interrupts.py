"""Signals that ask a command to end: exceptions while it works, so that it can tidy up, and the end at once while
modules load."""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
Handler = Callable[[int, FrameType | None], Any]


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as KeyboardInterrupt is SIGINT."""


class Received:
    """number: the last signal that asked to end, or None. Python code may have caught the exception of it, and C code
    may have made another one of it."""

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def exit_code(self) -> int:
        """As a shell reports the signal."""
        return 128 + (self.number or signal.SIGINT)


@contextmanager
def signals_raise() -> Iterator[Received]:
    """In the block signals that ask to end are exceptions. One that comes where Python drops exceptions comes again."""
    received = Received()

    def receive(number: int, frame: FrameType | None) -> None:
        received.number = number
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def dropped(unraisable: Any) -> None:
        if received.number is not None and issubclass(unraisable.exc_type, KeyboardInterrupt | Terminated):
            # Not from here, where the handler's exception would be dropped as well.
            threading.Timer(0.05, _interrupt_main_thread, (received.number,)).start()
        else:
            hook(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, dropped
    atexit.register(_ignore)  # nothing is left to be interrupted
    try:
        with handled_by(receive):
            yield received
    finally:
        sys.unraisablehook = hook


class Stop:
    """A wish to stop what is under way. awaited: whether someone will look; requested: whether it came."""

    def __init__(self) -> None:
        self.awaited = self.requested = False


@contextmanager
def interrupts_stop() -> Iterator[Stop]:
    """For a program that goes on after Ctrl-C: in the block a first one while a stop is awaited is a wish to stop, any
    other one KeyboardInterrupt. It is not taken for one that ended the program."""
    stop = Stop()

    def receive(number: int, frame: FrameType | None) -> None:
        if not stop.awaited or stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, receive)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def loading() -> Iterator[None]:
    """For imports of large modules: a signal in the block ends the process at once. Where an exception comes out of a C
    extension that is half loaded, anything may follow."""
    with handled_by(_end):
        yield


@contextmanager
def postponed() -> Iterator[None]:
    """Signals come when the block is left, so that nothing in it is half done. A process that is started in it never
    gets SIGINT, which a terminal sends to all of them: whoever started it ends it."""
    came: list[int] = []
    with handled_by(lambda number, frame: came.append(number)), _blocked_for_children():
        yield
    for number in came[-1:]:
        signal.raise_signal(number)


@contextmanager
def _blocked_for_children() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker  # not on Windows

    resource_tracker.ensure_running()  # it would unblock the signal where a process is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """In the block signals that ask to end call a handler. Those that are ignored, as in a job in the background, stay
    so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    before = {number: former for number, former in before.items() if former not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _interrupt_main_thread(number: int) -> None:
    if hasattr(signal, "pthread_kill"):  # ends a call of the system too
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        _thread.interrupt_main(signal.Signals(number))


def _ignore() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
