"""The networks: shapes, names, mirrored decoders, activations."""

import pytest
import torch
from torch import nn

from autospec.models import ACTIVATIONS, build_model


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each weight matrix, by name."""
    return {name: tuple(value.shape) for name, value in model.named_parameters() if value.ndim == 2}


def test_an_autoencoder_mirrors_its_encoder_and_returns_the_inputs_shape():
    model = build_model("mlp", "autoencoder", 20, 3, [7, 5], "relu")
    assert shapes(model) == {
        "encoder.0.weight": (7, 20),
        "encoder.2.weight": (5, 7),
        "decoder.0.weight": (7, 5),
        "decoder.2.weight": (20, 7),
    }
    assert model(torch.zeros(4, 20)).shape == (4, 20)


def test_a_classifier_returns_a_number_for_each_class():
    model = build_model("mlp", "classifier", 20, 3, [7, 5], "relu")
    assert shapes(model) == {"encoder.0.weight": (7, 20), "encoder.2.weight": (5, 7), "classifier.weight": (3, 5)}
    assert model(torch.zeros(4, 20)).shape == (4, 3)


@pytest.mark.parametrize(("name", "function"), [("relu", torch.relu), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh)])
def test_the_activation_stands_after_every_layer_but_the_last(name, function):
    x = torch.randn(9, 20, generator=torch.Generator().manual_seed(0))
    for task, last in (("autoencoder", "decoder.0"), ("classifier", "classifier")):
        model = build_model("mlp", task, 20, 3, [7], name)
        weights = dict(model.named_parameters())
        hidden = function(x @ weights["encoder.0.weight"].T + weights["encoder.0.bias"])
        expected = hidden @ weights[f"{last}.weight"].T + weights[f"{last}.bias"]
        torch.testing.assert_close(model(x), expected)
    assert set(ACTIVATIONS) == {"relu", "sigmoid", "tanh"}


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="no architecture 'rnn'"):
        build_model("rnn", "classifier", 20, 3, [7], "relu")
