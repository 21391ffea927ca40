"""What all pictures of results have in common: size, colours, how they are saved."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from fibopolicy.utils.files import atomic_write

#: Wide enough for a phone and no wider, inches.
WIDTH = 5.2
#: Of text and axes; `save_svg` turns both light where the reader's screen is dark.
INK, FAINT = "#1f2328", "#59636e"
_ON_DARK = {INK: "#e6edf3", FAINT: "#9198a1"}
#: Told apart by readers with any colour vision (Okabe and Ito), also in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)


def figure(rows: int, columns: int = 1, *, height: float = 2.8, **options: Any) -> tuple[Any, Any]:
    """A matplotlib figure of `rows` x `columns` panels, each `height` inches high, and
    its axes `(rows, columns)`.

    Args:
        options: of `pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
    )
    inks: Any = dict.fromkeys(names, INK)
    with pyplot.rc_context(inks):
        drawn, axes = pyplot.subplots(
            rows,
            columns,
            figsize=(WIDTH, rows * height),
            layout="constrained",
            squeeze=False,
            **options,
        )
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
    return drawn, axes


def legend(drawn: Any, columns: int = 1) -> None:
    """The names of what is drawn, above it."""
    drawn.legend(frameon=False, loc="outside upper left", ncols=columns, labelcolor=INK)


def few_ticks(axes: Any, most: int = 4) -> None:
    """At most so many labels on either axis of a small panel, and none between; they
    also take most of the time to draw.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for axis in (axes.xaxis, axes.yaxis):
        log = axis.get_scale() == "log"
        axis.set_major_locator(
            LogLocator(numticks=most) if log else MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])
        )
        axis.set_minor_locator(NullLocator())


def short(name: str, most: int = 24) -> str:
    """A name cut to `most` characters; its end counts."""
    return name if len(name) <= most else "…" + name[1 - most :]


def colours(number: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(number)]


def save_png(drawn: Any, path: Path) -> None:
    from matplotlib import pyplot

    with atomic_write(path) as aside:
        drawn.savefig(aside, format="png", dpi=160)
    pyplot.close(drawn)


def save_svg(drawn: Any, path: Path) -> None:
    """Save without a background, and with ink that turns light on a dark screen; the
    same picture gives the same bytes.
    """
    import matplotlib
    from matplotlib import pyplot

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(drawn)
    rules = "".join(
        f'[style*="{kind}: {ink}"] {{ {kind}: {light} !important }} '
        for ink, light in _ON_DARK.items()
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark) {{ {rules}}}</style>"
    with atomic_write(path) as aside:
        aside.write_text(
            re.sub(r"(<svg\b[^>]*>)", lambda found: found[1] + style, text.getvalue(), count=1),
            encoding="utf-8",
        )
