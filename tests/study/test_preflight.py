"""The checks before a study starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_study import SMALL, Here

from fibopolicy.errors import UserError
from fibopolicy.study import StudyConfig, StudyEncoder, StudyPolicy, StudyTask, preflight
from fibopolicy.study.directory import StudyDirectory
from fibopolicy.study.grid import Run
from fibopolicy.study.preflight import (
    check,
    check_power,
    describe_differences,
    describe_policies,
    describe_sizes,
    model_sizes,
)
from fibopolicy.study.runner import run_study
from fibopolicy.training import TrainConfig


def test_what_differs_is_what_the_study_names(config: StudyConfig) -> None:
    lines, _ = check(config, model_sizes(config))
    assert lines[0] == "runs differ in place: out; encoder: policy.encoder"
    assert "equal in all 2 runs" in lines[1]
    assert (
        "encoder fibottention_vit_tiny is vit_tiny with attention fibottention instead of dense"
        in lines
    )
    grid = replace(config, tasks=("reach", "lift"), seeds=(0, 1), policies=("bc", "bc_gmm"))
    text = describe_differences(grid)[0]
    for part in ("task: dataset", "seed: seed", "policy.policy", "policy.horizon"):
        assert part in text


def test_the_settings_of_a_policy_are_named_and_nothing_else(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = StudyPolicy("bc_gmm", {"policy_options": {"min_std": 0.05}}, {"batch_size": 4}, steps=9)
    both = replace(config, policies=("bc", own))
    text = describe_differences(both)[0]
    for setting in ("policy.policy_options.min_std", "optimizer.steps", "optimizer.batch_size"):
        assert setting in text
    assert list(describe_policies(both)) == [
        "policy bc_gmm has policy.policy_options.min_std 0.05, optimizer.batch_size 4,"
        " optimizer.steps 9"
    ]
    monkeypatch.setattr(preflight, "policy_settings", lambda policy: {})
    with pytest.raises(
        UserError,
        match=r"its conditions differ in optimizer\.steps, which no axis of the grid decides",
    ):
        describe_differences(both)


def test_policies_that_see_the_cameras_differently_are_listed_apart(config: StudyConfig) -> None:
    cropped = replace(config, policies=("bc", StudyPolicy("bc", {"crop": 12}, name="cropped")))
    lines = list(describe_sizes(cropped, model_sizes(cropped)))
    assert [line.split(":")[0] for line in lines] == ["reach, bc", "reach, cropped"]
    alike = replace(config, policies=("bc", "bc_gmm"))
    assert len(list(describe_sizes(alike, model_sizes(alike)))) == 1


def test_a_difference_that_no_axis_of_the_grid_decides_is_refused(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sloppy(study: StudyConfig, run: Run, dataset: Path, out: Path) -> TrainConfig:
        name = run.condition.encoder.name
        return TrainConfig(dataset, out, log_every=3 if name == "vit_tiny" else 4)

    monkeypatch.setattr(preflight, "train_config", sloppy)
    with pytest.raises(
        UserError, match="its conditions differ in log_every, which no axis of the grid decides"
    ):
        describe_differences(config)


def test_unequal_numbers_of_parameters_are_stated(config: StudyConfig) -> None:
    wider = replace(
        config,
        encoders=("vit_tiny", StudyEncoder("vit_tiny", {"depth": 4}, name="deeper"), "resnet18"),
    )
    wider = replace(wider, tasks=(StudyTask("reach", image_size=48),))
    lines, _ = check(wider, model_sizes(wider))
    text = "\n".join(lines)
    assert "encoder deeper is vit_tiny with depth 4 instead of 3" in text
    assert (
        "encoder resnet18 is another network than vit_tiny, with other pooling (keypoints 32,"
        " feature_dim 64)" in text
    )
    assert "but deeper" in lines[-1]
    assert "resnet18" in lines[-1]


def test_too_few_initial_states_give_a_warning_with_the_number_needed(config: StudyConfig) -> None:
    assert "to distinguish 0.85 from 0.80 with 80 % power takes 671" in next(
        iter(check_power(config))
    )
    assert list(check_power(replace(config, episodes=700))) == []
    assert list(check_power(replace(config, episodes=240, seeds=(0, 1, 2)))) == []
    assert list(check_power(replace(config, encoders=("vit_tiny",)))) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoders": ("vit_tinny",), "baseline": ""}, "did you mean 'vit_tiny'"),
        ({"encoders": (StudyEncoder("vit_tiny", {"dept": 2}),)}, "did you mean 'depth'"),
        (
            {"encoders": (StudyEncoder("vit_tiny", {**SMALL, "patch_size": 7}),)},
            "does not divide the image of 24 x 24",
        ),
        ({"policies": ("bcc",)}, "did you mean 'bc'"),
        (
            {"policies": (StudyPolicy("bc_gmm", {"policy_options": {"min_sd": 1.0}}),)},
            "did you mean 'min_std'",
        ),
        ({"tasks": (StudyTask("reach", dataset=Path("nowhere.hdf5")),)}, r"nowhere\.hdf5"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available"),
        (
            {
                "inits": ("frozen",),
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
        model_sizes(replace(config, tasks=(task,)))


def test_a_study_keeps_its_checks(finished: StudyDirectory) -> None:
    text = finished.checks.read_text()
    assert "runs differ in place: out; encoder: policy.encoder" in text
    assert "warning: 2 episodes per condition" in text
