"""Fibottention against dense attention, its density-matched controls and ResNet-18, on three built-in tasks.

fibopolicy study run scripts/studies/fibottention_vs_dense.py --out runs/studies/fibottention_vs_dense

Prints how long it will take before it starts; the same command goes on where it was stopped.
"""

from __future__ import annotations

from fibopolicy.study import StudyConfig, StudyTask


def study() -> StudyConfig:
    return StudyConfig(
        "fibottention_vs_dense",
        tasks=[StudyTask(task, demos=400) for task in ("Lift-v0", "Push-v0", "Stack-v0")],
        encoders=["fibottention_vit_tiny", "vit_tiny", "local_vit_tiny", "random_vit_tiny", "resnet18"],
        control="vit_tiny",
        seeds=(0, 1, 2),
        steps=1000,
        episodes=100,
        margin=0.05,
        optimizer={"batch_size": 32},
    )
