from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from fibopolicy.errors import UserError
from fibopolicy.report.video import FAILURE, RUNNING, SUCCESS, Clip, video_frames, write_video


def clip(length: int, success: bool | None = True, size: tuple[int, int] = (40, 40)) -> Clip:
    return Clip(np.full((length, *size, 3), 90, np.uint8), success, "demo_0")


def test_a_clip_is_marked_as_success_or_failure_when_it_ends() -> None:
    frames = list(video_frames([clip(2), clip(4, False), clip(3, None)], fps=1, columns=3))
    assert len(frames) == 4 + 1
    border = lambda t, column: tuple(frames[t][-1, 44 * column])  # noqa: E731
    assert [border(t, 0) for t in range(4)] == [RUNNING, SUCCESS, SUCCESS, SUCCESS]
    assert [border(t, 1) for t in range(4)] == [RUNNING, RUNNING, RUNNING, FAILURE]
    assert [border(t, 2) for t in range(4)] == [RUNNING] * 4


def test_columns_carry_headings(tmp_path: Path) -> None:
    headings = ["left", "a/very/long/name/of/a/run"]
    path = tmp_path / "two.mp4"
    write_video(path, [clip(2), clip(2)], fps=2, columns=2, headings=headings)
    frames = iio.imread(path)
    assert frames.shape[1:] == (24 + 12 + 40 + 2, 2 * 44, 3)
    assert frames[0, :24].min() < 128 < frames[0, :24].mean()


@pytest.mark.parametrize("size", [(97, 51), (256, 256)])
def test_a_film_of_any_size_is_neither_stretched_nor_cut(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    height, width = size
    frames = np.zeros((3, *size, 3), np.uint8)
    frames[:, height // 2 :, width // 2 :] = 255
    path = tmp_path / "odd.mp4"
    write_video(path, [Clip(frames, True)], fps=5)
    shown = iio.imread(path)[0].mean(axis=-1)
    expected = next(iter(video_frames([Clip(frames, True)], fps=5))).mean(axis=-1)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < 3


def test_without_ffmpeg_one_line_says_so_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="IMAGEIO_FFMPEG_EXE") as caught:
        write_video(tmp_path / "video.mp4", [clip(2)], fps=5)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
