"""The `fibopolicy` command, also as `python -m fibopolicy`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Set up the process, then hand over to `fibopolicy.cli`."""
    # Before torch loads OpenMP: its threads would spin while they wait for each other, and beside any other busy process
    # they wait long. Measured on two cores next to one busy process: with sleeping threads matrices multiply 4 times as fast.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from fibopolicy.cli import main as run
    except KeyboardInterrupt:
        print("fibopolicy: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
