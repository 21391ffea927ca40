"""Draws every perturbation at every level, for the guide on robustness.

    python scripts/docs/perturbations.py Lift-v0 docs/images/perturbations_lift.jpg

The picture shows the first initial state of seed 0 as a policy sees it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fibopolicy.envs import make
from fibopolicy.envs.base import episode_seed
from fibopolicy.envs.perturbations import (
    LEVELS,
    PERTURBATIONS,
    Perturbation,
    PerturbedEnv,
    unsupported_reason,
)

#: Pixels: side of a frame, height of a line of text, gap.
SIDE, TEXT, GAP = 112, 18, 6
BLOCKS = 3  # of perturbations side by side


def strip(task: str, camera: str | None = None) -> Image.Image:
    """Every perturbation that a task can have: the clean frame and one for each level."""
    with PerturbedEnv(
        make(task, image_size=SIDE, **({"cameras": (camera,)} if camera else {}))
    ) as env:
        env.reset(seed=episode_seed("evaluate", 0, 0))
        state = env.get_state()
        key = next(key for key in env.observe() if key.endswith("_image"))
        names = [
            name
            for name, kind in PERTURBATIONS.items()
            if not unsupported_reason(env, name)
            and name not in ("proprioception-noise", "action-delay")
        ]
        rows = -(-len(names) // BLOCKS)
        width, height = (len(LEVELS) + 1) * (SIDE + 1) + 2 * GAP, SIDE + TEXT + GAP
        picture = Image.new("RGB", (BLOCKS * width, rows * height), "white")
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
        for i, name in enumerate(names):
            x, y = i // rows * width + GAP, i % rows * height
            draw.text((x, y + TEXT / 2), f"{name}: clean, 1, 2, 3", "black", font, "lm")
            frames = [env.set_state(state)[key]]
            for level in LEVELS:
                env.set_state(state)
                frames.append(env.perturb(Perturbation(name, level), 0)[key])
            for column, frame in enumerate(frames):
                picture.paste(
                    Image.fromarray(np.asarray(frame)), (x + column * (SIDE + 1), y + TEXT)
                )
    return picture


if __name__ == "__main__":
    task, out, *camera = sys.argv[1:]
    strip(task, *camera).save(Path(out), quality=85)
