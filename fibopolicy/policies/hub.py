"""Policies from elsewhere: those on the Hugging Face Hub, and the examples in this
package. Each becomes a run directory in the cache.

Of a repository, only the configuration and the weights are taken, as JSON and
safetensors. Neither can hold code, and names of code are rejected.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fibopolicy.errors import UserError, one_line, unknown
from fibopolicy.policies.run_directory import LOADERS, RunDirectory
from fibopolicy.utils.files import atomic_write, cache_home, wrap_os_error
from fibopolicy.utils.hub import parse_hub_name, wrap_hub_errors
from fibopolicy.utils.imports import is_import_path

EXAMPLES = Path(__file__).parent / "examples"


def example_policy(name: str) -> Path:
    """The run directory of a policy in this package, such as "reach"."""
    known = [path.name for path in EXAMPLES.iterdir() if path.is_dir()]
    if name not in known:
        raise unknown("example", name, known)
    return _run_directory(EXAMPLES / name, cache_home() / "policies" / "examples" / name)


def hub_policy(name: str) -> Path:
    """The run directory of the policy OWNER/NAME on the Hub, or OWNER/NAME@REVISION.

    Raises:
        UserError: no such repository, no connection and no copy in the Hub's cache, or
            what it holds is not a policy of this library.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, revision = parse_hub_name(name)
    files = RunDirectory("")
    for file in (files.config.name, files.ema.name):
        with wrap_hub_errors(name):
            try:
                found = hf_hub_download(
                    repository, file, revision=revision, library_name="fibopolicy"
                )
            except LocalEntryNotFoundError:  # no connection
                raise
            except EntryNotFoundError as error:
                raise UserError(
                    f"hub:{name}: has no {file}, expected a policy that `fibopolicy upload` sent;"
                    " weights in other formats are not read"
                ) from error
        folder = Path(found).parent
        revision = folder.name  # the commit, so that both files are of the same one
    try:
        document = json.loads((folder / files.config.name).read_text(encoding="utf-8"))
        code = _code_of(document)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"hub:{name}: {files.config.name} is not a run's configuration"
            f" ({one_line(error)[:100]})"
        ) from error
    if code:
        raise UserError(
            f"hub:{name}: needs the code {code[0]}, and names of code are not taken from the Hub;"
            " download the repository, read it, and pass its folder"
        )
    if foreign := [section for section in LOADERS.names() if section in document]:
        raise UserError(f"hub:{name}: holds a checkpoint of {foreign[0]}, which is not read")
    return _run_directory(folder, cache_home() / "policies" / repository / folder.name[:12])


def _code_of(document: dict[str, Any]) -> list[str]:
    """The names of code in a configuration, which is not interpreted otherwise: reading
    it as one imports that code.
    """
    policy, tasks = document["policy"], document.get("task_env_args", {})
    names = [policy["policy"], str(policy["encoder"]).removeprefix("timm:")]
    names += [task.get("env_name") for task in (document["env_args"], *tasks.values())]
    return [str(name) for name in names if is_import_path(str(name))]


def _run_directory(source: Path, run: Path) -> Path:
    """A run directory that results can be written to, with the policy in `source`."""
    there, here = RunDirectory(source), RunDirectory(run)
    for original, copy in ((there.ema, here.ema), (there.config, here.config)):
        content = original.read_bytes()
        if not copy.is_file() or copy.read_bytes() != content:
            with atomic_write(copy) as partial, wrap_os_error(copy):
                shutil.copyfile(original, partial)
    return run


def shared_config(run: RunDirectory) -> str:
    """The configuration of a run for others: without the paths of this machine."""
    document = run.read_config()
    train = document["train"]
    datasets = train["dataset"]
    names = [Path(one).name for one in ([datasets] if isinstance(datasets, str) else datasets)]
    train["dataset"] = names[0] if isinstance(datasets, str) else names
    train["out"] = Path(train["out"]).name
    for name in ("encoder_weights", "task_embedding"):
        if train.get(name):
            train[name] = Path(train[name]).name
    return json.dumps(document, indent=2) + "\n"
