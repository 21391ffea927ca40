"""Generated files of many layouts: each is cut into windows as it is stored, or
rejected in one line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fibopolicy.datasets import DemoFile, Mixture, inspect
from fibopolicy.datasets.conventions import is_unit
from fibopolicy.errors import UserError
from fibopolicy.training import TrainConfig
from fibopolicy.training.data import left_out, open_dataset, shapes_of

KEYS = (
    "agentview_image",
    "images/front",
    "agentview_rgb",
    "a/b/c",
    "robot0_eef_pos",
    "state/joint_pos",
    "ee_pos",
    "depth",
    "joint states",
)
SHAPES = ((6, 5, 3), (3, 6, 5), (6, 5, 4), (6, 5, 1), (6, 5), (3,), (7,), (0,), ())
DTYPES = ("uint8", "float32", "float64", "int64", "bool", "S4", "float16")
TASKS = (
    None,
    "",
    "null",
    "[]",
    "{}",
    '{"env_name": null}',
    '{"env_name": 3}',
    '{"env_name": "RealKitchen", "type": 4, "env_kwargs": null}',
    (
        '{"env_name": "Lift", "type": 1, "env_kwargs": {"controller_configs": {"type": "OSC_POSE",'
        ' "control_delta": false}}}'
    ),
    (
        '{"env_name": "Lift", "type": 1, "env_kwargs": {"controller_configs": ["BASIC", null,'
        ' {"body_parts": {"right": 3}}]}}'
    ),
    '{"env_name": "Lift", "type": 1, "env_kwargs": {"controller_configs": "OSC_POSE"}}',
    '{"env_name": "Coffee_D0", "type": 1, "env_kwargs": []}',
    '{"env_name": "fibopolicy/Lift-v0", "type": 2}',
)
RANGES = (0.5, 1.0, 1.2, 3.14, 255.0, np.inf, np.nan)


def mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([usual] * 3 * len(others) + list(others))


NAMES = ("demo_0", "demo_1", "demo_12", "episode_3", "demo0", "traj", "7")
LAYOUTS = st.fixed_dictionaries(
    {
        "names": st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
        "task": st.one_of(
            st.sampled_from(TASKS),
            st.sampled_from([task for task in TASKS if task is None or "Lift" in task]),
        ),
        "info": mostly(None, "{}", '{"env_name": "Lift", "robots": "Panda"}'),
        "obs": st.dictionaries(
            st.sampled_from(KEYS),
            st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)),
            max_size=3,
        ),
        "good": mostly(True, False),
        "actions": mostly((4,), (0,), (), (2, 2)),
        "action_dtype": mostly("float64", "float32", "int64"),
        "bound": st.sampled_from(RANGES),
        "slips": st.booleans(),
        "short": mostly(None, "obs", "states", "num_samples"),
        "mask": st.sampled_from((None, "train", "absent")),
        "steps": mostly(4, 1, 0),
        "extra": mostly(None, "text", "matrix", "group", "empty"),
    }
)


def write(path: Path, layout: dict[str, Any]) -> None:
    random, steps = np.random.default_rng(0), layout["steps"]
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for name, text in (("env_args", layout["task"]), ("env_info", layout["info"])):
            if text is not None:
                data.attrs[name] = text
        for name in layout["names"]:
            demo = data.create_group(name)
            demo.attrs["num_samples"] = steps + (layout["short"] == "num_samples")
            actions = random.uniform(-1, 1, (steps, *layout["actions"]))
            if actions.size:
                actions.flat[: 1 if layout["slips"] else None] *= layout["bound"]
            demo["actions"] = actions.astype(layout["action_dtype"])
            demo["states"] = np.zeros((steps + (layout["short"] == "states"), 3))
            if layout["good"]:
                demo["obs/wrist_image"] = random.integers(0, 256, (steps, 6, 5, 3), dtype=np.uint8)
                demo["obs/robot1_eef_pos"] = random.normal(size=(steps, 3))
            for key, (shape, dtype) in layout["obs"].items():
                values = 100 * random.uniform(size=(steps + (layout["short"] == "obs"), *shape))
                demo[f"obs/{key}"] = values.astype(dtype)
            extras = {"text": "pick the cup", "matrix": np.eye(3), "empty": h5py.Empty("f")}
            if layout["extra"] in extras:
                demo["instruction"] = extras[layout["extra"]]
            elif layout["extra"] == "group":
                demo["camera/left/intrinsics"] = np.eye(3)
        if layout["mask"] is not None:
            file[f"mask/{layout['mask']}"] = np.array(
                [layout["names"][0] if layout["mask"] == "train" else "nobody"], dtype="S"
            )


@pytest.fixture(autouse=True)
def no_check_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are not corrupt, and the check takes half a second each;
    `test_structure` tests it.
    """
    monkeypatch.setattr("fibopolicy.datasets.structure._check", lambda *_: None)


@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(layout=LAYOUTS)
def test_a_random_file_is_read_as_stored_or_rejected_in_one_line(
    tmp_path: Path, layout: dict[str, Any]
) -> None:
    path = tmp_path / "file.hdf5"
    write(path, layout)
    outcomes = []
    for use in (inspect, lambda path: open_dataset(TrainConfig(path, tmp_path / "run"))):
        try:
            outcomes.append(use(path))
        except UserError as error:  # anything else is a fault
            outcomes.append(error)
    if refusals := [str(outcome) for outcome in outcomes if isinstance(outcome, UserError)]:
        assert all(text.startswith(f"{path}: ") and "\n" not in text for text in refusals)
    if isinstance(dataset := outcomes[1], UserError):
        return
    assert not isinstance(dataset, Mixture)
    shapes = shapes_of(dataset)
    batch = dataset.batch(np.arange(len(dataset)))
    with DemoFile(path) as file:
        for key, values in batch["obs"].items():
            stored = np.concatenate([file.read(demo, f"obs/{key}") for demo in dataset.demos])
            np.testing.assert_array_equal(values[:, -1], stored.astype(values.dtype))
        actions = np.concatenate([file.read(demo, "actions") for demo in dataset.demos]).astype(
            np.float32
        )
        executed = np.clip(actions, -1, 1) if is_unit(file.env_args) else actions
        np.testing.assert_array_equal(batch["actions"][:, 0], executed)
        changed = np.abs(executed - actions).max() > 1e-6
        assert changed == any("clipped" in warning for warning in dataset.warnings)
        assert shapes.absolute or np.abs(executed).max() <= 1 + 1e-6
        unread = set(file.obs) - {*dataset.cameras, *dataset.vectors}
    named = left_out(dataset)
    assert len(unread) > 8 or all(any(key in line for line in named) for key in unread)
    json.dumps(dataset.env_args)
