"""Documents in HTML and in Markdown."""

from __future__ import annotations

from pathlib import Path

from fibopolicy.report.document import (
    Answers,
    Cell,
    Contents,
    Facts,
    Folded,
    Heading,
    Note,
    Picture,
    Table,
    write_html,
    write_markdown,
)

HOSTILE = "<b>|*\"'&</b>"


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    (tmp_path / "plot.svg").write_text("<svg/>")
    blocks = [
        Answers([("good", f"**{HOSTILE}** wins")]),
        Heading(HOSTILE),
        Note(HOSTILE),
        Table([["name", HOSTILE], [HOSTILE, Cell(HOSTILE, href=HOSTILE)]]),
        Facts({HOSTILE: HOSTILE}),
        Picture(tmp_path / "plot.svg", HOSTILE),
        Folded(HOSTILE, [Note(HOSTILE)]),
    ]
    write_html(tmp_path / "page.html", HOSTILE, blocks)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<b>") == page.count("</b>") == 1  # of the answer
    assert page.count("&lt;b&gt;|*&#34;&#39;&amp;&lt;/b&gt;") == 15
    write_markdown(tmp_path / "page.md", HOSTILE, blocks[1:5])
    text = (tmp_path / "page.md").read_text()
    assert "<b>" not in text.replace("\\<b>", "").replace(f"]({HOSTILE})", "")


def test_an_interval_stays_on_one_line(tmp_path: Path) -> None:
    write_html(tmp_path / "page.html", "t", [Table([["a", "b"], ["x", "93.3 [88.1, 96.4] %"]])])
    assert ">93.3 [88.1,&nbsp;96.4]&nbsp;%</td>" in (tmp_path / "page.html").read_text()


def test_markdown_keeps_what_it_can_show(tmp_path: Path) -> None:
    (tmp_path / "plot.svg").write_text("<svg/>")
    blocks = [
        Answers([("bad", "fib is **worse**.")]),
        Contents(["Success"]),
        Heading("Success"),
        Table([["name", "rate", "state"], ["a", "1", Cell("done", href="x/")]], words=("state",)),
        Folded("More", [Note("hidden")]),
        Picture(tmp_path / "plot.svg", "a plot"),
    ]
    write_markdown(tmp_path / "page.md", "Title", blocks)
    assert (
        (tmp_path / "page.md").read_text()
        == """# Title

- fib is **worse**.

## Success

| name | rate | state |
| --- | ---: | --- |
| a | 1 | [done](x/) |

![a plot](plot.svg)
"""
    )
