"""torch.compile, with a fallback that says why."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn
from tqdm import tqdm

from basemodel.config import TrainConfig
from basemodel.distributed import World
from basemodel.errors import RunError
from basemodel.loss import NextTokenLoss
from basemodel.memory import is_out_of_memory


def compile_if_wanted(
    loss: NextTokenLoss,
    config: TrainConfig,
    world: World,
    try_out: Callable[[nn.Module], None],
    *,
    any_size: bool = False,
) -> None:
    """Compile the loss if the config says so ("auto": on CUDA) and `try_out`, a pass through it, succeeds.

    If that fails, "auto" says why and goes on uncompiled, and `true` raises RunError.
    """
    if config.compile is False or (config.compile == "auto" and world.device.type != "cuda"):
        return
    if world.device.type == "cpu" and world.local_size > 1:
        # Processes that write the same compiled library at the same time corrupt it.
        own = Path(tempfile.gettempdir()) / f"torchinductor-{os.getuid()}-{world.local_rank}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own))
    loss.compile(any_size=any_size)
    problem = None
    try:
        try_out(loss)
    except Exception as error:  # compilers fail in many ways, but before training starts
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    problem = next((found for found in world.all_gather(problem) if found), None)
    if problem is None:
        return
    if config.compile is True:
        raise RunError(f'torch.compile failed ({problem}); "compile": "auto" or false trains without')
    loss.uncompile()
    if world.is_first:
        tqdm.write(f"Training without torch.compile, which failed: {problem}")
