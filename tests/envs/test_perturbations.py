from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fibopolicy import envs
from fibopolicy.envs.perturbations import (
    PERTURBATIONS,
    FrameChange,
    ModelChange,
    Perturbation,
    PerturbedEnv,
    parse,
    unsupported_reason,
)
from fibopolicy.envs.tabletop.lift import Lift
from fibopolicy.errors import UserError

OF_MODELS = [name for name, kind in PERTURBATIONS.items() if isinstance(kind, ModelChange)]
OF_FRAMES = [name for name, kind in PERTURBATIONS.items() if isinstance(kind, FrameChange)]


def started(task: str, **options: object) -> PerturbedEnv:
    env = PerturbedEnv(envs.make(task, **{"image_size": 48, **options}))
    env.reset(seed=3)
    return env


@pytest.fixture(scope="module")
def lift() -> Iterator[PerturbedEnv]:
    with started("Lift-v0") as env:
        yield env


def frames(observation: envs.Observation) -> np.ndarray:
    images = [value for key, value in observation.items() if key.endswith("_image")]
    return np.stack(images).astype(float)


def check_that_each_changes_frames_and_is_undone(env: PerturbedEnv) -> None:
    state = env.get_state()
    clean = env.set_state(state)
    for name in OF_MODELS:
        seen = env.perturb(Perturbation(name, 3), 0)
        assert np.abs(frames(seen) - frames(clean)).max() > 10, name
        again = env.set_state(state)
        assert all(np.array_equal(again[key], clean[key]) for key in clean), name
        assert env.get_state().model == state.model


def test_each_changes_frames_of_a_built_in_task_until_the_next_state(lift: PerturbedEnv) -> None:
    check_that_each_changes_frames_and_is_undone(lift)


@pytest.mark.parametrize("task", ["robosuite/Lift", "metaworld/drawer-open-v3"])
def test_each_changes_frames_of_other_suites_until_the_next_state(task: str) -> None:
    pytest.importorskip(task.partition("/")[0])
    with started(task) as env:
        check_that_each_changes_frames_and_is_undone(env)


@pytest.mark.parametrize("name", [*OF_MODELS, *OF_FRAMES])
def test_a_higher_level_changes_more(lift: PerturbedEnv, name: str) -> None:
    state = lift.get_state()
    clean = frames(lift.set_state(state))
    changes = []
    for level in (1, 2, 3):
        lift.set_state(state)
        changes.append(np.abs(frames(lift.perturb(Perturbation(name, level), 1)) - clean).mean())
    assert 0 < changes[0] < changes[1] < changes[2]


def test_a_shadow_darkens_by_the_stated_share(lift: PerturbedEnv) -> None:
    state = lift.get_state()
    clean = frames(lift.set_state(state))
    for level, share in ((1, 0.25), (2, 0.5), (3, 0.75)):
        lift.set_state(state)
        left = frames(lift.perturb(Perturbation("shadow", level), 1)) / np.maximum(clean, 1)
        darkened = left[(clean > 100) & (left < 0.95)]
        assert len(darkened) > 500
        assert np.median(darkened) == pytest.approx(1 - share, abs=0.02)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbation_depends_on_name_level_and_index_alone(
    lift: PerturbedEnv, name: str
) -> None:
    state, action = lift.get_state(), np.array([0.5, 0, -1, 0])

    def episode(env: PerturbedEnv, index: int) -> envs.Observation:
        env.set_state(state)
        env.perturb(Perturbation(name, 2), index)
        for i in range(3):
            env.advance(action if i else -action)
        return env.observe()

    first = episode(lift, 5)
    with started("Lift-v0") as other:
        other.perturb(Perturbation("table-color", 3), 1)  # leaves nothing behind
        again = episode(other, 5)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    if name not in ("blur", "jpeg", "dropped-camera", "action-delay"):
        assert any(np.any(first[key] != value) for key, value in episode(lift, 6).items())
    lift.set_state(state)


@pytest.mark.parametrize("name", OF_MODELS)
def test_looks_do_not_change_the_physics(lift: PerturbedEnv, name: str) -> None:
    state = lift.get_state()

    def end() -> np.ndarray:
        for _ in range(5):
            lift.advance(np.array([0.3, 0.2, -1, 1]))
        return lift.get_state().state

    lift.set_state(state)
    expected = end()
    lift.set_state(state)
    lift.perturb(Perturbation(name, 3), 0)
    assert np.array_equal(end(), expected)
    lift.set_state(state)


def test_shapes_of_distractors_lie_apart_from_the_object(lift: PerturbedEnv) -> None:
    cube = lift.simulation()[1].body("cube").xpos
    for index in range(20):
        lift.perturb(Perturbation("distractors", 3), index)
        assert lift.env.decor is not None
        assert len(lift.env.decor) == 6
        assert min(np.hypot(*(cube - one.position)[:2]) for one in lift.env.decor) > 0.05


def test_delayed_actions_arrive_later_and_the_first_stands_in(
    lift: PerturbedEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[float] = []
    monkeypatch.setattr(lift.env, "advance", lambda action: executed.append(float(action[0])))
    lift.perturb(Perturbation("action-delay", 2), 0)
    for i in range(5):
        lift.advance(np.full(4, i / 10))
    assert executed == [0.0, 0.0, 0.0, 0.1, 0.2]


def test_noise_on_proprioception_is_new_at_each_step_and_spares_the_rest(
    lift: PerturbedEnv,
) -> None:
    state = lift.get_state()
    clean = lift.set_state(state)
    first = lift.perturb(Perturbation("proprioception-noise", 2), 0)
    lift.advance(np.zeros(4))
    second = lift.observe()
    noise = [seen["hand_position"] - clean["hand_position"] for seen in (first, second)]
    assert 0.001 < np.abs(noise[0]).max() < 0.05
    assert np.abs(noise[1] - noise[0]).max() > 0.001
    assert np.array_equal(frames(first), frames(clean))


def test_a_lost_camera_is_black_in_its_share_of_frames(lift: PerturbedEnv) -> None:
    lost = []
    state = lift.get_state()
    for level in (1, 2, 3):
        black = 0
        for index in range(40):
            lift.set_state(state)
            seen = frames(lift.perturb(Perturbation("dropped-camera", level), index))
            black += int((seen == 0).all(axis=(1, 2, 3)).sum())
        lost.append(black)
    assert lost[2] == 40  # one of two cameras
    assert 0 < lost[0] < lost[1] < 25


def test_a_restored_instant_looks_as_it_did_in_the_perturbed_episode(lift: PerturbedEnv) -> None:
    state = lift.get_state()
    for name in ("camera-position", "noise", "distractors"):
        lift.set_state(state)
        lift.perturb(Perturbation(name, 3), 4)
        lift.advance(np.array([1.0, 0, -1, 0]))
        seen, then = lift.observe(), lift.get_state()
        assert np.array_equal(frames(lift.restore(then, 1)), frames(seen)), name
        clean = frames(lift.set_state(then))
        assert np.abs(clean - frames(seen)).mean() > 2, name
    lift.set_state(state)


class Undecorated(Lift):
    task_id = "undecorated"
    decor = None  # type: ignore[assignment]

    def simulation(self) -> tuple[object, object]:
        raise LookupError("hidden")


def test_a_task_refuses_what_it_cannot_do_and_does_the_rest() -> None:
    with PerturbedEnv(Undecorated(image_size=16)) as env:
        env.reset(seed=0)
        assert unsupported_reason(env.env, "light-color") == (
            "undecorated does not support the perturbation light-color: it has no MuJoCo"
            " simulation; perturb its frames, vectors or actions"
        )
        with pytest.raises(UserError, match="undecorated does not support the perturbation shadow"):
            env.perturb(Perturbation("shadow", 1), 0)
        assert unsupported_reason(env.env, "blur") == ""
    with envs.make("Lift-v0", cameras=()) as blind:
        assert unsupported_reason(blind, "blur").endswith("the policy sees no camera")


def test_whatever_a_task_has_is_passed_on() -> None:
    public = {name for name in vars(envs.TaskEnv) if not name.startswith("_")}
    attributes = envs.TaskEnv.__annotations__.keys()  # copied
    assert public - attributes - {"step"} <= vars(PerturbedEnv).keys()


def test_unknown_perturbations_and_levels_are_named_with_what_is_known() -> None:
    with pytest.raises(UserError, match="unknown perturbation 'blurr': did you mean 'blur'"):
        parse("blurr:2")
    with pytest.raises(UserError, match="blur: unknown level 4; expected 1, 2 or 3"):
        parse("blur:4")
    with pytest.raises(UserError, match="perturbation blur:x: expected NAME or NAME:LEVEL"):
        parse("blur:x")


def test_the_guide_describes_every_perturbation_as_the_code_does() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "robustness.md").read_text("utf-8")
    assert [line for line in guide.splitlines() if line.startswith("| `")] == [
        f"| `{name}` | {kind.about} |" for name, kind in PERTURBATIONS.items()
    ]
