"""What the README shows has to work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fibopolicy.policies.base import POLICIES

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
def test_the_readmes_python_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))  # a block registers one
    exec(compile(block, str(README), "exec"), {})


def test_the_files_that_the_readme_names_exist() -> None:
    root = README.parent
    named = re.findall(
        r"`((?:fibopolicy|envs|datasets|docs|scripts)/[\w/.-]+)`", README.read_text()
    )
    named += re.findall(r"\]\(((?!http)[\w/.-]+)", README.read_text())
    assert len(named) > 8
    assert [name for name in named if not (root / name).exists()] == []


def test_every_measurement_is_in_the_index() -> None:
    folder, index = DOCS / "benchmarks", DOCS / "results" / "index.md"
    listed = set(re.findall(r"`(\w+)`", index.read_text()))
    themes = {
        re.sub("_(?:epyc|xeon|[a-z]+[0-9]+|20[0-9-]+).*", "", path.name): path.name
        for path in folder.glob("*_*")
    }
    assert themes
    assert themes.keys() <= listed, f"not in {index}: {[themes[t] for t in themes.keys() - listed]}"


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text().splitlines()) <= 150
