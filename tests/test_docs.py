"""The documentation runs, its links lead somewhere, and it mentions whatever is public.

Of every page, all Python blocks run in order in one namespace. A block of text right after a Python
block is what that block prints.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import fastrnn
import pytest
from fastrnn import functional, nn, optim

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + DOCS
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

# Paths that are made by a run and may not be there yet.
MADE = ("benchmarks/results",)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(
    r"`((?:csrc|python|tests|tools|cmake|docs|examples|benchmarks|\.ci)/[\w./*{},-]*)`"
)


def blocks(text: str) -> Iterator[tuple[int, str, str | None]]:
    """Of each Python block: its first line's number, its code, what it prints (None: not said)."""
    found = list(FENCE.finditer(text))
    for i, match in enumerate(found):
        if match[1] != "python":
            continue
        after = found[i + 1] if i + 1 < len(found) else None
        prints = after and after[1] == "text" and not text[match.end() : after.start()].strip()
        yield text.count("\n", 0, match.start()) + 2, match[2], after[2] if prints else None


def prose(text: str) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """The names under which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "cuda.md" and fastrnn.show_config("dict")["cuda"] == "not in this build":
        pytest.skip("this build has neither CUDA nor its emulator")
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "docs"}
    for line, code, prints in blocks(text):
        out = io.StringIO()
        with redirect_stdout(out):  # the line numbers of a traceback are those of the page
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
        if prints is not None:
            assert out.getvalue() == prints, f"{page.name}, line {line}"


def test_there_is_code_to_run() -> None:
    for name, least in (("README.md", 1), ("docs/tutorials.md", 12)):
        assert len(list(blocks((ROOT / name).read_text(encoding="utf-8")))) >= least


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere_in_this_repository(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "://" not in text, "a link that leaves the repository"
    for target in LINK.findall(prose(text)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT) and file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in PATH.findall(page.read_text(encoding="utf-8")):
        if name.startswith(MADE):
            continue
        brace = re.fullmatch(r"(.*)\{(.*)\}(.*)", name)
        names = [brace[1] + part + brace[3] for part in brace[2].split(",")] if brace else [name]
        for each in names:
            assert list(ROOT.glob(each.rstrip("/"))), f"{page.name} names {each}"


def test_every_page_is_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall(text)}
    assert set(PAGES[1:]) <= linked


def test_every_public_name_is_mentioned() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in [PAGES[0], *DOCS])
    names = {f"fastrnn.{name}" for name in fastrnn.__all__}
    names |= {f"nn.{name}" for name in nn.__all__} | {f"optim.{name}" for name in optim.__all__}
    names |= {f"io.{name}" for name in fastrnn.io.__all__}
    names |= {f"functional.{name}" for name in functional.__all__}
    missing = [name for name in sorted(names) if not re.search(rf"\b{re.escape(name)}\b", text)]
    assert not missing


def test_every_command_and_option_is_mentioned() -> None:
    from fastrnn.cli import main

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in main.commands.items():
        section = re.search(rf"^## `fastrnn {name}\b.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section, f"no section on fastrnn {name}"
        for option in command.params:
            for flag in option.opts:
                if flag.startswith("--"):
                    assert f"`{flag}" in section[0], f"fastrnn {name} {flag}"


def test_the_hostile_cases_are_those_that_are_tested() -> None:
    """The numbers in the names of the tests are those of docs/robustness.md."""
    rows = re.findall(
        r"^\| (\d[\d, ]*) \|", (ROOT / "docs/robustness.md").read_text(encoding="utf-8"), re.M
    )
    documented = {int(number) for row in rows for number in row.split(",")}
    tested = {48}  # in tests/cpp/test_threads.cc
    for path in (ROOT / "tests").glob("test_*.py"):
        names = re.findall(
            r"^def test_(?:cases?_)?(\d+(?:_\d+)*)_", path.read_text(encoding="utf-8"), re.M
        )
        tested |= {int(number) for name in names for number in name.split("_")}
    assert documented == tested


# --- tools/quote_benchmarks.py --------------------------------------------------------------------

RESULTS = """\
# fastrnn's benchmarks, 2001-02-03

- date: 2001-02-03 04:05 UTC
- processor: A Chip
- threads: 2
- compared: fastrnn 0.1.0, NumPy 9.9

The machine was not idle.

![roofline](picture.png)

## Training: all of it

| | fastrnn | threads | speed-up | GF/s | of peak | of read limit | × NumPy |
| --- | --: | --: | --: | --: | --: | --: | --: |
| LSTM T=4 | 1.00 ms | 2 | 1.90 | 99 | 80 % | | 7.5 |

## In short

| | cases | geometric mean | least |
| --- | --: | --: | --: |
| training, × NumPy | 1 | 7.5 | 7.5 (LSTM T=4) |

## How to read this

With care.
"""


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quote", ROOT / "tools" / "quote_benchmarks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path, tool: ModuleType) -> Path:
    """A tree with both pages, their markers empty, and two pages of results."""
    for name in ("README.md", "docs/performance.md"):
        page = tmp_path / name
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"before\n{tool.BEGIN}\nold\n{tool.END}\nafter\n", encoding="utf-8")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "z-old.md").write_text(RESULTS.replace("2001", "1999"), encoding="utf-8")
    (results / "a-new.md").write_text(RESULTS, encoding="utf-8")
    for trial in ("b-quick", "b-quick-part", "b-part", "b-full-named-slow"):
        trial_page = RESULTS.replace("2001", "2099").replace("A Chip", "A Trial")
        (results / f"{trial}.md").write_text(trial_page, encoding="utf-8")
    (results / "picture.png").touch()
    return tmp_path


def test_quotes_the_newest_results(tool: ModuleType, checkout: Path) -> None:
    for _ in range(2):  # the second time over its own work
        assert tool.main(["--root", str(checkout)]) == 0
        readme = (checkout / "README.md").read_text(encoding="utf-8")
        page = (checkout / "docs" / "performance.md").read_text(encoding="utf-8")
        for text in (readme, page):
            assert text.startswith("before\n") and text.endswith("after\n")
            assert "2001-02-03" in text and "1999" not in text and "old" not in text
            assert "A Chip" in text and "not idle" in text and "7.5 (LSTM T=4)" in text
        assert "| LSTM T=4 | 1.00 ms | 80 % | 7.5 |" in readme
        assert "| LSTM T=4 | 1.00 ms | 2 | 1.90 | 99 | 80 % | | 7.5 |" in page
        assert "![roofline](../benchmarks/results/picture.png)" in page
        assert "With care." in page


def test_quotes_nothing_where_there_is_nothing(
    tool: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(says: str, *arguments: str) -> None:
        assert tool.main(["--root", str(checkout), *arguments]) == 2
        assert says in capsys.readouterr().err

    refused("not a page of benchmark results", str(checkout / "README.md"))
    (checkout / "README.md").write_text("no markers\n", encoding="utf-8")
    refused("expected one line")
    for page in (checkout / "benchmarks" / "results").glob("*.md"):
        page.unlink()
    refused("run `make bench` first")


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_the_pages_have_a_place_for_the_quote(name: str, tool: ModuleType) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.count(tool.BEGIN) == 1 and text.count(tool.END) == 1
    assert text.index(tool.BEGIN) < text.index(tool.END)
