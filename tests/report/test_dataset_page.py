from __future__ import annotations

import re
from pathlib import Path

import h5py
import pytest

from fibopolicy.cli.data import Inspect
from fibopolicy.report.dataset import write_dataset_page


@pytest.fixture
def recording(lift_file: Path, tmp_path: Path) -> Path:
    """A copy of the demonstrations without frames."""
    path = tmp_path / "lift <copy>.hdf5"
    path.write_bytes(lift_file.read_bytes())
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            for key in ("workspace_image", "wrist_image"):
                del demo[f"obs/{key}"], demo[f"next_obs/{key}"]
    return path


def test_the_page_shows_videos_scores_and_the_formula_and_needs_no_other_file(
    lift_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "lift.html"
    Inspect(lift_file, out=page).run()
    assert f"page    {page}" in capsys.readouterr().out
    html = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert html.count("data:video/mp4;base64,") == 2  # the worst, and others
    assert html.count("data:image/svg+xml;base64,") == 4
    assert "<b>11 of 11</b> succeed" in html
    assert "largest step of any dimension over the file" in html
    assert len(re.findall(r'data-name="demo">demo_\d+<', html)) == 8 + 11
    assert page.stat().st_size < 2e6


def test_a_file_without_frames_is_drawn_from_its_states(recording: Path, tmp_path: Path) -> None:
    page = tmp_path / "states.html"
    write_dataset_page(recording, page)
    assert page.read_text().count("data:video/mp4;base64,") == 2
    assert "lift &lt;copy&gt;.hdf5: 11 demonstrations" in page.read_text()


def test_a_first_recording_has_a_page(lift_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.hdf5"
    path.write_bytes(lift_file.read_bytes())
    with h5py.File(path, "r+") as file:
        for demo in list(file["data"])[1:]:
            del file["data"][demo]
        file.pop("mask", None)
    page = tmp_path / "one.html"
    write_dataset_page(path, page)
    html = page.read_text()
    assert html.count("data:video/mp4;base64,") == 1
    assert "1 demonstration</title>" in html


def test_a_video_that_cannot_be_made_leaves_a_page_that_says_so(
    recording: Path, tmp_path: Path
) -> None:
    with h5py.File(recording, "r+") as file:
        for demo in file["data"].values():
            del demo["states"]
        file["data/demo_3/actions"][0, 0] = float("nan")
        del file["data/demo_4/rewards"]
    page = tmp_path / "plain.html"
    write_dataset_page(recording, page)
    html = page.read_text()
    assert "No video: the file holds neither frames nor states" in html
    assert "demo_3 is not scored: actions hold values that are not finite" in html
    assert re.search('>demo_4</td>.*?data-name="success">-<', html, re.DOTALL)
    assert "data:video" not in html
