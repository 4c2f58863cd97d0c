"""The verdict of tools/instruction_counts.py; the counting itself is `make counts`."""

from __future__ import annotations

import json

import pytest
from test_tools import load

counts = load("instruction_counts")
HERE = {"compiler": "GCC 1", "python": "3.11"}


def verdict(capsys: pytest.CaptureFixture[str], now: int, **here: str) -> tuple[int, str]:
    """Of one case recorded with a thousand instructions."""
    status = counts.report({**HERE, "counts": {"case": 1000}}, {**HERE, **here}, {"case": now})
    return status, capsys.readouterr().out


@pytest.mark.parametrize("now, status", [(1000, 0), (1029, 0), (971, 0), (1031, 1), (969, 1)])
def test_tolerance(capsys: pytest.CaptureFixture[str], now: int, status: int) -> None:
    got, text = verdict(capsys, now)
    assert got == status
    assert f"{now:,}" in text and ("WRITE=1" in text) == bool(status)


def test_another_compiler_or_python_is_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    for here in ({"compiler": "GCC 2"}, {"python": "3.12"}):
        status, text = verdict(capsys, 2000, **here)
        assert status == 0 and "Not judged" in text and "+100.0%" in text


def test_a_case_without_a_record_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert counts.report({**HERE, "counts": {}}, HERE, {"case": 1}) == 1
    assert "case" in capsys.readouterr().out


def test_the_record_has_every_case() -> None:
    record = json.loads(counts.RECORD.read_text())
    assert list(record["counts"]) == list(counts.CASES)
    assert all(value > 1000 for value in record["counts"].values())
