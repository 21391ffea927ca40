"""Tensors into a module, strictly: what does not fit is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from fibopolicy.errors import UserError

#: Names of a kind that a message lists; of more, it says how many.
LISTED = 3


def load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], source: object, advice: str
) -> None:
    """Copies `tensors` into the parameters and buffers of their names; every one of
    them must be there, and no other.

    Args:
        source: what the error names, e.g. a file.
        advice: what the error says to do.

    Raises:
        UserError: weights are missing, unknown or of another shape; the module is then
            unchanged.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    unknown = [name for name in tensors if name not in own]
    shaped = [
        f"{name} {_shape(tensors[name])} where {_shape(own[name])} is expected"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    faults = [
        f"{kind}: {_listed(names)}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("shape", shaped))
        if names
    ]
    if faults:
        raise UserError(f"{source}: its weights do not fit ({'; '.join(faults)}); {advice}")
    module.load_state_dict(tensors)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - LISTED} more" if len(every) > LISTED else ""
    return ", ".join(every[:LISTED]) + more
