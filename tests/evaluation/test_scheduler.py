"""Rows do not depend on what runs beside an episode, and no fault of a simulator is
charged to a policy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faulty_envs
import numpy as np
import pytest
import torch
from rollout import rollout

from fibopolicy import envs
from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import Episode
from fibopolicy.evaluation.init_states import InitStates, make_init_states
from fibopolicy.evaluation.policy_runner import PolicyRunner
from fibopolicy.evaluation.scheduler import Scheduler
from fibopolicy.policies import Policy, PolicyConfig, Shapes, build_policy

EPISODES = 4
MAKE = partial(envs.make, "Lift-v0", image_size=32, horizon=9)
Short = tuple[int, bool, int, float]


@pytest.fixture(scope="module")
def init_states() -> Iterator[InitStates]:
    env = MAKE()
    yield make_init_states(env, EPISODES, seed=0)
    env.close()


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Scheduler]]:
    """Simulators by their number; all policies here read two observations."""
    pools = {workers: Scheduler(MAKE, 2, workers) for workers in (1, 3)}
    yield pools
    for pool in pools.values():
        pool.close()


def untrained(encoder: str, options: dict[str, int], **settings: Any) -> Policy:
    torch.manual_seed(0)
    shapes = Shapes(
        {"workspace_image": (32, 32), "wrist_image": (32, 32)},
        {"hand_position": 3, "gripper_opening": 1},
        4,
    )
    config = PolicyConfig(
        **{"n_obs_steps": 2, "horizon": 5, "n_action_steps": 3, **settings},
        encoder=encoder,
        encoder_options=options,
    )
    return build_policy(config, shapes).eval()


def short(outcome: Episode) -> Short:
    assert not outcome.error
    return outcome.index, outcome.success, outcome.steps, outcome.total_reward


class Recorder:
    """Records all actions of a policy, bit for bit, by episode and decision."""

    def __init__(self, runner: PolicyRunner) -> None:
        self.runner, self.answers = runner, {}
        act = runner.act_batch

        def recording(requests):
            keys = [(r.index, r.decision) for r in requests]
            actions = act(requests)
            self.answers.update(zip(keys, (a.tobytes() for a in actions), strict=True))
            return actions

        runner.act_batch = recording


VIT = ("fibottention_vit_tiny", {"patch_size": 8, "width": 32, "depth": 2, "num_heads": 2})


@pytest.mark.parametrize(
    ("encoder", "options", "settings", "batch_size"),
    [
        (*VIT, {}, 1),
        (*VIT, {}, 4),
        ("resnet18", {}, {}, 1),
        ("resnet18", {}, {}, 4),
        (*VIT, {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1}, 4),
        (*VIT, {"policy": "flow"}, 4),
        (
            *VIT,
            {
                "policy": "diffusion",
                "policy_options": {"denoiser": "transformer", "num_inference_steps": 2},
                "temporal_ensemble_coeff": 0.01,
                "n_action_steps": 1,
            },
            4,
        ),
    ],
)
def test_actions_and_outcomes_do_not_depend_on_workers_or_order(
    encoder: str,
    options: dict[str, int],
    settings: dict[str, Any],
    batch_size: int,
    init_states: InitStates,
    pools: dict[int, Scheduler],
) -> None:
    if settings.get("policy") == "diffusion":
        pytest.importorskip("diffusers")
    policy = untrained(encoder, options, **settings)
    env = MAKE()
    serial = Recorder(PolicyRunner(policy, batch_size=batch_size))
    expected = []
    for index in range(EPISODES):
        episode = rollout(serial.runner, env, env.set_state(init_states.states[index]), index=index)
        expected.append((index, episode.success, episode.steps, episode.total_reward))
    env.close()
    shuffled = [int(i) for i in np.random.default_rng(0).permutation(EPISODES)]
    for workers, order in ((1, range(EPISODES)), (3, range(EPISODES)), (3, shuffled)):
        recorder = Recorder(PolicyRunner(policy, batch_size=batch_size))
        got = [
            short(outcome)
            for outcome in pools[workers].run(recorder.runner, init_states, list(order))
        ]
        assert sorted(got) == expected
        assert recorder.answers == serial.answers


class Counting:
    """A recurrent policy: its actions depend on all observations of this episode, and
    optionally on random numbers.
    """

    n_obs_steps = 2

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.rows = noise, set()

    def act(self, obs, state):
        self.rows.add(len(obs["hand_position"]))
        seen = obs["hand_position"].sum((1, 2))[:, None]
        memory = seen if state is None else state["memory"][0] + seen
        actions = torch.sin(40 * memory[:, None] + torch.arange(8.0).view(1, 2, 4))
        return actions + self.noise * torch.randn(actions.shape), {"memory": [memory], "calls": 1}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_recurrent_state_stays_with_its_episode(
    batch_size: int, init_states: InitStates, pools: dict[int, Scheduler]
) -> None:
    answers = []
    for workers in (1, 3):
        policy = Counting()
        recorder = Recorder(PolicyRunner(policy, batch_size=batch_size))
        list(pools[workers].run(recorder.runner, init_states, range(EPISODES)))
        answers.append(recorder.answers)
        assert policy.rows == {batch_size}
    assert answers[0] == answers[1]


def test_a_random_policy_repeats_in_a_batch_of_one(
    init_states: InitStates, pools: dict[int, Scheduler]
) -> None:
    recorders = [Recorder(PolicyRunner(Counting(noise=0.1))) for _ in range(2)]
    for workers, recorder in zip((1, 3), recorders, strict=True):
        list(pools[workers].run(recorder.runner, init_states, range(EPISODES)))
    assert recorders[0].answers == recorders[1].answers
    layout = pools[1].info().layout
    assert not PolicyRunner(Counting(noise=0.1), batch_size=3).is_row_independent(layout)
    assert PolicyRunner(Counting(), batch_size=3).is_row_independent(layout)


def test_a_policy_that_mixes_its_rows_is_detected(pools: dict[int, Scheduler]) -> None:
    class Mixing(Counting):
        def act(self, obs, state):
            actions, state = super().act(obs, state)
            return actions - actions.mean(0), state

    assert not PolicyRunner(Mixing(), batch_size=4).is_row_independent(pools[1].info().layout)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")
def test_simulators_load_no_torch_and_run_no_script_again(
    pools: dict[int, Scheduler], tmp_path: Path
) -> None:
    pools[3].info()
    for slot in pools[3]._slots:
        assert "libtorch" not in Path(f"/proc/{slot.simulator.process.pid}/maps").read_text()
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import numpy\nfrom fibopolicy.evaluation import evaluate_policy\nprint('once',"
        " len(evaluate_policy(lambda obs: numpy.zeros(4), 'Lift-v0', 1, workers=1, cameras=(),"
        " horizon=2)))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "once 1\n"


def test_the_policy_has_priority_over_the_simulators(pools: dict[int, Scheduler]) -> None:
    pids = [slot.simulator.process.pid for slot in pools[3]._slots]
    assert all(
        os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0) for pid in pids
    )


def test_filming_keeps_every_state_and_changes_nothing(
    init_states: InitStates, pools: dict[int, Scheduler]
) -> None:
    runner = PolicyRunner(Counting())
    plain = {o.index: short(o) for o in pools[3].run(runner, init_states, [0, 1])}
    for outcome in pools[3].run(runner, init_states, [0, 1], keep_states=True):
        assert short(outcome) == plain[outcome.index]
        assert len(outcome.states) == outcome.steps + 1
        assert np.array_equal(outcome.states[0], init_states.states[outcome.index].state)


def faulty(
    fault: Callable[[], None], times: int, folder: Path, *, step_timeout: float = 60.0
) -> dict[int, Episode]:
    env = envs.make("Lift-v0", image_size=16, horizon=12)
    init_states = make_init_states(env, 4, seed=0)
    hand = env.set_state(init_states.states[2])["hand_position"]
    env.close()
    make = faulty_envs.make_faulty(fault, folder, times, hand)
    with Scheduler(make, 2, 2, step_timeout=step_timeout) as pool:
        outcomes = {o.index: o for o in pool.run(PolicyRunner(Counting()), init_states, range(4))}
        pids = [slot.simulator.process.pid for slot in pool._slots]
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "a process was left behind"
    return outcomes


@pytest.mark.parametrize(
    ("fault", "limit"),
    [(faulty_envs.die, 60.0), (faulty_envs.stop, 8.0), (faulty_envs.crash, 60.0)],
)
def test_an_episode_whose_simulator_fails_runs_again_elsewhere(
    fault: Callable[[], None], limit: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = faulty(fault, 1, tmp_path, step_timeout=limit)
    assert [(i, o.steps, o.attempt, o.error) for i, o in sorted(outcomes.items())] == [
        (0, 12, 1, ""),
        (1, 12, 1, ""),
        (2, 12, 2, ""),
        (3, 12, 1, ""),
    ]
    assert "episode 2" in caplog.text


def test_an_episode_that_fails_every_time_is_an_error_and_no_failure(tmp_path: Path) -> None:
    outcomes = faulty(faulty_envs.crash, 99, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert outcomes[2].attempt == 3
    assert "ArithmeticError: the simulation is unstable" in outcomes[2].error
    assert [outcomes[i].error for i in (0, 1, 3)] == ["", "", ""]


def test_a_simulator_that_dies_between_episodes_costs_none(init_states: InitStates) -> None:
    with Scheduler(MAKE, 2, 1) as pool:
        runner = PolicyRunner(Counting())
        first = [short(outcome) for outcome in pool.run(runner, init_states, [0])]
        pool._slots[0].simulator.process.kill()
        pool._slots[0].simulator.process.join()
        again = list(pool.run(runner, init_states, [0]))
    assert [short(outcome) for outcome in again] == first


def test_a_simulator_that_cannot_start_is_an_error_after_three_attempts() -> None:
    with (
        Scheduler(faulty_envs.dies_at_start, 1, 1) as pool,
        pytest.raises(UserError, match=r"was killed by SIGKILL.*tried 3 times"),
    ):
        pool.info()


def test_a_killed_parent_leaves_no_process_and_no_memory(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(faulty_envs.__file__).parent)!r})
from contextlib import closing
from functools import partial
from pathlib import Path
import faulty_envs
from fibopolicy.evaluation.simulator import Simulator
if __name__ == "__main__":
    make = partial(faulty_envs.make_long_lift, Path({str(tmp_path)!r}))
    with closing(Simulator(make, 1)) as one, closing(Simulator(make, 1)) as other:
        one.receive(), other.receive()
        print("up", flush=True)
        import time; time.sleep(60)
"""
    script = tmp_path.with_name(tmp_path.name + "_script.py")
    script.write_text(code)
    # some runners ignore it, which processes would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    for number in (signal.SIGKILL, signal.SIGINT):
        for file in tmp_path.iterdir():
            file.unlink()
        parent = subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"up\n"
        parent.send_signal(number)
        parent.wait(120)
        parent.stdout.close()
        children = [int(file.name) for file in tmp_path.iterdir()]
        assert children
        deadline = time.monotonic() + 300
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "a process was left behind"
            time.sleep(0.1)
    assert not {
        name
        for name in (os.listdir("/dev/shm") if shared else [])
        if name not in shared and "psm" in name
    }
