"""A policy behind one call for many episodes, whose answer to one never depends on the
others.

A matrix product gives other last bits for another number of rows, and contacts amplify
them until an episode fails that succeeded before. So every call has the same number of
rows, `batch`, filled up where fewer episodes wait; row by row our networks then give
the same bits whatever the other rows hold, which is checked on each policy before it is
relied on.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fibopolicy.errors import UserError
from fibopolicy.policies import Shapes
from fibopolicy.utils.system import torch_threads

#: Observations of one episode: `(T_o, ...)` per key.
Window = Mapping[str, NDArray[Any]]


@dataclass
class Request:
    """An episode that waits for actions.

    Args:
        index: the episode's.
        window: what the policy reads, `(T_o, ...)` per key.
        state: what the policy returned to this episode last, `None` at its start.
        decision: how many calls the episode had before.
    """

    index: int
    window: Window
    state: Any = None
    decision: int = 0


class Actor:
    """Answers requests with a policy's actions.

    Args:
        policy: an object with `act(obs, state) -> (actions, state)` as in
            `fibopolicy.policies.Policy`, called with `batch` rows. Its state is `None`,
            or tensors in dicts, lists and tuples, whose dimension
            `policy.state_batch_dim` (0 where there is no such attribute) counts the
            rows; anything else in it must be equal for rows to share a call. A batch of
            one hands the state through untouched, whatever it is. Or a plain function
            of one episode's newest observation, a dict of arrays, that returns an
            action `(A,)` or a chunk `(T_a, A)`. Both are called without gradients and
            may return whatever numpy reads as numbers.
        batch: rows in every call. With 1, random numbers that the policy draws from
            torch, numpy or random depend on the episode and its decision alone; with
            more, no policy that draws any is repeatable.
        threads: of torch, during the calls; others give other bits.
    """

    def __init__(self, policy: Any, *, batch: int = 1, threads: int = 1) -> None:
        if isinstance(policy, type) or not (
            callable(getattr(policy, "act", None)) or callable(policy)
        ):
            raise UserError(
                f"a policy has a method act(obs, state), or is a function of an observation; got {policy!r}"[  # noqa: E501
                    :300
                ]
            )
        if batch < 1 or threads < 1:
            raise UserError(f"batch and threads must be at least 1, got {batch} and {threads}")
        self.function = not hasattr(policy, "act")
        if self.function and batch > 1:
            raise UserError(
                "a function acts on one episode at a time, so its batch is 1; give an object with"
                " act(obs, state)"
            )
        if isinstance(policy, nn.Module) and policy.training:
            raise UserError(
                "the policy is in training mode, which augments or drops what it sees; call"
                " policy.eval() first"
            )
        self.policy, self.batch, self.threads = policy, batch, threads
        config = getattr(policy, "config", None)
        self.n_obs_steps = int(getattr(policy if config is None else config, "n_obs_steps", 1))
        parameters = policy.parameters() if isinstance(policy, nn.Module) else iter(())
        self.device = next((p.device for p in parameters), torch.device("cpu"))
        shapes = trained_shapes(policy)
        #: The observation keys that the policy reads; `None` when it does not say.
        self.reads = None if shapes is None else {*shapes.images, *shapes.vectors}
        self._state_dim = int(getattr(policy, "state_batch_dim", 0))

    def act(self, requests: Sequence[Request]) -> list[NDArray[np.float32]]:
        """Actions `(T_a, A)` for each of at most `batch` requests, whose `state` and
        `decision` move on.

        Raises:
            UserError: the policy returns something else than finite actions `(batch,
                T_a, A)`.
        """
        answers: dict[int, NDArray[np.float32]] = {}
        # Episodes at their start carry no state, so they cannot share a call with
        # others of a policy that has one.
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_kind(request.state) if self.batch > 1 else i, []).append(i)
        with torch_threads(self.threads):
            for group in groups.values():
                actions, states = self._call([requests[i] for i in group])
                for i, action, state in zip(group, actions, states, strict=True):
                    answers[i] = action
                    requests[i].state, requests[i].decision = state, requests[i].decision + 1
        return [answers[i] for i in range(len(requests))]

    def _call(self, requests: list[Request]) -> tuple[list[NDArray[np.float32]], list[Any]]:
        if self.batch == 1:
            _seed(requests[0].index, requests[0].decision)
        if self.function:
            newest = {key: np.array(values[-1]) for key, values in requests[0].window.items()}
            with torch.no_grad():
                returned = self.policy(newest)
            actions = _array(returned, "the policy", "an action (A,) or a chunk of them (T_a, A)")
            return [_checked(np.atleast_2d(actions), requests[0])], [None]
        rows = [*requests, *[requests[0]] * (self.batch - len(requests))]
        keys = [key for key in rows[0].window if self.reads is None or key in self.reads]
        # In torch's own memory, which is aligned: the last bits of a product may depend
        # on that, too.
        obs = {
            key: torch.stack([torch.from_numpy(r.window[key]) for r in rows]).to(self.device)
            for key in keys
        }
        state = (
            rows[0].state if self.batch == 1 else _joined([r.state for r in rows], self._state_dim)
        )
        # inference mode would leave tensors in a policy's caches that no later training
        # could use
        with torch.no_grad():
            returned = self.policy.act(obs, state)
        expected = f"actions ({self.batch}, T_a, A) and a state"
        if not isinstance(returned, tuple | list) or len(returned) != 2:
            raise UserError(
                f"the policy's act returned {_described(returned)}, expected a pair: {expected}"
            )
        actions, state = returned
        array = _array(actions, "the policy's act", expected)
        if array.ndim != 3 or len(array) != self.batch:
            raise UserError(f"the policy's act returned actions {array.shape}, expected {expected}")
        states = (
            [state]
            if self.batch == 1
            else [_row(state, i, self._state_dim) for i in range(len(requests))]
        )
        return [_checked(array[i], request) for i, request in enumerate(requests)], states

    def independent(self, layout: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> bool:
        """Whether each row's actions keep their bits when the rows trade places and
        neighbours, on random observations.

        Args:
            layout: shape and dtype per observation key.
        """
        rng = np.random.default_rng(0)
        windows = [
            {
                key: _noise(rng, (self.n_obs_steps, *shape), dtype)
                for key, (shape, dtype) in layout.items()
            }
            for _ in range(self.batch)
        ]
        there = self.act([Request(i, window) for i, window in enumerate(windows)])
        back = self.act([Request(i, window) for i, window in enumerate(windows)][::-1])[::-1]
        few = self.act([Request(0, windows[0])])
        return all(map(np.array_equal, [*there, there[0]], [*back, few[0]]))


def trained_shapes(policy: Any) -> Shapes | None:
    """What a policy was trained on; `None` for a policy that does not say so in an
    attribute `shapes`.
    """
    shapes = getattr(policy, "shapes", None)
    return shapes if isinstance(shapes, Shapes) else None


def _array(returned: Any, source: str, expected: str) -> NDArray[np.float32]:
    """Numbers of whatever kind as float32.

    Raises:
        UserError: it holds anything else, such as a dictionary or nothing.
    """
    try:
        if isinstance(returned, Tensor):
            return returned.detach().to("cpu", torch.float32).numpy()
        array = np.asarray(returned)
        if array.dtype.kind in "iuf":
            return array.astype(np.float32)
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ):  # ragged lists, lists of tensors with gradients, complex tensors
        pass
    raise UserError(f"{source} returned {_described(returned)}, expected {expected} as numbers")


def _described(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
    return (
        f"{value!r}"[:60]
        if value is None or isinstance(value, str)
        else f"a {type(value).__name__}{shape}"
    )


def _checked(actions: NDArray[np.float32], request: Request) -> NDArray[np.float32]:
    if actions.ndim != 2 or actions.size == 0:
        raise UserError(
            f"the policy returned actions of shape {actions.shape} for an episode, expected"
            " (T_a, A)"
        )
    if not np.isfinite(actions).all():
        raise UserError(
            f"the policy returned actions that are not finite in episode {request.index}: {actions.tolist()}"[  # noqa: E501
                :300
            ]
        )
    return np.array(actions)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    return (
        rng.integers(0, 256, shape, dtype=np.uint8)
        if dtype == np.uint8
        else rng.normal(size=shape).astype(dtype)
    )


def _seed(index: int, decision: int) -> None:
    """Make what the policy draws now depend on the episode and its decision alone."""
    seed = int(np.random.SeedSequence([index, decision]).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Give the caller's random streams back as they were, after policies were seeded."""
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
        random.setstate(kept[2])


# A state is a tree: dicts, lists and tuples around tensors and whatever else.


def _leaves(state: Any) -> Iterator[tuple[Any, ...]]:
    """What states must have in common to be joined."""
    if isinstance(state, Tensor):
        yield ("tensor", tuple(state.shape), state.dtype)
    elif isinstance(state, Mapping):
        yield ("dict", tuple(state))
        for value in state.values():
            yield from _leaves(value)
    elif isinstance(state, list | tuple):
        yield (type(state).__name__, len(state))
        for value in state:
            yield from _leaves(value)
    else:
        yield ("value", state)


def _kind(state: Any) -> tuple[Any, ...]:
    return tuple(_leaves(state))


def _joined(states: list[Any], dim: int) -> Any:
    return _mapped(lambda parts: torch.cat(parts, dim), states)


def _row(state: Any, i: int, dim: int) -> Any:
    # A copy: a view would keep the whole batch's memory for as long as the episode
    # lasts.
    return _mapped(lambda parts: parts[0].narrow(dim, i, 1).clone(), [state])


def _mapped(function: Callable[[list[Tensor]], Tensor], states: list[Any]) -> Any:
    """`function` of the tensors in the same place of each state; anything else is the first's."""
    first = states[0]
    if isinstance(first, Tensor):
        return function(states)
    if isinstance(first, Mapping):
        return {key: _mapped(function, [state[key] for state in states]) for key in first}
    if isinstance(first, list | tuple):
        values = [_mapped(function, list(parts)) for parts in zip(*states, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    return first
