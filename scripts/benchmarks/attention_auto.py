"""Where sparse CPU kernels stop being faster than masked dense attention, by length
and share of kept pairs.

    python scripts/benchmarks/attention_auto.py --hardware epyc-2-threads

Writes docs/benchmarks/attention_auto_<hardware>_<date>.json;
`fibopolicy/attention/functional.py` holds the rule derived from it.
"""

from __future__ import annotations

import results
import torch

from fibopolicy.attention import LocalPattern, fibottention
from fibopolicy.attention.profile import Report, interleave, ratios

LENGTHS = (16, 36, 64, 100, 196, 400)
SHARES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
BATCHES = (1, 16)


def main() -> None:
    options = results.hardware_options(__doc__, turns=9)

    torch.manual_seed(0)
    rows = []
    print("| B, N | kept | forward | forward + backward |\n|---|---|---|---|")
    for batch in BATCHES:
        for num_tokens in LENGTHS:
            for share in SHARES:
                pattern = LocalPattern(num_tokens, 6, target=share)
                inputs = [
                    torch.randn(batch, 6, num_tokens + 1, 64, requires_grad=True) for _ in range(3)
                ]
                grad = torch.randn_like(inputs[0])

                def forward(
                    backend: str,
                    pattern: LocalPattern = pattern,
                    inputs: list[torch.Tensor] = inputs,
                ) -> torch.Tensor:
                    return fibottention(*inputs, pattern, backend=backend)

                def both(
                    backend: str, inputs: list[torch.Tensor] = inputs, grad: torch.Tensor = grad
                ) -> object:
                    return torch.autograd.grad(forward(backend), inputs, grad)

                row = {"batch": batch, "num_tokens": num_tokens, "kept_share": pattern.kept_share}
                for name, run in (("forward", forward), ("forward+backward", both)):
                    runs = {
                        backend: (lambda run=run, backend=backend: run(backend))
                        for backend in ("sdpa", "numba")
                    }
                    seconds = interleave(runs, options.turns, "cpu")
                    row[name] = ratios(seconds["sdpa"], seconds["numba"])[1]
                rows.append(row)
                speedups = " | ".join(
                    f"{row[name]:.2f}x" for name in ("forward", "forward+backward")
                )
                print(
                    f"| {batch}, {num_tokens} | {row['kept_share']:.0%} | {speedups} |", flush=True
                )
    report = Report("attention_auto", rows)
    report.write(
        options.out / f"attention_auto_{options.hardware}_{report.environment['date']}.json"
    )


if __name__ == "__main__":
    main()
