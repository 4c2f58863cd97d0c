"""Models on disk: round trips, damaged files (hostile cases 57, 59, 61), atomic writing (58)."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastrnn
import numpy as np
import pytest
import safetensors.numpy
from fastrnn import nn
from fastrnn.io import atomic_write, read_metadata, read_tensors, write_tensors

MODELS: dict[str, Callable[[], Any]] = {
    "rnn": lambda: fastrnn.RNN(3, 4, nonlinearity="relu", batch_first=True, rng=0),
    "lstm": lambda: fastrnn.LSTM(3, 4, 2, dropout=0.25, bidirectional=True, rng=0),
    "lstm float64": lambda: fastrnn.LSTM(3, 4, bias=False, dtype="float64", rng=0),
    "gru": lambda: fastrnn.GRU(3, 4, 3, reset_after=False, rng=0),
    "linear": lambda: nn.Linear(3, 2, rng=0),
    "linear without bias": lambda: nn.Linear(3, 2, bias=False, dtype="float64", rng=0),
    "embedding": lambda: nn.Embedding(5, 2, rng=0),
    "dropout": lambda: nn.Dropout(0.125),
    "sequential": lambda: nn.Sequential(
        nn.Embedding(5, 3, rng=0), fastrnn.GRU(3, 4, rng=0), nn.Dropout(0.5), nn.Linear(4, 2, rng=0)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model, path = MODELS[name](), tmp_path / "model.safetensors"
    fastrnn.save(path, model, {"note": "Grüße"})
    again = fastrnn.load(path)
    assert type(again) is type(model)
    assert again.config() == model.config()
    assert list(again.params) == list(model.params)
    for key, array in model.params.items():
        assert again.params[key].dtype == array.dtype
        np.testing.assert_array_equal(again.params[key], array)
    assert read_metadata(path)["note"] == "Grüße"
    assert os.listdir(tmp_path) == [path.name]


def test_a_loaded_model_computes_the_same_bits_and_trains(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    model, path = MODELS["sequential"](), tmp_path / "model.safetensors"
    fastrnn.save(path, model)
    again = fastrnn.load(str(path))
    x = rng.integers(0, 5, (6, 2))
    np.testing.assert_array_equal(model(x)[0], again(x)[0])
    y, _, tape = again.forward(x)
    assert set(tape.backward(np.ones_like(y)).params) == set(again.params)


def test_other_programs_can_read_the_file(tmp_path: Path) -> None:
    layer, path = MODELS["lstm"](), tmp_path / "model.safetensors"
    fastrnn.save(path, layer)
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == set(layer.params)
    np.testing.assert_array_equal(
        tensors["weight_hh_l1_reverse"], layer.params["weight_hh_l1_reverse"]
    )


def test_arrays_of_any_layout_and_byte_order_keep_their_values(tmp_path: Path) -> None:
    arrays = {
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "sliced": np.arange(10)[::-2],
        "big-endian": np.arange(4, dtype=">f4"),
        "scalar": np.array(7, np.uint8),
        "empty": np.zeros((0, 3), np.float16),
        "bool": np.array([True, False]),
    }
    write_tensors(tmp_path / "t", arrays, {})
    again, metadata = read_tensors(tmp_path / "t")
    assert metadata == {}
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)
        assert again[name].shape == array.shape
        assert again[name].dtype.isnative and again[name].flags.writeable


def test_save_refuses_what_load_could_not_rebuild(tmp_path: Path) -> None:
    class Mine(fastrnn.LSTM):
        pass

    for model in (Mine(2, 2), object(), fastrnn.LSTM, MODELS["lstm"]().freeze()):
        with pytest.raises(TypeError, match="model: expected"):
            fastrnn.save(tmp_path / "model", model)
    with pytest.raises(TypeError, match="model: expected"):
        fastrnn.save(tmp_path / "model", nn.Sequential(Mine(2, 2)))
    with pytest.raises(ValueError, match="metadata"):
        fastrnn.save(tmp_path / "model", nn.Linear(1, 1), {"fastrnn": "mine"})
    with pytest.raises(TypeError, match="metadata"):
        fastrnn.save(tmp_path / "model", nn.Linear(1, 1), {"epochs": 3})  # type: ignore[dict-item]
    assert os.listdir(tmp_path) == []


# --- damaged files: 57 ----------------------------------------------------------------------------


def raw(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with whatever is given as its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = b'"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too few"),
    "7 bytes": (b"1234567", "too few"),
    "header past the end": (struct.pack("<Q", 1000) + b"{}", "does not fit"),
    "header over 100 MB": (struct.pack("<Q", 10**9) + b"{}", "does not fit"),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + b"{}", "does not fit"),
    "bad UTF-8": (raw(b'{"\xff": 1}'), "damaged"),
    "no JSON": (raw(b"weights"), "damaged"),
    "deep JSON": (raw(b"[" * 100_000), "damaged"),
    "a list": (raw([]), "not a JSON object"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "metadata"),
    "a tensor that is a number": (raw({"weight": 1}), "weight"),
    "unknown dtype": (raw({"weight": entry([1], 0, 4, "F31")}, b"0000"), "weight.*F31"),
    "dtype without NumPy's like": (raw({"weight": entry([2], 0, 4, "BF16")}, b"0000"), "BF16"),
    "dtype that is a list": (raw({"weight": entry([1], 0, 4, [])}, b"0000"), "weight"),
    "negative size": (raw({"weight": entry([-1], 0, 4)}, b"0000"), "weight"),
    "fractional size": (raw({"weight": entry([1.0], 0, 4)}, b"0000"), "weight"),
    "boolean size": (raw({"weight": entry([True], 0, 4)}, b"0000"), "weight"),
    "33 dimensions": (raw({"weight": entry([1] * 33, 0, 4)}, b"0000"), "weight"),
    "a size that wraps 64 bits": (raw({"weight": entry([2**62, 4], 0, 0)}), "weight"),
    "more than the data": (raw({"weight": entry([3], 0, 12)}, b"0000"), "weight"),
    "shape and bytes disagree": (raw({"weight": entry([2], 0, 4)}, b"0000"), "weight.*8"),
    "offsets backwards": (raw({"weight": entry([1], 4, 0)}, b"0000"), "weight"),
    "three offsets": (
        raw({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"0000"),
        "weight",
    ),
    "overlap": (raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12), "b"),
    "hole": (raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"0" * 12), "b"),
    "trailing bytes": (raw({"a": entry([1], 0, 4)}, b"0" * 12), "not a safetensors file"),
    "a name twice": (raw(b"{" + ONE + b"," + ONE + b"}", b"0000"), "weight.*twice"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_case_57_damaged_files(name: str, tmp_path: Path) -> None:
    content, match = DAMAGED[name]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, fastrnn.load):
        with pytest.raises(ValueError, match=f"(?s)damaged.safetensors.*{match}"):
            read(path)


def test_case_57_every_truncation_and_every_flipped_bit_is_an_error_or_a_number(
    tmp_path: Path,
) -> None:
    """Cut or damaged anywhere, a file is refused, unless only the value of a weight has changed."""
    path = tmp_path / "model.safetensors"
    fastrnn.save(path, nn.Linear(2, 1, rng=0))
    good = path.read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            fastrnn.load(path)
    for place in range(header):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            model = fastrnn.load(path)
        except ValueError as error:
            assert "model.safetensors" in str(error)
        else:  # e.g. another version number in the metadata
            assert model.params["weight"].shape == (1, 2)


# --- files that are safetensors but not ours: 59, 61 ----------------------------------------------


def write_model(path: Path, config: Any, tensors: dict[str, np.ndarray], form: Any = 1) -> None:
    description = {"format": form, "version": "0.1.0", "model": config}
    write_tensors(path, tensors, {"fastrnn": json.dumps(description)})


def test_case_59_everything_that_is_wrong_is_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    layer = fastrnn.LSTM(3, 4, rng=0)
    tensors = layer.state_dict()
    del tensors["bias_hh_l0"]
    tensors["weight_ih_l0"] = tensors["weight_ih_l0"].T.copy()
    tensors["weight_hh_l0"] = tensors["weight_hh_l0"].astype(np.float64)
    tensors["weight_ih_l1"] = np.zeros((16, 4), np.float32)
    write_model(path, {"class": "LSTM", **layer.config()}, tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors") as caught:
        fastrnn.load(path)
    message = str(caught.value)
    assert "missing 'bias_hh_l0'" in message
    assert "unknown 'weight_ih_l1'" in message
    assert "'weight_ih_l0' is float32 (3, 16) instead of float32 (16, 3)" in message
    assert "'weight_hh_l0' is float64 (16, 4) instead of float32 (16, 4)" in message


LINEAR = {"class": "Linear", "in_features": 2, "out_features": 1, "bias": False, "dtype": "float32"}
FOREIGN: dict[str, Any] = {
    "no class": {},
    "a list": [],
    "none": None,
    "a class of somewhere else": {**LINEAR, "class": "os.system"},
    "a class that is a list": {**LINEAR, "class": ["Linear"]},
    "a dunder": {**LINEAR, "class": "__class__"},
    "an unknown option": {**LINEAR, "activation": "relu"},
    "a missing option": {"class": "Linear", "in_features": 2},
    "a size that is a text": {**LINEAR, "in_features": "2"},
    "a boolean size": {**LINEAR, "out_features": True},
    "a huge size": {**LINEAR, "in_features": 2**62},
    "another dtype": {**LINEAR, "dtype": "object"},
    "a million layers": {"class": "LSTM", "input_size": 1, "hidden_size": 1, "num_layers": 10**6},
    "nested": {"class": "Sequential", "modules": [{"class": "Sequential", "modules": [LINEAR]}]},
    "no modules": {"class": "Sequential"},
    "a bad dropout": {"class": "Sequential", "modules": [LINEAR, {"class": "Dropout", "p": 2}]},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_case_61_configurations_are_data(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    prefix = "0." if "Sequential" in str(FOREIGN[name]) else ""
    write_model(path, FOREIGN[name], {f"{prefix}weight": np.zeros((1, 2), np.float32)})
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        fastrnn.load(path)


def test_foreign_metadata(tmp_path: Path) -> None:
    path, tensors = tmp_path / "model.safetensors", {"weight": np.zeros((1, 2), np.float32)}
    write_model(path, LINEAR, tensors)
    assert isinstance(fastrnn.load(path), nn.Linear)
    write_model(path, LINEAR, tensors, form=2)
    with pytest.raises(ValueError, match="format 1"):
        fastrnn.load(path)
    for text in ("", "[]", "1", "{", "[" * 100_000):
        write_tensors(path, tensors, {"fastrnn": text})
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            fastrnn.load(path)
    write_tensors(path, tensors, {"format": "pt"})
    with pytest.raises(ValueError, match=r"fastrnn\.save"):
        fastrnn.load(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fastrnn.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        fastrnn.load(tmp_path)


# --- atomic writing: 58 ---------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_case_58_a_failure_leaves_the_old_file(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    fastrnn.save(path, nn.Linear(2, 1, rng=0))
    before = path.read_bytes()

    def full(*_args: Any) -> Any:
        raise OSError(28, "No space left on device")

    if step == "write":
        real = os.fdopen

        def fdopen(*args: Any) -> Any:
            file = real(*args)
            return _Failing(file, full)

        monkeypatch.setattr(os, "fdopen", fdopen)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        fastrnn.save(path, nn.Linear(3, 3, rng=1))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


class _Failing:
    """A file whose write fails after a part, as on a full disk."""

    def __init__(self, file: Any, fail: Callable[..., Any]) -> None:
        self.file, self.fail = file, fail

    def __enter__(self) -> _Failing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        self.fail()


def test_case_58_a_real_full_disk(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for the full disk: the kernel itself refuses the write."""
    import subprocess
    import sys

    path = tmp_path / "model.safetensors"
    fastrnn.save(path, nn.Linear(2, 1, rng=0))
    before = path.read_bytes()
    code = (
        "import fastrnn, resource, signal, sys\n"
        "from fastrnn import nn\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: fastrnn.save(sys.argv[1], nn.Linear(100, 100))\n"
        "except OSError: sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=60, check=False)
    assert done.returncode == 7
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_permissions_and_links_are_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "real", tmp_path / "link"
    atomic_write(target, b"1")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask
    target.chmod(0o640)
    link.symlink_to(target)
    atomic_write(link, b"2")
    assert link.is_symlink() and target.read_bytes() == b"2"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
