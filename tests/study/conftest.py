"""A study that many tests read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_study import SOURCE, Here

from fibopolicy.study import StudyConfig
from fibopolicy.study.directory import StudyDirectory
from fibopolicy.study.runner import run_study


@pytest.fixture(scope="session")
def config() -> StudyConfig:
    names: dict[str, object] = {}
    exec(SOURCE, names)
    return names["study"]()  # type: ignore[operator]


@pytest.fixture(scope="session")
def finished(config: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> StudyDirectory:
    """A study that is done; for reading only."""
    out = tmp_path_factory.mktemp("studies") / "tiny"
    outcome = run_study(config, out, Here(), out.parent)
    assert (outcome.total, outcome.done, outcome.failed) == (2, 2, ())
    return StudyDirectory(out, config)


@pytest.fixture(scope="session")
def with_data(finished: StudyDirectory) -> StudyConfig:
    """The same study on the demonstrations of the finished one, so that none are collected."""
    (task,) = finished.config.tasks
    return replace(finished.config, tasks=(replace(task, dataset=finished.dataset(task)),))
