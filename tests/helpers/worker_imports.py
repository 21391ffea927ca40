"""What simulators import, for the process that they are forked from in tests. It loads no
torch, and makes no OpenGL context.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util

import fibopolicy.datasets
import fibopolicy.envs.tabletop.lift
import fibopolicy.evaluation.simulator  # noqa: F401
from fibopolicy.envs.rendering import configure_gl

configure_gl()
for name in ("mujoco", "OpenGL.GL", "robosuite"):
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)
gc.freeze()  # or every worker would collect garbage among what was imported
