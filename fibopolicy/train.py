"""`python -m fibopolicy.train ...` is `fibopolicy train ...`, in the form that torchrun
starts several processes of.
"""

from __future__ import annotations

import sys

from fibopolicy.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
