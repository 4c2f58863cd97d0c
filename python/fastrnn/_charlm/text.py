"""From files to numbers: reading text, the vocabulary, and the parallel streams of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrnn._charlm.errors import InputError

__all__ = ["Corpus", "Vocabulary", "python_topics", "read_files"]

Ids = npt.NDArray[np.int64]

VALIDATION_SHARE = 20  # the last 1/20 of the text, 5 %, is never trained on


def python_topics() -> str:
    """English text that every CPython carries: the language reference behind ``help()``."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        raise InputError(
            "this Python has no pydoc_data.topics; name a text file: fastrnn train FILE"
        ) from None
    return "\n\n".join(topics.values())


def read_files(paths: Sequence[Path]) -> str:
    """The texts of ``paths``, in order, an empty line between them."""
    return "\n\n".join(_read(path) for path in paths)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the name") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name the text files in it") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from None
    if not data:
        raise InputError(f"{path}: is empty; give a file with text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv -t utf-8"
        ) from None
    if "\0" in text:
        raise InputError(f"{path}: is a binary file (it has NUL bytes); give a text file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _codes(text: str) -> npt.NDArray[np.uint32]:
    """The code points of ``text``, (N,); lone surrogates (a prompt of undecodable bytes) too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class Vocabulary:
    """The distinct characters of a text, in order; a character's id is its place."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        codes = _codes(characters)
        self._ids = np.full(0x110000, -1, np.int64)  # of every code point there is; -1: not ours
        self._ids[codes] = np.arange(len(codes))

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """The vocabulary of ``text``."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Ids:
        """The ids of ``text``, (N,) int64; a ``InputError`` that lists characters without one."""
        ids = self._ids[_codes(text)]
        if ids.min(initial=0) < 0:
            unknown = sorted(set(text) - set(self.characters))
            shown = ", ".join(repr(character) for character in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise InputError(
                f"the model has never seen {shown}{more}; leave such characters out of the prompt"
            )
        return ids

    def decode(self, ids: npt.NDArray[Any]) -> str:
        """The text of ``ids``."""
        return "".join(self.characters[index] for index in ids.tolist())


@dataclass(frozen=True)
class Corpus:
    """A text as ids, split into what is trained on and what is only ever measured.

    Attributes:
        vocabulary: Of the whole text, V characters.
        train: (N,) ids of the first 95 %.
        validation: (M,) ids of the last 5 %.
        digest: SHA-256 of the text, by which ``--resume`` knows it again.
    """

    vocabulary: Vocabulary
    train: Ids
    validation: Ids
    digest: str

    @classmethod
    def of(cls, text: str) -> Corpus:
        """Splits and encodes ``text``."""
        vocabulary = Vocabulary.of(text)
        ids = vocabulary.encode(text)
        cut = len(ids) - len(ids) // VALIDATION_SHARE
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        return cls(vocabulary, ids[:cut], ids[cut:], digest)

    def streams(self, batch: int, window: int) -> tuple[Ids, Ids]:
        """The training text cut into ``batch`` equally long streams that run side by side.

        Step t + 1 of a column goes on where step t stopped, so a model that carries its state from
        one window to the next reads long stretches of text. A text too short for ``batch`` streams
        of a window each gives fewer streams.

        Args:
            batch: B, the streams asked for.
            window: T, the steps of a truncated back-propagation.

        Returns:
            Inputs and targets (the next characters), each (S, B) with S a multiple of T: views.

        Raises:
            InputError: the text is shorter than one window.
        """
        predictions = len(self.train) - 1  # every character but the first is a target once
        if predictions < window or len(self.validation) < 2:
            least = max((window + 1) * VALIDATION_SHARE // (VALIDATION_SHARE - 1) + 1, 40)
            total = len(self.train) + len(self.validation)
            raise InputError(
                f"{total} characters are too few: a window of {window} needs {least}; "
                "give more text or a smaller --window"
            )
        rows = min(batch, predictions // window)
        length = predictions // rows
        steps = length // window * window
        inputs, targets = (
            self.train[first : first + rows * length].reshape(rows, length).T[:steps]
            for first in (0, 1)
        )
        return inputs, targets
