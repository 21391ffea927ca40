"""Seeds for episodes, apart by purpose: what is evaluated is never what was trained on."""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np


def episode_seed(purpose: Literal["collect", "evaluate", "expand"], seed: int, index: int) -> int:
    """The seed of episode `index`, a 32-bit integer; streams of different purposes or
    seeds do not overlap by design.
    """
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), seed, index])
    return int(sequence.generate_state(1)[0])
