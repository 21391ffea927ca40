"""The `fibopolicy` command, also as `python -m fibopolicy`."""

from __future__ import annotations

import gc
import os
import sys

from fibopolicy.utils.processes import set_up


def main() -> None:
    """Set up the process, then call `fibopolicy.cli`."""
    set_up()
    gc.disable()  # it would take a fifth of the time of the imports
    try:
        os.getcwd()  # without it torch aborts with a message that hides the cause
        from fibopolicy.cli import main as run
    except FileNotFoundError:
        print(
            "fibopolicy: error: the current directory was deleted; change to another one",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("fibopolicy: interrupted", file=sys.stderr)
        sys.exit(130)
    gc.freeze()
    gc.enable()
    run()


if __name__ == "__main__":
    main()
