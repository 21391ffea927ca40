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
from tiny_study import SMALL, Here

from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import read_rows
from fibopolicy.study import StudyConfig, ray_cluster
from fibopolicy.study.directory import StudyDirectory
from fibopolicy.study.grid import Run, runs
from fibopolicy.study.ray_cluster import RayCluster
from fibopolicy.study.records import State, read_run
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
        with pytest.raises(UserError, match=message) as error:
            RayCluster(address, 1, "cpu")
        assert "\n" not in str(error.value)
        assert time.monotonic() - began < 60  # not Ray's minutes


def test_a_server_that_is_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "HEALTH_TIMEOUT", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(
            UserError,
            match=f"ray {address}: the port is open, but Ray's health check did not finish",
        ):
            RayCluster(address, 1, "cpu")


#: Trains only once the file is there.
GATED = """
import time
from pathlib import Path

from fibopolicy.encoders.vit import ViT

GATE = Path({gate!r})

class Gated(ViT):
    def forward(self, images):
        while self.training and not GATE.exists():
            time.sleep(0.05)
        return super().forward(images)
"""


@pytest.fixture
def cluster() -> Iterator[object]:
    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    # A lost node is noticed in a second or two, and a slow one (10 s per check) is not lost.
    health = {
        "health_check_initial_delay_ms": 500,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 3,
    }
    made = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args={**small, "include_dashboard": False, "_system_config": health},
    )
    made.second = made.add_node(**small)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_a_node_that_is_lost_costs_no_row(
    cluster: object, with_data: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    (tmp_path / "gated.py").write_text(GATED.format(gate=str(gate)))
    monkeypatch.syspath_prepend(tmp_path)
    encoders = tuple(
        replace(one, encoder="gated:Gated", options={**SMALL, "attention": attention})
        for one, attention in zip(with_data.encoders, ("fibottention", "dense"), strict=True)
    )
    gated = replace(with_data, encoders=encoders, name="gated")
    study = StudyDirectory(tmp_path / "there", gated)

    def init_states(run: Run) -> int:
        log = study.run_log(run)
        return len(re.findall(r": process \d+ on ", log.read_text())) if log.exists() else 0

    def lose_a_node() -> None:
        while not all(map(init_states, runs(gated))):
            time.sleep(0.05)
        cluster.remove_node(cluster.second, allow_graceful=False)  # type: ignore[attr-defined]
        gate.touch()

    losing = threading.Thread(target=lose_a_node, daemon=True)
    losing.start()
    executor = RayCluster(cluster.address, gated.threads, "cpu")  # type: ignore[attr-defined]
    assert executor.slots == 2
    outcome = run_study(gated, study.path, executor, tmp_path)
    losing.join(120)
    assert not losing.is_alive()
    assert (outcome.done, outcome.failed) == (2, ())
    # the run of the lost node, and no other, was started again
    assert sorted(map(init_states, runs(gated))) == [1, 2]
    here = StudyDirectory(tmp_path / "here", gated)
    run_study(gated, here.path, Here(), tmp_path)
    for run in runs(gated):
        assert read_run(study, run).state is State.DONE
        mine, theirs = (read_rows(one.run(run) / "episodes.jsonl") for one in (study, here))
        assert [row.repeatable() for row in mine] == [row.repeatable() for row in theirs]
