"""A custom policy, named as "module:class"."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from command import TINY_ENCODER_OPTIONS, call

from fibopolicy import load
from fibopolicy.errors import UserError
from fibopolicy.policies.base import PolicyConfig

SOURCE = """
from torch.nn import functional as F
from fibopolicy.policies.base import masked_mean
from fibopolicy.policies.bc import BCPolicy

class HuberBC(BCPolicy):
    def loss(self, batch, rng):
        predicted, wanted = self.predict(batch["obs"], rng), self.actions(batch["actions"])
        loss = masked_mean(F.huber_loss(predicted, wanted, reduction="none"), batch["action_mask"])
        return loss, {"huber": float(loss.detach())}

def function():
    return None
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_policy.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_policy", raising=False)
    return tmp_path


def test_a_policy_from_a_file_trains_and_acts(
    here: Path,
    lift_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = f"--dataset {lift_file} --out run --steps 2 --batch-size 2 --encoder vit_tiny"
    policy = ("--policy", "my_policy:HuberBC", *TINY_ENCODER_OPTIONS)
    code, _, errors = call(monkeypatch, capsys, "train", *options.split(), *policy)
    assert code == 0, errors
    assert '"huber"' in (here / "run" / "metrics.jsonl").read_text()
    runner = load("run")
    assert type(runner.policy).__name__ == "HuberBC"
    assert runner.act(runner.noise()).dtype == np.float32


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_policy:function", "must be a class derived from fibopolicy.policies.Policy"),
        ("my_policy:HuberBCC", "has no HuberBCC, did you mean HuberBC"),
        ("no_policy:HuberBC", "there is no module no_policy"),
    ],
)
def test_what_is_not_a_policy_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        PolicyConfig(policy=name)
    assert "\n" not in str(error.value)
