"""A trained policy on disk: `config.json` beside weights in safetensors. Nothing in it
is executed on loading.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fibopolicy.errors import UserError, unknown
from fibopolicy.policies.base import Policy, PolicyConfig, Shapes, build_policy
from fibopolicy.utils.files import StrPath, expanded
from fibopolicy.utils.registry import Registry
from fibopolicy.utils.system import resolve_device

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
EMA_WEIGHTS = "ema.safetensors"
#: Folder of checkpoints that a validation liked best.
BEST = "best"


@dataclass(frozen=True)
class Loaded:
    """A policy from a run directory, in evaluation mode; `env_args` are of the task
    that it was trained on.
    """

    policy: Policy
    step: int
    total_steps: int
    env_args: dict[str, Any]


#: Makes a run directory for a checkpoint file of another library, by the file's suffix.
IMPORTERS = Registry[Callable[[Path], Path]](
    "checkpoint", {".pth": "fibopolicy.robomimic.checkpoint:import_checkpoint"}
)
#: Loads the policy of such a run directory from the directory, the contents of its
#: `config.json` and a device, by the section that `config.json` has in addition.
LOADERS = Registry[Callable[[Path, dict[str, Any], str], Loaded]](
    "imported checkpoint", {"robomimic": "fibopolicy.robomimic.checkpoint:load_imported"}
)


def open_run(path: StrPath) -> Path:
    """Run directory of a policy: `path` itself, or the one that belongs to a checkpoint
    file of another library.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    path = expanded(path)
    if path.is_dir() or path.suffix not in IMPORTERS:
        return path
    return IMPORTERS[path.suffix](path)


def read_config(run: Path) -> dict[str, Any]:
    """The contents of a run's `config.json`."""
    path = run / CONFIG
    if not path.is_file():
        raise UserError(
            f"{run}: is no run directory, it has no {CONFIG}; name the --out of a training"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("no JSON object")
        for section in ("policy", "shapes", "train", "env_args"):
            if not isinstance(document.get(section), dict):
                raise ValueError(f"section {section!r} is missing")
        PolicyConfig(**document["policy"])
        _shapes(document["shapes"])
        int(document["train"]["optimizer"]["steps"])
    except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
        raise UserError(
            f"{path}: is not a run's configuration ({' '.join(str(error).split())})"
        ) from error
    return document


def load_policy(run: StrPath, *, weights: str = "ema", device: str = "cpu") -> Loaded:
    """Load the last checkpoint of a run; the result's `policy` acts.

    Args:
        weights: "ema", the moving average, or "model"; "best/step_<steps>" for one that
            a validation liked. An imported checkpoint has one set of weights.

    Raises:
        UserError: no run, no checkpoint yet, or weights that do not fit the
            configuration.
    """
    run = expanded(run)
    document = read_config(run)
    for section in LOADERS.names():
        if section in document:
            return LOADERS[section](run, document, device)
    files = {"ema": run / EMA_WEIGHTS, "model": run / WEIGHTS}
    files |= {
        f"{BEST}/{path.stem}": path for path in sorted((run / BEST).glob("step_*.safetensors"))
    }
    if weights not in files:
        raise unknown("weights", weights, files)
    path = files[weights]
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint has been written yet")
    policy = build_policy(
        PolicyConfig(**document["policy"]).as_loaded(), _shapes(document["shapes"])
    )
    try:
        with safe_open(path, framework="pt") as file:
            step = int((file.metadata() or {})["step"])
            policy.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: does not fit {CONFIG} ({reason})") from error
    policy.render_quality = render_quality(document["env_args"])
    policy.to(resolve_device(device)).eval()
    return Loaded(policy, step, int(document["train"]["optimizer"]["steps"]), document["env_args"])


def render_quality(env_args: Mapping[str, Any]) -> str | None:
    """The quality of a dataset's frames, "fast" or "full"; `None` where its `env_args`
    do not say.
    """
    quality = env_args.get("render_quality") or (env_args.get("env_kwargs") or {}).get("quality")
    return None if quality is None else str(quality)


def _shapes(document: dict[str, Any]) -> Shapes:
    images = {k: (v[0], v[1]) for k, v in document["images"].items()}
    rotations = tuple(document.get("rotations", ()))
    return Shapes(
        images,
        document["vectors"],
        document["action_dim"],
        document.get("absolute", False),
        rotations,
    )


def suffix(weights: str) -> str:
    """Of the names of pages, pictures and videos: empty for the last checkpoint, which
    is a run's result.
    """
    return f"_{weights.replace('/', '_')}" if "/" in weights else ""
