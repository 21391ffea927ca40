from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fibopolicy.errors import UserError
from fibopolicy.training import TrainConfig
from fibopolicy.training.trainer import train


@pytest.mark.slow
def test_metrics_go_to_weights_and_biases_without_a_network(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = replace(tiny_config, out=tmp_path / "run", wandb="fibopolicy-tests")
    train(config)
    identity = (config.out / "wandb.json").read_text()
    stored = list((config.out / "wandb").glob("offline-run-*/*.wandb"))
    assert len(stored) == 1
    names = (b"lr", b"gradient_norm", b"data_share", b"fibottention_vit_tiny")
    # a process of wandb's writes the file, and may end after the run has
    deadline = time.monotonic() + 300
    while (
        not all(name in (content := stored[0].read_bytes()) for name in names)
        and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    assert [name for name in names if name not in content] == []
    train(config, resume=True)
    assert (config.out / "wandb.json").read_text() == identity  # the same run there
    train(config, overwrite=True)
    assert (config.out / "wandb.json").read_text() != identity


def test_a_missing_wandb_is_reported(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'fibopolicy\[wandb\]'"):
        train(replace(tiny_config, out=tmp_path / "run", wandb="fibopolicy-tests"))
    assert not (tmp_path / "run").exists()
