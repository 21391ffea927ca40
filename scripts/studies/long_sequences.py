"""Sparse attention on long sequences: two cameras in one sequence of 648 tokens.

    fibopolicy study run scripts/studies/long_sequences.py --out runs/long_sequences

It measures success and training throughput with Fibottention and dense attention. The
same command resumes the study, also after another encoder, such as "local_vit_tiny",
has been added here.
"""

from __future__ import annotations

from fibopolicy.study import StudyConfig, StudyEncoder, StudyTask

#: Patches of 4 pixels on 72 x 72 images are 18 x 18 per camera.
FINE = {"patch_size": 4}


def study() -> StudyConfig:
    return StudyConfig(
        "long_sequences",
        tasks=[StudyTask("Lift-v0", demos=400, image_size=72)],
        encoders=[
            StudyEncoder(f"{attention}vit_tiny", FINE) for attention in ("fibottention_", "")
        ],
        baseline="vit_tiny",
        seeds=(0, 1, 2),
        steps=1000,
        episodes=100,
        margin=0.05,
        policy_config={"views": "joint"},
        optimizer={"batch_size": 16, "lr": 2e-3},
    )
