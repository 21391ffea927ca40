"""robosuite's NutAssemblySquare, with the optimizer tuned equally for every encoder: dense
attention, Fibottention, and random pairs of the same density.

    fibopolicy collect robosuite/NutAssemblySquare --episodes 500 --noise 0.2 --cameras \\
        --out runs/square/states.hdf5
    fibopolicy render runs/square/states.hdf5 --out runs/square/demos.hdf5 --image-size 84
    fibopolicy study run scripts/studies/square_fair.py --out runs/square_fair

The same commands, the first two with `--resume`, continue what was interrupted. Each
encoder gets the same nine trials of six settings, around the one that was once chosen for
Fibottention (lr 2e-3, weight decay 0.01).

Cost on CPUs, estimated from processor time (a gradient step 0.47 s with dense attention
and 0.35 s with the others, a control step of an episode 0.03 s): 15 runs of 12,000 steps 20
core-hours, their 1500 episodes 2 to 3, the search 18,000 steps and 120 episodes for each
encoder, 7 in all. Together about 29 core-hours, 15 hours on 2 free cores. Results come seed
by seed, so a study that is stopped has complete grids.
"""

from __future__ import annotations

from fibopolicy.study import StudyConfig, StudyEncoder, StudySearch, StudyTask

#: The nut's handle needs 144 patches of 7 pixels.
PATCHES = {"patch_size": 7}


def study() -> StudyConfig:
    return StudyConfig(
        "square_fair",
        tasks=[
            StudyTask("robosuite/NutAssemblySquare", dataset="../../runs/square/demos.hdf5"),
        ],
        encoders=[
            StudyEncoder(f"{attention}vit_tiny", PATCHES)
            for attention in ("fibottention_", "", "random_")
        ],
        baseline="vit_tiny",
        seeds=(0, 1, 2, 3, 4),
        steps=12_000,
        episodes=100,
        margin=0.05,
        policy_config={"n_action_steps": 4},
        optimizer={"batch_size": 32},
        search=StudySearch(
            {"lr": (1e-3, 2e-3, 4e-3), "weight_decay": (0.01, 0.1)},
            rungs=((1 / 8, 10), (1 / 4, 20)),  # 1500 and 3000 steps
        ),
    )
