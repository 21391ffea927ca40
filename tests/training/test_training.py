from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from command import TINY_ENCODER_OPTIONS, call
from safetensors.torch import load_file
from torch import nn

from fibopolicy.datasets import DemoFile, DemoWriter
from fibopolicy.errors import UserError
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.training import OptimizerConfig, TrainConfig
from fibopolicy.training.distributed import World
from fibopolicy.training.optim import EMA
from fibopolicy.training.trainer import Trainer, train
from fibopolicy.utils.files import directory_lock


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_every_file_of_its_contract(tiny_config: TrainConfig, tmp_path: Path) -> None:
    done = train(replace(tiny_config, out=tmp_path / "run"))
    names = {
        p.name.split(".")[0] if "tfevents" in p.name else p.name
        for p in (tmp_path / "run").iterdir()
    }
    assert names == {
        "config.json",
        "model.safetensors",
        "ema.safetensors",
        "state.pt",
        "metrics.jsonl",
        "events",
    }
    loaded = load_policy(tmp_path / "run")
    assert (loaded.step, loaded.total_steps) == (12, 12)
    for name, tensor in done.policy.state_dict().items():
        torch.testing.assert_close(loaded.policy.state_dict()[name], tensor, rtol=0, atol=0)
    assert [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ] == list(range(12))


def test_the_loss_falls(tiny_config: TrainConfig, tmp_path: Path) -> None:
    longer = replace(
        tiny_config,
        out=tmp_path / "run",
        optimizer=OptimizerConfig(steps=120, batch_size=16, warmup_steps=10),
    )
    train(longer)
    curve = losses(tmp_path / "run")
    assert np.mean(curve[-10:]) < 0.6 * np.mean(curve[:5])


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(replace(tiny_config, out=tmp_path / name, seed=seed))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")
    assert (tmp_path / "a/ema.safetensors").read_bytes() == (
        tmp_path / "b/ema.safetensors"
    ).read_bytes()


def test_random_numbers_of_samples_depend_on_the_seed_and_the_step(
    tiny_config: TrainConfig,
) -> None:
    def number(seed: int, step: int) -> float:
        trainer = Trainer(replace(tiny_config, seed=seed), World())
        return trainer._seed(step, 0, 1).rand(1, device=trainer.device).item()

    assert number(0, 5) == number(0, 5)
    assert len({number(seed, step) for seed in (0, 1) for step in (5, 6)}) == 4


def test_an_interrupted_command_resumes_to_bit_identical_weights(
    lift_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_command = ["train", "--dataset", str(lift_file), "--steps", "24", "--batch-size", "8"]
    train_command += [*TINY_ENCODER_OPTIONS, "--shift", "2"]
    train_command += ["--checkpoint-every", "7", "--log-every", "1", "--warmup-steps", "5"]
    whole = [*train_command, "--out", str(tmp_path / "whole")]
    stopped = [*train_command, "--out", str(tmp_path / "stopped")]
    assert call(monkeypatch, capsys, *whole)[0] == 0

    train_step = Trainer.train_step

    def stop(self: Trainer, number: int) -> dict[str, float]:
        if number == 12:  # after the first checkpoint, amid the second stretch
            raise KeyboardInterrupt
        return train_step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        code, _, error = call(monkeypatch, capsys, *stopped)
    assert code == 130
    assert "--resume" in error
    code, _, error = call(monkeypatch, capsys, *stopped)
    assert code == 2
    assert "--resume" in error
    assert call(monkeypatch, capsys, *stopped, "--resume")[0] == 0
    for name in ("model.safetensors", "ema.safetensors"):
        kept = (tmp_path / "stopped" / name).read_bytes()
        assert (tmp_path / "whole" / name).read_bytes() == kept
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


def test_a_missing_weights_file_is_written_again_on_resume(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    train(config)
    kept = (config.out / "ema.safetensors").read_bytes()
    (config.out / "ema.safetensors").unlink()
    train(config, resume=True)
    assert (config.out / "ema.safetensors").read_bytes() == kept


def test_resuming_with_another_configuration_names_the_setting(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    train(config)
    with pytest.raises(UserError, match="already; pass --resume"):
        train(config)
    with pytest.raises(UserError, match=r"train\.seed = 0 there, 3 now"):
        train(replace(config, seed=3), resume=True)
    with pytest.raises(UserError, match=r"policy\.horizon = 8 there, 6 now"):
        train(replace(config, policy=replace(config.policy, horizon=6)), resume=True)
    with pytest.raises(
        UserError, match=r"train\.optimizer\.encoder_lr_scale = 1\.0 there, 0\.5 now; use that"
    ):
        train(
            replace(config, optimizer=replace(config.optimizer, encoder_lr_scale=0.5)), resume=True
        )


def test_resuming_on_other_data_names_the_statistic(
    tiny_config: TrainConfig, lift_file: Path, tmp_path: Path
) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    train(config)
    moved = tmp_path / "moved.hdf5"
    moved.write_bytes(lift_file.read_bytes())
    train(replace(config, dataset=moved), resume=True)
    with h5py.File(moved, "a") as file:
        file["data/demo_0/obs/hand_position"][:, 1] += 3.0
    with pytest.raises(
        UserError,
        match=r"run: was trained on other data than .*moved\.hdf5: max of hand_position was \[",
    ):
        train(replace(config, dataset=moved), resume=True)


def test_missing_and_unknown_weights_of_a_state_are_named(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    train(config)
    state = torch.load(config.out / "state.pt", weights_only=True)
    state["policy"]["mlp.9.bias"] = state["policy"].pop("mlp.0.bias")
    torch.save(state, config.out / "state.pt")
    with pytest.raises(
        UserError, match=r"state\.pt: .*missing: mlp\.0\.bias; unknown: mlp\.9\.bias"
    ):
        train(config, resume=True)


def test_a_corrupt_state_is_named_and_does_not_run_code(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    train(config)
    whole = (config.out / "state.pt").read_bytes()
    (config.out / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"state\.pt: cannot resume from it"):
        train(config, resume=True)

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save(Evil(), config.out / "state.pt")
    with pytest.raises(UserError, match="cannot resume from it"):
        train(config, resume=True)
    assert not (tmp_path / "executed").exists()


def test_a_folder_with_other_files_is_not_touched(tiny_config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds no run"):
            train(replace(tiny_config, out=tmp_path), overwrite=overwrite)
    assert (tmp_path / "thesis.tex").exists()


def test_weights_that_do_not_match_the_configuration_are_rejected(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    train(config)
    document = json.loads((config.out / "config.json").read_text())
    document["policy"]["hidden"] = 17
    (config.out / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"weights do not fit .* config\.json"):
        load_policy(config.out)


def test_a_loss_that_is_not_finite_stops_with_the_step(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    wild = replace(
        tiny_config,
        out=tmp_path / "run",
        optimizer=OptimizerConfig(steps=200, batch_size=8, lr=1e30, warmup_steps=0),
    )
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d+"):
        train(wild)


def test_ema_follows_the_stated_recursion_and_copies_buffers() -> None:
    module = nn.BatchNorm1d(2)
    ema = EMA(module, 0.5)
    with torch.no_grad():
        module.weight.fill_(3.0)
        module.running_mean.fill_(7.0)
    ema.update(module, 0)  # the decay starts at 1 / 10
    torch.testing.assert_close(ema.average.weight, torch.full((2,), 0.1 * 1 + 0.9 * 3))
    ema.update(module, 1000)
    torch.testing.assert_close(ema.average.weight, torch.full((2,), 0.5 * 2.8 + 0.5 * 3))
    torch.testing.assert_close(ema.average.running_mean, torch.full((2,), 7.0))


def test_object_poses_do_not_count_as_proprioception(
    tmp_path: Path, tiny_config: TrainConfig, lift_file: Path
) -> None:
    with DemoFile(lift_file) as file:
        obs = {
            key: file.read("demo_0", f"obs/{key}") for key in (*file.image_keys, *file.vector_keys)
        }
        arrays = {
            key: file.read("demo_0", key) for key in ("actions", "states", "rewards", "dones")
        }
        with DemoWriter(tmp_path / "cheat.hdf5", file.env_args) as writer:
            writer.add(
                {**obs, "object": np.zeros((len(arrays["actions"]), 10), np.float32)}, **arrays
            )
    train(replace(tiny_config, dataset=tmp_path / "cheat.hdf5", out=tmp_path / "run"))
    shapes = json.loads((tmp_path / "run/config.json").read_text())["shapes"]
    assert set(shapes["vectors"]) == {"hand_position", "gripper_opening"}
    assert set(shapes["images"]) == {"workspace_image", "wrist_image"}


def test_checkpoints_hold_no_code(tiny_config: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny_config, out=tmp_path / "run"))
    state = torch.load(tmp_path / "run/state.pt", weights_only=True)
    assert state["step"] == 12
    assert load_file(tmp_path / "run/model.safetensors").keys() == state["policy"].keys()


def test_overwriting_keeps_files_that_no_run_wrote(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    train(config)
    for name in ("notes.jsonl", "other.safetensors", "videos/mine.mp4"):
        (config.out / name).parent.mkdir(exist_ok=True)
        (config.out / name).write_text("mine")
    train(config, overwrite=True)
    assert all(
        (config.out / name).exists()
        for name in ("notes.jsonl", "other.safetensors", "videos/mine.mp4")
    )
    foreign = tmp_path / "bert"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is not a run's configuration"):
        train(replace(config, out=foreign), overwrite=True)
    assert (foreign / "config.json").exists()


def test_two_trainings_do_not_share_a_directory(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    train(config)
    kept = (config.out / "state.pt").read_bytes()
    with directory_lock(config.out):
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match="another process is using it"):
                train(replace(config, seed=1), **options)
    assert (config.out / "state.pt").read_bytes() == kept


def test_resume_and_overwrite_together_are_rejected(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="either --resume or --overwrite"):
        train(replace(tiny_config, out=tmp_path / "run"), resume=True, overwrite=True)


def test_resuming_a_run_without_its_state_is_an_error(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    train(config)
    (config.out / "state.pt").unlink()
    with pytest.raises(UserError, match=r"state\.pt: is missing"):
        train(config, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"seed": 1 << 40},
        {"checkpoint_every": 0},
        {"log_every": 0},
        {"device": "foo"},
        {"device": "cuda:99"},
    ],
)
def test_values_out_of_range_are_rejected_before_anything_is_written(
    tiny_config: TrainConfig, tmp_path: Path, change: dict[str, object]
) -> None:
    with pytest.raises(UserError):
        train(replace(tiny_config, out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()
