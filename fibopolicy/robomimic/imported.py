"""A policy that robomimic trained, behind the interface of our policies."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from fibopolicy.errors import UserError, one_line, unknown
from fibopolicy.policies.base import Metrics, Policy, PolicyConfig, Shapes, State, Statistics
from fibopolicy.policies.observations import check_observations
from fibopolicy.policies.rng import GLOBAL_RNG, EpisodeRng, SampleRng
from fibopolicy.robomimic.checkpoint import Checkpoint
from fibopolicy.robomimic.policies import Memory, act_feedforward, act_recurrent, init_memory
from fibopolicy.utils.system import resolve_device

#: They act without memory, so one object acts for any episode at any time.
ALGORITHMS = ("bc", "bcq", "cql", "iql", "td3_bc", "diffusion_policy")


class ImportedPolicy(Policy):
    """Acts as robomimic's own rollout of a checkpoint does; it cannot be trained.

    `act` returns one action per call, or a chunk of Diffusion Policy, within [-1, 1]
    unless the checkpoint scales actions.

    Raises:
        UserError: an algorithm, network, core or option that the installed robomimic
            does not have, weights that do not fit, or observations that no simulator
            provides.
    """

    name = "robomimic"

    def __init__(self, checkpoint: Checkpoint, device: str | None = "cpu") -> None:
        super().__init__()
        self.device = resolve_device(device)
        self.algorithm = _build_algorithm(checkpoint, self.device)
        self.networks: nn.ModuleDict = self.algorithm.nets
        config, algo = self.algorithm.global_config, self.algorithm.global_config.algo
        cloning = checkpoint.algo_name == "bc"
        self.diffusion = checkpoint.algo_name == "diffusion_policy"
        self.recurrent = cloning and bool(algo.rnn.enabled)
        self.transformer = cloning and bool(algo.transformer.enabled)
        #: Whether a single network acts, not an algorithm that draws from torch's
        #: generator.
        self.single_network = cloning and not algo.vae.enabled
        stacked = int(config.train.frame_stack)
        reads = algo.horizon.observation_horizon if self.diffusion else 1
        if stacked != reads and not self.transformer:
            raise UserError(
                f"{checkpoint.path}: train.frame_stack is {stacked}, but the networks act on"
                f" {reads}"
            )
        self.shapes = _shapes(checkpoint, config)
        rgb = config.observation.encoder.get("rgb") or {}
        core = (rgb.get("core_kwargs") or {}).get("encoder") or rgb.get("core_class")
        self.config = PolicyConfig(
            policy=f"robomimic {checkpoint.algo_name} ({type(self.algorithm).__name__})",
            encoder=str(core) if self.shapes.images else "none",
            n_obs_steps=stacked,
            horizon=algo.horizon.prediction_horizon if self.diffusion else 1,
            n_action_steps=algo.horizon.action_horizon if self.diffusion else 1,
        )
        self.object_signs = _object_signs(checkpoint, self.shapes).to(self.device)
        self.obs_scales = _to_tensors(checkpoint.obs_statistics, self.device)
        scales = _to_tensors(checkpoint.action_statistics, self.device).values()
        self.action_scale = [torch.cat(parts, dim=-1) for parts in zip(*scales, strict=True)]
        self.action_formats = _action_formats(checkpoint)
        self.eval()

    def fit_normalizers(self, statistics: Statistics) -> None:
        raise UserError("a robomimic checkpoint has its own normalisation and is not trained here")

    def loss(self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG) -> tuple[Tensor, Metrics]:
        raise UserError(
            "a robomimic checkpoint is not trained here; use fibopolicy robomimic train"
        )

    @torch.no_grad()
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        check_observations(obs, self.shapes, {self.config.n_obs_steps})
        raw = {key: obs[key].to(self.device) for key in self.shapes.keys}
        memory = state or init_memory(raw, raw)
        inputs = self._prepare(raw)
        if not self.transformer and not self.diffusion:
            inputs = {key: value[:, -1] for key, value in inputs.items()}  # (B, ...)
        if self.diffusion:
            actions, memory = self._denoise(inputs, memory)  # (B, T_a, A)
        elif self.recurrent:
            rnn = self.algorithm.algo_config.rnn
            actions, memory = act_recurrent(
                self.networks["policy"],
                inputs,
                memory,
                horizon=rnn.horizon,
                open_loop=rnn.get("open_loop", False),
            )
        elif self.single_network:
            # A network that predicts future actions begins with the present one.
            future = self.algorithm.algo_config.transformer.get("pred_future_acs")
            actions, memory = act_feedforward(
                self.networks["policy"], inputs, memory, step=0 if future else -1
            )
        else:
            actions, memory = self._act_one_by_one(inputs, memory)
        if not self.diffusion:
            actions = actions.unsqueeze(1)  # (B, 1, A)
        if not self.action_scale:
            return actions.clamp(-1, 1), memory
        offset, scale = self.action_scale
        sizes, conversions = zip(*self.action_formats, strict=True)
        parts = torch.split(actions * scale + offset, list(sizes), dim=-1)
        converted = [
            convert(part) if convert else part
            for convert, part in zip(conversions, parts, strict=True)
        ]
        return torch.cat(converted, dim=-1), memory

    def _prepare(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Images uint8 `(B, T_o, H, W, 3)` to float `(B, T_o, 3, H, W)` in [0, 1];
        everything normalised if the training did so.
        """
        prepared = {}
        for key, value in raw.items():
            if key in self.shapes.images:
                value = value.float().div(255).permute(0, 1, 4, 2, 3)
            if key == "object":
                value = value * self.object_signs
            if self.obs_scales:
                offset, scale = self.obs_scales[key]  # (1, ...)
                value = (value - offset) / scale
            prepared[key] = value.float()
        return prepared

    def _denoise(self, obs: Mapping[str, Tensor], memory: Memory) -> tuple[Tensor, Memory]:
        """Chunks `(B, T_a, A)` of Diffusion Policy, as its `_get_action_trajectory`
        makes them, from observations `(B, T_o, ...)`. Each episode has its own noise.
        """
        algo, scheduler = self.algorithm.algo_config, self.algorithm.noise_scheduler
        network: Any = self.networks["policy"]
        rng = EpisodeRng(**memory["rng"])
        rows, steps = next(iter(obs.values())).shape[:2]
        flat = {key: value.flatten(0, 1) for key, value in obs.items()}
        features = network["obs_encoder"](obs=flat).view(rows, -1)  # (B, T_o * F)
        generators = [torch.Generator().manual_seed(seed) for seed in rng.seeds()]
        size = (algo.horizon.prediction_horizon, self.algorithm.ac_dim)
        noise = [torch.randn(size, generator=generator) for generator in generators]
        chunk = torch.stack(noise).to(self.device)
        process = algo.ddpm if algo.ddpm.enabled else algo.ddim
        scheduler.set_timesteps(process.num_inference_timesteps)
        for timestep in scheduler.timesteps:
            predicted = network["noise_pred_net"](chunk, timestep, global_cond=features)
            chunk = scheduler.step(predicted, timestep, chunk, generator=generators).prev_sample
        start = steps - 1  # the chunk begins with the oldest observation
        actions = chunk[:, start : start + algo.horizon.action_horizon]
        return actions, {**memory, "rng": rng.advance().state}

    def _act_one_by_one(self, obs: Mapping[str, Tensor], memory: Memory) -> tuple[Tensor, Memory]:
        """Actions `(B, A)` of an algorithm that draws from torch's global generator,
        which is seeded for each episode.
        """
        actions, rng = [], EpisodeRng(**memory["rng"])
        devices = [self.device] if self.device.type == "cuda" else []
        for row, seed in enumerate(rng.seeds()):
            one = {key: value[row : row + 1] for key, value in obs.items()}
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                actions.append(self.algorithm.get_action(one))
        return torch.cat(actions), {**memory, "rng": rng.advance().state}


def _shapes(checkpoint: Checkpoint, config: Any) -> Shapes:
    from fibopolicy.robomimic.config import used_keys

    keys = used_keys(config.observation)
    images, vectors = keys.pop("rgb", []), keys.pop("low_dim", [])
    if keys:
        raise UserError(
            f"{checkpoint.path}: observes {', '.join(keys)}; only rgb and low_dim can be evaluated"
        )
    sizes = checkpoint.shapes  # images (3, H, W)
    rotations = [convert for _, convert in _action_formats(checkpoint) if convert]
    return Shapes(
        {key: (sizes[key][1], sizes[key][2]) for key in images},
        {key: sizes[key][0] for key in vectors},
        checkpoint.action_dim - 3 * len(rotations),
    )


def _action_formats(
    checkpoint: Checkpoint,
) -> list[tuple[int, Callable[[Tensor], Tensor] | None]]:
    """Size of each part of an action, and what makes 3 numbers of a 6-D rotation."""
    import robomimic.utils.torch_utils as torch_utils

    functions = {"rot_axis_angle": "rot_6d_to_axis_angle", "rot_euler": "rot_6d_to_euler_angles"}
    settings = checkpoint.config["train"].get("action_config") or {}
    formats = []
    for key, statistics in checkpoint.action_statistics.items():
        own, convert = settings.get(key) or {}, None
        if own.get("format") == "rot_6d":
            kind = own.get("convert_at_runtime", "rot_axis_angle")
            convert = getattr(torch_utils, functions.get(kind, ""), None)
            if convert is None:
                raise UserError(
                    f"{checkpoint.path}: action {key} holds 6-D rotations for {kind}, which"
                    f" robomimic {robomimic_version()} does not convert; 0.5 knows"
                    f" {', '.join(functions)}"
                )
        formats.append((statistics["scale"].shape[-1], convert))
    return formats


def _object_signs(checkpoint: Checkpoint, shapes: Shapes) -> Tensor:
    """Factors `(D,)` that turn the vector "object" of robosuite 1.5 into the one of the
    training.

    Before 1.5 the last part of Lift's was the gripper's position minus the cube's;
    since then it is the cube's minus the gripper's.
    """
    signs = torch.ones(shapes.vectors.get("object", 0))
    env = checkpoint.env_metadata
    version = Version(str(env.get("env_version") or "0"))  # older files do not always have one
    if not len(signs) or env.get("type") != 1 or version >= Version("1.5"):
        return signs
    if env.get("env_name") == "Lift":
        signs[-3:] = -1
    else:
        warnings.warn(
            f"{checkpoint.path}: reads the vector 'object' of a robosuite before 1.5; that of 1.5"
            " may differ",
            stacklevel=2,
        )
    return signs


def _to_tensors(
    statistics: Mapping[str, Mapping[str, Any]], device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Offset and scale per key."""
    return {
        key: (
            torch.as_tensor(values["offset"], device=device),
            torch.as_tensor(values["scale"], device=device),
        )
        for key, values in statistics.items()
    }


def _build_algorithm(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The robomimic algorithm with the checkpoint's weights, in evaluation mode."""
    # The first import registers our core and says what to install.
    import fibopolicy.robomimic.encoder_core  # noqa: F401, I001
    import robomimic.utils.file_utils as file_utils
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.algo import algo_factory
    from robomimic.config import config_factory, get_all_registered_configs

    name, path = checkpoint.algo_name, checkpoint.path
    if name not in ALGORITHMS:
        raise unknown(f"algorithm in {path}:", name, ALGORITHMS)
    if name not in get_all_registered_configs():
        raise UserError(
            f"{path}: {name} needs robomimic 0.5, {robomimic_version()} is installed; see"
            " docs/guides/robomimic.md"
        )
    shapes = OrderedDict((key, list(shape)) for key, shape in checkpoint.shapes.items())
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # robomimic prints what it sets up
            file_utils.update_config(checkpoint.config)
            algo = config_factory(name).algo  # the other version's lacks options
            with algo.unlocked():
                algo.update(checkpoint.config["algo"])
            config = config_factory(name, dic={**checkpoint.config, "algo": algo.to_dict()})
            _check_supported(config)
            for network in config.algo.optim_params.values():
                # Not used here, and 0.5 has schedules that 0.3 rejects.
                network.update(num_train_batches=1, num_epochs=1)
                network.learning_rate.update(scheduler_type="multistep", epoch_schedule=[])
            for encoder in config.observation.encoder.values():
                _forbid_downloads(encoder.get("core_kwargs") or {})
            config.lock()
            obs_utils.initialize_obs_utils_with_config(config)
            algorithm = algo_factory(name, config, shapes, checkpoint.action_dim, device)
            algorithm.nets.load_state_dict(checkpoint.weights)
            algorithm.ema = algorithm.ema_nets = None  # copies, of Diffusion Policy
            algorithm.set_eval()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # robomimic asserts; configurations of other versions lack keys
        reason = one_line(error)[:240]
        raise UserError(
            f"{path}: robomimic {robomimic_version()} cannot build its networks ({reason})"
        ) from error
    return algorithm


def robomimic_version() -> str:
    import robomimic

    return str(robomimic.__version__)


def _forbid_downloads(core_kwargs: dict[str, Any]) -> None:
    """Build without published weights; the checkpoint's are loaded afterwards."""
    for name in ("backbone_kwargs", "encoder_options"):
        options = core_kwargs.get(name) or {}
        if options.get("pretrained"):
            options["pretrained"] = False


def _check_supported(config: Any) -> None:
    """Raise `UserError` for a policy that would run but act wrongly."""
    if config.use_goals:
        raise UserError("is conditioned on goals, which the evaluation does not provide")
    if config.algo.get("language_conditioned") or "lang_emb" in config.all_obs_keys:
        raise UserError("is conditioned on language, which the evaluation does not provide")
