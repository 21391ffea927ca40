"""The configuration of a study, from Python and from a file."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_study import SMALL, SOURCE

from fibopolicy.errors import UserError
from fibopolicy.study import StudyConfig, StudyEncoder, StudyPolicy, StudyTask
from fibopolicy.study.config import from_json, load_study, to_json
from fibopolicy.study.grid import Condition, Run, conditions, runs, train_config
from fibopolicy.study.preflight import describe_differences

STUDIES = Path(__file__).parents[2] / "scripts" / "studies"


def test_a_study_survives_its_file(config: StudyConfig) -> None:
    full = replace(
        config,
        tasks=(
            StudyTask("lift", dataset=Path("some.hdf5"), cameras=("wrist",)),
            StudyTask("robosuite/Lift"),
        ),
        encoders=("resnet18", StudyEncoder("vit_tiny", SMALL, name="small")),
        policies=(
            "bc",
            StudyPolicy(
                "bc_gmm",
                {"horizon": 8, "policy_options": {"min_std": 0.05}},
                {"batch_size": 16},
                300,
                "gmm",
            ),
        ),
        baseline="small",
        optimizer={"betas": (0.9, 0.99)},
    )
    again = from_json(json.loads(json.dumps(to_json(full))))
    assert to_json(again) == to_json(full)
    assert again.tasks == full.tasks
    assert again.policies == full.policies
    assert again.tasks[0].dataset == Path("some.hdf5").absolute()


def test_the_settings_of_a_policy_replace_the_studys(config: StudyConfig, tmp_path: Path) -> None:
    own = StudyPolicy(
        "bc_gmm",
        {"hidden": 16, "policy_options": {"min_std": 0.05}},
        {"batch_size": 4},
        steps=9,
        name="gmm",
    )
    both = replace(config, policies=("bc", own))
    plain, gmm = (
        train_config(both, Run(one, 0), tmp_path, tmp_path) for one in conditions(both)[::2]
    )
    assert (plain.policy.policy, plain.policy.hidden, plain.policy.policy_options) == ("bc", 32, {})
    assert (plain.optimizer.steps, plain.optimizer.batch_size, plain.optimizer.warmup_steps) == (
        6,
        8,
        2,
    )
    assert (gmm.policy.policy, gmm.policy.hidden, gmm.policy.policy_options) == (
        "bc_gmm",
        16,
        {"min_std": 0.05},
    )
    assert (gmm.optimizer.steps, gmm.optimizer.batch_size, gmm.optimizer.warmup_steps) == (9, 4, 2)
    assert conditions(both)[2].name == "reach__fibottention_vit_tiny__gmm__scratch"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"policy_config": {"hiden": 3}},
            "unknown policy_config option of policy bc: 'hiden': did you mean 'hidden'",
        ),
        (
            {"policy_config": {"encoder": "resnet18"}},
            "policy bc: policy_config option encoder follows from the study, from its encoders",
        ),
        (
            {"optimizer": {"batch": 3}},
            "unknown optimizer option of policy bc: 'batch': did you mean 'batch_size'",
        ),
        (
            {"optimizer": {"steps": 3}},
            "policy bc: optimizer option steps follows from the study, from its steps",
        ),
        ({"steps": 0}, "policy bc: steps must be at least 1, got 0"),
    ],
)
def test_settings_that_no_policy_has_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StudyPolicy("bc", **settings)


def test_the_grid_has_every_combination_once(config: StudyConfig) -> None:
    grid = replace(
        config, tasks=("Lift-v0", "robosuite/Lift"), policies=("bc", "bc_gmm"), seeds=(3, 1)
    )
    names = [one.name for one in conditions(grid)]
    assert len(names) == len(set(names)) == 8
    assert "lift__vit_tiny__bc_gmm__scratch" in names
    assert "robosuite-Lift__fibottention_vit_tiny__bc__scratch" in names
    every = runs(grid)
    assert [run.seed for run in every] == [3] * 8 + [1] * 8  # whole grids of the first seeds first
    assert every[0].name.endswith("/seed3")


def test_names_of_conditions_are_names_of_folders(config: StudyConfig) -> None:
    odd = replace(config, encoders=("timm:vit_tiny.in1k", "mine.models:make"), baseline="")
    assert [one.name for one in conditions(odd)] == [
        "reach__timm-vit_tiny.in1k__bc__scratch",
        "reach__mine.models-make__bc__scratch",
    ]
    with pytest.raises(UserError, match="two conditions would be called reach__a-b"):
        conditions(
            replace(
                config,
                encoders=(
                    StudyEncoder("vit_tiny", name="a:b"),
                    StudyEncoder("vit_tiny", name="a b"),
                ),
                baseline="",
            )
        )


def test_the_baseline_is_the_plain_vit_unless_named(config: StudyConfig) -> None:
    assert config.baseline == "vit_tiny"
    assert (
        replace(config, encoders=("resnet18", "local_vit_tiny"), baseline="").baseline == "resnet18"
    )
    with pytest.raises(
        UserError, match="unknown encoder as the baseline 'vit_tny': did you mean 'vit_tiny'"
    ):
        replace(config, baseline="vit_tny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("Lyft-v0",)}, "did you mean 'Lift-v0'"),
        ({"tasks": "lift"}, "tasks of a study: expected a sequence"),
        ({"encoders": ()}, "encoders of a study: expected at least one"),
        ({"seeds": (0, 0)}, "0 appears twice among its seeds"),
        ({"seeds": (-1,)}, "integers from 0"),
        ({"encoders": ("vit_tiny", "vit_tiny")}, "vit_tiny appears twice among its encoders"),
        ({"inits": ("frozn",)}, "did you mean 'frozen'"),
        (
            {"inits": ("frozen",)},
            "needs weights to start from, and encoder fibottention_vit_tiny has none",
        ),
        ({"policy_config": {"hiden": 3}}, "did you mean 'hidden'"),
        ({"policy_config": {"encoder": "resnet18"}}, "follows from the study"),
        ({"optimizer": {"steps": 3}}, "follows from the study"),
        ({"optimizer": {"weight_deca": 3}}, "did you mean 'weight_decay'"),
        (
            {"policies": (StudyPolicy("bc"), StudyPolicy("bc", steps=9))},
            "bc appears twice among its policies",
        ),
        (
            {"policies": (StudyPolicy("bc", {"horizon": 2}),)},
            "study tiny, policy bc: n_action_steps must be between 1 and horizon = 2, got 4",
        ),
        (
            {"policies": (StudyPolicy("bc", optimizer={"batch_size": 0}),)},
            "study tiny, policy bc: batch_size must be at least 1",
        ),
        (
            {"policies": (StudyPolicy("bc", {"horizon": "x"}),)},
            r"study tiny, policy bc: .* \(given .*'horizon': 'x'",
        ),
        ({"steps": 0}, "steps must be at least 1"),
        ({"margin": 5}, "between 0 and 1"),
    ],
)
def test_values_that_make_no_study_are_named(
    config: StudyConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        replace(config, **changes)


def test_inits_decide_the_weights_that_training_starts_from(
    config: StudyConfig, tmp_path: Path
) -> None:
    encoder = StudyEncoder(
        "timm:vit_tiny_patch16_224", {"pretrained": True}, weights=tmp_path / "vit.safetensors"
    )
    task = config.tasks[0]
    condition = Condition(task, encoder, StudyPolicy("bc"), "scratch")
    scratch = train_config(config, Run(condition, 0), tmp_path, tmp_path)
    assert scratch.policy.encoder_options == {}
    condition = Condition(task, encoder, StudyPolicy("bc"), "frozen")
    frozen = dataclasses.asdict(train_config(config, Run(condition, 0), tmp_path, tmp_path))
    assert frozen["freeze_encoder"]
    assert frozen["encoder_weights"] == tmp_path / "vit.safetensors"
    assert frozen["policy"]["encoder_options"] == {"pretrained": True}


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.py")), ids=lambda path: path.stem)
def test_the_studies_of_the_repository_are_consistent(path: Path) -> None:
    found, _ = load_study(str(path))
    assert found.name == path.stem
    assert from_json(to_json(found)) == found
    assert f"equal in all {len(runs(found))} runs" in describe_differences(found)[1]


def test_the_examples_of_the_documentation_are_studies() -> None:
    text = (STUDIES.parents[1] / "docs" / "guides" / "studies.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    assert replace(names["study"](), policies=names["policies"]).name == "lift_encoders"


def test_a_file_names_its_function(tmp_path: Path) -> None:
    path = tmp_path / "my_study.py"
    path.write_text(
        SOURCE + "\n\ndef other():\n    return 3\n\n\ndef broken():\n    return 1 / 0\n"
    )
    found, folder = load_study(str(path))
    assert (found.name, folder) == ("tiny", tmp_path)
    assert load_study(f"{path}:study")[0] == found
    for name, message in (
        ("studdy", "unknown function of .*: 'studdy': did you mean 'study'"),
        ("other", "must return a StudyConfig, got int"),
        ("broken", r"broken\(\) failed: ZeroDivisionError"),
    ):
        with pytest.raises(UserError, match=message):
            load_study(f"{path}:{name}")
    with pytest.raises(UserError, match=r"nowhere\.py: no such file"):
        load_study(str(tmp_path / "nowhere.py"))
    with pytest.raises(UserError, match="expected a Python file"):
        load_study(str(tmp_path / "study.yaml"))
    (tmp_path / "bad.py").write_text("import nothing_of_this_name")
    with pytest.raises(UserError, match=r"bad\.py: cannot be run: ModuleNotFoundError"):
        load_study(str(tmp_path / "bad.py"))


def test_paths_of_a_study_are_found_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "my_study.py").write_text(
        SOURCE.replace("demos=11", 'dataset="data/reach.hdf5"').replace(
            '"vit_tiny", SMALL', '"vit_tiny", SMALL, weights="run"'
        )
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    found, _ = load_study("../my_study.py")
    assert found.tasks[0].dataset == tmp_path / "data/reach.hdf5"
    assert found.encoders[1].weights == tmp_path / "run"
    assert Path.cwd() == tmp_path / "elsewhere"


def test_an_impossible_task_is_refused() -> None:
    with pytest.raises(UserError, match="max_steps must be at least 1, got 0"):
        StudyTask("reach", max_steps=0)
    with pytest.raises(
        UserError,
        match=r"cameras of fibopolicy/Reach-v0: expected a sequence, .* write \('wrist',\)",
    ):
        StudyTask("reach", cameras="wrist")  # type: ignore[arg-type]


def test_an_encoder_with_its_own_init_is_compared_with_those_from_scratch(
    config: StudyConfig, tmp_path: Path
) -> None:
    tuned = StudyEncoder("efficientnet_lite0", {"pretrained": True}, name="tuned", init="finetune")
    frozen = replace(tuned, name="frozen", init="frozen")
    mixed = replace(config, encoders=("efficientnet_lite0", tuned, frozen), baseline="")
    found = conditions(mixed)
    assert [one.name.split("__")[1:] for one in found] == [
        ["efficientnet_lite0", "bc", "scratch"],
        ["tuned", "bc", "finetune"],
        ["frozen", "bc", "frozen"],
    ]
    assert {one.study_init for one in found} == {"scratch"}
    trainings = [train_config(mixed, Run(one, 0), tmp_path, tmp_path) for one in found]
    assert [one.freeze_encoder for one in trainings] == [False, False, True]
    assert [one.policy.encoder_options for one in trainings] == [{}, *[{"pretrained": True}] * 2]
    (text,) = [line for line in describe_differences(mixed) if "freeze_encoder" in line]
    assert "encoder: freeze_encoder, policy.encoder_options.pretrained" in text
    assert from_json(to_json(mixed)) == mixed
    with pytest.raises(UserError, match="which needs a study with the init scratch alone"):
        replace(mixed, inits=("scratch", "frozen"), encoders=(tuned,))
    with pytest.raises(UserError, match="did you mean 'frozen'"):
        replace(mixed, encoders=(replace(tuned, init="frozn"),))
    with pytest.raises(UserError, match="and encoder plain has none"):
        replace(mixed, encoders=(StudyEncoder("vit_tiny", name="plain", init="frozen"),))
