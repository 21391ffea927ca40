from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from demo_files import CAMERAS, VECTORS, demo
from robomimic_rollout import sequence_dataset

from fibopolicy.datasets import DemoFile, split

if importlib.util.find_spec("robomimic") is None:
    pytest.skip(
        "robomimic is not installed; install fibopolicy[robomimic]", allow_module_level=True
    )


@pytest.mark.parametrize("cache_mode", [None, "low_dim", "all"])
def test_robomimic_s_sequence_dataset_agrees_item_by_item(
    path: Path, cache_mode: str | None
) -> None:
    from fibopolicy.utils.imports import make_torchvision_importable

    make_torchvision_importable()
    import robomimic.utils.obs_utils as obs_utils

    obs_utils.initialize_obs_utils_with_obs_specs(
        {"obs": {"rgb": list(CAMERAS), "low_dim": list(VECTORS)}}
    )
    dataset = sequence_dataset(
        path,
        obs_keys=(*CAMERAS, *VECTORS),
        dataset_keys=("actions", "rewards", "dones"),
        frame_stack=2,
        seq_length=3,
        hdf5_cache_mode=cache_mode,
        filter_by_attribute="train",
        load_next_obs=True,
    )
    assert len(dataset) == 5 + 3
    sample = 0
    for seed, steps in enumerate((5, 3)):
        arrays = demo(steps, seed)
        for t in range(steps):
            item = dataset[sample]
            window = np.clip(np.arange(t - 1, t + 3), 0, steps - 1)
            for key in (*CAMERAS, *VECTORS):
                np.testing.assert_array_equal(item["obs"][key], arrays["obs"][key][window])
                np.testing.assert_array_equal(
                    item["next_obs"][key], arrays["next_obs"][key][window]
                )
            np.testing.assert_allclose(item["actions"], arrays["actions"][window], rtol=1e-6)
            np.testing.assert_array_equal(item["dones"].squeeze(), arrays["dones"][window])
            sample += 1


def test_robomimic_s_dataset_report_accepts_the_file(path: Path) -> None:
    spec = importlib.util.find_spec("robomimic")
    assert spec is not None
    assert spec.origin is not None
    script = Path(spec.origin).parent / "scripts" / "get_dataset_info.py"
    done = subprocess.run(
        [sys.executable, str(script), "--dataset", str(path)],
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr
    assert "total transitions: 15" in done.stdout
    assert "filter key train with 2 demos" in done.stdout
    assert "observation key wrist_image with shape (5, 8, 6, 3)" in done.stdout


def test_filter_keys_work_in_both_directions_between_us_and_robomimic(
    path: Path, tmp_path: Path
) -> None:
    from fibopolicy.utils.imports import make_torchvision_importable

    make_torchvision_importable()
    import robomimic.utils.file_utils as file_utils
    import robomimic.utils.obs_utils as obs_utils

    out = tmp_path / "split.hdf5"
    made = split(path, out, valid_fraction=0.4, subsets={"half": 0.5})
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": list(VECTORS)}})
    for key, demos in made.items():
        dataset = sequence_dataset(
            out, VECTORS, ("actions",), hdf5_cache_mode=None, filter_by_attribute=key
        )
        assert sorted(dataset.demos) == sorted(demos)
        with DemoFile(out) as file:
            assert len(dataset) == sum(map(file.length, file.select(key)))
        dataset.close_and_delete_hdf5_handle()
    file_utils.create_hdf5_filter_key(str(out), ["demo_2", "demo_0"], "theirs")
    with DemoFile(out) as file:
        assert file.select("theirs") == ("demo_0", "demo_2")
