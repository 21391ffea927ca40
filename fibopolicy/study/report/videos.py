"""Where the encoders differ, to look at: both on the same initial states, side by side."""

from __future__ import annotations

import logging
from pathlib import Path

from fibopolicy.errors import UserError
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.study.grid import in_file_name
from fibopolicy.study.records import Study
from fibopolicy.study.report.results import Compared, Results, printed

_log = logging.getLogger(__name__)

#: Initial states in each video, and videos in a report.
EPISODES, MOST = 4, 12


def films(
    found: Results, folder: Path, *, make: bool
) -> tuple[list[tuple[Compared, Path]], list[str]]:
    """Videos of control and candidate on initial states that one of them alone solved, by
    the first seed of each.

    Args:
        folder: where they lie; one that is newer than the rows of both is kept.
        make: whether to film what is missing; else only what is there counts.

    Returns:
        the videos, and why others are missing, one line each.
    """
    shown: list[tuple[Compared, Path]] = []
    told: list[str] = []
    for one in [one for one in found.comparisons if one.task is not None]:
        pair = one.pairs[0]
        control, candidate = (side.outcomes(pair.init_states)[0] for side in pair.methods)
        if (control == candidate).all():
            continue
        path = (
            folder
            / f"{'__'.join(map(in_file_name, (one.subject, one.candidate, one.head, one.init)))}.mp4"  # noqa: E501
        )
        if path.is_file() and all(
            path.stat().st_mtime > RunDirectory(side.runs[0]).episodes.stat().st_mtime
            for side in pair.methods
        ):
            shown.append((one, path))
        elif make and len(shown) < MOST:
            _log.info("filming %s against %s on %s", one.candidate, one.control, one.subject)
            differing = int((control != candidate).sum())
            try:
                film(found.study, one, path, min(EPISODES, differing))
                shown.append((one, path))
            except (
                UserError,
                RuntimeError,
            ) as error:  # RuntimeError: episodes do not repeat on this machine
                told.append(
                    f"{one.candidate} on {one.subject}, {one.head}, {one.init} could not be"
                    f" filmed: {error}"
                )
        elif make:
            told.append(f"Only {MOST} pairs are filmed.")
            break
    return shown[:MOST], told


def film(study: Study, one: Compared, path: Path, episodes: int) -> None:
    """Write the video of one comparison.

    Raises:
        UserError: the study holds no weights or initial states any more, or they are not
            those of the rows.
    """
    # They load torch and the simulators, which a report without videos does without.
    from fibopolicy.evaluation.init_states import load_init_states
    from fibopolicy.evaluation.side_by_side import film_side_by_side

    pair = one.pairs[0]
    for init_states in sorted((study.path / "init_states").glob("*.npz")):
        stored = load_init_states(init_states)
        if set(pair.init_states) <= {stored.identity(i) for i in range(len(stored))}:
            film_side_by_side(pair, path, episodes, init_states)
            return
    raise UserError(
        f"{study.path / 'init_states'}: holds no file with the initial states of"
        f" {printed(one.tasks[0])}"
    )
