"""The whole workflow in one command: collect, train, evaluate, report."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fibopolicy.errors import quoted
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.training.config import OptimizerConfig, TrainConfig
from fibopolicy.utils.files import atomic_write

TASK = "fibopolicy/Lift-v0"


@dataclass(frozen=True)
class Quickstart:
    """Collect demonstrations of the built-in Lift task, train a Fibottention ViT from
    pixels, evaluate it.

    Run the command again to resume; finished stages are not repeated.

    Example: fibopolicy quickstart --out runs/quickstart
    """

    out: Path = Path("runs/quickstart")
    """Directory for all files; about 0.5 GB."""
    encoder: str = "fibottention_vit_tiny"
    """The image encoder; vit_tiny is the same network with dense attention."""
    demos: int = 400
    """Demonstrations to collect."""
    steps: int = 600
    """Gradient steps."""
    episodes: int = 50
    """Number of held-out initial states to evaluate on."""
    seed: int = 0
    """Training seed."""
    setup_seconds: float | None = None
    """Seconds that the installation took, for the table of wall times."""

    def run(self) -> None:
        # Imported here, so that mistakes on the command line are reported at once.
        from fibopolicy.datasets.collect import Plan, collect
        from fibopolicy.encoders.base import encoder_options
        from fibopolicy.evaluation.evaluate import evaluate_run
        from fibopolicy.report.run import write_run_page
        from fibopolicy.report.tables import rate_table
        from fibopolicy.training.trainer import train

        data = self.out / f"lift_{self.demos}.hdf5"
        run = self.out / f"{self.encoder}_seed{self.seed}"
        training, evaluating = self.train_config(data, run), EvaluateConfig(run, self.episodes)
        encoder_options(self.encoder)  # refuses an unknown name before minutes of collecting
        times = WallTimes(self.out / "wall_times.json")
        if self.setup_seconds is not None:
            times.add("set-up", self.setup_seconds)
        if not data.exists():
            with times.measure("collect", f"{self.demos} demonstrations by the scripted expert"):
                collect(Plan(TASK), self.demos, data, resume=True)
        with times.measure(f"train {run.name}", f"{self.steps} gradient steps from pixels"):
            train(training, resume=True)
        with times.measure(
            f"evaluate {run.name}", f"success rate from {self.episodes} held-out initial states"
        ):
            evaluation = evaluate_run(evaluating, resume=True)
        spent = times.of_run(run.name)
        page = write_run_page(run, evaluation, spent)
        print(
            f"\n{TASK}, {self.episodes} held-out initial"
            f" states\n{rate_table({self.encoder: evaluation.rate})}"
        )
        print(f"\nwall time\n{time_table(spent)}")
        print(f"\nvideo   {evaluation.video_path}\ncurves  {run / 'curves.svg'}\npage    {page}")
        command = "fibopolicy" if shutil.which("fibopolicy") else sys.argv[0]
        print(
            "\nnext\n"
            f"{command} profile act {quoted(run)}  # control frequency on a robot\n"
            f"{command} evaluate {quoted(run)} --overlay --overwrite  # where the encoder looks\n"
            f"{command} quickstart --out {quoted(self.out)} --encoder vit_tiny  # dense attention"
        )

    def train_config(self, data: Path, run: Path) -> TrainConfig:
        """Settings that learn the task in about a minute on two cores."""
        return TrainConfig(
            data,
            run,
            policy=PolicyConfig(encoder=self.encoder),
            optimizer=OptimizerConfig(steps=self.steps, batch_size=32, lr=2e-3),
            seed=self.seed,
        )


class WallTimes:
    """Seconds per stage, in a file, so that a resumed run adds to them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        )

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        with atomic_write(self._path) as partial:
            partial.write_text(json.dumps(self.seconds, indent=2) + "\n", encoding="utf-8")

    @contextmanager
    def measure(self, stage: str, purpose: str) -> Iterator[None]:
        """Time a stage, even if it is interrupted."""
        print(f"{stage}: {purpose} ...", flush=True)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    def of_run(self, name: str) -> dict[str, float]:
        """The stages with the name of a run, and those that all runs share."""
        return {
            stage: seconds
            for stage, seconds in self.seconds.items()
            if " " not in stage or stage.endswith(f" {name}")
        }


def time_table(stages: dict[str, float]) -> str:
    """A plain-text table of the seconds per stage and their total."""
    rows = {**stages, "total": sum(stages.values())}
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:<{width}}  {seconds:7.1f} s" for name, seconds in rows.items())
