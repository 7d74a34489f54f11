"""What a training step takes, counted on the model itself: memory, matrix products and memory traffic.

The very code that trains runs on tensors that have a shape and no data (PyTorch's FakeTensorMode), while
every operation is watched: what it allocates and when that is freed, what it multiplies, reads and writes. So
a laptop finds out in seconds what a GPU will need, for any config. Compiled code is counted on the graphs
that the compiler gets, as if it fused everything that lies between two matrix products.
"""

import contextlib
import functools
import operator
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# FLOPs by operation; attention on a CPU, which that of a GPU is counted as, has those of the GPU's.
FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
# Operations besides those that no compiler fuses with others.
ALONE = {aten.scatter, aten.scatter_, aten.index_put, aten.embedding_dense_backward}


@dataclass
class Work:
    """What part of a step does, in numbers that are the same on every machine."""

    flops: float = 0.0  # of matrix products and attention
    products: float = 0.0  # elements that those yield
    bytes: float = 0.0  # that all other operations read and write
    kernels: float = 0.0

    def __add__(self, other: Self) -> Self:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Self:
        return Work(*(factor * getattr(self, f.name) for f in fields(self)))


class StepCounter(TorchDispatchMode):
    """Counts, while entered, the work done and the bytes of the tensors alive, by what they are for."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"  # what tensors made from now on are for
        self.work = Work()
        self.live: Counter[str] = Counter()  # bytes by part
        self.peak: Counter[str] = Counter()  # `live` when its sum was largest
        self._storages: dict[int, tuple[str, int, weakref.ref]] = {}  # part, bytes, until when

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True: torch.compile works inside."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in self._storages:
                self.hold(tensor, self.part)
        self.work += _work_of(func, args, kwargs or {}, result)
        return result

    def hold(self, tensor: Tensor, part: str) -> None:
        """Count the storage of `tensor` as being for `part` for as long as it lives."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            before, size, reference = self._storages[key]
            self.live[before] -= size
        else:
            reference = weakref.ref(storage, lambda _: self._let_go(key))
        self._storages[key] = part, size, reference
        self.live[part] += size
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _let_go(self, key: int) -> None:
        part, size, _ = self._storages.pop(key)
        self.live[part] -= size


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _work_of(func: Any, args: Any, kwargs: Any, result: Any) -> Work:
    """What one operation does; a view does nothing."""
    made, given = _tensors(result), {_storage(tensor): _size(tensor) for tensor in _tensors((args, kwargs))}
    formula = FLOPS.get(func.overloadpacket)
    if formula is not None:
        return Work(formula(*args, **kwargs, out_val=result), made[0].numel(), kernels=1)
    changed = [
        tensor
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info and argument.alias_info.is_write
        for tensor in _tensors(value)
    ]
    written = {_storage(tensor): _size(tensor) for tensor in changed}
    written |= {_storage(tensor): _size(tensor) for tensor in made if _storage(tensor) not in given}
    return Work(bytes=sum(given.values()) + sum(written.values()), kernels=1) if written else Work()


# ------------------------------------------------------------------------------------------------------------
# Compiled code
# ------------------------------------------------------------------------------------------------------------


class FusedGraph:
    """A graph as a compiler would run it: it allocates what matrix products read and yield and what leaves
    the graph, and computes the rest where it is needed. Called with tensors, it only allocates."""

    def __init__(self, graph: fx.Graph, counter: StepCounter) -> None:
        self._boxed_call = True  # takes one list of inputs, and empties it, so that they can be freed inside
        self.counter, self.nodes = counter, list(graph.nodes)
        self.outputs = tree_leaves(self.nodes[-1].args)
        self.base = self._find_bases()
        self.kept = self._find_kept()  # bases that exist in memory, in order
        self.sources = {node: self._sources_of(node) for node in self.kept}
        self.work = self._count_work()

    def _find_bases(self) -> dict[fx.Node, fx.Node]:
        """Of each node with a tensor, the node whose storage it shares; itself for all but views."""
        first: dict[int, fx.Node] = {}
        return {
            node: first.setdefault(_storage(node.meta["val"]), node)
            for node in self.nodes
            if isinstance(node.meta.get("val"), Tensor)
        }

    def _bases(self, nodes: Any) -> list[fx.Node]:
        return list(dict.fromkeys(self.base[node] for node in nodes if node in self.base))

    def _find_kept(self) -> list[fx.Node]:
        kept = {node for node in self.nodes if node.op == "placeholder"}
        kept.update(self._bases(node for node in self.outputs if isinstance(node, fx.Node)))
        for node in self.nodes:
            if _stands_alone(node):
                parts = [user for user in node.users if user.target is operator.getitem]
                kept.update(self._bases([node, *node.all_input_nodes, *parts]))
        return [node for node in self.nodes if node in kept and node in self.base]

    def _sources_of(self, node: fx.Node) -> list[fx.Node]:
        """The kept bases from which `node` is computed."""
        found, waiting, kept = {}, [node], set(self.kept)
        while waiting:
            for each in waiting.pop().all_input_nodes:
                if (base := self.base.get(each)) in kept and base is not node:
                    found[base] = None
                else:
                    waiting.append(each)
        return list(found)

    def _count_work(self) -> Work:
        work, counted, written, read = Work(), set(), set(), set()  # the last two by the kernel that grows
        for node in [*self.kept, None]:
            if node is None or _origin(node) is not None:
                inside = [_size(each.meta["val"]) for each in written | (read - written)]
                work += Work(bytes=sum(inside), kernels=1) if written else Work()
                written, read = set(), set()
            if node is not None and (product := _origin(node)) is not None:
                if product in counted:
                    continue
                counted.add(product)
                values = fx.map_arg((product.args, product.kwargs), lambda each: each.meta["val"])
                work += _work_of(product.target, *values, product.meta["val"])
            elif node is not None and node.op != "placeholder":
                written.add(node)
                read.update(self.sources[node])
        return work

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """Allocate and free as the compiled graph does; empty `inputs`, and return its outputs."""
        values = dict(zip((n for n in self.nodes if n.op == "placeholder"), inputs, strict=True))
        inputs.clear()
        leaving = set(self._bases(node for node in self.outputs if isinstance(node, fx.Node)))
        last = {source: node for node in self.kept for source in self.sources[node]}
        self.counter.work += self.work
        before = self.counter.work
        for node in self.kept:
            dying = [each for each in self.sources[node] if last[each] is node and each not in leaving]
            # A fused kernel may write over what it reads for the last time, if that is as large.
            reused = next((d for d in dying if _origin(node) is None and _size_of(d) == _size_of(node)), None)
            if reused is not None:
                values.pop(reused, None)
            if node.op != "placeholder":
                values[node] = _empty_like(node.meta["val"])
            for each in dying:
                values.pop(each, None)
        self.counter.work = before
        return [self._output(node, values) for node in self.outputs]

    def _output(self, node: Any, values: dict[fx.Node, Any]) -> Any:
        if node not in self.base:
            return values.get(node, node)
        base, value = values[self.base[node]], node.meta["val"]
        if node is self.base[node]:
            return base
        return base.detach().as_strided(value.shape, value.stride(), value.storage_offset())


def _stands_alone(node: fx.Node) -> bool:
    """Whether no compiler fuses this operation with others."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return packet in FLOPS or packet in ALONE or node.target.namespace not in ("aten", "prims")


def _origin(node: fx.Node) -> fx.Node | None:
    """The operation that stands alone and yields `node`; None for what is fused, and for inputs."""
    source = node.args[0] if node.target is operator.getitem else node
    return source if _stands_alone(source) else None


def _size_of(node: fx.Node) -> int:
    return _size(node.meta["val"])


def _empty_like(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def counting_backend(counter: StepCounter) -> Callable:
    """A backend of torch.compile that partitions graphs as the compiler does, and only counts them."""
    # Here, because they take seconds to import.
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def compiler(module: fx.GraphModule, _inputs: Any) -> FusedGraph:
        return FusedGraph(module.graph, counter)

    partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
    decompositions = select_decomp_table()
    return aot_autograd(fw_compiler=compiler, partition_fn=partition, decompositions=decompositions)


# ------------------------------------------------------------------------------------------------------------
# A step
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """What training takes with microbatches of one size."""

    memory: dict[str, float]  # bytes by part when they were most
    microbatch: Work  # forward and backward
    update: Work  # clipping and the optimizer
    validation: Work  # of a microbatch

    def towards(self, other: Self, share: float) -> Self:
        """What lies at `share` of the way from here to `other`, or beyond it."""
        parts = self.memory.keys() | other.memory.keys()
        memory = {p: self._mix(self.memory.get(p, 0), other.memory.get(p, 0), share) for p in parts}
        names = ("microbatch", "update", "validation")
        work = (getattr(self, n) * (1 - share) + getattr(other, n) * share for n in names)
        return Footprint(memory, *work)

    @staticmethod
    def _mix(here: float, there: float, share: float) -> float:
        return max(0.0, here + share * (there - here))


class Step(Protocol):
    """What takes training steps: the Learner of ddp_train.py."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_module: Any
    keeps_gradients: bool

    def train_step(self, microbatches: list[Tensor], learning_rate: float) -> Tensor:
        """Take an optimizer step."""

    def validation_loss(self, sequences: Tensor) -> Tensor:
        """Validate a microbatch."""


class StepModel:
    """The step of a config, from which footprints are counted, in a context where tensors have no data.

    `make_learner` makes an uncompiled Learner. With `keeps_gradients` gradients exist all the time, as with
    several processes or microbatches per step.
    """

    def __init__(
        self, make_learner: Callable[[], Step], *, compiled: bool, keeps_gradients: bool = True
    ) -> None:
        self._make_learner, self._compiled, self._keeps = make_learner, compiled, keeps_gradients

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        counter = self.counter = self._stack.enter_context(StepCounter())
        learner = self.learner = self._make_learner()
        learner.keeps_gradients = self._keeps
        parameters = list(learner.model.parameters())
        for parameter in parameters:
            counter.hold(parameter, "weights")
            parameter.register_post_accumulate_grad_hook(self._gradient_is_there)
            parameter.grad = torch.zeros_like(parameter) if self._keeps else None
        for part, tensors in (
            ("optimizer", _tensors(list(learner.optimizer.state.values()))),
            ("gradients", [p.grad for p in parameters if p.grad is not None]),
        ):
            for tensor in tensors:
                counter.hold(tensor, part)
        learner.loss_module.model.final_norm.register_forward_hook(lambda *_: self._enter("logits"))
        learner.loss_module.register_forward_hook(lambda *_: self._enter("activations"))
        learner.optimizer.register_step_pre_hook(lambda *_: self._enter("optimizer"))
        learner.optimizer.register_step_post_hook(lambda *_: self._enter("activations"))
        if self._compiled:
            for block in learner.model.trf_blocks:
                block.compile(dynamic=False, backend=counting_backend(counter))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if self._compiled:
            torch._dynamo.reset()

    def _enter(self, part: str) -> None:
        self.counter.part = part

    def _gradient_is_there(self, parameter: Tensor) -> None:
        self.counter.hold(parameter.grad, "gradients")
        self._backward_ended = self.counter.work

    def count(self, microbatch: int, length: int, *, validates: bool = True) -> Footprint:
        """Count a step of one microbatch of sequences of `length` tokens and, if it `validates`, that too."""
        if self._compiled:
            torch._dynamo.reset()  # it would stop compiling after a few sizes
        counter, learner = self.counter, self.learner
        tokens = torch.zeros(microbatch, length + 1, dtype=torch.int64)
        counter.peak, start = counter.live.copy(), counter.work
        learner.train_step([tokens], learning_rate=0.0)
        backward, end = self._backward_ended, counter.work
        if validates:
            learner.validation_loss(tokens)
        differences = (backward + start * -1, end + backward * -1, counter.work + end * -1)
        return Footprint(dict(counter.peak), *differences)


class FusedDropout(nn.Dropout):
    """Dropout as on a GPU, where it keeps a mask of a byte per element; on a CPU it keeps floating point."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p > 0 else x
