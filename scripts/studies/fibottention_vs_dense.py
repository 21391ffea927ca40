"""Fibottention against dense attention, two other patterns of the same density, and
ResNet-18, on three built-in tasks.

    fibopolicy study run scripts/studies/fibottention_vs_dense.py --out runs/three_tasks

The same command resumes the study.
"""

from __future__ import annotations

from fibopolicy.study import StudyConfig, StudyEncoder, StudyTask

#: Patches of 6 pixels on 48 x 48 images are 64 per camera, more than the 49 patches of 12
#: pixels on the usual 84 x 84, and ResNet-18 costs half as much.
PATCHES = {"patch_size": 6}


def study() -> StudyConfig:
    return StudyConfig(
        "fibottention_vs_dense",
        tasks=[
            StudyTask("Lift-v0", demos=400, cameras=("wrist",), image_size=48),
            StudyTask("Push-v0", demos=400, cameras=("wrist",), image_size=48),
            # While the gripper holds the cube, the wrist camera sees little else.
            StudyTask("Stack-v0", demos=400, image_size=48),
        ],
        encoders=[
            *(
                StudyEncoder(f"{attention}vit_tiny", PATCHES)
                for attention in ("fibottention_", "", "local_", "random_")
            ),
            "resnet18",
        ],
        baseline="vit_tiny",
        seeds=(0, 1, 2),
        steps=1500,
        episodes=100,
        margin=0.05,
        optimizer={"batch_size": 32, "lr": 2e-3},
    )
