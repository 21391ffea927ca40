"""A study in one file: everything that its report needs, without demonstrations,
checkpoints and videos.

The archive is a zip file with the layout of a study's directory. To continue the study,
unpack it and name that folder as the `--out` of `fibopolicy study run`.
"""

from __future__ import annotations

import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fibopolicy.errors import UserError
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.study.directory import (
    ENVIRONMENT,
    STUDY,
    StudyDirectory,
    check_change,
    open_directory,
    read_json,
)
from fibopolicy.study.grid import conditions, possible_runs, tuned_conditions
from fibopolicy.study.records import DIVERGED, Study, read_study
from fibopolicy.utils.files import atomic_write

#: The ending of an archive's name.
SUFFIX = ".study.zip"


def publish(directory: Path, out: Path) -> None:
    """Write the archive of a study: settings, checks, costs, initial states, rows,
    learning curves, the trials of a search, and of a failed run the error and the log.
    The same study gives the same bytes.

    Args:
        directory: the study, finished or not.
        out: the archive, `NAME.study.zip`. An earlier archive of the study is replaced.

    Raises:
        UserError: there is no study; a finished run lacks its rows; `out` is another
            file, or holds a finished run that the study lacks.
    """
    study = open_directory(directory)
    if not out.name.endswith(SUFFIX):
        raise UserError(f"{out}: expected a file name that ends in {SUFFIX}")
    if out.exists():
        _check_replaceable(study, out)
    files = sorted(_files(study))
    with atomic_write(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        for path in files:
            # The default time stamp and mode, so that the bytes depend on the content
            # only.
            entry = zipfile.ZipInfo(path.relative_to(directory).as_posix())
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, path.read_bytes(), compresslevel=9)


def _files(study: StudyDirectory) -> Iterator[Path]:
    """The files of an archive, each of which may be absent in an unfinished study."""
    config = study.config
    found = [study.path / STUDY, study.path / ENVIRONMENT, study.checks]
    found += [study.init_states(task) for task in config.tasks]
    found += [study.cost(condition) for condition in conditions(config)]
    found += [study.tuning_states(task) for task in config.tasks]
    found += [study.choice(condition) for condition in tuned_conditions(config)]
    for run in possible_runs(config):
        files = RunDirectory(study.run(run))
        if study.done(run).exists():
            if not files.episodes.exists() and DIVERGED not in read_json(study.done(run)):
                raise UserError(
                    f"{files.path}: is finished but has no {files.episodes.name}; remove the"
                    " folder and run the study again"
                )
            found += [study.done(run), files.episodes, files.metrics]
        elif study.failed(run).exists():
            found += [study.failed(run), study.run_log(run)]
    yield from filter(Path.exists, found)


def _check_replaceable(study: StudyDirectory, out: Path) -> None:
    with open_study(out) as published:
        there = published.directory
        try:
            check_change(there, study.config)
        except UserError as error:
            raise UserError(str(error).replace(str(there.path), str(out))) from error
        for run in possible_runs(there.config):
            if there.done(run).exists() and not study.done(run).exists():
                raise UserError(
                    f"{out}: holds the finished run {run.name}, which {study.path} lacks; unpack it"
                    " and continue there, or choose another name"
                )


@contextmanager
def open_study(path: Path) -> Iterator[Study]:
    """Read a study from its directory or from its archive, which is unpacked into a
    temporary folder for the time of the block.

    Raises:
        UserError: `path` is neither, or is corrupt.
    """
    if not path.is_file():
        yield read_study(path)
        return
    with tempfile.TemporaryDirectory(prefix="fibopolicy-study-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise UserError(f"{path}: is not the archive of a study ({error})") from error
        if not (Path(folder) / STUDY).is_file():
            raise UserError(f"{path}: is not the archive of a study, it holds no {STUDY}")
        yield replace(read_study(Path(folder)), archived=True)
