"""Documents made of blocks: one HTML page that needs no other file, or Markdown.

A report lists its blocks once; the templates define how each kind of block looks. The
HTML fits a phone and has a dark mode.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from fibopolicy.utils.files import atomic_write

#: What the colours of the frames in a video of episodes mean.
FRAME_COLOURS = "Grey frame: running. Green: success. Red: failure."


class DocumentBlock:
    """A piece of a document."""

    @property
    def kind(self) -> str:
        """Name of this kind of block in the templates."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Heading(DocumentBlock):
    text: str
    level: int = 2


@dataclass(frozen=True)
class Contents(DocumentBlock):
    """Links to headings; not in Markdown, whose viewers make their own."""

    headings: Sequence[str]


@dataclass(frozen=True)
class Answers(DocumentBlock):
    """The first lines of a document.

    Args:
        lines: mark ("good", "bad" or "open") and text, with bold words between `**`.
    """

    lines: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Note(DocumentBlock):
    text: str


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: its content.
        href: file that it links to, relative to the document; empty for no link.
        mark: "good", "bad" or "open", shown as a colour; empty for none.
    """

    text: str
    href: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table(DocumentBlock):
    """A table; on a phone each row becomes a card.

    Args:
        rows: the first row holds the titles, the first column the names of the rows.
        words: titles of further columns that hold words instead of numbers.
    """

    rows: Sequence[Sequence[str | Cell]]
    words: Collection[str] = ()

    @property
    def titles(self) -> list[str]:
        return [cell.text if isinstance(cell, Cell) else cell for cell in self.rows[0]]

    @property
    def body(self) -> list[list[Cell]]:
        """All rows below the titles."""
        return [
            [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
            for row in self.rows[1:]
        ]

    def kind_of(self, title: str) -> str:
        """What the column of this title holds: "name", "words" or "number"."""
        if title == self.titles[0]:
            return "name"
        return "words" if title in self.words else "number"


@dataclass(frozen=True)
class Facts(DocumentBlock):
    """Names with their values."""

    facts: Mapping[str, str]


@dataclass(frozen=True)
class Picture(DocumentBlock):
    """An SVG file, embedded in HTML.

    Args:
        alt: its description for readers who cannot see it.
    """

    path: Path
    alt: str


@dataclass(frozen=True)
class Video(DocumentBlock):
    """An mp4 file, embedded in HTML."""

    path: Path


@dataclass(frozen=True)
class SideBySide(DocumentBlock):
    """Groups of blocks, next to one another where the page is wide enough; not in
    Markdown.
    """

    groups: Sequence[Sequence[DocumentBlock]]


@dataclass(frozen=True)
class Folded(DocumentBlock):
    """Blocks that a reader of the page unfolds; not in Markdown, which cannot fold."""

    summary: str
    blocks: Sequence[DocumentBlock]


def write_html(path: Path, title: str, blocks: Sequence[DocumentBlock]) -> None:
    """Write a page with its pictures and videos embedded."""
    _write(path, _templates().get_template("page.html").render(title=title, blocks=blocks))


def write_markdown(path: Path, title: str, blocks: Sequence[DocumentBlock]) -> None:
    """Write a Markdown file that links to pictures and videos in its folder."""
    template = _templates().get_template("page.md")
    _write(path, template.render(title=title, blocks=blocks, folder=path.parent))


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        # A file name may hold bytes that are not UTF-8.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fibopolicy.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "anchor": lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"),
        "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
        "breakable": _breakable,
        "bold": lambda text: Markup(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(_unbroken(text)))),
        "escaped": _escaped,
        "relative": lambda path, folder: path.relative_to(folder).as_posix(),
        "unbroken": _unbroken,
    }
    return environment


def _escaped(text: str) -> str:
    """Markdown in which no character of a name or a message begins a column, a tag or
    emphasis.
    """
    return re.sub(r"[|<*]", r"\\\g<0>", text)


def _breakable(text: str) -> Markup:
    """HTML of a title in which a long name may continue on the next line."""
    return Markup(re.sub(r"(?<=\w[_/.:-])(?=\w)", "<wbr>", str(escape(text))))


def _unbroken(text: str) -> Markup:
    """HTML of a text in which intervals and percentages, such as `[93.1, 97.8] %`, stay
    on one line.
    """
    html = str(escape(text)).replace(" %", "&nbsp;%")
    return Markup(re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", "&nbsp;"), html))
