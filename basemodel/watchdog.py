"""Ends this process when its training step hangs."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from basemodel.command_line import say_error
from basemodel.distributed import DIED_OR_HUNG, StopSignal, World

GRACE_SECONDS = 20.0  # the patience once a signal has come; torchrun kills 30 s after its own
TICK = 0.2


@contextmanager
def hung_steps_ended(
    world: World, stop: StopSignal, overdue: Callable[[], float], give_up: Callable[[str], None]
) -> Iterator[None]:
    """End this process, as for a RunError, when a step is `overdue()` by more than the collective timeout.

    A collective of gloo raises an error then. One of NCCL does not, and the main thread waits for the GPU
    forever; so this takes a thread of its own, which first calls `give_up` with the reason. A signal to stop,
    which the main thread would look at after the step, shortens the patience.
    """
    left = threading.Event()

    def watch() -> None:
        late = 0.0  # seconds by this thread's count: while a process is suspended, it does not count
        while not left.wait(TICK):
            late = late + TICK if overdue() > 0 else 0.0
            if late > (world.timeout if stop.received is None else min(world.timeout, GRACE_SECONDS)):
                try:
                    give_up(DIED_OR_HUNG)
                finally:  # whatever that has raised
                    os._exit(say_error(DIED_OR_HUNG, 1))

    if world.size > 1:
        threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield
    finally:
        left.set()
