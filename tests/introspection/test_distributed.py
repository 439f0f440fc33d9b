"""DistributedDataParallel over gloo: every process records what a single process records of the global batch."""

import os
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
import autospec

rank, port, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
N = 24
generator = torch.Generator().manual_seed(1)
x, y = torch.randn(N, 3, 10, generator=generator), torch.randn(N, 40, generator=generator)
labels = list("abcabbcc" * 3)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.places, self.head = nn.LSTM(3, 8), nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, x):
        found = self.rnn(x.permute(2, 0, 1))[0].transpose(0, 1)
        return self.head(found + self.places(torch.arange(10).unsqueeze(0))).flatten(1)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.places, self.first = nn.Parameter(torch.randn(10, 3)), nn.Parameter(torch.randn(3, 8) / 2)
        self.second = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
        self.project, self.tokens = nn.Linear(3, 3), nn.Parameter(torch.randn(2, 3))
        self.parts = nn.Parameter(torch.randn(12, 8, 8) / 2)

    def forward(self, x):
        joined = torch.cat([self.tokens.expand(len(x), -1, -1), x.mT + self.project(self.places)], 1)
        hidden = torch.einsum("btd,tde->bte", torch.tanh(joined @ self.first), self.parts)
        return self.second(torch.tanh(hidden[:, 2:] + hidden[:, :2].mean(1, keepdim=True))).flatten(1)


class Counted(nn.Sequential):
    passes = 0

    def forward(self, x):
        Counted.passes += self.training
        return super().forward(x)


def make():
    torch.manual_seed(0)
    if kind == "positions":
        return Positions()
    if kind == "own weights":
        return Own()
    return Counted(
        nn.Conv1d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 40)
    )


def train(model, x, y, own, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    statistics = ["gradient", "activation", "adjoint", "contrast", "cosine", "angles"]
    with autospec.watch(model, labels, statistics=statistics, quiet=True, **options) as watcher:
        for seen in x:
            if own is not None:
                watcher.set_groups(own)
            optimizer.zero_grad()
            (model(seen) - y).square().mean().backward()
            watcher.step()
            optimizer.step()
    return watcher.trajectories


options = {"per_position": True} if kind in ("positions", "own weights") else {"singular_values": 4, "solver": "tracked"}
if kind == "uneven":  # one process has no sample of a group
    order = np.argsort(labels, kind="stable")
    mine = order[:12] if rank == 0 else order[12:]
else:
    mine = np.arange(rank, N, 2)
whole = [x] * 3
if kind == "constant on one":
    whole = [x + step * (torch.arange(N) % 2)[:, None, None] for step in range(3)]
part = [each[mine] for each in whole]
if kind == "constant on one" and rank == 0:
    part = part[:1] * 3
parallel = nn.parallel.DistributedDataParallel(make())
found = train(parallel, part, y[mine], [labels[i] for i in mine], **options)
expected = train(make(), whole, y, None, **options)
assert {node.path for node in found.subtree} == {node.path for node in expected.subtree}
for node in expected.subtree:
    for name, values in node.data_vars.items():
        mine, whole = found[node.path][name].values, values.values
        assert mine.shape == whole.shape, (node.path, name)
        if mine.dtype.kind != "f":
            assert (mine == whole).all(), (node.path, name)
            continue
        assert (np.isnan(mine) == np.isnan(whole)).all(), (node.path, name)
        if np.isnan(whole).all():  # fewer directions than asked for
            continue
        scale = np.nanmax(np.abs(whole))
        # Angles depend on gaps between singular values, which amplify rounding.
        tolerance = 1e-3 if name == "angles" else 2e-5 * scale
        assert scale > 0 and np.nanmax(np.abs(mine - whole)) < tolerance, (node.path, name)
assert found.attrs["audit"]["outside"] == {}
# Those of the two trainings: a pass in training mode that a process makes for itself may wait for the others for ever.
assert Counted.passes == (0 if kind in ("positions", "own weights") else 6)
dist.barrier()
dist.destroy_process_group()
print("same")
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("kind", ["convolution", "positions", "own weights", "uneven", "constant on one"])
def test_two_processes_record_what_one_does(kind, tmp_path):
    outputs = run_both(SCRIPT, tmp_path, kind)
    assert all("same" in output for output in outputs)


HEADS = """
import sys
import torch
import torch.distributed as dist
from torch import nn
import autospec

rank, port = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Conv1d(2, 3, 1), nn.ModuleList([nn.Conv1d(3, 4, 1), nn.Linear(8, 30)])

    def forward(self, x, head):
        return self.heads[head](torch.tanh(self.body(x)))


torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(Heads(), find_unused_parameters=True)
x = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(rank))
with autospec.watch(model, ["a", "b"] * 3, singular_values="all", quiet=True) as watcher:
    model(x, rank).square().mean().backward()
    watcher.step()
trees = [None, None]
dist.all_gather_object(trees, watcher.trajectories.to_dict())
assert all(trees[0][path].identical(trees[1][path]) for path in trees[0] if path != "/")
assert "alignment" in trees[0]["/layers/heads.1.weight"] and "alignment" not in trees[0]["/layers/heads.0.weight"]
dist.barrier()
dist.destroy_process_group()
print("same")
"""


def test_processes_that_use_layers_of_their_own_record_the_same(tmp_path):
    outputs = run_both(HEADS, tmp_path)
    assert all("same" in output for output in outputs)


JOINED = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
import autospec

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
model = nn.parallel.DistributedDataParallel(nn.Linear(6, 5))
try:
    with autospec.watch(model, ["a", "b"] * 3, quiet=True) as watcher, Join([model]):
        for _ in range(2 + rank):
            model(torch.randn(6, 6)).square().mean().backward()
            watcher.step()
except autospec.introspection.WatchError as error:
    print(error)
"""


def test_processes_of_which_one_may_end_first_are_refused_before_they_wait_for_ever(tmp_path):
    outputs = run_both(JOINED, tmp_path)
    assert all("give every process as many batches" in output for output in outputs)


def run_both(text, tmp_path, *arguments):
    """What two processes print that run a script with their rank, a port and the arguments; both must end well."""
    script, port = tmp_path / "train.py", str(free_port())
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), port, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs
