"""What the encoder does for robustness: six encoders on three built-in tasks and robosuite's
Lift, evaluated clean and with eight perturbations at three levels, on the same initial
states.

    fibopolicy study run scripts/studies/robustness.py --out runs/robustness

The same command resumes the study. EfficientNet-Lite is fine-tuned from ImageNet; the
others are trained from scratch.

Cost on CPUs, estimated from processor time. Training: a gradient step takes 0.1 s with a
ViT, 0.4 s with ResNet-18 and 0.2 s with EfficientNet-Lite, twice that with two cameras; 72
runs of 1500 steps take 7 core-hours. Evaluation: an episode that fails takes 0.2 to 0.4 s
on Lift and 1.8 s on robosuite's; 90,000 episodes take at most 20 core-hours. Together about
27 core-hours, 14 hours on 2 free cores.
"""

from __future__ import annotations

from fibopolicy.study import StudyConfig, StudyEncoder, StudyTask

#: 64 patches per camera of 48 x 48 pixels.
PATCHES = {"patch_size": 6}


def study() -> StudyConfig:
    return StudyConfig(
        "robustness",
        tasks=[
            StudyTask("Lift-v0", cameras=("wrist",), image_size=48),
            StudyTask("Push-v0", cameras=("wrist",), image_size=48),
            # While the gripper holds the cube, the wrist camera sees little else.
            StudyTask("Stack-v0", image_size=48),
            # Scripted demonstrations take about 60 control steps.
            StudyTask("robosuite/Lift", demos=200, image_size=48, max_steps=120),
        ],
        encoders=[
            *(
                StudyEncoder(f"{attention}vit_tiny", PATCHES)
                for attention in ("fibottention_", "", "local_", "random_")
            ),
            "resnet18",
            StudyEncoder("efficientnet_lite0", {"pretrained": True}, init="finetune"),
        ],
        baseline="vit_tiny",
        seeds=(0, 1, 2),
        steps=1500,
        episodes=50,
        margin=0.05,
        optimizer={"batch_size": 32, "lr": 2e-3},
        tuned_for="vit_tiny",
        perturbations=[
            "camera-position",
            "camera-rotation",
            "light-color",
            "light-direction",
            "table-texture",
            "distractors",
            "noise",
            "occlusion",
        ],
    )
