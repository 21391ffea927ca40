"""A comparison of methods as plain text and as one HTML page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from fibopolicy.report.document import (
    FRAME_COLOURS,
    DocumentBlock,
    Facts,
    Heading,
    Note,
    Picture,
    Table,
    Video,
    write_html,
)
from fibopolicy.report.plots import SUCCESS_BY_STEP, Interval, plot_forest, plot_success_by_step
from fibopolicy.report.tables import (
    Rows,
    aligned,
    counted,
    interval,
    listed,
    p_value,
    percent,
    points,
    points_interval,
)
from fibopolicy.statistics.compare import ALPHA, Comparison
from fibopolicy.statistics.power import MAX_EPISODES, POWER, episodes_needed


def text(comparison: Comparison, effect_sizes: Sequence[float]) -> str:
    """The comparison as printed text.

    Args:
        effect_sizes: differences of rates, in (0, 1), whose episodes are listed.
    """
    parts = [
        summary(comparison),
        aligned(method_rate_rows(comparison)),
        aligned(difference_rows(comparison)),
        "\n".join(notes(comparison)),
        (
            f"episodes for {100 * POWER:.0f} % power at the {100 * ALPHA:.0f} % level, one"
            f" checkpoint against another\n{aligned(power_rows(comparison, effect_sizes))}"
        ),
    ]
    return "\n\n".join(filter(None, parts))


def write_comparison_page(
    comparison: Comparison, effect_sizes: Sequence[float], path: Path, video: Path | None = None
) -> None:
    """Write the page of a comparison.

    Args:
        effect_sizes: as for `text`.
        video: mp4 of baseline and first candidate side by side, to embed.
    """
    baseline, *candidates = (method.name for method in comparison.methods)
    intervals = [
        Interval(one.name, one.difference.value, one.difference.low, one.difference.high)
        for one in comparison.candidates
    ]
    with tempfile.TemporaryDirectory() as folder:
        forest, success = Path(folder) / "differences.svg", Path(folder) / "success_by_step.svg"
        plot_forest({"": intervals}, baseline, comparison.margin, forest)
        by_method = {
            method.name: method.results(comparison.init_states) for method in comparison.methods
        }
        timed = any(row.steps for rows in by_method.values() for of_run in rows for row in of_run)
        blocks: list[DocumentBlock] = [
            Note(summary(comparison)),
            Heading("Differences"),
            Table(difference_rows(comparison), words=("verdict",)),
            Picture(forest, "differences from the baseline with 95 % intervals"),
            *map(Note, notes(comparison)),
            Heading("Success rates"),
            Table(method_rate_rows(comparison)),
        ]
        if timed:
            plot_success_by_step(by_method, success)
            blocks += [
                Heading("Success against time"),
                Picture(success, SUCCESS_BY_STEP),
                Note(SUCCESS_BY_STEP),
            ]
        if video is not None:
            blocks += [
                Heading("Side by side"),
                Video(video),
                Note(
                    f"{baseline} and {candidates[0]} on the same initial states. Initial states"
                    f" with different outcomes come first. {FRAME_COLOURS}"
                ),
            ]
        blocks += [
            Heading("Episodes needed"),
            Table(power_rows(comparison, effect_sizes)),
            Note(
                f"Episodes for {100 * POWER:.0f} % power at the {100 * ALPHA:.0f} % level, one"
                " checkpoint against another: McNemar's exact test on the same initial states, a z"
                " test on different ones."
            ),
            Heading("How it was made"),
            Facts({method.name: ", ".join(map(str, method.runs)) for method in comparison.methods}),
        ]
        verdict = f": {comparison.candidates[0].verdict}" if len(candidates) == 1 else ""
        write_html(path, f"{', '.join(candidates)} against {baseline}{verdict}", blocks)


def summary(comparison: Comparison) -> str:
    """Task, perturbation and initial states, and which of these are left out."""
    rows = [rows for method in comparison.methods for rows in method.rows]
    seeds = listed([str(seed) for seed in sorted({each[0].init_seed for each in rows})])
    of_seed = f" (set of seed {seeds})" if rows[0][0].checkpoint else ""  # else external rows
    limit = f", at most {comparison.max_steps} control steps" if comparison.max_steps else ""
    perturbation = rows[0][0].perturbation
    left_out = []
    if comparison.left_out:
        left_out.append(f"{comparison.left_out} that some run lacks")
    if comparison.faulty:
        left_out.append(f"{comparison.faulty} with a simulator error in some run")
    return (
        f"{comparison.task + ', ' * bool(comparison.task)}"
        f"{f'perturbed by {perturbation}, ' if perturbation else ''}"
        f"{counted(len(comparison.init_states), 'shared initial state')}{of_seed}{limit}"
        f"{'; left out: ' * bool(left_out)}{listed(left_out)}"
    )


def method_rate_rows(comparison: Comparison) -> Rows:
    """The rate of each method, below the titles."""
    rows = [["", "step", "seeds", "errors", "successes", "rate", "95 % interval"]]
    for method, rate in zip(comparison.methods, comparison.rates, strict=True):
        rows.append(
            [
                method.name,
                method.steps,
                str(len(method.runs)),
                str(method.errors),
                f"{rate.successes}/{rate.episodes}",
                percent(rate.value),
                f"{interval(rate)} %",
            ]
        )
    return rows


def difference_rows(comparison: Comparison) -> Rows:
    """The difference of each candidate from the baseline, below the titles."""
    adjusted = ["p (Holm)"] * (len(comparison.candidates) > 1)
    first = f"minus {comparison.baseline.name}"
    rows = [[first, "points", "95 % interval", "p", *adjusted, "verdict"]]
    for one in comparison.candidates:
        d = one.difference
        rows.append(
            [
                one.name,
                points(d.value),
                points_interval(d),
                p_value(d.p),
                *[p_value(one.p) for _ in adjusted],
                one.verdict,
            ]
        )
    return rows


def notes(comparison: Comparison) -> list[str]:
    """The tests behind the verdicts, and their limits."""
    baseline, found = comparison.baseline, []
    if len(comparison.methods) > 2:
        found.append(
            f"Not distinguishable from the best: {listed(comparison.best)}. With"
            f" {100 * (1 - ALPHA):.0f} % confidence, the best method is among them."
        )
    for one, method in zip(comparison.candidates, comparison.methods[1:], strict=True):
        single = [side.name for side in (baseline, method) if len(side.runs) == 1]
        if one.difference.checkpoint_pair:
            only_baseline, only_candidate = one.difference.discordant
            found.append(
                f"{one.name} alone solved {counted(only_candidate, 'initial state')},"
                f" {baseline.name} alone {only_baseline} (McNemar's exact test). This compares two"
                " checkpoints, not two methods: train more seeds and pass --group."
            )
        elif single:
            found.append(
                f"{one.name}: {single[0]} is a single checkpoint, so the variation between its"
                " training seeds is unknown."
            )
        if one.difference.seed_share > 0.5:
            found.append(
                f"{one.name}: {100 * one.difference.seed_share:.0f} % of the variance is between"
                " training seeds. Train more seeds; more episodes do not help."
            )
    if comparison.margin is None:
        return found
    found.append(
        f"Not inferior: worse by less than the margin of {100 * comparison.margin:g} points."
        f" Inferior: worse by more. Both at {100 * ALPHA / 2:g} % one-sided. The margin is valid"
        " only if it was chosen before the results were seen."
    )
    if untestable := [
        one.name for one in comparison.candidates if not (one.testable or one.better)
    ]:
        found.append(
            f"{baseline.name} itself solves no more than the margin, so no method can be worse"
            f" by the margin: whether {listed(untestable)} is inferior cannot be tested."
        )
    return found


def power_rows(comparison: Comparison, effect_sizes: Sequence[float]) -> Rows:
    """How many episodes would show a difference from the baseline's rate, on the same
    and on different initial states.
    """
    baseline, correlation = comparison.rates[0].value, comparison.correlation
    same = f"same initial states (correlation {correlation:.2f})"
    rows = [["rates", same, "different initial states"]]
    for effect in effect_sizes:
        other = baseline + effect if baseline + effect <= 1 else baseline - effect
        needed = [
            episodes_needed(baseline, other, correlation=r, power=POWER, alpha=ALPHA)
            for r in (correlation, None)
        ]
        paired, unpaired = (f"more than {MAX_EPISODES}" if n is None else str(n) for n in needed)
        rows.append([f"{100 * baseline:.1f} and {percent(other)}", paired, f"{unpaired} each"])
    return rows
