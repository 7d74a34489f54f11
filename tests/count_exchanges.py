"""Run by a test under torchrun: count how often gradients are exchanged per optimiser step."""

import torch
import torch.distributed as dist
from helpers import MODEL
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from config import TrainConfig
from ddp_train import join_world, make_state, train_step
from gpt import GPTConfig

world = join_world()
config = TrainConfig(dataset="test/tokens", microbatch_size=2, min_train_tokens=1, precision="fp32")
sequences = torch.randint(64, (2, 17))
for accumulation in (1, 4):
    state = make_state(config, GPTConfig(**MODEL), world)
    exchanges = 0

    def count(group, bucket):
        global exchanges
        exchanges += 1
        return allreduce_hook(group, bucket)

    state.parallel.register_comm_hook(None, count)
    for _ in range(3):
        train_step(state, [sequences] * accumulation, learning_rate=0.01, max_norm=None)
    print(f"accumulation {accumulation}: {exchanges} exchanges in 3 steps", flush=True)
# Left to the interpreter's end, the group's threads now and then abort the process.
dist.destroy_process_group()
