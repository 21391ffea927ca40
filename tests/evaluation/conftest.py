from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fibopolicy.training import TrainConfig
from fibopolicy.training.trainer import train


@pytest.fixture(scope="session")
def tiny_run(tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training; tests copy it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train(replace(tiny_config, out=out))
    return out
