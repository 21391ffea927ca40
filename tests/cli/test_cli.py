"""The command line as a user sees it; wrong input ends with exit code 2."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import h5py
import numpy as np
import pytest
import torch
from command import TINY_ENCODER_OPTIONS, call

import fibopolicy
from fibopolicy import cli
from fibopolicy.errors import UserError
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.training import TrainConfig

#: An evaluation by one simulator; its video has tests of its own.
SHORT = ["--episodes", "2", "--max-steps", "8", "--workers", "1", "--video", "0"]


@pytest.mark.slow
def test_a_policy_is_trained_on_collected_demos_and_evaluated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data, run = str(tmp_path / "reach.hdf5"), str(tmp_path / "run")
    code, out, _ = call(
        monkeypatch,
        capsys,
        "collect",
        "reach",
        "--episodes",
        "11",
        "--out",
        data,
        "--image-size",
        "24",
        "--workers",
        "1",
    )
    assert code == 0
    assert "11 demos" in out
    code, out, _ = call(monkeypatch, capsys, "inspect", data)
    assert "fibopolicy/Reach-v0" in out
    assert "train (10 demos)" in out
    code, _, _ = call(
        monkeypatch,
        capsys,
        "train",
        "--dataset",
        data,
        "--out",
        run,
        "--steps",
        "5",
        *TINY_ENCODER_OPTIONS,
    )
    assert code == 0
    code, out, _ = call(monkeypatch, capsys, "evaluate", run, *SHORT)
    assert code == 0
    assert "95 % Wilson interval" in out
    assert len((tmp_path / "run/episodes.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run/report.html").is_file()
    code, out, _ = call(monkeypatch, capsys, "results", run, "--out", str(tmp_path / "rates.json"))
    assert code == 0
    assert "step 5 ema, init_seed 0" in out
    stored = json.loads((tmp_path / "rates.json").read_text())["runs"][0]
    assert {"fibopolicy", "torch", "python", "processor"} <= stored["trained_with"].keys()
    assert stored["index"] == [0, 1]
    assert sum(stored["success"]) == stored["successes"]
    for command, message in (("results", "is the input itself"), ("compare", "ends in .html")):
        code, _, err = call(
            monkeypatch, capsys, command, run, "--out", f"{run}/episodes.jsonl", "--overwrite"
        )
        assert code == 2
        assert message in err


def test_the_version_includes_python_and_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, "--version")
    assert code == 0
    assert out.startswith(f"fibopolicy {fibopolicy.__version__}, python 3.")
    assert f"torch {torch.__version__.split('+')[0]}" in out


@pytest.mark.slow
def test_a_meta_world_task_is_collected_trained_on_and_evaluated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("metaworld")
    data, run = str(tmp_path / "press.hdf5"), str(tmp_path / "run")
    collect = [
        "collect",
        "metaworld/handle-press",
        "--episodes",
        "1",
        "--out",
        data,
        "--workers",
        "1",
    ]
    code, out, _ = call(
        monkeypatch, capsys, *collect, "--image-size", "24", "--cameras", "gripperPOV"
    )
    assert code == 0
    assert "1 demos" in out
    code, out, _ = call(monkeypatch, capsys, "inspect", data)
    assert "metaworld/handle-press-v3" in out
    assert "scripted expert\n" in out
    assert re.search("successes +1 of 1", out)
    code, _, _ = call(
        monkeypatch,
        capsys,
        "train",
        "--dataset",
        data,
        "--out",
        run,
        "--steps",
        "3",
        *TINY_ENCODER_OPTIONS,
    )
    assert code == 0
    code, out, _ = call(monkeypatch, capsys, "evaluate", run, *SHORT)
    assert code == 0
    assert "95 % Wilson interval" in out


def broken_files(good: Path, folder: Path) -> dict[str, Path]:
    """Copies of a valid file, each with one fault."""
    files = {
        name: folder / f"{name}.hdf5"
        for name in ("truncated", "text", "env_args", "nan", "range", "samples", "dtype", "mask")
    }
    for path in files.values():
        path.write_bytes(good.read_bytes())
    files["truncated"].write_bytes(good.read_bytes()[:5000])
    files["text"].write_text("not a dataset\n")
    with h5py.File(files["env_args"], "a") as file:
        file["data"].attrs["env_args"] = "{'env_name': 'Lift'}"
    with h5py.File(files["nan"], "a") as file:
        file["data/demo_0/actions"][2, 1] = np.nan
    with h5py.File(files["range"], "a") as file:
        for demo in file["data"].values():
            demo["actions"][...] = 3.1  # for example, absolute angles
    with h5py.File(files["samples"], "a") as file:
        file["data/demo_0"].attrs["num_samples"] = 3
    with h5py.File(files["dtype"], "a") as file:
        frames = file["data/demo_0/obs/wrist_image"][()]
        del file["data/demo_0/obs/wrist_image"]
        file["data/demo_0/obs/wrist_image"] = frames - np.float32(300)
    with h5py.File(files["mask"], "a") as file:
        del file["mask/train"]
        file["mask/train"] = np.array([], dtype="S")
    return files


def test_broken_files_are_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lift_file: Path,
    tmp_path: Path,
) -> None:
    for name, path in broken_files(lift_file, tmp_path).items():
        code, _, err = call(
            monkeypatch,
            capsys,
            "train",
            "--dataset",
            str(path),
            "--out",
            str(tmp_path / "run"),
            "--steps",
            "1",
            *TINY_ENCODER_OPTIONS,
        )
        assert code == 2, name
        assert len(err.strip().splitlines()) == 1, err
        assert str(path) in err, (name, err)
        assert not (tmp_path / "run").exists(), name


def test_harmless_deviations_give_a_warning_and_can_be_trained_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lift_file: Path,
    tmp_path: Path,
) -> None:
    odd = tmp_path / "odd.hdf5"
    odd.write_bytes(lift_file.read_bytes())
    with h5py.File(odd, "a") as file:
        file["data"].attrs["total"] = 9666
        file.move("data/demo_2", "data/demo_77")
        del file["mask"]
    code, _, err = call(
        monkeypatch,
        capsys,
        "train",
        "--dataset",
        str(odd),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "1",
        *TINY_ENCODER_OPTIONS,
    )
    assert code == 0
    assert "warning" in err
    assert "9666" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "nowhere.hdf5", "--out", "run"], "nowhere.hdf5"),
        (
            ["train", "--dataset", "LIFT", "--out", "run", "--encoder", "vit_tin"],
            "did you mean 'vit_tiny'",
        ),
        (["train", "--dataset", "LIFT", "--out", "run", "--cameras", "wrst_image"], "wrist_image"),
        (["train", "--dataset", "LIFT", "--out", "run", "--filter-key", "trian"], "filter key"),
        (
            ["train", "--dataset", "LIFT", "--out", "run", "--encoder-options", "patch_size", "7"],
            "does not divide the image of 24 x 24",
        ),
        (
            ["train", "--dataset", "LIFT", "--out", "run", "--encoder-options", "patchsize", "12"],
            "did you mean 'patch_size'",
        ),
        (
            ["train", "--dataset", "LIFT", "--out", "run", "--steps", "0"],
            "steps must be at least 1",
        ),
        (
            ["train", "--dataset", "LIFT", "LIFT", "--out", "run", "--dataset-weights", "1"],
            "dataset_weights: got 1 for 2 files",
        ),
        (
            ["train", "--dataset", "LIFT", "--out", "run", "--validate-on", "vaild"],
            "did you mean 'valid'",
        ),
        (
            ["train", "--dataset", "LIFT", "--out", "run", "--validate-on", "train"],
            "are trained on as well",
        ),
        (["train", "--dataset", "LIFT", "--out", "run", "--keep-best", "3"], "needs a validation"),
        (
            ["train", "--dataset", "LIFT", "--out", "run", "--rollout-every", "0"],
            "rollout_every must be at least 1",
        ),
        (["profile", "data"], "name a file to profile"),
        (["profile", "train", "--dataset", "LIFT", "--turns", "0"], "turns must be at least 1"),
        (["collect", "Lyft-v0", "--episodes", "1", "--out", "x.hdf5"], "did you mean 'Lift-v0'"),
        (
            ["collect", "Lift-v0", "--episodes", "0", "--out", "x.hdf5"],
            "episodes must be at least 1",
        ),
        (["collect", "Lift-v0", "--episodes", "1", "--out", "LIFT"], "exists already"),
        (["download", "lift-humn"], "did you mean 'lift-human'"),
        (["inspect", "nowhere.hdf5"], "nowhere.hdf5"),
        (["replay", "nowhere.hdf5"], "nowhere.hdf5"),
        (["replay", "LIFT", "--workers", "0"], "workers must be at least 1"),
        (["render", "nowhere.hdf5", "--out", "x.hdf5"], "nowhere.hdf5"),
        (["render", "LIFT", "--out", "LIFT", "--overwrite"], "is the input itself"),
        (["render", "LIFT", "--out", "x.hdf5", "--workers", "0"], "workers must be at least 1"),
        (["render", "LIFT", "--out", "x.hdf5", "--cameras", "writs"], "did you mean 'wrist'"),
        (
            ["render", "LIFT", "--out", "x.hdf5", "--image-size", "0"],
            "image_size must be between 8 and 1024 pixels, got 0",
        ),
        (["replay", "LIFT", "--out", "LIFT", "--overwrite"], "is the input itself"),
        (["inspect", "."], "folder"),
        (["evaluate", "nowhere"], "is not a run directory"),
        (["results", "nowhere"], "no such run directory"),
        (["compare", "nowhere", "elsewhere"], "no such run directory"),
        (["compare", "nowhere"], "nowhere: no such run directory"),
    ],
)
def test_wrong_arguments_are_one_line_errors_with_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lift_file: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(
        monkeypatch, capsys, *[a.replace("LIFT", str(lift_file)) for a in arguments]
    )
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert message in err
    assert not list(tmp_path.iterdir()), "files were left behind"


@pytest.mark.parametrize(
    ("arguments", "title", "named"),
    [
        (
            "train --stepss 3 --dataset x --out y",
            "Unrecognized options",
            ["--stepss", "--steps INT"],
        ),
        ("train --dataset a --out b --workers 1", "Unrecognized", ["--rollout-workers"]),
        ("profile train --stepps 3", "Unrecognized", ["--stepps", "--steps INT"]),
        ("inspect a b", "Unrecognized", ["b"]),
        ("profile trein", "Unrecognized", ["trein", "attention, encoder, data, train"]),
        ("trin", "Unrecognized", ["trin", "inspect", "split"]),
        ("TRAIN", "Unrecognized", ["TRAIN"]),
        ("--hepl", "Unrecognized", ["--hepl"]),
        ("collect --episodes 1 --out x", "Required options", ["TASK"]),
        ("train --dataset a --outt b", "Required options", ["--out PATH", "--outt"]),
        ("train --dataset a --out b --steps x", "Value error", ["--steps", "'x'"]),
        ("train --dataset a --out", "Missing argument", ["--out"]),
        ("train --preset --steps 4", "Missing argument", ["--preset"]),
    ],
)
def test_tyro_explains_mistakes_in_the_command_line(
    arguments: str,
    title: str,
    named: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = call(monkeypatch, capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert title in err.splitlines()[0]
    assert all(word in err for word in named), err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--stepss", "3"]])
@pytest.mark.parametrize("columns", ["1", "5", "0"])
def test_a_narrow_terminal_gets_lines_of_40_columns(
    columns: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    _, out, err = call(monkeypatch, capsys, *arguments)
    rules = [line for line in (out + err).splitlines() if set(line.strip()) == {"-"}]
    assert rules
    assert max(map(len, rules)) <= (80 if columns == "0" else 40)


@pytest.mark.parametrize("arguments", [[], ["help"]])
def test_the_command_alone_lists_the_commands(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = call(monkeypatch, capsys, *arguments)
    assert all(command in out for command in cli.COMMANDS)


def test_a_user_without_a_home_gets_a_hint_to_set_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def homeless(self: cli.Inspect) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cli.Inspect, "run", homeless)
    code, _, err = call(monkeypatch, capsys, "inspect", "~/x")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "set HOME" in err


def test_internal_errors_exit_with_1_and_debug_shows_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: cli.Inspect) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(cli.Inspect, "run", broken)
    code, _, err = call(monkeypatch, capsys, "inspect", "x")
    assert code == 1
    assert "internal error: ZeroDivisionError: ours" in err
    assert len(err.strip().splitlines()) == 1
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, capsys, "inspect", "x", "--debug")


@pytest.mark.parametrize("policy", ["bc", "flow"])
@pytest.mark.parametrize("command", ["train", "profile train"])
def test_a_policy_keeps_its_own_defaults_on_the_command_line(
    command: str, policy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = []

    def take(config: TrainConfig, **_: object) -> NoReturn:
        policies.append(config.policy)
        raise UserError("seen")

    monkeypatch.setattr("fibopolicy.training.trainer.train", take)
    monkeypatch.setattr("fibopolicy.training.profile.profile_train", take)
    where = ["--out", "run"] if command == "train" else []
    call(monkeypatch, capsys, *command.split(), "--dataset", "any.hdf5", *where, "--policy", policy)
    assert policies == [PolicyConfig(policy=policy)]


def test_the_help_of_every_command_has_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in cli.COMMANDS:
        code, out, _ = call(monkeypatch, capsys, command, "--help")
        assert code == 0
        assert f"Example: fibopolicy {command}" in out


def test_the_quickstart_resumes_instead_of_repeating(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [
        "quickstart",
        "--out",
        str(tmp_path),
        "--demos",
        "3",
        "--steps",
        "2",
        "--episodes",
        "1",
    ]
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 0, err
    run = tmp_path / "fibottention_vit_tiny_seed0"
    for name in ("video", "curves", "page", "wall time", "95 % Wilson interval"):
        assert name in out
    assert "collect: 3 demonstrations by the scripted expert ..." in out
    commands = [shlex.split(line, comments=True) for line in out.split("\nnext\n")[1].splitlines()]
    assert len(commands) == 3
    for command in commands:
        cli.parse(command[1:])
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "lift_3.hdf5", run / "state.pt")}
    rows = (run / "episodes.jsonl").read_text()
    code, _, _ = call(monkeypatch, capsys, *arguments)
    assert code == 0
    assert {p: p.stat().st_mtime_ns for p in made} == made
    # includes wall times, so no episode ran again
    assert (run / "episodes.jsonl").read_text() == rows
    assert json.loads((tmp_path / "wall_times.json").read_text()).keys() == {
        "collect",
        f"train {run.name}",
        f"evaluate {run.name}",
    }
