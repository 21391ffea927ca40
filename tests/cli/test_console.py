"""Output does not depend on the terminal, the locale or the process that reads it."""

from __future__ import annotations

import ast
import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
from command import TINY_ENCODER_OPTIONS
from made_rows import make_run

from fibopolicy import cli
from fibopolicy.errors import UserError, quoted
from fibopolicy.evaluation.episodes import Selector
from fibopolicy.utils import processes
from fibopolicy.utils.files import expanded

ROOT = Path(__file__).parents[2]
#: Starts the command as `python -m fibopolicy` does.
COMMAND = [sys.executable, "-m", "fibopolicy"]


def text_files_opened(source: str) -> Iterator[ast.Call]:
    """Calls that read or write text with the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(
            keyword.arg == "encoding" for keyword in node.keywords
        ):
            continue
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        text_mode = name == "open" and any(
            word in ("r", "w", "a", "x", "r+", "w+", "a+") for word in words
        )
        decoded = any(keyword.arg in ("text", "universal_newlines") for keyword in node.keywords)
        bare = isinstance(node.func, ast.Name) and name == "open" and len(node.args) == 1
        if name in ("read_text", "write_text", "FileHandler") or text_mode or decoded or bare:
            yield node


def test_every_text_file_names_its_encoding() -> None:
    folders = ("fibopolicy", "envs", "datasets", "scripts")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{path}:{call.lineno}"
        for path in files
        for call in text_files_opened(path.read_text(encoding="utf-8"))
    ]
    assert not found
    assert (
        len(
            [
                *text_files_opened(
                    "p.open('a'); p.read_text(); run(c, text=True); open(p, 'w', encoding='utf-8')"
                )
            ]
        )
        == 3
    )


@pytest.mark.parametrize(
    "name",
    ["plain", "two words", "it's", "$HOME", 'a"b', "-x", "--out", "`id`", "\u00fc*?[", "x\udcff"],
)
def test_a_file_name_in_a_hint_is_one_word_and_not_an_option(name: str) -> None:
    word = quoted(Path(name))
    assert [os.path.normpath(part) for part in shlex.split(word)] == [name]
    assert not word.startswith("-")


def test_hints_are_quoted_for_the_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my run", "-x", "$HOME"):
        Path(name).mkdir()
        with pytest.raises(UserError, match="no episode rows") as error:
            Selector().of(Path(name))
        command = str(error.value).split("`")[1]
        assert shlex.split(command)[:2] == ["fibopolicy", "evaluate"]
        assert Path(shlex.split(command)[2]) == Path(name)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_terminal_shows_any_file_name(
    encoding: str, monkeypatch: pytest.MonkeyPatch, lift_file: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    folder = tmp_path / "\u00fc \u2192 \udcff"
    folder.mkdir()
    data = folder / "lift.hdf5"
    data.write_bytes(lift_file.read_bytes())
    with h5py.File(data, "a") as file:
        file["data"].attrs["total"] = 7  # a warning that names the file
    runs = tmp_path / "\u00fc \u2192"
    one, two = (make_run(folder / name, [True, False, True]) for name in ("\u00e9", "b"))
    commands = {
        ("inspect", str(data)): 0,
        ("split", str(data), "--out", str(folder / "split.hdf5")): 0,
        (
            "train",
            "--dataset",
            str(data),
            "--out",
            str(runs),
            "--steps",
            "1",
            *TINY_ENCODER_OPTIONS,
        ): 0,
        (
            "train",
            "--dataset",
            str(data),
            "--out",
            str(folder / "run"),
            "--steps",
            "1",
            *TINY_ENCODER_OPTIONS,
        ): 2,
        ("results", str(one), str(two), "--out", str(folder / "rates.json")): 0,
        ("compare", str(one), str(two), "--out", str(folder / "page.html")): 0,
        ("plot-pattern", "--tokens", "16", "--out", str(folder / "pattern.png")): 0,
        ("results", str(folder)): 2,
        ("inspect", str(folder / "n\udcf6")): 2,
        ("train", "--help"): 0,
        (): 0,
    }
    for words, expected in commands.items():
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["fibopolicy", *words])
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            err.flush()
            printed = err.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert code == expected, (words, printed)
        assert "Traceback" not in printed


@pytest.mark.slow
def test_an_ascii_locale_and_a_full_or_closed_output_give_one_line_errors(tmp_path: Path) -> None:
    plain = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "NO_COLOR": "1",
        "COLUMNS": "20",
    }
    environment = {**os.environ, **plain, "PYTHONPATH": str(ROOT)}

    def shell(redirected: str) -> tuple[int, str]:
        line = f"{shlex.join(COMMAND)} {redirected}"
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True
        )
        return done.returncode, done.stderr.decode()

    assert shell("train --help > /dev/full") == (
        2,
        "fibopolicy: error: input or output: No space left on device\n",
    )
    code, error = shell("inspect n\u00fcll <&- >&-")
    assert (code, error.partition("; ")[0]) == (
        2,
        "fibopolicy: error: n\\udcc3\\udcbcll: no such file",
    )


def test_a_deleted_current_directory_is_named_in_one_line(tmp_path: Path) -> None:
    line = f"rmdir {shlex.quote(str(tmp_path))}; {shlex.join(COMMAND)} inspect x.hdf5"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines == ["fibopolicy: error: the current directory was deleted; change to another one"]


def test_output_to_a_closed_stream_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    processes.make_streams_safe()
    print("nowhere")
    sys.stdout.close()


def test_a_command_without_a_reader_does_not_end_as_if_it_were_done() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "--version"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_the_home_folder_is_found_behind_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = cli.parse(["results", "~/run", "--out=~/a ~.json"])
    assert (parsed.runs, parsed.out) == ((tmp_path / "run",), tmp_path / "a ~.json")


def test_a_path_with_an_unknown_home_stays_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    monkeypatch.setenv("HOME", "/here")
    assert expanded("~/x") == Path("/here/x")
