"""A policy that robomimic trained, behind the policy contract."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from fibopolicy.errors import UserError, unknown
from fibopolicy.policies.base import Policy, PolicyConfig, Shapes, State, Statistics
from fibopolicy.policies.observations import check_observations
from fibopolicy.policies.rng import GLOBAL_RNG, EpisodeRng, SampleRng
from fibopolicy.robomimic.actor import Memory, forward, forward_recurrent, init_memory
from fibopolicy.robomimic.checkpoint import Checkpoint
from fibopolicy.robomimic.config import used_keys
from fibopolicy.utils.system import resolve_device

#: Their `get_action` has no memory, so that they act for any episode at any time.
ALGORITHMS = ("bc", "bcq", "cql", "iql", "td3_bc")


class ImportedPolicy(Policy):
    """Rolls out what robomimic trained; training it is robomimic's business.

    `act` returns one action per call, unclipped where the checkpoint scales actions,
    and carries tensors whose first dimension counts the episodes.

    Raises:
        UserError: an algorithm, network, core or option that robomimic 0.3.0 does not
            have, weights that do not fit, or observations that no simulator here gives.
    """

    name = "robomimic"

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        super().__init__()
        self.device = resolve_device(device)
        self.algorithm = _build(checkpoint, self.device)
        self.networks: nn.ModuleDict = self.algorithm.nets
        config = self.algorithm.global_config
        algo = config.algo
        self.recurrent = checkpoint.algo_name == "bc" and bool(algo.rnn.enabled)
        self.transformer = checkpoint.algo_name == "bc" and bool(algo.transformer.enabled)
        stacked = int(config.train.frame_stack)
        if stacked > 1 and not self.transformer:
            raise UserError(
                f"{checkpoint.path}: train.frame_stack is {stacked}, which only robomimic's"
                " transformer can act on"
            )
        modalities = used_keys(config.observation)
        images, vectors = modalities.pop("rgb", []), modalities.pop("low_dim", [])
        if modalities:
            raise UserError(
                f"{checkpoint.path}: observes {', '.join(modalities)}; rolled out are rgb and"
                " low_dim alone"
            )
        shapes = {key: checkpoint.shapes[key] for key in (*images, *vectors)}
        self.shapes = Shapes(
            {key: (shapes[key][1], shapes[key][2]) for key in images},
            {key: shapes[key][0] for key in vectors},
            checkpoint.action_dim,
        )
        rgb = config.observation.encoder.get("rgb") or {}
        core = (rgb.get("core_kwargs") or {}).get("encoder") or rgb.get("core_class")
        self.config = PolicyConfig(
            policy=f"robomimic {checkpoint.algo_name}: {type(self.algorithm).__name__}",
            encoder=str(core) if images else "none",
            n_obs_steps=stacked,
            horizon=1,
            n_action_steps=1,
        )
        self.object_signs = _object_signs(checkpoint, self.shapes).to(self.device)
        self.obs_scales = _scales(checkpoint.obs_statistics, self.device)
        actions = list(_scales(checkpoint.action_statistics, self.device).values())
        self.action_scale = (
            tuple(torch.cat(parts, dim=-1) for parts in zip(*actions, strict=True))
            if actions
            else None
        )
        self.eval()

    def fit_normalizers(self, statistics: Statistics) -> None:
        raise UserError(
            "a robomimic checkpoint brings its own normalisation and is not trained here"
        )

    def loss(
        self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG
    ) -> tuple[Tensor, dict[str, float]]:
        raise UserError(
            "a robomimic checkpoint is not trained here; use fibopolicy robomimic train"
        )

    @torch.no_grad()
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        check_observations(obs, self.shapes, {self.config.n_obs_steps})
        raw = {key: obs[key].to(self.device) for key in (*self.shapes.images, *self.shapes.vectors)}
        memory = state or init_memory(raw, raw)
        seen = self._observations(raw)
        if not self.transformer:
            seen = {key: value[:, -1] for key, value in seen.items()}  # (B, ...)
        if self.recurrent:
            rnn = self.algorithm.algo_config.rnn
            actions, carried = forward_recurrent(
                self.networks["policy"],
                seen,
                memory,
                horizon=rnn.horizon,
                open_loop=rnn.get("open_loop", False),
            )
        elif (
            self.algorithm.global_config.algo_name == "bc"
            and not self.algorithm.algo_config.vae.enabled
        ):
            actions, carried = forward(self.networks["policy"], seen, memory)
        else:
            actions, carried = self._one_by_one(seen, memory)
        if self.action_scale is None:
            actions = actions.clamp(-1, 1)
        else:
            offset, scale = self.action_scale
            actions = actions * scale + offset
        return actions.unsqueeze(1), carried  # (B, 1, A)

    def _observations(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Images uint8 `(B, T, H, W, 3)` to float `(B, T, 3, H, W)` in [0, 1]; all
        normalised where training was.
        """
        seen = {}
        for key, value in raw.items():
            if key in self.shapes.images:
                value = value.float().div(255).permute(0, 1, 4, 2, 3)
            if key == "object":
                value = value * self.object_signs
            if self.obs_scales:
                offset, scale = self.obs_scales[key]  # (1, ...)
                value = (value - offset) / scale
            seen[key] = value.float()
        return seen

    def _one_by_one(self, obs: Mapping[str, Tensor], memory: Memory) -> tuple[Tensor, Memory]:
        """Algorithms that draw from torch's global generator: each episode from its own seed."""
        actions, rng = [], EpisodeRng(**memory["rng"])
        devices = [self.device] if self.device.type == "cuda" else []
        for row, seed in enumerate(rng.seeds()):
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                actions.append(
                    self.algorithm.get_action(
                        {key: value[row : row + 1] for key, value in obs.items()}
                    )
                )
        return torch.cat(actions), {**memory, "rng": rng.advance().state}


def _object_signs(checkpoint: Checkpoint, shapes: Shapes) -> Tensor:
    """What today's "object" is multiplied with to be the training's: Lift turned its
    last part round in robosuite 1.5.

    `gripper_to_cube_pos` was the gripper's position minus the cube's; since 1.5 it is
    the cube's minus the gripper's.
    """
    signs = torch.ones(shapes.vectors.get("object", 0))
    env = checkpoint.env_metadata
    version = str(env.get("env_version") or "0")  # files before 1.5 do not always tell
    if not len(signs) or env.get("type") != 1 or Version(version) >= Version("1.5"):
        return signs
    if env.get("env_name") == "Lift":
        signs[-3:] = -1
    else:
        warnings.warn(
            f"{checkpoint.path}: reads the vector 'object' of a robosuite before 1.5; today's may"
            " hold other numbers",
            stacklevel=2,
        )
    return signs


def _scales(
    statistics: Mapping[str, Mapping[str, Any]], device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        key: (
            torch.as_tensor(values["offset"], device=device),
            torch.as_tensor(values["scale"], device=device),
        )
        for key, values in statistics.items()
    }


def _build(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The robomimic algorithm with its weights, ready to act."""
    # registers the core; says what to install
    importlib.import_module("fibopolicy.robomimic.encoder_core")
    import robomimic.algo as algorithms
    import robomimic.utils.file_utils as file_utils
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.config import config_factory

    if checkpoint.algo_name not in ALGORITHMS:
        raise unknown(f"algorithm in {checkpoint.path}:", checkpoint.algo_name, ALGORITHMS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # robomimic prints what it sets up
            document = checkpoint.config
            file_utils.update_config(document)
            config = config_factory(checkpoint.algo_name, dic=document)
            _refuse(checkpoint, config)
            # never used, and 0.5 has schedules that 0.3 refuses
            for net in config.algo.optim_params.values():
                net.learning_rate.epoch_schedule = []
            for encoder in config.observation.encoder.values():
                _without_downloads(encoder.get("core_kwargs") or {})
            config.lock()
            obs_utils.initialize_obs_utils_with_config(config)
            algorithm = algorithms.algo_factory(
                checkpoint.algo_name,
                config,
                obs_key_shapes=OrderedDict(
                    (key, list(shape)) for key, shape in checkpoint.shapes.items()
                ),
                ac_dim=checkpoint.action_dim,
                device=device,
            )
            algorithm.deserialize(checkpoint.weights)
            algorithm.set_eval()
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error
    except Exception as error:  # robomimic asserts, and other versions' configurations lack keys
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        raise UserError(
            f"{checkpoint.path}: robomimic 0.3.0 cannot build its networks ({reason})"
        ) from error
    return algorithm


def _without_downloads(core_kwargs: dict[str, Any]) -> None:
    """Published weights need not be fetched, since the checkpoint's take their place."""
    for name in ("backbone_kwargs", "encoder_options"):
        options = core_kwargs.get(name) or {}
        if options.get("pretrained"):
            options["pretrained"] = False


def _refuse(checkpoint: Checkpoint, config: Any) -> None:
    """What would be rolled out wrongly rather than not at all."""
    if config.use_goals:
        raise UserError("is conditioned on goals, which evaluation does not give")
    transformer = config.algo.get("transformer") or {}
    if transformer.get("pred_future_acs"):
        raise UserError(
            "its transformer predicts future actions, which robomimic 0.3.0 does not know"
        )
    for key, settings in (config.train.get("action_config") or {}).items():
        if isinstance(settings, Mapping) and settings.get("format") == "rot_6d":
            raise UserError(
                f"action {key} holds 6-D rotations to be converted, which is not done here"
            )
    if config.algo.get("language_conditioned"):
        raise UserError("is conditioned on language, which evaluation does not give")
