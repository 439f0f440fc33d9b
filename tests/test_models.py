"""The networks: shapes, names, where activations act, BERT against its original, and that each learns and is watched."""

import copy
import re
import sys
import textwrap
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import autospec
from autospec import specs
from autospec.config import parse_config, weight_names
from autospec.custom_model import module_file, require_class, split_path
from autospec.describe import ACTIVATIONS as ACTIVATION_WORDS
from autospec.describe import ARCHITECTURES as ARCHITECTURE_WORDS
from autospec.describe import architecture_words
from autospec.errors import UserError
from autospec.introspection.parameters import find_parameters
from autospec.models import ACTIVATIONS, AUTOENCODERS, CLASSIFIERS, build_model
from autospec.models.bert import attention_heads
from autospec.models.cnn import average_blocks
from autospec.models.custom import load_class
from tests.conftest import ROOT
from tests.introspection.oracle import Problem, assert_shares, members, record, shared_by
from tests.study import SETTINGS

TASKS = ("autoencoder", "classifier")
SHAPES = {
    "mlp": (3, 7),
    "cnn1d": (13, 5),
    "cnn2d": (9, 7),
    "cnn3d": (5, 7, 6),
    "rnn": (6, 5),
    "lstm": (6, 5),
    "bert": (6, 5),
}
N, CLASSES = 11, 3
LABELS = ["a", "b", "b", "c"] * 3
LABELS = LABELS[:N]


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, so that two trainings have the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of two or more dimensions, by name."""
    return {name: tuple(value.shape) for name, value in model.named_parameters() if value.ndim >= 2}


# ---------------------------------------------------------------------- shapes and names

# Odd and even sizes, sizes of 1, MNIST, sinusoids, time courses, and maps that shrink to a voxel.
SAMPLES = {
    "mlp": [(28, 28), (30, 1), (10, 53), (5, 6, 4), (17,)],
    "cnn1d": [(30, 1), (10, 53), (11, 4), (1, 3), (7, 1)],
    "cnn2d": [(28, 28), (10, 53), (11, 4), (1, 9), (5, 5)],
    "cnn3d": [(5, 6, 4), (9, 11, 7), (1, 2, 3)],
    "rnn": [(28, 28), (30, 1), (10, 53), (1, 3)],
    "lstm": [(28, 28), (30, 1), (10, 53), (1, 3)],
    "bert": [(28, 28), (30, 1), (10, 53), (1, 3)],
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("architecture", SHAPES)
def test_the_config_knows_the_names_of_weights(architecture, task):
    for depth in (1, 2, 3):
        model = build_model(architecture, task, SHAPES[architecture], CLASSES, [8] * depth, "relu")
        assert [each.name for each in find_parameters(model, None, "refuse")] == weight_names(architecture, task, depth)


@pytest.mark.parametrize("hidden", [[8], [32], [64], [128], [8, 8, 8]], ids=str)
@pytest.mark.parametrize("architecture", SAMPLES)
def test_an_autoencoder_returns_the_samples_shape_and_a_classifier_a_number_for_each_class(architecture, hidden):
    for shape in SAMPLES[architecture]:
        x = normal(2, *shape)
        assert build_model(architecture, "autoencoder", shape, 4, hidden, "relu")(x).shape == x.shape
        assert build_model(architecture, "classifier", shape, 4, hidden, "relu")(x).shape == (2, 4)


@pytest.mark.parametrize("architecture", SAMPLES)
def test_each_sample_is_treated_alone(architecture):
    for task in TASKS:
        model = build_model(architecture, task, SHAPES[architecture], CLASSES, [8, 8], "tanh")
        x = normal(4, *SHAPES[architecture])
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]))


def test_the_names_of_the_parameters_are_those_of_the_page():
    """docs/models.md lists the weights of each network with two layers."""
    page = (ROOT / "docs/models.md").read_text()
    for architecture in SHAPES:
        (row,) = re.findall(rf"^\| `{architecture}` \|(.*)$", page, re.MULTILINE)
        listed = set(re.findall(r"`([\w.]*weight[\w]*)`", row))
        there = set()
        for task in TASKS:
            there |= shapes(build_model(architecture, task, SHAPES[architecture], CLASSES, [8, 8], "relu")).keys()
        assert listed == there, architecture


@pytest.mark.parametrize("hidden", [[7, 5], [8]], ids=str)
def test_decoders_are_mirrored_encoders(hidden):
    mlp = shapes(build_model("mlp", "autoencoder", (4, 5), CLASSES, hidden, "relu"))
    widths = [20, *hidden]
    assert list(mlp.values()) == [
        *((b, a) for a, b in pairwise(widths)),
        *((a, b) for a, b in reversed(list(pairwise(widths)))),
    ]
    for dimensions, shape in ((1, (13, 4)), (2, (9, 8)), (3, (5, 4, 3))):
        cnn = shapes(build_model(f"cnn{dimensions}d", "autoencoder", shape, CLASSES, hidden, "relu"))
        channels = [4 if dimensions == 1 else 1, *hidden]
        # A transposed convolution keeps its weight as in x out, so the mirrored one has the very same shape.
        encoder = [(b, a, *[3] * dimensions) for a, b in pairwise(channels)]
        assert list(cnn.values()) == encoder + encoder[::-1]


def test_a_convolutional_classifier_keeps_at_most_four_cells_in_each_dimension():
    for shape, cells in (((28, 28), 16), ((2, 9), 3), ((53, 63, 52), 64)):
        for architecture in ("cnn2d", "cnn3d"):
            if len(shape) == int(architecture[3]):
                model = build_model(architecture, "classifier", shape, 2, [8], "relu")
                assert shapes(model)["classifier.weight"] == (2, 8 * cells)


def test_averages_over_blocks_are_average_pooling():
    for shape in ((14,), (7, 2), (5, 13, 27)):
        x = normal(2, 3, *shape)
        pooling = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[len(shape) - 1]
        torch.testing.assert_close(
            average_blocks(x), pooling(tuple(-(-size // 4) for size in shape), ceil_mode=True)(x)
        )


@pytest.mark.parametrize(("width", "heads"), [(8, 2), (32, 8), (64, 8), (128, 8), (12, 2), (4, 1), (7, 1), (16, 4)])
def test_attention_heads_have_at_least_four_features(width, heads):
    assert attention_heads(width) == heads


# ---------------------------------------------------------------------- activations

FUNCTIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_mlp_and_a_cnn_are_the_formulas(name):
    x, function = normal(9, 4, 5), FUNCTIONS[name]
    for task, last in (("autoencoder", "decoder.0"), ("classifier", "classifier")):
        model = build_model("mlp", task, (4, 5), 3, [7], name)
        weights = dict(model.named_parameters())
        hidden = function(x.reshape(9, 20) @ weights["encoder.0.weight"].T + weights["encoder.0.bias"])
        expected = hidden @ weights[f"{last}.weight"].T + weights[f"{last}.bias"]
        torch.testing.assert_close(model(x).reshape(expected.shape), expected)
    # Along time, by hand: the output at time t sees 2t - 1, 2t and 2t + 1.
    model = build_model("cnn1d", "classifier", (4, 5), 3, [6], name)
    weights = dict(model.named_parameters())
    padded = nn.functional.pad(x, (0, 0, 1, 1))
    places = [torch.einsum("ncj,kjc->nk", padded[:, t : t + 3], weights["encoder.0.weight"]) for t in (0, 2)]
    hidden = function(torch.stack(places, -1) + weights["encoder.0.bias"][:, None])
    expected = hidden.flatten(1) @ weights["classifier.weight"].T + weights["classifier.bias"]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_rnn_is_elmans_with_sigmoid_on_its_outputs(name):
    x = normal(9, 6, 5)
    inside = torch.tanh if name == "sigmoid" else FUNCTIONS[name]
    outside = torch.sigmoid if name == "sigmoid" else lambda states: states
    for task, head in (("autoencoder", "decoder"), ("classifier", "classifier")):
        model = build_model("rnn", task, (6, 5), 3, [7, 7], name)
        w = dict(model.named_parameters())
        rows = x
        for level in (0, 1):
            h, states = torch.zeros(9, 7), []
            for t in range(6):
                h = inside(
                    rows[:, t] @ w[f"rnn.weight_ih_l{level}"].T
                    + w[f"rnn.bias_ih_l{level}"]
                    + h @ w[f"rnn.weight_hh_l{level}"].T
                    + w[f"rnn.bias_hh_l{level}"]
                )
                states.append(h)
            rows = torch.stack(states, 1)
        seen = outside(rows if task == "autoencoder" else rows[:, -1])
        torch.testing.assert_close(model(x), seen @ w[f"{head}.weight"].T + w[f"{head}.bias"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_activation_of_an_lstm_acts_on_what_leaves_it(name):
    x = normal(9, 6, 5)
    for task, head in (("autoencoder", "decoder"), ("classifier", "classifier")):
        model = build_model("lstm", task, (6, 5), 3, [7], name)
        states = model.lstm(x)[0]
        seen = FUNCTIONS[name](states if task == "autoencoder" else states[:, -1])
        torch.testing.assert_close(model(x), getattr(model, head)(seen))


def test_every_name_has_words():
    assert set(ACTIVATIONS) == set(ACTIVATION_WORDS) == set(FUNCTIONS)
    assert set(AUTOENCODERS) == set(CLASSIFIERS) == set(ARCHITECTURE_WORDS) == set(SHAPES)
    assert architecture_words("cnn1d") == "1D CNN"
    assert architecture_words("my.networks:Net") == "Net"


# ---------------------------------------------------------------------- BERT's original


def original(model: nn.Module, width: int, depth: int, time_points: int, activation: str) -> nn.Module:
    """Hugging Face's BertModel with the weights of an encoder."""
    transformers = pytest.importorskip(
        "transformers", reason="BERT's original is compared with: pip install 'autospec-neuro[transformers]'"
    )
    config = transformers.BertConfig(
        vocab_size=2,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=attention_heads(width),
        intermediate_size=4 * width,
        hidden_act=activation,
        max_position_embeddings=time_points,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    bert = transformers.BertModel(config, add_pooling_layer=True)
    encoder, pairs = model.encoder, []
    pairs += [(bert.embeddings.position_embeddings, encoder.positions), (bert.embeddings.LayerNorm, encoder.norm)]
    for theirs, ours in zip(bert.encoder.layer, encoder.layers, strict=True):
        pairs += [
            (theirs.attention.output.dense, ours.self_attn.out_proj),
            (theirs.attention.output.LayerNorm, ours.norm1),
            (theirs.intermediate.dense, ours.linear1),
            (theirs.output.dense, ours.linear2),
            (theirs.output.LayerNorm, ours.norm2),
        ]
        own = theirs.attention.self
        for i, part in enumerate((own.query, own.key, own.value)):
            with torch.no_grad():
                part.weight.copy_(ours.self_attn.in_proj_weight[i * width : (i + 1) * width])
                part.bias.copy_(ours.self_attn.in_proj_bias[i * width : (i + 1) * width])
    if hasattr(model, "pooler"):
        pairs.append((bert.pooler.dense, model.pooler))
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        bert.embeddings.token_type_embeddings.weight.zero_()  # there are no segments here
    return bert.double()


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize(("width", "depth"), [(32, 1), (8, 3)])
def test_bert_is_bert(width, depth, activation):
    shape, x = (10, 5), normal(4, 10, 5).double()
    for task in TASKS:
        model = build_model("bert", task, shape, CLASSES, [width] * depth, activation)
        with torch.no_grad():  # the weights that training begins with are too small to tell formulas apart
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        theirs = original(model, width, depth, shape[0], activation)
        model = model.double()
        output = theirs(inputs_embeds=model.encoder.projection(x))
        torch.testing.assert_close(model.encoder(x), output.last_hidden_state, rtol=1e-9, atol=1e-9)
        if task == "classifier":
            torch.testing.assert_close(model(x), model.classifier(output.pooler_output), rtol=1e-9, atol=1e-9)


def test_bert_begins_as_bert_does():
    model = build_model("bert", "classifier", (30, 20), CLASSES, [64], "relu")
    for name, value in model.named_parameters():
        if value.ndim > 1 and value.numel() > 500:
            assert abs(value.std().item() / 0.02 - 1) < 0.1, name
            assert abs(value.mean().item()) < 5 * 0.02 / value.numel() ** 0.5, name
        elif value.ndim == 1:
            expected = torch.ones_like(value) if "norm" in name and name.endswith("weight") else torch.zeros_like(value)
            assert torch.equal(value, expected), name


# ---------------------------------------------------------------------- watched


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """A generic loss: no symmetry, no constant part."""
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)
    return (weights * (output - 0.3).square()).mean()


def where_samples_are(depth: int) -> dict:
    """For the oracle: what a recurrent layer returns beside its outputs is time-first, and BERT's positions are shared."""
    found = {"rnn": (0, 1), "lstm": (0, (1, 1)), "encoder.positions": shared_by(N)}
    return found | {f"encoder.layers.{i}.self_attn": (0, 0) for i in range(depth)}


@pytest.mark.parametrize("hidden", [[8], [6, 6, 6]], ids=str)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("architecture", SHAPES)
def test_the_shares_are_those_of_the_definition(architecture, task, hidden):
    shape = SHAPES[architecture]
    model = build_model(architecture, task, shape, CLASSES, hidden, "tanh")
    problem = Problem(model, normal(N, *shape), loss_of, LABELS, where_samples_are(len(hidden)))
    tree = record(problem)
    # Every matrix is watched.
    assert set(tree["layers"].children) == shapes(model).keys()
    assert not tree.attrs["audit"]["outside"]
    assert_shares({2e-5: tree}, problem, members(LABELS, N))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("architecture", SHAPES)
def test_training_keeps_its_bits(architecture, task, activation):
    x = normal(N, *SHAPES[architecture])
    plain = build_model(architecture, task, SHAPES[architecture], CLASSES, [8, 8], activation)
    watched = copy.deepcopy(plain)

    def train(model, step):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            step()
            optimizer.step()

    train(plain, lambda: None)
    with autospec.watch(watched, LABELS, quiet=True) as watcher:
        train(watched, watcher.step)
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    for node in watcher.trajectories["layers"].children.values():
        assert node["gradient"].sel(group="all").notnull().all()


# ---------------------------------------------------------------------- learning


def structured(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples that are smooth, of a few patterns, and of two classes."""
    generator = np.random.default_rng(0)
    classes = np.arange(24) % 2
    x = generator.normal(0, 0.1, (24, *shape))
    for i, label in enumerate(classes):
        wave = generator.normal(1.0, 0.2)
        for axis, size in enumerate(shape):
            along = np.sin(2 * np.pi * (1 + label) * np.arange(size) / size + 0.5 * axis + 0.5)
            wave = wave * along.reshape([-1 if other == axis else 1 for other in range(len(shape))])
        x[i] += wave
    return torch.tensor(x / x.std(), dtype=torch.float32), torch.tensor(classes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("architecture", SHAPES)
def test_autoencoders_learn_more_than_the_mean(architecture, activation):
    shape = {"mlp": (40,), "cnn2d": (12, 9), "cnn3d": (6, 7, 5)}.get(architecture, (16, 6))
    x, _ = structured(shape)
    torch.manual_seed(0)
    model = build_model(architecture, "autoencoder", shape, 2, [32], activation)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * (x - x.mean(0)).square().mean().item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("architecture", SHAPES)
def test_classifiers_learn_the_classes(architecture, activation):
    shape = {"mlp": (40,), "cnn2d": (12, 9), "cnn3d": (6, 7, 5)}.get(architecture, (16, 6))
    x, target = structured(shape)
    torch.manual_seed(0)
    model = build_model(architecture, "classifier", shape, 2, [32], activation)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    assert (model(x).argmax(1) == target).all()


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("architecture", ["rnn", "lstm", "bert"])
def test_layers_of_different_widths_are_refused_where_they_have_one(architecture):
    with pytest.raises(UserError, match=rf"hidden is \[8, 4\]: all layers of {architecture} .* such as \[8, 8\]"):
        build_model(architecture, "classifier", (6, 5), 2, [8, 4], "relu")


@pytest.mark.parametrize("architecture", ["cnn1d", "cnn2d", "cnn3d", "rnn", "lstm", "bert"])
def test_samples_of_other_dimensions_are_refused(architecture):
    for shape in ((5,), (5, 4, 3, 2)):
        with pytest.raises(
            UserError, match=rf"{architecture} takes samples of [23] dimensions, .*{re.escape(str(shape))}"
        ):
            build_model(architecture, "classifier", shape, 2, [8], "relu")


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match=r"no architecture 'gru': choose one of .*'bert'"):
        build_model("gru", "classifier", (6, 5), 2, [7], "relu")


# ---------------------------------------------------------------------- a user's own


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, hidden, classes=2):
        super().__init__()
        self.first = nn.Linear(shape[0], hidden[0])
        self.norm = nn.BatchNorm1d(hidden[0])
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(hidden[0], classes)

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))) + 0 * torch.rand(1))

class Lazy(Net):
    def __init__(self, shape, hidden):
        super().__init__(shape, hidden)
        self.first = nn.LazyLinear(hidden[0])

class LazyNorm(Lazy):
    def __init__(self, shape, hidden):
        super().__init__(shape, hidden)
        self.norm = nn.LazyBatchNorm1d(affine=False)
        self.frozen = nn.BatchNorm1d(hidden[0]).eval()

class Everything(Net):
    def __init__(self, **options):
        super().__init__(options["shape"], options["hidden"], options["classes"])
        self.options = options

class Plain:
    pass

class Empty(nn.Module):
    def forward(self, x):
        return x[:, :2]

class Demanding(Net):
    def __init__(self, shape, hidden, dropout):
        super().__init__(shape, hidden)

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

class Failing(Net):
    def forward(self, x):
        return self.first(x) @ self.last(x)
"""


@pytest.fixture
def analysis(tmp_path, monkeypatch):
    """An analysis folder with a user's module in it; what was imported from it is forgotten afterwards."""
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def built(path: str, task: str = "classifier", shape: tuple[int, ...] = (6,)) -> nn.Module:
    return build_model(path, task, shape, 2, [4], "relu")


def test_a_users_own_network_is_given_what_its_signature_names(analysis):
    assert shapes(built("mynet:Net")) == {"first.weight": (4, 6), "last.weight": (2, 4)}
    assert built("mynet:Everything").options == {
        "task": "classifier",
        "shape": (6,),
        "classes": 2,
        "hidden": [4],
        "activation": "relu",
    }


def test_lazy_layers_of_a_users_own_network_have_their_weights_before_training(analysis):
    for name in ("Lazy", "LazyNorm"):
        model = built(f"mynet:{name}")
        assert shapes(model) == {"first.weight": (4, 6), "last.weight": (2, 4)}
        assert model.training
        assert model.norm.training
        assert model.norm.num_batches_tracked == 0
        assert model.norm.running_mean.tolist() == [0.0] * 4
    assert not model.frozen.training


def test_the_trial_leaves_buffers_and_random_numbers_as_they_were(analysis):
    network = load_class("mynet:Net")
    torch.manual_seed(3)
    plain = network((6,), [4])
    state = torch.get_rng_state()
    torch.manual_seed(3)
    model = built("mynet:Net")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for (name, one), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("mynet.Net:", "'mynet.Net:' is no path of a class"),
        ("my net:Net", "'my net:Net' is no path of a class"),
        ("nowhere:Net", r"module nowhere of the model 'nowhere:Net' is neither in .* nor installed"),
        ("mynet.deeper:Net", r"module mynet\.deeper .* is neither"),
        ("folder:Net", r"module folder of .* is neither"),
        ("mynet:Nett", r"no class Nett in .*mynet\.py"),
        ("mynet:Plain", r"Plain in .*mynet\.py is not a class derived from torch\.nn\.Module"),
        ("mynet:torch", r"torch in .*mynet\.py is not a class"),
        ("mynet:Empty", "'mynet:Empty' has no parameter to train"),
        ("mynet:Demanding", r"cannot be built with \(.*\): TypeError: .*'dropout'; of its arguments only task, shape"),
        ("mynet:Pair", r"returns a tuple .* classifier, needs a tensor of shape \(2, 2\)"),
        ("mynet:Failing", r"fails with samples of shape \(2, 6\), .*: RuntimeError: "),
        ("broken:Net", r"broken\.py cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("leaving:Net", r"leaving\.py cannot be imported \(SystemExit: 3\)"),
        ("sys:Net", r"sys is the name of another module too, one of Python's own: rename .*sys\.py"),
        ("string:Net", r"string is the name of another module too, .*: rename .*string\.py"),
    ],
)
def test_a_network_that_cannot_be_used_is_refused_in_one_sentence(analysis, path, said):
    (analysis / "folder").mkdir()
    (analysis / "broken.py").write_text("1 / 0\n")
    (analysis / "leaving.py").write_text("raise SystemExit(3)\n")
    for name in ("string.py", "sys.py"):  # Python has imported its own long since
        (analysis / name).write_text(NET)
    with pytest.raises(UserError, match=said) as caught:
        built(path)
    assert "\n" not in str(caught.value)


def test_another_shape_is_refused_with_what_came_and_what_is_wanted(analysis):
    with pytest.raises(UserError, match=r"returns shape \(2, 2\) .* autoencoder, needs a tensor of shape \(2, 6\)"):
        built("mynet:Net", "autoencoder")


def test_the_file_of_a_module_is_found_without_importing_anything(analysis, monkeypatch):
    package = analysis / "lab" / "networks"
    package.mkdir(parents=True)
    for file in (analysis / "lab/__init__.py", package / "__init__.py", package / "small.py"):
        file.write_text("raise RuntimeError('imported')\n")
    assert split_path("lab.networks.small:Net") == ("lab.networks.small", "Net")
    assert module_file("lab.networks.small:Net") == package / "small.py"
    assert module_file("lab.networks:Net") == package / "__init__.py"
    assert "lab" not in sys.modules
    # The analysis folder comes before what is installed, and a folder may be named.
    (analysis / "numpy.py").write_text("")
    assert module_file("numpy:Net") == analysis / "numpy.py"
    monkeypatch.chdir(ROOT)
    assert module_file("numpy:Net") != analysis / "numpy.py"
    assert module_file("numpy:Net", analysis) == analysis / "numpy.py"


def test_a_class_that_cannot_be_there_is_noticed_without_running_its_file(tmp_path):
    for name, text in (
        ("plain", "class Net: ...\n"),
        ("made", "def make():\n    return type('Net', (), {})\nNet = make()\n"),
        ("handed_on", "from plain import *\n"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        require_class(f"{name}:Net", tmp_path)
    with pytest.raises(
        UserError, match=r"'plain:Nett' names a class that .*plain.py does not have: its classes are 'Net'"
    ):
        require_class("plain:Nett", tmp_path)
    (tmp_path / "broken.py").write_text("import os\nclass Net(:\n")
    with pytest.raises(UserError, match=r"'broken:Net' cannot be read .*broken.py, line 2"):
        require_class("broken:Net", tmp_path)


def test_the_example_of_the_page_runs(analysis):
    """The network of docs/models.md, in the file that the page names, trained while it is watched."""
    page = (ROOT / "docs/models.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (written,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    example = yaml.safe_load(written)
    (path,) = example["models"].values()
    (experiment,) = example["experiments"].values()
    (analysis / f"{path.partition(':')[0]}.py").write_text(textwrap.dedent(code))
    small = {"small": {**SETTINGS["experiments"]["small"], **experiment}}
    config = parse_config({**SETTINGS, "models": example["models"], "experiments": small})
    assert specs.run_settings(config, "small", "judge")["model"] == path
    for task in TASKS:
        x = normal(N, 10, 5)
        model = build_model(path, task, (10, 5), CLASSES, [8], "tanh")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        with autospec.watch(model, LABELS, quiet=True) as watcher:
            for _ in range(5):
                optimizer.zero_grad()
                loss = loss_of(model(x))
                loss.backward()
                watcher.step()
                optimizer.step()
                losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert set(watcher.trajectories["layers"].children) == shapes(model).keys()
