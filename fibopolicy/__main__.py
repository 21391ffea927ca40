"""The `fibopolicy` command, also as `python -m fibopolicy`."""

from __future__ import annotations

import sys

from fibopolicy.utils.processes import set_up


def main() -> None:
    """Set up the process, then hand over to `fibopolicy.cli`."""
    set_up()
    try:
        from fibopolicy.cli import main as run
    except KeyboardInterrupt:
        print("fibopolicy: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
