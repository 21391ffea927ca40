from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.torch import load_file

from fibopolicy.datasets import DemoFile, Mixture
from fibopolicy.errors import UserError
from fibopolicy.policies import PolicyConfig, build_policy
from fibopolicy.training import TrainConfig
from fibopolicy.training.config import ValidationConfig
from fibopolicy.training.data import (
    left_out,
    narrow_distributions,
    open_dataset,
    open_validation,
    shapes_of,
)
from fibopolicy.training.trainer import Trainer, train


@pytest.fixture
def second_file(lift_file: Path, tmp_path: Path) -> Path:
    """The same demonstrations in another file, where filter key good names two
    of them and train is missing.
    """
    path = tmp_path / "second.hdf5"
    path.write_bytes(lift_file.read_bytes())
    with h5py.File(path, "a") as file:
        del file["mask"]
        file["mask/good"] = np.array(["demo_1", "demo_4"], dtype="S")
    return path


def demos(config: TrainConfig) -> list[int]:
    dataset = open_dataset(config)
    return (
        [part.num_demos for part in dataset.parts]
        if isinstance(dataset, Mixture)
        else [dataset.num_demos]
    )


def test_filter_keys_are_for_all_files_or_for_each(
    tiny_config: TrainConfig, second_file: Path
) -> None:
    both = replace(tiny_config, dataset=(tiny_config.dataset, second_file))
    assert demos(both) == [10, 11]  # by default train where a file has it, else all
    assert demos(replace(both, filter_key=("valid", "good"))) == [1, 2]
    assert demos(replace(both, filter_key="all")) == [11, 11]
    assert demos(replace(tiny_config, dataset=(second_file, second_file), filter_key="good")) == [
        2,
        2,
    ]
    with pytest.raises(
        UserError, match=r"second\.hdf5: unknown filter key 'god': did you mean 'good'"
    ):
        open_dataset(replace(both, filter_key=("train", "god")))
    with pytest.raises(UserError, match="filter_key: got 2 for 1 files"):
        replace(tiny_config, filter_key=("train", "good"))
    with pytest.raises(UserError, match="name at least one file"):
        replace(tiny_config, dataset=())
    with pytest.raises(UserError, match="dataset_weights: got 2 for 1 files"):
        open_dataset(replace(tiny_config, dataset_weights=(1.0, 2.0)))


def test_a_list_of_one_file_equals_that_file(tiny_config: TrainConfig) -> None:
    assert replace(tiny_config, dataset=(tiny_config.dataset,)) == tiny_config


def test_a_run_on_a_mixture_resumes_to_the_same_weights(
    tiny_config: TrainConfig, second_file: Path, tmp_path: Path
) -> None:
    config = replace(
        tiny_config,
        dataset=(tiny_config.dataset, second_file),
        dataset_weights=(1.0, 3.0),
        out=tmp_path / "whole",
    )
    train(config)
    cut = replace(config, out=tmp_path / "cut", checkpoint_every=5)
    with pytest.MonkeyPatch.context() as patch:
        whole = Trainer.train_step
        patch.setattr(Trainer, "train_step", lambda self, step: whole(self, stop_at(step, 8)))
        with pytest.raises(RuntimeError, match="wanted elsewhere"):
            train(cut)
    train(cut, resume=True)
    whole, resumed = (load_file(tmp_path / name / "ema.safetensors") for name in ("whole", "cut"))
    assert all((whole[name] == resumed[name]).all() for name in whole)
    stored = json.loads((tmp_path / "whole/config.json").read_text())["train"]
    assert (stored["dataset_weights"], stored["demos"]) == ([1.0, 3.0], 21)
    with pytest.raises(UserError, match=r"train\.dataset_weights\[1\] = 3.0 there, 1.0 now"):
        train(replace(config, dataset_weights=(1.0, 1.0)), resume=True)


def stop_at(step: int, last: int) -> int:
    if step == last:
        raise RuntimeError("the machine is wanted elsewhere")
    return step


def validating(config: TrainConfig, key: str, **options: object) -> TrainConfig:
    return replace(config, validation=ValidationConfig(validate_on=key, **options))  # type: ignore[arg-type]


def test_validation_reads_the_demos_of_its_key_in_every_file_that_has_it(
    tiny_config: TrainConfig, second_file: Path
) -> None:
    config = validating(replace(tiny_config, dataset=(tiny_config.dataset, second_file)), "valid")
    validation = open_validation(config, open_dataset(config))
    assert validation is not None
    assert validation.num_demos == 1
    assert open_validation(tiny_config, open_dataset(tiny_config)) is None


def test_validating_on_training_demos_is_rejected(tiny_config: TrainConfig) -> None:
    config = validating(replace(tiny_config, filter_key="all"), "valid")
    with pytest.raises(
        UserError, match="1 of 1 demos of filter key 'valid' are trained on as well, such as demo_"
    ):
        open_validation(config, open_dataset(config))


def test_an_unknown_validation_key_suggests_the_nearest(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match="validate_on: unknown filter key 'vaild': did you mean 'valid'"
    ):
        train(replace(validating(tiny_config, "vaild"), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_narrow_distributions_on_actions_at_their_limits_give_a_warning(
    tiny_config: TrainConfig, second_file: Path, tmp_path: Path
) -> None:
    with h5py.File(second_file, "a") as file:
        for name, demo in file["data"].items():
            actions = np.random.default_rng(int(name.removeprefix("demo_"))).uniform(
                -1, 1, demo["actions"].shape
            )
            # 60 % of one axis at a limit
            actions[:, 1] = np.where(actions[:, 1] < 0.2, -1, actions[:, 1])
            actions[:, 3] = np.sign(actions[:, 3])  # the gripper
            demo["actions"][...] = actions

    def warnings(policy: str, **options: float) -> list[str]:
        config = replace(
            tiny_config,
            dataset=(tiny_config.dataset, second_file),
            policy=PolicyConfig(policy=policy, policy_options=options),
        )
        dataset = open_dataset(config)
        return narrow_distributions(build_policy(config.policy, shapes_of(dataset)), dataset)

    (warning,) = (line for line in warnings("bc_gmm") if line.startswith(f"{second_file}: "))
    assert "of action 1 lie at its limits, where bc_gmm with min_std 0.0001" in warning
    assert "--policy-options min_std 0.05" in warning
    assert "bc_gaussian with min_std 0.01" in warnings("bc_gaussian")[-1]
    assert warnings("bc_gaussian", fixed_std=True) == []
    assert warnings("bc_gmm", min_std=0.05) == []
    assert warnings("bc") == []


def test_a_file_that_crashes_hdf5_is_rejected_before_it_is_opened(
    tiny_config: TrainConfig, second_file: Path
) -> None:
    content = bytearray(second_file.read_bytes())
    # leaves of groups, but of the root
    for node in list(re.finditer(b"TREE\0\0", bytes(content)))[1:]:
        content[node.start() + 5] = 1  # a level above the leaves
        # its own first child
        content[node.start() + 32 : node.start() + 40] = node.start().to_bytes(8, "little")
    second_file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"second\.hdf5: is corrupt: the HDF5 library crashes on it"
    ):
        open_dataset(replace(tiny_config, dataset=(second_file,)))


def test_each_file_is_opened_once(
    tiny_config: TrainConfig, second_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening looks at every demo: with thousands of them it takes longer than the first steps."""
    opened: list[str] = []

    class Counted(DemoFile):
        def __init__(self, path: Path, **options: Any) -> None:
            opened.append(Path(path).name)
            super().__init__(path, **options)

    for module in ("datasets.windows", "training.data"):
        monkeypatch.setattr(f"fibopolicy.{module}.DemoFile", Counted)
    first = tiny_config.files[0][0]
    dataset = open_dataset(replace(tiny_config, dataset=(first, second_file, first), vectors=()))
    assert opened == [first.name, second_file.name]
    assert [line.partition(": ")[0] for line in left_out(dataset)] == [str(first), str(second_file)]
    assert len(opened) == 2


@pytest.mark.parametrize("name", ["cameras", "vectors"])
def test_a_repeated_observation_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: a, b, a lists an observation twice"):
        TrainConfig(tmp_path / "data.hdf5", tmp_path / "run", **{name: ("a", "b", "a")})
