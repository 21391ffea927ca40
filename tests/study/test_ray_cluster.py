"""A study on a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_study import Here

from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import read_rows
from fibopolicy.study import StudyConfig
from fibopolicy.study.cells import runs
from fibopolicy.study.directory import StudyDirectory, state_of
from fibopolicy.study.executors import ray_cluster
from fibopolicy.study.executors.ray_cluster import RayCluster
from fibopolicy.study.runner import run_study

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")


def test_an_address_that_does_not_answer_is_one_line() -> None:
    for address, message in (
        ("127.0.0.1:1", "ray 127.0.0.1:1: does not answer"),
        ("ray://127.0.0.1:1", "does not answer"),
        ("nowhere", "expected auto, HOST:PORT or ray://HOST:PORT"),
    ):
        began = time.monotonic()
        with pytest.raises(UserError, match=message) as told:
            RayCluster(address, 1, "cpu")
        assert "\n" not in str(told.value)
        assert time.monotonic() - began < 10


def test_what_answers_and_is_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "PROOF", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            UserError, match=f"ray {address}: something listens there, but did not prove"
        ):
            RayCluster(address, 1, "cpu")


@pytest.fixture
def cluster() -> Iterator[object]:
    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    made = cluster_utils.Cluster(
        initialize_head=True, head_node_args={**small, "include_dashboard": False}
    )
    made.second = made.add_node(**small)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_a_node_that_is_lost_costs_no_row(
    cluster: object, finished: StudyDirectory, config: StudyConfig, tmp_path: Path
) -> None:
    # Long enough to be interrupted in the middle; the same rows as of the same study
    # carried out here.
    longer = replace(
        config, steps=40, optimizer={**config.optimizer, "batch_size": 32}, name="longer"
    )
    here, there = tmp_path / "here", tmp_path / "there"
    run_study(longer, here, Here(), tmp_path)
    study = StudyDirectory(there, longer)

    def lose_a_node() -> None:
        while sum((study.run(run) / "metrics.jsonl").exists() for run in runs(longer)) < 2:
            time.sleep(0.05)
        cluster.remove_node(cluster.second, allow_graceful=False)  # type: ignore[attr-defined]

    losing = threading.Thread(target=lose_a_node, daemon=True)
    losing.start()
    executor = RayCluster(cluster.address, longer.threads, "cpu")  # type: ignore[attr-defined]
    assert executor.slots == 2
    outcome = run_study(longer, there, executor, tmp_path)
    losing.join(30)
    assert not losing.is_alive()
    assert (outcome.done, outcome.failed) == (2, ())
    for run in runs(longer):
        assert state_of(study, run) == "done"
        mine, theirs = (
            read_rows(one.run(run) / "episodes.jsonl")
            for one in (study, StudyDirectory(here, longer))
        )
        assert [row.repeatable() for row in mine] == [row.repeatable() for row in theirs]
    starts = [
        len(re.findall(r": process \d+ on ", study.run_log(run).read_text()))
        for run in runs(longer)
    ]
    assert sorted(starts) == [1, 2], "the run of the lost node, and no other, was begun again"
