"""What a recipe is made of: Muon beside AdamW, schedules of the learning rate, attention within documents."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    MODEL,
    TRAIN,
    Calls,
    Sandbox,
    assert_same_tensors,
    random_tokens,
    run_script,
    write_dataset,
)
from torch._dynamo.backends.registry import lookup_backend
from torch.nn.attention.flex_attention import create_block_mask

from basemodel.evaluation.measurements import read_test_loss
from basemodel.model.config import GPTConfig
from basemodel.model.loss import NextTokenLoss, document_features
from basemodel.model.masks import block_mask, within_documents
from basemodel.training.config import TrainConfig, optimizer_in_words
from basemodel.training.optimizer import allocate_state, make_optimizer, set_learning_rate, step_if
from basemodel.training.processes import World
from basemodel.training.schedule import learning_rate_at
from gpt import GPTModel

MUON = {"optimizer": "muon", "lr_schedule": "wsd", "warmup_period_percent": 10}
BYTES = {**MODEL, "vocab_size": 257, "tokenizer": "bytes"}
END = 256
ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"), control=None)


def config(**changes: object) -> TrainConfig:
    return TrainConfig(**{**TRAIN, **changes})


def model_with_gradients(**changes: object) -> GPTModel:
    torch.manual_seed(1)
    model = GPTModel(GPTConfig(**{**MODEL, **changes}))
    NextTokenLoss(model)(torch.randint(64, (4, 17))).backward()
    return model


# Muon


@pytest.mark.parametrize(("precision", "size"), [("fp32", 1.0), ("bf16", 1.0), ("fp16", 1.0), ("fp16", 1e-7)])
def test_muon_steps_the_matrices_of_the_blocks_and_adamw_the_rest(precision: str, size: float) -> None:
    """Against both of torch's optimizers, by hand, over three steps of any gradients, also of some too small
    for fp16. Torch's Muon multiplies in bf16, so of the 0.02 that a weight moves a few hundredths are
    rounding."""
    settings = config(optimizer="muon", weight_decay=0.1, decay_all_parameters=False)
    ours, theirs = model_with_gradients(qkv_bias=True), model_with_gradients(qkv_bias=True)
    optimizer = make_optimizer(ours, settings, precision, ALONE)
    of_theirs = dict(theirs.named_parameters())
    hidden = {n for n, p in of_theirs.items() if n.startswith("trf_blocks.") and n.endswith("weight")}
    assert all(of_theirs[name].dim() == 2 for name in hidden)
    assert len(hidden) == 2 * 6
    by_hand = [
        torch.optim.Muon([of_theirs[name] for name in hidden], lr=0.02, weight_decay=0.1),
        torch.optim.AdamW([of_theirs["out_head.weight"]], lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(
            [p for n, p in of_theirs.items() if n not in hidden | {"out_head.weight"}],
            lr=0.01,
            weight_decay=0.0,
        ),
    ]
    for _ in range(3):
        for name, parameter in ours.named_parameters():
            parameter.grad = size * torch.randn_like(parameter)
            of_theirs[name].grad = parameter.grad.clone()
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
        for each in by_hand:
            each.step()
    for name, parameter in ours.named_parameters():
        tolerance = 1e-3 if name in hidden else 1e-6
        torch.testing.assert_close(
            parameter, of_theirs[name], rtol=0, atol=tolerance, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("tie_weights", [False, True])
def test_every_parameter_has_one_optimizer(tie_weights: bool) -> None:
    model = GPTModel(GPTConfig(**{**MODEL, "tie_weights": tie_weights}))
    optimizer = make_optimizer(model, config(optimizer="muon"), "fp32", ALONE)
    stepped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(stepped) == sorted(id(parameter) for parameter in model.parameters())


def test_state_that_is_allocated_ahead_changes_no_weight_and_no_later_step() -> None:
    at_once, ahead = model_with_gradients(), model_with_gradients()
    before = {name: tensor.clone() for name, tensor in ahead.tensors().items()}
    gradients = [parameter.grad.clone() for parameter in ahead.parameters()]
    optimizers = [
        make_optimizer(model, config(optimizer="muon"), "fp32", ALONE) for model in (at_once, ahead)
    ]
    allocate_state(optimizers[1])
    assert_same_tensors(before, ahead.tensors())
    for parameter, gradient in zip(ahead.parameters(), gradients, strict=True):
        parameter.grad = gradient
    for optimizer in optimizers:
        optimizer.step()
    assert_same_tensors(at_once.tensors(), ahead.tensors())


def test_muon_leaves_everything_as_it_is_where_gradients_are_not_finite() -> None:
    model = model_with_gradients()
    optimizer = make_optimizer(model, config(optimizer="muon"), "fp32", ALONE)
    allocate_state(optimizer)
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    step_if(torch.tensor(False), optimizer, torch.amp.GradScaler("cpu", enabled=False))
    assert_same_tensors(before, model.tensors())
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


def test_a_step_takes_few_kernels_however_many_the_layers() -> None:
    counts = []
    for layers in (2, 12):
        model = model_with_gradients(n_layers=layers)
        optimizer = make_optimizer(model, config(optimizer="muon"), "bf16", ALONE)
        gradients = [parameter.grad for parameter in model.parameters()]
        allocate_state(optimizer)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        with Calls() as calls:
            step_if(torch.tensor(True), optimizer, torch.amp.GradScaler("cpu", enabled=False))
        counts.append(calls.count)
    assert counts[0] == counts[1]
    assert counts[0]["baddbmm"] == 2 * 2 * 5 and counts[0].total() < 100, counts


def test_muon_multiplies_in_what_the_device_multiplies_fast() -> None:
    """A T4 has no bf16: it emulates it, slower than fp32."""
    optimizers = {
        precision: make_optimizer(model_with_gradients(), config(optimizer="muon"), precision, ALONE)
        for precision in ("fp32", "tf32", "bf16", "fp16")
    }
    assert {precision: optimizer._muon.dtype for precision, optimizer in optimizers.items()} == {
        "fp32": torch.float32,
        "tf32": torch.bfloat16,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }


def test_muons_updates_have_the_strides_of_their_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single pair of other strides makes CUDA subtract the whole list one by one."""
    subtracted = []
    subtract = torch._foreach_sub_

    def watched(matrices: list[torch.Tensor], changes: list[torch.Tensor]) -> None:
        subtracted.extend((matrix, change.stride()) for matrix, change in zip(matrices, changes, strict=True))
        subtract(matrices, changes)

    monkeypatch.setattr(torch, "_foreach_sub_", watched)
    make_optimizer(model_with_gradients(), config(optimizer="muon"), "fp32", ALONE).step()
    assert len(subtracted) == 2 * 6
    assert all(matrix.stride() == strides for matrix, strides in subtracted)


@dataclass
class Exchange:
    """Processes as Muon sees them, one after the other: all wait until the last has given its share."""

    rank: int
    shares: list[list[torch.Tensor]]

    @property
    def world(self) -> World:
        return World(self.rank, self.rank, len(self.shares), len(self.shares), torch.device("cpu"), None)

    def share_of(self, count: int) -> slice:
        return self.world.share_of(count)

    def gather_shares(self, share: torch.Tensor, count: int) -> Callable[[], torch.Tensor]:
        number = len(self.shares[self.rank])
        self.shares[self.rank].append(share)
        return lambda: torch.cat([shares[number] for shares in self.shares])


@pytest.mark.parametrize("processes", [2, 3, 5, 8])
def test_muons_work_is_shared_out_evenly_and_each_matrix_given_to_one_process(processes: int) -> None:
    for count in (48, 24, 2):
        shares = [Exchange(rank, [[]] * processes).share_of(count) for rank in range(processes)]
        items = [list(range(count))[share] for share in shares]
        assert [item for share in items for item in share] == list(range(count))
        assert max(map(len, items)) == -(-count // processes)


@pytest.mark.parametrize("processes", [2, 3])
def test_muons_work_shared_out_comes_to_what_one_process_alone_would_do(processes: int) -> None:
    settings = config(
        optimizer="muon", weight_decay=0.1, embedding_learning_rate=0.3, head_learning_rate=0.004
    )
    shares: list[list[torch.Tensor]] = [[] for _ in range(processes)]
    peers = [ALONE, *(Exchange(rank, shares) for rank in range(processes))]
    models = [model_with_gradients(qkv_bias=True, init="zero") for _ in peers]
    optimizers = [
        make_optimizer(model, settings, "fp32", peer) for model, peer in zip(models, peers, strict=True)
    ]
    for _ in range(20):
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            gradient = torch.randn_like(parameters[0])
            for parameter in parameters:
                parameter.grad = gradient
        for optimizer in optimizers:
            set_learning_rate(optimizer, 0.01)
            optimizer._muon.begin_step()
        for optimizer in optimizers:
            optimizer._adamw.step()
            optimizer._muon.finish_step()
    assert len(shares[0]) == 20 * 2
    alone = models[0].tensors()
    for model in models[1:]:
        for name, tensor in model.tensors().items():
            torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-5)


# The learning rate


def rates(**changes: object) -> list[float]:
    settings = config(learning_rate=1.0, **changes)
    return [learning_rate_at(step, 100, settings) for step in range(100)]


def test_wsd_warms_up_stays_and_falls_in_a_line_to_zero_behind_the_last_step() -> None:
    wsd = rates(lr_schedule="wsd", warmup_period_percent=10, decay_period_percent=20)
    assert wsd[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert wsd[10:80] == [1.0] * 70
    assert wsd[80:] == pytest.approx([left / 21 for left in range(20, 0, -1)])


def test_a_constant_rate_is_the_default_and_has_a_warm_up_as_wsd() -> None:
    assert rates(lr_schedule="constant") == rates() == [1.0] * 100
    assert rates(lr_schedule="wsd", decay_period_percent=0) == [1.0] * 100


def test_both_optimizers_follow_the_schedule_each_from_its_own_peak() -> None:
    settings = config(optimizer="muon", learning_rate=0.004, muon_learning_rate=0.03)
    optimizer = make_optimizer(GPTModel(GPTConfig(**MODEL)), settings, "fp32", ALONE)
    set_learning_rate(optimizer, 0.001)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0075, 0.001])


@pytest.mark.parametrize("tie_weights", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_token_embedding_and_head_have_rates_of_their_own(kind: str, tie_weights: bool) -> None:
    """Tied, the head is the embedding, and no parameter is left out."""
    own = {} if tie_weights else {"head_learning_rate": 0.004}
    settings = config(optimizer=kind, learning_rate=0.01, embedding_learning_rate=0.3, **own)
    model = GPTModel(GPTConfig(**{**MODEL, "tie_weights": tie_weights}))
    optimizer = make_optimizer(model, settings, "fp32", ALONE)
    set_learning_rate(optimizer, 0.005)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates.pop(id(parameter)) for name, parameter in model.named_parameters()}
    hidden = {name for name in found if name.startswith("trf_blocks") and name.endswith("weight")}
    expected = dict.fromkeys(found, 0.005) | dict.fromkeys(hidden, 0.01 if kind == "muon" else 0.005)
    expected |= {"tok_emb.weight": 0.15}
    expected |= {} if tie_weights else {"out_head.weight": 0.002}
    assert found == pytest.approx(expected)
    assert not rates


def test_a_recipe_can_be_said_of_new_checkpoints_and_of_those_older_than_its_keys() -> None:
    new = dataclasses.asdict(config(**MUON))
    of_matrices = "muon, learning rate 0.01, hidden matrices 0.02 (momentum 0.95)"
    assert optimizer_in_words(new).startswith(f"{of_matrices}, warm-up 10%, linear to zero over the last 60%")
    own = config(embedding_learning_rate=0.3, head_learning_rate=0.004)
    said = "adamw, learning rate 0.01, token embedding 0.3, head 0.004, constant"
    assert optimizer_in_words(dataclasses.asdict(own)).startswith(said)
    old = dataclasses.asdict(config(warmup_period_percent=5)) | {"schedule_learning_rate": True}
    muon = {key: value for key, value in new.items() if key != "muon_momentum"}
    assert optimizer_in_words(muon) == optimizer_in_words(new)
    newer = "lr_schedule", "decay_period_percent", "muon_learning_rate", "muon_momentum"
    for key in (*newer, "embedding_learning_rate", "head_learning_rate"):
        del old[key]
    assert optimizer_in_words(old).startswith("adamw, learning rate 0.01, warm-up 5%, cosine to a tenth")


# Attention within documents


def sequences_of_documents() -> torch.Tensor:
    """Rows of 17 tokens: documents of many lengths, empty ones, one at each edge, and no boundary at all."""
    tokens = torch.randint(0, END, (4, 17), generator=torch.Generator().manual_seed(3))
    for row, ends in enumerate([[5, 11], [0, 16], [7, 8, 9], []]):
        tokens[row, ends] = END
    return tokens


def document_by_document(model: GPTModel, sequences: torch.Tensor) -> torch.Tensor:
    """The mean loss of (B, T + 1) tokens, each document read by itself, from the end-of-text before it on."""
    losses = []
    for row in sequences.tolist():
        starts = sorted({0, *(index for index, token in enumerate(row[:-1]) if token == END)})
        for start, stop in zip(starts, [*starts[1:], len(row) - 1], strict=True):
            logits = model(torch.tensor([row[start:stop]]))[0]
            losses.append(F.cross_entropy(logits, torch.tensor(row[start + 1 : stop + 1]), reduction="none"))
    return torch.cat(losses).mean()


def test_the_masked_loss_and_its_gradients_are_those_of_each_document_by_itself() -> None:
    torch.manual_seed(0)
    masked, alone = (GPTModel(GPTConfig(**BYTES)).double() for _ in range(2))
    alone.load_state_dict(masked.state_dict())
    loss = NextTokenLoss(masked, document_masking=True)(sequences_of_documents())
    slow = document_by_document(alone, sequences_of_documents())
    assert loss.item() == pytest.approx(slow.item(), rel=1e-12)
    assert NextTokenLoss(masked)(sequences_of_documents()).item() != pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    slow.backward()
    for (name, one), other in zip(masked.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("masking", [False, True])
def test_no_gradient_flows_from_one_document_to_another(masking: bool) -> None:
    model = GPTModel(GPTConfig(**BYTES))
    read = []
    model.drop_emb.register_forward_hook(lambda _module, _inputs, output: read.append(output))
    tokens = torch.arange(16)[None]
    tokens[0, 7] = END
    features = document_features(model, tokens) if masking else model.features(tokens)
    (gradient,) = torch.autograd.grad(features[0, 7:].square().sum(), read[0])
    assert gradient[0, 7:].abs().sum(-1).gt(0).all()
    assert gradient[0, :7].any() != masking, "without the mask it does flow, or this would show nothing"


@pytest.mark.parametrize("compiled", [False, True])
def test_masks_in_blocks_which_gpus_take_give_the_same_attention(compiled: bool) -> None:
    """FlexAttention is used on GPUs; here it runs by its formula, and as the compiler traces it: once, and
    not anew for each mask."""
    model, graphs = GPTModel(GPTConfig(**BYTES)).double(), []
    attention = run = model.trf_blocks[0].att

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    if compiled:
        run = torch.compile(attention, backend=compiler, dynamic=False)
    # Without a GPU it has no backward pass, and warns that without a compiler it is slow.
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for row in range(3):
            tokens = sequences_of_documents().roll(row, dims=0)[:2, :-1]
            masks = (within_documents(tokens, END, flex=flex)[1] for flex in (True, False))
            x = model.tok_emb(tokens)
            torch.testing.assert_close(run(x, next(masks)), attention(x, next(masks)))
    assert len(graphs) == compiled


@pytest.mark.parametrize("length", [128, 200, 1024])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.3])
def test_blocks_are_those_that_torch_finds_by_looking_at_every_pair(length: int, share: float) -> None:
    ends = torch.rand(3, length, generator=torch.Generator().manual_seed(0)) < share
    starts = torch.where(ends, torch.arange(length), 0).cummax(dim=1).values
    ours = block_mask(starts)
    theirs = create_block_mask(ours.mask_mod, 3, None, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense()) and ours.shape == theirs.shape
    if length % 128 == 0:  # torch calls no block full that has rows beyond the end
        for name in ("kv", "full_kv", "q", "full_q"):
            counts = getattr(ours, f"{name}_num_blocks")
            assert torch.equal(counts, getattr(theirs, f"{name}_num_blocks"))
            indices, expected = (getattr(mask, f"{name}_indices") for mask in (ours, theirs))
            used = torch.arange(indices.shape[-1]) < counts[..., None]
            assert torch.equal(indices[used], expected[used])


def test_a_masked_run_is_validated_and_measured_within_documents(sandbox: Sandbox) -> None:
    documents = [np.append(random_tokens(3 + seed % 9, 256, seed), END) for seed in range(300)]
    tokens = np.concatenate(documents).astype(np.uint16)
    write_dataset(sandbox.datasets / "test/tokens", tokens, tokens)
    validate = {"document_masking": True, "validation_interval": 8, "validation_batches": 9}
    sandbox.write_run(model=BYTES, train=validate)
    sandbox.train()
    weights = sandbox.checkpoints()[-1] / "model.safetensors"

    def measured(*options: str) -> float:
        command = [
            "test_loss.py",
            sandbox.datasets,
            sandbox.run_dir("tiny") / "model.json",
            weights,
            *options,
        ]
        data = ["--dataset", "test/tokens", "--start-token", "0", "--tokens", str(9 * 2 * 16)]
        assert run_script(*command, *data).returncode == 0
        return read_test_loss(weights.parent).loss

    assert measured("--document-masking") == pytest.approx(sandbox.metrics(key="val_loss")[-1], rel=1e-5)
    assert measured() != pytest.approx(measured("--document-masking"), rel=1e-3)
