#!/usr/bin/env python3
"""Copies a page of benchmark results into README.md and docs/performance.md.

`make bench` writes a dated Markdown page into benchmarks/results. This script takes the newest
(trials, chosen cases and properties alone only when named) and replaces what stands between the
two comment lines ``<!-- benchmarks:begin -->`` and ``<!-- benchmarks:end -->``: in
docs/performance.md by the whole page, in README.md by the machine, the summary and, where they are
few, the cases with the columns that a newcomer asks for.
No figure is typed by hand, and none is left out because of what it says.

Status 2, with one line, when there is nothing to quote or nowhere to put it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

SUMMARY = "In short"  # the section of the page that sums up
NO_CASES = (
    SUMMARY,
    "Since the last run",
    "Properties",
    "The machine's limits",
    "How to read this",
)
FACTS = ("date", "processor", "threads", "instruction set in use", "compared")
DROPPED = ("threads", "speed-up", "GF/s")  # columns that README.md does without
# Names of pages that are of a trial, of chosen cases, of no cases, or of conditions of their own.
TRIAL = re.compile(r"-(quick|part|properties|named)\b")
MOST_ROWS = 40  # of README.md's table; more are for docs/performance.md alone


class Page(NamedTuple):
    """A page of results.

    Attributes:
        facts: The list at its top: what was measured, where and when.
        notes: The paragraphs after it, and the pictures.
        sections: Title → text.
    """

    path: Path
    facts: dict[str, str]
    notes: list[str]
    sections: dict[str, str]


def read(path: Path) -> Page:
    """The page at `path`; ValueError when it is none."""
    text = path.read_text(encoding="utf-8")
    head, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    paragraphs = [part.strip() for part in re.split(r"\n{2,}", head) if part.strip()]
    facts = dict(re.findall(r"^- ([^:\n]+): (.*)$", head, flags=re.MULTILINE))
    sections = {}
    for part in rest:
        title, _, body = part.partition("\n")
        sections[title.strip()] = body.strip()
    if "date" not in facts or SUMMARY not in sections:
        raise ValueError(f"{path}: not a page of benchmark results")
    notes = [part for part in paragraphs if not part.startswith(("# ", "- "))]
    return Page(path, facts, notes, sections)


def newest(folder: Path) -> Page:
    """The page with the latest date; ValueError when there is none."""
    paths = sorted(path for path in folder.glob("*.md") if not TRIAL.search(path.stem))
    pages = [read(path) for path in paths]
    if not pages:
        raise ValueError(f"{folder}: no results; run `make bench` first")
    return max(pages, key=lambda page: page.facts["date"])


def table(text: str) -> list[list[str]]:
    """The cells of a Markdown table, header first, without the rule below it."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]] if rows else []


def short(page: Page) -> str:
    """README.md's part."""
    facts = ", ".join(f"{name} {page.facts[name]}" for name in FACTS if name in page.facts)
    lines = [f"Measured: {facts}.", ""]
    lines += [f"{note}\n" for note in page.notes if not note.startswith("![")]
    lines += [page.sections[SUMMARY], ""]
    tables = {title: table(body) for title, body in page.sections.items() if title not in NO_CASES}
    if sum(len(rows) - 1 for rows in tables.values()) > MOST_ROWS:
        return "\n".join(lines).strip()
    for title, rows in tables.items():
        keep = [i for i, name in enumerate(rows[0]) if name not in DROPPED]
        # A column without a figure says nothing here.
        keep = [i for i in keep if i == 0 or any(row[i].strip("–") for row in rows[1:])]
        lines += [f"**{title}**", ""]
        header, *body = [[row[i] for i in keep] for row in rows]
        rule = ["---", *("--:" for _ in header[1:])]
        lines += [f"| {' | '.join(row)} |" for row in (header, rule, *body)]
        lines.append("")
    return "\n".join(lines).strip()


def whole(page: Page, target: Path) -> str:
    """docs/performance.md's part; pictures are linked as seen from `target`."""
    lines = [f"- {name}: {value}" for name, value in page.facts.items()] + [""]
    for note in page.notes:
        picture = re.fullmatch(r"!\[(.*)\]\((.*)\)", note)
        if picture:
            file = page.path.parent / picture[2]
            if not file.is_file():
                continue
            note = f"![{picture[1]}]({Path(os.path.relpath(file, target.parent)).as_posix()})"
        lines += [note, ""]
    for title, body in page.sections.items():
        lines += [f"### {title}", "", body, ""]
    return "\n".join(lines).strip()


def replace(target: Path, quote: str) -> bool:
    """Puts `quote` between the markers of `target`; whether that changed anything."""
    text = target.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{target}: expected one line {BEGIN} and, after it, one line {END}")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    changed = f"{before}{BEGIN}\n\n{quote}\n\n{END}{after}"
    if changed != text:
        target.write_text(changed, encoding="utf-8")
    return changed != text


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "page", type=Path, nargs="?", help="default: the newest in benchmarks/results"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    arguments = parser.parse_args(argv)
    root = arguments.root.resolve()
    readme, performance = root / "README.md", root / "docs" / "performance.md"
    try:
        if arguments.page is None:
            page = newest(root / "benchmarks" / "results")
        else:
            page = read(arguments.page.resolve())
        for target, quote in ((readme, short(page)), (performance, whole(page, performance))):
            what = "updated" if replace(target, quote) else "already up to date"
            print(f"{target.relative_to(root)}: {what}, from {page.path.name}")
    except (OSError, ValueError) as error:
        print(f"quote_benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
