"""The page of a dataset: `fibopolicy inspect FILE --out PAGE`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fibopolicy.datasets.draw import MAX_FPS, draw_demos, view_size
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.inspect import contents
from fibopolicy.datasets.quality import (
    FAULTS,
    DemoMotion,
    DemoQuality,
    position_names,
    read_motions,
    score_demos,
    worst_first,
)
from fibopolicy.envs.registry import unavailable
from fibopolicy.errors import UserError, message_of, quoted
from fibopolicy.report.dataset_plots import (
    plot_activity,
    plot_dimensions,
    plot_lengths_and_scores,
)
from fibopolicy.report.document import (
    Answers,
    Cell,
    DocumentBlock,
    Facts,
    Folded,
    Heading,
    Note,
    Picture,
    SideBySide,
    Table,
    Video,
    write_html,
)
from fibopolicy.report.tables import counted
from fibopolicy.report.video import Clip, write_video

#: Demonstrations in each of the two videos, the worst and a sample of the others.
SHOWN = 4
#: Height of a view, pixels; most frames of a clip, and most cameras side by side.
VIEW, MAX_FRAMES, MAX_CAMERAS = 256, 150, 2
#: Rows of the table that are not folded; dimensions in a plot; demonstrations drawn as
#: lines, and as rows of steps.
ROWS, DIMENSIONS, LINES, RASTER = 8, 12, 3, 12
#: Scores below these are marked.
BAD, DOUBTFUL = 0.5, 0.8

_FORMULA = (
    "Each measure x becomes a fault: (x - a) / (b - a), at least 0 and at most 1. The score is the"
    " product over the faults of (1 - weight * fault). It compares demonstrations within the"
    " file, so a fault that all of them share is not found."
)
_UNITS = (
    "Steps, jerk and stillness come from positions: proprioception, or where a file has none, the"
    " running sum of the actions. A dimension's unit is its root mean square step in the median"
    " demonstration. A step is still if the positions move by less than 0.1 units and the action"
    " changes by less than 1 % of its range. Jerk is the root mean square of the third difference"
    " of the positions. A step is saturated if a dimension of its action is within 1 % of the"
    " file's smallest or largest value. An end less than half as far from 0 as the other does not"
    " count, since 0 means rest; nor does a dimension that is at its ends in over 80 % of all"
    " steps, such as a gripper that is open or closed."
)


def write_dataset_page(path: Path, out: Path, mapped: Mapping[str, str] | None = None) -> None:
    """Write an HTML page about a file's demonstrations, the worst first.

    The page needs no other file: its videos are small mp4 files, embedded. They show the
    four worst demonstrations and four others: their stored frames, or where there are
    none, their states in the simulator. A file with neither gets a page without videos.
    See `DemoFile` for `mapped`.

    Raises:
        UserError: the file cannot be read, or none of its demonstrations can be scored.
    """
    with DemoFile(path, mapped=mapped) as file, tempfile.TemporaryDirectory() as folder:
        rows, warnings = contents(file)
        skipped: dict[str, str] = {}
        motions = read_motions(file, file.demos, skipped)
        ranked = worst_first(score_demos(motions))
        blocks = [
            Answers(_answers(file, ranked, warnings, skipped)),
            *_videos(file, ranked, Path(folder)),
            Heading("Demonstrations, worst first"),
            _table(ranked[:ROWS]),
            *_folded("All demonstrations", ranked),
            Note(
                "Still and saturated: share of the steps. Jerk and largest step: times the file's"
                " median. To train without the worst three: fibopolicy split"
                f" {quoted(path.name)} --out NEW.hdf5 --drop-worst 3"
            ),
            *_plots(file, motions, ranked, Path(folder)),
            Heading("How the score is computed"),
            Note(_FORMULA),
            _fault_table(),
            Note(_UNITS),
            Heading("Contents of the file"),
            Facts(_merged(rows)),
        ]
        write_html(out, f"{path.name}: {counted(len(file.demos), 'demonstration')}", blocks)


def _answers(
    file: DemoFile,
    ranked: Sequence[DemoQuality],
    warnings: Sequence[str],
    skipped: dict[str, str],
) -> list[tuple[str, str]]:
    worst = ranked[0]
    doubtful = sum(quality.score < DOUBTFUL for quality in ranked)
    reason = f": {'; '.join(worst.reasons)}" if worst.reasons else ""
    lines = [
        (
            _mark(worst.score),
            f"**{doubtful} of {len(ranked)}** demonstrations score below {DOUBTFUL}. The lowest"
            f" score is {worst.score:.2f}, {worst.demo}{reason}.",
        )
    ]
    succeeded = sum(bool(quality.success) for quality in ranked)
    if any(quality.success is not None for quality in ranked):
        mark = "good" if succeeded == len(ranked) else "open"
        lines.append((mark, f"**{succeeded} of {len(ranked)}** succeed: their reward reaches 1."))
    lengths = [quality.steps for quality in ranked]
    lines.append(
        (
            "good",
            f"**{file.num_steps} steps**; a demonstration has {min(lengths)} to {max(lengths)},"
            f" in the median {np.median(lengths):g}.",
        )
    )
    lines += [("open", f"{demo} is not scored: {why}") for demo, why in list(skipped.items())[:3]]
    return lines + [("open", warning) for warning in warnings]


def _mark(score: float) -> str:
    return "bad" if score < BAD else "open" if score < DOUBTFUL else "good"


# Videos


def _videos(file: DemoFile, ranked: Sequence[DemoQuality], folder: Path) -> list[DocumentBlock]:
    worst, others = ranked[:SHOWN], ranked[SHOWN:]
    places = np.linspace(0, len(others) - 1, SHOWN if others else 0).round().astype(int)
    sample = list(dict.fromkeys(others[i].demo for i in places))
    by_name = {quality.demo: quality for quality in ranked}
    shown = [*(quality.demo for quality in worst), *sample]
    try:
        frames, fps = _frames(file, shown)
        clips = [
            Clip(one, by_name[demo].success, f"{demo}, score {by_name[demo].score:.2f}")
            for demo, one in zip(shown, frames, strict=True)
        ]
        groups: list[list[DocumentBlock]] = []
        titles = {"The worst": clips[: len(worst)], "Others": clips[len(worst) :]}
        for title, group in titles.items():
            if group:
                path = folder / f"{title}.mp4"
                wide = group[0].frames.shape[2] > group[0].frames.shape[1]
                write_video(path, group, fps, columns=1 if wide else 2)
                groups.append([Heading(title), Video(path)])
    except UserError as error:
        return [Note(f"No video: {str(error).removeprefix(f'{file.path}: ')}")]
    except (ValueError, RuntimeError) as error:  # a simulator's own
        return [Note(f"No video: {message_of(error)[:300]}")]
    note = "The frame turns green at the end of a success and red at the end of a failure."
    return [SideBySide(groups), Note(note)]


def _frames(file: DemoFile, demos: Sequence[str]) -> tuple[list[NDArray[np.uint8]], float]:
    """The frames of each demonstration, `(T, H, W, 3)`, and frames per second."""
    if file.image_keys:
        hz = file.control_hz or MAX_FPS
        real_time = max(1, round(hz / MAX_FPS))
        every = max(real_time, math.ceil(max(map(file.length, demos)) / MAX_FRAMES))
        return [_stored(file, demo, every) for demo in demos], hz / real_time
    if not file.has(demos[0], "states"):
        raise file.error("the file holds neither frames nor states")
    if (reason := unavailable(file.env_args)) is not None:
        raise file.error(f"the file holds no frames, and its states cannot be drawn: {reason}")
    drawn = draw_demos(file, demos, VIEW, max_frames=MAX_FRAMES)
    return [one.frames for one in drawn], drawn[0].fps


def _stored(file: DemoFile, demo: str, every: int) -> NDArray[np.uint8]:
    """Stored frames of the first cameras side by side, enlarged to `VIEW` pixels."""
    views = []
    for key in file.image_keys[:MAX_CAMERAS]:
        shape = file.image_shape(key)
        if file.layout(demo, f"obs/{key}") != ((file.length(demo), *shape), np.dtype(np.uint8)):
            raise file.error(f"{demo}: {key} has another shape than in the first demo")
        height, width = view_size(shape, VIEW)
        frames = []
        for step in range(0, file.length(demo), every):  # they may not all fit into memory
            frame = Image.fromarray(file.read(demo, f"obs/{key}", step, step + 1)[0])
            frames.append(np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)))
        views.append(np.stack(frames))
    return np.concatenate(views, axis=2)


# Tables and plots


def _table(qualities: Sequence[DemoQuality]) -> Table:
    known = any(quality.success is not None for quality in qualities)
    titles = ["demo", "score", "steps", *(["success"] if known else [])]
    titles += ["still", "saturated", "jerk", "largest step", "reasons"]
    rows: list[list[str | Cell]] = [list(titles)]
    for quality in qualities:
        success = {True: Cell("yes", mark="good"), False: Cell("no", mark="bad"), None: Cell("-")}[
            quality.success
        ]
        rows.append(
            [
                quality.demo,
                Cell(f"{quality.score:.2f}", mark=_mark(quality.score)),
                str(quality.steps),
                *([success] if known else []),
                f"{quality.still.mean():.0%}",
                f"{quality.saturated.mean():.0%}",
                f"{quality.jerk:.1f}",
                f"{quality.largest_step:.1f}",
                "; ".join(quality.reasons) or "-",
            ]
        )
    return Table(rows, words=("success", "reasons"))


def _folded(title: str, ranked: Sequence[DemoQuality]) -> list[DocumentBlock]:
    return [Folded(f"{title} ({len(ranked)})", [_table(ranked)])] if len(ranked) > ROWS else []


def _fault_table() -> Table:
    rows: list[list[str | Cell]] = [["fault", "x", "a", "b", "weight"]]
    rows += [
        [name, fault.measure, f"{fault.begin:g}", f"{fault.end:g}", f"{fault.weight:g}"]
        for name, fault in FAULTS.items()
    ]
    return Table(rows, words=("x",))


def _plots(
    file: DemoFile, motions: Sequence[DemoMotion], ranked: Sequence[DemoQuality], folder: Path
) -> list[DocumentBlock]:
    worst = {quality.demo for quality in ranked[:LINES]}
    lengths, activity = folder / "lengths.svg", folder / "activity.svg"
    plot_lengths_and_scores(ranked, lengths)
    plot_activity(ranked, ranked[:RASTER], activity)
    blocks: list[DocumentBlock] = [
        Heading("Lengths and scores"),
        Picture(lengths, "histograms of lengths and scores"),
        Heading("Where they stand still or saturate"),
        Picture(activity, "share of still and saturated steps, and the steps of the worst"),
        Note(
            f"Above: share of all demonstrations. Below: the steps of the {len(ranked[:RASTER])} of"
            " lowest score."
        ),
    ]
    names = {
        "actions": [f"action {i}" for i in range(motions[0].actions.shape[1])],
        "positions": position_names(file),
    }
    titles = {"actions": "Actions", "positions": "Proprioception"}
    for part, title in titles.items():
        plot = folder / f"{part}.svg"
        shown = names[part][:DIMENSIONS]
        plot_dimensions(
            [getattr(motion, part) for motion in motions],
            [getattr(motion, part) for motion in motions if motion.demo in worst],
            shown,
            plot,
        )
        blocks += [Heading(title), Picture(plot, f"{title.lower()} over time")]
        if len(shown) < len(names[part]):
            blocks.append(Note(f"The first {len(shown)} of {len(names[part])} dimensions."))
    return blocks


def _merged(rows: Sequence[tuple[str, str]]) -> dict[str, str]:
    """One fact per label; an empty label continues the one before."""
    facts: dict[str, str] = {}
    last = ""
    for label, text in rows:
        text = " ".join(text.split())
        if label:
            last = label
            facts[label] = text
        else:
            facts[last] = f"{facts.get(last, '')}; {text}"
    return facts
