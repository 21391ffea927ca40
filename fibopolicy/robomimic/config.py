"""A robomimic training's configuration, checked before robomimic sees it.

Robomimic says little of mistakes: unknown `core_kwargs` are dropped, a relative
`output_dir` lands inside the installed package, an existing one asks a question on the
terminal. Here each is an error of one line, or made right.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fibopolicy.datasets import DemoFile
from fibopolicy.errors import UserError, unknown
from fibopolicy.robomimic.encoder_core import CORE
from fibopolicy.utils.files import StrPath, expanded

NO_ROLLOUTS = (
    "rollouts during training are switched off: those of robomimic 0.3.0 need mujoco_py, which"
    " today's MuJoCo replaced; measure its checkpoints with fibopolicy evaluate CHECKPOINT"
)


def read_config(
    path: StrPath,
    *,
    dataset: StrPath | None = None,
    name: str | None = None,
    out: StrPath | None = None,
) -> Any:
    """The robomimic `Config` of a JSON file, whose keys override the defaults of its
    algorithm.

    Args:
        path: with "algo_name" and any part of that algorithm's configuration.
        dataset, name, out: take the place of `train.data`, `experiment.name` and
            `train.output_dir`.

    Raises:
        UserError: no such file, no JSON, an unknown algorithm or key.
    """
    import robomimic.algo  # noqa: F401
    from robomimic.config import config_factory, get_all_registered_configs

    path = expanded(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a robomimic configuration in JSON")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(given, dict) or not isinstance(given.get("algo_name"), str):
        raise UserError(f'{path}: expected a JSON object with "algo_name", e.g. "bc"')
    algorithms = get_all_registered_configs()
    if given["algo_name"] not in algorithms:
        raise unknown(f"algo_name in {path}:", given["algo_name"], algorithms)
    config = config_factory(given["algo_name"])
    _check_keys(path, given, config, "")
    with config.values_unlocked():
        config.update(given)
        if dataset is not None:
            config.train.data = str(dataset)
        if name is not None:
            config.experiment.name = name
        if out is not None:
            config.train.output_dir = str(out)
        if not config.train.data:
            raise UserError(f"{path}: names no dataset; set train.data or pass --dataset")
        if not isinstance(config.train.data, str):
            raise UserError(
                f"{path}: train.data must be the path of one HDF5 file, as in robomimic 0.3; got {config.train.data!r}"[  # noqa: E501
                    :300
                ]
            )
        # robomimic would take output_dir from inside its own package
        for key in ("data", "output_dir"):
            config.train[key] = os.path.abspath(os.path.expanduser(config.train[key]))
    return config


def check_config(config: Any) -> list[str]:
    """Check a configuration against the dataset and the encoders; returns what the user
    should be told.

    Switches off rollouts, which cannot run.

    Raises:
        UserError: dataset, observation or filter key missing; an unknown core,
            randomizer or option of theirs; an encoder that cannot be built for these
            images.
    """
    told = []
    for name in ("num_epochs", "batch_size"):
        if not isinstance(number := config.train[name], int) or number < 1:
            raise UserError(f"train.{name} must be a whole number of at least 1, got {number!r}")
    if not any(used_keys(section) for section in observation_sections(config.observation)):
        raise UserError(
            "observation.modalities names no observation; fibopolicy inspect shows those of a file"
        )
    with config.values_unlocked():
        if config.experiment.rollout.enabled:
            config.experiment.rollout.enabled = False
            told.append(NO_ROLLOUTS)
    if not _saves(config):
        told.append(
            "no checkpoint will be written: experiment.save.every_n_epochs, epochs and"
            f" every_n_seconds name no epoch of the {config.train.num_epochs}"
        )
    with DemoFile(config.train.data) as file:
        _check_filter_keys(config, file)
        for section in observation_sections(config.observation):
            _check_observations(section, file)
    told += _check_sequences(config)
    return told


def claim_output(config: Any, *, overwrite: bool) -> Path:
    """The folder of this experiment, which must not exist yet; `overwrite` removes the
    runs in it.
    """
    folder: Path = Path(config.train.output_dir) / config.experiment.name
    if not folder.exists():
        return folder
    if not overwrite:
        raise UserError(
            f"{folder}: exists already; choose another --name or --out, or pass --overwrite"
        )
    runs = [run for run in folder.iterdir() if run.is_dir() and re.fullmatch(r"\d{14}", run.name)]
    if others := sorted(entry.name for entry in folder.iterdir() if entry not in runs):
        raise UserError(
            f"{folder}: holds {others[0]}, which no robomimic training wrote; choose another --name"
            " or --out"
        )
    shutil.rmtree(folder)
    return folder


def observation_sections(observation: Any) -> Iterator[Any]:
    """The parts of `config.observation` that hold modalities; hierarchical algorithms
    have several.
    """
    if "modalities" in observation:
        yield observation
        return
    for part in observation.values():
        if isinstance(part, dict):
            yield from observation_sections(part)


def used_keys(section: Any) -> dict[str, list[str]]:
    """Observation keys per modality, of observations, goals and subgoals together."""
    keys: dict[str, list[str]] = {}
    for group in section.modalities.values():
        for modality, names in group.items():
            keys.setdefault(modality, []).extend(
                n for n in names if n not in keys.get(modality, ())
            )
    return {modality: names for modality, names in keys.items() if names}


def check_encoder(where: str, encoder: Any) -> None:
    """Refuse the classes and options of one modality's encoder that robomimic does not
    know and would drop.

    Args:
        where: names it in errors.
        encoder: `config.observation.encoder.<modality>`.
    """
    import robomimic.utils.obs_utils as obs_utils

    for part, known in (
        ("core", obs_utils.OBS_ENCODER_CORES),
        ("obs_randomizer", obs_utils.OBS_RANDOMIZERS),
    ):
        name = encoder[f"{part}_class"]
        if name is None or name == "None":
            continue
        if name not in known:
            raise unknown(f"{where}.{part}_class", name, known)
        options = list(inspect.signature(known[name].__init__).parameters)[1:]
        for option in encoder[f"{part}_kwargs"] or {}:
            if option not in options:
                error = unknown(
                    f"option in {where}.{part}_kwargs of {name}:",
                    option,
                    set(options) - {"input_shape"},
                )
                hint = (
                    f" (an encoder's own options go into {where}.core_kwargs.encoder_options)"
                    if name == CORE
                    else ""
                )
                raise UserError(f"{error}{hint}")


def _check_keys(path: Path, given: Mapping[str, Any], config: Any, where: str) -> None:
    for key, value in given.items():
        if key not in config:
            if config.key_lockable:
                raise unknown(
                    f"key in {path},{f' section {where}' if where else ' top level'}:", key, config
                )
            continue
        known = config[key]
        if isinstance(known, dict) and known:
            if not isinstance(value, dict):
                raise UserError(
                    f"{path}: {where}{key} must be a JSON object with keys of {', '.join(known)},"
                    f" got {value!r}"
                )
            _check_keys(path, value, known, f"{where}{key}.")


def _saves(config: Any) -> bool:
    save, epochs = config.experiment.save, config.train.num_epochs
    return not save.enabled or bool(
        save.every_n_seconds is not None
        or (save.every_n_epochs is not None and save.every_n_epochs <= epochs)
        or any(epoch <= epochs for epoch in save.epochs)
        or (save.on_best_validation and config.experiment.validate)
    )


def _check_filter_keys(config: Any, file: DemoFile) -> None:
    keys = {
        "hdf5_filter_key": config.train.hdf5_filter_key,
        "hdf5_validation_filter_key": config.train.hdf5_validation_filter_key,
    }
    for name, key in keys.items():
        if key is not None and key not in file.filter_keys:
            raise unknown(
                f"filter key of {config.train.data} in train.{name}:", key, file.filter_keys
            )
    if config.experiment.validate and None in keys.values():
        raise UserError(
            "experiment.validate needs train.hdf5_filter_key and train.hdf5_validation_filter_key"
        )
    if keys["hdf5_validation_filter_key"] is not None and not config.experiment.validate:
        raise UserError(
            "train.hdf5_validation_filter_key is set; set experiment.validate to true or leave"
            " it out"
        )


def _check_observations(section: Any, file: DemoFile) -> None:
    for modality, keys in used_keys(section).items():
        for key in keys:
            if key not in file.obs:
                raise unknown(
                    f"observation of {file.path} in observation.modalities, {modality}:",
                    key,
                    file.obs,
                )
            # robomimic reads zeros where the source of a virtual dataset is missing
            for demo in file.demos:
                file.layout(demo, f"obs/{key}")
                file.has(demo, f"next_obs/{key}")
        where = f"observation.encoder.{modality}"
        if modality not in section.encoder:
            raise unknown("observation.encoder: has no modality", modality, section.encoder)
        encoder = section.encoder[modality]
        check_encoder(where, encoder)
        if modality == "rgb":
            for key in keys:
                _check_image(where, key, encoder, file)


def _check_image(where: str, key: str, encoder: Any, file: DemoFile) -> None:
    """Build the randomizer and the core, if it is ours, for the images of a key."""
    import robomimic.utils.obs_utils as obs_utils

    height, width, channels = file.image_shape(key)
    shape = [channels, height, width]
    if encoder.obs_randomizer_class not in (None, "None"):
        kwargs = dict(encoder.obs_randomizer_kwargs or {})
        try:
            randomizer = obs_utils.OBS_RANDOMIZERS[encoder.obs_randomizer_class](
                input_shape=shape, **kwargs
            )
            shape = randomizer.output_shape_in(shape)
        except (AssertionError, TypeError) as error:
            raise UserError(
                f"{where}: {encoder.obs_randomizer_class} with {kwargs} does not fit {key} of"
                f" {height} x {width} pixels {error}".rstrip()
            ) from error
    if encoder.core_class == CORE:
        obs_utils.OBS_ENCODER_CORES[CORE](input_shape=shape, **dict(encoder.core_kwargs or {}))


def _check_sequences(config: Any) -> list[str]:
    algo, train = config.algo, config.train
    if (
        "transformer" in algo
        and algo.transformer.enabled
        and algo.transformer.context_length != train.frame_stack
    ):
        raise UserError(
            f"algo.transformer.context_length is {algo.transformer.context_length},"
            f" train.frame_stack {train.frame_stack}; they must agree"
        )
    if "rnn" in algo and algo.rnn.enabled and algo.rnn.horizon != train.seq_length:
        return [
            f"algo.rnn.horizon is {algo.rnn.horizon}, train.seq_length {train.seq_length}; they"
            " usually agree"
        ]
    return []
