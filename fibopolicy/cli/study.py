"""Commands for encoder-swap studies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fibopolicy.errors import UserError, quoted
from fibopolicy.evaluation.config import VIDEO_SIZE

if TYPE_CHECKING:
    from fibopolicy.study.config import StudyConfig
    from fibopolicy.study.executors import Executor


@dataclass(frozen=True)
class StudyRun:
    """Run a study: train and evaluate every condition of its grid for every seed.
    The same command resumes it.

    Example: fibopolicy study run my_study.py --out studies/encoders
    """

    study: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDY")]
    """FILE.py[:FUNCTION]: a function without arguments that returns a StudyConfig; by
    default the file's function `study`."""
    out: Path
    """Directory of the study: new, or of an interrupted study."""
    jobs: int | None = None
    """Processes at a time; by default one per GPU, or without GPUs as many as the cores
    allow with the study's threads."""
    jobs_per_gpu: int | None = None
    """Runs that share each GPU, by default one; small policies do not fill a GPU."""
    ray: str | None = None
    """Run on the Ray cluster at this address: HOST:PORT, ray://HOST:PORT, or auto for the
    cluster of this machine."""
    only: tuple[str, ...] = ()
    """Execute only these runs (CONDITION/seedN), searches (CONDITION/tuning) or conditions;
    several such jobs may share the directory."""
    index: int | None = None
    """Execute only the run with this index, from 0; for array jobs."""
    sequential: bool = False
    """Plan looks at the verdicts after 3 training seeds and every further one, unless the
    study names its own `looks`; stop as soon as all comparisons are decided."""
    prepare_only: bool = False
    """Check the study, measure its encoders, collect its data, and stop there."""

    def run(self) -> None:
        from fibopolicy.report.tables import counted
        from fibopolicy.study.config import load_study
        from fibopolicy.study.grid import runs, selectable
        from fibopolicy.study.runner import prepare_study, run_selected, run_study

        config, folder = load_study(self.study)
        if self.sequential and not config.looks:
            seeds = len(config.seeds)
            first = 3 if seeds > 2 else 2
            config = replace(config, looks=tuple(range(first, seeds + 1)))
        executor = self._executor(config)
        names = list(self.only)
        if self.index is not None:
            every = selectable(config)
            if not 0 <= self.index < len(every):
                raise UserError(f"index must be from 0 to {len(every) - 1}, got {self.index}")
            names.append(every[self.index])
        if self.prepare_only:
            if names:
                raise UserError(
                    "--prepare-only is for the whole study; leave --only and --index out"
                )
            prepare_study(config, self.out)
            number = len(runs(config))
            searches = len(selectable(config)) - number
            before = f"{counted(searches, 'search', 'searches')} and " if searches else ""
            print(f"{self.out}: prepared, {before}{number} runs")
            return
        if names:
            outcome = run_selected(config, self.out, names, executor, folder)
        else:
            outcome = run_study(config, self.out, executor, folder)
        print(f"{self.out}: {outcome.done} of {outcome.total} runs done")
        if outcome.decided_after is not None:
            print(
                f"decided after {outcome.decided_after} of {len(config.seeds)} training seeds, a"
                " planned look; the other runs are not needed"
            )
        if outcome.failed:
            failed = [run.name for run in outcome.failed]
            listed = ", ".join(failed[:3]) + ", ..." * (len(failed) > 3)
            raise UserError(
                f"{self.out}: {len(failed)} of {outcome.total} runs failed ({listed}); `fibopolicy"
                f" study status {quoted(self.out)}` names their logs; run the same command again to"
                " retry them"
            )
        print(f"next: fibopolicy study report {quoted(self.out)}")

    def _executor(self, config: StudyConfig) -> Executor:
        from fibopolicy.study.executors import Local
        from fibopolicy.study.ray_cluster import RayCluster

        if self.ray is None:
            return Local(self.jobs, config.threads, config.device, self.jobs_per_gpu)
        if self.jobs is not None:
            raise UserError(
                "--jobs is for this machine only; with --ray the cluster's resources decide"
            )
        return RayCluster(self.ray, config.threads, config.device, self.jobs_per_gpu)


@dataclass(frozen=True)
class StudyStatus:
    """Show the state of every run of a study, and the time that is left.

    Example: fibopolicy study status studies/encoders
    """

    study: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STUDY")]
    """Directory or archive of the study."""

    def run(self) -> None:
        from fibopolicy.study.archive import open_study
        from fibopolicy.study.status import status

        with open_study(self.study) as study:
            print(status(study))


@dataclass(frozen=True)
class StudyReport:
    """Write a study's tables, plots and page from its finished runs.

    Example: fibopolicy study report studies/encoders
    """

    study: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STUDY")]
    """Directory or archive of the study."""
    videos: bool = False
    """Film the baseline and the candidates side by side, which simulates the shown
    episodes again."""
    video_size: int = VIDEO_SIZE
    """Height of each view in the videos, pixels."""

    def run(self) -> None:
        from fibopolicy.study.report import write_report

        page = write_report(self.study, videos=self.videos, video_size=self.video_size)
        print(f"page    {page}")


@dataclass(frozen=True)
class StudyPublish:
    """Write a study's archive: one file with everything that its report needs, without
    demonstrations, checkpoints and videos.

    Example: fibopolicy study publish runs/encoders --out encoders.study.zip
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")]
    """Directory of the study."""
    out: Path
    """The archive, NAME.study.zip; an earlier one of the study is replaced."""

    def run(self) -> None:
        from fibopolicy.study.archive import publish

        publish(self.directory, self.out)
        print(f"next: fibopolicy study report {quoted(self.out)}")


@dataclass(frozen=True)
class StudyCommand:
    """Swap the visual encoder, keep everything else fixed, and compare the policies.

    Example: fibopolicy study run my_study.py --out studies/encoders
    """

    what: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[StudyRun, tyro.conf.subcommand("run")]
            | Annotated[StudyStatus, tyro.conf.subcommand("status")]
            | Annotated[StudyReport, tyro.conf.subcommand("report")]
            | Annotated[StudyPublish, tyro.conf.subcommand("publish")]
        ]
    ]

    def run(self) -> None:
        self.what.run()
