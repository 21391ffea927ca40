from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from rollout import rollout

from fibopolicy import envs
from fibopolicy.cli.evaluate import Compare
from fibopolicy.datasets.collect import Plan, collect
from fibopolicy.errors import UserError
from fibopolicy.evaluation import evaluate_policy
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.episodes import (
    EpisodeResult,
    Selector,
    evaluations,
    read_rows,
    write_rows,
)
from fibopolicy.evaluation.evaluate import Evaluation, evaluate_run
from fibopolicy.evaluation.init_states import make_init_states, save_init_states
from fibopolicy.policies import PolicyConfig, load_policy
from fibopolicy.report.run import write_run_page
from fibopolicy.report.tables import rate_table
from fibopolicy.statistics.rates import wilson
from fibopolicy.training import TrainConfig
from fibopolicy.training.trainer import train
from fibopolicy.utils.files import directory_lock
from fibopolicy.utils.system import device_name, resolve_device


def copy_of(run: Path, folder: Path) -> EvaluateConfig:
    """An evaluation of a copy of a run, with short episodes and no video."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    return EvaluateConfig(folder, episodes=3, video=0, max_steps=10, workers=1)


@pytest.fixture
def fresh(tiny_run: Path, tmp_path: Path) -> EvaluateConfig:
    """A copy of the trained run."""
    return copy_of(tiny_run, tmp_path)


@pytest.fixture(scope="module")
def evaluated(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The evaluation of a run, with a video; its folder must stay as it is."""
    return evaluate_run(replace(copy_of(tiny_run, tmp_path_factory.mktemp("run")), video=2))


@pytest.fixture
def again(evaluated: Evaluation, tmp_path: Path) -> EvaluateConfig:
    """A copy of the evaluated run."""
    return copy_of(evaluated.rows_path.parent, tmp_path)


class Scripted:
    """The expert with a policy's interface, to test rollouts of a good policy."""

    def __init__(self, env: envs.TaskEnv, n_obs_steps: int, n_action_steps: int) -> None:
        self.env, self.config = (
            env,
            PolicyConfig(n_obs_steps=n_obs_steps, n_action_steps=n_action_steps),
        )
        self.seen: list[dict[str, torch.Tensor]] = []

    def act(self, obs: dict[str, torch.Tensor], state: int | None) -> tuple[torch.Tensor, int]:
        self.seen.append(obs)
        action = torch.from_numpy(self.env.expert_action())
        return action.expand(1, self.config.n_action_steps, 4), (state or 0) + 1


def test_an_expert_succeeds_and_the_reward_counts_it() -> None:
    env = envs.make("Lift-v0", image_size=16)
    env.reset(seed=0)
    episode = rollout(Scripted(env, 1, 1), env, env.set_state(env.get_state()))
    assert episode.success
    assert episode.total_reward == 1.0
    assert episode.steps < 60
    env.close()


def test_the_policy_sees_the_last_steps_in_order_and_the_first_stands_for_those_before() -> None:
    env = envs.make("Lift-v0", image_size=16, horizon=8)
    env.reset(seed=0)
    policy = Scripted(env, n_obs_steps=2, n_action_steps=3)
    start = env.get_state()
    rollout(policy, env, env.set_state(start))
    positions = [obs["hand_position"][0] for obs in policy.seen]  # (2, 3) each
    torch.testing.assert_close(positions[0][0], positions[0][1])
    env.set_state(start)
    hands = []
    for t in range(6):
        if t % 3 == 0:
            action = env.expert_action()
        env.advance(action)
        hands.append(torch.from_numpy(env.hand.astype(np.float32)))
    torch.testing.assert_close(positions[1], torch.stack(hands[1:3]))
    torch.testing.assert_close(positions[2], torch.stack(hands[4:6]))
    env.close()


def test_frames_are_rendered_at_decisions_only_even_if_filmed() -> None:
    env = envs.make("Lift-v0", image_size=16, horizon=8, cameras=("workspace",))
    env.reset(seed=0)
    start, rendered = env.get_state(), []
    original = env.render_camera
    env.render_camera = lambda camera: rendered.append(camera) or original(camera)  # type: ignore[method-assign]
    rollout(Scripted(env, 1, 4), env, env.set_state(start))
    assert len(rendered) == 2
    rendered.clear()
    episode = rollout(Scripted(env, 1, 4), env, env.set_state(start), keep_states=True)
    assert len(rendered) == 2
    assert len(episode.states) == 9
    env.close()


def test_evaluation_writes_one_row_per_initial_state_and_repeats_exactly(
    evaluated: Evaluation, again: EvaluateConfig
) -> None:
    rows = [json.loads(line) for line in evaluated.rows_path.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert {"task", "seed", "success", "steps", "wall_s", "total_reward"} <= rows[0].keys()
    repeated = evaluate_run(again, overwrite=True).rows
    assert [r.repeatable() for r in repeated] == [r.repeatable() for r in evaluated.rows]


def test_a_row_does_not_depend_on_the_episodes_before_it(
    evaluated: Evaluation, again: EvaluateConfig
) -> None:
    path = again.run / "episodes.jsonl"
    kept = path.read_text().splitlines()
    path.write_text(kept[1] + "\n" + kept[0][:20])  # one whole row, one cut short by a kill
    with pytest.raises(UserError, match="--resume"):
        evaluate_run(again)
    resumed = evaluate_run(again, resume=True).rows
    assert [r.repeatable() for r in resumed] == [r.repeatable() for r in evaluated.rows]
    assert len(read_rows(path)) == 3


def test_rows_say_the_device_and_are_resumed_on_the_same_one(
    evaluated: Evaluation, again: EvaluateConfig
) -> None:
    here = device_name(resolve_device(None))
    assert {row.device for row in evaluated.rows} == {here}
    stored = again.run / "episodes.jsonl"
    write_rows(stored, [moved(evaluated.rows[0])])
    with pytest.raises(UserError, match=f"row 0 has device NVIDIA X, now it is {here}; .*--device"):
        evaluate_run(again, resume=True)
    assert read_rows(stored) == [moved(evaluated.rows[0])]


def moved(row: EpisodeResult) -> EpisodeResult:
    """A row as if another GPU had computed it."""
    return replace(row, device="NVIDIA X")


def test_a_run_is_evaluated_by_one_process_at_a_time(fresh: EvaluateConfig) -> None:
    with (
        directory_lock(fresh.run, ".evaluating"),
        pytest.raises(UserError, match="is using it"),
    ):
        evaluate_run(fresh)
    with directory_lock(fresh.run):  # as while it is trained, which an evaluation may look into
        assert len(evaluate_run(fresh).rows) == 3


def test_a_file_holds_several_evaluations_apart(
    evaluated: Evaluation, again: EvaluateConfig
) -> None:
    assert {row.checkpoint for row in evaluate_run(replace(again, checkpoint="model")).rows} == {
        "model"
    }
    other_init_states = replace(again, init_seed=1, episodes=2)
    assert {row.init_seed for row in evaluate_run(other_init_states).rows} == {1}
    evaluate_run(other_init_states, overwrite=True)
    full = evaluate_run(replace(again, quality="full"), resume=True).rows
    assert {row.quality for row in full} == {"full"}
    pairs = zip(full, evaluated.rows, strict=True)
    assert all(other.init_state == row.init_state for other, row in pairs)
    evaluate_run(replace(again, max_steps=5, episodes=1))
    stored = read_rows(again.run / "episodes.jsonl")
    assert len(stored) == 3 + 3 + 2 + 3 + 1
    first = evaluated.rows[0].evaluation
    assert tuple(row for row in stored if row.evaluation == first) == evaluated.rows
    names = set(evaluations(again.run))
    assert len(names) == 5
    assert all(str(again.run) in name for name in names)


def test_initial_states_that_look_different_are_refused(
    fresh: EvaluateConfig, tmp_path: Path
) -> None:
    env = envs.make("Lift-v0", image_size=24, horizon=10)
    init_states = make_init_states(env, 3, seed=0)
    env.close()
    save_init_states(
        replace(
            init_states, hashes=tuple({**h, "wrist_image": "0" * 16} for h in init_states.hashes)
        ),
        tmp_path / "odd.npz",
    )
    with pytest.raises(
        UserError, match=r"initial state \d .* does not look as it did .*\(wrist_image\)"
    ):
        evaluate_run(replace(fresh, init_states=tmp_path / "odd.npz"))


def test_initial_states_of_another_task_or_too_few_are_refused(
    fresh: EvaluateConfig, tmp_path: Path
) -> None:
    env = envs.make("Push-v0", image_size=24)
    save_init_states(make_init_states(env, 1, seed=0), tmp_path / "push.npz")
    env.close()
    with pytest.raises(UserError, match="initial states of fibopolicy/Push-v0"):
        evaluate_run(replace(fresh, init_states=tmp_path / "push.npz"))
    (tmp_path / "broken.npz").write_bytes(b"PK not really")
    with pytest.raises(UserError, match="is not a file of initial states"):
        evaluate_run(replace(fresh, init_states=tmp_path / "broken.npz"))


def test_video_shows_the_filmed_episodes(evaluated: Evaluation, fresh: EvaluateConfig) -> None:
    assert evaluated.video_path is not None
    frames = iio.imread(evaluated.video_path)
    assert frames.shape[0] == 11 + 20  # ten steps, then the last frame for a second
    assert frames.shape[2] >= 2 * 256  # although the policy sees 24 pixels
    with pytest.raises(UserError, match="camera 'sky'"):
        evaluate_run(replace(fresh, video=1, video_camera="sky"))
    with pytest.raises(UserError, match=r"a camera that the policy sees \(workspace, wrist\)"):
        evaluate_run(replace(fresh, video=1, video_camera="sky", overlay=True))


def test_a_film_that_cannot_be_made_leaves_the_rates_and_one_line(
    again: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/ffmpeg")
    with pytest.warns(
        UserWarning, match=r"no video: .*\.mp4: the video cannot be encoded"
    ) as caught:
        done = evaluate_run(replace(again, video=1, video_size=64), resume=True)
    assert "\n" not in str(caught[0].message)
    assert done.video_path is None
    assert len(done.rows) == 3
    assert not list(again.run.glob("videos/*seed0.mp4.*"))


def test_the_page_needs_no_other_file(evaluated: Evaluation, again: EvaluateConfig) -> None:
    page = write_run_page(again.run, evaluated).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "data:video/mp4;base64," in page
    assert "data:image/svg+xml;base64," in page
    assert "95 % Wilson interval" in page
    assert "processor " in page
    other = replace(evaluated, rows=tuple(replace(row, init_seed=1) for row in evaluated.rows))
    assert write_run_page(again.run, other).name == "report_seed1.html"  # beside the other


def test_the_table_states_counts_rate_and_interval() -> None:
    assert "47/50  94.0 %  [83.8, 97.9] %" in rate_table({"vit": wilson(47, 50)})


def test_a_page_is_made_without_the_training_log(
    evaluated: Evaluation, again: EvaluateConfig
) -> None:
    (again.run / "metrics.jsonl").write_text('{"step":')
    assert "95 % Wilson interval" in write_run_page(again.run, evaluated).read_text()


def test_from_python_a_policy_sees_what_it_was_trained_on(evaluated: Evaluation) -> None:
    policy = load_policy(evaluated.rows_path.parent).policy
    rows = evaluate_policy(policy, "Lift-v0", 3, workers=1, horizon=10)
    for row, expected in zip(rows, evaluated.rows, strict=True):
        for name in ("success", "steps", "total_reward", "policy"):
            assert getattr(row, name) == getattr(expected, name)
    with pytest.raises(
        UserError,
        match=r"on workspace_image of shape \(24, 24, 3\), which .* provides as \(84, 84, 3\)",
    ):
        evaluate_policy(policy, "Lift-v0", 1, workers=1, image_size=84)
    with pytest.raises(
        UserError,
        match=r"trained on wrist_image, which .* does not provide; it provides workspace_image",
    ):
        evaluate_policy(
            policy,
            partial(envs.make, "Lift-v0", cameras=("workspace",), image_size=24),
            1,
            workers=1,
        )
    with pytest.warns(UserWarning, match="trained on frames of render quality fast and sees full"):
        evaluate_policy(policy, "Lift-v0", 1, workers=1, horizon=2, quality="full")


def test_frames_of_any_shape_are_trained_on_and_evaluated(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    data, out = tmp_path / "lift.hdf5", tmp_path / "run"
    sizes = {"workspace": (24, 36), "wrist": 24}
    collect(Plan("Lift-v0", cameras=tuple(sizes), image_size=sizes), 2, data, workers=1)
    train(replace(tiny_config, dataset=data, out=out))
    policy = load_policy(out).policy
    assert dict(policy.shapes.images) == {"workspace_image": (24, 36), "wrist_image": (24, 24)}
    expected = evaluate_run(EvaluateConfig(out, episodes=1, video=1, max_steps=3, workers=1)).rows
    rows = evaluate_policy(policy, "Lift-v0", 1, workers=1, horizon=3)
    assert [row.total_reward for row in rows] == [row.total_reward for row in expected]


def test_vectors_that_the_simulator_lacks_are_named(fresh: EvaluateConfig) -> None:
    document = json.loads((fresh.run / "config.json").read_text())
    document["shapes"]["vectors"] = {"object": 3, "gripper_opening": 1}
    (fresh.run / "config.json").write_text(json.dumps(document))
    with pytest.raises(
        UserError,
        match=(
            r"trained on object, which fibopolicy/Lift-v0 does not provide; it provides gripper"
        ),
    ):
        evaluate_run(fresh)


@pytest.mark.parametrize("change", [{"episodes": 0}, {"init_seed": -1}])
def test_impossible_evaluations_are_refused(change: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected episodes >= 1"):
        EvaluateConfig(tmp_path, **change)


def test_failures_are_filmed_first_and_the_overlay_is_drawn(
    again: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fibopolicy.evaluation import video

    filmed: list[video.Clip] = []
    monkeypatch.setattr(video, "write_video", lambda path, clips, fps: filmed.extend(clips))
    options = {"video": 2, "failures_first": True, "video_size": 72}
    evaluate_run(replace(again, overlay=True, **options), resume=True)
    evaluate_run(replace(again, **options), resume=True)
    assert [(clip.frames.shape, clip.success) for clip in filmed] == 4 * [((11, 72, 72, 3), False)]
    assert (filmed[0].frames != filmed[2].frames).any()


def test_an_evaluation_on_another_task_replaces_no_file_of_the_first(
    again: EvaluateConfig, tmp_path: Path
) -> None:
    write_run_page(again.run, evaluate_run(again, resume=True))
    kept = {path: path.read_bytes() for path in again.run.glob("*.[nhs]*") if path.is_file()}
    assert {"report.html", "success_by_step.svg", "init_seed0_fast.npz"} < {p.name for p in kept}
    other = evaluate_run(replace(again, task="Push-v0"))
    assert write_run_page(again.run, other).name == "report_fibopolicy_Push-v0.html"
    assert [path.name for path, content in kept.items() if path.read_bytes() != content] == []
    runs = (again.run, copy_of(again.run, tmp_path / "twin").run)
    push, page = Selector(task="fibopolicy/Push-v0"), tmp_path / "push.html"
    Compare(runs, out=page, video=1, video_size=72, selector=push).run()
    assert page.with_suffix(".mp4").is_file()


def test_two_checkpoints_are_filmed_side_by_side_on_the_same_initial_states(
    evaluated: Evaluation, again: EvaluateConfig, tiny_run: Path, tmp_path: Path
) -> None:
    other = copy_of(tiny_run, tmp_path / "other")
    evaluate_run(replace(other, checkpoint="model"))
    page = tmp_path / "sides.html"
    Compare((again.run, other.run), out=page, video=2, video_size=72).run()
    frames = iio.imread(page.with_suffix(".mp4"))
    assert frames.shape[0] == 11 + 20
    assert min(frames.shape[1:3]) >= 2 * 72
    assert "data:video/mp4;base64," in page.read_text()
    rows = other.run / "episodes.jsonl"
    computed = read_rows(rows)
    write_rows(rows, map(moved, computed))
    with pytest.raises(UserError, match="its rows were computed on NVIDIA X, and on"):
        Compare((again.run, other.run), out=page, video=1, overwrite=True).run()
    write_rows(rows, [*computed, *evaluated.rows])  # as if its moving average had been run
    shutil.copyfile(other.run / "model.safetensors", other.run / "ema.safetensors")
    with pytest.raises(UserError, match="differ from those of the compared rows"):
        Compare(
            (again.run, other.run),
            out=page,
            video=1,
            overwrite=True,
            selector=Selector(checkpoint="ema"),
        ).run()
    assert "95 % interval" in page.read_text()  # written, without the video
    assert "data:video" not in page.read_text()
