"""The machine: processor, GPU, memory, devices and threads."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import fibopolicy
from fibopolicy.errors import UserError

if TYPE_CHECKING:
    import torch  # imported where it is needed: simulator processes must not load it


#: Packages that a result may depend on.
_PACKAGES = (
    "torch",
    "numpy",
    "mujoco",
    "gymnasium",
    "h5py",
    "robosuite",
    "metaworld",
    "rpent-libero",
    "robomimic",
    "timm",
    "diffusers",
    "ray",
)


@cache
def versions() -> Mapping[str, str]:
    """Versions of fibopolicy, of Python, and of the installed packages that a result
    may depend on, by name. Imports none of them.
    """
    found = {"fibopolicy": fibopolicy.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return MappingProxyType(found)


def environment() -> dict[str, Any]:
    """Hardware, versions and date, for a result file."""
    import torch

    return {
        "date": time.strftime("%Y-%m-%d"),
        **hardware(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        **versions(),
    }


def hardware() -> dict[str, str | None]:
    """The names of the processor and of the GPU, if there is one."""
    import torch

    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident so far."""
    try:
        return status_bytes("VmHWM")
    except (OSError, StopIteration):
        # Not on Linux, where it survives exec: the child of a large process would
        # report the memory of its parent.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


def status_bytes(key: str) -> int:
    """A memory statistic of this process on Linux, such as "VmRSS" or "VmHWM"; on other
    systems it raises `OSError`.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def resolve_device(name: str | None) -> torch.device:
    """The device of a name such as "cpu" or "cuda:1"; for `None`, a GPU if there
    is one.

    Raises:
        UserError: this machine has no such device.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"device {name!r} is not available ({reason}); use cpu, or leave the device out"
        ) from error
    return device


def device_name(device: torch.device) -> str:
    """The name of a GPU; of any other device its type: "cpu"."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Context in which torch computes with `number` threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
