"""Every policy with Fibottention, dense attention and ResNet-18, on the built-in
Lift.

    fibopolicy study run scripts/studies/policies.py --out runs/policies

With one training seed it shows which policies learn the task with which encoder; it cannot
settle small differences. The same command resumes the study.
"""

from __future__ import annotations

from fibopolicy.study import StudyConfig, StudyEncoder, StudyPolicy, StudyTask

#: Patches of 6 pixels on 48 x 48 images are 64 per camera, and ResNet-18 costs less than
#: half as much as at the usual 84 x 84.
PATCHES = {"patch_size": 6}
#: The least standard deviation of a predicted distribution, in units of actions. The
#: default is 0.01 for the Gaussian and 0.0001 for mixtures.
MIN_STD = {"policy_options": {"min_std": 0.05}}
#: The horizon and action steps of `bc`.
CHUNKED = {**MIN_STD, "horizon": 8, "n_action_steps": 4}
#: The outputs of a recurrent network are small at first, so it starts learning late and
#: needs many steps, which short windows make affordable.
RECURRENT = {"policy_options": {**MIN_STD["policy_options"], "num_layers": 1}, "horizon": 3}
#: Twice the default: at 1e-3 `bc` with ResNet-18 has not converged after 1200 steps.
FASTER = {"lr": 2e-3}


def study() -> StudyConfig:
    return StudyConfig(
        "policies",
        tasks=[StudyTask("Lift-v0", demos=400, cameras=("wrist",), image_size=48)],
        encoders=[
            StudyEncoder("fibottention_vit_tiny", PATCHES),
            StudyEncoder("vit_tiny", PATCHES),
            "resnet18",
        ],
        policies=[
            StudyPolicy("bc", optimizer=FASTER, steps=1200),
            StudyPolicy("bc_gaussian", CHUNKED, steps=1200),
            StudyPolicy("bc_gmm", CHUNKED, steps=2500),
            StudyPolicy("bc_rnn_gmm", RECURRENT, {**FASTER, "batch_size": 16}, steps=2000),
            StudyPolicy("bc_transformer_gmm", {**MIN_STD, "n_obs_steps": 3}, steps=800),
            StudyPolicy("diffusion", steps=800),
            StudyPolicy("flow", steps=500),
        ],
        baseline="vit_tiny",
        seeds=(0,),
        episodes=50,
        margin=0.05,
        optimizer={"batch_size": 32},
    )
