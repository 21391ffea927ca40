"""A training killed at any moment leaves a complete checkpoint and resumes to the weights
of one that was not killed.
"""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fibopolicy.errors import UserError
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.training import OptimizerConfig, TrainConfig, checkpoint
from fibopolicy.training.trainer import train
from fibopolicy.utils import files

KILLS = 6


def outcome(run: Path) -> tuple[bytes, bytes, list[float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (
        (run / "model.safetensors").read_bytes(),
        (run / "ema.safetensors").read_bytes(),
        [row["loss"] for row in rows],
    )


def check_whole(run: Path) -> int:
    """Every file of the run can be read; returns the step of its state, -1 without one."""
    if not (run / "state.pt").exists():
        return -1
    for weights in ("model", "ema"):
        if (run / f"{weights}.safetensors").exists():
            load_policy(run, checkpoint=weights)
    return int(torch.load(run / "state.pt", weights_only=True)["step"])


def forked(task: Callable[[], object], kill_after: float = math.inf) -> int:
    """Runs `task` in a copy of this process, which has all imports and kernels; returns
    the signal that ended it, or 0.

    Args:
        kill_after: seconds of processor time, which passes alike on busy machines.
    """
    child = os.fork()
    if child == 0:
        try:
            task()
        finally:
            os._exit(0)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG if kill_after < math.inf else 0)
        if ended:
            return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if int(Path(f"/proc/{child}/schedstat").read_text().split()[0]) / 1e9 >= kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = math.inf
        time.sleep(0.001)


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A fresh process, which may fork since it has no other threads."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def killed_at_random(config: TrainConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    train(replace(config, out=folder / "warm"))
    began = time.process_time()
    train(replace(config, out=folder / "whole"))
    span = (time.process_time() - began) / 3
    expected, chance, kills, runs, steps = outcome(folder / "whole"), random.Random(0), 0, 0, set()
    while kills < KILLS:
        run = replace(config, out=folder / f"killed{runs}")
        while forked(lambda: train(run, resume=True), chance.uniform(0, span)) == signal.SIGKILL:  # noqa: B023
            kills += 1
            if run.out.exists():
                steps.add(check_whole(run.out))
        assert outcome(run.out) == expected
        runs += 1
    assert len(steps) > KILLS // 3, f"the kills fell on steps {steps} only"


@pytest.mark.slow
def test_a_run_survives_kills_at_random_moments(
    tiny_config: TrainConfig, tmp_path: Path, apart: ProcessPoolExecutor
) -> None:
    config = replace(
        tiny_config,
        optimizer=OptimizerConfig(steps=24, batch_size=4, warmup_steps=2),
        checkpoint_every=1,
    )
    apart.submit(killed_at_random, config, tmp_path).result()


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at_call(module: Any, name: str, call: int, *, after: bool) -> None:
    """From now on the `call`-th use of a function, from 1, kills this process before or
    after it does its work.
    """
    original, calls = getattr(module, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            die()
        result = original(*arguments, **options)
        if calls == call:
            die()
        return result

    setattr(module, name, counted)


def dies_in_the_midst_of(name: str) -> None:
    """From now on `torch.save` or `save_file` leaves half a file, and kills this process."""
    module = torch if name == "save" else checkpoint
    original = getattr(module, name)

    def half(document: Any, target: Any, **options: Any) -> None:
        original(document, target, **options)
        path = Path(target.name if name == "save" else target)
        os.truncate(path, path.stat().st_size // 2)
        die()

    setattr(module, name, half)


def killed_while_saving(config: TrainConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    train(replace(config, out=folder / "whole"))
    expected = outcome(folder / "whole")
    # A checkpoint is three files, each flushed, renamed, and its folder flushed.
    places: list[Callable[[], None]] = [
        lambda: dies_in_the_midst_of("save"),
        lambda: dies_in_the_midst_of("save_file"),
    ]
    for call in (1, 2, 3):
        places += [
            lambda call=call, a=a: dies_at_call(files.os, "replace", call + 1, after=a)
            for a in (False, True)
        ]  # type: ignore[misc]
    places += [
        lambda call=call: dies_at_call(files, "flush", call + 2, after=False)
        for call in range(1, 7)
    ]  # type: ignore[misc]
    for number, place in enumerate(places):
        run = replace(config, out=folder / f"killed{number}")

        def until_there(run: TrainConfig = run, place: Callable[[], None] = place) -> None:
            place()
            train(run)

        assert forked(until_there) == signal.SIGKILL
        assert check_whole(run.out) in (-1, config.checkpoint_every)
        train(run, resume=True)
        assert outcome(run.out) == expected


@pytest.mark.slow
def test_a_run_survives_kills_at_every_point_of_saving(
    tiny_config: TrainConfig, tmp_path: Path, apart: ProcessPoolExecutor
) -> None:
    short = replace(tiny_config, optimizer=replace(tiny_config.optimizer, steps=8))
    apart.submit(killed_while_saving, short, tmp_path).result()


def disk_fills_up(config: TrainConfig, out: Path) -> list[tuple[str, int]]:
    """Resumes a run where no file may grow as large as its checkpoint, which is what a full
    disk looks like; returns the error and the step of the state left, for two files.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    found = []
    for limited in ("state.pt", "model.safetensors"):
        size = (out / limited).stat().st_size - 1000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            with pytest.raises(UserError) as caught:
                train(replace(config, out=out), resume=True)
        finally:
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        found.append((str(caught.value), check_whole(out)))
    return found


def test_a_full_disk_is_a_one_line_error_and_keeps_the_checkpoint(
    tiny_config: TrainConfig, tmp_path: Path, apart: ProcessPoolExecutor
) -> None:
    config = replace(tiny_config, out=tmp_path / "run")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    save = checkpoint.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", lambda *a: (save(*a), stop()))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    found = apart.submit(disk_fills_up, config, config.out).result()
    for (message, _), name in zip(found, ("state.pt", "model.safetensors"), strict=True):
        assert (
            f"{config.out}/{name}: cannot be written: File too large; the previous checkpoint is"
            " complete" in message
        )
        assert "\n" not in message
    assert found[0][1] == 4
    train(config, resume=True)
    train(replace(config, out=tmp_path / "whole"))
    assert outcome(config.out) == outcome(tmp_path / "whole")


def test_the_first_checkpoint_s_failure_does_not_mention_an_earlier_one(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", _disk_full)
        patch.setattr(torch, "save", _disk_full)
        with pytest.raises(
            UserError, match=r"run/state\.pt: cannot be written: No space left on device$"
        ):
            train(config)
    train(config, resume=True)


def _disk_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
