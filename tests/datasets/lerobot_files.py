"""A small LeRobot dataset of version 3, written without lerobot."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FPS = 10
TEMPLATE = "chunk-{chunk_index:03d}/file-{file_index:03d}"


def shade(episode: int, step: int) -> int:
    """The brightness of a frame, which tells episode and step through the codec's loss."""
    return 20 + (50 * episode + 9 * step) % 220


def frame(episode: int, step: int, size: tuple[int, int] = (48, 64)) -> NDArray[np.uint8]:
    return np.full((*size, 3), shade(episode, step), np.uint8)


def write_video(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "2", "crf": "10"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, FPS)
        for step, pixels in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts, picture.time_base = step, Fraction(1, FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_lerobot(folder: Path, files: Sequence[Sequence[int]] = ((5, 3), (4,))) -> Path:
    """Write episodes of these lengths, several to a data and video file, with two cameras:
    one in videos, one in stored images.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    episodes: list[dict[str, Any]] = []
    index = 0
    for number, lengths in enumerate(files):
        rows: list[dict[str, Any]] = []
        frames: list[NDArray[np.uint8]] = []
        place = {"chunk_index": 0, "file_index": number}
        for steps in lengths:
            episode = len(episodes)
            begin = len(frames)
            for step in range(steps):
                png = io.BytesIO()
                Image.fromarray(frame(episode, step, (12, 16))).save(png, "png")
                rows.append(
                    {
                        "action": random.normal(size=6).astype(np.float32),
                        "observation.state": random.normal(size=6).astype(np.float32),
                        "observation.images.wrist": {"bytes": png.getvalue(), "path": None},
                        "next.reward": np.float32(step == steps - 1),
                        "timestamp": np.float32(step / FPS),
                        "frame_index": step,
                        "episode_index": episode,
                        "index": index,
                        "task_index": 0,
                    }
                )
                frames.append(frame(episode, step))
                index += 1
            video = "videos/observation.images.front"
            episodes.append(
                {
                    "episode_index": episode,
                    "tasks": [f"do task {episode}"],
                    "length": steps,
                    **{f"data/{key}": value for key, value in place.items()},
                    **{f"{video}/{key}": value for key, value in place.items()},
                    f"{video}/from_timestamp": begin / FPS,
                    f"{video}/to_timestamp": len(frames) / FPS,
                    "stats/action/min": [0.0],
                }
            )
        name = TEMPLATE.format(**place)
        data = folder / f"data/{name}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        pq.write_table(pa.table(columns), data)
        write_video(folder / f"{video}/{name}.mp4", frames)
    meta = folder / "meta/episodes/chunk-000/file-000.parquet"
    meta.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(episodes), meta)
    vector = {"dtype": "float32", "shape": [6], "names": None}
    number = {"dtype": "int64", "shape": [1], "names": None}
    info = {
        "codebase_version": "v3.0",
        "robot_type": "so100",
        "fps": FPS,
        "data_path": f"data/{TEMPLATE}.parquet",
        "video_path": "videos/{video_key}/" + TEMPLATE + ".mp4",
        "features": {
            "action": vector,
            "observation.state": vector,
            "observation.images.front": {"dtype": "video", "shape": [48, 64, 3]},
            "observation.images.wrist": {"dtype": "image", "shape": [12, 16, 3]},
            "next.reward": {"dtype": "float32", "shape": [1]},
            "timestamp": {"dtype": "float32", "shape": [1]},
            **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), number),
        },
    }
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder
