from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fibopolicy.datasets import HOSTED
from fibopolicy.envs import from_env_args, make, resolve, task_ids
from fibopolicy.envs.libero.tasks import LIBERO, instruction_of
from fibopolicy.envs.registry import is_known, task_id_of, unavailable
from fibopolicy.errors import UserError

STOVE = "libero/goal/turn_on_the_stove"


def libero_file(path: str) -> dict[str, Any]:
    """The `env_args` of one of LIBERO's own files."""
    kwargs = {"robots": ["Panda"], "bddl_file_name": path, "camera_heights": 128}
    return {"env_name": "Libero_Tabletop_Manipulation", "type": 1, "env_kwargs": kwargs}


def test_all_tasks_are_known_without_libero_and_are_those_of_its_datasets() -> None:
    assert len(LIBERO) == 130
    assert set(LIBERO) < set(task_ids())
    assert set(LIBERO) == {name for name in HOSTED if name.startswith("libero/")}


def test_a_task_is_found_without_its_prefix_and_a_wrong_name_gets_the_nearest() -> None:
    assert resolve("goal/turn_on_the_stove") == STOVE
    with pytest.raises(UserError, match="did you mean 'libero/goal/turn_on_the_stove'"):
        resolve("libero/goal/turn_on_stove")


def test_the_instruction_is_the_benchmark_s() -> None:
    assert instruction_of(STOVE) == "turn on the stove"
    scene = "libero/90/KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet"
    assert instruction_of(scene) == "close the top drawer of the cabinet"


def test_a_file_of_libero_names_its_task_by_its_problem() -> None:
    args = libero_file("libero/libero/bddl_files/libero_goal/turn_on_the_stove.bddl")
    assert task_id_of(args) == STOVE
    assert unavailable(args) is None
    assert is_known(args)
    args = libero_file("mine/own_task.bddl")
    assert not is_known(args)
    with pytest.raises(UserError, match="is LIBERO's, and env_args name none of its 130 tasks"):
        from_env_args(args)


def test_missing_assets_are_a_line_with_the_command_that_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("robosuite", reason="robosuite is not installed")
    from fibopolicy.envs.libero.installation import import_libero

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    import_libero.cache_clear()
    with pytest.raises(UserError, match="run `fibopolicy download libero-assets`") as caught:
        make(STOVE)
    assert "\n" not in str(caught.value)
