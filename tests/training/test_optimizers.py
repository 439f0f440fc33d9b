"""Adam and stochastic gradient descent: those of torch.optim to the last bit, without importing torch's compiler."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from autospec.training.optimizers import OPTIMIZERS
from autospec.training.snapshots import load, save

from .test_stage import settings_of

TORCHS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv1d(3, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(30, 4))


def train(model, optimizer, scaler, updates):
    generator = torch.Generator().manual_seed(updates[0])
    for update in updates:
        x = torch.randn(6, 3, 8, generator=generator)
        model[0].bias.requires_grad_(update != 1)  # an update in which a parameter gets no gradient
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if update == 2:  # not finite: a scaler passes over this update
            model[3].bias.grad[0] = float("inf") if scaler.is_enabled() else 1.0
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_bitwise_those_of_torchs_class_also_from_a_checkpoint(name, scaled, tmp_path):
    plain, ours = network(), network()
    scalers = [torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0) for _ in range(2)]
    reference, optimizer = TORCHS[name](plain.parameters(), lr=0.01), OPTIMIZERS[name](ours.parameters(), lr=0.01)
    train(plain, reference, scalers[0], range(8))
    train(ours, optimizer, scalers[1], range(8))

    save(optimizer.state_dict(), tmp_path / "state.pt")
    again = network()
    again.load_state_dict(ours.state_dict())
    gone_on = OPTIMIZERS[name](again.parameters(), lr=0.01)
    gone_on.load_state_dict(load(tmp_path / "state.pt"))
    train(plain, reference, scalers[0], range(8, 12))
    train(again, gone_on, scalers[1], range(8, 12))
    initial = network().state_dict()
    for key, value in plain.state_dict().items():
        assert not torch.equal(value, initial[key])
        assert torch.equal(value, again.state_dict()[key])


def test_a_training_does_not_import_the_compiler(study, tmp_path):
    """It takes a second, longer than most trainings of the demo."""
    program = (
        "import json, sys; from autospec.training import train_run; "
        "train_run(json.loads(sys.argv[1]), 'code', *sys.argv[2:5], 'cpu'); "
        "print([name for name in sys.modules if name.split('.')[:2] in (['torch', '_dynamo'], ['torch', '_inductor'])])"
    )
    arguments = [json.dumps(settings_of(study, "judge")), str(study.dataset), str(tmp_path / "x.zip"), str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
