"""The examples run, and end where they say they end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def output() -> str:
    """What examples/sentiment.py prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "sentiment.py"],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sentiment_learns_all_and_generalises(output: str) -> None:
    epochs = re.findall(r"epoch (\d+) .*?accuracy +(\d+)% .*?accuracy +(\d+)%", output)
    assert [int(epoch) for epoch, _, _ in epochs] == [100, 200, 300, 400]
    assert epochs[-1][1:] == ("100", "100")


def test_sentiment_checks_its_gradient(output: str) -> None:
    found = re.search(r"gradients: (\S+) from finite differences, (\S+) from the loops", output)
    assert found
    assert float(found[1]) < 1e-8
    assert float(found[2]) < 1e-12


def test_sentiment_answers(output: str) -> None:
    assert '"i am not very good right now" → negative' in output


def test_sentiment_data() -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import sentiment
    finally:
        sys.path.remove(str(EXAMPLES))
    import numpy as np

    data = dict(sentiment.sentences())
    assert len(sentiment.VOCABULARY) == len(set(sentiment.VOCABULARY)) == 18
    assert {word for sentence in data for word in sentence.split()} == set(sentiment.VOCABULARY)
    assert data["i am not very good right now"] is False
    train, test = sentiment.make_data(np.random.default_rng(0))
    assert (len(train), len(test)) == (58, 20)
    assert not {tuple(words) for words, _ in train} & {tuple(words) for words, _ in test}
