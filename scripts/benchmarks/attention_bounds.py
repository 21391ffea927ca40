"""The time that the Triton kernels need at least on an H200, without a GPU: from the
instructions of the compiled kernels and the bytes that they load.

    python scripts/benchmarks/attention_bounds.py

For bfloat16 and head dimension 64, one row for each problem whose dense attention was timed
on an H200 (docs/benchmarks/attention_h200_graph_2026-11-26.json). "issue" is the time to
issue all instructions of the loops over offsets, "L2" the time to load their rows if no two
programs and no two offsets share a load. A kernel takes at least its issue time, and its L2
time unless a row that it loads for two offsets comes from the L1 cache or shared memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import attention_registers
from attention_registers import TOOLS, assemble, compile_to_ptx

from fibopolicy.attention import FibottentionPattern, cuda

DENSE = Path(__file__).parents[2] / "docs/benchmarks/attention_h200_graph_2026-11-26.json"
DIM, DTYPE, ARCH = 64, "bf16", 90
#: An H200: multiprocessors x schedulers x instructions per second; bytes per second from
#: its L2 cache.
INSTRUCTIONS_PER_S, L2_BYTES_PER_S = 132 * 4 * 1.755e9, 5.5e12
#: Signed offsets that one turn of a kernel's loop handles.
OFFSETS_PER_TURN = {"forward": 2, "backward_queries": 1, "backward_keys": 1}


def instructions_per_turn(kernel: str) -> int:
    """Instructions that one turn of the kernel's loop over offsets issues, all warps."""
    compiled = compile_to_ptx(kernel, ARCH, DTYPE, DIM, zero_logit=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(assemble(compiled.asm["ptx"])[1])
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
    fewest = min(multiplying, key=lambda loop: sum("MUFU" in one for one in loop))
    tiling = cuda.choose_tiling(kernel, attention_registers.DTYPES[DTYPE], DIM)
    return len(fewest) * tiling.warps


def main() -> None:
    timings = json.loads(DENSE.read_text(encoding="utf-8"))["timings"]
    turns = {kernel: instructions_per_turn(kernel) for kernel in OFFSETS_PER_TURN}
    rows = 16 * cuda.choose_tiling("forward", attention_registers.DTYPES[DTYPE], DIM).groups
    pair = {kernel: turns[kernel] / rows / OFFSETS_PER_TURN[kernel] for kernel in turns}
    print("instructions per row and offset:", {k: round(v, 1) for k, v in pair.items()})
    print("| B,h,N | forward: dense, issue, L2 (us) | at most | both: dense, issue, L2 | at most |")
    print("|---|---|---|---|---|")
    for timing in timings:
        if timing["dtype"] != "bfloat16":
            continue
        batch, heads, tokens = timing["shape"]
        offsets = FibottentionPattern(tokens, heads).offsets
        blocks = -(-tokens // rows)
        # Main diagonals are taken twice, masked once; every row takes the CLS token too.
        tiles = batch * blocks * sum(2 * len(kept) + 1 for kept in offsets)
        loads = batch * sum(
            tokens + sum((tokens - o) * (2 if o else 1) for o in kept) for kept in offsets
        )
        cells = []
        for which, kernels in (("forward", ["forward"]), ("both", list(turns))):
            issue = 1e6 * tiles * rows * sum(pair[k] for k in kernels) / INSTRUCTIONS_PER_S
            moved = 1e6 * loads * 2 * 2 * DIM * len(kernels) / L2_BYTES_PER_S
            dense = timing[f"dense_{which}"]
            cells.append(f"{dense:.0f}, {issue:.1f}, {moved:.1f}")
            cells.append(f"{dense / max(issue, moved):.1f}x, {dense / issue:.1f}x")
        print(f"| {batch},{heads},{tokens} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
