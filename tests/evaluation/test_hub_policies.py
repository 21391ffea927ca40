"""Policies to and from a local hub, and the example in the package."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call
from hub_server import Hub, serving, use_hub
from made_rows import make_run

from fibopolicy import load
from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import read_rows, success_rate
from fibopolicy.evaluation.evaluate import weights_digest
from fibopolicy.policies.hub import EXAMPLES, hub_policy, shared_config
from fibopolicy.policies.run_directory import RunDirectory, load_policy, resolve_run
from fibopolicy.training import TrainConfig, train


@pytest.fixture(scope="module")
def run(tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with made episode rows."""
    out = tmp_path_factory.mktemp("upload") / "run"
    train(replace(tiny_config, out=out))
    return make_run(out, [True, False, True, True], **weights_of(out))


def weights_of(run: Path) -> dict[str, Any]:
    """What the rows of an evaluation say of the weights of a run."""
    loaded = load_policy(run)
    return {"checkpoint_step": loaded.step, "policy": weights_digest(loaded.policy)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        use_hub(hub.url, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's attempts
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


def put(hub: Hub, run: Path, **changes: Any) -> None:
    """Put the policy of `run` on the hub as me/lift, with sections of its configuration
    changed.
    """
    document = RunDirectory(run).read_config()
    for section, change in changes.items():
        document[section] = {**document.get(section, {}), **change}
    hub.files["me/lift/config.json"] = json.dumps(document).encode()
    hub.files["me/lift/ema.safetensors"] = RunDirectory(run).ema.read_bytes()


def test_an_uploaded_policy_comes_back_with_its_weights(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, capsys, "upload", str(run), "me/lift", "--licence", "mit")
    assert code == 0, err
    assert f"{hub.url}/me/lift/commit/" in out
    assert "evaluate it: fibopolicy evaluate hub:me/lift" in out
    assert sorted(hub.files) == [
        "me/lift/README.md",
        "me/lift/config.json",
        "me/lift/ema.safetensors",
        "me/lift/episodes.jsonl",
    ]
    assert "Bearer hf_secret" in hub.tokens
    here, there = load_policy(run).policy, load_policy(resolve_run("hub:me/lift")).policy
    for name, tensor in here.state_dict().items():
        assert torch.equal(tensor, there.state_dict()[name]), name


def test_the_model_card_states_rates_settings_versions_and_licence(hub: Hub, run: Path) -> None:
    from fibopolicy.evaluation.upload import upload_run

    upload_run(run, "me/lift", licence="cc-by-4.0")
    card = hub.files["me/lift/README.md"].decode()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "fibopolicy evaluate hub:me/lift" in card
    assert "| 3/4 | 75.0 % | [30.1, 95.4] % |" in card
    assert "- encoder: fibottention_vit_tiny, patch_size 12" in card
    assert f"- torch: {version('torch')}" in card
    config = hub.files["me/lift/config.json"].decode()
    assert str(run.parent) not in config
    assert json.loads(config)["train"]["dataset"] == "lift.hdf5"


def test_only_episodes_of_the_uploaded_weights_are_stated(run: Path, tmp_path: Path) -> None:
    from fibopolicy.evaluation.upload import write_shared

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "out").mkdir()
    own = weights_of(run)
    for other in ({"checkpoint_step": 7}, {"policy": "other", "init_seed": 1}):
        make_run(tmp_path / "run", [True] * 9, **{**own, **other})
    write_shared(tmp_path / "run", tmp_path / "out", "me/lift", "mit")
    assert "3/4" in (card := (tmp_path / "out/README.md").read_text())
    assert "9/9" not in card
    assert read_rows(tmp_path / "out/episodes.jsonl") == read_rows(run / "episodes.jsonl")
    (tmp_path / "run/episodes.jsonl").unlink()
    make_run(tmp_path / "run", [True], **{**own, "checkpoint_step": 7})
    with pytest.raises(UserError, match=r"are of other weights than ema.safetensors of step"):
        write_shared(tmp_path / "run", tmp_path / "out", "me/lift", "mit")


@pytest.mark.parametrize("embedding", ["/home/me/vectors.json", "learned", None])
def test_a_shared_configuration_names_no_folder_of_task_vectors(
    run: Path, tmp_path: Path, embedding: str | None
) -> None:
    document = RunDirectory(run).read_config()
    document["train"]["task_embedding"] = embedding
    RunDirectory(tmp_path).config.write_text(json.dumps(document))
    shared = json.loads(shared_config(RunDirectory(tmp_path)))["train"]["task_embedding"]
    assert shared == (embedding and Path(embedding).name)


def test_a_policy_on_the_hub_is_evaluated(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    put(hub, run)
    options = ["--episodes", "1", "--max-steps", "2", "--workers", "1", "--video", "0"]
    code, out, err = call(monkeypatch, capsys, "evaluate", "hub:me/lift", *options)
    assert code == 0, err
    assert "hub:me/lift  " in out
    assert "/1 " in out
    (rows,) = tmp_path.glob("cache/fibopolicy/policies/me/lift/*/episodes.jsonl")
    assert len(read_rows(rows)) == 1


def test_a_new_revision_is_another_run_and_an_old_one_can_be_named(hub: Hub, run: Path) -> None:
    put(hub, run)
    first, commit = hub_policy("me/lift"), hub.commit("me/lift")
    assert first.name == commit[:12]
    put(hub, run, train={"seed": 7})
    assert hub_policy("me/lift") != first
    assert hub_policy(f"me/lift@{commit}") == first


def test_without_network_the_copy_in_the_cache_is_used(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(hub, run)
    found = hub_policy("me/lift")
    use_hub("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    assert hub_policy("me/lift") == found
    with pytest.raises(UserError, match=r"hub:me/other: cannot be downloaded .* HF_ENDPOINT"):
        hub_policy("me/other")


def test_pickled_weights_are_neither_downloaded_nor_read(hub: Hub, run: Path) -> None:
    put(hub, run)
    hub.files["me/lift/model.pt"] = hub.files.pop("me/lift/ema.safetensors")
    with pytest.raises(UserError, match=r"has no ema.safetensors, expected a policy that"):
        hub_policy("me/lift")
    assert not any("model.pt" in path for _, path, _ in hub.requests)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": {"encoder": "os:system"}}, "needs the code os:system"),
        ({"policy": {"policy": "this:s"}}, "needs the code this:s"),
        ({"task_env_args": {"a": {"env_name": "my_tasks:Mine"}}}, "needs the code my_tasks:Mine"),
        ({"env_args": {"env_name": "my_tasks:Mine"}}, "needs the code my_tasks:Mine"),
        ({"robomimic": {"checkpoint": "../x.pth"}}, "holds a checkpoint of robomimic"),
    ],
)
def test_names_of_code_and_of_other_files_are_refused(
    hub: Hub, run: Path, changes: dict[str, Any], message: str
) -> None:
    put(hub, run, **changes)
    with pytest.raises(UserError, match=message):
        hub_policy("me/lift")
    assert not {"this", "my_tasks"} & set(sys.modules)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"policy": 3}', b"\xff"])
def test_a_configuration_that_is_none_is_refused(hub: Hub, run: Path, content: bytes) -> None:
    put(hub, run)
    hub.files["me/lift/config.json"] = content
    with pytest.raises(UserError, match="is not a run's configuration"):
        hub_policy("me/lift")


def test_the_encoders_of_timm_are_no_names_of_code(hub: Hub, run: Path) -> None:
    put(hub, run, policy={"encoder": "timm:resnet18"})
    assert hub_policy("me/lift").is_dir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:me", "expected hub:OWNER/NAME"),
        ("hub:me/nothing", "no such repository"),
        ("example:rich", "did you mean 'reach'"),
    ],
)
def test_a_wrong_name_is_a_one_line_error(
    hub: Hub, name: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, _, err = call(monkeypatch, capsys, "evaluate", name)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_only_an_evaluated_run_is_uploaded(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(run, tmp_path / "new")
    (tmp_path / "new" / "episodes.jsonl").unlink()
    for words, message in (
        ([str(tmp_path / "new"), "me/lift"], "has no episode rows"),
        ([str(tmp_path), "me/lift"], "is not a run directory"),
        ([str(run), "lift"], "expected OWNER/NAME"),
    ):
        code, _, err = call(monkeypatch, capsys, "upload", *words, "--licence", "mit")
        assert code == 2
        assert message in err
    assert hub.files == {}


def test_the_example_solves_its_task_and_acts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rate = success_rate(read_rows(EXAMPLES / "reach" / "episodes.jsonl"))
    assert (rate.successes, rate.episodes) == (98, 100)
    assert sum(file.stat().st_size for file in (EXAMPLES / "reach").iterdir()) < 1_000_000
    from fibopolicy import envs

    runner = load("example:reach", device="cpu")
    reached = []
    for seed in range(5):
        with envs.make("Reach-v0", image_size=48) as env:
            obs, _ = env.reset(seed=seed)
            runner.reset()
            for _ in range(40):
                obs, _, reached_now, truncated, _ = env.step(np.asarray(runner.act(obs)))
                if reached_now or truncated:
                    break
            reached.append(reached_now)
    assert sum(reached) >= 4
