"""Writing text with a trained model, one character a step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fastrnn import nn
from fastrnn._charlm.errors import InputError
from fastrnn._charlm.text import Vocabulary

__all__ = ["generate"]


def generate(
    model: nn.Sequential,
    vocabulary: Vocabulary,
    prompt: str,
    length: int,
    temperature: float,
    rng: np.random.Generator,
) -> Iterator[str]:
    """Reads ``prompt``, then yields ``length`` characters as they are drawn.

    Args:
        model: A character model; it is frozen first, so training it on does not change the text.
        vocabulary: Its vocabulary.
        prompt: What to go on from; an empty one stands for the beginning of a line.
        length: Characters to draw.
        temperature: The logits are divided by it: below 1 likelier, above 1 bolder; 0 takes the
            likeliest character every time.
        rng: Draws one number a character.

    Raises:
        InputError: the prompt has characters that the model does not know, or a number is out of
            range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(
            f"--temperature {temperature}: give a number from 0 (no chance) to about 2"
        )
    if length < 0:
        raise InputError(f"--length {length}: give the number of characters, 0 or more")
    start = vocabulary.encode(prompt)
    if not len(start):
        start = vocabulary.encode(
            "\n" if "\n" in vocabulary.characters else vocabulary.characters[0]
        )
    return _characters(model, vocabulary, start, length, temperature, rng)


def _characters(
    model: nn.Sequential,
    vocabulary: Vocabulary,
    start: np.ndarray[tuple[int], np.dtype[np.int64]],
    length: int,
    temperature: float,
    rng: np.random.Generator,
) -> Iterator[str]:
    stream = model.freeze().stream(1)
    for known in start.tolist():
        logits = stream.step(np.array([known]))
    for _ in range(length):
        index = _draw(logits[0].astype(np.float64), temperature, rng)
        yield vocabulary.characters[index]
        logits = stream.step(np.array([index]))


def _draw(
    logits: np.ndarray[tuple[int], np.dtype[np.float64]],
    temperature: float,
    rng: np.random.Generator,
) -> int:
    """An index with probability softmax(logits / temperature)."""
    if temperature == 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the likeliest to exp(-inf)
        weights = np.exp((logits - logits.max()) / temperature)
    cumulative = weights.cumsum()
    # The last entry is the sum itself, so the index is in range even if rounding meets the end.
    return int(
        min(np.searchsorted(cumulative, rng.random() * cumulative[-1], "right"), len(weights) - 1)
    )
