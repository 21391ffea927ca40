"""Where the time of a training goes, what memory it takes, and the table at its end."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from fibopolicy.utils.system import peak_memory_bytes


class Meter:
    """Adds up steps; `figures` tells about those since it was last asked, `total` about
    all.

    Args:
        device: of the model; a GPU's memory is told as well.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recent = _Sums()
        self.total = _Sums()

    def add(self, samples: int, waited: float, seconds: float) -> None:
        """A step of `samples` that took `seconds`, of which it `waited` for its data."""
        for sums in (self._recent, self.total):
            sums.samples += samples
            sums.waited += waited
            sums.seconds += seconds

    def figures(self) -> dict[str, float]:
        """To log: `samples_per_s`, `data_share` in [0, 1], `memory_gb` (resident,
        mapped frames included), `gpu_memory_gb` (the highest so far).
        """
        sums, self._recent = self._recent, _Sums()
        told = {
            "samples_per_s": sums.samples_per_s,
            "data_share": sums.data_share,
            "memory_gb": resident_gb(),
        }
        if self._device.type == "cuda":
            told["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        return told


@dataclass
class _Sums:
    samples: int = 0
    waited: float = 0.0
    seconds: float = 0.0

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def data_share(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0


def resident_gb() -> float:
    """Memory of this process now; elsewhere than on Linux, the highest so far."""
    try:
        return (
            int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
            * resource.getpagesize()
            / 1e9
        )
    except OSError:
        return peak_memory_bytes() / 1e9


@dataclass(frozen=True)
class Summary:
    """What a training gave and took.

    Attributes:
        steps: gradient steps of the weights.
        loss: mean over the last logged rows.
        validation_loss: the last; `None` without validation.
        seconds: wall time now, without what was done before a resume.
        samples_per_s, data_share: over the steps done now; 0 where there were none.
        peak_gb: highest resident memory of the process; `gpu_gb` of tensors on the GPU,
            `None` without one.
    """

    steps: int
    loss: float | None
    validation_loss: float | None
    seconds: float
    samples_per_s: float
    data_share: float
    peak_gb: float
    gpu_gb: float | None

    def table(self) -> str:
        """Plain text, one figure a line."""
        rows = {
            "steps": f"{self.steps}",
            "loss": "" if self.loss is None else f"{self.loss:.5g}",
            "validation loss": ""
            if self.validation_loss is None
            else f"{self.validation_loss:.5g}",
            "time": f"{self.seconds:.1f} s",
            "throughput": f"{self.samples_per_s:.0f} samples/s" if self.samples_per_s else "",
            "waiting for data": f"{100 * self.data_share:.1f} % of the steps"
            if self.samples_per_s
            else "",
            "peak memory": f"{self.peak_gb:.2f} GB",
            "GPU memory": "" if self.gpu_gb is None else f"{self.gpu_gb:.2f} GB",
        }
        rows = {name: value for name, value in rows.items() if value}
        return "\n".join(f"{name:<{max(map(len, rows))}}  {value}" for name, value in rows.items())
