"""`fibopolicy <verb>`: parse, call, print. Everything else lives in the packages below."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from fibopolicy.devices import resolve_device
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.files import refuse_existing
from fibopolicy.quickstart import Quickstart
from fibopolicy.training.config import TrainConfig


@dataclass(frozen=True)
class Collect:
    """Record demonstrations of a task's scripted expert in a robomimic HDF5 file.

    Example: fibopolicy collect Lift-v0 --episodes 400 --out lift.hdf5
    """

    task: tyro.conf.Positional[str]
    """Task id, e.g. fibopolicy/Lift-v0, or short: Lift-v0."""
    episodes: int
    """Successful episodes to record."""
    out: Path
    """File to write."""
    cameras: tuple[str, ...] | None = None
    """Cameras to render; all of the task's by default."""
    image_size: int = 84
    """Height and width of the images, pixels."""
    quality: Literal["fast", "full"] = "fast"
    """Render quality; evaluation uses the one stored here."""
    noise: float = 0.2
    """Standard deviation of noise on executed actions, action units; recorded actions stay clean."""
    seed: int = 0
    """Decides layouts and noise."""
    workers: int | None = None
    """Processes; as many as cores by default. The file does not depend on it."""
    resume: bool = False
    """Go on with a collection that was stopped."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets.collect import Plan, collect

        plan = Plan(self.task, self.cameras, self.image_size, self.quality, self.seed, self.noise)
        done = collect(plan, self.episodes, self.out, workers=self.workers, overwrite=self.overwrite, resume=self.resume)
        print(
            f"{done.path}: {done.demos} demos, {done.steps} steps; the expert succeeded in {done.demos} of {done.tried} episodes"
        )


@dataclass(frozen=True)
class Fetch:
    """Download real demonstrations and verify them.

    Example: fibopolicy fetch lift-human
    """

    name: tyro.conf.Positional[str]
    """What to fetch: lift-human."""
    out: Path | None = None
    """File to write; in the cache folder by default."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets import SOURCES, fetch

        path = fetch(self.name, self.out, overwrite=self.overwrite)
        print(f"{path}: {SOURCES[self.name].summary}")


@dataclass(frozen=True)
class Inspect:
    """Print what a robomimic HDF5 file holds, and warn of what is odd.

    Example: fibopolicy inspect lift.hdf5
    """

    file: tyro.conf.Positional[Path]
    """The file."""

    def run(self) -> None:
        from fibopolicy.datasets import inspect

        print(inspect(self.file))


@dataclass(frozen=True)
class Split:
    """Copy a file, adding the filter keys "train" and "valid".

    Example: fibopolicy split mine.hdf5 --out mine_split.hdf5 --valid 0.1
    """

    file: tyro.conf.Positional[Path]
    """The file to copy; it is not changed."""
    out: Path
    """File to write."""
    valid: float = 0.1
    """Share of the demos that are held out."""
    seed: int = 0
    """Decides which."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets import split

        keys = split(self.file, self.out, self.valid, self.seed, overwrite=self.overwrite)
        print(f"{self.out}: " + ", ".join(f"{name} {len(demos)} demos" for name, demos in keys.items()))


@dataclass(frozen=True)
class Train:
    """Train a policy on demonstrations.

    Example: fibopolicy train --dataset lift.hdf5 --out runs/lift --encoder vit_tiny --encoder-options depth 4 pool mean
    """

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    resume: bool = False
    """Go on with a run that was stopped; it ends with the same weights as one that was not."""
    overwrite: bool = False
    """Replace an existing run."""

    def run(self) -> None:
        from fibopolicy.training.loop import train

        done = train(self.config, resume=self.resume, overwrite=self.overwrite)
        print(f"{self.config.out}: trained to step {done.step} ({done.seconds:.0f} s now)")
        print(f"next: fibopolicy evaluate {self.config.out} --episodes 50")


@dataclass(frozen=True)
class Evaluate:
    """Roll a trained policy out over stored start states and print its success rate with a 95 % Wilson interval.

    Example: fibopolicy evaluate runs/lift --episodes 50
    """

    config: tyro.conf.OmitArgPrefixes[EvaluateConfig]
    resume: bool = False
    """Run only the episodes that have no row yet."""
    overwrite: bool = False
    """Replace an existing evaluation."""

    def run(self) -> None:
        from fibopolicy.evaluation.evaluate import evaluate
        from fibopolicy.evaluation.report import rate_table, report

        done = evaluate(self.config, resume=self.resume, overwrite=self.overwrite)
        print(rate_table({str(self.config.run): done.rate}), flush=True)
        page = report(self.config.run, done)
        print(f"rows    {done.rows_path}\nstarts  {done.starts_path}")
        if done.video_path:
            print(f"video   {done.video_path}")
        print(f"page    {page}")


@dataclass(frozen=True)
class Rates:
    """Print the success rates of evaluated runs side by side, from their episode rows.

    Example: fibopolicy rates runs/lift_seed0 runs/lift_seed1
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path | None = None
    """JSON file to write: the rates, the outcome of every episode, hardware and versions."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.evaluation.report import rate_table, write_results
        from fibopolicy.evaluation.rows import evaluations, success_rate

        if not self.runs:
            raise UserError("name at least one run directory")
        if self.out is not None:
            refuse_existing(self.out, self.overwrite)
        found = {name: rows for directory in self.runs for name, rows in evaluations(directory).items()}
        print(rate_table({name: success_rate(rows) for name, rows in found.items()}))
        if self.out is not None:
            write_results(self.out, found)


@dataclass(frozen=True)
class Profile:
    """Time sparse attention against dense, side by side in turns, and print the ratios with their quartiles.

    Example: fibopolicy profile attention --out attention.json
    """

    what: tyro.conf.Positional[Literal["attention", "encoder"]]
    """The attention alone, or a whole ViT-S with it."""
    turns: int = 10
    """Timed turns of each contender."""
    device: str = "cpu"
    """Where to run."""
    out: Path | None = None
    """JSON file to write; for attention, a picture of the crossover over N lies beside it."""
    overwrite: bool = False
    """Replace existing files."""

    def run(self) -> None:
        from fibopolicy.attention import profile as attention
        from fibopolicy.attention.drawing import draw_crossover
        from fibopolicy.encoders import profile as encoder

        if self.turns < 1:
            raise UserError(f"turns must be at least 1, got {self.turns}")
        resolve_device(self.device)
        if self.out is not None:
            refuse_existing(self.out, self.overwrite)
        if self.what == "attention":
            report = attention.profile_attention(turns=self.turns, device=self.device)
            print(attention.table(report))
        else:
            report = encoder.profile_encoder(turns=self.turns, device=self.device)
            print(encoder.table(report))
        if self.out is not None:
            report.write(self.out)
            if self.what == "attention":
                draw_crossover(report, self.out.with_suffix(".png"))


@dataclass(frozen=True)
class ShowPattern:
    """Draw which token pairs each head keeps.

    Example: fibopolicy show-pattern --tokens 196 --heads 6 --out pattern.png
    """

    tokens: int = 196
    """Patch tokens."""
    heads: int = 6
    """Attention heads."""
    layer: int = 0
    """Layer, from 0: each permutes the heads in its own way."""
    modified: bool = False
    """The variant with two more offsets per head."""
    out: Path = Path("pattern.png")
    """PNG file to write."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.attention import FibottentionPattern
        from fibopolicy.attention.drawing import draw_pattern

        refuse_existing(self.out, self.overwrite)
        pattern = FibottentionPattern(self.tokens, self.heads, modified=self.modified, layer=self.layer)
        draw_pattern(pattern, self.out)
        print(f"{self.out}: {self.heads} heads keep {100 * pattern.density:.2f} % of the patch pairs")


VERBS: dict[str, Callable[..., Any]] = {
    "quickstart": Quickstart,
    "collect": Collect,
    "fetch": Fetch,
    "inspect": Inspect,
    "split": Split,
    "train": Train,
    "evaluate": Evaluate,
    "rates": Rates,
    "profile": Profile,
    "show-pattern": ShowPattern,
}


def main() -> None:
    """The console command. Exit codes: 0 done, 1 our mistake, 2 the user's, 130 interrupted."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.showwarning = _print_warning
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fibopolicy").setLevel(logging.INFO)
    verb = None
    try:
        verb = _parse(arguments)
        verb.run()
    except UserError as error:
        _end(error, debug, f"error: {error}", 2)
    except KeyboardInterrupt as error:
        advice = {Quickstart: "; the same command goes on", Collect: RESUME, Train: RESUME, Evaluate: RESUME}.get(type(verb), "")
        _end(error, debug, f"interrupted{advice}", 130)
    except BrokenPipeError:
        os._exit(0)  # the reader of our output has gone
    except OSError as error:
        _end(error, debug, f"error: {error.filename or 'input or output'}: {error.strerror or error}", 2)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _end(error, debug, f"internal error: {reason} (--debug shows where; please report it)", 1)


def _parse(arguments: list[str]) -> Any:
    """The verb that the arguments ask for; a mistake in them becomes a `UserError` of one line instead of tyro's box."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.extras.subcommand_cli_from_dict(
                VERBS, args=arguments, prog="fibopolicy", description=DESCRIPTION, config=PLAIN
            )
    except SystemExit as end:
        if end.code != 2:
            raise
        text = re.sub("[\u2500-\u257f]+", " ", told.getvalue())  # the box
        raise UserError(" ".join(text.split())) from end


RESUME = "; the same command with --resume, and without --overwrite, goes on"
#: A flag is given or not; there is no --no-flag.
PLAIN = (tyro.conf.FlagCreatePairsOff,)
DESCRIPTION = "Train visuomotor policies by behaviour cloning, measure them in simulation. --debug shows tracebacks."


def _print_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None, line: str | None = None
) -> None:
    """Ours, and only ours, are for the user; those of libraries are for us."""
    if category is UserWarning:
        print(f"fibopolicy: warning: {message}", file=sys.stderr)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end(error: BaseException, debug: bool, line: str, code: int) -> None:
    if debug:
        raise error
    print(f"fibopolicy: {line}", file=sys.stderr)
    sys.exit(code)
