from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fibopolicy.errors import UserError
from fibopolicy.robomimic.checkpoint import read_checkpoint
from fibopolicy.robomimic.imported import ImportedPolicy

Save = Callable[..., Path]


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


def resaved(path: Path, edit: Any) -> Path:
    contents = torch.load(path, weights_only=True)
    edit(contents)
    torch.save(contents, path)
    return path


def test_nothing_in_a_checkpoint_is_run(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = resaved(save(), lambda contents: contents.update(extra=Attack()))
    with pytest.raises(UserError, match=r"was not loaded, since it holds \S*mkdir"):
        read_checkpoint(path)
    assert not (tmp_path / "attacked").exists()


def test_arrays_and_numbers_of_numpy_are_read(save: Save) -> None:
    statistics = {
        key: {"mean": np.full((1, dim), 0.5), "std": np.full((1, dim), 2.0)}
        for key, dim in (("hand", 3), ("cube", 4))
    }

    def edit(contents: dict[str, Any]) -> None:
        contents["obs_normalization_stats"] = statistics
        contents["variable_state"] = {
            "best_return": {"Lift": np.float64(-np.inf)},
            "epoch": np.int64(3),
        }

    read = read_checkpoint(resaved(save(statistics=statistics), edit))
    np.testing.assert_array_equal(
        read.obs_statistics["hand"]["offset"], np.full((1, 3), 0.5, dtype=np.float32)
    )
    assert read.epoch == 20
    assert read.shapes == {"cube": (4,), "hand": (3,)}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "not a torch file"),
        (b"not a checkpoint", "was not loaded|not a torch file"),
        ({"model": {}}, "lacks config, algo_name"),
        ([1], "lacks model"),
        (
            {
                "model": {},
                "config": "{",
                "algo_name": "bc",
                "env_metadata": {},
                "shape_metadata": {},
            },
            "not laid out",
        ),
    ],
)
def test_other_files_are_rejected(contents: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        torch.save(contents, path)
    with pytest.raises(UserError, match=message):
        read_checkpoint(path)
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_a_checkpoint_of_0_5_scales_its_actions(save: Save) -> None:
    plain = ImportedPolicy(read_checkpoint(save()))
    obs = {"hand": torch.rand(2, 1, 3), "cube": torch.rand(2, 1, 4)}
    expected, _ = plain.act(obs)

    def edit(contents: dict[str, Any]) -> None:
        nets = contents["model"].get("nets", contents["model"])
        contents["model"] = {"nets": nets, "optimizers": {}, "lr_schedulers": {"policy": None}}
        config = json.loads(contents["config"])
        config["train"].update(
            data=[{"path": "a.hdf5"}],
            action_keys=["pos", "rest"],
            action_config={"pos": {}, "rest": {}},
        )
        config["algo"]["optim_params"]["policy"]["learning_rate"].update(
            scheduler_type="cosine", epoch_schedule=[100]
        )
        contents["config"] = json.dumps(config)
        contents["action_normalization_stats"] = OrderedDict(
            rest={"offset": [[0.0, 0.0]], "scale": [[1.0, 1.0]]},
            pos={"offset": [[1.0, 2.0, 3.0]], "scale": [[10.0, 10.0, 10.0]]},
        )
        contents["obs_normalization_stats"] = {
            "hand": {"offset": [[0.0] * 3], "scale": [[1.0] * 3]},
            "cube": {"offset": [[0.0] * 4], "scale": [[1.0] * 4]},
        }

    path = resaved(save(), edit)
    actions, _ = ImportedPolicy(read_checkpoint(path)).act(obs)
    scale, offset = (
        torch.tensor([10.0, 10.0, 10.0, 1.0, 1.0]),
        torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]),
    )
    torch.testing.assert_close(actions, expected * scale + offset)


def edited_config(path: Path, edit: Any) -> Path:
    def apply(contents: dict[str, Any]) -> None:
        config = json.loads(contents["config"])
        edit(config)
        contents["config"] = json.dumps(config)

    return resaved(path, apply)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: c["observation"]["modalities"]["goal"].update(low_dim=["hand"]),
            "conditioned on goals",
        ),
        (lambda c: c["train"].update(frame_stack=3), "frame_stack is 3"),
        (
            lambda c: c["observation"]["encoder"]["low_dim"].update(core_class="Newer"),
            "cannot build its networks.*Newer",
        ),
        (
            lambda c: c["algo"].update(actor_layer_dims=[8, 8]),
            "cannot build its networks.*size mismatch",
        ),
        (lambda c: c["observation"].pop("encoder"), "cannot build its networks"),
    ],
)
def test_policies_that_would_act_wrongly_are_rejected(edit: Any, message: str, save: Save) -> None:
    with pytest.raises(UserError, match=message):
        ImportedPolicy(read_checkpoint(edited_config(save(), edit)))


def test_algorithms_with_internal_memory_are_rejected(save: Save) -> None:
    path = resaved(save(), lambda contents: contents.update(algo_name="hbc"))
    with pytest.raises(UserError, match=r"unknown algorithm .*'hbc'"):
        ImportedPolicy(read_checkpoint(path))
