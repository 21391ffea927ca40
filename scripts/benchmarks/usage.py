"""Memory and processor time of a process, for the other scripts of this folder."""

from __future__ import annotations

import os
from pathlib import Path


def resident_mb(process: int | str = "self") -> dict[str, float]:
    """Resident memory in MB: all of it, and the part that no file backs. Linux only."""
    status = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    )
    return {
        name: float(status[key].split()[0]) / 1024
        for name, key in (("resident", "VmRSS"), ("anonymous", "RssAnon"))
    }


def processor_seconds() -> float:
    """Processor time in seconds of this process and its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
