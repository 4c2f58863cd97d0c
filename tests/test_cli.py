"""The command line from end to end: train, stop, resume, sample, info, bench; every error line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fastrnn
import numpy as np
import pytest

pytest.importorskip("click", reason="the command line is an extra: fastrnn[cli]")
pytest.importorskip("rich", reason="the command line is an extra: fastrnn[cli]")
pytest.importorskip("matplotlib", reason="the command line is an extra: fastrnn[cli]")

from click.testing import CliRunner, Result
from fastrnn import cli, nn
from fastrnn._charlm import model as charlm
from fastrnn._charlm import text as charlm_text
from fastrnn._charlm.sample import generate
from fastrnn._charlm.train import Trainer
from fastrnn.io import read_tensors

SMALL = "--hidden 12 --batch 4 --window 16 --epochs 3 --dropout 0.1 --lr 0.02".split()
LAST_LINE = re.compile(r"validation (\d+\.\d{3}) nats/char \((\d+\.\d{3}) bits/char\)")


def make_text(words: int, seed: int = 0) -> str:
    """Sentences of a few words, with characters outside ASCII among them."""
    rng = np.random.default_rng(seed)
    vocabulary = ["the", "cat", "sat", "on", "a", "mat", "and", "sang", "naïve", "Lieder", "–"]
    lines = []
    for start in range(0, words, 9):
        count = min(9, words - start)
        lines.append(" ".join(rng.choice(vocabulary, count)) + ".")
    return "\n".join(lines)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(make_text(500), encoding="utf-8")
    return path


def run(*arguments: object) -> Result:
    """`fastrnn arguments`, in this process."""
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def spawn(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """`fastrnn arguments`, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastrnn.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        **options,
    )


def fails(result: Result, *parts: str) -> None:
    """Status 2, one line on stderr with all of `parts`."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("fastrnn: ")
    for part in parts:
        assert part in lines[0]


# --- the whole way --------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_train_writes_everything_and_ends_with_the_line(
    cell: str, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.safetensors"
    result = run("train", text, "--out", out, "--cell", cell, *SMALL)
    assert result.exit_code == 0, result.output
    names = {"text.txt", "model.safetensors", "model.json", "model.png", "model.state"}
    assert set(os.listdir(tmp_path)) == names

    lines = result.stdout.splitlines()
    found = LAST_LINE.fullmatch(lines[-1])
    assert found
    nats, bits = float(found[1]), float(found[2])
    assert abs(bits - nats / np.log(2)) < 2e-3
    assert sum(line.startswith("epoch ") for line in lines) == 3

    log = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    assert log["finished"] is True
    assert log["settings"]["cell"] == cell
    assert log["versions"]["fastrnn"] == fastrnn.__version__
    assert f"{log['validation_nats_per_char']:.3f}" == found[1]
    assert log["validation_nats_per_char"] == min(loss for _, loss in log["history"]["validation"])
    assert log["characters_seen"] == log["steps"] * 4 * 16 == log["history"]["train"][-1][0]
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    network, vocabulary = charlm.load_model(out)
    corpus = charlm_text.Corpus.of(text.read_text(encoding="utf-8"))
    assert vocabulary.characters == corpus.vocabulary.characters
    assert f"{charlm.evaluate(network, corpus.validation):.3f}" == found[1]


def test_the_sample_at_the_end_has_300_characters(text: Path, tmp_path: Path) -> None:
    result = run("train", text, "--out", tmp_path / "m.safetensors", *SMALL)
    _, _, rest = result.stdout.partition("m.state\n\n")
    sample, _, last = rest.rpartition("\n\nvalidation ")
    assert len(sample) == 300
    assert last


def test_training_learns(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    result = run("train", text, "--out", out, *SMALL, "--hidden", 32, "--epochs", 25)
    found = LAST_LINE.fullmatch(result.stdout.splitlines()[-1])
    assert found
    # Guessing by frequency alone gives 2.8; words and spaces are learned in a second.
    assert float(found[1]) < 1.6


def test_the_same_seed_gives_the_same_bits_on_any_number_of_threads(
    text: Path, tmp_path: Path
) -> None:
    results = []
    for threads in (1, 2):
        out = tmp_path / f"{threads}.safetensors"
        assert run("train", text, "--out", out, *SMALL, "--threads", threads).exit_code == 0
        results.append(read_tensors(out)[0])
    for name, array in results[0].items():
        np.testing.assert_array_equal(array, results[1][name])


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(make_text(300).encode() + name.encode() * 9 + b"\r\n")
    content = charlm_text.read_files([tmp_path / "a", tmp_path / "b"])
    assert content.count("aaaaaaaaa\n\n\n") == 1
    assert content.endswith("bbbbbbbbb\n")
    assert "\r" not in content


def test_without_a_file_it_reads_what_python_carries() -> None:
    content = charlm_text.python_topics()
    assert len(content) > 400_000
    assert len(set(content)) > 90


# --- stopping and going on ------------------------------------------------------------------------


def test_resume_goes_on_with_the_same_bits(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*SMALL, "--layers", 2)
    straight, stopped = tmp_path / "straight.safetensors", tmp_path / "stopped.safetensors"
    assert run("train", text, "--out", straight, *options).exit_code == 0

    real = Trainer.step
    for at in (3, 40):  # within the first epoch, before any checkpoint; and later

        def step(self: Trainer, at: int = at) -> float:
            if self.progress.step == at:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self)

        monkeypatch.setattr(Trainer, "step", step)
        resume = [] if at == 3 else ["--resume"]
        result = run("train", text, "--out", stopped, *options, *resume)
        assert result.exit_code == 130, result.output
        assert "--resume" in result.stderr
        assert isinstance(fastrnn.load(stopped), nn.Sequential)
        log = json.loads(stopped.with_suffix(".json").read_text(encoding="utf-8"))
        assert log["finished"] is False
        assert log["steps"] == at + 1
    monkeypatch.setattr(Trainer, "step", real)
    result = run("train", text, "--out", stopped, "--resume")
    assert result.exit_code == 0, result.output

    for suffix in (".safetensors", ".state"):
        one = read_tensors(straight.with_suffix(suffix))[0]
        two = read_tensors(stopped.with_suffix(suffix))[0]
        assert one.keys() == two.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, two[name], err_msg=name)
    logs = [
        json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        for path in (straight, stopped)
    ]
    assert logs[0]["history"] == logs[1]["history"]


def test_resume_can_add_epochs_and_a_finished_run_stays_finished(
    text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.safetensors"
    first = run("train", text, "--out", out, *SMALL)
    again = run("train", text, "--out", out, "--resume")
    assert again.exit_code == 0
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    more = run("train", text, "--out", out, "--resume", "--epochs", 5)
    assert more.exit_code == 0
    log = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert len(log["history"]["validation"]) == 5


def test_case_47_ctrl_c_saves_and_exits_with_130(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "model.safetensors"
    text.write_text(make_text(3000), encoding="utf-8")
    process = spawn("train", text, "--out", out, "--hidden", 64, "--epochs", 10_000)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch "):
        assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - begin < 20  # the picture takes most of it
    assert len(errors.splitlines()) == 1
    expected = {"text.txt", "model.safetensors", "model.json", "model.png", "model.state"}
    assert set(os.listdir(tmp_path)) == expected
    assert run("sample", out, "--length", 5).exit_code == 0


def test_a_killed_run_leaves_whole_files(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "model.safetensors"
    text.write_text(make_text(3000), encoding="utf-8")
    process = spawn("train", text, "--out", out, "--hidden", 64, "--epochs", 10_000)
    assert process.stdout is not None
    for _ in range(3):
        while not process.stdout.readline().startswith("epoch "):
            assert process.poll() is None
    process.kill()
    process.communicate(timeout=60)
    assert isinstance(fastrnn.load(out), nn.Sequential)
    read_tensors(out.with_suffix(".state"))
    json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


# --- sample ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(make_text(500), encoding="utf-8")
    out = folder / "model.safetensors"
    assert run("train", folder / "text.txt", "--out", out, *SMALL).exit_code == 0
    return out


def test_sample(trained: Path) -> None:
    arguments = ("sample", trained, "--prompt", "the naïve", "--length", 50, "--seed", 3)
    result = run(*arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith("the naïve")
    assert len(result.stdout) == len("the naïve") + 50 + 1
    assert run(*arguments).stdout == result.stdout
    assert run(*arguments[:-1], 4).stdout != result.stdout
    assert run("sample", trained, "--length", 0).stdout == "\n"


def test_sample_follows_the_model(trained: Path) -> None:
    """Temperature 0 takes the argmax of what the whole-sequence forward pass says."""
    network, vocabulary = charlm.load_model(trained)
    rng = np.random.default_rng(0)
    drawn = "".join(generate(network, vocabulary, "the", 20, 0, rng))
    ids = vocabulary.encode("the" + drawn)
    logits, _ = network(ids[:-1, None])
    assert vocabulary.decode(logits[2:, 0].argmax(axis=1)) == drawn


def test_sample_draws_with_the_models_probabilities(trained: Path) -> None:
    network, vocabulary = charlm.load_model(trained)
    logits, _ = network(vocabulary.encode("the")[:, None])
    weights = np.exp(logits[-1, 0].astype(float) / 0.8)
    rng = np.random.default_rng(0)
    drawn = [next(generate(network, vocabulary, "the", 1, 0.8, rng)) for _ in range(500)]
    counts = [drawn.count(character) for character in vocabulary.characters]
    np.testing.assert_allclose(np.array(counts) / 500, weights / weights.sum(), atol=0.08)


def test_sample_of_a_tiny_temperature_is_finite(trained: Path) -> None:
    greedy = run("sample", trained, "--temperature", 0, "--length", 30)
    assert run("sample", trained, "--temperature", 1e-300, "--length", 30).stdout == greedy.stdout


def test_sample_into_a_closed_pipe(trained: Path) -> None:
    process = spawn("sample", trained, "--length", 100_000)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


# --- input that cannot work -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", "not UTF-8"),
        (b"text\0" * 100, "binary"),
        (b"too short", "give more text"),
    ],
)
def test_texts_that_cannot_work(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    fails(run("train", path, "--out", tmp_path / "m.safetensors"), says)
    assert os.listdir(tmp_path) == ["text"]


def test_a_short_text_gets_fewer_streams_and_a_shorter_one_an_error(tmp_path: Path) -> None:
    path, out = tmp_path / "text", tmp_path / "m.safetensors"
    path.write_text("ab" * 45)
    assert run("train", path, "--out", out, *SMALL, "--window", 64).exit_code == 0
    fails(run("train", path, "--out", out, *SMALL, "--window", 86), "--window")
    assert run("train", path, "--out", out, *SMALL, "--window", 85).exit_code == 0
    message = run("train", path, "--out", out, *SMALL, "--window", 200).stderr
    least = int(re.findall(r"needs (\d+)", message)[0])
    path.write_text("a" * least)
    assert run("train", path, "--out", out, *SMALL, "--window", 200).exit_code == 0


def test_files_that_are_not_there(tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    fails(run("train", tmp_path / "none", "--out", out), "none", "no such file")
    fails(run("train", tmp_path, "--out", out), "folder")
    fails(run("sample", tmp_path / "none"), "no such file")
    fails(run("sample", tmp_path), "folder")
    assert os.listdir(tmp_path) == []


def test_outputs_that_cannot_be_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(run("train", text, "--out", tmp_path / "no" / "m.safetensors"), "no folder")
    fails(run("train", text, "--out", tmp_path / "model.pt"), ".safetensors")
    (tmp_path / "m.png").mkdir()
    fails(run("train", text, "--out", tmp_path / "m.safetensors"), "m.png")
    (tmp_path / "notes.json").write_bytes(text.read_bytes())
    clash = run("train", tmp_path / "notes.json", "--out", tmp_path / "notes.safetensors")
    fails(clash, "overwrite")
    assert (tmp_path / "notes.json").read_bytes() == text.read_bytes()
    fails(run("train", text, "--out", "/proc/m.safetensors"), "/proc")

    def refuse(self: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    fails(run("train", text, "--out", tmp_path / "x.safetensors"), "Permission denied")
    assert set(os.listdir(tmp_path)) == {"text.txt", "m.png", "notes.json"}


def test_models_that_are_not_ours(tmp_path: Path, trained: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"PK\x03\x04 something else altogether")
    fails(run("sample", path), "not a safetensors file", "fastrnn train")
    fastrnn.save(path, nn.Linear(2, 2))
    fails(run("sample", path), "no character model")
    fastrnn.save(path, nn.Linear(2, 2), {charlm.METADATA: '{"vocabulary": "ab"}'})
    fails(run("sample", path), "model.safetensors")
    network, vocabulary = charlm.load_model(trained)
    for wrong in ({"vocabulary": vocabulary.characters[1:]}, {"vocabulary": 3}, [], {}):
        fastrnn.save(path, network, {charlm.METADATA: json.dumps(wrong)})
        fails(run("sample", path), "fastrnn train")
    path.write_bytes(trained.read_bytes()[:-1])
    fails(run("sample", path), "not a safetensors file")


def test_prompts_and_numbers_that_cannot_work(trained: Path) -> None:
    fails(run("sample", trained, "--prompt", "the Ω"), "'Ω'", "prompt")
    fails(run("sample", trained, "--prompt", "ΑΒΓΔΕΖΗΘ"), "and 3 more")
    for value in ("-1", "nan", "inf", "warm"):
        fails(run("sample", trained, "--temperature", value), "--temperature")
    fails(run("sample", trained, "--length", "-1"), "--length")
    fails(run("sample", trained, "--seed", "-1"), "--seed")


@pytest.mark.parametrize(
    "option",
    [
        "--hidden 0",
        "--hidden 99999999999999999999",
        "--layers 0",
        "--dropout 1",
        "--dropout nan",
        "--epochs 0",
        "--batch -3",
        "--window 0",
        "--lr 0",
        "--lr nan",
        "--clip inf",
        "--seed -1",
        "--threads 0",
        "--cell transformer",
        "--nonsense",
    ],
)
def test_options_that_cannot_work(option: str, text: Path, tmp_path: Path) -> None:
    result = run("train", text, "--out", tmp_path / "m.safetensors", *option.split())
    fails(result, option.split()[0], "--help")
    assert os.listdir(tmp_path) == ["text.txt"]


def test_unknown_commands() -> None:
    fails(run("fly"), "fly", "--help")
    assert run("--help").exit_code == 0
    assert run("train", "--help").exit_code == 0
    assert fastrnn.__version__ in run("--version").stdout


def test_a_run_that_diverges_says_so_and_keeps_the_last_model(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    fails(run("train", text, "--out", out, *SMALL, "--lr", "1e38"), "diverged", "--lr")
    for name in set(os.listdir(tmp_path)) & {"model.safetensors", "model.state"}:
        read_tensors(tmp_path / name)


def test_a_full_disk_is_one_line(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run("train", text, "--out", tmp_path / "m.safetensors", *SMALL)
    fails(result, "No space left on device")
    assert os.listdir(tmp_path) == ["text.txt"]


def test_resume_needs_the_run_it_resumes(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    fails(run("train", text, "--out", out, "--resume"), "nothing to resume")
    assert run("train", text, "--out", out, *SMALL).exit_code == 0
    fails(run("train", text, "--out", out, "--resume", "--hidden", 13), "hidden = 12, not 13")
    same = run("train", text, "--out", out, "--resume", *SMALL)
    assert same.exit_code == 0, same.output
    other = tmp_path / "other.txt"
    other.write_text(make_text(500, seed=1), encoding="utf-8")
    fails(run("train", other, "--out", out, "--resume"), "another text")
    state = out.with_suffix(".state")
    good = state.read_bytes()
    for bad in (b"", good[:-1], b"x" * 100, out.read_bytes()):
        state.write_bytes(bad)
        fails(run("train", text, "--out", out, "--resume"), "damaged")


# --- info, bench, and no extra --------------------------------------------------------------------


def test_info() -> None:
    process = spawn("info")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert fastrnn.__version__ in output


def test_bench() -> None:
    # NumPy's BLAS gets one thread: its own wait for each other, and on a busy machine for long.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    process = spawn("bench", "--seconds", 0.05, env=environment)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for word in ("LSTM", "GRU", "GF/s", "NumPy", "characters/s", "µs/step"):
        assert word in output


@pytest.mark.parametrize("missing", ["click", "rich", "matplotlib"])
def test_without_the_extra_one_line_says_how_to_get_it(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import fastrnn.cli"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert 'pip install "fastrnn[cli]"' in done.stderr


def test_streams_are_the_text_side_by_side() -> None:
    corpus = charlm_text.Corpus.of(make_text(400))
    inputs, targets = corpus.streams(3, 20)
    decode = corpus.vocabulary.decode
    content = decode(corpus.train)
    assert len(inputs) % 20 == 0 and len(inputs) > len(content) // 3 - 21
    for row in range(3):
        start = row * ((len(content) - 1) // 3)
        assert decode(inputs[:, row]) == content[start : start + len(inputs)]
        assert decode(targets[:, row]) == content[start + 1 : start + 1 + len(inputs)]
