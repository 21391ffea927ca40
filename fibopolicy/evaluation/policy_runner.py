"""Act with a policy: on a robot, one observation after the other, or for many episodes
of an evaluation, such that no episode's actions depend on the others.

The number of rows changes the last bits of a matrix product, and contacts amplify them
until an episode that succeeded fails. Therefore every call has `batch_size` rows,
padded if fewer episodes wait. In the networks of this library, the bits of a row then
do not depend on the other rows; `make_runner` verifies that before relying on it.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import Episode
from fibopolicy.policies import Policy, Shapes
from fibopolicy.policies.run_directory import load_policy, resolve_run
from fibopolicy.utils.files import StrPath
from fibopolicy.utils.gpu_memory import batch_that_fits
from fibopolicy.utils.system import torch_threads

#: Default rows in a call: hardly slower than one row, and enough to share the overhead.
BATCH_SIZE = 4
_OUT_OF_MEMORY: Any = object()
#: Shape and dtype of each observation key.
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


def load(
    run: StrPath,
    *,
    checkpoint: str = "ema",
    device: str | None = None,
    threads: int = 1,
    task: str | None = None,
) -> PolicyRunner:
    """Load the policy of a run to act with it. It is called once on noise, since a
    first call takes seconds: it compiles kernels and starts the GPU.

    Args:
        run: the directory of a training run, a robomimic checkpoint (.pth),
            "hub:OWNER/NAME" or "example:reach".
        checkpoint: "ema", the moving average of the weights; "model"; or one of the
            best, as "best/step_001000".
        device: "cpu", "cuda:1", ...; by default a GPU if there is one.
        threads: CPU threads of torch during a call.
        task: what to do, if the policy is conditioned on the task.

    Raises:
        UserError: not a run, no such checkpoint, no such device, or no such task.

    Example:
        ```python
        from fibopolicy import load

        runner = load("runs/lift")
        runner.reset()  # at the start of each episode
        action = runner.act(observation)  # at each control step
        ```
    """
    policy = load_policy(resolve_run(run), checkpoint=checkpoint, device=device, task=task).policy
    runner = PolicyRunner(policy, threads=threads)
    runner.act(runner.noise())
    runner.reset()
    return runner


class PolicyRunner:
    """Runs a policy.

    On a robot, `reset` begins an episode and `act` maps an observation to an action.
    The runner keeps the last observations, the actions of a chunk that are still to be
    executed, and the policy's state. An evaluation calls `act_batch` instead, for
    several episodes at once with a fixed number of rows.

    Args:
        policy: an object with `act(obs, state) -> (actions, state)` as in
            `fibopolicy.policies.Policy`, called with `batch_size` rows. Its state is
            `None`, or tensors in dicts, lists and tuples. Their dimension
            `policy.state_batch_dim` (default 0) counts the rows; anything else in the
            state must be equal for rows to share a call. With a batch of one, the state
            may be any object. A policy may also be a plain function that maps the
            newest observation of one episode, a dict of arrays, to an action `(A,)` or
            a chunk `(T_a, A)`. Both are called without gradients and may return
            anything that numpy reads as numbers.
        batch_size: rows in each call. With 1, random numbers that the policy draws from
            torch, numpy or random depend only on the episode and its decision. With
            more, a policy that draws random numbers does not repeat.
        threads: torch threads during the calls; another number changes the last bits.

    Attributes:
        device, dtype: device and dtype of the policy's weights.
        layout: shape and dtype of each observation that the policy reads: images uint8
            `(H, W, 3)`, RGB, and vectors float32 `(D,)`. `None` for a policy that is
            not of this library.

    Raises:
        UserError: not a policy, a policy in training mode, or a number below 1.
    """

    def __init__(self, policy: Any, *, batch_size: int = 1, threads: int = 1) -> None:
        has_act = callable(getattr(policy, "act", None))
        if isinstance(policy, type) or not (has_act or callable(policy)):
            raise UserError(
                "a policy has a method act(obs, state), or is a function of an observation; got"
                f" {policy!r}"[:300]
            )
        if batch_size < 1 or threads < 1:
            raise UserError(
                f"batch_size and threads must be at least 1, got {batch_size} and {threads}"
            )
        if not has_act and batch_size > 1:
            raise UserError(
                "a function acts on one episode at a time, so batch_size is 1; pass an object with"
                " act(obs, state)"
            )
        if isinstance(policy, nn.Module) and policy.training:
            raise UserError(
                "the policy is in training mode, which augments or drops its inputs; call"
                " policy.eval() first"
            )
        self.policy, self.batch_size, self.threads = policy, batch_size, threads
        self._act = policy.act if has_act else functools.partial(_act_with_function, policy)
        own = getattr(policy, "n_obs_steps", 1)
        self.n_obs_steps = int(getattr(getattr(policy, "config", None), "n_obs_steps", own))
        parameters = policy.parameters() if isinstance(policy, nn.Module) else iter(())
        weights = next((p for p in parameters), torch.empty(0))
        self.device, self.dtype = weights.device, weights.dtype
        shapes = trained_shapes(policy)
        self.layout = None if shapes is None else layout_of(shapes)
        self._state_dim = int(getattr(policy, "state_batch_dim", 0))
        self.reset()

    def reset(self) -> None:
        """Begin an episode: forget the observations and actions of the last one."""
        self._episode = Episode(0)
        self._window: deque[dict[str, NDArray[Any]]] = deque(maxlen=self.n_obs_steps)
        self._actions: deque[NDArray[np.float32]] = deque()

    def act(self, observation: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The action `(A,)` for this control step. Call it at every step, as long as an
        episode lasts; the policy itself runs once per chunk of actions.

        Args:
            observation: observation of this step, as in `layout`, without a batch
                dimension. Vectors may be of any float type. Other keys are ignored. The
                arrays are copied, so that a driver may reuse them.

        Raises:
            UserError: an observation is missing, has another shape or type, or is not
                finite; the policy does not return finite actions. The episode state is
                unchanged, so that the call may be repeated.
        """
        obs = self._checked(observation)
        window = deque(self._window or [obs] * self.n_obs_steps, self.n_obs_steps)
        window.append(obs)
        if not self._actions:
            self._episode.window = {key: np.stack([o[key] for o in window]) for key in obs}
            with preserved_randomness():
                self._actions.extend(self.act_batch([self._episode])[0])
        self._window = window
        return self._actions.popleft()

    def _checked(self, observation: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Copies of the arrays that the policy reads."""
        if not isinstance(observation, Mapping):
            raise UserError(f"an observation is a dict of arrays, got {_described(observation)}")
        layout = self.layout
        if layout is None:
            return {key: np.array(value) for key, value in observation.items()}
        checked = {}
        for key, (shape, dtype) in layout.items():
            if key not in observation:
                raise UserError(
                    f"observation {key!r} is missing; the policy reads {', '.join(layout)}, got"
                    f" {', '.join(map(str, observation)) or 'nothing'}"
                )
            value = observation[key]
            is_image, array = dtype == np.uint8, isinstance(value, np.ndarray)
            fits = array and (value.dtype == dtype if is_image else value.dtype.kind == "f")
            if not fits or value.shape != shape:
                found = f"{value.dtype} {value.shape}" if array else f"a {type(value).__name__}"
                kind = "height x width x RGB" if is_image else "a vector"
                raise UserError(
                    f"observation {key!r} is {found}, expected a numpy array {dtype} {shape}:"
                    f" {kind} of one instant, without a batch dimension"
                )
            if not is_image and not np.isfinite(value).all():
                raise UserError(f"observation {key!r} is not finite: {value.tolist()}"[:300])
            checked[key] = np.array(value, dtype, order="C")
        return checked

    def noise(self) -> dict[str, NDArray[Any]]:
        """A random observation as in `layout`."""
        rng = np.random.default_rng(0)
        layout = self.layout or {}
        return {key: _noise(rng, shape, dtype) for key, (shape, dtype) in layout.items()}

    def act_batch(self, episodes: Sequence[Episode]) -> list[NDArray[np.float32]]:
        """Actions `(T_a, A)` for each of at most `batch_size` episodes.

        Reads their `window` and `state`; updates their `state` and `decision`.

        Raises:
            UserError: the policy does not return finite actions `(batch_size, T_a, A)`.
        """
        # An episode at its start has no state, so it cannot share a call with later
        # ones.
        groups: dict[Any, list[int]] = {}
        for i, episode in enumerate(episodes):
            key = tuple(_structure(episode.state)) if self.batch_size > 1 else i
            groups.setdefault(key, []).append(i)
        answers: dict[int, NDArray[np.float32]] = {}
        with torch_threads(self.threads):
            for group in groups.values():
                actions, states = self._call([episodes[i] for i in group])
                for i, action, state in zip(group, actions, states, strict=True):
                    answers[i] = action
                    episodes[i].state, episodes[i].decision = state, episodes[i].decision + 1
        return [answers[i] for i in range(len(episodes))]

    def _call(self, episodes: list[Episode]) -> tuple[list[NDArray[np.float32]], list[Any]]:
        if self.batch_size == 1:
            _seed(episodes[0])
        rows = [*episodes, *[episodes[0]] * (self.batch_size - len(episodes))]
        keys = [key for key in rows[0].window if self.layout is None or key in self.layout]
        # Torch aligns its memory; the last bits of a product may depend on alignment.
        obs = {
            key: torch.stack([torch.from_numpy(row.window[key]) for row in rows]).to(self.device)
            for key in keys
        }
        states = [row.state for row in rows]
        state = states[0] if self.batch_size == 1 else _concatenate(states, self._state_dim)
        # Inference mode would leave tensors in a policy's caches that training cannot
        # use.
        returned = _OUT_OF_MEMORY
        with torch.no_grad(), contextlib.suppress(torch.OutOfMemoryError):
            returned = self._act(obs, state)
        if returned is _OUT_OF_MEMORY:
            raise self._out_of_memory(obs)

        expected = f"actions ({self.batch_size}, T_a, A) and a state"
        if not isinstance(returned, tuple | list) or len(returned) != 2:
            raise UserError(
                f"the policy's act returned {_described(returned)}, expected a pair: {expected}"
            )
        array, state = _as_array(returned[0], "the policy's act", expected), returned[1]
        if array.ndim != 3 or len(array) != self.batch_size:
            raise UserError(f"the policy's act returned actions {array.shape}, expected {expected}")
        if array.size == 0:
            raise UserError(f"the policy returned no actions {array.shape}, expected {expected}")
        for actions, episode in zip(array, episodes, strict=False):
            if not np.isfinite(actions).all():
                raise UserError(
                    "the policy returned actions that are not finite in episode"
                    f" {episode.index}: {actions.tolist()}"[:300]
                )
        count = range(len(episodes))
        states = (
            [state] if self.batch_size == 1 else [_row(state, i, self._state_dim) for i in count]
        )
        return [np.array(array[i]) for i in count], states

    def _out_of_memory(self, obs: dict[str, Tensor]) -> UserError:
        def run(rows: int) -> None:
            with torch.no_grad():
                self._act({key: value[:rows] for key, value in obs.items()}, None)

        fits = batch_that_fits(run, self.batch_size, self.device)
        advice = f"about {fits} fit, pass --batch-size {fits}" if fits else "use --device cpu"
        return UserError(
            f"the memory of {self.device} is too small for a policy call of {self.batch_size}"
            f" rows; {advice}"
        )

    def is_row_independent(self, layout: Layout) -> bool:
        """Whether the actions of a row are the same bits at any place among any other
        rows.

        Tested on random observations, without a state.
        """
        rng = np.random.default_rng(0)
        windows = [
            {
                key: _noise(rng, (self.n_obs_steps, *shape), dtype)
                for key, (shape, dtype) in layout.items()
            }
            for _ in range(self.batch_size)
        ]
        forward = self.act_batch([Episode(i, window) for i, window in enumerate(windows)])
        backward = self.act_batch([Episode(i, window) for i, window in enumerate(windows)][::-1])
        alone = self.act_batch([Episode(0, windows[0])])
        return all(map(np.array_equal, [*forward, forward[0]], [*backward[::-1], alone[0]]))


def make_runner(policy: Any, batch_size: int | None, threads: int, layout: Layout) -> PolicyRunner:
    """A runner with calls of `batch_size` rows whose results are known to repeat.

    `None` takes `BATCH_SIZE` for a policy of this library with independent rows, else
    1: any other policy may draw random numbers or mix its rows, and then only a batch
    of one repeats.

    Raises:
        UserError: the rows of a larger batch depend on each other.
    """
    if batch_size == 1 or (batch_size is None and not isinstance(policy, Policy)):
        return PolicyRunner(policy, batch_size=1, threads=threads)
    runner = PolicyRunner(policy, batch_size=batch_size or BATCH_SIZE, threads=threads)
    with preserved_randomness():
        if runner.is_row_independent(layout):
            return runner
    if batch_size is None:
        return PolicyRunner(policy, batch_size=1, threads=threads)
    raise UserError(
        f"in a batch of {batch_size}, this policy's actions for an episode depend on the other"
        " episodes or on random numbers, so rows would depend on the number of workers; use"
        " batch_size 1"
    )


def trained_shapes(policy: Any) -> Shapes | None:
    """The attribute `shapes` of a policy of this library: its training observations."""
    shapes = getattr(policy, "shapes", None)
    return shapes if isinstance(shapes, Shapes) else None


def layout_of(shapes: Shapes) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of each observation that a policy reads."""
    uint8, float32 = np.dtype(np.uint8), np.dtype(np.float32)
    images = {key: ((*size, 3), uint8) for key, size in shapes.images.items()}
    return images | {key: ((dim,), float32) for key, dim in shapes.vectors.items()}


def _act_with_function(
    function: Callable[[dict[str, NDArray[Any]]], Any], obs: dict[str, Tensor], state: None
) -> tuple[NDArray[np.float32], None]:
    """Call a function of one episode's newest observation like a policy."""
    returned = function({key: value[0, -1].numpy() for key, value in obs.items()})
    expected = "an action (A,) or a chunk of them (T_a, A)"
    actions = np.atleast_2d(_as_array(returned, "the policy", expected))
    if actions.ndim != 2:
        raise UserError(
            f"the policy returned actions of shape {actions.shape}, expected {expected}"
        )
    return actions[None], None


def _as_array(returned: Any, source: str, expected: str) -> NDArray[np.float32]:
    """Numbers of any kind as float32.

    Raises:
        UserError: it holds anything else, such as a dictionary or nothing.
    """
    try:
        if isinstance(returned, Tensor):
            return returned.detach().to("cpu", torch.float32).numpy()
        array = np.asarray(returned)
        if array.dtype.kind in "iuf":
            return array.astype(np.float32)
    except (TypeError, ValueError, RuntimeError):
        pass  # ragged lists, lists of tensors with gradients, complex tensors
    raise UserError(f"{source} returned {_described(returned)}, expected {expected} as numbers")


def _described(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
    short = value is None or isinstance(value, str)
    return f"{value!r}"[:60] if short else f"a {type(value).__name__}{shape}"


def _noise(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype == np.uint8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    return rng.normal(size=shape).astype(dtype)


def _seed(episode: Episode) -> None:
    """Seed all global generators from the episode and its decision only."""
    sequence = np.random.SeedSequence([episode.index, episode.decision])
    seed = int(sequence.generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (a user's policy may draw from it)
    random.seed(seed)


@contextlib.contextmanager
def preserved_randomness() -> Iterator[None]:
    """Restore the caller's global random state afterwards."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])


# A policy's state is a tree: dicts, lists and tuples of tensors and anything else.


def _structure(state: Any) -> Iterator[tuple[Any, ...]]:
    """Everything that states must have in common to share a call."""
    if isinstance(state, Tensor):
        yield ("tensor", tuple(state.shape), state.dtype)
    elif isinstance(state, Mapping):
        yield ("dict", tuple(state))
        for value in state.values():
            yield from _structure(value)
    elif isinstance(state, list | tuple):
        yield (type(state).__name__, len(state))
        for value in state:
            yield from _structure(value)
    else:
        yield ("value", state)


def _concatenate(states: list[Any], dim: int) -> Any:
    return _map_tensors(lambda parts: torch.cat(parts, dim), states)


def _row(state: Any, i: int, dim: int) -> Any:
    # A copy: a view would keep the whole batch in memory as long as the episode lasts.
    return _map_tensors(lambda parts: parts[0].narrow(dim, i, 1).clone(), [state])


def _map_tensors(function: Callable[[list[Tensor]], Tensor], states: list[Any]) -> Any:
    """Apply `function` to the tensors at each place of several states; keep the first
    state's value everywhere else.
    """
    first = states[0]
    if isinstance(first, Tensor):
        return function(states)
    if isinstance(first, Mapping):
        return {key: _map_tensors(function, [state[key] for state in states]) for key in first}
    if isinstance(first, list | tuple):
        values = [_map_tensors(function, list(parts)) for parts in zip(*states, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    return first
