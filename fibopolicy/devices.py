"""Where tensors live, and how many threads compute with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fibopolicy.errors import UserError


def resolve_device(name: str | None) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1"; `None` takes a GPU where there is one.

    Raises:
        UserError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"device {name!r} is not to be had here ({reason}); use cpu, or leave the device out") from error
    return device


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Within it, torch computes with as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
