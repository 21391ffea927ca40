"""A readable summary of a demonstration file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fibopolicy.datasets.conventions import proprioception
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.structure import check_structure
from fibopolicy.datasets.validate import clipped, validate
from fibopolicy.datasets.windows import share_at_limits
from fibopolicy.errors import UserError
from fibopolicy.utils.files import StrPath

_ENV_TYPES: dict[Any, str] = {1: "robosuite", 2: "gym", 3: "iGibson"}  # robomimic's EnvType
_LISTED = 3  # at most this many of a kind are listed
#: Share of an action's values at its limits that is shown: likelihoods then need a
#: `min_std`.
_AT_LIMITS = 0.1


def inspect(path: StrPath, mapped: Mapping[str, str] | None = None) -> str:
    """The content of a file, as text.

    It lists task, demos, filter keys, observations, actions, provenance, and warnings
    last. Actions and vectors are read in full, images are not. Content that training
    would reject is a warning. See `DemoFile` for `mapped`.

    Raises:
        UserError: the file cannot be read at all, see `DemoFile`.
    """
    check_structure(path, attributes=True)
    with DemoFile(path, mapped=mapped) as file:
        rows, warnings = contents(file)
    width = max(len(label) for label, _ in rows) + 2
    lines = [f"{label:<{width}}{text}".rstrip() for label, text in rows]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in warnings)])


def contents(file: DemoFile) -> tuple[list[tuple[str, str]], list[str]]:
    """Labels and texts, an empty label continuing the one before; and the warnings."""
    rows = [
        ("file", f"{file.path} ({_size(file.path.stat().st_size)})"),
        *_task(file),
        *_demos(file),
        *_observations(file),
        *_actions(file),
        *_provenance(file),
    ]
    return rows, [*file.warnings, *_filter_key_faults(file), *_content_faults(file)]


def _task(file: DemoFile) -> Iterator[tuple[str, str]]:
    from fibopolicy.envs.registry import unavailable  # here, since it imports gymnasium

    if "env_name" not in file.env_args:
        yield "task", "none is named"
        return
    settings = file.env_args["env_kwargs"]
    kind = file.env_args.get("type")
    version = file.env_args.get("env_version", "unknown")
    yield (
        "task",
        (
            f"{file.env_args['env_name']} (type {kind}: {_ENV_TYPES.get(kind, 'other')}, version"
            f" {version})"
        ),
    )
    if (reason := unavailable(file.env_args)) is not None:
        yield "rollouts", f"not possible: {reason}"
    if (controller := _controller(settings.get("controller_configs"))) is not None:
        yield "controller", controller
    if (frequency := settings.get("control_freq")) is not None:
        yield "control", f"{frequency} Hz"


def _controller(config: Any) -> str | None:
    """`OSC_POSE` of robosuite < 1.5, `BASIC (right: OSC_POSE)` of robosuite >= 1.5."""
    if not isinstance(config, dict):
        return None
    parts = config.get("body_parts")
    named = (
        [f"{part}: {c.get('type')}" for part, c in parts.items() if isinstance(c, dict)]
        if isinstance(parts, dict)
        else []
    )
    return str(config.get("type")) + (f" ({', '.join(named)})" if named else "")


def _demos(file: DemoFile) -> Iterator[tuple[str, str]]:
    lengths = [file.length(demo) for demo in file.demos]
    yield "demos", f"{len(lengths)}"
    yield (
        "steps",
        (
            f"{file.num_steps} (min {min(lengths)}, median {np.median(lengths):g}, max"
            f" {max(lengths)} per demo)"
        ),
    )
    rewarded = [
        demo
        for demo in file.demos
        if file.has(demo, "rewards") and file.layout(demo, "rewards")[1].kind in "biuf"
    ]
    if rewarded:
        reached = sum(bool(np.max(file.read(demo, "rewards"), initial=0) >= 1) for demo in rewarded)
        yield "successes", f"{reached} of {len(rewarded)} (reward reaches 1)"
    for number, (name, demos) in enumerate(file.filter_keys.items()):
        yield "filter keys" if number == 0 else "", f"{name} ({len(demos)} demos)"


def _observations(file: DemoFile) -> Iterator[tuple[str, str]]:
    width = max((len(key) for key in file.obs), default=0)
    own = proprioception(file.vector_keys)
    roles = dict.fromkeys(file.image_keys, "camera")
    roles |= {
        key: "proprioception" if key in own else "left out unless --vectors names it"
        for key in file.vector_keys
    }
    roles |= {
        key: f"{roles[key]}, converted: {how}"
        for key, how in file.converted.items()
        if key in roles
    }
    roles |= {
        key: f"not read: {reason.partition(': ')[2]}" for key, reason in file.unreadable.items()
    }
    for number, (key, (shape, dtype)) in enumerate(file.stored.items()):
        yield (
            "observations" if number == 0 else "",
            f"{key:<{width}}  {f'{dtype} {shape}':<20}  {roles[key]}",
        )


def _actions(file: DemoFile) -> Iterator[tuple[str, str]]:
    how = f", converted: {file.converted['actions']}" if "actions" in file.converted else ""
    yield "actions", f"{file.action_dim} dimensions{how}"
    if blocks := _action_blocks(file):
        actions = np.concatenate(blocks)
        low, high = actions.min(axis=0), actions.max(axis=0)
        for dim, (least, most, share) in enumerate(
            zip(low, high, share_at_limits(actions), strict=True)
        ):
            yield (
                "",
                f"{dim}: {least:+.3f} .. {most:+.3f}"
                + (f", {share:.0%} at either end" if share >= _AT_LIMITS else ""),
            )


def _action_blocks(file: DemoFile) -> list[np.ndarray[Any, np.dtype[Any]]]:
    """The actions of each demo whose width and dtype are those of the file."""
    blocks = [file.read(demo, "actions") for demo in file.demos]
    return [
        block
        for block in blocks
        if block.shape[1:] == (file.action_dim,)
        and block.size
        and np.issubdtype(block.dtype, np.floating)
    ]


def _provenance(file: DemoFile) -> Iterator[tuple[str, str]]:
    for name, value in file.file_attrs.items():
        yield name, _short(value)
    seen: dict[str, Counter[str]] = {}
    for demo in file.demos:
        for name, value in file.attrs(demo).items():
            if name not in ("num_samples", "model_file", "ep_meta"):
                seen.setdefault(name, Counter())[_short(value)] += 1
    for name, values in seen.items():
        if dict(values) == {_short(file.file_attrs.get(name)): len(file.demos)}:
            continue  # the file's own attribute says so
        listed = ", ".join(
            f"{value} ({count} demo{'s' * (count > 1)})"
            for value, count in values.most_common(_LISTED)
        )
        more = f", {len(values) - _LISTED} other values" if len(values) > _LISTED else ""
        yield f"{name} of demos", listed + more


def _filter_key_faults(file: DemoFile) -> Iterator[str]:
    for name in file.filter_keys:
        try:
            file.select(name)
        except UserError as error:
            yield _without_path(file, error)


def _content_faults(file: DemoFile) -> Iterator[str]:
    if len(blocks := _action_blocks(file)):
        try:
            _, warning = clipped(np.concatenate(blocks), file.env_args)
        except UserError as error:
            warning = str(error)
        if warning is not None:
            yield warning
    faulty = 0
    for demo in file.demos:
        try:
            validate(file, file.image_keys, file.vector_keys, [demo])
        except UserError as error:
            faulty += 1
            if faulty <= _LISTED:
                yield _without_path(file, error)
    if faulty > _LISTED:
        yield f"{faulty} demos have such faults, the first {_LISTED} are listed"


def _without_path(file: DemoFile, error: UserError) -> str:
    return str(error).removeprefix(f"{file.path}: ")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
