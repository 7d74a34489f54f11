"""The search for the largest microbatch that fits (`-f`)."""

from collections.abc import Callable

from tqdm import tqdm

from basemodel.distributed import StopSignal, World
from basemodel.errors import RunError


def largest_that_fits(try_size: Callable[[int], str | None], world: World, stop: StopSignal) -> int:
    """The largest microbatch size that fits on every process, found by doubling, then bisecting.

    `try_size` takes real steps at a size and describes them, or returns None where memory ran out. Raises
    RunError if not even 1 fits, or when asked to stop.
    """
    fitting, too_large = 0, None
    while too_large is None or too_large - fitting > 1:
        size = (fitting + too_large) // 2 if too_large else max(1, 2 * fitting)
        description = try_size(size)
        fits = all(each is not None for each in world.all_gather(description))
        fitting, too_large = (size, too_large) if fits else (fitting, size)
        if world.is_first:
            tqdm.write(f"microbatch {size}: " + (f"fits, {description}" if fits else "too large"))
        if world.any(stop):
            raise RunError(f"stopped by a signal; the largest microbatch that fit so far is {fitting}")
    if fitting == 0:
        raise RunError(
            "not even a microbatch of 1 fits; a smaller model, context_length or number of processes would"
        )
    return fitting
