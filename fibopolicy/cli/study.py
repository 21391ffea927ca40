"""The verbs of encoder-swap studies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fibopolicy.errors import UserError, quoted

if TYPE_CHECKING:
    from fibopolicy.study.config import StudyConfig
    from fibopolicy.study.executors import Executor


@dataclass(frozen=True)
class Run:
    """Carry out a study: every cell of its grid, trained and evaluated for every seed.
    The same command goes on after a stop.

    Example: fibopolicy study run my_study.py --out studies/encoders
    """

    study: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STUDY")]
    """The study: FILE.py[:FUNCTION], a function without arguments that returns a StudyConfig; `study` by default."""  # noqa: E501
    out: Path
    """Directory of the study, new or one that was stopped."""
    jobs: int | None = None
    """Processes at a time; as many as GPUs, or else as cores for the study's threads, by default."""  # noqa: E501
    ray: str | None = None
    """Carry the runs out on the Ray cluster at this address instead: HOST:PORT, ray://HOST:PORT, or auto for the one here."""  # noqa: E501
    only: tuple[str, ...] = ()
    """Runs (CELL/seedN) or cells to carry out; several such jobs may share the directory."""
    index: int | None = None
    """The run to carry out, counted from 0: for array jobs."""
    prepare_only: bool = False
    """Check, collect, measure the encoders and estimate the time, and stop there."""

    def run(self) -> None:
        from fibopolicy.study.cells import runs
        from fibopolicy.study.directory import read_json
        from fibopolicy.study.runner import prepare_study, run_some, run_study
        from fibopolicy.study.source import load_study

        config, folder = load_study(self.study)
        executor = self._executor(config)
        chosen = list(self.only)
        if self.index is not None:
            every = runs(config)
            if not 0 <= self.index < len(every):
                raise UserError(
                    f"index counts the study's {len(every)} runs from 0, got {self.index}"
                )
            chosen.append(every[self.index].name)
        if self.prepare_only:
            if chosen:
                raise UserError(
                    "--prepare-only is for the whole study; leave --only and --index out"
                )
            study = prepare_study(config, self.out, executor.slots)
            calibrated = read_json(study.calibration)["cells"]
            if broken := [name for name, found in calibrated.items() if "error" in found]:
                raise UserError(
                    f"{self.out}: {len(broken)} of {len(calibrated)} cells fail already while they"
                    " are calibrated, as told above"
                    f" ({', '.join(broken[:3])}{', ...' * (len(broken) > 3)}); the same command"
                    " tries them again"
                )
            return
        if chosen:
            outcome = run_some(config, self.out, chosen, executor, folder)
        else:
            outcome = run_study(config, self.out, executor, folder)
        print(f"{self.out}: {outcome.done} of {outcome.total} runs done")
        if outcome.failed:
            names = ", ".join(run.name for run in outcome.failed[:3]) + (
                ", ..." if len(outcome.failed) > 3 else ""
            )
            raise UserError(
                f"{self.out}: {len(outcome.failed)} of {outcome.total} runs failed ({names}); their"
                f" logs are named by `fibopolicy study status {quoted(self.out)}`, and the same"
                " command tries them again"
            )
        print(f"next: fibopolicy study report {quoted(self.out)}")

    def _executor(self, config: StudyConfig) -> Executor:
        from fibopolicy.study.executors.local import Local
        from fibopolicy.study.executors.ray_cluster import RayCluster

        if self.ray is None:
            return Local(self.jobs, config.threads, config.device)
        if self.jobs is not None:
            raise UserError(
                "--jobs is for this machine alone; with --ray the cluster's resources decide"
            )
        return RayCluster(self.ray, config.threads, config.device)


@dataclass(frozen=True)
class Status:
    """Tell what of a study is done, under way, failed and to do.

    Example: fibopolicy study status studies/encoders
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")]
    """Directory of the study."""

    def run(self) -> None:
        from fibopolicy.study.directory import open_directory
        from fibopolicy.study.status import status

        print(status(open_directory(self.directory)))


@dataclass(frozen=True)
class Report:
    """Write a study's tables, pictures and page from what is there.

    Example: fibopolicy study report studies/encoders
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")]
    """Directory of the study."""
    videos: bool = False
    """Film control and candidates side by side, which runs the shown episodes once more."""

    def run(self) -> None:
        from fibopolicy.study.report import write_report

        print(f"page    {write_report(self.directory, videos=self.videos)}")


@dataclass(frozen=True)
class Publish:
    """Copy what a study's report rests on, to commit or to hand on: no demonstrations,
    weights or videos.

    The copy can be reported on, and gone on with, like the study itself.

    Example: fibopolicy study publish runs/encoders --out published/encoders
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIRECTORY")]
    """Directory of the study."""
    out: Path
    """Folder of the copy, new or an earlier one, which is brought up to date."""

    def run(self) -> None:
        from fibopolicy.study.publish import publish

        print(f"page    {publish(self.directory, self.out)}")


@dataclass(frozen=True)
class Study:
    """Swap the visual encoder, keep everything else, and see what it does to the
    policy.

    Example: fibopolicy study run my_study.py --out studies/encoders
    """

    what: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[Run, tyro.conf.subcommand("run")]
            | Annotated[Status, tyro.conf.subcommand("status")]
            | Annotated[Report, tyro.conf.subcommand("report")]
            | Annotated[Publish, tyro.conf.subcommand("publish")]
        ]
    ]

    def run(self) -> None:
        self.what.run()
