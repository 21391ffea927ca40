"""The commands that measure policies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.utils.files import check_output


@dataclass(frozen=True)
class Evaluate:
    """Roll a trained policy out over stored initial states and print its success rate
    with a 95 % Wilson interval.

    A robomimic checkpoint is one too; rows, video and page then lie in a folder beside
    it.

    Example: fibopolicy evaluate runs/lift --episodes 50
    """

    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")]
    resume: bool = False
    """Run only the episodes that have no row yet."""
    overwrite: bool = False
    """Replace an existing evaluation."""

    def run(self) -> None:
        from fibopolicy.evaluation.evaluate import evaluate_run
        from fibopolicy.policies.run_directory import open_run
        from fibopolicy.report.run import write_run_page
        from fibopolicy.report.tables import rate_table

        run = open_run(self.config.run)
        config = (
            self.config
            if run == self.config.run
            else replace(self.config, run=run, checkpoint="model")
        )
        done = evaluate_run(config, resume=self.resume, overwrite=self.overwrite)
        print(rate_table({str(self.config.run): done.rate}), flush=True)
        page = write_run_page(config.run, done)
        print(f"rows    {done.rows_path}\ninit states  {done.init_states_path}")
        if done.video_path:
            print(f"video   {done.video_path}")
        print(f"page    {page}")


@dataclass(frozen=True)
class Results:
    """Print the success rates of evaluated runs side by side, from their episode rows.

    Example: fibopolicy results runs/lift_seed0 runs/lift_seed1
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path | None = None
    """JSON file to write: the rates, the outcome of every episode, hardware and versions."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.evaluation.episodes import evaluations, success_rate
        from fibopolicy.policies.run_directory import RunDirectory
        from fibopolicy.report.run import trained_with, write_results
        from fibopolicy.report.tables import rate_table

        if not self.runs:
            raise UserError("name at least one run directory")
        if self.out is not None:
            inputs = [RunDirectory(run).episodes for run in self.runs]
            check_output(self.out, self.overwrite, inputs)
        of_runs = {run: evaluations(run) for run in self.runs}
        found = {name: rows for named in of_runs.values() for name, rows in named.items()}
        trained = {name: trained_with(run) for run, named in of_runs.items() for name in named}
        rates = {name: success_rate(rows) for name, rows in found.items()}
        print(rate_table(rates))
        if self.out is not None:
            write_results(self.out, found, rates, trained)
