"""What a checkout and an installation make importable, and what they are installed from."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fibopolicy import __version__

ROOT = Path(__file__).parent.parent


def _python(*arguments: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_changelog_and_the_citation_name_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+), \d{4}-\d{2}-\d{2}$", changelog, re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert newest is not None
    assert newest[1] == __version__
    assert f"\nversion: {__version__}\n" in citation


def test_the_constraints_leave_to_torch_what_torch_pins() -> None:
    names = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert "torch" in names
    assert [
        name for name in names if re.match(r"triton|nvidia|cuda|pytorch.triton", name.lower())
    ] == []


def test_the_quickstarts_environment_is_completed_and_a_complete_one_is_kept(
    tmp_path: Path,
) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    log, broken = tmp_path / "installed", tmp_path / "broken"
    for name, script in {
        "python": f'[ "$3" != install ] || {{ echo "${{*: -1}}" >>{log}; [ ! -e {broken} ]; }}',
        "dpkg-query": "echo install ok installed",  # of the system's packages, nothing is missing
        "cmake": "",
        "c++": "",
    }.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tools / name).chmod(0o755)

    def installs(*options: str) -> list[str]:
        log.write_text("")
        path = f"{tools}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "scripts/setup", *options],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == (not broken.exists()), done.stderr
        return log.read_text().split()

    broken.touch()  # as an installation that is interrupted, which the next one repeats
    assert installs("--minimal") == ["."]
    broken.unlink()
    assert installs("--minimal") == ["."]
    assert installs("--minimal") == []
    everything, robomimic = installs()
    assert everything.startswith(".[robosuite,")
    assert everything.endswith("dev]")
    assert robomimic.startswith("praxis-robomimic==0.5")
    assert installs("--minimal") == installs() == []
    with (tmp_path / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert installs("--minimal") == ["."]


@pytest.mark.slow
def test_a_plain_installation_runs_from_the_root_of_the_clone(tmp_path: Path) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(tmp_path),
    ]
    # setuptools works in it, and installs what it finds there of an older tree
    build = ROOT / "build"
    shutil.rmtree(build, ignore_errors=True)
    try:
        subprocess.run([*pip, str(ROOT)], check=True, capture_output=True)
    finally:
        shutil.rmtree(build, ignore_errors=True)
    installed = {str(p.relative_to(tmp_path)) for p in (tmp_path / "fibopolicy").rglob("*.py")}
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    ours = {name if name.startswith("fibopolicy/") else f"fibopolicy/{name}" for name in listed}
    assert installed == {name for name in ours if name.split("/")[1] not in ("scripts", "tests")}
    done = _python("-X", "importtime", "-m", "fibopolicy", "--version", cwd=ROOT, path=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(re.findall(r"\| +(\S+)$", done.stderr, re.MULTILINE))
    assert "torch" in loaded
    # each would add half a second or more to the start of every command
    assert not loaded & {"torch._dynamo", "scipy.stats", "matplotlib", "mujoco"}
    code = "import fibopolicy.datasets; print(fibopolicy.datasets.__file__)"
    done = _python("-c", code, cwd=tmp_path.parent, path=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "fibopolicy" / "datasets" / "__init__.py"), (
        done.stderr
    )


@pytest.mark.parametrize("installed", [True, False])
def test_an_installed_package_named_datasets_is_not_hidden_in_the_clone(
    tmp_path: Path, installed: bool
) -> None:
    if installed:  # as Hugging Face's is
        (tmp_path / "datasets").mkdir()
        (tmp_path / "datasets" / "__init__.py").write_text(
            "from datasets.load import load_dataset\n"
        )
        (tmp_path / "datasets" / "load.py").write_text("load_dataset = 'theirs'\n")
    code = (
        "import datasets, datasets.load; import fibopolicy.datasets; print(datasets.load_dataset)"
    )
    done = _python("-c", code, cwd=ROOT, path=tmp_path)
    if installed:
        assert done.stdout.strip() == "theirs", done.stderr
    else:
        assert "ModuleNotFoundError: No module named 'datasets'" in done.stderr
