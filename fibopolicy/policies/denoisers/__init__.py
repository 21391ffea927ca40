"""Networks that turn a noisy chunk of actions into what a diffusion or flow head asks
for, given observations.
"""

from __future__ import annotations

from collections.abc import Callable

from fibopolicy.errors import unknown
from fibopolicy.policies.denoisers.base import Denoiser
from fibopolicy.policies.denoisers.transformer import TransformerDenoiser
from fibopolicy.policies.denoisers.unet import UNetDenoiser

DENOISERS: dict[str, Callable[..., Denoiser]] = {
    "unet": UNetDenoiser,
    "transformer": TransformerDenoiser,
}


def denoiser_class(name: str) -> Callable[..., Denoiser]:
    """The denoiser of a name, which takes what `Denoiser` says.

    Raises:
        UserError: no such denoiser, with the nearest match suggested.
    """
    if name not in DENOISERS:
        raise unknown("denoiser", name, DENOISERS)
    return DENOISERS[name]


__all__ = ["DENOISERS", "Denoiser", "denoiser_class"]
