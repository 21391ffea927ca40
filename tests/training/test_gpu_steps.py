"""What a training does on a GPU only, tested on a CPU.

A tape stands for a CUDA graph: recording notes every operation of a step, and a replay
executes them again on the same memory, without the Python code of the step.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fibopolicy.attention.patterns import _device_mask
from fibopolicy.datasets import Mixture, Windows
from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import Episode
from fibopolicy.evaluation.policy_runner import PolicyRunner
from fibopolicy.policies import PolicyConfig
from fibopolicy.training import ComputeConfig, TrainConfig
from fibopolicy.training.cuda_graph import WARM_UP, Recorded, can_record
from fibopolicy.training.data import leaves, open_dataset
from fibopolicy.training.distributed import World
from fibopolicy.training.loader import BatchLoader, make_loader, resident_frames
from fibopolicy.training.optim import OptimizerConfig, build_optimizer, load_optimizer
from fibopolicy.training.trainer import PolicyLoss, Trainer, train

CPU = torch.device("cpu")
#: Operations that a graph refuses: they wait for the device, or copy from ordinary
#: memory.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh")


class Tape(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.generators = [torch.default_generator]

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} is not permitted when a stream is capturing")
        if (generator := kwargs.get("generator")) is not None:
            assert generator.initial_seed() in [known.initial_seed() for known in self.generators]
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            with torch._C._AutoDispatchBelowAutograd():  # where it was recorded
                again = func(*args, **kwargs)
            several = isinstance(out, tuple | list)
            for old, new in zip(out, again, strict=True) if several else [(out, again)]:
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@dataclass
class Stream:
    """Stands for `torch.cuda.Stream`; the operations of other devices are not recorded."""

    device: torch.device


#: The current stream, last.
CURRENT: list[Stream] = []


@contextmanager
def current_stream(stream: Stream) -> Iterator[None]:
    """Stands for `torch.cuda.stream`."""
    CURRENT.append(stream)
    try:
        yield
    finally:
        CURRENT.pop()


@contextmanager
def recording(tape: Tape, stream: Stream, capture_error_mode: str) -> Iterator[None]:
    """Stands for `torch.cuda.graph`, which records and draws no random numbers."""
    assert stream.device == tape.generators[-1].device
    assert CURRENT[-1] is stream
    assert not gc.isenabled()
    states = [generator.get_state() for generator in tape.generators]
    try:
        with tape:
            yield
    except Exception:
        raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
    for generator, state in zip(tape.generators, states, strict=True):
        generator.set_state(state)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tapes instead of CUDA graphs; attention as torch's operations, which they note."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", current_stream)
    monkeypatch.setenv("FIBOPOLICY_ATTENTION_BACKEND", "sdpa")
    monkeypatch.setattr("fibopolicy.attention.reference.shared_mask", _device_mask)  # as on a GPU


def weights_and_losses(config: TrainConfig, *, recorded: bool) -> tuple[list[Tensor], list[float]]:
    trainer, without_gradients = Trainer(config, World()), []

    def backward(*arguments: Any) -> Tensor:
        without_gradients.append(all(p.grad is None for p in trainer.parameters))
        return trainer._backward(*arguments)

    if recorded:
        trainer.backward = Recorded(backward, trainer.generator, trainer.optimizer.zero_grad)
    losses = [trainer.train_step(step)["loss"] for step in range(WARM_UP + 4)]
    if recorded:  # a recording has their memory, too
        assert without_gradients == [True, False, False, True]
    return [*trainer.policy.state_dict().values()], losses


@pytest.mark.parametrize("encoder", ["vit_tiny", "fibottention_vit_tiny"])
@pytest.mark.parametrize(
    ("policy", "precision"), [("bc", "bf16"), ("diffusion", "fp32"), ("flow", "fp32")]
)
def test_a_recorded_step_computes_what_the_step_does(
    tiny_config: TrainConfig, tapes: None, policy: str, encoder: str, precision: Any
) -> None:
    if policy == "diffusion":
        pytest.importorskip("diffusers")
    recipe = PolicyConfig(
        policy=policy,
        encoder=encoder,
        encoder_options=tiny_config.policy.encoder_options,
        hidden=16,
        shift=2,
    )
    compute = ComputeConfig(precision=precision)
    config = replace(tiny_config, policy=recipe, compute=compute)
    weights, losses = weights_and_losses(config, recorded=False)
    again, losses_again = weights_and_losses(config, recorded=True)
    assert losses == losses_again
    assert all(map(torch.equal, weights, again))


def test_a_step_that_waits_for_the_device_names_the_option_that_helps(
    tiny_config: TrainConfig, tapes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PolicyLoss.forward

    def waiting(self: PolicyLoss, *arguments: Any) -> Any:
        loss, _ = real(self, *arguments)
        return loss, {"loss": float(loss.detach())}

    monkeypatch.setattr(PolicyLoss, "forward", waiting)
    cause = "_local_scalar_dense is not permitted when a stream is capturing"
    with pytest.raises(UserError, match=rf"cannot be recorded .*{cause}\); pass --no-cuda-graph"):
        weights_and_losses(tiny_config, recorded=True)
    assert not CURRENT
    assert gc.isenabled()


def test_a_recording_for_which_memory_is_short_says_so(tapes: None) -> None:
    def full(batch: dict[str, Tensor]) -> Tensor:
        if CURRENT:
            raise torch.OutOfMemoryError("Tried to allocate more than there is")
        return batch["x"]

    recorded = Recorded(full, torch.Generator(), lambda: None)
    for _ in range(WARM_UP):
        recorded({"x": torch.ones(1)})
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        recorded({"x": torch.ones(1)})


def test_only_steps_that_are_the_same_every_time_are_recorded(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpu, policy = torch.device("cuda"), Trainer(tiny_config, World()).policy
    subclass = type("Mine", (type(policy),), {})
    assert can_record(policy, ComputeConfig(), gpu, 1)
    assert not can_record(policy, ComputeConfig(), CPU, 1)
    assert not can_record(policy, ComputeConfig(), gpu, 2)
    assert not can_record(policy, ComputeConfig(accumulate=2), gpu, 1)
    assert not can_record(policy, ComputeConfig(cuda_graph=False), gpu, 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not can_record(policy, ComputeConfig(), gpu, 1)
    monkeypatch.undo()
    policy.__class__ = subclass
    assert not can_record(policy, ComputeConfig(), gpu, 1)


@pytest.mark.parametrize("encoder", ["vit_tiny", "random_vit_tiny"])
def test_attention_that_copies_its_pairs_to_the_gpu_is_not_recorded(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, encoder: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    recipe = replace(tiny_config.policy, encoder=encoder)
    policy = Trainer(replace(tiny_config, policy=recipe), World()).policy
    assert can_record(policy, ComputeConfig(), torch.device("cuda"), 1)
    monkeypatch.setattr("fibopolicy.attention.functional.default_backend", "csr")
    dense = encoder == "vit_tiny"
    assert can_record(policy, ComputeConfig(), torch.device("cuda"), 1) == dense


@pytest.mark.parametrize(("name", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_a_gpu_that_is_named_becomes_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str, current: list[str]
) -> None:
    found: list[str] = []
    monkeypatch.setattr("fibopolicy.training.distributed.resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(str(device)))
    assert str(World().device(name)) == name
    assert found == current


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("n_obs_steps", [1, 2])
def test_batches_read_ahead_and_frames_on_the_device_are_the_same_batches(
    tiny_config: TrainConfig, files: int, n_obs_steps: int
) -> None:
    recipe = replace(tiny_config.policy, n_obs_steps=n_obs_steps)
    dataset: Windows = open_dataset(replace(tiny_config, policy=recipe))
    if files == 2:
        dataset = Mixture([dataset, open_dataset(replace(tiny_config, policy=recipe))])  # type: ignore[list-item]

    def indices(step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return dataset.indices(8, 0, step)

    inline = BatchLoader(dataset, indices, CPU)
    ahead = BatchLoader(dataset, indices, CPU, ahead=2)
    resident = BatchLoader(dataset, indices, CPU, ahead=1, frames=resident_frames(dataset, CPU))
    for step in (0, 1, 2, 7, 3):
        wanted = list(leaves(inline(step)))
        for loader in (ahead, resident):
            assert all(map(torch.equal, wanted, leaves(loader(step))))
    ahead.close()
    resident.close()


def test_an_error_in_the_thread_reaches_the_step(tiny_config: TrainConfig) -> None:
    dataset = open_dataset(tiny_config)
    loader = BatchLoader(dataset, lambda step: dataset.indices(8, 0, -1), CPU, ahead=2)
    with pytest.raises(ValueError, match="step >= 0"):
        loader(0)
    loader.close()


@pytest.mark.parametrize(
    ("room", "runs", "resident"), [(4.1, 1, True), (3.9, 1, False), (8.1, 2, True), (7.9, 2, False)]
)
def test_frames_stay_on_a_gpu_if_all_runs_take_a_quarter_of_its_free_memory(
    tiny_config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    room: float,
    runs: int,
    resident: bool,
) -> None:
    dataset, gpu = open_dataset(tiny_config), torch.device("cuda")
    size = sum(frames.nbytes for frames in resident_frames(dataset, CPU).values())
    free = int(room * size)
    monkeypatch.setenv("FIBOPOLICY_RUNS_PER_GPU", str(runs))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(
        "fibopolicy.training.loader.resident_frames", lambda dataset, device: {"camera": device}
    )
    loader = make_loader(dataset, lambda step: np.arange(8), gpu, ComputeConfig())
    assert bool(loader.frames) == resident
    without = ComputeConfig(frames_on_gpu=False)
    assert not make_loader(dataset, lambda step: np.arange(8), gpu, without).frames


def test_frames_that_do_not_fit_after_all_are_read_from_the_dataset(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(dataset: Windows, device: torch.device) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr("fibopolicy.training.loader.resident_frames", full)
    dataset, gpu = open_dataset(tiny_config), torch.device("cuda")
    assert not make_loader(dataset, lambda step: np.arange(8), gpu, ComputeConfig()).frames


def reading_every(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read metrics only every so many steps, as on a GPU."""
    monkeypatch.setattr(Trainer, "_reads_metrics", lambda self, step: step % steps == 0)


def test_metrics_that_are_read_later_change_no_weight(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = Trainer(tiny_config, World()), Trainer(tiny_config, World())
    every = [trainers[0].train_step(step) for step in range(7)]
    reading_every(3, monkeypatch)
    some = [trainers[1].train_step(step) for step in range(7)]
    assert some == [every[0], {}, {}, every[3], {}, {}, every[6]]
    assert trainers[0].divergence.recent == trainers[1].divergence.recent
    weights, others = (trainer.policy.state_dict().values() for trainer in trainers)
    assert all(map(torch.equal, weights, others))


def test_a_loss_that_is_not_finite_is_found_when_it_is_read(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, real = Trainer(tiny_config, World()), Trainer._backward

    def broken(*arguments: Any) -> Tensor:
        return real(trainer, *arguments) * (math.nan if len(trainer.unread) == 1 else 1.0)

    trainer.backward = broken
    reading_every(3, monkeypatch)
    for step in (0, 1, 2):
        trainer.train_step(step)
    with pytest.raises(UserError, match="the loss is nan at step 2 "):
        trainer.train_step(3)


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(10, 250), (100, 5)])
def test_a_gpu_is_waited_for_at_logged_steps_and_before_checkpoints(
    tiny_config: TrainConfig, log_every: int, checkpoint_every: int
) -> None:
    optimizer = OptimizerConfig(steps=18)
    config = replace(
        tiny_config, optimizer=optimizer, log_every=log_every, checkpoint_every=checkpoint_every
    )
    trainer = Trainer(config, World())
    assert all(map(trainer._reads_metrics, range(18)))
    trainer.device = torch.device("cuda")
    read = [step for step in range(18) if trainer._reads_metrics(step)]
    assert read == ([0, 10, 17] if log_every == 10 else [0, 4, 9, 14, 17])


def test_a_checkpoint_of_a_gpu_resumes_on_a_cpu_with_the_optimizer_of_a_cpu() -> None:
    module = torch.nn.Linear(2, 2)
    fused = torch.optim.AdamW(module.parameters(), fused=True)
    module(torch.ones(2)).sum().backward()
    fused.step()
    ours = build_optimizer(module, OptimizerConfig())
    state = fused.state_dict()
    state["param_groups"] = [
        {**ours.state_dict()["param_groups"][i], "foreach": None, "fused": True} for i in range(2)
    ]
    load_optimizer(ours, state)
    assert [group["foreach"] for group in ours.param_groups] == [True, True]
    assert [group["fused"] for group in ours.param_groups] == [False, False]
    ours.step()


def test_nothing_of_a_training_stays_in_the_memory_of_a_gpu(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[weakref.ref[Trainer]] = []
    emptied: list[bool] = []

    def on_gpu(trainer: Trainer) -> str:
        trainer.device = torch.device("cuda")
        trainers.append(weakref.ref(trainer))
        return "the result"

    monkeypatch.setattr(Trainer, "train", on_gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(trainers[0]() is None))
    assert train(tiny_config) == "the result"
    assert emptied == [True]


class FullGPU:
    """A GPU with room for some samples, told by the memory that `use` takes."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.peak = 100 * room, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, self.free))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)

    def use(self, samples: int) -> None:
        self.peak = 100 * samples
        if self.peak > self.free:
            raise torch.OutOfMemoryError("Tried to allocate more than there is")


@pytest.mark.parametrize(
    ("room", "advice"),
    [
        (5, "about 4 fit: pass --accumulate 2, which computes .*, or --batch-size 4"),
        (3, "about 2 fit: pass --accumulate 4"),
        (0, "and even for one; end other programs"),
    ],
)
def test_a_training_that_does_not_fit_says_which_batch_would(
    tiny_config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    advice: str,
) -> None:
    gpu, real = FullGPU(room, monkeypatch), PolicyLoss.forward

    def forward(self: PolicyLoss, batch: dict[str, Any], rng: Any) -> Any:
        gpu.use(len(batch["actions"]))
        return real(self, batch, rng)

    monkeypatch.setattr(PolicyLoss, "forward", forward)
    monkeypatch.setattr(Tensor, "nbytes", 0)  # nothing to keep for AdamW
    config = replace(tiny_config, out=tmp_path / "run")
    with pytest.raises(UserError, match=f"too small for a step of 8 samples.*{advice}"):
        train(config)


@pytest.mark.parametrize(
    ("calls", "frames", "options"),
    [
        (WARM_UP, {}, ""),
        (WARM_UP + 1, {}, "; to save memory, also pass --no-cuda-graph"),
        (WARM_UP, {"hand": CPU}, "; to save memory, also pass --no-frames-on-gpu"),
    ],
)
def test_one_of_several_processes_that_does_not_fit_computes_no_gradients(
    tiny_config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
    frames: Any,
    options: str,
) -> None:
    monkeypatch.delattr(PolicyLoss, "forward")
    trainer = Trainer(tiny_config, World(size=2))
    trainer.backward = Recorded(trainer._backward, trainer.generator, trainer.optimizer.zero_grad)
    trainer.backward.calls, trainer.batches.frames = calls, frames
    wanted = "too small for a step of 4 samples; pass a larger --accumulate or a smaller"
    with pytest.raises(UserError, match=f"{wanted} --batch-size{options}$"):
        raise trainer.out_of_memory()


def test_a_policy_that_does_not_fit_is_one_line(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("fibopolicy.training.optim.EMA", full)
    with pytest.raises(UserError, match="too small for the policy and its average; end other"):
        train(replace(tiny_config, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_policy_call_that_does_not_fit_says_how_many_rows_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FullGPU(3, monkeypatch)

    class Greedy:
        def act(self, obs: dict[str, Tensor], state: None) -> tuple[Tensor, None]:
            gpu.use(len(obs["hand"]))
            return torch.zeros(len(obs["hand"]), 1, 4), None

    runner = PolicyRunner(Greedy(), batch_size=8)
    episode = Episode(0, {"hand": np.zeros((1, 3), np.float32)})
    with pytest.raises(UserError, match="policy call of 8 rows; about 2 fit, pass --batch-size 2"):
        runner.act_batch([episode])
