"""Models with weights of their own, and the definition with which tests compare what is recorded of them."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from autospec.introspection.copies import copy_model

from .oracle import error, members, spectrum, svdvals, weights_after_training

N, T, INPUTS, OUTPUTS = 9, 4, 5, 6
LABELS = ["a", "b", "b"] * 3
STATISTICS = ("gradient", "activation", "adjoint")


class Own(nn.Module):
    """A layer whose forward pass is a function of its input, its weight and its bias."""

    def __init__(self, use, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / 2)
        self.bias, self.use = nn.Parameter(torch.randn(OUTPUTS)), use

    def forward(self, x):
        return self.use(x, self.weight, self.bias)


def loss_of(output):
    return loss_by_sample(output).sum()


def loss_by_sample(output):
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)
    return (weights * (output - 0.3).square()).flatten(1).sum(1)


def assert_definition(tree, model, x, labels=LABELS):
    """Where samples meet in no layer, a group's share is the gradient of its part of the loss, here in float64."""
    twin = copy_model(model).double()
    for group, member in members(labels, len(x)).items():
        inside = torch.from_numpy(member)
        names, weights = zip(*((name, twin.get_parameter(name)) for name in tree["layers"].children), strict=True)
        x_wide = x.double() if x.is_floating_point() else x
        shares = torch.autograd.grad(loss_by_sample(twin(x_wide))[inside].sum(), weights)
        for name, share in zip(names, shares, strict=True):
            assert error(spectrum(tree, name, "gradient", group), svdvals(share.reshape(len(share), -1))) < 1e-6, name


class Positions(nn.Module):
    """A transformer block by hand: learned positions, used twice, biases of the attention scores, and a gate."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.positions, self.gate = nn.Parameter(torch.randn(T, 6)), nn.Parameter(torch.randn(T, 6))
        self.scores = nn.Parameter(torch.randn(2, T, T))

    def forward(self, x):
        hidden = torch.tanh(self.inner(x + self.positions)) * torch.sigmoid(self.gate)
        heads = hidden.unflatten(2, (2, 3)).transpose(1, 2)
        attended = (heads @ heads.mT + self.scores.masked_fill(torch.eye(T).bool(), 0.5)).softmax(-1) @ heads
        attended = attended.transpose(1, 2).flatten(2)
        attended += self.positions[: x.shape[1]].unsqueeze(0)
        return self.out(torch.where(torch.arange(6) > 2, attended, -self.positions))


class Late(nn.Module):
    """Uses its weight, or a layer's, as a function says, which may do something else at a later step."""

    def __init__(self, use, **parameters):
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(6, 6) / 2), nn.Linear(6, 6)
        self.use, self.epoch = use, 0
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x):
        return self.layer(torch.tanh(self.use(self, x)))


class Joined(nn.Module):
    """Learned tokens, which a layer has made and which are spread over the batch, join the samples' own."""

    def __init__(self, spread, join):
        super().__init__()
        self.tokens, self.make, self.norm = nn.Parameter(torch.randn(3, 5)), nn.Linear(5, 8), nn.LayerNorm(8)
        self.read, self.mix, self.head = nn.Linear(INPUTS, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True) if join in ("keys", "queries") else None
        self.spread, self.join = spread, join

    def forward(self, x):
        tokens = self.spread(self.norm(self.make(self.tokens)), len(x))
        data = self.read(x)
        if self.join == "cat":
            data = self.mix(torch.cat([tokens, data], 1))
        elif self.join == "stack":
            data = self.mix(torch.stack([data, tokens.mean(1, keepdim=True).expand_as(data)], 1)).flatten(1, 2)
        elif self.join == "written":
            data = data.clone()
            data[:, :3] = tokens
            data = self.mix(data)
        elif self.join == "keys":
            data = self.mix(self.attend(data, tokens, tokens)[0])
        elif self.join == "queries":
            data = self.mix(self.attend(tokens, data, data)[0])
        else:
            heads = [each.unflatten(-1, (2, 4)).transpose(1, 2) for each in (data, tokens, self.mix(tokens))]
            data = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.head(torch.tanh(data))


SPREAD = {
    "expand": lambda tokens, samples: tokens.expand(samples, -1, -1),
    "repeat": lambda tokens, samples: tokens.unsqueeze(0).repeat(samples, 1, 1),
    "ones": lambda tokens, samples: torch.ones(samples, 1, 1, dtype=tokens.dtype) * tokens,
}


def assert_same_training(model, x):
    """Watching leaves the weights after a few steps as they are, bitwise."""
    states = []
    for labels in (None, LABELS):
        torch.manual_seed(3)
        states.append(weights_after_training(copy.deepcopy(model), x, loss_of, labels, steps=3, lr=0.1))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


class BiasedScores(nn.Module):
    """Attention whose scores have learned biases, given as a mask; as of a network of the distances of positions."""

    def __init__(self, kind):
        super().__init__()
        self.read, self.head, self.kind = nn.Linear(INPUTS, 8), nn.Linear(8, 3), kind
        self.register_buffer("distances", torch.randn(T, T, 2))
        if kind == "made by layers":
            self.make = nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, 2))
        else:
            self.mask = nn.Parameter(torch.randn(T, T) if kind == "for all heads" else torch.randn(2, T, T))

    def forward(self, x):
        mask = self.make(self.distances).permute(2, 0, 1) if self.kind == "made by layers" else self.mask
        mask = mask.expand(len(x), -1, -1, -1) if self.kind == "spread" else mask
        data = self.read(x).unflatten(-1, (2, 4)).transpose(1, 2)
        data = F.scaled_dot_product_attention(data, data, data, mask)
        return self.head(data.transpose(1, 2).flatten(2))
