"""What is known before a study starts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_study import SMALL, SOURCE, Here, call

from fibopolicy.errors import UserError
from fibopolicy.study import StudyConfig, StudyEncoder, StudyHead, StudyTask, calibration, checks
from fibopolicy.study.built import build_cells
from fibopolicy.study.calibration import estimate
from fibopolicy.study.cells import Cell, cells, runs
from fibopolicy.study.checks import check, differences, heads, power, sizes
from fibopolicy.study.directory import StudyDirectory, write_json
from fibopolicy.study.runner import run_study
from fibopolicy.study.status import status
from fibopolicy.training import TrainConfig


def test_what_differs_is_what_the_study_names(config: StudyConfig) -> None:
    lines, _ = check(config, build_cells(config))
    assert lines[0] == "runs differ in place: out; encoder: policy.encoder"
    assert "equal in all 2 runs" in lines[1]
    assert (
        "encoder fibottention_vit_tiny is vit_tiny with attention fibottention instead of dense"
        in lines
    )
    grid = replace(config, tasks=("reach", "lift"), seeds=(0, 1), heads=("bc", "bc_gmm"))
    told = differences(grid)[0]
    for part in ("task: dataset", "seed: seed", "policy.head", "policy.horizon"):
        assert part in told


def test_what_a_head_sets_is_named_and_nothing_else(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = StudyHead("bc_gmm", {"head_options": {"min_std": 0.05}}, {"batch_size": 4}, steps=9)
    both = replace(config, heads=("bc", own))
    told = differences(both)[0]
    for setting in ("policy.head_options.min_std", "optimizer.steps", "optimizer.batch_size"):
        assert setting in told
    assert heads(both) == [
        "head bc_gmm has policy.head_options.min_std 0.05, optimizer.batch_size 4,"
        " optimizer.steps 9"
    ]
    monkeypatch.setattr(checks, "own_settings", lambda head: {})
    with pytest.raises(
        UserError, match=r"its cells differ in optimizer\.steps, which no part of the grid names"
    ):
        differences(both)


def test_heads_that_see_the_cameras_otherwise_are_told_apart(config: StudyConfig) -> None:
    cropped = replace(config, heads=("bc", StudyHead("bc", {"crop": 12}, name="cropped")))
    lines = sizes(cropped, build_cells(cropped))
    assert [line.split(":")[0] for line in lines] == ["reach, bc", "reach, cropped"]
    alike = replace(config, heads=("bc", "bc_gmm"))
    assert len(sizes(alike, build_cells(alike))) == 1


def test_a_difference_that_no_part_of_the_grid_names_is_refused(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sloppy(study: StudyConfig, cell: Any, seed: int, dataset: Path, out: Path) -> TrainConfig:
        return TrainConfig(dataset, out, log_every=3 if cell.encoder.name == "vit_tiny" else 4)

    monkeypatch.setattr(checks, "train_config", sloppy)
    with pytest.raises(
        UserError, match="its cells differ in log_every, which no part of the grid names"
    ):
        differences(config)


def test_unequal_numbers_of_parameters_are_stated(config: StudyConfig) -> None:
    wider = replace(
        config,
        encoders=("vit_tiny", StudyEncoder("vit_tiny", {"depth": 4}, name="deeper"), "resnet18"),
    )
    wider = replace(wider, tasks=(StudyTask("reach", image_size=48),))
    lines, _ = check(wider, build_cells(wider))
    told = "\n".join(lines)
    assert "encoder deeper is vit_tiny with depth 4 instead of 3" in told
    assert (
        "encoder resnet18 is another network than vit_tiny, with pooling of its own (keypoints 32,"
        " feature_dim 64)" in told
    )
    assert "but deeper" in lines[-1]
    assert "resnet18" in lines[-1]


def test_too_few_start_states_are_warned_of_with_the_number_needed(config: StudyConfig) -> None:
    assert "to tell 0.85 from 0.80 with 80 % power takes 671" in power(config)[0]
    assert power(replace(config, episodes=700)) == []
    assert power(replace(config, episodes=240, seeds=(0, 1, 2))) == []
    assert power(replace(config, encoders=("vit_tiny",))) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoders": ("vit_tinny",), "control": ""}, "did you mean 'vit_tiny'"),
        ({"encoders": (StudyEncoder("vit_tiny", {"dept": 2}),)}, "did you mean 'depth'"),
        (
            {"encoders": (StudyEncoder("vit_tiny", {**SMALL, "patch_size": 7}),)},
            "does not divide the image of 24 x 24",
        ),
        ({"heads": ("bcc",)}, "did you mean 'bc'"),
        (
            {"heads": (StudyHead("bc_gmm", {"head_options": {"min_sd": 1.0}}),)},
            "did you mean 'min_std'",
        ),
        ({"tasks": (StudyTask("reach", dataset=Path("nowhere.hdf5")),)}, r"nowhere\.hdf5"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        (
            {
                "regimes": ("frozen",),
                "encoders": (StudyEncoder("vit_tiny", SMALL, weights=Path("nope.safetensors")),),
            },
            r"nope\.safetensors: no such file or run directory",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_made(
    config: StudyConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_study(replace(config, **changes), tmp_path / "out", Here(), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": ("wrist", "frnt")}, r"unknown camera of .*reach\.hdf5: 'frnt': known: "),
        ({"filter_key": "trian"}, "did you mean 'train'"),
    ],
)
def test_what_a_file_does_not_have_is_named(
    config: StudyConfig, finished: StudyDirectory, changes: Any, message: str
) -> None:
    task = StudyTask("reach", dataset=finished.dataset(config.tasks[0]), **changes)
    with pytest.raises(UserError, match=message):
        build_cells(replace(config, tasks=(task,)))


def test_a_cell_that_failed_while_calibrated_is_calibrated_again(
    finished: StudyDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.path, out)
    (tmp_path / "my_study.py").write_text(SOURCE)
    study = StudyDirectory(out, finished.config)
    sound, broken = (cell.name for cell in cells(study.config))
    write_json(
        study.calibration,
        {"cells": {sound: {"train_s": 1.0, "evaluate_s": 1.0}, broken: {"error": "no space left"}}},
    )
    tried: list[str] = []

    def cell(study: StudyDirectory, cell: Cell) -> dict[str, float]:
        tried.append(cell.name)
        if len(tried) == 1:
            raise OSError("no space left")
        return {"train_s": 2.0, "evaluate_s": 2.0}

    monkeypatch.setattr(calibration, "_cell", cell)
    command = ("study", "run", str(tmp_path / "my_study.py"), "--out", str(out), "--prepare-only")
    code, _, err = call(monkeypatch, capsys, *command)
    assert code == 2
    assert f"1 of 2 cells fail already while they are calibrated, as told above ({broken})" in err
    assert call(monkeypatch, capsys, *command)[0] == 0
    assert tried == [broken, broken]


def test_a_study_keeps_its_checks_and_its_estimate(finished: StudyDirectory) -> None:
    text = finished.checks.read_text()
    assert "runs differ in place: out; encoder: policy.encoder" in text
    assert "warning: 2 episodes a cell" in text
    assert "2 runs to do, 1 at a time: about" in finished.log.read_text()


def test_the_estimate_counts_what_a_run_has_done(finished: StudyDirectory, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "out")
    study = StudyDirectory(tmp_path / "out", finished.config)
    calibrated = {cell.name: {"train_s": 60.0, "evaluate_s": 20.0} for cell in cells(study.config)}
    assert estimate(study, calibrated, 1) == (0.0, 0)
    first, second = runs(study.config)
    for run in (first, second):
        study.done(run).unlink()
    assert estimate(study, calibrated, 1) == (0.0, 2)
    (study.run(first) / "episodes.jsonl").write_text(
        (study.run(first) / "episodes.jsonl").read_text().splitlines(True)[0]
    )
    (study.run(second) / "episodes.jsonl").unlink()
    assert estimate(study, calibrated, 1) == (10.0 + 20.0, 2)
    (study.run(second) / "metrics.jsonl").write_text('{"step": 2}\n{"st')
    assert estimate(study, calibrated, 1) == (10.0 + 20.0 + 30.0, 2)
    assert estimate(study, calibrated, 2) == (50.0, 2)
    write_json(study.calibration, {"cells": calibrated})
    assert "about 60 s left, one run at a time and start-up aside" in status(study)
