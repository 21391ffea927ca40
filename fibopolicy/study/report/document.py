"""What a report is made of, and how it looks in HTML and in Markdown: written once, so
both say the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fibopolicy.report import page
from fibopolicy.report.page import Cell, Link


class Block(ABC):
    """A piece of a report; files are named relative to where it lies."""

    @abstractmethod
    def html(self) -> str: ...

    @abstractmethod
    def markdown(self) -> str: ...


@dataclass(frozen=True)
class Heading(Block):
    text: str
    level: int = 2

    def html(self) -> str:
        return page.heading(self.text, self.level)

    def markdown(self) -> str:
        return f"{'#' * self.level} {_escaped(self.text)}"


@dataclass(frozen=True)
class Answers(Block):
    """The first lines: a mark ("good", "bad", "open") and a sentence each, with bold
    words between **.
    """

    lines: Sequence[tuple[str, str]]

    def html(self) -> str:
        return page.answers(self.lines)

    def markdown(self) -> str:
        return "\n".join(f"- {text}" for _, text in self.lines)


@dataclass(frozen=True)
class Note(Block):
    text: str

    def html(self) -> str:
        return page.note(self.text)

    def markdown(self) -> str:
        return _escaped(self.text)


@dataclass(frozen=True)
class Table(Block):
    """The first row is the heading, the first column names.

    Args:
        words: titles of further columns that hold words.
    """

    rows: Sequence[Sequence[Cell]]
    words: Collection[str] = ()

    def html(self) -> str:
        return page.table(self.rows, self.words)

    def markdown(self) -> str:
        rules = [
            "---" if i == 0 or title in self.words else "---:"
            for i, title in enumerate(self.rows[0])
        ]
        titles, *lines = [[_cell(cell) for cell in row] for row in self.rows]
        lines = [titles, rules, *lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Facts(Block):
    facts: Mapping[str, str]

    def html(self) -> str:
        return page.pairs(self.facts)

    def markdown(self) -> str:
        return "\n".join(
            f"- {_escaped(name)}: {_escaped(fact)}" for name, fact in self.facts.items()
        )


@dataclass(frozen=True)
class Picture(Block):
    """An SVG or PNG beside the report; `told` is read out to those who cannot see it."""

    path: Path
    told: str

    def html(self) -> str:
        return page.picture(self.path, self.told)

    def markdown(self) -> str:
        return f"![{self.told}]({self.path.name})"


@dataclass(frozen=True)
class Film(Block):
    """An mp4 in the report's folder `videos`."""

    path: Path

    def html(self) -> str:
        return page.video(self.path)

    def markdown(self) -> str:
        return f"[{self.path.name}](videos/{self.path.name})"


@dataclass(frozen=True)
class Folded(Block):
    """What a reader of the page sees who asks for it; Markdown, which cannot fold,
    leaves it out.
    """

    summary: str
    blocks: Sequence[Block]

    def html(self) -> str:
        return page.folded(self.summary, [block.html() for block in self.blocks])

    def markdown(self) -> str:
        return ""


@dataclass(frozen=True)
class Contents(Block):
    """Links to the headings of a page; Markdown's readers have their own."""

    headings: Sequence[str]

    def html(self) -> str:
        return page.contents(self.headings)

    def markdown(self) -> str:
        return ""


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    return (
        "\n\n".join([f"# {_escaped(title)}", *filter(None, (block.markdown() for block in blocks))])
        + "\n"
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, Link):
        return f"[{_escaped(cell.text)}]({cell.href})"
    return _escaped(cell if isinstance(cell, str) else cell.text)


def _escaped(text: str) -> str:
    """Nothing in a name or a message begins a column, a tag or emphasis."""
    for sign in ("|", "<", "*"):
        text = text.replace(sign, f"\\{sign}")
    return text
