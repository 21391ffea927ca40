"""Small demonstrations and runs that many tests share.

Fixtures import what they need, which the process that hands out tests does not.
"""

from __future__ import annotations

import atexit
import copy
import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from fibopolicy.training import TrainConfig

# How long an example takes depends on what else the machine does.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# Garbage collections during imports, later over what imports made, and often would take a
# fourth of the time.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    # Many small tests run in parallel; with more than one thread each they would wait for
    # one another. Workers read it when they import numpy.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if getattr(config.option, "tx", None) and not config.option.collectonly:
        return  # this process only hands out tests
    if hasattr(config, "workerinput"):
        # To free what was imported would take seconds. Exit handlers run in reverse order,
        # so those of the imports run before this one.
        atexit.register(os._exit, 0)
    import torch

    torch.set_num_threads(1)
    # Without a GPU the Triton kernels run in Triton's interpreter. Triton reads this
    # variable once, when it is first imported.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    atexit.register(gc.unfreeze)  # or Triton's bindings report leaks


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker a stretch of the suite, so that a module's fixtures are made once;
    a worker that is done takes tests from another.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


TINY_ENCODER = {"patch_size": 12, "width": 24, "depth": 2, "num_heads": 2, "keypoints": 4}


@pytest.fixture(scope="session", autouse=True)
def caches_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Frames of the tests' files do not stay in the user's cache. Other libraries keep
    theirs.
    """
    from fibopolicy.utils.files import cache_home

    home, folder = cache_home(), tmp_path_factory.mktemp("cache")
    if home.parent.is_dir():
        for path in home.parent.iterdir():
            if path != home:
                (folder / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def models_compiled_once() -> Iterator[None]:
    """Environments of one robot get copies of one compiled model: MuJoCo needs half a
    second for its meshes.
    """
    from fibopolicy.envs.rendering import configure_gl

    configure_gl()
    import mujoco

    compiled = functools.lru_cache(maxsize=8)(mujoco.MjModel.from_xml_string)

    def from_xml_string(xml: str) -> mujoco.MjModel:
        return copy.copy(compiled(xml))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mujoco.MjModel, "from_xml_string", staticmethod(from_xml_string))
        yield


@pytest.fixture(scope="session", autouse=True)
def workers_forked() -> Iterator[None]:
    from forked_workers import fork_workers

    with pytest.MonkeyPatch.context() as patch:
        fork_workers(patch)
        yield


@pytest.fixture(scope="session")
def lift_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven scripted Lift demonstrations with both cameras at 24 x 24 pixels."""
    from fibopolicy.datasets.collect import Plan, collect

    out = tmp_path_factory.mktemp("data") / "lift.hdf5"
    collect(Plan("Lift-v0", image_size=24), 11, out, workers=1)
    return out


@pytest.fixture(scope="session")
def tiny_config(lift_file: Path) -> TrainConfig:
    """A training run that takes a second; `out` must be replaced."""
    from fibopolicy.policies import PolicyConfig
    from fibopolicy.training import OptimizerConfig, TrainConfig

    return TrainConfig(
        lift_file,
        Path("replace-me"),
        policy=PolicyConfig(encoder_options=TINY_ENCODER, hidden=32, shift=1),
        optimizer=OptimizerConfig(steps=12, batch_size=8, warmup_steps=2),
        checkpoint_every=4,
        log_every=1,
    )
