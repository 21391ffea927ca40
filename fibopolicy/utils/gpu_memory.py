"""The memory of a GPU: who shares it, and how large a batch fits into it."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Environment variable with the number of runs that share this process's GPU.
RUNS_PER_GPU = "FIBOPOLICY_RUNS_PER_GPU"
#: Share of the free memory that an estimate leaves free.
MARGIN = 0.1


def batch_that_fits(
    run: Callable[[int], object], failed: int, device: torch.device, later: int = 0
) -> int:
    """The largest batch that fits, by estimate, after one of size `failed` did not; 0
    if not even one sample does.

    Halves the batch until it fits, and measures the peak p of the memory that a batch
    of n samples takes. With f bytes free before, (f - `later`) (1 - `MARGIN`) n / p
    samples fit. Call it where no tensor of the failed batch is alive, outside the
    `except` clause.

    Args:
        run: computes a batch of a size.
        later: bytes that the caller will take besides.
    """
    size = failed
    while size := size // 2:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0] - later
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            run(size)
        except torch.OutOfMemoryError:
            continue
        taken = max(1, torch.cuda.max_memory_allocated(device) - before)
        return max(0, min(failed - 1, int((1 - MARGIN) * free * size / taken)))
    return 0
