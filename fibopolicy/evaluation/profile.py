"""How fast a policy acts on a robot: `fibopolicy profile act`."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from fibopolicy.evaluation.policy_runner import load
from fibopolicy.policies.run_directory import RunDirectory, resolve_run
from fibopolicy.utils.files import StrPath
from fibopolicy.utils.system import device_name


@dataclass(frozen=True)
class ActProfile:
    """Latency of the calls of `PolicyRunner.act` in which the policy itself runs.

    Attributes:
        device: "cpu" or the name of a GPU.
        dtype: dtype of the weights.
        threads: CPU threads of torch during a call.
        n_action_steps: control steps per call of the policy.
        calls: timed calls.
        median_s, p99_s: latency with one observation, seconds. Includes copying the
            observation to the device and the actions from it.
        on_time_hz: highest control frequency at which 99 % of the calls end within
            their control step: 1 / p99.
        sustained_hz: highest mean control frequency, if the robot waits for each chunk:
            n_action_steps / median. Up to it, a loop catches up after each call.
    """

    policy: str
    encoder: str
    device: str
    dtype: str
    threads: int
    n_action_steps: int
    calls: int
    median_s: float
    p99_s: float
    on_time_hz: float
    sustained_hz: float


def profile_act(
    run: StrPath,
    *,
    checkpoint: str = "ema",
    device: str | None = None,
    threads: int = 1,
    turns: int = 500,
) -> ActProfile:
    """Time `turns` calls of the policy of a run on random observations.

    Args:
        run, checkpoint, device, threads: see `load`.

    Raises:
        UserError: what `load` raises.
    """
    run = resolve_run(run)
    task = next(iter(RunDirectory(run).read_tasks()), None)  # any takes as long
    runner = load(run, checkpoint=checkpoint, device=device, threads=threads, task=task)
    config, obs = runner.policy.config, runner.noise()
    seconds = []
    for _ in range(turns):
        began = time.perf_counter()
        runner.act(obs)
        seconds.append(time.perf_counter() - began)
        for _ in range(config.n_action_steps - 1):
            runner.act(obs)  # the rest of the chunk
    median, p99 = np.quantile(seconds, [0.5, 0.99]).tolist()
    return ActProfile(
        policy=config.policy,
        encoder=config.encoder,
        device=device_name(runner.device),
        dtype=str(runner.dtype).removeprefix("torch."),
        threads=threads,
        n_action_steps=config.n_action_steps,
        calls=turns,
        median_s=median,
        p99_s=p99,
        on_time_hz=1 / p99,
        sustained_hz=config.n_action_steps / median,
    )


def summary(p: ActProfile) -> str:
    """A profile as three lines of text."""
    return (
        f"{p.policy} with {p.encoder} on {p.device} in {p.dtype}, {p.threads} CPU"
        f" thread{'s' * (p.threads > 1)}\n"
        f"latency of a call: median {p.median_s * 1e3:.2f} ms, 99th percentile"
        f" {p.p99_s * 1e3:.2f} ms, of {p.calls}; one call per {p.n_action_steps} control steps\n"
        f"control frequency: {p.on_time_hz:.0f} Hz with 99 % of the calls on time,"
        f" {p.sustained_hz:.0f} Hz on average if the robot may wait for a call"
    )
