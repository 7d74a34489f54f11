"""How training stops: on a signal, or because a step hangs."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from basemodel.common.command_line import say_error
from basemodel.training.processes import DIED_OR_HUNG, World

GRACE_SECONDS = 20.0  # patience with a hung step after a signal; torchrun kills 30 s after its own
TICK = 0.2
REPEAT_SECONDS = 3.0  # how long a second signal counts as torchrun's copy of the first


class StopSignal:
    """Remembers that a signal (SIGTERM, SIGINT, SIGHUP or SIGUSR1) asked this process to stop.

    A second signal exits immediately, without saving, but is ignored within REPEAT_SECONDS of the first. From
    torchrun it is ignored however late it comes, because torchrun forwards what the terminal has sent to all.
    A separate thread receives the signals: Python's handlers run in the main thread, which may be blocked.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        # Without its launcher nothing can stop or restart this process, so it stops on its own.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> Self:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        signal.set_wakeup_fd(self._writer)
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writer)

    def __bool__(self) -> bool:
        """Whether this process was asked to stop, or has lost its launcher."""
        if self._launcher not in (None, os.getppid()):
            self.received = self.received or signal.SIGTERM
        return self.received is not None

    @property
    def exit_status(self) -> int:
        return 128 + (self.received or signal.SIGTERM)

    def _watch(self, reader: int) -> None:
        first, copy_due = None, self._launcher is not None
        while number := os.read(reader, 1):
            if first is None:
                first, self.received = time.monotonic(), self.received or number[0]
            elif copy_due or time.monotonic() - first < REPEAT_SECONDS:
                copy_due = False
            else:
                os._exit(128 + number[0])
        os.close(reader)


@contextmanager
def hung_steps_ended(
    world: World, stop: StopSignal, overdue: Callable[[], float], give_up: Callable[[str], None]
) -> Iterator[None]:
    """End this process, as for a RunError, when a step is `overdue()` by more than the collective timeout.

    A gloo collective then raises an error. An NCCL collective does not, and the main thread waits for the GPU
    forever, so this takes a separate thread, which first calls `give_up` with the reason. A signal to stop,
    which the main thread would only handle after the step, shortens the timeout.
    """
    done = threading.Event()

    def watch() -> None:
        late = 0.0  # seconds overdue, counted in ticks so that time spent suspended (SIGSTOP) does not count
        while not done.wait(TICK):
            late = late + TICK if overdue() > 0 else 0.0
            if late > (world.timeout if stop.received is None else min(world.timeout, GRACE_SECONDS)):
                try:
                    give_up(DIED_OR_HUNG)
                finally:  # even if give_up raises
                    os._exit(say_error(DIED_OR_HUNG, 1))

    if world.size > 1:
        threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield
    finally:
        done.set()
