"""A trained policy on the Hugging Face Hub, with a model card that says what it does."""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fibopolicy.errors import UserError, one_line, quoted
from fibopolicy.evaluation.episodes import evaluations, success_rate, write_rows
from fibopolicy.evaluation.evaluate import weights_digest
from fibopolicy.policies.hub import shared_config
from fibopolicy.policies.run_directory import LOADERS, RunDirectory, load_policy
from fibopolicy.report.run import trained_with
from fibopolicy.report.tables import rate_rows
from fibopolicy.utils.files import StrPath

_CARD = """---
license: {licence}
library_name: fibopolicy
pipeline_tag: robotics
tags: [robotics, imitation-learning, behaviour-cloning]
---

# {title}

A policy for `{task}`, trained by behaviour cloning with fibopolicy.

```sh
fibopolicy evaluate hub:{repository}
```

```python
from fibopolicy import load

runner = load("hub:{repository}")
runner.reset()  # at the start of each episode
action = runner.act(observation)  # at each control step
```

## Success rate

{rates}

Episodes of held-out initial states; their results are in `episodes.jsonl`. The interval covers the
choice of initial states, not the training seed.

## How it was made

{facts}
"""


def upload_run(run: StrPath, repository: str, *, licence: str, private: bool = False) -> str:
    """Send the policy of an evaluated run to a model repository on the Hub: weights
    (the moving average, as safetensors), configuration, episode results, model card.

    Args:
        run: its directory.
        repository: OWNER/NAME; created if it does not exist.
        licence: the policy's, by the Hub's short name, for example "mit".
        private: create the repository for its owner only.

    Returns:
        the address of the upload.

    Raises:
        UserError: not a run that can be shared, its weights were not evaluated, or the
            Hub refuses.
    """
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{repository}: expected OWNER/NAME, the repository to upload to")
    with tempfile.TemporaryDirectory(prefix="fibopolicy-upload-") as folder:
        write_shared(run, Path(folder), repository, licence)
        api = HfApi(library_name="fibopolicy")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            sent = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Upload policy"
            )
        except Exception as error:  # of the HTTP library
            raise UserError(
                f"{repository}: the Hub does not take it ({one_line(error)[:200]}); log in with"
                " `hf auth login` and check the network"
            ) from error
    return str(sent.commit_url)


def write_shared(run: StrPath, folder: Path, repository: str, licence: str) -> None:
    """Write the files of an upload into `folder`."""
    files, shared = RunDirectory(run), RunDirectory(folder)
    document = files.read_config()
    if any(section in document for section in LOADERS.names()):
        raise UserError(f"{run}: is another library's checkpoint; upload it with that library")
    loaded = load_policy(files.path)  # refuses weights that do not fit
    sent = loaded.step, weights_digest(loaded.policy)
    found = {
        name: own
        for name, rows in evaluations(files.path).items()
        if (own := [row for row in rows if (row.checkpoint_step, row.policy) == sent])
    }
    if not found:
        raise UserError(
            f"{run}: its episode rows are of other weights than {files.ema.name} of step"
            f" {loaded.step}; run `fibopolicy evaluate {quoted(run)}` again"
        )
    shutil.copyfile(files.ema, shared.ema)
    write_rows(shared.episodes, itertools.chain(*found.values()))
    shared.config.write_text(shared_config(files), encoding="utf-8")
    rates = {
        name.removeprefix(f"{files.path}: "): success_rate(rows) for name, rows in found.items()
    }
    header, *rows = rate_rows(rates)
    lines = ["evaluation", *header[1:]], ["---"] * len(header), *rows
    card = _CARD.format(
        licence=licence,
        title=repository.partition("/")[2],
        task=document["env_args"].get("env_name"),
        repository=repository,
        rates="\n".join(f"| {' | '.join(line)} |" for line in lines),
        facts="\n".join(f"- {name}: {value}" for name, value in _facts(document, files).items()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _facts(document: dict[str, Any], run: RunDirectory) -> dict[str, Any]:
    policy, train = document["policy"], document["train"]
    options = [f"{name} {value}" for name, value in policy["encoder_options"].items()]
    return {
        "policy": f"{policy['policy']}, {policy['n_action_steps']} of {policy['horizon']} predicted"
        " actions executed",
        "encoder": ", ".join([policy["encoder"], *options]),
        "observations": ", ".join([*document["shapes"]["images"], *document["shapes"]["vectors"]]),
        "demonstrations": train["demos"],
        "gradient steps": train["optimizer"]["steps"],
        "training seed": train["seed"],
        **trained_with(run.path),
    }
