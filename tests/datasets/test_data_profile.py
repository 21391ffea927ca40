from __future__ import annotations

from pathlib import Path

import pytest
from demo_files import CAMERAS, VECTORS, write

from fibopolicy.datasets import FrameCache, Mixture, WindowDataset
from fibopolicy.datasets.profile import data_table, profile_data


def test_the_parts_of_a_batch_add_up_and_no_files_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    gather = FrameCache.gather
    dataset = WindowDataset(
        write(tmp_path / "demos.hdf5"),
        cameras=CAMERAS,
        vectors=VECTORS,
        horizon=2,
        cache_dir=tmp_path / "cache",
    )
    profile = profile_data(Mixture([dataset, dataset], (1, 1)), batch_size=4, turns=20)
    parts = {part.name: part.seconds for part in profile.parts}
    assert list(parts) == [
        "choosing samples",
        "frames of agentview_image",
        "frames of wrist_image",
        "vectors and actions",
        "batch",
    ]
    # medians do not add up exactly
    assert sum(parts.values()) - parts["batch"] == pytest.approx(parts["batch"], rel=0.5)
    assert profile.batch_bytes == 4 * (2 * 8 * 6 * 3 + 3 * 4 + 2 * 4 * 4 + 2)
    assert profile.cache_bytes == 2 * 15 * 2 * 8 * 6 * 3
    assert "samples/s" in data_table(profile)
    assert FrameCache.gather is gather
    assert not list((tmp_path / "home/fibopolicy").iterdir())
