"""Shared code of the benchmarks: quartiles, and the two files of a result.

The other scripts of this folder import it, because they are run by path: `python
scripts/benchmarks/data_speed.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np


def spread(values: Any, digits: int) -> dict[str, float]:
    """Median, quartiles and number of values."""
    low, median, high = (
        round(float(value), digits) for value in np.percentile(values, [25, 50, 75])
    )
    return {"median": median, "q1": low, "q3": high, "n": len(values)}


def ratio_text(ratio: dict[str, float] | None) -> str:
    """A `spread` of ratios for a table; empty for none."""
    return f"{ratio['median']:.2f}x ({ratio['q1']:.2f} .. {ratio['q3']:.2f})" if ratio else ""


def parser(what: str | None) -> argparse.ArgumentParser:
    """Parser of a script that writes two files; `what` is its docstring."""
    result = argparse.ArgumentParser(
        description=what, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--out",
        type=Path,
        help="path of the result files without suffix: writes OUT.json and OUT.md",
    )
    return result


def hardware_options(what: str | None, turns: int) -> argparse.Namespace:
    """The options of a script that names its files after the machine; `what` is its docstring."""
    result = argparse.ArgumentParser(
        description=what, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--hardware", required=True, help="name of this machine in the result files"
    )
    result.add_argument("--turns", type=int, default=turns)
    result.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    return result.parse_args()


def described(
    what: str | None, command: str, settings: dict[str, Any], began: float
) -> dict[str, Any]:
    """Command, settings and environment of a result file.

    Args:
        what: the script's docstring.
        began: `time.perf_counter()` at the beginning.
    """
    from fibopolicy.utils.system import environment

    return {
        "what": what,
        "command": command,
        "settings": settings,
        "environment": environment(),
        "seconds": round(time.perf_counter() - began),
    }


def page(
    title: str,
    result: dict[str, Any],
    cores: str,
    packages: tuple[str, ...],
    table: str,
    *,
    load: bool = True,
) -> str:
    """A result as a Markdown page: description, hardware and table."""
    where = result["environment"]
    versions = ", ".join(f"{package} {where[package]}" for package in packages)
    busy = f", load average at the end {where['load'][0]:.0f}" if load else ""
    machine = f"{where['processor']}, {cores}, no GPU; {versions}, {where['date']}{busy}."
    return f"# {title}\n\n{result['what']}\n{machine}\n\n{table}\n"


def write(out: Path, result: dict[str, Any], markdown: str, indent: int = 2) -> None:
    """Write `<out>.json` and `<out>.md`."""
    out.with_name(out.name + ".json").write_text(
        json.dumps(result, indent=indent) + "\n", encoding="utf-8"
    )
    out.with_name(out.name + ".md").write_text(markdown, encoding="utf-8")
