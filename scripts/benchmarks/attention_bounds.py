"""How fast the Triton kernels can be on an H200, without a GPU: from the instructions of the
compiled kernels and the rows that they load.

    python scripts/benchmarks/attention_bounds.py

One row for each problem whose dense attention was timed on an H200 in bfloat16
(docs/benchmarks/attention_h200_graph_2026-11-26.json): the time of dense attention; the time
to issue the instructions of our loops over keys, a lower bound; the time to load the rows of
all offsets from the L2 cache if no load is shared, an estimate. It also counts the copies
that a turn of a loop starts ahead of their use, and the loads that it waits for.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from attention_registers import TOOLS, compiled_kernel

from fibopolicy.attention import FibottentionPattern, cuda

DENSE = Path(__file__).parents[2] / "docs/benchmarks/attention_h200_graph_2026-11-26.json"
DIM, ARCH = 64, 90
#: An H200: multiprocessors x schedulers x boost clock, instructions per second, and bytes per
#: second from its L2 cache, roughly.
ISSUED_PER_S, L2_BYTES_PER_S = 132 * 4 * 1.98e9, 5.5e12
#: Signed offsets that one turn of a kernel's loop handles.
OFFSETS_PER_TURN = {"forward": 2, "backward_queries": 1, "backward_keys": 1}


class Loop(NamedTuple):
    """A kernel's loop over offsets.

    Attributes:
        per_row: instructions of a warp for a row at one offset.
        ahead: 16-byte copies per thread and turn that are started ahead of their use.
        waited: wide loads per thread and turn whose result the turn waits for.
    """

    per_row: float
    ahead: int
    waited: int


def find_loop(kernel: str) -> Loop:
    compiled = compiled_kernel(kernel, ARCH, "bf16", DIM, zero_logit=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [str(TOOLS / "nvdisasm"), "-c", str(path)]
        text = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
            back = re.search(r"BRA.*`\((\.L_\w+)\)", found[1])
            if back and back[1] in labels:
                loops.append(instructions[labels[back[1]] :])
    # Two loops multiply on tensor cores. That of prefix rows takes exponentials of whole
    # tiles, that of patches of the kept pairs only.
    multiplying = [loop for loop in loops if any("HMMA" in one for one in loop)]
    loop = min(multiplying, key=lambda loop: sum("MUFU" in one for one in loop))
    tiling = cuda.choose_tiling(kernel, torch.bfloat16, DIM)
    rows = 16 * tiling.groups * OFFSETS_PER_TURN[kernel]
    return Loop(
        len(loop) * tiling.warps / rows,
        sum("LDGSTS.E.BYPASS.128" in one for one in loop),
        sum("LDG.E.128" in one for one in loop),
    )


def microseconds(shape: tuple[int, int, int], loops: dict[str, Loop]) -> tuple[float, float]:
    """To issue the instructions of some kernels, and to load their rows from L2."""
    batch, heads, tokens = shape
    issued = loaded = 0.0
    for kernel, loop in loops.items():
        rows = 16 * cuda.choose_tiling(kernel, torch.bfloat16, DIM).groups
        blocks = -(-tokens // rows)
        for offsets in FibottentionPattern(tokens, heads).offsets:
            # A block visits +o and -o for every offset, and the CLS token.
            issued += blocks * rows * (2 * len(offsets) + 1) * loop.per_row
            kept = sum((tokens - o) * (2 if o else 1) for o in offsets)
            loaded += kept * 2 * DIM * torch.bfloat16.itemsize  # two tensors each
    return 1e6 * batch * issued / ISSUED_PER_S, 1e6 * batch * loaded / L2_BYTES_PER_S


def main() -> None:
    timings = json.loads(DENSE.read_text(encoding="utf-8"))["timings"]
    loops = {kernel: find_loop(kernel) for kernel in OFFSETS_PER_TURN}
    for kernel, loop in loops.items():
        print(
            f"{kernel}: {loop.per_row:.1f} instructions per row and offset;"
            f" {loop.ahead} copies ahead, {loop.waited} loads waited for"
        )
    forward = {"forward": loops["forward"]}
    print("| B,h,N | forward: dense | issue | at most | L2 | both: dense | issue | at most | L2 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for timing in timings:
        if timing["dtype"] == "bfloat16":
            cells = [",".join(map(str, timing["shape"]))]
            for which, some in (("forward", forward), ("both", loops)):
                dense, (issue, l2) = timing[f"dense_{which}"], microseconds(timing["shape"], some)
                cells += [f"{dense:.0f}", f"{issue:.1f}", f"{dense / issue:.1f}x", f"{l2:.1f}"]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
