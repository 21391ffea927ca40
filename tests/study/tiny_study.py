"""A study that takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from command import call as call
from runs_here import Here as Here

from fibopolicy.study.directory import StudyDirectory, write_json
from fibopolicy.study.executors import NextRun
from fibopolicy.study.grid import Run
from fibopolicy.study.records import DIVERGED, record_failure

SMALL = {"patch_size": 12, "width": 24, "depth": 1, "num_heads": 2, "keypoints": 4}

#: The study as a user's file.
SOURCE = f"""
from fibopolicy.study import StudyConfig, StudyEncoder, StudyTask

SMALL = {SMALL}

def study():
    return StudyConfig(
        "tiny",
        tasks=[StudyTask("reach", demos=11, image_size=24, max_steps=6)],
        encoders=[StudyEncoder("fibottention_vit_tiny", SMALL), StudyEncoder("vit_tiny", SMALL)],
        seeds=(0,),
        steps=6,
        episodes=2,
        videos=1,
        optimizer={{"batch_size": 8, "warmup_steps": 2}},
        policy_config={{"hidden": 32}},
    )
"""


@dataclass
class Pretending(Here):
    """Saves the time of the runs, and fails the one of this name."""

    broken: str = ""

    def execute(
        self, study: StudyDirectory, next_run: NextRun, folder: Path
    ) -> Iterator[tuple[Run, float]]:
        for run in iter(next_run, None):
            self.executed.append(run.name)
            if run.name == self.broken:
                record_failure(study, run, "OSError: disk", 1)
            else:
                write_json(study.done(run), {DIVERGED: "the loss is nan"})
            yield run, 0.0
