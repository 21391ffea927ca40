from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fibopolicy.errors import UserError
from fibopolicy.policies import build_policy
from fibopolicy.training import ComputeConfig, TrainConfig, loop, precision
from fibopolicy.training.batches import to_device
from fibopolicy.training.data import open_dataset, shapes_of
from fibopolicy.training.loop import train
from fibopolicy.training.precision import autocast, has_bf16_units, quicker

CPU = torch.device("cpu")
ZEN_3 = "processor\t: 0\nflags\t\t: fpu avx avx2 fma f16c vaes\n"
SAPPHIRE_RAPIDS = "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile\n"
GRAVITON_3 = "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n"


@pytest.mark.parametrize(("told", "expected"), [(ZEN_3, False), (SAPPHIRE_RAPIDS, True), (GRAVITON_3, True), (None, False)])
def test_units_are_known_from_the_processors_flags(told: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> str:
        if told is None:
            raise FileNotFoundError
        return told

    monkeypatch.setattr(Path, "read_text", read)
    assert has_bf16_units(CPU) is expected


def chosen(run: Path) -> str:
    return str(json.loads((run / "config.json").read_text())["train"]["compute"]["precision"])


def test_auto_is_float32_without_units_and_else_what_a_trial_says_and_stays(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "has_bf16_units", lambda device: False)
    monkeypatch.setattr(loop, "quicker", lambda *_: pytest.fail("timed in vain"))
    train(replace(tiny_config, out=tmp_path / "plain"))
    assert chosen(tmp_path / "plain") == "fp32"
    monkeypatch.setattr(loop, "has_bf16_units", lambda device: True)
    monkeypatch.setattr(loop, "quicker", lambda *_: "bf16")
    train(replace(tiny_config, out=tmp_path / "tried"))
    assert chosen(tmp_path / "tried") == "bf16"
    seen: list[str] = []
    monkeypatch.setattr(loop, "quicker", lambda *_: pytest.fail("timed again"))
    run = loop._run
    monkeypatch.setattr(loop, "_run", lambda start, engine: seen.append(engine.config.compute.precision) or run(start, engine))
    train(replace(tiny_config, out=tmp_path / "tried"), resume=True)
    assert seen == ["bf16"]


def test_the_trial_takes_what_is_quicker_and_leaves_policy_and_randomness_alone(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(tiny_config)
    policy = build_policy(tiny_config.policy, shapes_of(dataset))
    batch = to_device(dataset.batch(torch.arange(4).numpy()), CPU)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    state = torch.get_rng_state()
    assert quicker(policy, batch, CPU) in ("fp32", "bf16")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert all(p.grad is None for p in policy.parameters())
    for times, winner in (({"fp32": 1.0, "bf16": 0.5}, "bf16"), ({"fp32": 1.0, "bf16": 0.95}, "fp32")):
        monkeypatch.setattr(precision, "step_seconds", lambda policy, batch, device, name, times=times: times[name])
        assert quicker(policy, batch, CPU) == winner


@pytest.mark.filterwarnings("ignore:this cpu has no bfloat16 units")
def test_bf16_trains_to_a_like_loss_with_weights_in_float32(tiny_config: TrainConfig, tmp_path: Path) -> None:
    curves = []
    for name in ("fp32", "bf16"):
        done = train(replace(tiny_config, out=tmp_path / name, compute=ComputeConfig(precision=name)))
        assert {tensor.dtype for tensor in done.policy.parameters()} == {torch.float32}
        curves.append([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()])
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], abs=0.02)


def test_keypoints_stay_exact_under_autocast(tiny_config: TrainConfig) -> None:
    from fibopolicy.encoders import SpatialSoftmax

    pool = SpatialSoftmax(4, (7, 7), 3)
    with autocast("bf16", CPU):
        assert pool(torch.rand(2, 4, 7, 7)).dtype == torch.float32


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'bf16'"):
        ComputeConfig(precision="bf61")
