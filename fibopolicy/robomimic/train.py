"""Runs robomimic's own training, as it is, with our encoders registered."""

from __future__ import annotations

import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

from fibopolicy.robomimic.config import check_config, claim_output, read_config
from fibopolicy.utils.files import StrPath


@dataclass(frozen=True)
class Trained:
    """What robomimic wrote: the experiment's folder, and the checkpoints in it, the
    oldest first.
    """

    folder: Path
    checkpoints: tuple[Path, ...]


def train(
    config_path: StrPath,
    *,
    dataset: StrPath | None = None,
    name: str | None = None,
    out: StrPath | None = None,
    overwrite: bool = False,
) -> Trained:
    """`robomimic.scripts.train.train` on a configuration in JSON.

    Args:
        config_path, dataset, name, out: see `read_config`.
        overwrite: replace the runs of an experiment of this name.

    Raises:
        UserError: the configuration or the data are at fault.
        Exception: whatever made the training fail; its traceback is in robomimic's
            `logs/log.txt` as well.
    """
    config = read_config(config_path, dataset=dataset, name=name, out=out)
    for line in check_config(config):
        warnings.warn(line, stacklevel=2)
    folder = claim_output(config, overwrite=overwrite)

    import robomimic.utils.torch_utils as torch_utils
    from robomimic.scripts.train import train as robomimic_train
    from robomimic.utils.log_utils import PrintLogger

    device = torch_utils.get_torch_device(try_to_use_cuda=config.train.cuda)
    config.lock()
    terminal = sys.stdout, sys.stderr
    try:
        robomimic_train(config, device)
    except Exception:
        if isinstance(sys.stdout, PrintLogger):  # robomimic copies what is printed into its log
            traceback.print_exc(file=sys.stdout.log_file)
        raise
    finally:
        if isinstance(sys.stdout, PrintLogger):
            sys.stdout.log_file.close()
        sys.stdout, sys.stderr = terminal
    checkpoints = sorted(folder.glob("*/models/*.pth"), key=lambda path: path.stat().st_mtime_ns)
    return Trained(folder, tuple(checkpoints))
