"""Write a study's report: Markdown, CSV, pictures, and one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fibopolicy.report import page
from fibopolicy.statistics.compare import ALPHA
from fibopolicy.statistics.power import POWER
from fibopolicy.study.archive import SUFFIX, open_study
from fibopolicy.study.grid import in_file_name
from fibopolicy.study.records import State, Study
from fibopolicy.study.report.answer import answers, listed
from fibopolicy.study.report.csv_files import write_cells, write_comparisons, write_seeds
from fibopolicy.study.report.curves import QUANTITIES, Band, band, read_curves
from fibopolicy.study.report.document import (
    Answers,
    Block,
    Contents,
    Facts,
    Film,
    Folded,
    Heading,
    Note,
    Picture,
    Table,
    to_markdown,
)
from fibopolicy.study.report.plots import plot_curves, plot_forest, plot_pareto
from fibopolicy.study.report.results import Results, printed, results
from fibopolicy.study.report.tables import (
    cost_table,
    difference_table,
    head_settings_table,
    missing_table,
    run_table,
    success_by_head_table,
    success_table,
)
from fibopolicy.study.report.videos import films
from fibopolicy.utils.files import atomic_write, directory_lock

#: What no interval over a few seeds holds; measured for
#: `fibopolicy.statistics.differences.Difference`.
FEW_SEEDS = (
    "Few seeds cannot show a kind of seed that is rare: where a method trains badly once in a"
    " while, few seeds often miss that, and its intervals are too good."
)
#: The report's folder within a study.
REPORT = "report"


def write_report(path: Path, *, videos: bool = False) -> Path:
    """Write the report of a study: `report.html`, `report.md`, `cells.csv`, `seeds.csv`,
    `comparisons.csv` and the pictures, in the study's folder `report`, or beside an
    archive `NAME.study.zip` in `NAME_report`.

    Everything comes from the rows as they are now; runs that are missing or failed are
    shown as such, and an earlier report is replaced.

    Args:
        path: directory of the study, finished or not, or its archive.
        videos: film control and candidates side by side, which simulates the shown
            episodes once more.

    Returns:
        the page.

    Raises:
        UserError: no study, a damaged description, two seeds with the same weights,
            another process writing the report.
    """
    folder = path / REPORT
    if path.is_file():
        folder = path.with_name(f"{path.name.removesuffix(SUFFIX)}_{REPORT}")
    with open_study(path) as study:
        found = results(study)
        _write(found, folder, videos=videos)
    return folder / "report.html"


def _write(found: Results, folder: Path, *, videos: bool) -> None:
    with directory_lock(folder):
        write_cells(found, folder / "cells.csv")
        write_seeds(found, folder / "seeds.csv")
        write_comparisons(found, folder / "comparisons.csv")
        blocks = _blocks(found, folder, videos=videos)
        with atomic_write(folder / "report.md") as aside:
            aside.write_text(to_markdown(found.study.name, blocks), encoding="utf-8")
        title = found.study.name
        page.write_page(folder / "report.html", title, [block.html() for block in blocks])


def _blocks(found: Results, folder: Path, *, videos: bool) -> list[Block]:
    sections = [
        *_success(found),
        *_differences(found, folder),
        *_costs(found, folder),
        *_curves(found.study, folder),
        *_films(found, folder, make=videos),
        *_missing(found),
        *_made(found.study),
    ]
    headings = [block.text for block in sections if isinstance(block, Heading) and block.level == 2]
    return [
        Answers(answers(found)),
        Note(_design(found.study, len(found.comparisons))),
        Contents(headings),
        *sections,
    ]


def _design(study: Study, comparisons: int) -> str:
    """What was compared, how often, and what does not count, in one paragraph."""
    runs = [run for cell in study.conditions for run in cell.runs]
    done = sum(run.state is State.DONE for run in runs)
    counts = [
        _number(len(study.tasks), "task"),
        _number(len(study.encoders), "encoder"),
        _number(len(study.heads), "policy head"),
        _number(len(study.inits), "init"),
        _number(len(study.seeds), "training seed"),
    ]
    together = (
        f" Verdicts hold for all {comparisons} comparisons together (Holm)."
        if comparisons > 1
        else ""
    )
    ready = (
        "all are finished"
        if done == len(runs)
        else f"{done} are finished, the others are listed below and count nowhere"
    )
    return (
        f"{' x '.join(counts)}: {len(runs)} runs of {_steps(study)}, of which {ready}. Each is"
        f" measured on the same {study.episodes} initial states of its task, which no training saw."
        f" The last checkpoint counts; none was selected.{together}"
    )


def _steps(study: Study) -> str:
    """`1000 gradient steps`, or where heads differ `800 gradient steps with bc and
    bc_gmm, 500 with flow`.
    """
    heads: dict[int, list[str]] = {}
    for head, steps in study.steps.items():
        heads.setdefault(steps, []).append(head)
    if len(heads) == 1:
        return f"{next(iter(heads))} gradient steps"
    told = [
        f"{steps}{' gradient steps' * (i == 0)} with {listed(names)}"
        for i, (steps, names) in enumerate(heads.items())
    ]
    return ", ".join(told)


def _number(n: int, name: str) -> str:
    return f"{n} {name}{'s' * (n != 1)}"


def _titled(study: Study, setting: tuple[str, str]) -> list[Block]:
    return [Heading(", ".join(setting), 3)] if len(study.settings) > 1 else []


def _success(found: Results) -> list[Block]:
    blocks: list[Block] = [Heading("Success"), *_success_tables(found)]
    blocks.append(
        Note(
            "Percent of episodes solved by one training seed, with 95 % Wilson intervals for what"
            " other initial states would give; what other seeds would give is unknown."
            if len(found.study.seeds) == 1
            else (
                "Percent of episodes solved, over training seeds, with 95 % intervals for what"
                " other seeds and other initial states would give (the limit of a two-level"
                " bootstrap over both); where one seed alone is finished, for other initial states"
                f" only. {FEW_SEEDS}"
            )
        )
    )
    errors = sum(one.errors for one in found.cells)
    if errors:
        blocks.append(
            Note(
                f"{_number(errors, 'episode')} that a simulator could not run to the end: they"
                " count nowhere."
            )
        )
    return blocks


def _success_tables(found: Results) -> list[Block]:
    """Encoders against tasks, init by init; with several heads those against
    encoders, task by task.
    """
    study = found.study
    blocks: list[Block] = []
    if len(study.heads) == 1:
        for setting in study.settings:
            blocks += [*_titled(study, setting), Table(success_table(found, setting))]
        return blocks
    tasks: list[str | None] = [*study.tasks, *[None] * (len(study.tasks) > 1)]
    for init in study.inits:
        for task in tasks:
            title = [
                printed(task) if task is not None else "Mean over tasks",
                *[init] * (len(study.inits) > 1),
            ]
            blocks += [
                Heading(", ".join(title), 3),
                Table(success_by_head_table(found, task, init)),
            ]
    note = (
        "Encoders are compared along a row. Heads differ in more than their network: how each was"
        " trained stands below."
    )
    return [*blocks, Note(note)]


def _differences(found: Results, folder: Path) -> list[Block]:
    study = found.study
    if not found.comparisons and not found.unpaired:
        return []
    blocks: list[Block] = [Heading(f"Differences from {study.baseline}")]
    for i, setting in enumerate(study.settings):
        if comparisons := found.of(setting):
            path = folder / _named("differences", i, study)
            plot_forest(comparisons, study.baseline, study.margin, path)
            told = (
                f"differences from {study.baseline} with 95 % intervals, by task,"
                f" {', '.join(setting)}"
            )
            blocks += [*_titled(study, setting), Picture(path, told)]
            blocks.append(
                Table(difference_table(comparisons, study), words=("verdict", "to decide"))
            )
    blocks += [Note(reason) for reason in found.unpaired]
    if not found.comparisons:
        return blocks
    told = (
        "Points are percent of episodes, candidate minus control on the same initial states, with"
        " 95 % intervals: Bonett and Price's for a checkpoint against a checkpoint, beside"
        " McNemar's exact p; else Student's over seeds and initial states."
    )
    if (m := len(found.comparisons)) > 1:
        told += (
            " Each interval stands for itself; p values and verdicts are corrected by Holm for all"
            f" {m} comparisons of this study, so a verdict can be stricter than its interval looks."
        )
    blocks.append(Note(told))
    if study.margin is not None:
        blocks.append(
            Note(
                f"Not inferior: worse by less than {100 * study.margin:g} points, the margin in"
                f" study.json; inferior: worse by more; each at {100 * ALPHA / 2:g} % one-sided."
                " The margin counts only if it was fixed before the rows were seen. Untestable:"
                " the control itself solves no more than the margin."
            )
        )
    blocks.append(
        Note(
            "To decide: the episodes per encoder and task that would settle it with"
            f" {100 * POWER:.0f} % power after the same correction, if the true difference is the"
            " one seen and varies as it did. Where training seeds differ much, more seeds are"
            " asked for, not more episodes."
        )
    )
    return blocks


def _costs(found: Results, folder: Path) -> list[Block]:
    study = found.study
    blocks: list[Block] = [Heading("Success against cost")]
    for i, setting in enumerate(study.settings):
        path = folder / _named("cost", i, study)
        blocks += _titled(study, setting)
        if plot_pareto(found, setting, path):
            blocks.append(
                Picture(
                    path,
                    "success against encoder latency and training throughput,"
                    f" {', '.join(setting)}",
                )
            )
        blocks.append(Table(cost_table(study, setting)))
    blocks.append(
        Note(
            "Dots: success with its 95 % interval. Line: encoders that no other beats in both."
            " Parameters, MACs (one frame) and milliseconds are the encoder's, all timed in one"
            " interleaved run; in brackets the multiple of the control's on the same task,"
            " geometric mean over tasks. Samples, memory and steps are medians over runs with the"
            " lowest and the highest. Runs may have shared their machine: where they scatter, the"
            " interleaved milliseconds tell encoders apart, not these."
        )
    )
    return blocks


def _curves(study: Study, folder: Path) -> list[Block]:
    blocks: list[Block] = []
    for i, setting in enumerate(study.settings):
        curves: dict[str, dict[str, dict[str, Band]]] = {}
        for cell in study.conditions:
            if cell.setting == setting:
                logged = [read_curves(run.folder) for run in cell.done]
                for name, title in QUANTITIES.items():
                    if drawn := band(
                        [one[name] for one in logged if name in one], study.steps[cell.head]
                    ):
                        curves.setdefault(printed(cell.task), {}).setdefault(title, {})[
                            cell.encoder
                        ] = drawn
        if curves:
            path = folder / _named("curves", i, study)
            plot_curves(curves, study.encoders, path)
            blocks += [
                *_titled(study, setting),
                Picture(path, f"learning curves, {', '.join(setting)}"),
            ]
    if blocks:
        note = Note(
            "Mean over training seeds and over neighbouring steps; the band reaches from the lowest"
            " to the highest seed."
        )
        blocks = [Heading("Learning curves"), *blocks, note]
    return blocks


def _films(found: Results, folder: Path, *, make: bool) -> list[Block]:
    shown, told = films(found, folder / "videos", make=make)
    if not shown and not told:
        return []
    blocks: list[Block] = [Heading("Side by side")]
    for one, path in shown:
        where = (
            one.subject
            if len(found.study.settings) == 1
            else f"{one.subject}, {one.head}, {one.init}"
        )
        blocks += [Heading(f"{where}: {one.control} and {one.candidate}", 3), Film(path)]
    blocks.append(
        Note(
            "The same initial states, by the first training seed of either, those that one alone"
            " solved: chosen to show failures, not to count them. Grey frame: running. Green:"
            " success. Red: not solved within the horizon."
        )
    )
    return [*blocks, *map(Note, told)]


def _missing(found: Results) -> list[Block]:
    table = missing_table(found.study)
    if len(table) == 1:
        return []
    return [Heading("Missing and failed"), Table(table, words=("state", "error", "log"))]


def _made(study: Study) -> list[Block]:
    document, environment = study.document, study.environment
    facts = {
        **{f"task {printed(str(one['task']))}": _task(one) for one in document["tasks"]},
        "encoders": "; ".join(_encoder(one, study.inits) for one in document["encoders"]),
        "inits": ", ".join(study.inits),
        "training seeds": ", ".join(map(str, study.seeds)),
        "initial states": f"{study.episodes} per task, set of seed {study.init_seed}",
        "margin": "none" if study.margin is None else f"{100 * study.margin:g} points",
        "hardware": _hardware(environment),
        "threads": f"{document['threads']} per run",
        "versions": ", ".join(f"{name} {version}" for name, version in study.versions.items()),
        "date": str(environment.get("date") or ""),
    }
    files: list[list[page.Cell]] = [
        [page.Link(name, name), holds] for name, holds in _FILES.items()
    ]
    links = {name: study.link(study.path / name) for name in _STUDY_FILES}
    files += [[page.Link(name, link), _STUDY_FILES[name]] for name, link in links.items() if link]
    return [
        Heading("How it was made"),
        Facts({name: fact for name, fact in facts.items() if fact}),
        Table(head_settings_table(study), words=("policy", "optimiser")),
        Note(
            "What the study sets of each head's runs; all else is the head's own or training's"
            " default."
        ),
        Folded("Every run", [Table(run_table(study), words=("state", "video"))]),
        Table([["file", "what it holds"], *files], words=("what it holds",)),
    ]


_FILES = {
    "cells.csv": "success and costs per cell, unrounded",
    "seeds.csv": "every run: rate, state, times",
    "comparisons.csv": "every difference: interval, p raw and corrected, verdict",
    "report.md": "this report in Markdown",
}
_STUDY_FILES = {
    "study.json": "the study",
    "environment.json": "where it ran",
    "checks.txt": "what was checked before the first run",
}


def _task(one: Mapping[str, Any]) -> str:
    """Its demonstrations, and what the policy sees of it."""
    if one.get("dataset"):
        told = [f"demonstrations of {Path(one['dataset']).name}"]
    else:
        size = one.get("image_size")
        told = [
            f"{one.get('demos')} demonstrations of its scripted expert (seed"
            f" {one.get('collect_seed', 0)})"
        ]
        told += [f"{size} x {size} pixels in {one.get('quality')} quality"] * (size is not None)
    if one.get("filter_key"):
        told.append(f"filter key {one['filter_key']}")
    cameras = one.get("cameras")
    told.append(
        "all cameras" if cameras is None else f"camera{'s' * (len(cameras) != 1)} {listed(cameras)}"
    )
    if one.get("horizon") is not None:
        told.append(f"{one['horizon']} control steps at most")
    return ", ".join(told)


def _hardware(environment: Mapping[str, Any]) -> str:
    told = [str(environment[name]) for name in ("processor", "gpu") if environment.get(name)]
    if cores := environment.get("cores"):
        told.append(_number(cores, "core"))
    if load := environment.get("load"):
        told.append(f"load {load[0]:.1f} when the study was begun")
    return ", ".join(told)


def _encoder(one: Mapping[str, Any], inits: Sequence[str]) -> str:
    name, built = str(one["name"]), str(one.get("encoder") or "")
    told = f"{name} = {built}" if built and built != name else name
    if options := one.get("options"):
        told += f" ({', '.join(f'{key} {value}' for key, value in options.items())})"
    return (
        f"{told}, from {Path(one['weights']).name}"
        if one.get("weights") and set(inits) != {"scratch"}
        else told
    )


def _named(picture: str, i: int, study: Study) -> str:
    """A picture's file name: numbered where there are several heads or inits."""
    return (
        f"{picture}.svg"
        if len(study.settings) == 1
        else f"{picture}_{'_'.join(map(in_file_name, study.settings[i]))}.svg"
    )
