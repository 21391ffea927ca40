from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fibopolicy.errors import UserError
from fibopolicy.training import ComputeConfig, TrainConfig, optim
from fibopolicy.training.optim import autocast, resolve_precision
from fibopolicy.training.trainer import Trainer, TrainResult, train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [(CPU, None, "fp32"), (CUDA, (7, 5), "fp32"), (CUDA, (8, 0), "bf16"), (CUDA, (9, 0), "bf16")],
)
def test_auto_precision_depends_on_the_device_s_capability(
    device: torch.device,
    capability: tuple[int, int] | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", device) == expected
    assert resolve_precision("bf16", device) == "bf16"
    assert resolve_precision("fp32", device) == "fp32"


def chosen(run: Path) -> str:
    return str(json.loads((run / "config.json").read_text())["train"]["compute"]["precision"])


def test_auto_precision_is_float32_on_a_cpu_with_bfloat16_units(
    tiny_config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    # no timing can favour one of them
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    with caplog.at_level("INFO", logger="fibopolicy"):
        train(replace(tiny_config, out=tmp_path / "run"))
    assert chosen(tmp_path / "run") == "fp32"
    assert "on cpu in fp32" in caplog.text


def test_a_resumed_run_keeps_its_precision(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    run = Trainer.train

    def noted(self: Trainer) -> TrainResult:
        seen.append(self.config.compute.precision)
        return run(self)

    monkeypatch.setattr(Trainer, "train", noted)
    with monkeypatch.context() as patch:
        patch.setattr(optim, "resolve_precision", lambda precision, device: "bf16")  # as on a GPU
        train(replace(tiny_config, out=tmp_path / "run"))
    train(replace(tiny_config, out=tmp_path / "run"), resume=True)
    assert seen == ["bf16", "bf16"]
    assert chosen(tmp_path / "run") == "bf16"


def test_bf16_reaches_a_similar_loss_with_float32_weights(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    curves = []
    for name in ("fp32", "bf16"):
        done = train(
            replace(tiny_config, out=tmp_path / name, compute=ComputeConfig(precision=name))
        )
        assert {tensor.dtype for tensor in done.policy.parameters()} == {torch.float32}
        curves.append(
            [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
        )
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], abs=0.02)


def test_keypoints_stay_exact_under_autocast(tiny_config: TrainConfig) -> None:
    from fibopolicy.encoders import SpatialSoftmax

    pool = SpatialSoftmax(4, (7, 7), 3)
    with autocast("bf16", CPU):
        assert pool(torch.rand(2, 4, 7, 7)).dtype == torch.float32


def test_unknown_precisions_are_rejected() -> None:
    with pytest.raises(UserError, match="did you mean 'bf16'"):
        ComputeConfig(precision="bf61")
