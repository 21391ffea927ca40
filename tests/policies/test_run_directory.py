from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fibopolicy.errors import UserError
from fibopolicy.policies import load_policy
from fibopolicy.policies.run_directory import RunDirectory, load_strictly


def test_reading_a_directory_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="section 'policy' is missing"):
        load_policy(tmp_path)


def test_removing_a_run_keeps_files_of_others(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    snapshot = RunDirectory(run.rollouts)
    written = [
        run.config,
        run.state,
        run.ema,
        run.best_checkpoint(100),
        run.episodes,
        run.init_states(3, "fast"),
        run.video("robosuite/Lift", 3, "best/step_000100"),
        run.report("ema", 3),
        run.success_by_step("ema", 0),
        run.path / "events.out.tfevents.1",
        snapshot.config,
        snapshot.rollout_log,
        snapshot.evaluation_lock,
    ]
    foreign = [run.path / "notes.txt", run.videos / "mine.mp4"]
    for path in (*written, *foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run.remove()
    assert not any(path.exists() for path in written)
    assert all(path.exists() for path in foreign)
    assert not run.best.exists()
    assert not run.rollouts.exists()


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded() -> None:
    module = torch.nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = {"weight": torch.zeros(4, 2), **{f"extra{i}": torch.zeros(1) for i in range(5)}}
    message = (
        r"x\.pt: its weights do not fit \(missing: bias; unknown: extra0, extra1, extra2 and 2"
        r" more; shape: weight 4x2 where 2x3 is expected\); do this"
    )
    with pytest.raises(UserError, match=message):
        load_strictly(module, tensors, "x.pt", "do this")
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
