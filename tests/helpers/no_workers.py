"""Records demonstrations in the process of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from fibopolicy.datasets import shards


class Here:
    """A pool whose only worker is this process."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


@contextmanager
def no_workers() -> Iterator[None]:
    """Within this block, `collect` and `generate` start no workers, each of which takes
    seconds to import a simulator.
    """

    @contextmanager
    def pool(_: int, start: Callable[..., None], *arguments: Any) -> Iterator[Here]:
        start(*arguments)
        yield Here()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_record", None)
        patch.setattr(shards, "simulator_pool", pool)
        yield
