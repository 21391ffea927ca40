"""Where tensors live."""

from __future__ import annotations

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
        raise UserError(f"device {name!r} is not to be had here ({reason}); use cpu, or leave --device out") from error
    return device
