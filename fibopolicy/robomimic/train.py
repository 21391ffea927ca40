"""Runs robomimic's own training, unchanged, with our encoders registered."""

from __future__ import annotations

import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

from fibopolicy.errors import one_line
from fibopolicy.robomimic.config import check_config, prepare_output, read_config
from fibopolicy.utils.files import StrPath


class TrainingError(Exception):
    """robomimic's training raised an error. The message says where its log is."""


@dataclass(frozen=True)
class Trained:
    """The experiment's folder and the checkpoints in it, the oldest first."""

    folder: Path
    checkpoints: tuple[Path, ...]


def train_robomimic(
    config_path: StrPath,
    *,
    dataset: StrPath | None = None,
    name: str | None = None,
    out: StrPath | None = None,
    overwrite: bool = False,
) -> Trained:
    """Run `robomimic.scripts.train.train` with a configuration in JSON.

    Args:
        config_path, dataset, name, out: see `read_config`.
        overwrite: replace the runs of an experiment of the same name.

    Raises:
        UserError: the configuration or the data are not valid.
        TrainingError: the training failed.
    """
    config = read_config(config_path, dataset=dataset, name=name, out=out)
    for warning in check_config(config):
        warnings.warn(warning, stacklevel=2)
    folder = prepare_output(config, overwrite=overwrite)

    import robomimic.utils.torch_utils as torch_utils
    from robomimic.scripts.train import train as robomimic_train
    from robomimic.utils.log_utils import PrintLogger

    device = torch_utils.get_torch_device(try_to_use_cuda=config.train.cuda)
    config.lock()
    terminal = sys.stdout, sys.stderr
    try:
        robomimic_train(config, device)
    except Exception as error:
        if isinstance(sys.stdout, PrintLogger):  # robomimic copies what is printed into its log
            traceback.print_exc(file=sys.stdout.log_file)
        reason = one_line(error)
        raise TrainingError(f"{reason}; see logs/log.txt of the run in {folder}") from error
    finally:
        if isinstance(sys.stdout, PrintLogger):
            sys.stdout.log_file.close()
        sys.stdout, sys.stderr = terminal
    checkpoints = sorted(folder.glob("*/models/*.pth"), key=lambda path: path.stat().st_mtime_ns)
    return Trained(folder, tuple(checkpoints))
