"""Every layer family in every form, as small problems with smooth activations, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import autospec

from .oracle import Problem, shared_by

N, T, E = 12, 5, 8
LABELS = ["a", "b", "b", "c"] * 3
LENGTHS = [3, 5, 1, 4, 2, 5, 3, 1, 2, 4, 5, 3]
EVERYTHING: dict[str, Any] = {
    "statistics": autospec.introspection.STATISTICS,
    "singular_values": "all",
    "per_position": "space",
    "activation": "unfolded",
    "audit": 1,
}
"""Options with which all that there is is recorded."""


def weighted(output: Any) -> Tensor:
    """A generic loss of all outputs together: no symmetry, no constant part."""
    parts = [t.flatten() for t in flat(output)]
    whole = torch.cat(parts)
    weights = torch.linspace(0.5, 1.5, len(whole), dtype=whole.dtype).to(whole.device)
    return (weights * (whole - 0.3).square()).mean()


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [] if value is None else [tensor for item in value for tensor in flat(item)]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2))


class Calls(nn.Module):
    """One layer, and how the model calls it."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) if self.call is None else self.call(self.layer, x)


# ---------------------------------------------------------------------- linear layers


class Branches(nn.Module):
    """Several layers that see one input; the last of them may come to nothing."""

    def __init__(self, first: nn.Module, *branches: nn.Module, unused: int = 0) -> None:
        super().__init__()
        self.first, self.branches, self.used = first, nn.ModuleList(branches), len(branches) - unused

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return sum([torch.sigmoid(branch(hidden)) for branch in self.branches][: self.used])


class Twice(nn.Module):
    """A layer called twice in one forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, block: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.block, self.head = block, head

    def forward(self, x: Tensor) -> Any:
        output = checkpoint(self.block, x, use_reentrant=False)
        return output if self.head is None else self.head(output)


def linear() -> dict[str, Callable[[], Problem]]:
    def deep(*middle: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(7, 6), *middle, nn.Linear(6, 5))

    return {
        "Linear": lambda: problem(deep(nn.Tanh()), normal(N, 7)),
        "Linear, 3-D": lambda: problem(deep(nn.Tanh()), normal(N, T, 7)),
        "Linear, time first": lambda: problem(deep(nn.Tanh()), normal(T, N, 7), 1),
        "Linear, twice": lambda: problem(Twice(nn.Linear(7, 7)), normal(N, 7)),
        "Linear, tied": lambda: problem(Tied(nn.Linear(7, 7), nn.Linear(7, 7)), normal(N, 7)),
        "Linear, one input": lambda: problem(
            Branches(nn.Linear(7, 6), *(nn.Linear(6, 5) for _ in range(3))), normal(N, T, 7)
        ),
        "Linear, in-place ReLU": lambda: problem(deep(nn.ReLU(inplace=True)), normal(N, 7)),
        "Linear, dropout": lambda: problem(deep(nn.Tanh(), nn.Dropout(0.4)), normal(N, 7)),
        "Linear, in-place dropout": lambda: problem(deep(nn.Dropout(0.4, inplace=True)), normal(N, 7)),
        "Linear, layer norm": lambda: problem(deep(nn.LayerNorm(6), nn.Tanh()), normal(N, 7)),
        "Linear, batch norm": lambda: problem(deep(nn.BatchNorm1d(6), nn.ReLU(inplace=True)), normal(N, 7)),
    }


# ---------------------------------------------------------------------- convolutions

DIMENSIONS: dict[int, tuple[type[nn.Module], type[nn.Module], type[nn.Module], int]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, 9),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, 6),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, 5),
}
CONVOLUTION_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "stride and dilation": {"stride": 2, "padding": 2, "dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 8},
    "same": {"padding": "same"},
    "circular": {"padding": 1, "padding_mode": "circular"},
}
FURTHER_OPTIONS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "same, even kernel": {"padding": "same", "kernel_size": 4, "dilation": 2},
        "reflect": {"padding": 2, "padding_mode": "reflect", "stride": 2, "groups": 2},
        "kernel 1": {"kernel_size": 1, "bias": False},
    },
    2: {
        "oblong": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
        "replicate": {"padding": (1, 0), "padding_mode": "replicate"},
        "same circular": {"padding": "same", "padding_mode": "circular"},
    },
    3: {"oblong": {"kernel_size": (1, 3, 2), "stride": (1, 1, 2)}},
}
TRANSPOSED_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "output padding": {"stride": 2, "padding": 1, "output_padding": 1},
    "groups and dilation": {"groups": 2, "dilation": 2, "padding": 1},
}


def convolution(dimensions: int, transposed: bool = False, **options: Any) -> Problem:
    family, size = DIMENSIONS[dimensions][transposed], DIMENSIONS[dimensions][3]
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
    return problem(nn.Sequential(family(**arguments), nn.Tanh()), normal(N, 4, *[size] * dimensions))


def convolutional_network(dimensions: int) -> nn.Module:
    """Convolution, BatchNorm, in-place ReLU, a strided convolution, and up again."""
    conv, transposed, norm, _ = DIMENSIONS[dimensions]
    return nn.Sequential(
        conv(2, 4, 3, padding=1),
        norm(4),
        nn.ReLU(inplace=True),
        conv(4, 3, 3, stride=2),
        nn.Tanh(),
        transposed(3, 2, 3, stride=2),
    )


def convolutions() -> dict[str, Callable[[], Problem]]:
    cases: dict[str, Callable[[], Problem]] = {}
    for dimensions, (conv, transposed, _, size) in DIMENSIONS.items():
        for name, options in (CONVOLUTION_OPTIONS | FURTHER_OPTIONS[dimensions]).items():
            cases[f"{conv.__name__}, {name}"] = lambda d=dimensions, o=options: convolution(d, **o)
        for name, options in TRANSPOSED_OPTIONS.items():
            cases[f"{transposed.__name__}, {name}"] = lambda d=dimensions, o=options: convolution(d, True, **o)
        cases[f"{dimensions}-D network"] = lambda d=dimensions, s=size: problem(
            convolutional_network(d), normal(N, 2, *[s] * d)
        )
    cases["Conv1d, twice"] = lambda: problem(Twice(nn.Conv1d(4, 4, 3, padding=1)), normal(N, 4, 9))
    cases["Conv1d, tied"] = lambda: problem(Tied(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3, dilation=2)), normal(N, 4, 9))
    cases["Conv2d, checkpointed"] = lambda: problem(
        Checkpointed(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3)), nn.Conv2d(3, 2, 1)),
        normal(N, 2, 6, 6),
    )
    cases["1-D, one input"] = lambda: problem(
        Branches(nn.Conv1d(4, 3, 3), nn.Conv1d(3, 5, 3), nn.Conv1d(3, 5, 5, padding=1)), normal(N, 4, 12)
    )
    return cases


# ---------------------------------------------------------------------- embeddings


class Words(nn.Module):
    """Word, position and type embeddings; how the positions are indexed is an option."""

    def __init__(self, positions: str = "arange", types: bool = False, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6, **options)
        self.positions = nn.Embedding(T + 2, 6)
        self.types = nn.Embedding(2, 6) if types else None
        self.form = positions

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        if self.form != "arange":
            places = places.unsqueeze(0)
        if self.form == "expanded":
            places = places.expand(x.shape)
        hidden = self.words(x) + self.positions(places)
        if self.types is not None:
            hidden = hidden + self.types((x > 9).long())
        return torch.tanh(hidden)


class LanguageModel(nn.Module):
    """The output layer has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.words(x))))


def embeddings() -> dict[str, Callable[[], Problem]]:
    def ids() -> Tensor:
        return whole_numbers(20, N, T)

    return {
        "Embedding": lambda: problem(Calls(nn.Embedding(20, 6)), ids()),
        "Embedding, one index a sample": lambda: problem(Calls(nn.Embedding(20, 6)), whole_numbers(20, N)),
        "Embedding, time first": lambda: problem(Calls(nn.Embedding(20, 6)), whole_numbers(20, T, N), 1),
        "Embedding, padding": lambda: problem(Calls(nn.Embedding(20, 6, padding_idx=3)), whole_numbers(6, N, T)),
        "Embedding, sparse": lambda: problem(Calls(nn.Embedding(20, 6, sparse=True)), ids()),
        "Embedding, positions": lambda: problem(Words(), ids(), {"positions": shared_by(N)}),
        "Embedding, positions in one row": lambda: problem(Words("row"), ids(), {"positions": shared_by(N)}),
        "Embedding, positions of each": lambda: problem(Words("expanded", types=True), ids()),
        "Embedding, token types": lambda: problem(
            Words("row", types=True, padding_idx=0), ids(), {"positions": shared_by(N)}
        ),
        "Embedding, tied to the output": lambda: problem(LanguageModel(), ids()),
    }


# ---------------------------------------------------------------------- recurrent layers


class Recurrent(nn.Module):
    """A recurrent layer with its initial states, packing, and the outputs that the loss uses.

    ``run`` may be replaced, which is how the tests put an unrolled network into the same place.
    """

    def __init__(
        self,
        layer: nn.RNNBase,
        uses: str = "all",
        states: bool = False,
        lengths: list[int] | None = None,
        packed_output: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.uses, self.packed_output = layer, uses, packed_output
        self.lengths = None if lengths is None else torch.tensor(lengths)
        count = layer.num_layers * (2 if layer.bidirectional else 1)
        width = getattr(layer, "proj_size", 0) or layer.hidden_size
        widths = (width, layer.hidden_size) if isinstance(layer, nn.LSTM) else (width,)
        for i, size in enumerate(widths):
            self.register_buffer(f"state_{i}", normal(count, N, size, seed=5 + i) if states else None)

    def states(self) -> Any:
        if self.state_0 is None:
            return None
        return (self.state_0, self.state_1) if isinstance(self.layer, nn.LSTM) else self.state_0

    def run(self, x: Tensor) -> tuple[Any, Any]:
        if self.lengths is None:
            return self.layer(x, self.states())
        ordered = bool((self.lengths.diff() <= 0).all())
        packed = pack_padded_sequence(x, self.lengths, self.layer.batch_first, enforce_sorted=ordered)
        output, last = self.layer(packed, self.states())
        if self.packed_output:
            return output.data, last
        return pad_packed_sequence(output, self.layer.batch_first, total_length=T)[0], last

    def forward(self, x: Tensor) -> list[Tensor]:
        output, last = self.run(x)
        last = last if isinstance(last, tuple) else (last,)
        used = {"all": (output, *last), "output": (output,), "h": last[:1], "c": last[1:]}[self.uses]
        return [torch.tanh(tensor) for tensor in used]


def recurrent_samples(model: Recurrent) -> Any:
    """Where the layer's outputs hold the samples."""
    first: Any = 0 if model.layer.batch_first else 1
    if model.lengths is not None:
        rows = torch.arange(N).unsqueeze(1).expand(N, T)
        ordered = bool((model.lengths.diff() <= 0).all())
        packed = pack_padded_sequence(rows, model.lengths, batch_first=True, enforce_sorted=ordered)
        first = lambda _: packed.data  # noqa: E731
    return {"layer": (first, (1, 1) if isinstance(model.layer, nn.LSTM) else 1)}


def recurrent(family: Any, inputs: int = 4, hidden: int = 5, **options: Any) -> Problem:
    wrapping = {key: options.pop(key) for key in ("uses", "states", "lengths", "packed_output") if key in options}
    model = Recurrent(family(inputs, hidden, **options), **wrapping)
    x = normal(N, T, inputs) if model.layer.batch_first else normal(T, N, inputs)
    return problem(model, x, recurrent_samples(model))


RECURRENT_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False, "batch_first": True},
    "bidirectional": {"num_layers": 2, "bidirectional": True},
    "three layers": {"num_layers": 3, "batch_first": True},
    "states": {"states": True, "num_layers": 2, "bidirectional": True},
    "output alone": {"uses": "output"},
    "last state alone": {"uses": "h", "num_layers": 2, "bidirectional": True},
    "packed": {"lengths": sorted(LENGTHS, reverse=True), "num_layers": 2, "bidirectional": True, "states": True},
    "packed, unsorted": {
        "lengths": LENGTHS,
        "num_layers": 2,
        "bidirectional": True,
        "batch_first": True,
        "states": True,
    },
    "packed, last state alone": {"lengths": LENGTHS, "uses": "h", "batch_first": True},
}
DROPOUT_OPTIONS: dict[str, dict[str, Any]] = {
    "dropout": {"num_layers": 3, "dropout": 0.4, "batch_first": True},
    "dropout, bidirectional": {"num_layers": 2, "dropout": 0.4, "bidirectional": True},
    "packed, dropout": {"num_layers": 2, "dropout": 0.4, "lengths": LENGTHS, "batch_first": True},
}
LSTM_OPTIONS: dict[str, dict[str, Any]] = {
    "cell alone": {"uses": "c"},
    "cell alone, bidirectional": {"uses": "c", "num_layers": 2, "bidirectional": True},
    "projection": {"proj_size": 3},
    "projection, bidirectional": {"proj_size": 3, "num_layers": 2, "bidirectional": True, "states": True},
    "projection, packed": {"proj_size": 3, "num_layers": 2, "lengths": LENGTHS, "states": True},
    "packed, cell alone": {"lengths": LENGTHS, "uses": "c", "states": True},
}


class Stepwise(nn.Module):
    """A cell in a loop of the user's own."""

    def __init__(self, cell: nn.Module, states: bool = False) -> None:
        super().__init__()
        self.cell = cell
        self.states = 2 if isinstance(cell, nn.LSTMCell) else 1
        for i in range(self.states):
            self.register_buffer(f"state_{i}", normal(N, 5, seed=5 + i) if states else None)

    def forward(self, x: Tensor) -> list[Tensor]:
        state: Any = self.state_0
        if state is not None and self.states == 2:
            state = (state, self.state_1)
        steps = []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            steps.append(state[0] if isinstance(state, tuple) else state)
        last = state if isinstance(state, tuple) else (state,)
        return [torch.tanh(torch.stack(steps)), *(torch.tanh(tensor) for tensor in last)]


class Translation(nn.Module):
    """The last states of one LSTM are the first of another, which is fed its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.LSTM(4, 5, batch_first=True), nn.LSTMCell(3, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, c) = self.encoder(x)
        state, y, outputs = (h[0], c[0]), x[:, 0, :3], []
        for _ in range(3):
            state = self.decoder(y, state)
            y = torch.tanh(self.head(state[0]))
            outputs.append(y)
        return torch.stack(outputs)


def recurrent_layers() -> dict[str, Callable[[], Problem]]:
    cases: dict[str, Callable[[], Problem]] = {}
    for family in (nn.RNN, nn.GRU, nn.LSTM):
        options = RECURRENT_OPTIONS | DROPOUT_OPTIONS | (LSTM_OPTIONS if family is nn.LSTM else {})
        for name, chosen in options.items():
            cases[f"{family.__name__}, {name}"] = lambda f=family, o=chosen: recurrent(f, **o)
    cases["RNN, relu"] = lambda: recurrent(nn.RNN, nonlinearity="relu", num_layers=2, bidirectional=True)
    cases["RNN, relu, packed"] = lambda: recurrent(nn.RNN, nonlinearity="relu", lengths=LENGTHS)
    cases["LSTM, packed output"] = lambda: recurrent(nn.LSTM, lengths=LENGTHS, packed_output=True)
    for cell in (nn.RNNCell, nn.GRUCell, nn.LSTMCell):
        pair = (0, 0) if cell is nn.LSTMCell else 0
        cases[cell.__name__] = lambda c=cell, p=pair: problem(Stepwise(c(4, 5)), normal(N, T, 4), {"cell": p})
        cases[f"{cell.__name__}, states"] = lambda c=cell, p=pair: problem(
            Stepwise(c(4, 5, bias=False), states=True), normal(N, T, 4), {"cell": p}
        )
    cases["RNNCell, relu"] = lambda: problem(Stepwise(nn.RNNCell(4, 5, nonlinearity="relu")), normal(N, T, 4))
    cases["LSTM, to an LSTMCell"] = lambda: problem(
        Translation(), normal(N, T, 4), {"encoder": (0, (1, 1)), "decoder": (0, 0)}
    )
    cases["LSTM, checkpointed"] = lambda: problem(
        Checkpointed(nn.LSTM(4, 5, batch_first=True, num_layers=2)), normal(N, T, 4), {"block": (0, (1, 1))}
    )
    cases["GRU, checkpointed"] = lambda: problem(
        Checkpointed(nn.GRU(4, 5, batch_first=True, bidirectional=True)), normal(N, T, 4), {"block": (0, 1)}
    )
    cases["LSTM, twice"] = lambda: problem(
        Calls(nn.LSTM(4, 4), lambda layer, x: layer(torch.tanh(layer(x)[0]))), normal(T, N, 4), {"layer": (1, (1, 1))}
    )
    return cases


# ---------------------------------------------------------------------- attention


def padding_mask(device: torch.device | None = None) -> Tensor:
    """True where a token is padding."""
    return (torch.arange(T) >= torch.tensor(LENGTHS).unsqueeze(1)).to(device)


def causal_mask(device: torch.device | None = None) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).triu(1).to(device)


def attention(
    call: Callable[[nn.Module, Tensor], Any] | None = None, batch_first: bool = True, **options: Any
) -> Problem:
    layer = nn.MultiheadAttention(E, 2, batch_first=batch_first, **options)
    x = normal(N, T, E) if batch_first else normal(T, N, E)
    model = Calls(layer, call or (lambda layer, x: layer(x, x, x)))
    return problem(model, x, {"layer": (0 if batch_first else 1, 0)})


def other(x: Tensor) -> Tensor:
    """Another sequence, one step longer, made of the first."""
    return torch.cat([x.sin(), x[:, :1].cos()], 1)


class Bert(nn.Module):
    """Embeddings, encoder layers and a pooler."""

    def __init__(self, layers: int = 2, **options: Any) -> None:
        super().__init__()
        self.words, self.positions, self.types = (
            nn.Embedding(20, E, padding_idx=0),
            nn.Embedding(T, E),
            nn.Embedding(2, E),
        )
        self.norm = nn.LayerNorm(E)
        layer = nn.TransformerEncoderLayer(E, 2, 12, batch_first=True, activation="gelu", **options)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.pooler, self.head = nn.Linear(E, E), nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.words(x) + self.positions(torch.arange(x.shape[1], device=x.device)) + self.types((x > 9).long())
        hidden = self.encoder(self.norm(hidden), src_key_padding_mask=x == 0)
        return self.head(torch.tanh(self.pooler(hidden[:, 0])))


def encoder_layer(batch_first: bool, training: bool = True, **options: Any) -> Problem:
    layer = nn.TransformerEncoderLayer(E, 2, 12, batch_first=batch_first, **options)
    axis = 0 if batch_first else 1
    x = normal(N, T, E) if batch_first else normal(T, N, E)
    # a linear map after the last norm: its rows have a constant norm, and so nearly a constant loss
    model = nn.Sequential(layer, nn.Linear(E, 3)).train(training)
    return problem(model, x, {"0.self_attn": (axis, 0), "0.linear1": axis, "0.linear2": axis, "1": axis})


def decoder_layer(batch_first: bool, **options: Any) -> Problem:
    layer = nn.TransformerDecoderLayer(E, 2, 12, batch_first=batch_first, **options)
    axis = 0 if batch_first else 1
    x = normal(N, T, E) if batch_first else normal(T, N, E)
    samples = {f"layer.{name}": (axis, 0) for name in ("self_attn", "multihead_attn")}
    samples |= {"layer.linear1": axis, "layer.linear2": axis}
    return problem(Calls(layer, lambda layer, x: layer(x, x.cos()).tanh() * x), x, samples)


def attentions() -> dict[str, Callable[[], Problem]]:
    cases: dict[str, Callable[[], Problem]] = {
        "Attention": lambda: attention(dropout=0.1),
        "Attention, time first": lambda: attention(batch_first=False),
        "Attention, no bias": lambda: attention(bias=False),
        "Attention, no weights": lambda: attention(lambda layer, x: layer(x, x, x, need_weights=False)[0]),
        "Attention, weights of each head": lambda: attention(
            lambda layer, x: layer(x, x, x, average_attn_weights=False)
        ),
        "Attention, loss of the weights alone": lambda: attention(lambda layer, x: layer(x, x, x)[1]),
        "Attention, three inputs": lambda: attention(lambda layer, x: layer(x, x.sin(), x.cos())),
        "Attention, three inputs, time first": lambda: attention(
            lambda layer, x: layer(x, x.sin(), x.cos(), need_weights=False)[0], batch_first=False
        ),
        "Attention, cross": lambda: attention(lambda layer, x: layer(x, *[other(x)] * 2)),
        "Attention, widths": lambda: attention(lambda layer, x: layer(x, x[..., :5], x[..., :3]), kdim=5, vdim=3),
        "Attention, widths, time first": lambda: attention(
            lambda layer, x: layer(x, x[..., :5], x[..., :3]), kdim=5, vdim=3, batch_first=False
        ),
        "Attention, padding mask": lambda: attention(
            lambda layer, x: layer(x, x, x, key_padding_mask=padding_mask(x.device))
        ),
        "Attention, attention mask": lambda: attention(
            lambda layer, x: layer(x, x, x, attn_mask=causal_mask(x.device), need_weights=False)[0]
        ),
        "Attention, bias_k": lambda: attention(add_bias_kv=True, add_zero_attn=True),
        "Attention, bias_k and widths": lambda: attention(
            lambda layer, x: layer(x, x[..., :5], x[..., :3]), kdim=5, vdim=3, add_bias_kv=True
        ),
        "Attention, checkpointed": lambda: problem(
            Checkpointed(
                nn.TransformerEncoderLayer(E, 2, 12, batch_first=True), nn.Sequential(nn.Linear(E, E), nn.Linear(E, 3))
            ),
            normal(N, T, E),
            {"block.self_attn": (0, 0)},
        ),
        "Attention, twice": lambda: attention(lambda layer, x: layer(*[layer(x, x, x)[0]] * 3)),
        "Encoder": lambda: problem(
            nn.Sequential(
                nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 12, batch_first=True), 2), nn.Linear(E, 3)
            ),
            normal(N, T, E),
            {f"0.layers.{i}.self_attn": (0, 0) for i in range(2)},
        ),
        "BERT": lambda: problem(
            Bert(),
            whole_numbers(20, N, T),
            {"positions": shared_by(N)} | {f"encoder.layers.{i}.self_attn": (0, 0) for i in range(2)},
        ),
    }
    for batch_first in (True, False):
        order = "" if batch_first else ", time first"
        for norm_first in (True, False):
            norm = ", norm first" if norm_first else ""
            for training in (True, False):
                mode = "" if training else ", evaluation mode"
                cases[f"EncoderLayer{norm}{order}{mode}"] = lambda b=batch_first, f=norm_first, t=training: (
                    encoder_layer(b, t, norm_first=f)
                )
            cases[f"DecoderLayer{norm}{order}"] = lambda b=batch_first, f=norm_first: decoder_layer(b, norm_first=f)
    return cases


def problem(model: nn.Module, x: Tensor, samples: Any = 0) -> Problem:
    return Problem(model, x, weighted, LABELS, samples)


LINEAR, CONVOLUTIONS, EMBEDDINGS = linear(), convolutions(), embeddings()
RECURRENT_LAYERS, ATTENTIONS = recurrent_layers(), attentions()
FAMILIES: dict[str, Callable[[], Problem]] = LINEAR | CONVOLUTIONS | EMBEDDINGS | RECURRENT_LAYERS | ATTENTIONS
