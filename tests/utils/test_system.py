"""Facts about the machine and the process."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from fibopolicy.utils.system import peak_memory_bytes


def test_peak_memory_excludes_the_memory_of_the_parent() -> None:
    held = np.ones(3 << 28, np.uint8)
    ours = peak_memory_bytes()
    assert ours > held.nbytes
    child = "from fibopolicy.utils.system import peak_memory_bytes; print(peak_memory_bytes())"
    printed = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, text=True, check=True
    ).stdout
    assert 5e6 < int(printed) < held.nbytes
