"""The report as a reader sees it: one file, in a real browser on a phone and on a desk,
and its Markdown.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import WIDTHS, needs_browser, pictures_shown
from made_study import begin, fail, simulate

from fibopolicy.study import report
from fibopolicy.study.records import Study, read_study
from fibopolicy.study.report import answers, write_report
from fibopolicy.study.results import EncoderComparison, results

TASKS = ("fibopolicy/Lift-v0", "fibopolicy/Push-v0", "robosuite/NutAssemblySquare")
ENCODERS = {
    "vit_tiny": 0.0,
    "an_encoder_with_a_long_name_and_no_space_in_it": 0.2,
    "module:function": -2.0,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("page") / "study"
    logits = {task: {name: 1.5 + shift for name, shift in ENCODERS.items()} for task in TASKS}
    simulate(
        directory,
        logits,
        rng=np.random.default_rng(0),
        inits=("scratch", "frozen"),
        seeds=(0, 1),
        episodes=30,
    )
    condition = begin(directory, TASKS[1], "module:function")
    shutil.rmtree(condition / "seed1")
    fail(condition, 1, "UserError: " + "/a/very/long/path/without/any/space" * 4)
    write_report(directory)
    return directory


def test_the_page_needs_no_other_file(study: Path) -> None:
    page = (study / "report" / "report.html").read_text()
    assert not re.findall(r'src="(?!data:)', page)
    assert not re.findall(r'href="(?!data:|#|\.\./|[a-z_]+\.(?:csv|md)")', page)
    assert "prefers-color-scheme: dark" in page
    for link in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{link}"' in page
    for link in re.findall(r'href="(?!data:|#)([^"]+)"', page):
        assert (study / "report" / link).exists(), link


def test_the_markdown_says_the_same_and_its_files_are_there(study: Path) -> None:
    markdown = (study / "report" / "report.md").read_text()
    assert markdown.startswith("# study\n\n- ")
    for link in re.findall(r"\]\(([^)]+)\)", markdown):
        assert (study / "report" / link).exists(), link
    tables = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert len(tables) == 9
    page = (study / "report" / "report.html").read_text()
    for title in re.findall(r"^#+ (.+)$", markdown, flags=re.MULTILINE):
        assert f">{title}</h" in page


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_every_picture_and_never_scrolls_sideways(
    study: Path, tmp_path: Path, width: int
) -> None:
    page = study / "report" / "report.html"
    assert pictures_shown(page, width, tmp_path) == len(list(page.parent.glob("*.svg"))) == 6


def test_films_are_of_pairs_that_differ_kept_while_fresh_and_bounded(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[tuple[str, int]] = []

    def record(_: Study, one: EncoderComparison, path: Path, episodes: int, size: int) -> None:
        assert size == 320
        recorded.append((one.candidate, episodes))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"film")

    monkeypatch.setattr(report, "write_pair_video", record)
    monkeypatch.setattr(report, "MAX_VIDEOS", 3)
    page = write_report(study, videos=True, video_size=320).read_text()
    assert len(recorded) == 3
    assert all(0 < episodes <= report.VIDEO_EPISODES for _, episodes in recorded)
    assert page.count("<video") == 3
    assert "Only 3 pairs are filmed" in page
    assert write_report(study, videos=True).read_text().count("<video") == 3
    assert len(recorded) == 3  # they are still those of the rows
    (study / "report" / "videos").rename(study / "elsewhere")
    assert "Side by side" not in write_report(study).read_text()


def test_the_page_says_why_a_film_is_missing(study: Path) -> None:
    page = write_report(study, videos=True).read_text()
    assert "could not be filmed" in page
    assert "init_states: holds no file with the initial states of Lift" in page


def test_many_comparisons_are_counted_in_the_first_lines(tmp_path: Path) -> None:
    logits = {TASKS[0]: {"dense": 9.0, "fib": 9.0, "local": -9.0}}
    policies = tuple(f"policy{i}" for i in range(5))
    directory = simulate(
        tmp_path / "many",
        logits,
        rng=np.random.default_rng(0),
        policies=policies,
        seeds=(0,),
        curves=False,
    )
    (_, fib), (_, local) = answers(results(read_study(directory)))
    single = " Caveat: single checkpoints; the variation between training seeds is unknown."
    assert (
        fib
        == f"fib against dense: **not inferior** (margin 5 points) in 5 of 5 conditions.{single}"
    )
    assert local.startswith(
        "local against dense: **inferior** (by more than 5 points) in 5 of 5 conditions (Lift"
        " policy0 scratch, Lift policy1"
    )
    assert local.endswith(single)
    markdown = write_report(directory).parent.joinpath("report.md").read_text()
    assert "by one training seed, with 95 % Wilson intervals" in markdown
    assert "two-level bootstrap" not in markdown


def test_what_is_better_is_named_where_comparisons_are_counted(tmp_path: Path) -> None:
    logits = {TASKS[0]: {"dense": 0.0, "fib": 9.0}}
    policies = tuple(f"policy{i}" for i in range(9))
    directory = simulate(
        tmp_path / "many",
        logits,
        rng=np.random.default_rng(0),
        policies=policies,
        seeds=(0,),
        curves=False,
    )
    ((_, fib),) = answers(results(read_study(directory)))
    assert " in 9 of 9 conditions, better in 9 of these." in fib
