"""Writes LeRobot datasets of version 3 with pyarrow and PyAV, without lerobot.

`lerobot.py` describes the layout. The robot's own state becomes the feature
`observation.state`, front_image becomes `observation.images.front`, and any other
vector `observation.<key>`. All numbers are float32, as in LeRobot's own datasets.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from fibopolicy.datasets.conventions import INSTRUCTION, proprioception
from fibopolicy.datasets.importing import (
    Hdf5Reader,
    RecordedEpisode,
    camera_key,
    check_same,
)
from fibopolicy.datasets.lerobot import ACTION, EXTRA, STATE, check_libraries
from fibopolicy.datasets.writer import Blocks
from fibopolicy.envs.registry import from_env_args, is_known
from fibopolicy.errors import UserError
from fibopolicy.utils.files import StrPath, atomic_folder, expanded, wrap_os_error
from fibopolicy.utils.settings import first_difference

_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
_DATA, _EPISODES = f"data/{_FILE}.parquet", f"meta/episodes/{_FILE}.parquet"
_VIDEO = f"videos/{{video_key}}/{_FILE}.mp4"
# LeRobot's limits: files of a chunk, and megabytes after which another file begins
_CHUNK_FILES, _DATA_MB, _VIDEO_MB = 1000, 100, 200
#: Every second frame can be decoded without others, as in LeRobot's own videos.
_H264 = {"crf": "18", "g": "2", "bf": "0", "preset": "veryfast"}
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
#: About the height and width to which frames are thinned out for their statistics.
_STATS_PIXELS = 150
_ROWS = 100  # episodes whose rows are written together

#: `min`, `max`, `mean`, `std`, `count` and quantiles, `(D,)`, of frames `(3, 1, 1)`.
Stats = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: the dataset's folder.
        fps: frames per second.
        sources: the keys that each feature is made of.
        left_out: observations that are not read, each with the reason.
    """

    path: Path
    episodes: int
    steps: int
    fps: float
    sources: Mapping[str, Sequence[str]]
    left_out: Mapping[str, str]


def export_lerobot(
    sources: Sequence[StrPath],
    out: StrPath,
    *,
    fps: float | None = None,
    instruction: str | None = None,
    filter_key: str | None = None,
    cameras: Sequence[str] | None = None,
    images: bool = False,
    mapped: Mapping[str, str] | None = None,
) -> ExportResult:
    """Write demonstrations as a LeRobot dataset, a folder that appears when it is
    complete.

    The task of an episode is its language instruction, else `instruction`, else the
    name in `env_args`. Simulator states are left out.

    Args:
        sources: HDF5 files, or folders of them such as ALOHA's episodes; of several
            tasks, but with the same observations, actions and frequency.
        out: the folder to write; it must not exist.
        fps: control steps a second; by default as the file or its task has it.
        instruction: for demonstrations that have none.
        filter_key: which demonstrations; all by default.
        cameras: which cameras, `()` for none; all by default.
        images: store frames as PNG, without loss, instead of H.264 videos.
        mapped: see `DemoFile`.

    Raises:
        UserError: a source cannot be read, has no frames, or does not tell its
            frequency or task; the sources or their demonstrations differ; `out` exists
            or cannot be written.
    """
    folder = expanded(out)
    check_libraries(folder)
    if not sources:
        raise UserError("export: no file is named; name at least one FILE")
    if fps is not None and not fps > 0:
        raise UserError(f"fps must be positive, got {fps:g}")
    for path in (paths := [expanded(source) for source in sources]):
        if not path.exists() or not Hdf5Reader.accepts(path):
            raise UserError(
                f"{path}: no such file, or a folder without HDF5 files; give the path of"
                " demonstrations"
            )
    readers = [Hdf5Reader(path, mapped or {}, filter_key) for path in paths]
    first, *others = readers
    layout, rate = first.layout(cameras), fps or _control_hz(first)
    for other in others:
        if difference := first_difference(layout, other.layout(cameras)):
            raise UserError(
                f"{other.path}: has other observations than {first.path} ({difference}); export"
                " them one by one, or name --cameras that both have"
            )
        if (found := fps or _control_hz(other)) != rate:
            raise UserError(
                f"{other.path}: has {found:g} steps a second, {first.path} {rate:g}; export them"
                " one by one"
            )
    with (
        atomic_folder(folder) as partial,
        wrap_os_error(folder),
        _DatasetWriter(partial, rate, images) as writer,
        tqdm(total=sum(map(len, readers)), desc="export", unit="demo", disable=None) as bar,
    ):
        for reader in readers:
            for episode in reader.episodes(cameras):
                task = episode.attrs.get(INSTRUCTION) or instruction
                if (task := task or reader.env_args.get("env_name")) is None:
                    raise UserError(
                        f"{episode.name}: names no task; pass --instruction TEXT, what the robot"
                        " does in words"
                    )
                writer.add(episode, str(task))
                bar.update()
        writer.finish(_robot(first))
    left_out = {key: reason for reader in readers for key, reason in reader.left_out.items()}
    return ExportResult(folder, writer.episodes, writer.steps, rate, writer.sources, left_out)


def _control_hz(reader: Hdf5Reader) -> float:
    """Control steps a second, as the file says or as its task has it."""
    if reader.control_hz is not None:
        return reader.control_hz
    if is_known(reader.env_args):
        env = from_env_args(reader.env_args, cameras=())
        try:
            return env.control_hz
        finally:
            env.close()
    raise UserError(
        f"{reader.path}: does not say how many steps it has a second (attribute fps, or"
        " control_freq in env_args); pass --fps"
    )


def _robot(reader: Hdf5Reader) -> str | None:
    """The name of the robot, where the file has it."""
    found = reader.attrs.get("robot_type") or reader.env_args.get("env_kwargs", {}).get("robots")
    names = found if isinstance(found, list) else [found] if found else []
    return "_".join(map(str, names)) or None


class _DatasetWriter:
    """Writes episodes into an empty folder; a context manager.

    Args:
        folder: folder of the dataset.
        fps: frames per second.
        images: whether frames are stored as PNG.

    Attributes:
        episodes, steps: how many were written.
        sources: the keys that each feature is made of.
    """

    def __init__(self, folder: Path, fps: float, images: bool) -> None:
        self._folder, self._fps, self._images = folder, fps, images
        self.episodes = self.steps = 0
        self.sources: dict[str, Sequence[str]] = {}
        self._layout: dict[str, Any] = {}
        self._features: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, int] = {}
        self._stats: dict[str, Stats] = {}
        self._rows: list[dict[str, Any]] = []  # of episodes that are not written yet
        self._data = _ParquetFiles(folder, _DATA, _DATA_MB)
        self._table = _ParquetFiles(folder, _EPISODES, math.inf)
        self._videos: dict[str, _VideoFiles] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Exception):  # after an error, which is reported; `finish` closed the rest
            self._close()

    def _close(self) -> None:
        self._data.close()
        self._table.close()
        for video in self._videos.values():
            video.close()

    def add(self, episode: RecordedEpisode, task: str) -> None:
        """Append an episode."""
        extra = {key: episode.extra[key] for key in EXTRA.values() if key in episode.extra}
        arrays = {**episode.obs, **extra, "actions": episode.actions}
        found = {key: (value.shape[1:], np.dtype(np.float32)) for key, value in arrays.items()}
        self._layout = self._layout or found
        check_same(episode.name, found, self._layout)
        steps = len(episode.actions)
        columns: dict[str, Any] = {}
        place: dict[str, Any] = {}
        stats: dict[str, Stats] = {}
        for key, frames in episode.obs.items():
            if isinstance(frames, Blocks):
                feature = self._camera(key, frames.shape[1:3])
                counts = np.zeros((3, 256), np.int64)
                parts = _counted(frames.parts, counts)
                if self._images:
                    columns[feature] = _png_column(parts)
                else:
                    place |= self._videos[feature].add(parts)
                stats[feature] = _frame_stats(counts, steps)
        for feature, values in self._vectors(episode).items():
            if not np.isfinite(values).all():
                raise UserError(
                    f"{episode.name}: {feature} is not finite everywhere; leave the demonstration"
                    " out with --filter-key"
                )
            columns[feature], stats[feature] = _number_column(values), _stats(values)
        for feature, values in self._indices(steps, task).items():
            columns[feature], stats[feature] = _number_column(values), _stats(values)
        self._rows.append(
            {
                "episode_index": self.episodes,
                "tasks": [task],
                "length": steps,
                **{f"data/{key}": number for key, number in self._data.add(columns).items()},
                "dataset_from_index": self.steps,
                "dataset_to_index": self.steps + steps,
                **place,
                **{
                    f"stats/{feature}/{name}": value.tolist()
                    for feature, values in stats.items()
                    for name, value in values.items()
                },
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self._stats = {
            feature: _merged(self._stats[feature], new) if self.episodes else new
            for feature, new in stats.items()
        }
        self.episodes, self.steps = self.episodes + 1, self.steps + steps
        if len(self._rows) == _ROWS:
            self._write_rows()

    def finish(self, robot: str | None) -> None:
        """Complete the files, and write those that describe the dataset."""
        self._write_rows()
        self._close()
        _write_tasks(self._folder / "meta/tasks.parquet", self._tasks)
        info = {
            "codebase_version": "v3.0",
            "robot_type": robot,
            "total_episodes": self.episodes,
            "total_frames": self.steps,
            "total_tasks": len(self._tasks),
            "chunks_size": _CHUNK_FILES,
            "data_files_size_in_mb": _DATA_MB,
            "video_files_size_in_mb": _VIDEO_MB,
            "fps": int(self._fps) if self._fps == int(self._fps) else self._fps,
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": _DATA,
            "video_path": _VIDEO if self._videos else None,
            "features": self._features,
        }
        stats = {
            feature: {name: value.tolist() for name, value in values.items()}
            for feature, values in self._stats.items()
        }
        for name, document in (("info", info), ("stats", stats)):
            text = json.dumps(document, indent=4, ensure_ascii=False)
            (self._folder / f"meta/{name}.json").write_text(text, encoding="utf-8")

    def _write_rows(self) -> None:
        if self._rows:
            self._table.add({key: [row[key] for row in self._rows] for key in self._rows[0]})
            self._rows.clear()

    # features

    def _camera(self, key: str, size: tuple[int, ...]) -> str:
        """The feature of a camera."""
        name = key.removesuffix("_image")
        feature = f"observation.images.{name if camera_key(name) == key else key}"
        if feature not in self._features:
            video = None if self._images else _VideoFiles(self._folder, feature, size, self._fps)
            self._declare(feature, [key], "image", (*size, 3), ["height", "width", "channels"])
            if video is not None:
                self._videos[feature] = video
                self._features[feature] |= {"dtype": "video", "info": video.info}
        return feature

    def _vectors(self, episode: RecordedEpisode) -> dict[str, NDArray[Any]]:
        """The vectors `(N, D)` of all features but indices and frames."""
        vectors = {k: np.asarray(v) for k, v in episode.obs.items() if not isinstance(v, Blocks)}
        own = proprioception(vectors)
        if own and "state" in vectors:
            raise UserError(
                f"{episode.name}: both {', '.join(own)} and state would become {STATE}; read state"
                " by another name, with --map obs/state=NAME"
            )
        sources = {ACTION: ("actions",), **({STATE: own} if own else {})}
        sources |= {f"observation.{key}": (key,) for key in vectors if key not in own}
        sources |= {feature: (key,) for feature, key in EXTRA.items() if key in episode.extra}
        arrays = {**vectors, **episode.extra, "actions": episode.actions}
        found = {}
        for feature, keys in sources.items():
            parts = [arrays[key].reshape(len(episode.actions), -1) for key in keys]
            found[feature] = np.concatenate(parts, axis=1).astype(np.float32)
            if feature == "next.done":
                found[feature] = found[feature] != 0
            names = [
                f"{key}.{i}"
                for key, part in zip(keys, parts, strict=True)
                for i in range(part.shape[1])
            ]
            dtype = found[feature].dtype.name
            self._declare(feature, keys, dtype, found[feature].shape[1:], names)
        return found

    def _indices(self, steps: int, task: str) -> dict[str, NDArray[Any]]:
        """What places an episode in the dataset, `(N, 1)` each."""
        numbers = np.arange(steps)[:, None]
        task_index = self._tasks.setdefault(task, len(self._tasks))
        found: dict[str, NDArray[Any]] = {
            "timestamp": (numbers / self._fps).astype(np.float32),
            "frame_index": numbers,
            "episode_index": np.full_like(numbers, self.episodes),
            "index": self.steps + numbers,
            "task_index": np.full_like(numbers, task_index),
        }
        for feature, values in found.items():
            self._declare(feature, (), values.dtype.name, (1,), None)
        return found

    def _declare(
        self,
        feature: str,
        keys: Sequence[str],
        dtype: str,
        shape: tuple[int, ...],
        names: list[str] | None,
    ) -> None:
        if feature not in self._features:
            self._features[feature] = {"dtype": dtype, "shape": list(shape), "names": names}
            if keys:
                self.sources[feature] = tuple(keys)


# Tables


class _ParquetFiles:
    """Tables of one schema, several to a file.

    Args:
        folder: folder of the dataset.
        template: template of the files' paths.
        limit: megabytes after which another file begins.
    """

    def __init__(self, folder: Path, template: str, limit: float) -> None:
        self._folder, self._template, self._limit = folder, template, limit
        self._files = 0
        self._path = folder
        self._writer: Any = None

    def add(self, columns: Mapping[str, Any]) -> dict[str, int]:
        """Append rows, and return the numbers of their file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(columns)
        if self._writer is not None and self._path.stat().st_size > self._limit * 2**20:
            self.close()
        if self._writer is None:
            self._files += 1
            self._place = _place(self._files - 1)
            self._path = self._folder / self._template.format(**self._place)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)
        return self._place

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _place(number: int) -> dict[str, int]:
    """LeRobot's two numbers of a file."""
    chunk, file = divmod(number, _CHUNK_FILES)
    return {"chunk_index": chunk, "file_index": file}


def _number_column(values: NDArray[Any]) -> Any:
    """A column of vectors `(N, D)`; of numbers where D is 1."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    width = values.shape[1]
    return flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width)


def _png_column(parts: Iterable[NDArray[np.uint8]]) -> Any:
    """A column of encoded frames."""
    import pyarrow as pa

    rows = []
    for block in parts:
        for pixels in block:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png", compress_level=1)
            rows.append({"bytes": file.getvalue(), "path": None})
    return pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def _write_tasks(path: Path, tasks: Mapping[str, int]) -> None:
    """The table of tasks, which pandas reads with the tasks as index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [("task_index", "int64", "int64"), ("task", "unicode", "object")]
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype}
            | {"metadata": None}
            for name, kind, dtype in columns
        ],
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": list(tasks.values()), "task": list(tasks)})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)


# Videos


class _VideoFiles:
    """The videos of one camera, several episodes to a file.

    Args:
        folder: folder of the dataset.
        feature: feature of the camera.
        size: height and width, pixels.
        fps: frames per second.

    Attributes:
        info: what LeRobot notes of a video.
    """

    def __init__(self, folder: Path, feature: str, size: tuple[int, ...], fps: float) -> None:
        self._folder, self._feature = folder, feature
        self._height, self._width = size
        self._rate = Fraction(fps).limit_denominator(1001)
        # chroma of half the size needs even sizes
        self._format = "yuv420p" if not (self._height % 2 or self._width % 2) else "yuv444p"
        self._files = 0
        self._container: Any = None
        self.info = {
            "video.height": self._height,
            "video.width": self._width,
            "video.codec": "h264",
            "video.pix_fmt": self._format,
            "video.fps": int(fps) if fps == int(fps) else fps,
            "video.channels": 3,
            "is_depth_map": False,
            "has_audio": False,
        }

    def add(self, parts: Iterable[NDArray[np.uint8]]) -> dict[str, float]:
        """Append the frames `(n, H, W, 3)` of an episode, and return where they lie."""
        import av

        try:
            if self._container is not None and self._size > _VIDEO_MB * 2**20:
                self.close()
            if self._container is None:
                self._open()
            start = self._frames
            for block in parts:
                for pixels in block:
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
                    frame.pts, frame.time_base = self._frames, 1 / self._rate
                    self._frames += 1
                    self._write(self._stream.encode(frame))
        except av.FFmpegError as error:
            if isinstance(error, OSError):  # the disk's
                raise
            raise UserError(f"{self._feature}: cannot be encoded ({error})") from error
        span = {"from_timestamp": start / self._rate, "to_timestamp": self._frames / self._rate}
        place = {**_place(self._files - 1), **{key: float(time) for key, time in span.items()}}
        return {f"videos/{self._feature}/{key}": value for key, value in place.items()}

    def _open(self) -> None:
        import av

        self._files += 1
        place = _place(self._files - 1)
        path = self._folder / _VIDEO.format(video_key=self._feature, **place)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), mode="w")
        self._stream = self._container.add_stream("libx264", self._rate, options=_H264)
        self._stream.height, self._stream.width = self._height, self._width
        self._stream.pix_fmt, self._stream.time_base = self._format, 1 / self._rate
        self._frames = self._size = 0

    def _write(self, packets: Iterable[Any]) -> None:
        for packet in packets:
            self._size += packet.size
            self._container.mux(packet)

    def close(self) -> None:
        if self._container is not None:
            container, self._container = self._container, None
            try:
                for packet in self._stream.encode():
                    container.mux(packet)
            finally:
                container.close()


# Statistics


def _counted(
    parts: Iterable[NDArray[np.uint8]], counts: NDArray[np.int64]
) -> Iterator[NDArray[np.uint8]]:
    """The blocks of frames `(n, H, W, 3)`, while their levels are counted in `counts`
    `(3, 256)`.
    """
    for block in parts:
        every = max(1, max(block.shape[1:3]) // _STATS_PIXELS)
        levels = block[:, ::every, ::every].astype(np.int64) + 256 * np.arange(3)
        counts += np.bincount(levels.reshape(-1), minlength=768).reshape(3, 256)
        yield block


def _frame_stats(counts: NDArray[np.int64], frames: int) -> Stats:
    """Statistics of frames whose levels are counted, from 0 to 1."""
    levels = np.arange(256) / 255
    seen, below = counts > 0, np.cumsum(counts, axis=1)  # (3, 256)
    total = below[:, -1:]
    share = counts / total
    mean = share @ levels
    found = {
        "min": levels[seen.argmax(axis=1)],
        "max": levels[255 - seen[:, ::-1].argmax(axis=1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ levels**2 - mean**2, 0)),
        **{name: levels[(below >= q * total).argmax(axis=1)] for name, q in _QUANTILES.items()},
    }
    shaped: Stats = {name: value.reshape(3, 1, 1) for name, value in found.items()}
    return shaped | {"count": np.array([frames])}


def _stats(values: NDArray[Any]) -> Stats:
    """Statistics of vectors `(N, D)`."""
    exact = values.astype(np.float64)
    quantiles = np.quantile(exact, list(_QUANTILES.values()), axis=0)
    return {
        "min": exact.min(axis=0),
        "max": exact.max(axis=0),
        "mean": exact.mean(axis=0),
        "std": exact.std(axis=0),
        **dict(zip(_QUANTILES, quantiles, strict=True)),
        "count": np.array([len(exact)]),
    }


def _merged(one: Stats, other: Stats) -> Stats:
    """Statistics of two sets together; of quantiles the weighted mean, as in LeRobot."""
    total = one["count"] + other["count"]
    share = {"one": one["count"] / total, "other": other["count"] / total}
    merged = {
        name: one[name] * share["one"] + other[name] * share["other"]
        for name in ("mean", *_QUANTILES)
    }
    variance = share["one"] * (one["std"] ** 2 + (one["mean"] - merged["mean"]) ** 2)
    variance = variance + share["other"] * (
        other["std"] ** 2 + (other["mean"] - merged["mean"]) ** 2
    )
    return {
        "min": np.minimum(one["min"], other["min"]),
        "max": np.maximum(one["max"], other["max"]),
        "std": np.sqrt(variance),
        "count": total,
        **merged,
    }
