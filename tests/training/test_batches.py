"""Batches in parts, for lack of memory or on request; mini-batches; half precision."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from autospec import open_trajectories, specs
from autospec.errors import UserError
from autospec.training import open_snapshots, train_run
from autospec.training import prepare as prepare_run
from autospec.training import stage as stage_module
from autospec.training.batches import Batches, parts
from autospec.training.device import deterministic, out_of_memory
from autospec.training.loop import Trainer

CPU = torch.device("cpu")


class Unwatched:
    """Stands for a watcher where none is needed; counts what it is told."""

    def __init__(self) -> None:
        self.labels, self.discarded = [], 0

    def set_groups(self, labels) -> None:
        self.labels.append(labels)

    def discard(self) -> None:
        self.discarded += 1


class Hungry(nn.Module):
    """A network that needs more memory than there is for more than some samples at once."""

    def __init__(self, inner: nn.Module, most: int, error: BaseException) -> None:
        super().__init__()
        self.inner, self.most, self.error = inner, most, error
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        if torch.is_grad_enabled():
            self.passes += 1
        output = self.inner(x) + 0 * torch.rand(())
        if len(x) > self.most and torch.is_grad_enabled():
            raise self.error
        return output


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    MemoryError(),
]


def settings_of(study, run: str, **training) -> dict:
    """Settings of one of the study's runs, with some of its training's replaced."""
    settings = copy.deepcopy(specs.run_settings(study.config, "small", run))
    settings["training"].update(training)
    return settings


def prepared_of(study, run: str, **training):
    """What a run begins with."""
    return prepare_run(settings_of(study, run, **training), str(study.dataset), CPU)


def gradients(prepared, watcher=None) -> list[torch.Tensor]:
    """Gradients of the first update."""
    Trainer(prepared).gradient(0, watcher or Unwatched())
    return [parameter.grad for parameter in prepared.model.parameters()]


@pytest.mark.parametrize("size", [1, 4, 7, 18])
@pytest.mark.parametrize("run", ["coder", "judge"])
def test_the_gradient_over_parts_is_the_full_batchs(study, run, size):
    prepared = prepared_of(study, run, microbatch=size)
    reference = copy.deepcopy(prepared.model).double()
    x = prepared.x.double()
    prepared.criterion(reference(x), x if run == "coder" else prepared.target).backward()
    for ours, exact in zip(gradients(prepared), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), exact.grad, rtol=0, atol=1e-6 * float(exact.grad.abs().max()))


def test_parts_come_in_order_each_with_its_labels(study):
    prepared, watcher = prepared_of(study, "judge", microbatch=8), Unwatched()
    gradients(prepared, watcher)
    assert [len(labels) for labels in watcher.labels] == [8, 8, 3]
    assert [label for labels in watcher.labels for label in labels] == prepared.labels["target"]


@pytest.mark.parametrize("run", ["coder", "judge"])
def test_spectra_over_parts_are_those_of_the_full_batch(study, tmp_path, run):
    trees = []
    for name, size in [("whole", "none"), ("parts", 5)]:
        output = tmp_path / f"{name}.zarr.zip"
        settings = settings_of(study, run, microbatch=size)
        train_run(settings, "code", str(study.dataset), str(output), str(tmp_path / name), "cpu")
        trees.append(open_trajectories(output))
    whole, in_parts = trees
    assert whole.attrs["microbatch"] == [{"update": 0, "samples": 19}]
    assert in_parts.attrs["microbatch"] == [{"update": 0, "samples": 5}]
    for name in whole.attrs["layers"]:
        for statistic in ("gradient", "activation", "adjoint"):
            expected, found = (tree[f"layers/{name}/{statistic}"].values for tree in trees)
            largest = expected[..., :1]
            assert np.nanmax(np.abs(found - expected) / largest) < 2e-5, (name, statistic)
    np.testing.assert_allclose(in_parts["training/loss"], whole["training/loss"], rtol=1e-5)
    np.testing.assert_array_equal(in_parts["group_size"], whole["group_size"])


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_when_memory_runs_out_parts_are_halved_until_they_fit(study, error):
    prepared, watcher = prepared_of(study, "judge"), Unwatched()
    expected = [gradient.clone() for gradient in gradients(prepared)]
    hungry = dataclasses.replace(prepared, model=Hungry(prepared.model, 6, error))
    trainer = Trainer(hungry)
    before = torch.get_rng_state()
    outcome = trainer.gradient(0, watcher)
    assert trainer.microbatches == [(0, 19), (0, 10), (0, 5)]
    assert watcher.discarded == 2
    assert outcome.samples == 19
    # The passes that failed left no trace: four parts were seen, and drew random numbers.
    assert hungry.model.passes == 4
    torch.set_rng_state(before)
    torch.rand(4)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    trainer.gradient(0, watcher)
    assert torch.equal(torch.get_rng_state(), after)
    for ours, exact in zip((p.grad for p in prepared.model.parameters()), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    trainer.gradient(1, watcher)
    assert len(trainer.microbatches) == 3


def test_memory_that_runs_out_in_the_midst_of_training_changes_spectra_by_rounding_alone(study, tmp_path, monkeypatch):
    """The record says from which update on; nothing of the pass that failed is in it."""
    passes = []

    def limited(trainer, x, answer, original=Trainer._loss):
        passes.append(len(x))
        loss, prediction = original(trainer, x, answer)
        if torch.is_grad_enabled() and len(passes) > 6 and len(x) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss, prediction

    arguments = [settings_of(study, "judge", held_out=0.0), "code", str(study.dataset)]
    train_run(*arguments, str(tmp_path / "whole.zarr.zip"), str(tmp_path / "whole"), "cpu")
    monkeypatch.setattr(Trainer, "_loss", limited)
    train_run(*arguments, str(tmp_path / "parts.zarr.zip"), str(tmp_path / "parts"), "cpu")
    whole, in_parts = (open_trajectories(tmp_path / f"{name}.zarr.zip") for name in ("whole", "parts"))
    assert in_parts.attrs["microbatch"] == [
        {"update": 0, "samples": 24},
        {"update": 6, "samples": 12},
        {"update": 6, "samples": 6},
    ]
    for name in whole.attrs["layers"]:
        for statistic in ("gradient", "activation", "adjoint"):
            expected, found = (tree[f"layers/{name}/{statistic}"].values for tree in (whole, in_parts))
            assert np.nanmax(np.abs(found - expected) / expected[..., :1]) < 2e-5, (name, statistic)
    np.testing.assert_array_equal(in_parts["training/loss"][:6], whole["training/loss"][:6])
    np.testing.assert_array_equal(in_parts["group_size"], whole["group_size"])


@pytest.mark.parametrize(
    ("microbatch", "most", "says"),
    [
        ("auto", 0, "ran out of memory at update 0 with 1 samples at once, the least there can be"),
        ("none", 6, "with 19 samples at once: set training.microbatch to auto, or to fewer samples"),
        (9, 6, "with 9 samples at once: set training.microbatch to auto, or to fewer samples"),
    ],
)
def test_where_parts_cannot_help_or_are_not_allowed_it_stops(study, microbatch, most, says):
    prepared = prepared_of(study, "judge", microbatch=microbatch)
    hungry = dataclasses.replace(prepared, model=Hungry(prepared.model, most, OUT_OF_MEMORY[0]))
    with pytest.raises(UserError, match=says):
        Trainer(hungry).gradient(0, Unwatched())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            r"ran out of memory where smaller batches do not help \(CUDA",
        ),
        (
            RuntimeError("max_pool3d_backward_cuda does not have a deterministic implementation, but you set"),
            r"uses an operation that gives another result each time on cpu \(max_pool3d",
        ),
    ],
)
def test_what_fails_elsewhere_is_one_sentence(study, tmp_path, monkeypatch, error, says):
    def fails(trainer):
        raise error

    monkeypatch.setattr(Trainer, "step", fails)
    paths = [str(study.dataset), str(tmp_path / "x.zarr.zip"), str(tmp_path / "work"), "cpu"]
    with pytest.raises(UserError, match=says):
        train_run(settings_of(study, "judge"), "code", *paths)


def test_batch_normalisation_is_never_split(study):
    prepared = prepared_of(study, "judge", microbatch="auto")
    normalised = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(30), nn.Linear(30, 3))
    with pytest.raises(
        UserError, match=r"has batch normalisation \('1'\).*microbatch \(4\) would train another network"
    ):
        Trainer(dataclasses.replace(prepared_of(study, "judge", microbatch=4), model=normalised))
    hungry = Hungry(normalised, 6, OUT_OF_MEMORY[0])
    with pytest.raises(UserError, match=r"cannot be split because of its batch normalisation \('inner\.1'\)"):
        Trainer(dataclasses.replace(prepared, model=hungry)).gradient(0, Unwatched())
    Trainer(dataclasses.replace(prepared_of(study, "judge", microbatch=19), model=normalised))  # one part is the batch


def test_another_error_is_not_taken_for_a_lack_of_memory(study):
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))
    prepared = prepared_of(study, "judge")
    hungry = dataclasses.replace(prepared, model=Hungry(prepared.model, 6, RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        Trainer(hungry).gradient(0, Unwatched())


def test_an_epoch_of_mini_batches_has_every_sample_once_in_another_order_each_time():
    batches = Batches(23, 5, seed=3)
    assert (batches.in_an_epoch, batches.largest) == (5, 5)
    epochs = [np.concatenate([batches.rows(5 * epoch + place) for place in range(5)]) for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(23))
    assert len({tuple(order) for order in epochs}) == 3
    assert len(batches.rows(4)) == 3
    assert Batches(23, 5, seed=4).rows(0).tolist() != batches.rows(0).tolist()
    assert Batches(23, None, seed=3).rows(7).tolist() == list(range(23))
    assert [part.tolist() for part in parts(np.arange(5), 2)] == [[0, 1], [2, 3], [4]]


def test_mini_batches_are_those_of_a_plain_loop(study, tmp_path):
    settings = settings_of(study, "judge", batch=6, epochs=3, optimizer="sgd", learning_rate=0.1)
    arguments = [
        str(study.dataset),
        str(tmp_path / "x.zarr.zip"),
        str(tmp_path / "work"),
        "cpu",
        str(tmp_path / "x.pt"),
    ]
    train_run(settings, "code", *arguments)
    prepared = prepared_of(study, "judge", batch=6, epochs=3)
    model = prepared.model
    for epoch in range(3):
        order = torch.from_numpy(np.random.default_rng([0, epoch]).permutation(19))
        for rows in order.split(6):
            loss = nn.functional.cross_entropy(model(prepared.x[rows]), prepared.target[rows])
            for parameter, gradient in zip(
                model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                parameter.data -= 0.1 * gradient
    final = open_snapshots(tmp_path / "x.pt").weights()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(final[name], value, rtol=1e-6, atol=1e-7)
    tree = open_trajectories(tmp_path / "x.zarr.zip")
    assert tree.sizes["step"] == 6  # every second of 12
    assert tree["group_size"].sel(group="all").values.tolist() == [6] * 6
    assert tree.attrs["training_samples"] == {"all": 19, "0": 6, "1": 6, "3": 7}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_nearly_as_float32(study, tmp_path, precision):
    losses = {}
    for chosen in ("float32", precision):
        output = tmp_path / f"{chosen}.zarr.zip"
        settings = settings_of(study, "judge", precision=chosen)
        train_run(settings, "code", str(study.dataset), str(output), str(tmp_path / chosen), "cpu")
        losses[chosen] = open_trajectories(output)["training/loss"].values
    np.testing.assert_allclose(losses[precision], losses["float32"], rtol=0.05)
    assert not np.array_equal(losses[precision], losses["float32"])


def test_evaluation_leaves_no_trace_and_takes_less_at_once_where_memory_asks_for_it(study):
    class Restless(Hungry):
        def forward(self, x):
            if len(x) > 3:
                raise OUT_OF_MEMORY[0]
            return self.inner(x) + 0 * torch.rand(())

    prepared = prepared_of(study, "judge")
    plain = Trainer(prepared).evaluate(prepared.held_out)
    restless = Restless(nn.Sequential(prepared.model, nn.Dropout(0.5), nn.BatchNorm1d(3)), 0, OUT_OF_MEMORY[0])
    restless.inner[2].eval()
    trainer = Trainer(dataclasses.replace(prepared, model=restless))
    before, weights = torch.get_rng_state(), copy.deepcopy(restless.state_dict())
    loss, right = trainer.evaluate(prepared.held_out)
    assert loss == pytest.approx(plain[0], rel=1e-4)  # a new normalisation divides by the root of 1 + 1e-5
    assert right.tolist() == plain[1].tolist()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in restless.state_dict().items())
    assert [module.training for module in restless.inner] == [True, True, False]


def test_holding_out_looks_on_without_changing_the_training(study, tmp_path, monkeypatch):
    """The same training whether held-out samples are evaluated or not, with a network that draws random numbers."""

    def with_dropout(prepared):
        torch.manual_seed(0)
        return dataclasses.replace(prepared, model=nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(30, 3)))

    made = []
    for evaluated in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(stage_module, "prepare", lambda *args: with_dropout(prepare_run(*args)))
            if not evaluated:
                patch.setattr(stage_module._Run, "_evaluate", lambda run, update: None)
            name = str(evaluated)
            paths = [str(tmp_path / f"{name}.zarr.zip"), str(tmp_path / name), "cpu", str(tmp_path / f"{name}.pt")]
            train_run(settings_of(study, "judge"), "code", str(study.dataset), *paths)
        made.append((tmp_path / f"{name}.pt").read_bytes())
    assert made[0] == made[1]


def test_torchs_settings_are_put_back():
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32)
    with deterministic(CPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32) == before
    with pytest.raises(KeyError), deterministic(torch.device("cuda")):
        raise KeyError
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32) == before
