"""What each perturbation adds to the cost of an episode, on CPUs: perturbed and clean
episodes of the same initial state take turns in one process.

    python scripts/benchmarks/perturbation_cost.py --hardware epyc

The policy is an untrained `bc` with `fibottention_vit_tiny`, so every episode runs to its
horizon. A ratio is processor time of a perturbed episode, its initial state and rendering
included, over that of a clean one; level 2 of 3. Writes
docs/benchmarks/perturbation_cost_<hardware>_<date>.json.
"""

from __future__ import annotations

import time

import numpy as np
import results
import torch

from fibopolicy import envs
from fibopolicy.attention.profile import Report
from fibopolicy.envs.perturbations import PERTURBATIONS, Perturbation, PerturbedEnv
from fibopolicy.evaluation.episodes import Episode
from fibopolicy.evaluation.init_states import InitStates, make_init_states
from fibopolicy.evaluation.policy_runner import PolicyRunner
from fibopolicy.evaluation.simulator import EpisodeRunner
from fibopolicy.policies import PolicyConfig, Shapes, build_policy

#: (task, side of its frames in pixels, share of the turns).
SCENES = (("Lift-v0", 84, 1.0), ("Lift-v0", 48, 1.0), ("robosuite/Lift", 84, 0.5))
INIT_STATES, HORIZON = 4, 60


def make_policy(env: envs.TaskEnv, image_size: int) -> PolicyRunner:
    obs = env.set_state(env.get_state())
    shapes = Shapes(
        {key: (value.shape[0], value.shape[1]) for key, value in obs.items() if value.ndim == 3},
        {key: obs[key].shape[0] for key in env.proprioception},
        env.action_space.shape[0],
    )
    torch.manual_seed(0)
    patches = {"patch_size": 12 if image_size == 84 else 6}  # 49 or 64 patches
    config = PolicyConfig(encoder="fibottention_vit_tiny", encoder_options=patches)
    return PolicyRunner(build_policy(config, shapes).eval())


def seconds(
    policy: PolicyRunner,
    env: PerturbedEnv,
    init_states: InitStates,
    index: int,
    perturbation: Perturbation | None,
) -> float:
    began = time.process_time()
    obs = env.set_state(init_states.states[index])
    if perturbation is not None:
        obs = env.perturb(perturbation, index)
    episode, runner = Episode(index), EpisodeRunner(env, obs, policy.n_obs_steps)
    while not runner.done:
        episode.window = {key: np.stack([o[key] for o in runner.window]) for key in obs}
        runner.execute(policy.act_batch([episode])[0])
    return time.process_time() - began


def main() -> None:
    options = results.hardware_options(__doc__, turns=12)
    torch.set_num_threads(1)
    rows = []
    for task, image_size, share in SCENES:
        env = PerturbedEnv(envs.make(task, image_size=image_size, horizon=HORIZON))
        init_states = make_init_states(env, INIT_STATES, seed=0)
        policy = make_policy(env, image_size)
        for index in range(2):
            seconds(policy, env, init_states, index, None)
        for name in PERTURBATIONS:
            perturbation, ratios, clean = Perturbation(name, 2), [], []
            for turn in range(round(options.turns * share)):
                index = turn % INIT_STATES
                order = (None, perturbation) if turn % 2 else (perturbation, None)
                took = {which: seconds(policy, env, init_states, index, which) for which in order}
                ratios.append(took[perturbation] / took[None])
                clean.append(took[None])
            row = {"task": task, "image_size": image_size, "perturbation": name}
            row |= {"ratio": results.spread(ratios, 3), "clean_ms": 1e3 * float(np.median(clean))}
            rows.append(row)
            print(f"{task} {image_size} {name}: {results.ratio_text(row['ratio'])}", flush=True)
        env.close()
    report = Report("perturbation_cost", rows)
    report.write(
        options.out / f"perturbation_cost_{options.hardware}_{report.environment['date']}.json"
    )


if __name__ == "__main__":
    main()
