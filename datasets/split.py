"""Makes filter keys: train, valid, and smaller subsets for scaling studies."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import h5py
import numpy as np

from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.layout import DOWNLOAD_SHA256
from fibopolicy.datasets.links import copy_file, points_elsewhere
from fibopolicy.datasets.quality import read_motions, score_demos, worst_first
from fibopolicy.datasets.writer import write_filter_key
from fibopolicy.errors import UserError
from fibopolicy.utils.files import StrPath, atomic_write, check_output, expanded, wrap_os_error


def split(
    src: StrPath,
    out: StrPath,
    valid_fraction: float = 0.1,
    seed: int = 0,
    *,
    subsets: Mapping[str, float] | None = None,
    drop_worst: float = 0,
    overwrite: bool = False,
) -> dict[str, tuple[str, ...]]:
    """Copy `src` to `out` with filter keys `train` and `valid`; `src` stays unchanged.

    If `src` links to other files, `out` holds their data instead.

    Args:
        src: a robomimic HDF5 file.
        out: the file to write. Other filter keys of `src` are kept.
        valid_fraction: the share of demos held out, in [0, 1); at least one demo unless
            0.
        seed: decides which demos.
        subsets: further filter keys by name and share of the *training* demos, e.g.
            `{"20_percent": 0.2}`. Smaller ones are parts of larger ones, and none
            overlaps `valid`, so a scaling study varies only one thing.
        drop_worst: how many demos of the lowest quality score (see `datasets.quality`)
            to leave out of `train` and `valid`, or, below 1, their share. The filter
            key `worst` names them.
        overwrite: replace an existing `out`.

    Returns:
        The new filter keys, each with its demos in numeric order.

    Raises:
        UserError: a share, the seed or `drop_worst` is out of range, a subset is named
            train, valid or worst, no training demo would be left, `out` exists or is
            `src`; a demo cannot be scored.
    """
    src, out = expanded(src), expanded(out)
    for name, share in {**(subsets or {}), "valid": valid_fraction}.items():
        if not (0 <= share < 1 if name == "valid" else 0 < share <= 1):
            raise UserError(
                f"split: the share of {name!r} must be in"
                f" {'[0, 1)' if name == 'valid' else '(0, 1]'}, got {share}"
            )
    if taken := {"train", "valid", "worst"}.intersection(subsets or ()):
        raise UserError(
            f"split: {min(taken)!r} is a filter key of split itself; give the subset another name"
        )
    if seed < 0:
        raise UserError(f"split: seed must be at least 0, got {seed}")
    if not (0 <= drop_worst < 1 or (drop_worst < np.inf and drop_worst == int(drop_worst) >= 1)):
        raise UserError(
            "split: drop_worst must be a whole number of demos or a share below 1, got"
            f" {drop_worst}"
        )
    check_output(out, overwrite, [src])

    with DemoFile(src) as file:
        every = demos = file.demos
        if drop_worst:
            ranked = worst_first(score_demos(read_motions(file, every)))
            count = round(drop_worst if drop_worst >= 1 else drop_worst * len(every))
            worst = {quality.demo for quality in ranked[:count]}
            demos = tuple(demo for demo in every if demo not in worst)
    if not demos:
        raise UserError(f"{src}: {len(every)} demos, drop_worst {drop_worst} leaves none")
    shuffled = [demos[i] for i in np.random.default_rng(seed).permutation(len(demos))]
    held_out = max(1, round(valid_fraction * len(demos))) if valid_fraction else 0
    if held_out >= len(demos):
        raise UserError(
            f"{src}: {len(demos)} demos, {held_out} for valid leave none to train on; lower"
            f" valid_fraction from {valid_fraction}"
        )
    train = shuffled[held_out:]
    chosen = {"train": train, "valid": shuffled[:held_out]}
    chosen |= {
        name: train[: max(1, round(share * len(train)))] for name, share in (subsets or {}).items()
    }
    filter_keys = {
        name: tuple(sorted(names, key=demos.index)) for name, names in chosen.items() if names
    }
    if dropped := tuple(demo for demo in every if demo not in demos):
        filter_keys["worst"] = dropped

    with atomic_write(out) as partial, wrap_os_error(out):
        with h5py.File(src, "r") as original:
            linked = points_elsewhere(original)
            if linked:
                with (
                    DemoFile(src) as file,
                    h5py.File(partial, "w", locking=False) as copy,
                    file.named(),
                ):
                    copy_file(original, copy)
        if not linked:
            shutil.copyfile(src, partial)
        with h5py.File(partial, "r+", locking=False) as copy:
            copy.get("data", copy).attrs.pop(DOWNLOAD_SHA256, None)
            if not held_out and "valid" in copy.get("mask", ()):
                del copy["mask/valid"]
            for name, names in filter_keys.items():
                write_filter_key(copy, name, names)
    return filter_keys
