"""A run on the command line: progress, checkpoints, Ctrl-C, the log and the picture."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import rich.console
import rich.progress

from fastrnn._charlm.errors import InputError
from fastrnn._charlm.model import save_model
from fastrnn._charlm.plot import loss_curve
from fastrnn._charlm.train import Trainer
from fastrnn.io import atomic_write

__all__ = ["Outputs", "nats_and_bits", "run"]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The files of a run: the model, and three beside it that share its name.

    Attributes:
        model: The best model so far, ``*.safetensors``.
        state: What ``--resume`` goes on from.
        log: Settings, versions, history and figures, JSON.
        plot: The loss curves, PNG.
    """

    model: Path
    state: Path
    log: Path
    plot: Path

    @classmethod
    def beside(cls, model: Path, inputs: tuple[Path, ...]) -> Outputs:
        """The files for ``--out model``, once it is certain that they can be written.

        Raises:
            InputError: the name is unfit, the folder or a file cannot be written, or one of the
                files is an input.
        """
        if model.suffix != ".safetensors":
            raise InputError(f"--out {model}: give a name that ends in .safetensors")
        files = cls(
            *(model.with_suffix(end) for end in (".safetensors", ".state", ".json", ".png"))
        )
        for path in dataclasses.astuple(files):
            if path.is_dir():
                raise InputError(f"--out {model}: {path} is a folder; choose another name")
            if path.exists() and not os.access(path, os.W_OK):
                raise InputError(f"--out {model}: {path} is write-protected; choose another name")
            for source in inputs:
                if path.exists() and source.exists() and path.samefile(source):
                    raise InputError(
                        f"--out {model}: would overwrite {source}; choose another name"
                    )
        # Whether a file can be made there is known only once one has been.
        probe = model.with_name(f".{model.name[:200]}.{os.getpid()}.probe")
        try:
            probe.touch(exist_ok=False)
            probe.unlink()
        except FileNotFoundError:
            raise InputError(
                f"--out {model}: there is no folder {model.parent}; make it first"
            ) from None
        except OSError as error:
            raise InputError(
                f"--out {model}: cannot be written ({error.strerror}); choose another place"
            ) from None
        return files


def nats_and_bits(loss: float) -> str:
    """1.084 → "1.084 nats/char (1.564 bits/char)"."""
    return f"{loss:.3f} nats/char ({loss / math.log(2):.3f} bits/char)"


def run(
    trainer: Trainer, outputs: Outputs, source: dict[str, Any], console: rich.console.Console
) -> bool:
    """Trains to the end, or until Ctrl-C; True if it came to the end.

    Whenever the validation loss has been measured, and at the end, the files are brought up to date
    and the model is replaced if it has improved; each file is replaced whole. The first Ctrl-C
    lets the step in progress finish and saves; a second one stops at once.

    Args:
        trainer: A new or restored run.
        outputs: Where to.
        source: What the log says about the text.
        console: Where to report.
    """
    progress = trainer.progress
    if not outputs.model.exists():
        progress.best = None  # a resumed run whose model is gone makes a new one
    clock = _Clock(trainer)

    def check() -> None:
        if trainer.validate():
            save_model(outputs.model, trainer.model, trainer.corpus.vocabulary)
        trainer.save(outputs.state)
        _write_log(trainer, outputs, source)

    if trainer.done and progress.best is None:
        check()
    with _stop_on_interrupt() as stop, _bar(console) as bar:
        task = bar.add_task("", total=trainer.total_steps, completed=progress.step, **clock.fields)
        while not trainer.done and not stop.is_set():
            clock.add(trainer.step())
            bar.update(task, completed=progress.step, **clock.fields)
            if trainer.check_due:
                check()
                bar.console.print(clock.line(), highlight=False)
        if not trainer.done:
            if progress.best is None:  # stopped before the first check: the model as it is
                save_model(outputs.model, trainer.model, trainer.corpus.vocabulary)
            trainer.save(outputs.state)
            _write_log(trainer, outputs, source)
    _write_plot(trainer, outputs, source)
    return trainer.done


class _Clock:
    """Smoothed figures for the progress bar."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.loss: float | None = None
        self.first_step = trainer.progress.step
        self.first_seconds = trainer.progress.train_seconds

    def add(self, loss: float) -> None:
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss

    @property
    def speed(self) -> float:
        """Characters a second in this session."""
        progress = self.trainer.progress
        seconds = progress.train_seconds - self.first_seconds
        steps = progress.step - self.first_step
        return steps * self.trainer.step_characters / seconds if seconds else 0.0

    @property
    def fields(self) -> dict[str, Any]:
        trainer = self.trainer
        epoch = trainer.progress.step / trainer.epoch_steps
        return {
            "epoch": f"epoch {min(math.floor(epoch) + 1, trainer.settings.epochs)}"
            f"/{trainer.settings.epochs}",
            "loss": "" if self.loss is None else f"{self.loss:.3f} nats/char",
            "speed": f"{self.speed:,.0f} characters/s" if self.speed else "",
        }

    def line(self) -> str:
        """What one check found."""
        trainer, progress = self.trainer, self.trainer.progress
        epoch = progress.step / trainer.epoch_steps
        since = progress.validation[-2][0] if len(progress.validation) > 1 else 0
        recent = [loss for characters, loss in progress.train if characters > since]
        train = sum(recent) / len(recent) if recent else self.loss
        return (
            f"epoch {epoch:4.3g}/{trainer.settings.epochs}  train {train:.3f}  "
            f"validation {progress.validation[-1][1]:.3f} nats/char  {self.speed:,.0f} characters/s"
        )


def _bar(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.fields[epoch]}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[loss]}"),
        rich.progress.TextColumn("{task.fields[speed]}"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # a log file gets the lines only
    )


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one raises KeyboardInterrupt as ever.

    Parameters, optimiser, state and generator change together, once a step. An exception in the
    middle would leave some of them old and some new, and resuming would not be exact.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are not ours to handle there
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def _write_log(trainer: Trainer, outputs: Outputs, source: dict[str, Any]) -> None:
    from fastrnn import __version__

    progress = trainer.progress
    seconds = progress.train_seconds
    characters = progress.step * trainer.step_characters
    best = progress.best
    log = {
        "settings": dataclasses.asdict(trainer.settings),
        "text": source,
        "versions": {
            "fastrnn": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": platform.machine(),
        "device": trainer.model.device,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "finished": trainer.done,
        "parameters": int(trainer.model.flat.size),
        "steps": progress.step,
        "characters_seen": characters,
        "train_seconds": round(seconds, 3),
        "characters_per_second": round(characters / seconds) if seconds else None,
        "validation_nats_per_char": best,
        "validation_bits_per_char": None if best is None else best / math.log(2),
        "history": {"train": progress.train, "validation": progress.validation},
    }
    atomic_write(outputs.log, (json.dumps(log, indent=2) + "\n").encode("utf-8"))


def _write_plot(trainer: Trainer, outputs: Outputs, source: dict[str, Any]) -> None:
    settings = trainer.settings
    depth = f"{settings.layers}×" if settings.layers > 1 else ""
    title = (
        f"{settings.cell.upper()} {depth}{settings.hidden} on {source['characters']:,} characters"
    )
    data = loss_curve(trainer.progress.train, trainer.progress.validation, title)
    atomic_write(outputs.plot, data)
