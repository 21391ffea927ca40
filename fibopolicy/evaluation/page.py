"""HTML pages that need no other file and fit a phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from fibopolicy.files import written_aside

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff }}
body {{ margin: 0 auto; padding: 1.5rem; max-width: 60rem; overflow-wrap: anywhere }}
h1 {{ font-size: 1.5rem; line-height: 1.3 }} h2 {{ font-size: 1.15rem; margin-top: 2rem }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #d1d9e0 }}
th {{ font-weight: 600 }} td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums }}
table.pairs th {{ width: 11rem }} td:first-child, th:first-child {{ padding-left: 0 }}
img, video {{ display: block; max-width: 100%; height: auto }} .note {{ color: #59636e }}
@media (max-width: 40rem) {{
  body {{ padding: 1rem }} table.pairs th {{ width: 7rem }}
  table.wide, table.wide tbody, table.wide tr, table.wide td {{ display: block }} table.wide tr.head {{ display: none }}
  table.wide tr {{ border-bottom: 1px solid #d1d9e0; padding: .4rem 0 }}
  table.wide td {{ border: 0; padding: .1rem 0; text-align: left; display: flex; gap: 1rem }}
  table.wide td::before {{ content: attr(data-name); flex: 0 0 8rem; color: #59636e }}
  table.wide td:first-child {{ font-weight: 600 }} table.wide td:first-child::before {{ content: none }}
}}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write one page from the pieces that the functions below make."""
    with written_aside(path) as aside:
        aside.write_text(PAGE.format(title=html.escape(title), body="\n".join(part for part in parts if part)), encoding="utf-8")


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def note(text: str) -> str:
    """A remark; nothing for no text."""
    return text and f"<p class=note>{html.escape(text)}</p>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the heading and whose first column names; on a phone each row becomes a card."""
    titles = rows[0]
    head = "".join(f"<th{' class=number' if i else ''}>{html.escape(title)}</th>" for i, title in enumerate(titles))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{" class=number" if i else ""} data-name="{html.escape(title)}">{html.escape(cell)}</td>'
            for i, (title, cell) in enumerate(zip(titles, row, strict=True))
        )
        + "</tr>"
        for row in rows[1:]
    )
    return f"<table class=wide><tr class=head>{head}</tr>{body}</table>"


def pairs(facts: Mapping[str, str]) -> str:
    """A table of names and what they stand for."""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(fact)}</td></tr>" for name, fact in facts.items())
    return f"<table class=pairs>{rows}</table>"


def picture(path: Path, told: str, width: int = 624) -> str:
    """A PNG, embedded, at most `width` CSS pixels wide; `told` is read out to those who cannot see it."""
    return f'<img alt="{html.escape(told)}" width={width} src="data:image/png;base64,{_base64(path)}">'


def video(path: Path) -> str:
    """An mp4, embedded."""
    return f'<video controls autoplay loop muted playsinline src="data:video/mp4;base64,{_base64(path)}"></video>'


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
