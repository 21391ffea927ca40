"""Test which model families of timm work as encoders.

    python scripts/benchmarks/timm_families.py \\
        --out docs/benchmarks/timm_families_<date>

Takes the smallest model, judged by name, of each module of `timm.list_modules()`, with
random weights. Tests it as an encoder for images of 84 x 84 pixels and, if it rejects
those, of its own size: construction, the shapes of a forward pass, finite gradients of
a backward pass, and the same result after saving and loading the weights. "Refused"
means a one-line `UserError`; any other exception is a fault. Each model runs in its own
process with a time limit. Entries that OUT.json already has are kept.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import results

SIZE = 84
LIMIT_S = 120.0
#: Models are tested in children of a process that has imported everything.
FORK = multiprocessing.get_context("fork")
BATCH = 2
#: Parts of model names, from the smallest models to larger ones.
SMALL = (
    "zepto",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxtiny",
    "xx_small",
    "xxs",
    "xtiny",
    "xs",
    "x_small",
    "mini",
    "tiny",
    "_ti",
)
MEDIUM = ("slim", "small", "_s", "b0", "m0", "t0")
LARGE = (
    "medium",
    "base",
    "large",
    "huge",
    "giant",
    "gigantic",
    "xl",
    "_l",
    "_m",
    "_b1",
    "enormous",
)


def smallest(names: list[str]) -> str:
    """The smallest model, judged by name."""

    def rank(name: str) -> tuple[bool, int, list[int], int]:
        sizes = [i for i, part in enumerate((*SMALL, *MEDIUM)) if part in name]
        return (
            any(part in name for part in LARGE),
            min(sizes, default=99),
            [int(x) for x in re.findall(r"\d+", name)],
            len(name),
        )

    return min([n for n in names if not n.startswith("test_")] or names, key=rank)


def check_model(name: str, size: int) -> dict[str, Any]:
    """Test one model as an encoder for square images: its shapes, or why it fails."""
    import torch

    from fibopolicy.encoders import build_encoder
    from fibopolicy.errors import UserError

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        encoder = build_encoder(f"timm:{name}", image_size=(size, size))
    except UserError as error:
        return {"size": size, "verdict": "refused", "line": str(error)}
    images = torch.rand(BATCH, 3, size, size)
    tokens, feature = encoder(images)
    if tokens.ndim != 3 or len(tokens) != BATCH or feature.shape != (BATCH, encoder.output_dim):
        raise ValueError(f"tokens {tuple(tokens.shape)}, feature {tuple(feature.shape)}")
    (tokens.square().mean() + feature.square().mean()).backward()
    grads = [p.grad for p in encoder.parameters() if p.grad is not None]
    if not grads or not all(grad.isfinite().all() for grad in grads):
        raise ValueError("a gradient is missing or not finite")
    encoder.eval()
    other = build_encoder(f"timm:{name}", image_size=(size, size)).eval()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(encoder.state_dict(), Path(folder) / "weights.pt")
        other.load_state_dict(torch.load(Path(folder) / "weights.pt", weights_only=True))
    with torch.no_grad():
        if not torch.equal(encoder(images)[0], other(images)[0]):
            raise ValueError("loaded weights give a different result")
    shapes = {"tokens": list(tokens.shape[1:]), "feature": feature.shape[1]}
    return {
        "size": size,
        "verdict": "works",
        **shapes,
        "parameters": sum(p.numel() for p in encoder.parameters()),
    }


def in_a_process(name: str, size: int) -> dict[str, Any]:
    here, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_answer, args=(there, name, size))
    process.start()
    there.close()
    try:
        if here.poll(LIMIT_S):
            answer: dict[str, Any] = here.recv()
            return answer
        return {"size": size, "verdict": "not tried", "line": f"took more than {LIMIT_S:.0f} s"}
    except EOFError:
        process.join()
        return {
            "size": size,
            "verdict": "not tried",
            "line": f"ended with code {process.exitcode}, perhaps for lack of memory",
        }
    finally:
        process.kill()
        process.join()


def _answer(pipe: Connection, name: str, size: int) -> None:
    try:
        pipe.send(check_model(name, size))
    except Exception as error:
        pipe.send(
            {
                "size": size,
                "verdict": "fault",
                "line": " ".join(f"{type(error).__name__}: {error}".split())[:300],
            }
        )


def table(document: dict[str, Any]) -> str:
    """The Markdown text of a result: the last trial of each family."""
    rows = ["| family | model | image | tokens (N, D) | feature |", "|---|---|---|---|---|"]
    for family, entry in document["families"].items():
        last = entry["trials"][-1]
        shape = " x ".join(map(str, last.get("tokens", ())))
        line = last.get("line", "")
        answer = shape or (line.partition("pixels: ")[2] or line).replace("|", "\\|")
        rows.append(
            f"| {family} | `{entry['model']}` | {last['size']} | {answer} |"
            f" {last.get('feature', '')} |"
        )
    counts = Counter(entry["trials"][-1]["verdict"] for entry in document["families"].values())
    first = Counter(entry["trials"][0]["verdict"] for entry in document["families"].values())
    versions = (
        f"timm {document['environment'].get('timm')}, torch {document['environment'].get('torch')}"
    )
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    head = (
        f"{versions}. Of {len(document['families'])} families {first['works']} work at {SIZE} x"
        f" {SIZE}; at that or their own size: {said}."
    )
    return f"# timm's model families as encoders\n\n{__doc__}\n{head}\n\n" + "\n".join(rows) + "\n"


def main() -> None:
    parser = results.parser(__doc__)
    options = parser.parse_args()
    from fibopolicy.utils.imports import make_torchvision_importable

    make_torchvision_importable()
    import timm

    import fibopolicy.encoders  # noqa: F401

    began = time.perf_counter()
    path = options.out.with_name(options.out.name + ".json")
    families = json.loads(path.read_text(encoding="utf-8"))["families"] if path.exists() else {}
    for family in timm.list_modules():
        if family in families:
            continue
        model = smallest(timm.list_models(module=family))
        trials = [in_a_process(model, SIZE)]
        config = timm.get_pretrained_cfg(model)
        own = config.input_size[-1] if config else SIZE
        if trials[0]["verdict"] == "refused" and own != SIZE:
            trials.append(in_a_process(model, own))
        families[family] = {"model": model, "trials": trials}
        print(family, model, *(trial["verdict"] for trial in trials), flush=True)
        document = results.described(
            __doc__, "timm_families.py", {"size": SIZE, "batch": BATCH}, began
        )
        document["families"] = dict(sorted(families.items()))
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table(document), encoding="utf-8")


if __name__ == "__main__":
    main()
