"""Numbers and tables as plain text, the same on the command line and on pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fibopolicy.statistics.differences import Estimate
from fibopolicy.statistics.rates import Rate

Rows = list[list[str]]


def percent(value: float) -> str:
    """`93.3 %`, for a share in [0, 1]."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """`+1.7`, for a difference of shares: percentage points."""
    return f"{100 * value:+.1f}"


def interval(rate: Rate) -> str:
    """`[88.1, 96.4]`, the 95 % interval of a rate in percent."""
    return f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def points_interval(difference: Estimate) -> str:
    """`[-1.2, +3.3]`, the 95 % interval of a difference in percentage points."""
    return f"[{points(difference.low)}, {points(difference.high)}]"


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def counted(n: int, noun: str, plural: str = "") -> str:
    """`1 seed` or `3 seeds`; `plural` if it is not the noun with an s."""
    return f"{n} {noun if n == 1 else plural or f'{noun}s'}"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def rate_rows(rates: Mapping[str, Rate]) -> Rows:
    """A row for each rate, with its 95 % Wilson interval, below the titles."""
    rows = [["policy", "successes", "rate", "95 % Wilson interval"]]
    for name, rate in rates.items():
        successes = f"{rate.successes}/{rate.episodes}"
        rows.append([name, successes, percent(rate.value), f"{interval(rate)} %"])
    if any(rate.errors for rate in rates.values()):
        errors = ["errors", *(str(rate.errors) for rate in rates.values())]
        for row, cell in zip(rows, errors, strict=True):
            row.insert(1, cell)
    return rows


def rate_table(rates: Mapping[str, Rate]) -> str:
    """`rate_rows` as plain text."""
    return aligned(rate_rows(rates))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Plain text with aligned columns: the first and the last to the left, the others
    to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([*cells, last]).rstrip())
    return "\n".join(lines)
