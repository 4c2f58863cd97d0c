"""One run of training: the step, the schedule, and all that is needed to go on later, exactly."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastrnn import _device, nn, optim
from fastrnn._charlm.errors import InputError
from fastrnn._charlm.model import Settings, build, evaluate
from fastrnn._charlm.text import Corpus
from fastrnn.io import read_tensors, write_tensors

__all__ = ["Trainer"]

Array = npt.NDArray[Any]

METADATA = "fastrnn-training"
WARM_UP = 0.05  # share of the steps over which the learning rate rises from 0
CHECK_EVERY = 1000  # steps within an epoch longer than that
POINTS = 75  # of the training curve


@dataclasses.dataclass
class Progress:
    """How far a run has come; JSON-able, and written with every checkpoint.

    Attributes:
        step: Optimiser steps done.
        best: The lowest validation loss so far, in nats a character; None before the first.
        train_seconds: Time spent in steps, over all sessions of the run.
        train: (characters seen, mean training loss since the last point).
        validation: (characters seen, validation loss).
        pending: Sum and number of the training losses since the last point.
    """

    step: int = 0
    best: float | None = None
    train_seconds: float = 0.0
    train: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    pending: tuple[float, int] = (0.0, 0)


class Trainer:
    """Stateful truncated back-propagation over parallel streams of one text, with Adam.

    A window of T steps is back-propagated at a time, and the state at its end is where the next
    window starts, so the forward pass reads on through the text although the gradient is cut.
    Between two calls of ``step`` or ``validate`` the run can be saved, and a run that was saved and
    restored goes on with the same bits as one that never stopped.

    Args:
        settings: What to train and how.
        corpus: On what.
        threads: As everywhere in fastrnn; the results do not depend on it.
        device: Where to train, ``"cpu"`` or ``"cuda"``; losses agree to rounding.
    """

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.settings = settings
        self.corpus = corpus
        self.threads = threads
        self.inputs, self.targets = corpus.streams(settings.batch, settings.window)
        self.rng = np.random.default_rng(settings.seed)
        self.model = build(settings, len(corpus.vocabulary), self.rng).to(device)
        self.optimizer = optim.Adam(self.model, lr=settings.learning_rate)
        self.state: Any = None  # (state of the recurrent layer, None, None) at the window's start
        self.progress = Progress()

    @property
    def epoch_steps(self) -> int:
        """Steps in one pass over the streams."""
        return len(self.inputs) // self.settings.window

    @property
    def total_steps(self) -> int:
        """Steps in the whole run."""
        return self.epoch_steps * self.settings.epochs

    @property
    def step_characters(self) -> int:
        """Characters trained on in one step."""
        return int(self.inputs.shape[1]) * self.settings.window

    @property
    def done(self) -> bool:
        """Whether all steps have been made."""
        return self.progress.step >= self.total_steps

    @property
    def check_due(self) -> bool:
        """Whether to validate and save now: at the end of an epoch, and within long ones."""
        return self.done or self.progress.step % self.epoch_steps % CHECK_EVERY == 0

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to nearly 0 at the last step."""
        share = (step + 1) / (self.total_steps + 1)
        if share < WARM_UP:
            return self.settings.learning_rate * share / WARM_UP
        along = (share - WARM_UP) / (1 - WARM_UP)
        return self.settings.learning_rate * 0.5 * (1 + math.cos(math.pi * along))

    def step(self) -> float:
        """Trains on the next window and returns its loss, nats a character.

        Raises:
            InputError: the gradient is no longer finite; the parameters are as before the step.
        """
        begin = time.perf_counter()
        progress, T = self.progress, self.settings.window
        start = progress.step % self.epoch_steps * T
        if start == 0:
            self.state = None
        # On the device only these go in and only the loss comes out.
        x = _device.move(self.inputs[start : start + T], self.model.device)
        y = self.targets[start : start + T]
        logits, state, tape = self.model.forward(x, self.state, threads=self.threads)
        loss, dlogits = nn.softmax_cross_entropy(logits, y)
        gradients = tape.backward(dlogits)
        self.optimizer.lr = self.learning_rate(progress.step)
        try:
            self.optimizer.step(gradients.params, clip_norm=self.settings.clip)
        except FloatingPointError:
            raise InputError(
                f"training diverged at step {progress.step}: the gradient is not finite; start "
                f"anew with a smaller --lr (it was {self.settings.learning_rate:g})"
            ) from None
        self.state = state
        progress.step += 1
        progress.train_seconds += time.perf_counter() - begin
        self._record(loss)
        return loss

    def _record(self, loss: float) -> None:
        progress = self.progress
        total, count = progress.pending[0] + loss, progress.pending[1] + 1
        if count >= max(1, self.total_steps // POINTS) or self.done:
            progress.train.append((progress.step * self.step_characters, total / count))
            total, count = 0.0, 0
        progress.pending = (total, count)

    def validate(self) -> bool:
        """Measures the validation loss; True if it is the lowest so far."""
        progress = self.progress
        loss = evaluate(self.model, self.corpus.validation, self.threads)
        progress.validation.append((progress.step * self.step_characters, loss))
        better = progress.best is None or loss < progress.best
        if better:
            progress.best = loss
        return better

    def save(self, path: Path) -> None:
        """Writes everything the rest of the run depends on, atomically."""
        tensors = {f"model.{name}": array for name, array in self.model.state_dict().items()}
        for name, value in self.optimizer.state_dict().items():
            tensors[f"optimizer.{name}"] = np.asarray(value)
        for index, array in enumerate(_flatten(self.state)):
            tensors[f"state.{index}"] = _device.move(array, "cpu")
        notes = {
            "format": 1,
            "settings": dataclasses.asdict(self.settings),
            "digest": self.corpus.digest,
            "progress": dataclasses.asdict(self.progress),
            "rng": self.rng.bit_generator.state,
        }
        write_tensors(path, tensors, {METADATA: json.dumps(notes)})

    @classmethod
    def restore(
        cls,
        path: Path,
        corpus: Corpus,
        changes: dict[str, Any],
        threads: int | None = None,
        device: str = "cpu",
    ) -> Trainer:
        """The run that ``save`` wrote.

        Args:
            path: What was given to ``save``.
            corpus: The same text again.
            changes: Settings given anew; only ``epochs`` may differ from the saved ones.
            threads: As in the constructor.
            device: As in the constructor; it may be another one than the run began on.

        Raises:
            InputError: there is nothing to go on with, or text or settings are not those of the
                run.
        """
        try:
            tensors, metadata = read_tensors(path)
            notes = json.loads(metadata[METADATA])
            settings = Settings(**notes["settings"])
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such file, so nothing to resume; leave --resume out"
            ) from None
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); leave --resume out"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"{path}: is damaged or not of fastrnn train; leave --resume out"
            ) from None
        if notes.get("digest") != corpus.digest:
            raise InputError(
                f"{path}: that run was on another text; give the same files or no --resume"
            )
        for name, value in changes.items():
            if name != "epochs" and value != getattr(settings, name):
                raise InputError(
                    f"{path}: that run has {name} = {getattr(settings, name)}, not {value}; "
                    "leave the option or --resume out"
                )
        try:
            settings = dataclasses.replace(settings, epochs=changes.get("epochs", settings.epochs))
            trainer = cls(settings, corpus, threads, device)
            trainer._restore(tensors, notes)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{path}: is damaged or of another version; leave --resume out"
            ) from None
        return trainer

    def _restore(self, tensors: dict[str, Array], notes: dict[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Array]:
            return {
                name.removeprefix(prefix): array
                for name, array in tensors.items()
                if name.startswith(prefix)
            }

        self.model.load_state_dict(part("model."))
        self.optimizer.load_state_dict(part("optimizer."))
        flat = part("state.")
        if flat:
            parts = [flat[str(index)] for index in range(len(flat))]
            parts = [_device.move(array, self.model.device) for array in parts]
            recurrent = tuple(parts) if len(parts) > 1 else parts[0]
            self.state = (recurrent, None, None)
        self.rng.bit_generator.state = notes["rng"]
        progress = Progress(**notes["progress"])
        progress.train = [(int(at), float(loss)) for at, loss in progress.train]
        progress.validation = [(int(at), float(loss)) for at, loss in progress.validation]
        progress.pending = (float(progress.pending[0]), int(progress.pending[1]))
        self.progress = progress


def _flatten(state: Any) -> list[Array]:
    """The arrays of a model's state: h, or h and c; none before the first window."""
    if state is None:
        return []
    recurrent = state[0]
    return list(recurrent) if isinstance(recurrent, tuple) else [recurrent]
