"""How success grows with demonstrations, with and without ImageNet weights: the built-in
Push and Stack with 25, 100 and 400 demonstrations, a study for each number.

    fibopolicy study run scripts/studies/pretrained.py:demos_25 --out runs/pretrained_25
    fibopolicy study run scripts/studies/pretrained.py:demos_100 --out runs/pretrained_100
    fibopolicy study run scripts/studies/pretrained.py --out runs/pretrained

The same commands resume the studies. The 25 demonstrations are the first of the 100, and
those the first of the 400. EfficientNet-Lite is trained from scratch, fine-tuned and
frozen; no package carries ImageNet weights of a ViT, so both ViTs are trained from scratch.
Weights from ImageNet want lower learning rates than others, so every encoder gets the same
search.

Cost on CPUs, estimated from processor time (a gradient step 0.04 s with a frozen encoder,
0.1 s with a ViT and 0.2 s with EfficientNet-Lite, twice that with two cameras; an episode
at most 0.2 to 0.8 s): for each number of demonstrations 2.3 core-hours for 30 runs of 1500
steps, 1.2 for 30 trials of 750 steps, 0.5 for their 3600 episodes. Together 12 core-hours, 6
hours on 2 free cores.
"""

from __future__ import annotations

from fibopolicy.study import StudyConfig, StudyEncoder, StudySearch, StudyTask

#: 64 patches per camera of 48 x 48 pixels.
PATCHES = {"patch_size": 6}
IMAGENET = {"pretrained": True}


def study(demos: int = 400, name: str = "pretrained") -> StudyConfig:
    return StudyConfig(
        name,
        tasks=[
            StudyTask("Push-v0", demos=demos, cameras=("wrist",), image_size=48),
            # While the gripper holds the cube, the wrist camera sees little else.
            StudyTask("Stack-v0", demos=demos, image_size=48),
        ],
        encoders=[
            StudyEncoder("vit_tiny", PATCHES),
            StudyEncoder("fibottention_vit_tiny", PATCHES),
            StudyEncoder("efficientnet_lite0"),
            StudyEncoder("efficientnet_lite0", IMAGENET, name="finetuned", init="finetune"),
            StudyEncoder("efficientnet_lite0", IMAGENET, name="frozen", init="frozen"),
        ],
        baseline="vit_tiny",
        seeds=(0, 1, 2),
        steps=1500,
        episodes=100,
        margin=0.05,
        optimizer={"batch_size": 32},
        search=StudySearch(
            [{"lr": 2e-3}, {"lr": 5e-4}, {"lr": 2e-3, "encoder_lr_scale": 0.1}],
            rungs=((0.5, 20),),
        ),
    )


def demos_25() -> StudyConfig:
    return study(25, "pretrained_25")


def demos_100() -> StudyConfig:
    return study(100, "pretrained_100")
