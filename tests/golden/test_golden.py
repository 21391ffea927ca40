"""Seeded computations give the results of `record.json`; see `record.py`."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Any

import pytest
import record


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(record.RECORD.read_text())


@pytest.mark.parametrize("part", record.PARTS)
def test_results_equal_the_record(part: str, recorded: dict[str, Any]) -> None:
    # find_spec instead of an import, which would choose OpenGL too early
    if "robosuite" in part and importlib.util.find_spec("robosuite") is None:
        pytest.skip("robosuite is not installed")
    exact = recorded["machine"] == record.machine() or bool(
        os.environ.get("FIBOPOLICY_GOLDEN_EXACT")
    )
    assert not record.differences(part, recorded[part], record.compute(part), exact=exact)


def test_the_comparison_reports_only_differences_beyond_its_tolerance(
    recorded: dict[str, Any],
) -> None:
    def changed(part: str, change: Any) -> Any:
        copy = json.loads(json.dumps(recorded[part]))
        change(copy)
        return copy

    def seen(part: str, change: Any) -> tuple[bool, bool]:
        """Whether a change is reported on the record's machine, and on another one."""
        found = changed(part, change)
        return bool(record.differences(part, recorded[part], found, exact=True)), bool(
            record.differences(part, recorded[part], found, exact=False)
        )

    def scale_last_loss(factor: float) -> Any:
        return lambda losses: losses["diffusion, vit_tiny"].append(
            losses["diffusion, vit_tiny"].pop() * factor
        )

    assert seen("losses", lambda losses: None) == (False, False)
    assert seen("losses", scale_last_loss(1 + 1e-6)) == (True, False)
    assert seen("losses", scale_last_loss(1 + 1e-3)) == (True, True)
    assert seen("losses", lambda losses: losses["bc, vit_tiny"].pop()) == (True, True)
    assert seen("losses", lambda losses: losses.pop("bc, vit_tiny")) == (True, True)
    assert seen("masks", lambda masks: masks.update(local=masks["random"])) == (True, True)
    assert seen("statistics", lambda found: found["mean difference"].update(p=0.5)) == (True, True)
    assert seen("rollouts, reach", lambda rows: rows[0].__setitem__(1, rows[0][1] + 1)) == (
        True,
        False,
    )
    assert seen("rollouts, reach", lambda rows: [row.__setitem__(0, True) for row in rows]) == (
        True,
        True,
    )
    assert seen("rollouts, reach", lambda rows: rows.pop()) == (True, True)
