"""What Inductor and Triton make of the compiled parts for GPUs that are not here: `make cuda-check`.

    python tests/cuda_lowering.py            a table for sm_80, sm_86 and sm_90: kernels, registers, spills

The parts are traced on CPU tensors without data, because a backward pass needs a real device; their graphs
are moved to CUDA, lowered for a GPU that exists in its properties alone, and Triton's own compiler makes code
of the kernels. Of several configurations, from which a GPU would choose by time, the one that spills least is
shown. All that stands in for a driver is private to PyTorch, so this works with the version of the Makefile.
"""

import contextlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.runtime.triton_helpers
import torch._inductor.runtime.triton_heuristics as heuristics
import triton
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function
from torch._inductor import compile_fx, graph, scheduler
from torch._inductor import config as inductor_config
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import gpt
from basemodel.model.config import GPTConfig
from basemodel.model.loss import chunk_loss_and_gradients
from basemodel.training.optimizer import orthogonalized

# Compute capability: multiprocessors, threads and shared memory of each (an A100, an RTX 3090, an H100)
GPUS = {80: (108, 2048, 167_936), 86: (82, 1536, 102_400), 90: (132, 2048, 233_472)}
SMALL = GPTConfig(50257, 1024, 768, 12, 12, drop_rate=0.0, qkv_bias=True)
MODE = FakeTensorMode(allow_non_fake_inputs=True)


class Enough(Exception):
    """Raised to stop once the wanted result has been captured."""


def without_data(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    with MODE:
        return torch.empty(shape, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------
# The parts
# ------------------------------------------------------------------------------------------------------------

LIBRARY = torch.library.Library("lowering", "DEF")
LIBRARY.define("attend(Tensor q, Tensor k, Tensor v) -> Tensor")
LIBRARY.define("attend_backward(Tensor g, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)")


def like_attention(x: Tensor) -> Tensor:
    """(B, H, T, D), as flash attention lays its results out."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


torch.library.register_fake("lowering::attend", lambda q, k, v: like_attention(q))
torch.library.register_fake(
    "lowering::attend_backward", lambda g, q, k, v: (like_attention(q), like_attention(k), like_attention(v))
)
torch.library.register_autograd(
    "lowering::attend",
    lambda ctx, g: torch.ops.lowering.attend_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def loss_chunk(features: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    with patch.object(torch.compiler, "is_compiling", lambda: True):
        return chunk_loss_and_gradients(features, weight, targets, 50257, None)


def newton_schulz(matrices: Tensor) -> Tensor:
    return orthogonalized(matrices, torch.bfloat16, (3.4445, -4.775, 2.0315), 5)


def block_and_inputs() -> tuple[Callable, list[Tensor]]:
    """A block in bf16 whose attention is a call, as it is on a GPU, and 48 sequences with its parameters."""
    with MODE:
        block = gpt.TransformerBlock(SMALL)
    names, parameters = zip(*block.named_parameters(), strict=True)

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        attend = patch.object(gpt, "attend", lambda q, k, v, *_, **__: torch.ops.lowering.attend(q, k, v))
        with torch.autocast("cpu", torch.bfloat16), attend:
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x,))

    x = without_data(48, 1024, 768).requires_grad_()
    return forward, [x, *parameters]


def parts() -> dict[str, tuple[Callable, list[Tensor]]]:
    """What is compiled, or could be, with inputs of GPT-2 small's shapes."""
    targets = without_data(4096, dtype=torch.int64)
    return {
        "loss chunk": (loss_chunk, [without_data(4096, 768), without_data(50304, 768), targets]),
        "Newton-Schulz": (newton_schulz, [without_data(24, 768, 768)]),
        "block": block_and_inputs(),
    }


def graphs_of(part: Callable, inputs: list[Tensor]) -> list[tuple[GraphModule, list[Any]]]:
    """The graphs of a part and, if an input wants gradients, of its backward pass, each with its inputs."""
    found = []

    def keep(traced: GraphModule, arguments: list[Any]) -> GraphModule:
        found.append((traced, arguments))
        return traced

    compilers = dict.fromkeys(("fw_compiler", "bw_compiler", "inference_compiler"), keep)
    traced = aot_function(
        part,
        **compilers,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    wanted = [each for each in inputs if each.requires_grad]
    with MODE, torch.set_grad_enabled(bool(wanted)):
        result = traced(*inputs)
        if wanted:
            torch.autograd.grad(result.float().sum(), wanted)
    return found


# ------------------------------------------------------------------------------------------------------------
# A GPU in name alone
# ------------------------------------------------------------------------------------------------------------


def stand_in(capability: int) -> SimpleNamespace:
    """The properties of a GPU."""
    processors, threads, shared = GPUS[capability]
    return SimpleNamespace(
        **{"name": "", "gcnArchName": "", "uuid": "", "total_memory": 80 << 30, "warp_size": 32},
        **{"major": capability // 10, "minor": capability % 10, "multi_processor_count": processors},
        **{"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": threads},
        **{"max_threads_per_block": 1024, "shared_memory_per_multiprocessor": shared},
        **{"shared_memory_per_block": 49152, "shared_memory_per_block_optin": shared - 1024},
        **{"L2_cache_size": 50 << 20, "clock_rate": 1_755_000, "memory_clock_rate": 2_619_000},
        **{"memory_bus_width": 5120, "is_integrated": False, "is_multi_gpu_board": False},
    )


@contextlib.contextmanager
def pretended(capability: int) -> Iterator[None]:
    """PyTorch and Triton believe that there is a GPU of this kind."""
    properties = stand_in(capability)
    stream = SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)
    pair = (properties.major, properties.minor)
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        torch.cuda: {
            **{"is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None},
            **{"get_device_properties": properties, "get_device_capability": pair, "get_device_name": ""},
            **{"_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None, "synchronize": None},
            **{"get_rng_state": state, "set_rng_state": None, "current_stream": stream},
            **{"get_arch_list": [f"sm_{capability}"], "is_bf16_supported": True},
        },
        CudaInterface: {
            **{"is_available": True, "get_compute_capability": capability, "current_device": 0},
            **{"synchronize": None, "is_triton_capable": True, "raise_if_triton_unavailable": None},
            **{"get_device_properties": properties, "device_count": 1, "current_stream": stream},
            **{"exchange_device": 0, "maybe_exchange_device": 0, "set_device": None},
        },
        CudaInterface.Worker: {"get_device_properties": properties, "current_device": 0},
        torch._inductor.runtime.triton_helpers: {"set_driver_to_gpu": None},
        scheduler: {"has_triton": True},
    }
    with contextlib.ExitStack() as stack:
        for owner, values in answers.items():
            for name, value in values.items():
                answer = staticmethod(lambda *_, value=value, **__: value)
                answer = answer if isinstance(owner, type) else answer.__func__
                stack.enter_context(patch.object(owner, name, answer))
        target = GPUTarget("cuda", capability, 32)
        device = torch.device("cuda", 0)
        driver.set_active(
            SimpleNamespace(
                get_current_target=lambda: target,
                get_current_device=lambda: 0,
                get_active_torch_device=lambda: device,
                get_device_interface=lambda: torch.cuda,
                get_current_stream=lambda *_: 0,
                utils=SimpleNamespace(
                    get_device_properties=lambda _: {"max_shared_mem": GPUS[capability][2]}
                ),
            )
        )
        yield


# ------------------------------------------------------------------------------------------------------------
# Lowering
# ------------------------------------------------------------------------------------------------------------


def on_cuda(value: Any) -> Any:
    """A device becomes CUDA's, a tensor without data one on CUDA; anything else stays."""
    if isinstance(value, torch.device):
        return torch.device("cuda", 0)
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    return value


def lowered(traced: GraphModule, inputs: list[Any]) -> str:
    """Inductor's code for a graph, on CUDA."""
    for node in traced.graph.nodes:
        node.args = tuple(map(on_cuda, node.args))
        node.kwargs = {key: on_cuda(value) for key, value in node.kwargs.items()}
    traced.recompile()
    code = []

    def stop(lowering: graph.GraphLowering) -> None:
        code.append(lowering.codegen()[0].value)
        raise Enough

    context = torch._guards.tracing(torch._guards.TracingContext(MODE))
    with MODE, context, patch.object(graph.GraphLowering, "compile_to_module", stop):
        inputs = [on_cuda(each) for each in inputs]
        FakeTensorProp(traced, mode=MODE).propagate_dont_convert_inputs(*inputs)
        try:
            compile_fx.compile_fx_inner(traced, inputs)
        except Exception:
            if not code:
                raise
    return code[0]


def compiled(name: str, source: str) -> dict[str, int]:
    """Registers, and bytes spilled and shared, of a Triton kernel in the configuration that spills least."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        found = [resources(kernel, each, Path(folder) / "cubin") for each in kernel.configs]
    return min(found, key=lambda each: (each["spilled"], each["shared"]))


def resources(kernel: Any, configuration: Any, file: Path) -> dict[str, int]:
    real, made = triton.compile, []

    def stop(*arguments: Any, **options: Any) -> None:
        made.append(real(*arguments, **options))
        raise Enough

    with patch.object(triton, "compile", stop), contextlib.suppress(Enough):
        kernel._precompile_config(configuration)
    file.write_bytes(made[0].asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True).stdout
    used = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    spilled = used["STACK"] + used["LOCAL"]
    return {"registers": used["REG"], "spilled": spilled, "shared": made[0].metadata.shared}


def figures(code: str) -> dict[str, int]:
    """Triton's kernels and calls of libraries, one launch each; of the kernels the most registers and bytes
    of shared memory, and all the bytes that they spill."""
    body = code.split("def call", 1)[1]
    sources = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.DOTALL)
    kernels = [compiled(*each) for each in sources]
    return {
        "kernels": len(re.findall(r"\.run\(", body)),
        "calls": len(re.findall(r"extern_kernels\.|torch\.ops\.lowering", body)),
        "registers": max(each["registers"] for each in kernels),
        "spilled": sum(each["spilled"] for each in kernels),
        "shared": max(each["shared"] for each in kernels),
    }


def saved_bytes(traced: GraphModule) -> int:
    """The bytes that a block's forward pass keeps for its backward pass, parameters not counted."""
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    x, *parameters = (node for node in traced.graph.nodes if node.op == "placeholder")
    kept = [node.meta["val"] for node in {x, *output.args[0][1:]} - set(parameters)]
    return sum(each.numel() * each.element_size() for each in kept if isinstance(each, Tensor))


def rows(capability: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Each part's passes, and what becomes of them on a GPU."""
    heuristics.log.disabled = True  # it would report that compilation is stopped
    for name, (part, inputs) in parts().items():
        passes = graphs_of(part, inputs)
        labels = [name] if len(passes) == 1 else [f"{name}, forward", f"{name}, backward"]
        for label, each in zip(labels, passes, strict=True):
            with pretended(capability):
                yield label, figures(lowered(*each))


def main() -> None:
    warnings.filterwarnings("ignore", message="Your compiler for AOTAutograd")
    if len(sys.argv) == 1:  # a process for each GPU, because much of what PyTorch asks a GPU it asks once
        block, inputs = block_and_inputs()
        saved = saved_bytes(graphs_of(block, inputs)[0][0])
        print(f"A block keeps {saved / 48e6:.1f} MB per sequence for its backward pass.\n")
        columns = ("part", "GPU", "kernels", "calls", "registers", "spilled", "shared")
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
        codes = [subprocess.run([sys.executable, __file__, str(each)]).returncode for each in GPUS]
        sys.exit(any(codes))
    inductor_config.fx_graph_cache = False
    capability, spilled = int(sys.argv[1]), 0
    for part, found in rows(capability):
        print(f"| {part} | sm_{capability} | {' | '.join(map(str, found.values()))} |", flush=True)
        spilled += found["spilled"]
    sys.exit(spilled > 0)


if __name__ == "__main__":
    main()
