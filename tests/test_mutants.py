"""The list of mutants fits the source; `make mutants` does the rest."""

from __future__ import annotations

import pytest

from tools import mutants


def test_every_mutant_fits() -> None:
    found = mutants.mutants()
    assert len(found) == sum(map(len, mutants.MUTANTS.values()))
    for mutant in found:
        source = (mutants.ROOT / "csrc" / mutant.file).read_text()
        assert mutant.text != source, f"{mutant.file}: {mutant.fault} changes nothing"
    assert len({(m.file, m.text) for m in found}) == len(found), "two mutants are the same"


@pytest.mark.parametrize(
    ("piece", "times"), [("no such ⟨text → thing⟩", "0"), ("⟨template → type⟩", r"\d+")]
)
def test_a_mutant_that_does_not_fit(
    piece: str, times: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutants, "MUTANTS", {"cells/rnn.h": [("a fault", piece)]})
    with pytest.raises(SystemExit, match=rf"cells/rnn\.h: {times} times instead of once"):
        mutants.mutants()
