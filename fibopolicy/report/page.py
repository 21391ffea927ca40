"""HTML pages that need no other file and fit a phone."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fibopolicy.utils.files import atomic_write

#: Colours by what they mean, so that a reader's dark screen stays dark.
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --line: #d1d9e0; --faint: #59636e; --link: #0969da }
:root { --good: #1a7f37; --bad: #cf222e; --open: #9a6700 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #3d444d; --faint: #9198a1; --link: #4493f8 }
  :root { --good: #3fb950; --bad: #f85149; --open: #d29922 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { margin: 0 auto; padding: 1.5rem; max-width: 60rem; overflow-wrap: anywhere } a { color: var(--link) }
h1 { font-size: 1.5rem; line-height: 1.3 } h2 { font-size: 1.15rem; margin-top: 2rem } h3 { font-size: 1rem; margin-top: 1.5rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line) }
.number { overflow-wrap: break-word } table.wide td.words { min-width: 5rem }
th { font-weight: 600; overflow-wrap: break-word } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
table.pairs th { width: 11rem } td:first-child, th:first-child { padding-left: 0 }
td:last-child, th:last-child { padding-right: 0 } table.wide th:first-child { min-width: 9rem }
img, video { display: block; max-width: 100%; height: auto } img.paper { background: #fff } .note { color: var(--faint) }
details { margin: 1rem 0 } summary { cursor: pointer; color: var(--link) } nav a { margin-right: 1rem; white-space: nowrap }
ul.answers { list-style: none; padding: 0 } ul.answers li { margin: .75rem 0; padding-left: .9rem; border-left: .3rem solid }
li.good { border-color: var(--good) !important } li.bad { border-color: var(--bad) !important }
li.open { border-color: var(--open) !important }
td.good, td.bad, td.open { white-space: nowrap }
td.good { color: var(--good) } td.bad { color: var(--bad) } td.open { color: var(--open) }
@media print {
  body { padding: 0 } h2, h3 { break-after: avoid } tr, img { break-inside: avoid } table.wide { font-size: .7rem }
}
@media (max-width: 40rem) {
  body { padding: 1rem } th { overflow-wrap: anywhere } table.pairs th { width: 9.5rem }
  table.wide, table.wide tbody, table.wide tr, table.wide td { display: block } table.wide tr.head { display: none }
  table.wide tr { border-bottom: 1px solid var(--line); padding: .4rem 0 }
  table.wide td { border: 0; padding: .1rem 0; text-align: left; display: flex; gap: 1rem }
  table.wide td { overflow-wrap: anywhere; white-space: normal }
  table.wide td::before { content: attr(data-name); flex: 0 0 8rem; color: var(--faint) }
  table.wide td:first-child { font-weight: 600 } table.wide td:first-child::before { content: none }
}
"""  # noqa: E501

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>{style}</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""  # noqa: E501


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write one page from the pieces that the functions below make."""
    with atomic_write(path) as aside:
        aside.write_text(
            PAGE.format(
                title=html.escape(title),
                style=STYLE,
                body="\n".join(part for part in parts if part),
            ),
            encoding="utf-8",
            errors="backslashreplace",
        )


def heading(text: str, level: int = 2) -> str:
    """A heading that a link can lead to."""
    return f'<h{level} id="{anchor(text)}">{html.escape(text)}</h{level}>'


def anchor(text: str) -> str:
    """What a link to the heading of this text is called."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def contents(headings: Sequence[str]) -> str:
    """Links to the headings of a long page."""
    return (
        "<nav>"
        + " ".join(f'<a href="#{anchor(text)}">{html.escape(text)}</a>' for text in headings)
        + "</nav>"
    )


def answers(lines: Sequence[tuple[str, str]]) -> str:
    """What a page has to say, marked as "good", "bad" or "open"; words between ** are bold."""
    told = [
        (mark, re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))) for mark, text in lines
    ]
    return (
        "<ul class=answers>"
        + "".join(f"<li class={mark}>{text}</li>" for mark, text in told)
        + "</ul>"
    )


def folded(summary: str, parts: Sequence[str]) -> str:
    """What a reader sees who asks for it."""
    return f"<details><summary>{html.escape(summary)}</summary>{''.join(parts)}</details>"


def note(text: str) -> str:
    """A remark; nothing for no text."""
    return text and f"<p class=note>{html.escape(text)}</p>"


@dataclass(frozen=True)
class Link:
    """A cell that leads to a file beside the page."""

    text: str
    href: str


@dataclass(frozen=True)
class Marked:
    """A cell that is "good", "bad" or "open"."""

    text: str
    mark: str


Cell = str | Link | Marked


def table(rows: Sequence[Sequence[Cell]], words: Collection[str] = ()) -> str:
    """A table whose first row is the heading and whose first column names; on a phone
    each row becomes a card.

    Args:
        words: titles of the columns, beside the first, that hold words and not numbers.
    """
    titles = [title for title in rows[0] if isinstance(title, str)]
    kinds = [
        "" if i == 0 else "words" if title in words else "number" for i, title in enumerate(titles)
    ]
    head = "".join(
        f"<th{_class(kind)}>{html.escape(title)}</th>"
        for kind, title in zip(kinds, titles, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_class(kind, getattr(cell, 'mark', ''))}"
            f' data-name="{html.escape(title)}">{_told(cell)}</td>'
            for kind, title, cell in zip(kinds, titles, row, strict=True)
        )
        + "</tr>"
        for row in rows[1:]
    )
    return f"<table class=wide><tr class=head>{head}</tr>{body}</table>"


def _class(*names: str) -> str:
    given = " ".join(filter(None, names))
    return f' class="{given}"' if given else ""


def _told(cell: Cell) -> str:
    if isinstance(cell, Link):
        return f'<a href="{html.escape(cell.href)}">{html.escape(cell.text)}</a>'
    text = html.escape(cell if isinstance(cell, str) else cell.text)
    # an interval stays on one line
    return re.sub(r"\[[^\]]*\]", lambda interval: interval[0].replace(" ", "&nbsp;"), text)


def pairs(facts: Mapping[str, str]) -> str:
    """A table of names and what they stand for."""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(fact)}</td></tr>"
        for name, fact in facts.items()
    )
    return f"<table class=pairs>{rows}</table>"


def picture(path: Path, told: str, width: int = 624) -> str:
    """A PNG or SVG, embedded, at most `width` CSS pixels wide; `told` is read out to
    those who cannot see it.
    """
    # A PNG's ink is dark whatever the page's paper; an SVG brings its own (see
    # `figures.save_svg`).
    kind = 'src="data:image/svg+xml' if path.suffix == ".svg" else 'class=paper src="data:image/png'
    return f'<img alt="{html.escape(told)}" width={width} {kind};base64,{_base64(path)}">'


def video(path: Path) -> str:
    """An mp4, embedded."""
    return (
        "<video controls autoplay loop muted playsinline"
        f' src="data:video/mp4;base64,{_base64(path)}"></video>'
    )


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
