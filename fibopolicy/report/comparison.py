"""A comparison in words: what is printed, and what the page shows."""

from __future__ import annotations

from collections.abc import Sequence

from fibopolicy.statistics.compare import ALPHA, Comparison
from fibopolicy.statistics.power import episodes_needed

Table = list[list[str]]


def text(comparison: Comparison, differences: Sequence[float]) -> str:
    """The whole comparison as plain text."""
    parts = [
        summary(comparison),
        columns(rate_rows(comparison)),
        columns(difference_rows(comparison)),
        "\n".join(notes(comparison)),
        (
            f"episodes for {100 * POWER:.0f} % power at {100 * ALPHA:.0f} %, for one checkpoint"
            " against another"
        ),
        columns(power_rows(comparison, differences)),
    ]
    return "\n\n".join(part for part in parts[:4] if part) + "\n\n" + "\n".join(parts[4:])


def summary(comparison: Comparison) -> str:
    """On what: task, start states, what was left out."""
    seeds = sorted({rows[0].starts_seed for one in comparison.methods for rows in one.rows})
    told = [
        f"{comparison.task}, {len(comparison.starts)} shared start states (set of seed"
        f" {', '.join(map(str, seeds))}), horizon {comparison.horizon}"
    ]
    if comparison.left_out:
        told.append(f"{comparison.left_out} that not every run has are left out")
    if comparison.faulty:
        told.append(f"{comparison.faulty} left out because a simulator failed there in some run")
    return "; ".join(told)


def rate_rows(comparison: Comparison) -> Table:
    """Per side its rate; the first row is the heading."""
    table = [["", "step", "seeds", "errors", "successes", "rate", "95 % interval"]]
    for side, rate in zip(comparison.methods, comparison.rates, strict=True):
        table.append(
            [
                side.name,
                side.steps,
                str(len(side.runs)),
                str(side.errors),
                f"{rate.successes}/{rate.episodes}",
                f"{100 * rate.value:.1f} %",
                f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}] %",
            ]
        )
    return table


def difference_rows(comparison: Comparison) -> Table:
    """Per candidate its difference from the baseline; the first row is the heading."""
    several = len(comparison.candidates) > 1
    table = [
        [
            f"minus {comparison.baseline.name}",
            "difference",
            "95 % interval",
            "p",
            *["p (Holm)"] * several,
            "verdict",
        ]
    ]
    for verdict in comparison.candidates:
        d = verdict.difference
        table.append(
            [
                verdict.name,
                f"{100 * d.value:+.1f} %",
                f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}] %",
                p_value(d.p),
                *[p_value(verdict.p)] * several,
                verdict.verdict,
            ]
        )
    return table


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def notes(comparison: Comparison) -> list[str]:
    """What the figures rest on, and what they do not say."""
    told = []
    baseline = comparison.baseline.name
    for verdict in comparison.candidates:
        d = verdict.difference
        if d.checkpoint_pair:
            only_baseline, only_candidate = d.discordant
            told.append(
                f"{verdict.name}: alone solved {only_candidate} start states,"
                f" {baseline} alone {only_baseline}; exact McNemar. This tells two"
                " checkpoints apart, not two methods: train more seeds and pass --group."
            )
        else:
            pair = (
                comparison.methods[0],
                next(side for side in comparison.methods if side.name == verdict.name),
            )
            if single := [side.name for side in pair if len(side.runs) == 1]:
                told.append(
                    f"{verdict.name}: {single[0]} is one checkpoint; how its training seeds differ"
                    " is unknown."
                )
        if d.seed_share > 0.5:
            told.append(
                f"{verdict.name}: {100 * d.seed_share:.0f} % of the variance is between training"
                " seeds: more episodes do not help, more seeds do."
            )
    if comparison.margin is not None:
        told.append(
            f"Not inferior: worse by less than the margin of {100 * comparison.margin:g} points, at"
            " 2.5 % one-sided. The margin counts only if it was fixed before the rows were seen."
        )
        floor = comparison.rates[0].value <= comparison.margin
        if empty := [
            v.name
            for v in comparison.candidates
            if floor and not (v.p <= ALPHA and v.difference.value > 0)
        ]:
            told.append(
                f"{baseline} itself solves no more than the margin, and nothing can"
                f" be worse by as much: whether {', '.join(empty)} is inferior cannot be tested."
            )
    return told


#: Asked of a planned experiment.
POWER = 0.8


def power_rows(comparison: Comparison, differences: Sequence[float]) -> Table:
    """How many episodes would show a difference from the baseline's rate: on the same
    start states, and on others.
    """
    baseline, correlation = comparison.rates[0].value, comparison.correlation
    table = [["rates", f"the same start states (correlation {correlation:.2f})", "different ones"]]
    for difference in differences:
        other = baseline + difference if baseline + difference <= 1 else baseline - difference
        needed = [
            episodes_needed(baseline, other, correlation=r, power=POWER, alpha=ALPHA)
            for r in (correlation, None)
        ]
        told = ["more than 20000" if n is None else str(n) for n in needed]
        table.append([f"{100 * baseline:.1f} and {100 * other:.1f} %", told[0], f"{told[1]} each"])
    return table


def columns(table: Table) -> str:
    """Rows of cells in aligned columns, the first and the last to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    last = len(widths) - 1
    lines = []
    for row in table:
        cells = [
            cell.ljust(w) if i in (0, last) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
