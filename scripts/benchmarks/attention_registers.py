"""Registers, spills and shared memory of the Triton kernels, compiled for GPUs that need
not be there.

    python scripts/benchmarks/attention_registers.py --archs 80 90 100

One row for each kernel, dtype and head dimension, tiled as `fibopolicy/attention/cuda.py`
tiles it. Fails if a kernel spills registers to memory.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fibopolicy.attention import cuda, triton_kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (16, 32, 64, 128, 256)
_FLOAT32 = ("LSE", "DELTA", "SUMS", "PARTIAL", "PARTIAL_K", "PARTIAL_V")


class Resources(NamedTuple):
    """What a program of a compiled kernel takes; `spills` in bytes."""

    registers: int
    spills: int
    shared_bytes: int


def compile_kernel(name: str, arch: int, dtype: str, d: int, *, zero_logit: bool) -> Resources:
    """What a kernel takes, see `compiled_kernel`."""
    compiled = compiled_kernel(name, arch, dtype, d, zero_logit=zero_logit)
    return _resources(compiled.asm["ptx"], compiled.metadata.shared)


def compiled_kernel(name: str, arch: int, dtype: str, d: int, *, zero_logit: bool) -> Any:
    """A kernel compiled for compute capability `arch` / 10, aligned tensors and a CLS token."""
    kernel = getattr(triton_kernels, name)
    tiling = cuda.choose_tiling(name, DTYPES[dtype], d)
    constants: dict[str, Any] = cuda.constants(tiling, 1, d, zero_logit)
    signature, aligned = {}, {}
    for position, parameter in enumerate(kernel.params):
        which = parameter.name
        if parameter.is_constexpr:
            signature[which] = "constexpr"
            continue
        if which.isupper():
            signature[which] = "*" + (
                "i32" if which == "TABLE" else "fp32" if which in _FLOAT32 else dtype
            )
        else:
            signature[which] = "fp32" if which == "scale" else "i32"
        if which.isupper() or re.fullmatch("[xogd]_[bht]", which):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tiling.warps, "num_stages": tiling.stages},
    )


def _resources(ptx: str, shared_bytes: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        target = re.search(r"\.target (\w+)", ptx)
        assert target is not None
        report = subprocess.run(
            [
                _ptxas(),
                "-v",
                f"-arch={target[1]}",
                str(path),
                "-o",
                str(path.with_suffix(".cubin")),
            ],
            capture_output=True,
            encoding="utf-8",
            check=True,
        ).stderr
    (registers,) = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill", report)
    return Resources(int(registers), sum(map(int, spills)), shared_bytes)


#: Nvidia's programs that Triton brings.
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _ptxas() -> str:
    """The newest assembler."""
    return str(max(TOOLS.glob("ptxas*"), key=lambda path: len(path.name)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", type=int, default=[80, 90, 100])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--kernels", nargs="+", choices=cuda.TILINGS, default=list(cuda.TILINGS))
    parser.add_argument("--maskings", nargs="+", default=["neg_inf", "zero_logit"])
    options = parser.parse_args()
    print("| arch | dtype | d | kernel | masking | registers | spills | shared bytes |")
    print("|---|---|---|---|---|---|---|---|")
    spilling = 0
    for arch, dtype, d, name, masking in itertools.product(
        options.archs, options.dtypes, options.dims, options.kernels, options.maskings
    ):
        found = compile_kernel(name, arch, dtype, d, zero_logit=masking == "zero_logit")
        spilling += found.spills > 0
        print(
            f"| {arch} | {dtype} | {d} | {name} | {masking} | {found.registers} | {found.spills} |"
            f" {found.shared_bytes} |",
            flush=True,
        )
    if spilling:
        raise SystemExit(f"{spilling} kernels spill registers")


if __name__ == "__main__":
    main()
