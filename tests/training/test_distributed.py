from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import TINY_ENCODER_OPTIONS
from ranks import Call, Outcome, in_two_processes
from safetensors.torch import load_file

from fibopolicy.errors import UserError
from fibopolicy.policies import PolicyConfig
from fibopolicy.training import ComputeConfig, TrainConfig
from fibopolicy.training.trainer import Trainer, train


def curve(run: Path) -> np.ndarray:
    return np.array(
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    )


def interrupted_at(step: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the run as it is when it is stopped at a step."""
    whole = Trainer.train_step

    def stop(self: Trainer, number: int) -> dict[str, float]:
        if number == step:
            raise KeyboardInterrupt
        return whole(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)


@pytest.fixture(scope="module")
def configs(tiny_config: TrainConfig) -> dict[str, TrainConfig]:
    """Augmentation is on, and the padding at the ends of demonstrations makes the
    ranks' losses means over unequal numbers.
    """
    halves = ComputeConfig(accumulate=2)
    cnn = PolicyConfig(encoder="tiny_cnn", hidden=32, shift=2)
    batch_norm = replace(cnn, encoder_options={"batch_norm": True})
    return {
        "plain": tiny_config,
        "accumulated": replace(tiny_config, compute=halves),
        "unused weight": replace(tiny_config, policy=cnn),
        "batch norm": replace(tiny_config, policy=batch_norm),
        "frozen batch norm": replace(tiny_config, policy=batch_norm, freeze_encoder=True),
        "other world": tiny_config,
        "uneven": replace(tiny_config, optimizer=replace(tiny_config.optimizer, batch_size=9)),
        "dead rank": tiny_config,
    }


@pytest.fixture(scope="module")
def two(
    configs: dict[str, TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    """All of it in two processes; imports cost more than the trainings."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(6, replace(configs["other world"], out=folder / "other world"), patch)
    calls = [
        Call(
            replace(config, out=folder / name),
            {"resume": name == "other world"},
            dies_at=6 if name == "dead rank" else None,
        )
        for name, config in configs.items()
    ]
    return folder, in_two_processes(calls, folder)


@pytest.mark.filterwarnings("ignore:the frozen encoder has random weights")
@pytest.mark.parametrize(
    "name", ["plain", "accumulated", "unused weight", "frozen batch norm", "other world"]
)
def test_two_processes_train_as_one(
    name: str, two: tuple[Path, Outcome], configs: dict[str, TrainConfig], tmp_path: Path
) -> None:
    folder, outcome = two
    train(replace(configs[name], out=tmp_path / "one", compute=ComputeConfig()))
    np.testing.assert_allclose(curve(folder / name), curve(tmp_path / "one"), rtol=0, atol=1e-5)
    assert len(curve(folder / name)) == 12
    ours, theirs = (load_file(run / "ema.safetensors") for run in (folder / name, tmp_path / "one"))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)
    number = list(configs).index(name)
    assert (outcome.endings[0][number], outcome.endings[1][number]) == ("done", "done")


def test_only_rank_0_writes_and_prints(two: tuple[Path, Outcome]) -> None:
    folder, outcome = two
    assert outcome.printed[1] == ""
    assert len(list((folder / "plain").glob("events.*"))) == 1


def test_a_batch_that_cannot_be_split_is_one_error_and_ends_all_ranks(
    two: tuple[Path, Outcome], configs: dict[str, TrainConfig]
) -> None:
    folder, outcome = two
    number = list(configs).index("uneven")
    assert (
        outcome.endings[0][number]
        == "batch_size 9 cannot be split evenly into 2 processes x accumulate 1 parts; choose a"
        " multiple of 2"
    )
    assert outcome.endings[1][number] == 2
    assert not (folder / "uneven").exists()


def test_training_batch_norm_on_cpus_is_an_error_and_ends_all_ranks(
    two: tuple[Path, Outcome], configs: dict[str, TrainConfig]
) -> None:
    folder, outcome = two
    number = list(configs).index("batch norm")
    assert "batch norm cannot be synchronised over processes on a CPU; train in one process" in str(
        outcome.endings[0][number]
    )
    assert outcome.endings[1][number] == 2
    assert not (folder / "batch norm").exists()


def test_a_dead_rank_ends_the_others_and_the_run_resumes_later(
    two: tuple[Path, Outcome], configs: dict[str, TrainConfig], tmp_path: Path
) -> None:
    folder, outcome = two
    assert "another process of this run has ended" in str(outcome.endings[0][-1])
    assert len(outcome.endings[1]) == len(configs) - 1
    assert outcome.exit_codes == (0, -9)
    train(replace(configs["dead rank"], out=folder / "dead rank"), resume=True)
    np.testing.assert_allclose(
        curve(folder / "dead rank"), curve(folder / "plain"), rtol=0, atol=1e-5
    )


def test_an_incomplete_environment_is_named(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(
        UserError, match="several processes, but RANK is None; start them with `torchrun"
    ):
        train(replace(tiny_config, out=tmp_path / "run"))


@pytest.mark.slow
def test_torchrun_starts_the_command(
    lift_file: Path, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "fibopolicy", "train"]
    command += ["--dataset", str(lift_file), "--out", str(tmp_path / "run"), *TINY_ENCODER_OPTIONS]
    command += ["--steps", "2", "--batch-size", "8", "--warmup-steps", "1", "--log-every", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained to step 2") == 1
    assert len(curve(tmp_path / "run")) == 2
