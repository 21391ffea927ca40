"""Reads LeRobot datasets of version 3 with pyarrow and PyAV, without lerobot.

The layout, with several episodes in each data and video file:

    meta/info.json                                fps, features, path templates
    meta/episodes/chunk-000/file-000.parquet      one row an episode: where it lies
    data/chunk-000/file-000.parquet               one row a step: vectors, stored images
    videos/<camera>/chunk-000/file-000.mp4        frames at multiples of 1 / fps
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.datasets.conventions import INSTRUCTION, PROPRIOCEPTION
from fibopolicy.datasets.conversions import Conversion, find_conversion
from fibopolicy.datasets.importing import (
    EpisodeReader,
    RecordedEpisode,
    camera_key,
    choose_cameras,
)
from fibopolicy.datasets.writer import Blocks
from fibopolicy.errors import UserError, unknown
from fibopolicy.utils.hub import parse_hub_name, wrap_hub_errors

_BLOCK = 32  # frames decoded at a time
ACTION, STATE = "action", "observation.state"
#: Features of a step -> a demo's array.
EXTRA = {"next.reward": "rewards", "next.done": "dones"}
#: Features that only place a step in the dataset.
_INDICES = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def check_libraries(path: Path) -> None:
    """Raise `UserError` unless pyarrow and PyAV are installed."""
    try:
        import av  # noqa: F401
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{path}: LeRobot datasets need pyarrow and PyAV ({error}); install them:"
            " pip install 'fibopolicy[lerobot]'"
        ) from error


class LeRobotReader(EpisodeReader):
    """A local LeRobot dataset.

    Keys get this library's names: observation.images.front becomes front_image,
    observation.state robot_state.
    """

    def __init__(self, path: Path, mapped: Mapping[str, str]) -> None:
        super().__init__(path, mapped)
        check_libraries(path)
        self.info = self._read_info()
        self.fps = float(self.info["fps"])
        self.attrs = {"fps": self.fps, "lerobot_version": str(self.info["codebase_version"])}
        if robot := self.info.get("robot_type"):
            self.attrs["robot_type"] = str(robot)
        self.cameras: dict[str, str] = {}  # our key -> feature
        self.vectors: dict[str, tuple[str, slice]] = {}  # our key -> feature, its columns
        self.keys: dict[str, str] = {}  # our key -> feature, of both
        if missing := [feature for feature in mapped if feature not in self.info["features"]]:
            error = unknown("feature", missing[0], self.info["features"])
            raise UserError(f"{path}: --map: {error}")
        for feature, spec in self.info["features"].items():
            self._sort(feature, spec)
        if ACTION not in self.info["features"] and "actions" not in mapped.values():
            raise UserError(f"{path}: has no feature {ACTION}; name it with --map FEATURE=actions")
        self.rows = self._read_episodes()
        self._table: tuple[Path | None, Any] = (None, None)

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return (path / "meta" / "info.json").is_file()

    def __len__(self) -> int:
        return len(self.rows)

    def _read_info(self) -> dict[str, Any]:
        file = self.path / "meta" / "info.json"
        try:
            info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            version, _ = str(info["codebase_version"]), (info["fps"], info["features"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: is not LeRobot's ({error!r}); download it again") from error
        if not version.startswith("v3."):
            raise UserError(
                f"{self.path}: is a LeRobot dataset of version {version}, expected v3; convert it"
                " with lerobot's script convert_dataset_v21_to_v30"
            )
        return info

    def _sort(self, feature: str, spec: Mapping[str, Any]) -> None:
        """Note how a feature is read, or why it is not."""
        kind, shape = spec["dtype"], tuple(spec["shape"])
        facts = spec.get("info") or {}
        name = feature.removeprefix("observation.").replace(".", "_")
        if feature in (ACTION, *_INDICES, *EXTRA) or self.mapped.get(feature) == "actions":
            return
        if not feature.startswith("observation.") and feature not in self.mapped:
            self.left_out[feature] = "not an observation; read it with --map FEATURE=KEY"
        elif kind in ("video", "image"):
            if facts.get("is_depth_map") or facts.get("video.is_depth_map"):
                self.left_out[feature] = "depth"
            else:
                key = camera_key(feature.rpartition(".")[2])
                key = self.mapped.get(feature) or (camera_key(name) if key in self.keys else key)
                self._check_new(key, feature)
                self.cameras[key] = feature
        elif len(shape) == 1 and np.dtype(kind if kind != "string" else "S").kind in "biuf":
            key = self.mapped.get(feature) or ("robot_state" if feature == STATE else name)
            parts = {} if feature in self.mapped or feature != STATE else _parts(spec)
            for part, columns in (parts or {key: slice(None)}).items():
                self._check_new(part, feature)
                self.vectors[part] = feature, columns
        else:
            self.left_out[feature] = f"{kind} {shape}; vectors must be numbers (D,)"

    def _check_new(self, key: str, feature: str) -> None:
        """Raise `UserError` if another feature has the key."""
        if key in self.keys:
            raise UserError(
                f"{self.path}: {feature} and {self.keys[key]} would both become {key}; name one"
                f" otherwise with --map {feature}=KEY"
            )
        self.keys[key] = feature

    def _read_episodes(self) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        files = sorted((self.path / "meta" / "episodes").rglob("*.parquet"))
        rows: list[dict[str, Any]] = []
        for file in files:
            schema = pq.read_schema(file)
            names = [name for name in schema.names if not name.startswith("stats/")]
            rows += pq.read_table(file, columns=names).to_pylist()
        if not rows:
            raise UserError(
                f"{self.path}: has no episodes in meta/episodes; download the whole dataset"
            )
        if len(rows) < (total := self.info.get("total_episodes", 0)):
            raise UserError(
                f"{self.path}: describes {len(rows)} of {total} episodes in meta/episodes;"
                " download the whole dataset"
            )
        return sorted(rows, key=lambda row: row["episode_index"])

    def episodes(self, cameras: Sequence[str] | None) -> Iterator[RecordedEpisode]:
        chosen = choose_cameras(self.path, cameras, self.cameras)
        videos: dict[str, VideoFrames] = {}
        for row in self.rows:
            yield self._episode(row, chosen, videos)
        for video in videos.values():
            video.close()

    def _episode(
        self, row: dict[str, Any], cameras: Mapping[str, str], videos: dict[str, VideoFrames]
    ) -> RecordedEpisode:
        number, steps = int(row["episode_index"]), int(row["length"])
        name = f"{self.path}: episode {number}"
        table = self._steps(row)
        if len(table) != steps:
            raise UserError(f"{name}: holds {len(table)} steps of {steps}; download it again")
        obs: dict[str, Blocks | NDArray[Any]] = {}
        for key, feature in cameras.items():
            if self.info["features"][feature]["dtype"] == "image":
                obs[key] = _stored_images(f"{name}: {feature}", table[feature])
            else:
                path = self._file(row, f"videos/{feature}/", video_key=feature)
                start = round(row[f"videos/{feature}/from_timestamp"] * self.fps)
                video = videos.get(key)
                if video is None or video.path != path or start < video.position:
                    if video is not None:
                        video.close()
                    video = videos[key] = VideoFrames(path, self.fps)
                obs[key] = video.blocks(start, steps)
        obs |= {
            key: _vectors(table[feature])[:, columns]
            for key, (feature, columns) in self.vectors.items()
        }
        actions = next((f for f, key in self.mapped.items() if key == "actions"), ACTION)
        extra = {
            key: _vectors(table[feature])[:, 0]
            for feature, key in EXTRA.items()
            if feature in self.info["features"]
        }
        episode = RecordedEpisode(name, obs, _vectors(table[actions]), extra)
        if row.get("tasks"):
            episode.attrs[INSTRUCTION] = "; ".join(row["tasks"])
        return episode

    def _file(self, row: Mapping[str, Any], prefix: str, **names: str) -> Path:
        """The data or video file of an episode."""
        template = str(self.info["video_path" if names else "data_path"])
        path = self.path / template.format(
            **names,
            chunk_index=row[f"{prefix}chunk_index"],
            file_index=row[f"{prefix}file_index"],
        )
        if not path.is_file():
            advice = f", or leave out {names['video_key']} with --cameras" if names else ""
            raise UserError(f"{path}: no such file; download the whole dataset{advice}")
        return path

    def _steps(self, row: Mapping[str, Any]) -> Any:
        """The table of an episode's steps."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        path = self._file(row, "data/")
        if self._table[0] != path:
            self._table = path, pq.read_table(path)
        table = self._table[1]
        return table.filter(pc.equal(table["episode_index"], row["episode_index"]))


def _parts(spec: Mapping[str, Any]) -> dict[str, slice]:
    """The keys of the vectors that `export` joined into a state, with their columns."""
    names = spec.get("names")
    keys = [str(name).rpartition(".")[0] for name in names] if isinstance(names, list) else []
    if not set(keys) <= set(PROPRIOCEPTION):
        return {}
    starts = {key: keys.index(key) for key in keys}
    return {key: slice(start, start + keys.count(key)) for key, start in starts.items()}


def _vectors(column: Any) -> NDArray[Any]:
    """A column of lists or numbers as `(N, D)`."""
    values: NDArray[Any] = np.stack(column.to_numpy())
    return values[:, None] if values.ndim == 1 else values


def _stored_images(name: str, column: Any) -> Blocks:
    """A column of encoded images."""
    rows = np.empty(len(column), object)
    rows[:] = [item["bytes"].as_py() for item in column]
    conversion = find_conversion((), rows.dtype, lambda: rows[:1])
    if not isinstance(conversion, Conversion):
        raise UserError(f"{name}: {conversion}")
    shape, dtype = conversion.layout(rows.shape, rows.dtype)
    parts = (conversion(rows[start : start + _BLOCK]) for start in range(0, len(rows), _BLOCK))
    return Blocks(shape, dtype, parts)


@contextmanager
def hub_dataset(
    name: str, cameras: Sequence[str] | None, mapped: Mapping[str, str]
) -> Iterator[LeRobotReader]:
    """A dataset on the Hub, OWNER/NAME or OWNER/NAME@REVISION, with the videos of some
    cameras; all for `None`. Its files are kept in the Hub's cache. Errors name the
    repository.
    """
    from huggingface_hub import snapshot_download

    repository, revision = parse_hub_name(name)

    def fetch(revision: str | None, *patterns: str) -> Path:
        with wrap_hub_errors(name):
            found = snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=patterns,
                library_name="fibopolicy",
            )
        return Path(found)

    folder = fetch(revision, "meta/*")
    try:
        if not LeRobotReader.accepts(folder):
            raise UserError(f"{folder}: is no LeRobot dataset, it has no meta/info.json")
        reader = LeRobotReader(folder, mapped)
        reader.origin = f"hub:{repository}@{folder.name}"
        chosen = choose_cameras(folder, cameras, reader.cameras).values()
        fetch(folder.name, "meta/*", "data/*", *(f"videos/{feature}/*" for feature in chosen))
        yield reader
    except UserError as error:
        raise UserError(str(error).replace(str(folder), f"hub:{name}")) from error


class VideoFrames:
    """Decodes a video from its beginning to its end.

    Args:
        path: the file.
        fps: frame k is shown at k / fps seconds.

    Attributes:
        position: the frame after the last that was decoded.
    """

    def __init__(self, path: Path, fps: float) -> None:
        import av

        self.path, self._fps, self.position = path, fps, 0
        try:
            self._container = av.open(str(path))
            stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise UserError(f"{path}: is not a video ({error}); download it again") from error
        stream.thread_type = "AUTO"
        self._size = stream.height, stream.width
        self._frames = self._decode()

    def close(self) -> None:
        self._container.close()

    def blocks(self, start: int, steps: int) -> Blocks:
        """Frames `start` to `start + steps`, to be taken in the order of the file. A
        part is valid until the next.
        """
        return Blocks((steps, *self._size, 3), np.dtype(np.uint8), self._parts(start, steps))

    def _parts(self, start: int, steps: int) -> Iterator[NDArray[np.uint8]]:
        frames = np.empty((_BLOCK, *self._size, 3), np.uint8)
        for first in range(start, start + steps, _BLOCK):
            count = min(_BLOCK, start + steps - first)
            for i in range(count):
                frames[i] = self._frame(first + i)
            yield frames[:count]

    def _frame(self, place: int) -> NDArray[np.uint8]:
        for found, frame in self._frames:
            self.position = found + 1
            if found == place:
                return np.asarray(frame.to_ndarray(format="rgb24"))
            if found > place:
                break
        raise UserError(
            f"{self.path}: has no frame at {place / self._fps:.3f} s; download it again"
        )

    def _decode(self) -> Iterator[tuple[int, Any]]:
        import av

        try:
            for frame in self._container.decode(video=0):
                yield round((frame.time or 0.0) * self._fps), frame
        except av.FFmpegError as error:
            raise UserError(
                f"{self.path}: cannot be decoded ({error}); download it again"
            ) from error
