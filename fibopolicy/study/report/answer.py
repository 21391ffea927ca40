"""The answer of a study in plain words: what stands in the first lines of its report."""

from __future__ import annotations

from collections.abc import Sequence

from fibopolicy.statistics.power import MAX_EPISODES
from fibopolicy.study.records import State, Study
from fibopolicy.study.report.results import Compared, Results, Verdict, printed

#: More sentences than this are counted instead.
MOST_SENTENCES = 8

#: How a page marks a verdict.
MARKS = {
    Verdict.NOT_INFERIOR: "good",
    Verdict.INFERIOR: "bad",
    Verdict.UNDECIDED: "open",
    Verdict.UNTESTABLE: "open",
}


def answers(found: Results) -> list[tuple[str, str]]:
    """Per encoder beside the control a mark ("good", "bad", "open") and a sentence."""
    study = found.study
    candidates = [encoder for encoder in study.encoders if encoder != study.baseline]
    if not candidates:
        return [
            ("open", f"The study holds no encoder beside {study.baseline}, so nothing is compared.")
        ]
    if len(candidates) * len(study.settings) > MOST_SENTENCES:
        return [_counted(found, candidate) for candidate in candidates]
    return [
        _sentence(found, candidate, setting)
        for candidate in candidates
        for setting in study.settings
    ]


def _sentence(found: Results, candidate: str, setting: tuple[str, str]) -> tuple[str, str]:
    study = found.study
    prefix = f"{setting[0]}, {setting[1]}: " if len(study.settings) > 1 else ""
    comparisons = [one for one in found.of(setting) if one.candidate == candidate]
    if not comparisons:
        return (
            "open",
            (
                f"{prefix}{candidate} against {study.baseline}:"
                f" {_lacking(found, candidate, study.tasks, [setting])}."
            ),
        )
    comparisons.sort(key=lambda one: one.task is not None)  # the mean over tasks first
    designs = {_design(one) for one in comparisons}
    clauses: list[str] = []
    for verdict in Verdict:
        if group := [one for one in comparisons if one.verdict is verdict]:
            first = not clauses
            told = listed(
                [
                    _on(
                        one,
                        study,
                        "" if len(designs) == 1 else f", {_design(one)}",
                        first and one is group[0],
                    )
                    for one in group
                ]
            )
            clauses.append(f"{_claim(study, verdict, candidate if first else '')} {told}")
    lacking = [task for task in study.tasks if task not in {one.task for one in comparisons}]
    clauses += [
        f"on {printed(task)} {_lacking(found, candidate, [task], [setting])}" for task in lacking
    ]
    closing = f" {designs.pop()} each." if len(designs) == 1 else ""
    return (
        _mark(comparisons, bool(lacking)),
        f"{prefix}{'; '.join(clauses)}.{closing}{_single(comparisons)}",
    )


def _counted(found: Results, candidate: str) -> tuple[str, str]:
    """One sentence for all tasks, heads and inits of an encoder, where there are too
    many for one each.
    """
    study = found.study
    comparisons = [one for one in found.comparisons if one.candidate == candidate]
    single = [one for one in comparisons if one.task is not None]
    if not single:
        return (
            "open",
            (
                f"{candidate} against {study.baseline}:"
                f" {_lacking(found, candidate, study.tasks, study.settings)}."
            ),
        )
    clauses: list[str] = []
    for verdict in Verdict:
        if group := [one for one in single if one.verdict is verdict]:
            told = (
                f"{_claim(study, verdict, candidate if not clauses else '')} in {len(group)} of"
                f" {len(single)} cells"
            )
            if verdict is Verdict.INFERIOR:
                told += _places(group)
            for beside in ("better", "worse"):
                if shown := [one for one in group if beside_verdict(one, study) == beside]:
                    told += f", {beside} in {len(shown)} of these{_places(shown)}"
            clauses.append(told)
    lacking = len(study.tasks) * len(study.settings) - len(single)
    if lacking:
        clauses.append(f"no answer yet in {lacking} more")
    return _mark(single, bool(lacking)), f"{'; '.join(clauses)}.{_single(single)}"


def _lacking(
    found: Results, candidate: str, tasks: Sequence[str], settings: Sequence[tuple[str, str]]
) -> str:
    """Why there is nothing to compare."""
    ready = True
    for encoder in (candidate, found.study.baseline):
        of = [
            one.cell
            for one in found.cells
            if one.cell.encoder == encoder and one.cell.task in tasks
        ]
        states = [run.state for cell in of if cell.setting in settings for run in cell.runs]
        ready &= State.DONE in states
        if State.FAILED in states and State.DONE not in states:
            failed, yet = (
                states.count(State.FAILED),
                "" if set(states) == {State.FAILED} else " yet",
            )
            return (
                f"no answer{yet}: {failed} of {len(states)} runs of {encoder} failed, none is"
                " finished"
            )
    return (
        "no answer: what is finished cannot be paired, see below"
        if ready
        else "no answer yet: both need finished runs"
    )


def _places(group: Sequence[Compared]) -> str:
    """Where, unless that is in too many places to tell."""
    if len(group) > MOST_SENTENCES:
        return ""
    return f" ({listed([f'{one.subject} {one.head} {one.init}' for one in group])})"


def _single(comparisons: Sequence[Compared]) -> str:
    if all(one.difference.checkpoint_pair for one in comparisons):
        return " These are single checkpoints; how other training seeds would differ is unknown."
    return ""


def _claim(study: Study, verdict: Verdict, candidate: str) -> str:
    """The words of a verdict, before where it holds; with the candidate's name where
    they begin a sentence.
    """
    control = study.baseline
    if study.margin is None:
        if verdict is Verdict.UNDECIDED:
            told = f"between {candidate} and {control} is shown" if candidate else "is shown"
            return f"{'No' if candidate else 'no'} difference {told}"
        than = f"**{'better' if verdict is Verdict.NOT_INFERIOR else 'worse'}** than {control}"
        return f"{candidate} is {than}" if candidate else than
    by = f"by more than {100 * study.margin:g} points"
    if verdict is Verdict.UNTESTABLE:
        told = (
            f"**untestable**, since {control} itself solves no more than these"
            f" {100 * study.margin:g} %"
        )
        return f"Whether {candidate} is inferior to {control} {by} is {told}" if candidate else told
    if verdict is Verdict.UNDECIDED:
        return (
            f"Whether {candidate} is inferior to {control} {by} is **undecided**"
            if candidate
            else "**undecided**"
        )
    return (
        f"{candidate} is **{verdict.value}** to {control} {by}"
        if candidate
        else f"**{verdict.value}** {by}"
    )


def _on(one: Compared, study: Study, design: str, first: bool) -> str:
    """Where, and with what difference: `on Lift (difference -0.7 points [-3.1, +1.7])`;
    after the first without the words.
    """
    d = one.difference
    value = f"difference {100 * d.value:+.1f} points" if first else f"{100 * d.value:+.1f}"
    told = f"{value} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]{design}"
    if beside := beside_verdict(one, study):
        told += f", {beside} than {study.baseline}"
    if one.verdict is Verdict.UNDECIDED:
        need, tasks = one.needed, "" if one.task is not None else " on each task"
        episodes = (
            f"more than {MAX_EPISODES:,}" if need is None else f"{need.seeds * need.init_states:,}"
        )
        told += f": {episodes} episodes{tasks} would be needed"
    where = one.subject if one.task is not None else f"average over {len(one.tasks)} tasks"
    return f"on {where} ({told})"


def beside_verdict(one: Compared, study: Study) -> str:
    """Whether it is better or worse, where that is shown and the verdict does not say it."""
    if not one.differs or study.margin is None or one.verdict is Verdict.INFERIOR:
        return ""
    return "better" if one.difference.value > 0 else "worse"


def to_decide(one: Compared) -> str:
    """What an undecided comparison needs, per encoder (and task): `412 episodes: 4
    seeds x 103 initial states`.
    """
    if one.needed is None:
        return f"more than {MAX_EPISODES:,} episodes"
    seeds, init_states = one.needed.seeds, one.needed.init_states
    return (
        f"{seeds * init_states:,} episodes: {seeds} seed{'s' * (seeds != 1)} x {init_states}"
        " initial states"
    )


def _design(one: Compared) -> str:
    """How much was measured: `3 seeds x 100 initial states`."""
    control, candidate = one.seeds
    told = f"{candidate} seed{'s' * (candidate != 1)}"
    return (
        f"{told}{f' against {control} of {one.control}' if control != candidate else ''} x"
        f" {one.init_states} initial states"
    )


def _mark(comparisons: Sequence[Compared], lacking: bool) -> str:
    """The gravest of some verdicts."""
    marks = {MARKS[one.verdict] for one in comparisons} | ({"open"} if lacking else set())
    return next(mark for mark in ("bad", "open", "good") if mark in marks)


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
