"""The command line: train a character model, write text with it, see what the machine does.

Every command is a few lines here; the work is in ``fastrnn._charlm``. Input that cannot work ends
with one line that says what to do and status 2; Ctrl-C ends with status 130.
"""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    import click
    import rich.console

    if find_spec("matplotlib") is None:  # now rather than after an hour of training
        raise ModuleNotFoundError(name="matplotlib")
except ImportError as _error:
    print(
        f'the fastrnn command needs {_error.name}: pip install "fastrnn[cli]"',
        file=sys.stderr,
    )
    sys.exit(2)

import numpy as np
from click.core import ParameterSource

import fastrnn
from fastrnn import _device
from fastrnn._charlm import text
from fastrnn._charlm.bench import table
from fastrnn._charlm.errors import InputError
from fastrnn._charlm.model import CELLS, LEARNING_RATES, Settings, load_model
from fastrnn._charlm.run import Outputs, nats_and_bits, run
from fastrnn._charlm.sample import generate
from fastrnn._charlm.train import Trainer

__all__ = ["main"]

DEFAULTS = Settings()
SAMPLE = 300  # characters at the end of `fastrnn train`, the prompt's included


class _Program(click.Group):
    """A command group whose every error is one line on stderr."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Runs the program and exits: 0, 2 for input that cannot work, 130 for Ctrl-C."""
        options["standalone_mode"] = False
        try:
            if hasattr(sys.stdout, "reconfigure"):
                # A character that the terminal cannot show becomes a question mark, not a crash.
                sys.stdout.reconfigure(errors="replace")
            status = super().main(*args, **options)
        except click.exceptions.Exit as stop:
            status = stop.exit_code
        except (click.Abort, KeyboardInterrupt):
            status = _fail("stopped", 130)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "fastrnn"
            status = _fail(f"{error.format_message()} (see {where} --help)", 2)
        except InputError as error:
            status = _fail(str(error), 2)
        except BrokenPipeError:  # `fastrnn sample … | head` has seen enough
            sys.stderr.close()  # or the interpreter complains when it flushes at exit
            status = 1
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            status = _fail(f"{place}{error.strerror or error}; see to that and start again", 2)
        except MemoryError:
            status = _fail("not enough memory; choose a smaller --hidden, --batch or --window", 2)
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> int:
    print(f"fastrnn: {' '.join(message.split())}", file=sys.stderr)
    return status


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fastrnn.__version__, prog_name="fastrnn")
def main() -> None:
    """Recurrent networks at the machine's limit: a character language model in a minute."""


def _count(largest: int) -> click.IntRange:
    """The type of an option that counts something; beyond ``largest`` no machine gets."""
    return click.IntRange(1, largest)


class _Number(click.FloatRange):
    """A number in a range; click's own lets "nan" through, which no comparison rejects."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


@main.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("model.safetensors"),
    show_default=True,
    help="The model; .json (log), .png (loss curve) and .state (for --resume) go beside it.",
)
@click.option("--cell", type=click.Choice(CELLS), default=DEFAULTS.cell, show_default=True)
@click.option(
    "--hidden", type=_count(65536), default=DEFAULTS.hidden, show_default=True, help="Units H."
)
@click.option("--layers", type=_count(64), default=DEFAULTS.layers, show_default=True)
@click.option(
    "--dropout",
    type=_Number(0, 1, max_open=True),
    default=DEFAULTS.dropout,
    show_default=True,
    help="Share of outputs dropped after each layer.",
)
@click.option(
    "--epochs",
    type=_count(10**6),
    default=DEFAULTS.epochs,
    show_default=True,
    help="Passes over the text: the budget.",
)
@click.option(
    "--batch",
    type=_count(65536),
    default=DEFAULTS.batch,
    show_default=True,
    help="Parallel streams B.",
)
@click.option(
    "--window",
    type=_count(10**6),
    default=DEFAULTS.window,
    show_default=True,
    help="Steps T that the gradient goes back.",
)
@click.option(
    "--lr",
    "learning_rate",
    type=_Number(0, min_open=True),
    help="Learning rate of Adam at its highest.  [default: "
    + ", ".join(f"{cell} {rate:g}" for cell, rate in LEARNING_RATES.items())
    + "]",
)
@click.option(
    "--clip",
    type=_Number(0, min_open=True),
    default=DEFAULTS.clip,
    show_default=True,
    help="Largest norm of a gradient.",
)
@click.option("--seed", type=click.IntRange(min=0), default=DEFAULTS.seed, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@click.option(
    "--device",
    type=click.Choice(_device.DEVICES),
    default="cpu",
    show_default=True,
    help="Where to train: the processor, or an NVIDIA GPU.",
)
@click.option("--resume", is_flag=True, help="Go on with the run that was stopped, exactly.")
@click.pass_context
def train(
    context: click.Context,
    /,
    files: tuple[Path, ...],
    out: Path,
    threads: int | None,
    device: str,
    resume: bool,
    **options: Any,
) -> None:
    """Train a character language model on text files, or on Python's own documentation.

    Ctrl-C saves; the same command with --resume goes on from there.
    """
    try:
        _device.kernels(device)
    except (RuntimeError, ValueError) as error:
        why = str(error).removeprefix("device: expected 'cpu', got 'cuda', and ")
        raise InputError(f"--device {device}: {why}") from None
    outputs = Outputs.beside(out, files)
    content = text.read_files(files) if files else text.python_topics()
    corpus = text.Corpus.of(content)
    if resume:
        given = {
            name: value
            for name, value in options.items()
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT
        }
        trainer = Trainer.restore(outputs.state, corpus, given, threads, device)
    else:
        options["learning_rate"] = options["learning_rate"] or LEARNING_RATES[options["cell"]]
        trainer = Trainer(Settings(**options), corpus, threads, device)
    settings = trainer.settings

    console = rich.console.Console(soft_wrap=True)
    source: dict[str, Any] = {
        "files": [str(path) for path in files] or ["pydoc_data.topics"],
        "characters": len(content),
        "distinct": len(corpus.vocabulary),
        "sha256": corpus.digest,
    }
    console.print(
        f"{settings.cell.upper()} {settings.hidden}, {trainer.model.flat.size:,} parameters, on "
        f"{len(content):,} characters ({len(corpus.vocabulary)} distinct) of "
        f"{', '.join(source['files'])}",
        highlight=False,
        markup=False,
    )
    if not run(trainer, outputs, source, console):
        print(
            f"fastrnn: stopped at step {trainer.progress.step} of {trainer.total_steps} and saved; "
            "the same command with --resume goes on",
            file=sys.stderr,
        )
        context.exit(130)

    _report(trainer, outputs)


def _report(trainer: Trainer, outputs: Outputs) -> None:
    """How long it took and where things are, a sample of the best model, and its loss."""
    progress = trainer.progress
    speed = progress.step * trainer.step_characters / progress.train_seconds
    click.echo(
        f"{progress.train_seconds:.1f} s of training, {speed:,.0f} characters/s; "
        f"wrote {outputs.model}, {outputs.plot.name}, {outputs.log.name}, {outputs.state.name}\n"
    )
    model, vocabulary = load_model(outputs.model)
    rng = np.random.default_rng(trainer.settings.seed)
    prompt = "The " if set("The ") <= set(vocabulary.characters) else ""
    sample = "".join(generate(model, vocabulary, prompt, SAMPLE - len(prompt), 0.7, rng))
    click.echo(f"{prompt}{sample}\n")
    assert progress.best is not None  # the last step is always validated
    click.echo(f"validation {nats_and_bits(progress.best)}")


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="What to go on from.  [default: the start of a line]")
@click.option("--length", type=click.IntRange(min=0), default=300, show_default=True)
@click.option(
    "--temperature",
    type=_Number(0),
    default=0.7,
    show_default=True,
    help="Below 1 likelier, above 1 bolder, 0 always the likeliest.",
)
@click.option("--seed", type=click.IntRange(min=0), help="The same text every time.")
def sample(model: Path, prompt: str, length: int, temperature: float, seed: int | None) -> None:
    """Write text with a model that `fastrnn train` made, character by character."""
    network, vocabulary = load_model(model)
    rng = np.random.default_rng(seed)
    characters = generate(network, vocabulary, prompt, length, temperature, rng)
    click.echo(prompt, nl=False)
    for character in characters:
        click.echo(character, nl=False)
    click.echo()


@main.command()
def info() -> None:
    """Show what this build uses here: instruction set, threads, CUDA, versions."""
    fastrnn.show_config()


@main.command()
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@click.option(
    "--seconds",
    type=_Number(0.05, 60),
    default=0.5,
    show_default=True,
    help="Time for each measurement.",
)
def bench(threads: int | None, seconds: float) -> None:
    """Measure LSTM and GRU here and compare with the same in NumPy; about ten seconds."""
    table(rich.console.Console(), threads, seconds)


if __name__ == "__main__":
    main()
