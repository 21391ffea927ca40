from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from command import call
from robomimic_rollout import is_0_5, needs_0_5

from fibopolicy.errors import UserError
from fibopolicy.robomimic.checkpoint import read_checkpoint
from fibopolicy.robomimic.config import NO_ROLLOUTS
from fibopolicy.robomimic.train import train_robomimic

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "robomimic").glob("*.json"))

Write = Callable[..., Path]
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


def shortened(document: dict[str, Any]) -> dict[str, Any]:
    """One gradient step of one sample."""
    document["train"].update(
        num_epochs=1, num_data_workers=0, batch_size=1, cuda=False, hdf5_filter_key="train"
    )
    document["experiment"]["epoch_every_n_steps"] = 1
    document["experiment"]["save"]["every_n_epochs"] = 1
    return document


@pytest.fixture
def config(tmp_path: Path) -> Write:
    """A short training of BC-GMM with a tiny encoder, after an edit, as a file."""

    def write(edit: Callable[[dict[str, Any]], object] = lambda document: None) -> Path:
        document = shortened(json.loads((EXAMPLES[0].parent / "bc_gmm_vit.json").read_text()))
        document["observation"]["encoder"]["rgb"]["core_kwargs"]["encoder_options"] = {
            "depth": 1,
            "width": 12,
            "patch_size": 24,
        }
        edit(document)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(document))
        return path

    return write


def test_the_examples_cover_four_algorithms_with_three_encoders() -> None:
    policies, encoders = (
        ("bc", "bc_gmm", "bc_rnn_gmm", "bc_transformer_gmm"),
        ("fibottention", "vit", "resnet18"),
    )
    assert {path.stem for path in EXAMPLES} == {
        f"{policy}_{encoder}" for policy in policies for encoder in encoders
    }


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_trains_and_leaves_a_checkpoint(
    example: Path, demos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shortened(json.loads(example.read_text()))))
    done = train_robomimic(path, dataset=demos, out=tmp_path / "runs")
    checkpoint = read_checkpoint(done.checkpoints[-1])
    assert checkpoint.config["observation"]["encoder"]["rgb"]["core_class"] == "FibopolicyEncoder"
    assert any("agentview_image.encoder." in name for name in checkpoint.weights)


def test_a_relative_output_lies_under_the_working_directory(
    config: Write, demos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = train_robomimic(config(), dataset=demos, out="here", name="mine")
    assert done.folder == tmp_path / "here" / "mine"
    assert [path.name for path in done.checkpoints] == ["model_epoch_1.pth"]
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        train_robomimic(config(), dataset=demos, out="here", name="mine")
    (done.folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        train_robomimic(config(), dataset=demos, out="here", name="mine", overwrite=True)
    (done.folder / "notes.txt").unlink()
    train_robomimic(config(), dataset=demos, out="here", name="mine", overwrite=True)
    assert len(list(done.folder.iterdir())) == 1


def test_rollouts_are_switched_off_with_a_warning(
    config: Write, demos: Path, tmp_path: Path
) -> None:
    path = config(lambda d: d["experiment"].pop("rollout"))  # on by default
    with pytest.warns(UserWarning, match="rollouts during training are switched off") as caught:
        train_robomimic(path, dataset=demos, out=tmp_path / "runs")
    assert [
        str(w.message)
        for w in caught
        if w.category is UserWarning and "fibopolicy" in str(w.message)
    ] == [NO_ROLLOUTS]


def test_a_training_that_saves_nothing_warns(config: Write, demos: Path, tmp_path: Path) -> None:
    path = config(lambda d: d["experiment"]["save"].update(every_n_epochs=50))
    with pytest.warns(UserWarning, match="no checkpoint will be written"):
        assert train_robomimic(path, dataset=demos, out=tmp_path / "runs").checkpoints == ()


RGB = ("observation", "encoder", "rgb")


def at(*keys: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """An edit that updates the section `keys`."""

    def edit(document: dict[str, Any]) -> None:
        for key in keys:
            document = document[key]
        document.update(values)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            at(*RGB, "core_kwargs", encoder="fibotention_vit_tiny"),
            "did you mean 'fibottention_vit_tiny'",
        ),
        (at(*RGB, "core_kwargs", depth=4), r"'depth'.*encoder_options"),
        (at(*RGB, "core_kwargs", encoder_option={"depth": 4}), "did you mean 'encoder_options'"),
        (at(*RGB, "core_kwargs", encoder_options={"dept": 4}), "did you mean 'depth'"),
        (at(*RGB, "core_kwargs", encoder_options={"pool": "mena"}), "did you mean 'mean'"),
        (
            at(*RGB, "core_kwargs", encoder_options={"num_views": 2}),
            "num_views is set by the observations",
        ),
        (at(*RGB, "core_kwargs", feature_dimension=0), "feature_dimension must be at least 1"),
        (at(*RGB, core_class="FibopolicyEncode"), "did you mean 'FibopolicyEncoder'"),
        (at(*RGB, core_class="VisualCore"), "'encoder'.*known: backbone_class"),
        (at(*RGB, "obs_randomizer_kwargs", crop_hight=70), "did you mean 'crop_height'"),
        (
            at(*RGB, "obs_randomizer_kwargs", crop_height=84),
            "does not fit agentview_image of 84 x 84",
        ),
        (at(*RGB, "obs_randomizer_kwargs", crop_height=71), "patch_size 24 does not divide"),
        (
            at("observation", "modalities", "obs", rgb=["agent_image"]),
            "did you mean 'agentview_image'",
        ),
        (at("train", hdf5_filter_key="trian"), "did you mean 'train'"),
        (at("train", hdf5_validation_filter_key="valid"), r"set experiment\.validate"),
        (at("experiment", validate=True), "hdf5_validation_filter_key"),
        (at("train", batchsize=3), "did you mean 'batch_size'"),
        (
            at("train", batch_size="8"),
            "train.batch_size must be a whole number of at least 1, got '8'",
        ),
        (at("train", num_epochs=0), "train.num_epochs must be a whole number of at least 1, got 0"),
        (
            at("observation", "modalities", obs={"rgb": [], "low_dim": []}),
            "modalities names no observation",
        ),
        (at(train=3), "must be a JSON object"),
        (at(algo_name="bcc"), "did you mean 'bcq'|did you mean 'bc'"),
        (
            at("algo", transformer={"enabled": True, "context_length": 5}),
            "frame_stack 1; they must agree",
        ),
    ],
)
def test_mistakes_in_the_configuration(
    edit: Any, message: str, config: Write, demos: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train_robomimic(config(edit), dataset=demos, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda demo: demo.move("obs", "observations"),
            r"cannot read obs/\w+: it is observations/\w+ in each demo",
        ),
        (
            lambda demo: demo["obs"].create_dataset(
                "other_image", data=np.zeros((6, 3, 84, 84), np.uint8)
            ),
            r"cannot read obs/other_image: it must be converted \(channels first\)",
        ),
        (
            lambda demo: demo.move("actions", "action"),
            "cannot read actions: it is action in each demo",
        ),
    ],
)
def test_data_that_robomimic_would_misread_are_rejected(
    edit: Any, message: str, config: Write, demos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.hdf5"
    path.write_bytes(demos.read_bytes())
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            del demo["next_obs"]
            edit(demo)
    images = ["agentview_image", *(["other_image"] if "other" in message else [])]
    chosen = config(at("observation", "modalities", "obs", rgb=images))
    with pytest.raises(UserError, match=message):
        train_robomimic(chosen, dataset=path, out=tmp_path / "runs")


@needs_0_5
def test_several_datasets_train_one_policy(config: Write, demos: Path, tmp_path: Path) -> None:
    data = [{"path": str(demos), "filter_key": "train"}, {"path": str(demos), "weight": 2.0}]
    path = config(at("train", data=data, hdf5_cache_mode="low_dim"))
    done = train_robomimic(path, out=tmp_path / "runs")
    assert [d["path"] for d in read_checkpoint(done.checkpoints[-1]).config["train"]["data"]] == [
        str(demos)
    ] * 2


@needs_0_5
@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        ({"path": "nowhere.hdf5"}, {}, r"nowhere\.hdf5: no such file"),
        ({"path": None}, {}, 'must be an object with a "path"'),
        ({"filterkey": "train"}, {}, "did you mean 'filter_key'"),
        ({"filter_key": "trian"}, {}, r"in train\.data: 'trian': did you mean 'train'"),
        ({}, {"hdf5_cache_mode": "all"}, 'several datasets need "low_dim" or null'),
        ({}, {"hdf5_normalize_obs": True}, "normalises one dataset only"),
        ({}, {"action_keys": ["action_dict/pos"]}, "unknown array of action_dict 'pos'"),
    ],
)
def test_mistakes_in_a_list_of_datasets(
    dataset: Any, settings: Any, message: str, config: Write, demos: Path, tmp_path: Path
) -> None:
    data = [{"path": str(demos)}, {"path": str(demos), **dataset}]
    path = config(at("train", **{"data": data, "hdf5_cache_mode": "low_dim", **settings}))
    with pytest.raises(UserError, match=message):
        train_robomimic(path, out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_missing_files(config: Write, demos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        train_robomimic(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match=r"nowhere\.hdf5: no such file"):
        train_robomimic(config(), dataset=tmp_path / "nowhere.hdf5")
    with pytest.raises(UserError, match=r"set train\.data or pass --dataset"):
        train_robomimic(config())
    message = r"nowhere\.hdf5: no such file" if is_0_5() else r"one HDF5 file in robomimic 0\.3"
    with pytest.raises(UserError, match=message):
        train_robomimic(config(at("train", data=[{"path": "nowhere.hdf5"}])))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        train_robomimic(broken, dataset=demos)
    broken.write_text("[]")
    with pytest.raises(UserError, match="algo_name"):
        train_robomimic(broken, dataset=demos)


def test_a_failing_training_exits_with_1_and_its_log_tells_where(
    config: Write, demos: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    path = config(at("algo", gmm={"enabled": True, "num_modes": "five"}))
    line = f"robomimic train --config {path} --dataset {demos} --out {tmp_path} --name failing"
    code, _, error = call(monkeypatch, capsys, *line.split())
    assert code == 1
    assert error.splitlines()[-1].startswith("fibopolicy: training failed: ")
    (log,) = (tmp_path / "failing").glob("*/logs/log.txt")
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize("line", ["train", "trian", "train --config nowhere.json"])
def test_the_users_mistakes_exit_with_2_and_no_traceback(
    line: str, monkeypatch: Patch, capsys: Capture
) -> None:
    code, _, error = call(monkeypatch, capsys, "robomimic", *line.split())
    assert code == 2
    assert "Traceback" not in error
    if "nowhere" in line:
        assert len(error.splitlines()) == 1


def test_the_command_trains(
    config: Write, demos: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    line = f"robomimic train --config {config()} --dataset {demos} --out {tmp_path / 'runs'}"
    code, output, _ = call(monkeypatch, capsys, *line.split())
    assert code == 0
    assert "next: fibopolicy evaluate" in output.splitlines()[-1]
