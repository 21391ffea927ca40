"""Checks the configuration of a robomimic training before robomimic reads it.

robomimic drops unknown `core_kwargs`, puts a relative `output_dir` into the installed
package and asks on the terminal before it replaces an experiment. Here each of these is
corrected, or an error of one line.
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
    "rollouts during training are switched off: they need mujoco_py in robomimic 0.3, a language"
    " model in 0.5; evaluate the checkpoints with fibopolicy evaluate CHECKPOINT"
)
#: Keys of a dataset in the list that `train.data` may be in robomimic 0.5.
DATASET_KEYS = ("path", "eval", "lang", "key", "filter_key", "demo_limit", "weight")


def read_config(
    path: StrPath,
    *,
    dataset: StrPath | None = None,
    name: str | None = None,
    out: StrPath | None = None,
) -> Any:
    """Read a JSON file into the robomimic `Config` of its algorithm. Keys that the file
    does not have keep robomimic's defaults.

    Args:
        path: file with "algo_name" and any part of that algorithm's configuration.
        dataset, name, out: replace `train.data`, `experiment.name` and
            `train.output_dir`.

    Raises:
        UserError: the file does not exist, is not JSON, or names an unknown algorithm
            or key.
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
    _check_keys(path, given, config)
    with config.values_unlocked():
        config.update(given)
        if dataset is not None:
            config.train.data = str(dataset)
        if name is not None:
            config.experiment.name = name
        if out is not None:
            config.train.output_dir = str(out)
        config.train.data = _absolute_data(path, config.train)
        config.train.output_dir = _absolute(config.train.output_dir)
    return config


def datasets(config: Any) -> list[dict[str, Any]]:
    """The datasets of a training run, each with its "path"."""
    data = config.train.data
    return [{"path": data}] if isinstance(data, str) else data


def check_config(config: Any) -> list[str]:
    """Check a configuration against its dataset and the encoders, and switch off
    rollouts, which cannot run.

    Returns:
        Warnings for the user.

    Raises:
        UserError: a dataset, observation or filter key is missing; a core, randomizer
            or one of their options is unknown; an encoder cannot be built for the
            images.
    """
    warnings = []
    algo, train = config.algo, config.train
    for name in ("num_epochs", "batch_size"):
        if not isinstance(number := train[name], int) or number < 1:
            raise UserError(f"train.{name} must be a whole number of at least 1, got {number!r}")
    sections = list(observation_sections(config.observation))
    if not any(used_keys(section) for section in sections):
        raise UserError(
            "observation.modalities names no observation; fibopolicy inspect shows those of a file"
        )
    if "transformer" in algo and algo.transformer.enabled:
        context = algo.transformer.context_length
        if context != train.frame_stack:
            raise UserError(
                f"algo.transformer.context_length is {context}, train.frame_stack"
                f" {train.frame_stack}; they must agree"
            )
    if len(datasets(config)) > 1:
        if train.hdf5_cache_mode == "all":
            raise UserError('train.hdf5_cache_mode: several datasets need "low_dim" or null')
        if train.hdf5_normalize_obs:
            raise UserError("train.hdf5_normalize_obs: robomimic normalises one dataset only")
    for dataset in datasets(config):
        with DemoFile(dataset["path"]) as file:
            for key in train.get("action_keys", ["actions"]):
                _check_in_place(file, key)
                file.layout(file.demos[0], key)
            _check_filter_keys(config, file, dataset.get("filter_key"))
            for section in sections:
                _check_observations(section, file, dataset)
    if config.experiment.rollout.enabled:
        warnings.append(NO_ROLLOUTS)
        with config.values_unlocked():
            config.experiment.rollout.enabled = False
    if not _saves(config):
        warnings.append(
            "no checkpoint will be written: experiment.save.every_n_epochs, epochs and"
            f" every_n_seconds match none of the {train.num_epochs} epochs"
        )
    if "rnn" in algo and algo.rnn.enabled and algo.rnn.horizon != train.seq_length:
        warnings.append(
            f"algo.rnn.horizon is {algo.rnn.horizon}, train.seq_length {train.seq_length}; they"
            " usually agree"
        )
    return warnings


def prepare_output(config: Any, *, overwrite: bool) -> Path:
    """Return the folder of the experiment; with `overwrite`, remove it if it exists.

    Raises:
        UserError: it exists and `overwrite` is false, or it holds other things than
            runs.
    """
    folder: Path = Path(config.train.output_dir) / config.experiment.name
    if not folder.exists():
        return folder
    if not overwrite:
        raise UserError(
            f"{folder}: exists already; choose another --name or --out, or pass --overwrite"
        )
    for entry in sorted(folder.iterdir()):
        if not (entry.is_dir() and re.fullmatch(r"\d{14}", entry.name)):
            raise UserError(
                f"{folder}: holds {entry.name}, which no robomimic training wrote; choose another"
                " --name or --out"
            )
    shutil.rmtree(folder)
    return folder


def observation_sections(observation: Any) -> Iterator[Any]:
    """The sections of `config.observation` that have modalities; hierarchical
    algorithms have several.
    """
    if "modalities" in observation:
        yield observation
        return
    for part in observation.values():
        if isinstance(part, dict):
            yield from observation_sections(part)


def used_keys(section: Any) -> dict[str, list[str]]:
    """Keys per modality of the observations, goals and subgoals together."""
    keys: dict[str, list[str]] = {}
    for group in section.modalities.values():
        for modality, names in group.items():
            keys[modality] = list(dict.fromkeys([*keys.get(modality, ()), *names]))
    return {modality: names for modality, names in keys.items() if names}


def _check_keys(path: Path, given: Mapping[str, Any], config: Any, section: str = "") -> None:
    for key, value in given.items():
        if key not in config:
            if config.key_lockable:
                where = f"section {section}" if section else "top level"
                raise unknown(f"key in {path}, {where}:", key, config)
            continue
        known = config[key]
        if isinstance(known, dict) and known:
            if not isinstance(value, dict):
                raise UserError(
                    f"{path}: {section}{key} must be a JSON object with keys of"
                    f" {', '.join(known)}, got {value!r}"
                )
            _check_keys(path, value, known, f"{section}{key}.")


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _absolute_data(path: Path, train: Any) -> str | list[dict[str, Any]]:
    """`train.data` with absolute paths."""
    if not train.data:
        raise UserError(f"{path}: names no dataset; set train.data or pass --dataset")
    if isinstance(train.data, str):
        return _absolute(train.data)
    if "normalize_weights_by_ds_size" not in train:
        raise UserError(
            f"{path}: train.data must be the path of one HDF5 file in robomimic 0.3; its 0.5 takes"
            f" several datasets; got {str(train.data)[:100]}"
        )
    found = []
    for dataset in train.data:
        if not isinstance(dataset, dict) or not isinstance(dataset.get("path"), str):
            raise UserError(
                f'{path}: each dataset of train.data must be an object with a "path", got'
                f" {str(dataset)[:100]}"
            )
        for key in dataset:
            if key not in DATASET_KEYS:
                raise unknown(f"key in {path}, train.data:", key, DATASET_KEYS)
        found.append({**dataset, "path": _absolute(dataset["path"])})
    return found


def _saves(config: Any) -> bool:
    save, epochs = config.experiment.save, config.train.num_epochs
    return not save.enabled or bool(
        save.every_n_seconds is not None
        or (save.every_n_epochs is not None and save.every_n_epochs <= epochs)
        or any(epoch <= epochs for epoch in save.epochs)
        or (save.on_best_validation and config.experiment.validate)
    )


def _check_filter_keys(config: Any, file: DemoFile, own: str | None) -> None:
    """Check the filter keys of the training, and the `own` one of a dataset."""
    train, validate = config.train, config.experiment.validate
    if own is not None:
        if own not in file.filter_keys:
            raise unknown(f"filter key of {file.path} in train.data:", own, file.filter_keys)
        if validate:
            raise UserError(
                "train.data: robomimic would validate on the demonstrations of filter_key, too;"
                " use train.hdf5_filter_key and train.hdf5_validation_filter_key"
            )
    for name in ("hdf5_filter_key", "hdf5_validation_filter_key"):
        key = train[name]
        if key is not None and key not in file.filter_keys:
            raise unknown(f"filter key of {file.path} in train.{name}:", key, file.filter_keys)
        if key is None and validate:
            raise UserError(
                "experiment.validate needs train.hdf5_filter_key and"
                " train.hdf5_validation_filter_key"
            )
    if train.hdf5_validation_filter_key is not None and not validate:
        raise UserError(
            "train.hdf5_validation_filter_key is set; set experiment.validate to true or leave"
            " it out"
        )


def _check_observations(section: Any, file: DemoFile, dataset: Mapping[str, Any]) -> None:
    for modality, keys in used_keys(section).items():
        for key in keys:
            if key == "lang_emb" and "lang" in dataset:
                continue  # robomimic 0.5 embeds it itself
            if key not in file.obs:
                where = f"{file.path} in observation.modalities, {modality}:"
                raise unknown(f"observation of {where}", key, file.obs)
            _check_in_place(file, f"obs/{key}", as_stored=modality == "rgb")
            # robomimic reads zeros if the source of a virtual dataset is missing.
            for demo in file.demos:
                file.layout(demo, f"obs/{key}")
                file.has(demo, f"next_obs/{key}")
        if modality not in section.encoder:
            raise unknown("observation.encoder: has no modality", modality, section.encoder)
        encoder = section.encoder[modality]
        _check_encoder(f"observation.encoder.{modality}", encoder)
        if modality == "rgb":
            for key in keys:
                _build_encoder(key, encoder, file)


def _check_in_place(file: DemoFile, key: str, *, as_stored: bool = False) -> None:
    """Raise `UserError` for an array that robomimic does not find, or reads as stored where
    it must be converted.
    """
    found = file.array_path(key)
    how = file.converted.get(key.removeprefix("obs/")) if as_stored else None
    if how or not file.is_in_place(key):
        reason = f"it must be converted ({how})" if how else f"it is {found} in each demo"
        raise file.error(
            f"robomimic cannot read {key}: {reason}; `fibopolicy import` writes a file that it"
            " reads"
        )


def _check_encoder(where: str, encoder: Any) -> None:
    """Raise `UserError` for classes and options of
    `config.observation.encoder.<modality>` that robomimic does not know and would drop.
    """
    import robomimic.utils.obs_utils as obs_utils

    classes = {"core": obs_utils.OBS_ENCODER_CORES, "obs_randomizer": obs_utils.OBS_RANDOMIZERS}
    for part, known in classes.items():
        for name, kwargs in _modules(encoder, part):
            if name not in known:
                raise unknown(f"{where}.{part}_class", name, known)
            options = set(inspect.signature(known[name]).parameters)
            for option in kwargs:
                if option not in options:
                    kind = f"option in {where}.{part}_kwargs of {name}:"
                    error = unknown(kind, option, options - {"input_shape"})
                    hint = f" (options of the encoder go into {where}.core_kwargs.encoder_options)"
                    raise UserError(f"{error}{hint if name == CORE else ''}")


def _modules(encoder: Any, part: str) -> list[tuple[str, dict[str, Any]]]:
    """Class and options of the core or of the randomizers, of which 0.5 takes a list."""
    names, kwargs = encoder[f"{part}_class"], encoder[f"{part}_kwargs"]
    if not isinstance(names, list):
        names, kwargs = [names], [kwargs]
    return [
        (name, dict(options or {}))
        for name, options in zip(names, kwargs, strict=False)
        if name not in (None, "None")
    ]


def _build_encoder(key: str, encoder: Any, file: DemoFile) -> None:
    """Build the randomizers, and the core if it is ours, for the images of a key."""
    import robomimic.utils.obs_utils as obs_utils

    height, width, channels = file.image_shape(key)
    shape = [channels, height, width]
    for randomizer, kwargs in _modules(encoder, "obs_randomizer"):
        try:
            built = obs_utils.OBS_RANDOMIZERS[randomizer](input_shape=shape, **kwargs)
            shape = built.output_shape_in(shape)
        except (AssertionError, TypeError) as error:
            raise UserError(
                f"observation.encoder.rgb: {randomizer} with {kwargs} does not fit {key} of"
                f" {height} x {width} pixels {error}".rstrip()
            ) from error
    if encoder.core_class == CORE:
        obs_utils.OBS_ENCODER_CORES[CORE](input_shape=shape, **dict(encoder.core_kwargs or {}))
