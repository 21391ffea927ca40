"""The report of a study: an answer in the first lines, then tables, plots and videos,
as one HTML page, as Markdown and as CSV.

    from pathlib import Path
    from fibopolicy.study.report import write_report

    page = write_report(Path("studies/encoders"))

A study need not be finished: runs that are missing or failed are listed and not
counted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import VIDEO_SIZE, check_video_size
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.report.document import (
    FRAME_COLOURS,
    Answers,
    Cell,
    Contents,
    DocumentBlock,
    Facts,
    Folded,
    Heading,
    Note,
    Picture,
    Table,
    Video,
    write_html,
    write_markdown,
)
from fibopolicy.report.plots import (
    Band,
    Interval,
    Tradeoff,
    band,
    plot_forest,
    plot_learning_curves,
    plot_levels,
    plot_tradeoffs,
)
from fibopolicy.report.tables import counted, listed, points, points_interval
from fibopolicy.statistics.compare import ALPHA
from fibopolicy.statistics.power import MAX_EPISODES, POWER
from fibopolicy.study.archive import SUFFIX, open_study
from fibopolicy.study.grid import in_file_name
from fibopolicy.study.records import State, Study
from fibopolicy.study.results import (
    EncoderComparison,
    StudyResults,
    Verdict,
    measured,
    results,
    task_name,
)
from fibopolicy.study.robustness import by_level, level_table, ranking_table, robustness, title
from fibopolicy.study.tables import (
    Row,
    by_task,
    cost_table,
    difference_table,
    missing_table,
    policy_settings_table,
    run_table,
    search_table,
    steps_text,
    success_by_policy_table,
    success_table,
    trial_table,
    write_csv,
)
from fibopolicy.utils.files import directory_lock

_log = logging.getLogger(__name__)

#: The report's folder within a study.
REPORT = "report"
#: More answers than this are counted instead of listed.
MAX_ANSWERS = 8
#: Initial states in each video, and videos in a report.
VIDEO_EPISODES, MAX_VIDEOS = 4, 12


def write_report(path: Path, *, videos: bool = False, video_size: int = VIDEO_SIZE) -> Path:
    """Write `report.html`, `report.md`, the plots, `conditions.csv`, `seeds.csv`,
    `comparisons.csv` and for a search `trials.csv`, into the folder `report` of a
    study, or into `NAME_report` beside an archive `NAME.study.zip`. An earlier report
    is replaced.

    Args:
        path: directory of the study, finished or not, or its archive.
        videos: record baseline and candidates side by side, which simulates the shown
            episodes again.
        video_size: height of each view, pixels.

    Returns:
        path of the page.

    Raises:
        UserError: `path` is not a study, or is corrupt; two seeds hold the same
            weights; another process is writing the report.
    """
    check_video_size(video_size)
    folder = path / REPORT
    if path.is_file():
        folder = path.with_name(f"{path.name.removesuffix(SUFFIX)}_{REPORT}")
    with open_study(path) as study:
        found = results(study)
        with directory_lock(folder):
            write_csv(found, folder)
            blocks = _blocks(found, folder, video_size if videos else None)
            write_markdown(folder / "report.md", study.name, blocks)
            write_html(folder / "report.html", study.name, blocks)
    return folder / "report.html"


def _blocks(found: StudyResults, folder: Path, video_size: int | None) -> list[DocumentBlock]:
    sections = [
        *_success(found),
        *_differences(found, folder),
        *_robustness(found, folder),
        *_search(found.study),
        *_costs(found, folder),
        *_learning_curves(found.study, folder),
        *_videos(found, folder / "videos", video_size),
        *_missing(found.study),
        *_how_it_was_made(found.study),
    ]
    headings = [block.text for block in sections if isinstance(block, Heading) and block.level == 2]
    notes = [Note(_tuning(found.study)), Note(_design(found))]
    return [Answers(answers(found)), *notes, Contents(headings), *sections]


# The answer.


def answers(found: StudyResults) -> list[tuple[str, str]]:
    """A mark ("good", "bad", "open") and a sentence for each encoder except the
    baseline; for each policy and init too, unless there are too many.
    """
    study = found.study
    candidates = [encoder for encoder in study.encoders if encoder != study.baseline]
    if not candidates:
        only = f"The study has no encoder besides {study.baseline}, so nothing is compared."
        return [("open", only)]
    if len(candidates) * len(study.settings) > MAX_ANSWERS:
        return [_counted_answer(found, candidate) for candidate in candidates]
    return [_answer(found, candidate, s) for candidate in candidates for s in study.settings]


def _answer(found: StudyResults, candidate: str, setting: tuple[str, str]) -> tuple[str, str]:
    """For example `fib against dense: **not inferior** (margin 5 points) on Lift
    (difference +1.0 points [-1.2, +3.3]); **undecided** on Push (...).`
    """
    study = found.study
    comparisons = [one for one in found.of(setting) if one.candidate == candidate]
    comparisons.sort(key=lambda one: one.task is not None)  # the mean over tasks first
    designs = {_sizes(one) for one in comparisons}
    clauses, unit = [], "difference {} points"
    for verdict in Verdict:
        places = []
        for one in comparisons:
            if one.verdict is verdict:
                places.append(_place(one, unit, _sizes(one) if len(designs) > 1 else ""))
                unit = "{}"
        if places:
            clauses.append(f"{_claim(study, verdict)} {listed(places)}")
    missing = [task for task in study.tasks if task not in {one.task for one in comparisons}]
    if not comparisons:
        clauses.append(_why_no_answer(found, candidate, study.tasks, [setting]))
    else:
        clauses += [
            f"on {task_name(task)} {_why_no_answer(found, candidate, [task], [setting])}"
            for task in missing
        ]
    prefix = f"{setting[0]}, {setting[1]}: " if len(study.settings) > 1 else ""
    closing = f" {designs.pop()} each." if len(designs) == 1 else ""
    sides = f"{study.label(candidate)} against {study.label(study.baseline)}"
    text = f"{prefix}{sides}: {'; '.join(clauses)}.{closing}"
    lost = _lost(found, candidate, [setting]) if comparisons else ""
    return _mark(comparisons, bool(missing or lost)), text + _caveat(comparisons) + lost


def _counted_answer(found: StudyResults, candidate: str) -> tuple[str, str]:
    """For example `fib against dense: **not inferior** (margin 5 points) in 5 of 5
    conditions, better in 2 of these (Lift bc scratch and Lift flow scratch).`
    """
    study = found.study
    comparisons = [one for one in found.comparisons if one.candidate == candidate and one.task]
    clauses = []
    for verdict in Verdict:
        if group := [one for one in comparisons if one.verdict is verdict]:
            text = f"{_claim(study, verdict)} in {len(group)} of {len(comparisons)} conditions"
            if verdict is Verdict.INFERIOR:
                text += _names(group)
            for direction in ("better", "worse"):
                if shown := [one for one in group if one.direction == direction]:
                    text += f", {direction} in {len(shown)} of these{_names(shown)}"
            clauses.append(text)
    missing = len(study.tasks) * len(study.settings) - len(comparisons)
    if not comparisons:
        clauses.append(_why_no_answer(found, candidate, study.tasks, study.settings))
    elif missing:
        clauses.append(f"no answer yet in {missing} more")
    sides = f"{study.label(candidate)} against {study.label(study.baseline)}"
    text = f"{sides}: {'; '.join(clauses)}."
    lost = _lost(found, candidate, study.settings) if comparisons else ""
    return _mark(comparisons, bool(missing or lost)), text + _caveat(comparisons) + lost


def _claim(study: Study, verdict: Verdict) -> str:
    """A verdict in words, in bold."""
    if study.margin is None:
        words = {Verdict.NOT_INFERIOR: "better", Verdict.INFERIOR: "worse"}
        return f"**{words.get(verdict, 'no difference shown')}**"
    margin = f"{100 * study.margin:g} points"
    detail = {
        Verdict.NOT_INFERIOR: f"margin {margin}",
        Verdict.INFERIOR: f"by more than {margin}",
        Verdict.UNTESTABLE: f"{study.baseline} itself solves no more than the margin of {margin}",
    }
    return f"**{verdict.value}**" + (f" ({detail[verdict]})" if verdict in detail else "")


def _place(one: EncoderComparison, unit: str, sizes: str) -> str:
    """For example `on Lift (difference -0.7 points [-3.1, +1.7])`."""
    d = one.difference
    text = f"{unit.format(points(d.value))} {points_interval(d)}"
    text += f", {sizes}" if sizes else ""
    text += f", {one.direction} than {one.baseline}" if one.direction else ""
    if one.lacks_seeds:
        text += ": one side has a single training seed"
    elif one.verdict is Verdict.UNDECIDED:
        size = one.needed
        episodes = f"{size.seeds * size.init_states:,}" if size else f"more than {MAX_EPISODES:,}"
        tasks = " on each task" if one.task is None else ""
        text += f": {episodes} episodes{tasks} would be needed"
    where = one.subject if one.task else f"average over {len(one.pairs)} tasks"
    return f"on {where} ({text})"


def _sizes(one: EncoderComparison) -> str:
    """For example `3 seeds x 100 initial states`."""
    baseline, candidate = one.seeds
    against = f" against {baseline} of {one.baseline}" if baseline != candidate else ""
    return f"{counted(candidate, 'seed')}{against} x {one.init_states} initial states"


def _names(group: Sequence[EncoderComparison]) -> str:
    """Where, unless these are too many to list."""
    if len(group) > MAX_ANSWERS:
        return ""
    return f" ({listed([f'{one.subject} {one.policy} {one.init}' for one in group])})"


def _why_no_answer(
    found: StudyResults, candidate: str, tasks: Sequence[str], settings: Sequence[tuple[str, str]]
) -> str:
    unfinished = False
    for encoder in (candidate, found.study.baseline):
        states = _states(found.study, encoder, tasks, settings)
        if State.DONE in states:
            continue
        unfinished = True
        if failed := states.count(State.FAILED):
            yet = "" if failed == len(states) else " yet"
            runs = f"{failed} of {len(states)} runs of {encoder}"
            return f"no answer{yet}: {runs} failed, none is finished"
    if unfinished:
        return "no answer yet: both need finished runs"
    return "no answer: the finished runs cannot be paired, see below"


def _lost(found: StudyResults, candidate: str, settings: Sequence[tuple[str, str]]) -> str:
    """The runs that failed, for example because the loss exploded: without them, an
    encoder that often trains badly looks better than it is.
    """
    study, lost = found.study, []
    for encoder in (candidate, study.baseline):
        states = _states(study, encoder, study.tasks, settings)
        if failed := states.count(State.FAILED):
            lost.append(f"{failed} of {len(states)} runs of {encoder}")
    return f" Caveat: {listed(lost)} failed and are not counted." if lost else ""


def _states(
    study: Study, encoder: str, tasks: Sequence[str], settings: Sequence[tuple[str, str]]
) -> list[State]:
    return [
        run.state
        for one in study.conditions
        if one.encoder == encoder and one.task in tasks and one.setting in settings
        for run in one.runs
    ]


def _mark(comparisons: Sequence[EncoderComparison], missing: bool) -> str:
    """The worst mark of some comparisons."""
    marks = {one.verdict.mark for one in comparisons} | ({"open"} if missing else set())
    return next(mark for mark in ("bad", "open", "good") if mark in marks)


def _caveat(comparisons: Sequence[EncoderComparison]) -> str:
    of_tasks = [one for one in comparisons if one.task]
    single = [one for one in of_tasks if one.difference.checkpoint_pair]
    if not single:
        return ""
    where = "" if len(single) == len(of_tasks) else f" on {listed([one.subject for one in single])}"
    return f" Caveat: single checkpoints{where}; the variation between training seeds is unknown."


def _tuning(study: Study) -> str:
    """How the settings of the encoders were chosen."""
    search, for_encoder = study.config.search, study.config.tuned_for
    stated = "for which encoder these were chosen is not stated."
    if for_encoder:
        stated = f"these were chosen for {for_encoder}."
    if search is None:
        return f"Without a search: all encoders have the same settings; {stated}"
    text = (
        f"Equal search for every encoder, from {search.describe()}. Its training seed"
        f" ({search.seed}) and initial states (set of seed {search.init_seed}) are in no result."
    )
    for one in study.config.encoders:
        if one.untuned:
            text += f" {one.name} is untuned ({one.untuned}) and has the study's settings; {stated}"
    return text


def _design(found: StudyResults) -> str:
    """What was compared, how often, and what does not count, in one paragraph."""
    study = found.study
    runs = [run for one in study.conditions for run in one.runs]
    done = sum(run.state is State.DONE for run in runs)
    axes = (
        counted(len(study.tasks), "task"),
        counted(len(study.encoders), "encoder"),
        counted(len(study.policies), "policy", "policies"),
        counted(len(study.inits), "init"),
        counted(len(study.seeds), "training seed"),
    )
    finished = "all are finished"
    if done < len(runs):
        finished = f"{done} are finished; the others are listed below and not counted"
    text = (
        f"{' x '.join(axes)}: {len(runs)} runs of {_steps(study)}, of which {finished}. Each run is"
        f" evaluated on the same {study.episodes} initial states of its task, which are not used in"
        " training. The last checkpoint counts; none was selected."
    )
    if (number := len(found.comparisons)) > 1:
        text += f" Verdicts hold for all {number} comparisons together (Holm)."
    return text + _looks(found)


def _looks(found: StudyResults) -> str:
    """The looks at the study: planned ones, and which is shown, or unplanned ones."""
    looks, earlier = found.study.config.looks, found.study.seeds_before_extension
    if earlier:
        return (
            f" Seeds were added when the results of {listed([str(n) for n in earlier])} could be"
            " read. Intervals and p-values do not allow for such a choice; planned looks do."
        )
    if not looks:
        return ""
    planned = listed([str(seeds) for seeds in looks])
    text = f" Verdicts were planned after {planned} training seeds; the looks share the 5 %."
    if not found.looks:
        return f"{text} None is complete."
    end = ", where the study was decided" if found.decided and found.looks < len(looks) else ""
    return f"{text} Shown is look {found.looks}, after {looks[found.looks - 1]} seeds{end}."


def _steps(study: Study) -> str:
    """For example `1000 gradient steps`, or `800 gradient steps with bc, 500 with flow`."""
    policies: dict[str, list[str]] = {}
    for policy in study.policies:
        policies.setdefault(steps_text(study, policy), []).append(policy)
    first, *others = policies
    if not others:
        return f"{first} gradient steps"
    parts = [f"{first} gradient steps with {listed(policies[first])}"]
    return ", ".join([*parts, *(f"{steps} with {listed(policies[steps])}" for steps in others)])


# The sections of the page.


def _robustness(found: StudyResults, folder: Path) -> list[DocumentBlock]:
    """For each task, success by perturbation and level, and the ranking."""
    study = found.study
    blocks: list[DocumentBlock] = []
    labels = [study.label(encoder) for encoder in study.encoders]
    for task in study.tasks if study.config.perturbations else ():
        for setting in study.settings:
            if each := robustness(found, task, setting):
                path = _plot(folder, f"levels_{in_file_name(task_name(task))}", study, setting)
                plot_levels(by_level(study, each), labels, path)
                blocks += [
                    Heading(title(study, task, setting), 3),
                    Picture(path, f"success against level, {title(study, task, setting)}"),
                    Table(level_table(study, each)),
                    Table(ranking_table(study, each)),
                ]
    if not blocks:
        return []
    note = (
        "Every run is evaluated on the same initial states without and with each perturbation. In"
        " brackets: mean over the levels minus clean, in points, with the 95 % interval of this"
        " paired change over training seeds and initial states. Rank: by the mean over all"
        " perturbations; a range where no difference between encoders is shown (95 % confidence,"
        " Bonferroni for the comparisons of each encoder); none for a single training seed."
    )
    return [Heading("Robustness"), *blocks, Note(note)]


def _titled(study: Study, setting: tuple[str, str]) -> list[DocumentBlock]:
    """A heading with policy and init, if there are several."""
    return [Heading(", ".join(setting), 3)] if len(study.settings) > 1 else []


def _plot(folder: Path, name: str, study: Study, setting: tuple[str, str]) -> Path:
    """File of a plot, with policy and init in its name if there are several."""
    ending = "".join(f"_{in_file_name(part)}" for part in setting)
    return folder / f"{name}{ending if len(study.settings) > 1 else ''}.svg"


def _success(found: StudyResults) -> list[DocumentBlock]:
    study, blocks = found.study, [Heading("Success"), *_success_tables(found)]
    if len(study.seeds) == 1:
        note = (
            "Percent of episodes solved by one training seed, with 95 % Wilson intervals that hold"
            " for other initial states. The variation between training seeds is unknown."
        )
    else:
        note = (
            "Percent of episodes solved, over training seeds, with 95 % intervals that hold for"
            " other training seeds and initial states (the limit of a two-level bootstrap over"
            " both). If only one seed is finished, they hold for other initial states only. Caveat:"
            " if a method occasionally trains badly, few seeds often miss that, and its interval is"
            " too narrow."
        )
    blocks.append(Note(note))
    if errors := sum(one.errors for one in found.conditions):
        blocks.append(Note(f"Not counted: {counted(errors, 'episode')} with a simulator error."))
    return blocks


def _success_tables(found: StudyResults) -> list[DocumentBlock]:
    """Encoders by tasks for each init; or with several policies, policies by encoders
    for each task.
    """
    study = found.study
    blocks: list[DocumentBlock] = []
    if len(study.policies) == 1:
        for setting in study.settings:
            blocks += [*_titled(study, setting), Table(success_table(found, setting))]
        return blocks
    tasks: list[str | None] = [*study.tasks, *[None] * (len(study.tasks) > 1)]
    for init in study.inits:
        for task in tasks:
            title = [task_name(task) if task else "Mean over tasks"]
            title += [init] * (len(study.inits) > 1)
            blocks += [
                Heading(", ".join(title), 3),
                Table(success_by_policy_table(found, task, init)),
            ]
    note = (
        "Compare encoders along a row. Policies differ in more than their network; their settings"
        " are listed below."
    )
    return [*blocks, Note(note)]


def _differences(found: StudyResults, folder: Path) -> list[DocumentBlock]:
    study, number = found.study, len(found.comparisons)
    if not found.comparisons and not found.unpaired:
        return []
    blocks: list[DocumentBlock] = [Heading(f"Differences from {study.baseline}")]
    for setting in study.settings:
        if comparisons := found.of(setting):
            path = _plot(folder, "differences", study, setting)
            plot_forest(_intervals(comparisons), study.baseline, study.margin, path)
            alt = f"differences from {study.baseline} with 95 % intervals, {', '.join(setting)}"
            table = Table(difference_table(study, comparisons), words=("verdict", "to decide"))
            blocks += [*_titled(study, setting), Picture(path, alt), table]
    blocks += map(Note, found.unpaired)
    if not number:
        return blocks
    method = (
        "Points are percent of episodes, candidate minus baseline on the same initial states, with"
        " 95 % intervals. For single checkpoints these are Bonett and Price's, with McNemar's"
        " exact p; otherwise Student's, over training seeds and initial states."
    )
    if found.looks and (plan := study.config.look_plan):
        method += (
            " They may be read at every planned look: at this one they are"
            f" {100 * (1 - plan.nominal(found.looks - 1)):.4g} % intervals, since the looks share"
            " the 5 %. Corrected p values and verdicts account for the looks, too."
        )
    if number > 1:
        method += (
            f" Each interval is for one comparison. p values and verdicts are corrected by Holm"
            f" for all {number} comparisons of this study, so a verdict can be stricter than its"
            " interval."
        )
    blocks.append(Note(method))
    if study.margin is not None:
        blocks.append(
            Note(
                f"Not inferior: worse by less than {100 * study.margin:g} points, the margin in"
                f" study.json. Inferior: worse by more. Both at {100 * ALPHA / 2:g} % one-sided."
                " The margin is valid only if it was chosen before the results were seen."
                " Untestable: the baseline itself solves no more than the margin."
            )
        )
    blocks.append(
        Note(
            "To decide: the episodes for each encoder and task that would decide with"
            f" {100 * POWER:.0f} % power after the same correction, if the true difference is the"
            " observed one. If training seeds differ much, more seeds are needed, not more"
            " episodes."
        )
    )
    return blocks


def _intervals(comparisons: Sequence[EncoderComparison]) -> dict[str, list[Interval]]:
    """The intervals of a forest plot, by task."""
    groups: dict[str, list[Interval]] = {}
    for one in by_task(comparisons):
        d = one.difference
        interval = Interval(one.candidate, d.value, d.low, d.high, one.verdict.value)
        groups.setdefault(one.subject, []).append(interval)
    return groups


def _search(study: Study) -> list[DocumentBlock]:
    if (search := study.config.search) is None:
        return []
    note = (
        "Successes of each trial on the same initial states, and the training loss (mean of the"
        " last ten logged). In each rung a trial is a complete training with its own learning-rate"
        " schedule, for a share of the steps. The half with the most successes enters the next"
        " rung; ties are broken by the lower loss, then by the order of the settings. The best of"
        " the last rung is chosen."
    )
    if search.rungs[-1][0] < 1:
        note += " Caveat: settings that are best for fewer steps may not be best for all."
    return [
        Heading("Search"),
        Table(search_table(study), words=("chosen",)),
        Table(trial_table(study), words=("setting",)),
        Note(note),
    ]


def _costs(found: StudyResults, folder: Path) -> list[DocumentBlock]:
    study = found.study
    blocks: list[DocumentBlock] = [Heading("Success against cost")]
    for setting in study.settings:
        blocks += _titled(study, setting)
        if panels := _tradeoffs(found, setting):
            path = _plot(folder, "cost", study, setting)
            columns = {"encoder, ms (batch 1)": True, "training samples/s": False}
            plot_tradeoffs(panels, columns, study.encoders, path)
            alt = f"success against latency and training throughput, {', '.join(setting)}"
            blocks.append(Picture(path, alt))
        blocks.append(Table(cost_table(study, setting)))
    note = (
        "Dots: success with its 95 % interval. Line: encoders that no other beats in both."
        " Parameters, MACs (of one frame) and milliseconds are the encoder's. Milliseconds were"
        " measured in one interleaved run of all encoders; in brackets the multiple of the"
        " baseline's on the same task, geometric mean over tasks. Samples, memory and steps are"
        " medians over runs, with their range. Caveat: runs may have shared their machine, so"
        " compare encoders by the interleaved milliseconds."
    )
    return [*blocks, Note(note)]


def _tradeoffs(found: StudyResults, setting: tuple[str, str]) -> dict[str, list[Tradeoff]]:
    """Success and costs of the encoders by task, where any cost was measured."""
    panels = {}
    for task in found.study.tasks:
        methods = []
        for encoder in found.study.encoders:
            one = found.condition(task, encoder, setting)
            if one.rate is not None:
                costs = (measured([one.record], n) for n in ("encoder_ms_1", "samples_per_s"))
                medians = tuple(median(values) if values else None for values in costs)
                methods.append(Tradeoff(encoder, one.rate, medians))
        if any(cost is not None for method in methods for cost in method.costs):
            panels[task_name(task)] = methods
    return panels


#: Logged metrics with a learning curve, and their names in print.
_CURVES = {
    "loss": "training loss",
    "validation_loss": "validation loss",
    "rollout_success": "success in rollouts",
}


def _learning_curves(study: Study, folder: Path) -> list[DocumentBlock]:
    blocks: list[DocumentBlock] = []
    for setting in study.settings:
        curves: dict[str, dict[str, dict[str, Band]]] = {}
        for one in study.conditions:
            if one.setting == setting:
                logged = [RunDirectory(run.folder).read_metrics() for run in one.done]
                for name, title in _CURVES.items():
                    seeds = [_curve(rows, name) for rows in logged]
                    if drawn := band(seeds, one.steps):
                        by_title = curves.setdefault(task_name(one.task), {})
                        by_title.setdefault(title, {})[one.encoder] = drawn
        if curves:
            path = _plot(folder, "curves", study, setting)
            plot_learning_curves(curves, study.encoders, path)
            blocks += [
                *_titled(study, setting),
                Picture(path, f"learning curves, {', '.join(setting)}"),
            ]
    if not blocks:
        return []
    note = "Mean over training seeds and neighbouring steps. Band: the range over seeds."
    return [Heading("Learning curves"), *blocks, Note(note)]


def _curve(rows: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """The finite values `(n, 2)` of a logged metric: step, value."""
    values = [(row["step"], row[name]) for row in rows if {"step", name} <= row.keys()]
    curve = np.array(values, dtype=float).reshape(-1, 2)
    finite: NDArray[np.float64] = curve[np.isfinite(curve).all(axis=1)]
    return finite


def _videos(found: StudyResults, folder: Path, size: int | None) -> list[DocumentBlock]:
    shown, problems = pair_videos(found, folder, size)
    if not shown and not problems:
        return []
    blocks: list[DocumentBlock] = [Heading("Side by side")]
    for one, path in shown:
        where = [one.subject, *(one.setting if len(found.study.settings) > 1 else ())]
        title = f"{', '.join(where)}: {one.baseline} and {one.candidate}"
        blocks += [Heading(title, 3), Video(path)]
    note = (
        "The first training seeds of both, on initial states that only one solved. They show"
        f" failures and do not count them. {FRAME_COLOURS}"
    )
    return [*blocks, Note(note), *map(Note, problems)]


def pair_videos(
    found: StudyResults, folder: Path, size: int | None
) -> tuple[list[tuple[EncoderComparison, Path]], list[str]]:
    """Videos of baseline and candidate on initial states that only one of them solved,
    by the first seed of each.

    Args:
        folder: folder of the videos. A video that is newer than the rows of both is
            kept.
        size: height of the views of videos that are missing, pixels; with `None`, use
            only the videos that exist.

    Returns:
        the videos, and why others are missing, in one line each.
    """
    shown: list[tuple[EncoderComparison, Path]] = []
    problems: list[str] = []
    for one in found.comparisons:
        if one.task is None:
            continue
        pair = one.pairs[0]
        baseline, candidate = (method.outcomes(pair.init_states)[0] for method in pair.methods)
        if not (differing := int((baseline != candidate).sum())):
            continue
        name = "__".join(map(in_file_name, (one.subject, one.candidate, *one.setting)))
        path = folder / f"{name}.mp4"
        rows = [RunDirectory(method.runs[0]).episodes for method in pair.methods]
        if path.is_file() and path.stat().st_mtime > max(each.stat().st_mtime for each in rows):
            shown.append((one, path))
        elif size is not None and len(shown) < MAX_VIDEOS:
            _log.info("filming %s against %s on %s", one.candidate, one.baseline, one.subject)
            try:
                write_pair_video(found.study, one, path, min(VIDEO_EPISODES, differing), size)
                shown.append((one, path))
            except UserError as error:
                where = f"{one.candidate} on {one.subject}, {', '.join(one.setting)}"
                problems.append(f"{where} could not be filmed: {error}")
        elif size is not None:
            problems.append(f"Only {MAX_VIDEOS} pairs are filmed.")
            break
    return shown[:MAX_VIDEOS], problems


def write_pair_video(
    study: Study, one: EncoderComparison, path: Path, episodes: int, size: int
) -> None:
    """Write the video of a comparison.

    Raises:
        UserError: the study no longer holds the checkpoints or initial states of the
            rows.
    """
    # These load torch and the simulators, which a report without videos does not need.
    from fibopolicy.evaluation.init_states import load_init_states
    from fibopolicy.evaluation.side_by_side import write_side_by_side

    pair = one.pairs[0]
    for init_states in sorted((study.path / "init_states").glob("*.npz")):
        stored = load_init_states(init_states)
        if set(pair.init_states) <= {stored.identity(i) for i in range(len(stored))}:
            write_side_by_side(pair, path, episodes, init_states, size=size)
            return
    raise UserError(
        f"{study.path / 'init_states'}: holds no file with the initial states of {one.subject}"
    )


def _missing(study: Study) -> list[DocumentBlock]:
    table = missing_table(study)
    if len(table) == 1:
        return []
    return [Heading("Missing and failed"), Table(table, words=("state", "error", "log"))]


def _how_it_was_made(study: Study) -> list[DocumentBlock]:
    document, environment = study.document, study.environment
    hardware = [str(environment[n]) for n in ("processor", "gpu") if environment.get(n)]
    if cores := environment.get("cores"):
        hardware.append(counted(cores, "core"))
    if load := environment.get("load"):
        hardware.append(f"load {load[0]:.1f} when the study started")
    margin = study.margin
    facts = {
        **{f"task {task_name(one['task'])}": _task(one) for one in document["tasks"]},
        "encoders": "; ".join(_encoder(one, study.inits) for one in document["encoders"]),
        "inits": ", ".join(study.inits),
        "training seeds": ", ".join(map(str, study.seeds)),
        "initial states": f"{study.episodes} for each task, set of seed {study.init_seed}",
        "margin": "none" if margin is None else f"{100 * margin:g} points",
        "hardware": ", ".join(hardware),
        "threads": f"{document['threads']} for each run",
        "versions": ", ".join(f"{name} {version}" for name, version in study.versions.items()),
        "date": str(environment.get("date") or ""),
    }
    return [
        Heading("How it was made"),
        Facts({name: fact for name, fact in facts.items() if fact}),
        Table(policy_settings_table(study), words=("policy", "optimizer")),
        Note("Options that the study sets; the others have their default values."),
        Folded("Every run", [Table(run_table(study), words=("state", "video"))]),
        Table(_files(study), words=("content",)),
    ]


def _task(one: Mapping[str, Any]) -> str:
    """The demonstrations of a task, and what the policy sees."""
    if one["dataset"]:
        parts = [f"demonstrations of {Path(one['dataset']).name}"]
    else:
        size = one["image_size"]
        parts = [
            f"{one['demos']} demonstrations of its scripted expert (seed {one['collect_seed']})",
            f"{size} x {size} pixels in {one['quality']} quality",
        ]
    if one["filter_key"]:
        parts.append(f"filter key {one['filter_key']}")
    cameras = one["cameras"]
    plural = "s" * (cameras is not None and len(cameras) != 1)
    parts.append("all cameras" if cameras is None else f"camera{plural} {listed(cameras)}")
    if one["max_steps"] is not None:
        parts.append(f"at most {one['max_steps']} control steps")
    return ", ".join(parts)


def _encoder(one: Mapping[str, Any], inits: Sequence[str]) -> str:
    name, encoder = one["name"], one["encoder"]
    text = name if name == encoder else f"{name} = {encoder}"
    if options := one["options"]:
        text += f" ({', '.join(f'{key} {value}' for key, value in options.items())})"
    if one["weights"] and (one["init"] or inits != ("scratch",)):
        text += f", from {Path(one['weights']).name}"
    if one["init"]:
        text += f", {one['init']}"
    return text


def _files(study: Study) -> list[Row]:
    """The files of the report and of the study, with links."""
    report = {
        "conditions.csv": "success and costs of each condition, unrounded",
        "seeds.csv": "every run: rate, state, times",
        "comparisons.csv": "every difference: interval, p raw and adjusted, verdict",
        "report.md": "this report in Markdown",
    }
    if study.config.search is not None:
        report["trials.csv"] = "every trial of the search: setting, successes, loss, cost"
    inputs = {
        "study.json": "the study",
        "environment.json": "hardware, versions and date",
        "checks.txt": "results of the checks before the first run",
    }
    table: list[Row] = [["file", "content"]]
    table += [[Cell(name, name), content] for name, content in report.items()]
    for name, content in inputs.items():
        if link := study.link(study.path / name):
            table.append([Cell(name, link), content])
    return table
