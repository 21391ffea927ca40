"""Wrong input for every command: every kind of wrong file, folder, number and option is
a one-line error with exit code 2.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import TINY_ENCODER_OPTIONS, call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_rows import make_run
from PIL import Image

from fibopolicy.training import OptimizerConfig, TrainConfig, train

STUDY = """
from fibopolicy.study import StudyConfig, StudyTask

def study():
    return StudyConfig("tiny", tasks=[StudyTask("reach", demos=3)], encoders=["vit_tiny"])
"""

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

TINY = [
    "--steps",
    "1",
    *TINY_ENCODER_OPTIONS,
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def place(
    lift_file: Path, tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a valid file, a run, two evaluated runs, and every kind of wrong
    file and folder.
    """
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copyfile(lift_file, folder / "good.hdf5")
    shutil.copyfile(lift_file, folder / "two words \u00fc $x.hdf5")
    shutil.copyfile(lift_file, folder / "unreadable.hdf5")
    (folder / "unreadable.hdf5").chmod(0)
    train(
        replace(
            tiny_config,
            out=folder / "run",
            optimizer=OptimizerConfig(steps=1, batch_size=4, warmup_steps=0),
        )
    )
    make_run(folder / "a", [True, False, True, True])
    make_run(folder / "b", [True, False, False, True])
    (folder / "empty.hdf5").touch()
    (folder / "empty").mkdir()
    (folder / "x.json").write_text(json.dumps({"a": 1}))
    np.savez(folder / "x.npz", a=np.zeros(3))
    Image.new("RGB", (4, 4)).save(folder / "x.png")
    (folder / "wrong.py").write_text("study = 3\n")
    (folder / "study.py").write_text(STUDY)
    (folder / "readonly").mkdir(mode=0o555)
    return folder


@contextmanager
def another_user() -> Iterator[None]:
    """Run as another user if the tests run as root, who may read and write everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


#: Every command that reads. FILE stands for its input and OUT for a new path.
READING = [
    "inspect FILE",
    "split FILE --out OUT.hdf5",
    "replay FILE",
    "render FILE --out OUT.hdf5",
    "generate FILE --demos 1 --out OUT.hdf5",
    "train --dataset FILE --out OUT",
    "train --dataset good.hdf5 --out OUT --encoder-weights FILE",
    "init-states FILE --episodes 1 --out OUT.npz",
    "evaluate FILE --episodes 1",
    "results FILE",
    "upload FILE me/lift --licence mit",
    "compare FILE b",
    "compare --group one=FILE --group two=b",
    "study run FILE --out OUT",
    "study status FILE",
    "study report FILE",
    "study publish FILE --out OUT",
    "robomimic train --config FILE --out OUT",
    "robomimic export FILE --out OUT.pth",
    "profile data --dataset FILE --turns 1",
    "profile train --dataset FILE --turns 1",
    "collect FILE --episodes 1 --out OUT.hdf5",
]
WRONG = [
    "nowhere",
    "nowhere/at all.hdf5",
    "empty",
    "empty.hdf5",
    "x.json",
    "x.npz",
    "x.png",
    "",
    "~nobody-of-this-name/x",
    "x" * 300,
]
WRONG += ["x.json/below.hdf5", "/dev/null", "wrong.py", "n\udcffl.hdf5"]


def check_one_line_error(code: int, err: str, words: list[str]) -> None:
    lines = [line for line in err.splitlines() if not line.startswith("fibopolicy: warning: ")]
    assert code == 2, (words, err)
    assert len(lines) == 1, (words, err)
    assert lines[0].startswith("fibopolicy: error: "), (words, err)


def check_error(code: int, err: str, words: list[str]) -> None:
    """The error is ours, or tyro's, which prints a box."""
    if err.startswith("fibopolicy: "):
        check_one_line_error(code, err, words)
        return
    assert code == 2, (words, err)
    assert "-----" in err.splitlines()[1], (words, err)  # the rule below tyro's title
    assert "Traceback" not in err, (words, err)


def split_words(line: str, **values: str) -> list[str]:
    """The words of a line, with names replaced by their values."""
    words = line.split()
    for name, value in values.items():
        words = [word.replace(name, value) for word in words]
    return words


@pytest.mark.parametrize("line", READING)
def test_a_wrong_input_is_a_one_line_error(
    line: str, monkeypatch: Patch, capsys: Capture, place: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(place)
    for wrong in WRONG:
        words = split_words(line, FILE=wrong, OUT=str(tmp_path / "out"))
        code, _, err = call(monkeypatch, capsys, *words)
        check_one_line_error(code, err, words)
        assert not list(tmp_path.iterdir()), (words, "files were left behind")


@pytest.mark.parametrize("command", ["inspect", "split", "replay", "train --dataset"])
def test_a_file_of_another_user_is_a_one_line_error(
    command: str, monkeypatch: Patch, capsys: Capture, place: Path
) -> None:
    monkeypatch.chdir(place)
    words = [
        *command.split(),
        "unreadable.hdf5",
        *(["--out", "new"] if command.startswith(("split", "train")) else []),
    ]
    with another_user():
        code, _, err = call(monkeypatch, capsys, *words)
    check_one_line_error(code, err, words)


#: Every command that writes and checks its output at once. OUT stands for the output.
WRITING = [
    "collect Lift-v0 --episodes 1 --out OUT",
    "split good.hdf5 --out OUT",
    "render good.hdf5 --out OUT",
    "init-states Lift-v0 --episodes 1 --out OUT",
    "results a --out OUT",
    "compare a b --out OUT",
    "plot-pattern --tokens 16 --out OUT",
    "train --dataset good.hdf5 --out OUT",
]
#: The input itself, a path below a file, and a folder.
NO_OUTPUT = ["good.hdf5", "x.json/below", "empty"]


@pytest.mark.parametrize("line", WRITING)
def test_an_unwritable_output_is_a_one_line_error(
    line: str, monkeypatch: Patch, capsys: Capture, place: Path
) -> None:
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    for out in NO_OUTPUT:
        if line.startswith("train") and out == "empty":
            continue  # an empty folder is a valid run directory
        words = split_words(line, OUT=out)
        code, _, err = call(
            monkeypatch, capsys, *words, *(TINY if line.startswith("train") else [])
        )
        check_one_line_error(code, err, words)
    with another_user():
        words = split_words(line, OUT="readonly/new")
        code, _, err = call(
            monkeypatch, capsys, *words, *(TINY if line.startswith("train") else [])
        )
    check_one_line_error(code, err, words)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


#: Options with numeric values, on lines that are otherwise valid. None of them starts a
#: simulator or a training.
NUMBERS = {
    "collect Lift-v0 --out new --episodes 1": ["--episodes", "--image-size", "--workers", "--seed"],
    "split good.hdf5 --out new": ["--valid-fraction", "--seed"],
    "render good.hdf5 --out new": ["--image-size", "--workers"],
    "replay good.hdf5": ["--workers"],
    "generate good.hdf5 --out new": ["--demos"],
    "evaluate run": [
        "--episodes",
        "--init-seed",
        "--video",
        "--workers",
        "--batch-size",
        "--threads",
        "--max-retries",
        "--step-timeout",
    ],
    "init-states Lift-v0 --out new --episodes 1": ["--episodes", "--seed", "--image-size"],
    "compare a b --out new.html": ["--margin", "--video", "--effect-sizes"],
    "plot-pattern --out new.png": ["--tokens", "--heads", "--layer"],
    "quickstart --out new": ["--demos", "--steps", "--episodes", "--seed"],
    "profile data --dataset good.hdf5": ["--turns", "--batch-size", "--dataset-weights"],
    "train --out new --dataset good.hdf5": [
        *(
            "--steps",
            "--batch-size",
            "--lr",
            "--warmup-steps",
            "--weight-decay",
            "--encoder-lr-scale",
            "--grad-clip-norm",
            "--ema",
        ),
        *(
            "--accumulate",
            "--seed",
            "--checkpoint-every",
            "--log-every",
            "--n-obs-steps",
            "--horizon",
            "--n-action-steps",
            "--hidden",
        ),
        *(
            "--validate-every",
            "--keep-best",
            "--rollout-every",
            "--rollout-episodes",
            "--rollout-workers",
            "--crop",
        ),
    ],
}


@pytest.mark.parametrize("line", NUMBERS)
def test_a_negative_or_malformed_number_is_rejected(
    line: str, monkeypatch: Patch, capsys: Capture, place: Path
) -> None:
    monkeypatch.chdir(place)
    others = itertools.cycle(("-inf", "", "x", "1,5"))
    for option in NUMBERS[line]:
        for value in ("-1", "nan", next(others)):
            words = [*line.split(), option, value]
            code, _, err = call(monkeypatch, capsys, *words)
            check_error(code, err, words)


@pytest.mark.parametrize(
    "line",
    [
        "train --dataset good.hdf5 --out new --resume --overwrite",
        "collect Lift-v0 --episodes 1 --out new --resume --overwrite",
        "render good.hdf5 --out new --resume --overwrite",
        "evaluate run --resume --overwrite",
        "split good.hdf5 --out good.hdf5 --overwrite",
        "replay good.hdf5 --out good.hdf5 --overwrite",
        "results a --out a/episodes.jsonl --overwrite",
        "compare a a",
        "compare a empty/../a",
        "compare a b --video 2",
        "compare a b --video 2 --out new.mp4",
        "compare a b --effect-sizes 0",
        "replay good.hdf5 --video new.gif",
        "profile attention --out new.png",
        "profile attention --out x.txt",
        "train --dataset good.hdf5 --out new --n-obs-steps 100000000000000000000",
        "train --dataset good.hdf5 --out new --hidden 100000000000000000000",
        "train --dataset good.hdf5 --out new --batch-size 100000000000000000000",
        "train --dataset good.hdf5 --out new --encoder-options depth 100000000000000000000",
        (
            "train --dataset good.hdf5 --out new --policy bc_gmm --policy-options num_modes"
            " 100000000000000000000"
        ),
        "evaluate run --threads 100000000000000000000",
        "plot-pattern --tokens 100000000000000000000",
        "init-states Lift-v0 --episodes 100000000000000000000 --out new",
    ],
)
def test_conflicts_and_huge_numbers_are_one_line_errors(
    line: str, monkeypatch: Patch, capsys: Capture, place: Path
) -> None:
    monkeypatch.chdir(place)
    code, _, err = call(monkeypatch, capsys, *line.split())
    check_one_line_error(code, err, line.split())


def test_a_good_file_with_a_difficult_name_is_read(
    monkeypatch: Patch, capsys: Capture, place: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(place)
    name = "two words \u00fc $x.hdf5"
    assert call(monkeypatch, capsys, "inspect", name)[0] == 0
    assert call(monkeypatch, capsys, "split", name, "--out", str(tmp_path / "a b.hdf5"))[0] == 0
    assert (
        call(
            monkeypatch, capsys, "train", "--dataset", name, "--out", str(tmp_path / "a run"), *TINY
        )[0]
        == 0
    )


def test_a_lack_of_memory_is_not_an_internal_error(
    monkeypatch: Patch, capsys: Capture, place: Path
) -> None:
    monkeypatch.chdir(place)

    def full(*_: object, **__: object) -> str:
        raise MemoryError("Unable to allocate 3 GiB")

    monkeypatch.setattr("fibopolicy.datasets.inspect", full)
    code, _, err = call(monkeypatch, capsys, "inspect", "good.hdf5")
    check_one_line_error(code, err, ["inspect"])
    assert "not enough memory" in err


GOOD = "good.hdf5"
FILES = st.sampled_from(
    [GOOD, GOOD, GOOD, "two words \u00fc $x.hdf5", "empty.hdf5", "nowhere", "run", "x.npz", "", "."]
)
RUNS = st.sampled_from(["a", "b", "a", "b", "a", "b", "run", "nowhere", GOOD, "."])
FLAGS = {"--overwrite", "--resume", "--modified"}
VALUES = st.one_of(
    st.integers(-3, 40).map(str),
    st.floats(width=32).map(str),
    st.sampled_from(
        [
            "",
            "train",
            "valid",
            "all",
            "ema",
            "model",
            "fast",
            "full",
            "bc",
            "flow",
            "None",
            "wrist_image",
            "--",
            "-x",
        ]
    ),
    st.text(st.characters(exclude_characters="\0"), max_size=4),
)
#: Command -> its words, where FILE and RUN are drawn, and the options to draw with
#: values.
GENERATED: dict[str, tuple[list[str], list[str]]] = {
    "inspect": (["FILE"], ["--debugg"]),
    "split": (["FILE", "--out", "OUT"], ["--valid-fraction", "--seed", "--overwrite"]),
    "train": (
        ["--dataset", "FILE", "--out", "OUT", *TINY],
        [
            *(
                "--seed",
                "--batch-size",
                "--lr",
                "--cameras",
                "--vectors",
                "--filter-key",
                "--checkpoint",
                "--precision",
            ),
            *(
                "--n-action-steps",
                "--crop",
                "--shift",
                "--rotation",
                "--validate-on",
                "--keep-best",
                "--resume",
                "--warmup-steps",
                "--ema",
            ),
        ],
    ),
    "results": (["RUN"], ["--out"]),
    "compare": (
        ["RUN", "RUN"],
        [
            "--margin",
            "--effect-sizes",
            "--step",
            "--checkpoint",
            "--init-seed",
            "--max-steps",
            "--group",
        ],
    ),
    "init-states": (
        ["nowhere.hdf5", "--episodes", "1", "--out", "OUT"],
        ["--seed", "--image-size", "--quality", "--cameras"],
    ),
    "evaluate": (
        ["nowhere"],
        [
            "--episodes",
            "--init-seed",
            "--checkpoint",
            "--video",
            "--workers",
            "--step-timeout",
            "--max-steps",
        ],
    ),
    "plot-pattern": (["--tokens", "9", "--out", "OUT.png"], ["--heads", "--layer", "--modified"]),
}


@st.composite
def command_lines(draw: Callable[..., str]) -> list[str]:
    command = draw(st.sampled_from(sorted(GENERATED)))
    words, options = GENERATED[command]
    line = [
        *command.split(),
        *(
            draw({"FILE": FILES, "RUN": RUNS}[word]) if word in ("FILE", "RUN") else word
            for word in words
        ),
    ]
    for option in draw(st.lists(st.sampled_from(options), max_size=2)):  # type: ignore[attr-defined]
        line += [option, *([] if option in FLAGS else [draw(VALUES)])]
    return line


@pytest.mark.slow
def test_no_random_command_line_ends_in_an_internal_error(
    monkeypatch: Patch, capsys: Capture, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    codes = []

    @settings(
        max_examples=75,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines())
    def run(line: list[str]) -> None:
        here = tmp_path_factory.mktemp("generated")
        for name in (
            "good.hdf5",
            "two words \u00fc $x.hdf5",
            "empty.hdf5",
            "run",
            "a",
            "b",
            "x.npz",
        ):
            (here / name).symlink_to(place / name)
        with monkeypatch.context() as patch:
            patch.chdir(here)
            code, _, err = call(patch, capsys, *[word.replace("OUT", "out") for word in line])
        assert code in (0, 2), (line, err)
        assert "Traceback" not in err
        codes.append(code)
        shutil.rmtree(here)

    run()
    assert codes.count(0) >= 8  # some of the lines are valid


#: A library of an extra, a command that needs it, and the name of the extra.
EXTRAS = [
    ("diffusers", "train --dataset good.hdf5 --out OUT --policy diffusion", "diffusion"),
    ("timm", "train --dataset good.hdf5 --out OUT --encoder timm:resnet18", "timm"),
    ("robomimic", "train --dataset good.hdf5 --out OUT --policy bc_gmm", "robomimic"),
    ("robosuite", "collect robosuite/Lift --episodes 1 --out OUT", "robosuite"),
    ("metaworld", "collect metaworld/reach --episodes 1 --out OUT", "metaworld"),
    ("ray", "study run study.py --out OUT --ray auto", "ray"),
    ("wandb", "train --dataset good.hdf5 --out OUT --wandb project", "wandb"),
]


@pytest.mark.parametrize(("library", "line", "extra"), EXTRAS)
def test_a_missing_extra_is_named_with_a_command_to_install_it(
    library: str,
    line: str,
    extra: str,
    monkeypatch: Patch,
    capsys: Capture,
    place: Path,
    tmp_path: Path,
) -> None:
    for name in [
        name
        for name in sys.modules
        if name.split(".")[0] == library or name == "fibopolicy.robomimic.encoder_core"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(place)
    words = split_words(line, OUT=str(tmp_path / "out"))
    code, _, err = call(
        monkeypatch, capsys, *words, *(TINY[:2] if line.startswith("train") else [])
    )
    check_one_line_error(code, err, words)
    assert f"pip install 'fibopolicy[{extra}]'" in err
