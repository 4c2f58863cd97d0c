"""The model: a recurrent stack on one-hot characters, dropout, and a linear layer to V logits.

``Sequential(LSTM(V, H), Dropout, Linear(H, V))``, fed with integers, so that the first product is a
lookup of a row of ``weight_ih`` for every character and costs nothing.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from fastrnn import _device, _layers, nn
from fastrnn._charlm.errors import InputError
from fastrnn._charlm.text import Ids, Vocabulary
from fastrnn.io import load, read_metadata, save

__all__ = ["CELLS", "Settings", "build", "evaluate", "load_model", "save_model"]

CELLS = ("rnn", "lstm", "gru")
METADATA = "fastrnn-charlm"

# Learning rate by cell, found by short runs on pydoc_data.topics at H = 256, B = 32, T = 64.
LEARNING_RATES = {"rnn": 5e-3, "lstm": 1e-2, "gru": 1e-2}

# Standard deviation of weight_ih at the start. A one-hot row picks one column, so with the usual
# U(-1/sqrt(H), 1/sqrt(H)) a character would move the pre-activations by 0.03, and Adam, whose steps
# are about the learning rate, would need hundreds of them to make characters tell.
INPUT_SCALE = 2.0

VALIDATION_STREAM = 50_000  # characters; longer validation texts are read as several streams
VALIDATION_WINDOW = 1024  # steps a call, which bounds the memory for the logits


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that determines a run, together with the text; what ``--resume`` finds again."""

    cell: str = "lstm"
    hidden: int = 256
    layers: int = 1
    dropout: float = 0.2
    epochs: int = 7
    batch: int = 32
    window: int = 64
    learning_rate: float = LEARNING_RATES["lstm"]
    clip: float = 1.0
    seed: int = 0


def build(settings: Settings, vocabulary_size: int, rng: np.random.Generator) -> nn.Sequential:
    """A new model; ``rng`` draws its weights and, later, its dropout masks."""
    V, H = vocabulary_size, settings.hidden
    between = settings.dropout if settings.layers > 1 else 0.0
    options: dict[str, Any] = {"num_layers": settings.layers, "dropout": between, "rng": rng}
    recurrent: _layers.RNN | _layers.LSTM | _layers.GRU
    if settings.cell == "lstm":
        recurrent = _layers.LSTM(V, H, forget_bias=1.0, **options)
    elif settings.cell == "gru":
        recurrent = _layers.GRU(V, H, **options)
    else:
        recurrent = _layers.RNN(V, H, init="orthogonal", **options)
    scale = INPUT_SCALE if settings.cell != "rnn" else 0.5  # a tanh unit has no gates to saturate
    weight = recurrent.params["weight_ih_l0"]
    weight[...] = rng.normal(0.0, scale, weight.shape)
    return nn.Sequential(recurrent, nn.Dropout(settings.dropout, rng=rng), nn.Linear(H, V, rng=rng))


def evaluate(model: nn.Sequential, ids: Ids, threads: int | None = None) -> float:
    """Mean negative log-likelihood of ``ids``, in nats a character: no dropout, state carried.

    The text is one stream; only one of more than ``VALIDATION_STREAM`` characters is cut into
    several, each of which starts from the zero state.
    """
    rows = -(-len(ids) // VALIDATION_STREAM)
    steps = (len(ids) - 1) // rows
    index = np.arange(steps)[:, None] + np.arange(rows) * steps
    state, total = None, 0.0
    for start in range(0, steps, VALIDATION_WINDOW):
        part = index[start : start + VALIDATION_WINDOW]
        x = _device.move(ids[part], model.device)
        logits, state = model(x, state, threads=threads)
        loss, _ = nn.softmax_cross_entropy(logits, ids[part + 1])
        total += loss * len(part)
    return total / steps


def save_model(path: Path, model: nn.Sequential, vocabulary: Vocabulary) -> None:
    """Writes the model with its vocabulary, atomically."""
    save(path, model, {METADATA: json.dumps({"vocabulary": vocabulary.characters})})


def load_model(path: Path) -> tuple[nn.Sequential, Vocabulary]:
    """Reads what ``save_model`` wrote.

    Raises:
        InputError: there is no such file, or it is not a model of ``fastrnn train``.
    """
    try:
        metadata = read_metadata(path)
        if METADATA not in metadata:
            raise InputError(f"{path}: is no character model; make one with: fastrnn train FILE")
        model = load(path)
        characters = json.loads(metadata[METADATA])["vocabulary"]
        if not isinstance(model, nn.Sequential) or not isinstance(characters, str):
            raise ValueError(f"{path}: not a character model")
        weight = model.params["0.weight_ih_l0"], model.params["2.weight"]
        if {weight[0].shape[1], weight[1].shape[0]} != {len(set(characters)), len(characters)}:
            raise ValueError(f"{path}: its vocabulary does not fit its layers")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; make a model with: fastrnn train FILE") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name the model file in it") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        text = str(error).splitlines()[0]
        raise InputError(f"{text}; make a model with: fastrnn train FILE") from None
    return model, Vocabulary(characters)
