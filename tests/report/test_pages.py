"""The pages of a run and of a comparison, on a phone and on a desk."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import WIDTHS, needs_browser, pictures_shown
from made_rows import make_run

from fibopolicy.cli.evaluate import Compare
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.evaluate import evaluate_run
from fibopolicy.report.run import write_run_page
from fibopolicy.training import TrainConfig
from fibopolicy.training.trainer import train


@pytest.fixture(scope="module")
def comparison_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    for name, rate in (
        ("a_method_with_a_long_name_and_no_space_in_it" + "/which_is_a_path" * 4, 0.5),
        ("fib", 0.8),
        ("third", 0.7),
    ):
        for seed in range(2):
            make_run(folder / f"{name}_{seed}", rng.random(40) < rate, policy=f"{name}{seed}")
    runs = sorted(path.parent for path in folder.rglob("*_0/episodes.jsonl"))
    groups = tuple(f"{str(run.relative_to(folder))[:-2]}={str(run)[:-1]}*" for run in runs)
    out = folder / "comparison.html"
    Compare(group=groups, margin=0.1, out=out).run()
    return out


def test_the_comparison_page_needs_no_other_file(comparison_page: Path) -> None:
    page = comparison_page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for text in ("Differences", "Success against time", "Episodes needed", "p (Holm)"):
        assert text in page


@pytest.fixture(scope="module")
def run_page(tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(replace(tiny_config, out=run))
    return write_run_page(
        run, evaluate_run(EvaluateConfig(run, episodes=2, video=2, max_steps=8, workers=1))
    )


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["comparison_page", "run_page"])
def test_a_browser_shows_every_picture_and_never_scrolls_sideways(
    which: str, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert pictures_shown(request.getfixturevalue(which), width, tmp_path) == 2


def test_a_video_needs_a_page_and_replaces_nothing_by_default(
    comparison_page: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--out PAGE"):
        Compare((tmp_path, tmp_path), video=2).run()
    with pytest.raises(UserError, match="exists already"):
        Compare((tmp_path, tmp_path), out=comparison_page).run()
