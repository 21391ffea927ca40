"""Perturbations of an environment, to measure how robust a policy is.

    from fibopolicy.envs import make
    from fibopolicy.envs.perturbations import Perturbation, PerturbedEnv

    env = PerturbedEnv(make("Lift-v0"))
    env.reset(seed=0)
    observation = env.perturb(Perturbation("light-color", 2), index=0)

A perturbation changes the model's appearance, the observations, or the actions. It
depends only on its name, its level and the index of the initial state. Masses,
contacts and the initial state itself do not change.
"""

from __future__ import annotations

import io
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from fibopolicy.envs.base import Observation, SimState, TaskEnv, camera_keys
from fibopolicy.envs.rendering import Decor
from fibopolicy.errors import UserError, unknown

Frame = NDArray[np.uint8]
Vector = NDArray[np.float64]
Generator = np.random.Generator
MakeGenerator = Callable[[], Generator]

LEVELS = (1, 2, 3)


@dataclass(frozen=True)
class Perturbation:
    """A perturbation at a level.

    Args:
        name: one of `PERTURBATIONS`.
        level: 1, 2 or 3, from weak to strong.

    Raises:
        UserError: there is no such perturbation or level.
    """

    name: str
    level: int

    def __post_init__(self) -> None:
        if self.name not in PERTURBATIONS:
            raise unknown("perturbation", self.name, PERTURBATIONS)
        if self.level not in LEVELS:
            raise UserError(
                f"perturbation {self.name}: unknown level {self.level}; expected 1, 2 or 3"
            )

    def __str__(self) -> str:
        return f"{self.name}:{self.level}"

    @property
    def amount(self) -> float:
        return PERTURBATIONS[self.name].amounts[self.level - 1]


def parse(text: str) -> tuple[Perturbation, ...]:
    """The perturbations of `NAME:LEVEL`, or of all levels of `NAME`.

    Raises:
        UserError: there is no such perturbation or level.

    Examples:
        >>> [str(one) for one in parse("blur")]
        ['blur:1', 'blur:2', 'blur:3']
    """
    name, colon, level = text.partition(":")
    if not colon:
        return tuple(Perturbation(name, each) for each in LEVELS)
    if name in PERTURBATIONS and not level.isdecimal():
        raise UserError(
            f"perturbation {text}: expected NAME or NAME:LEVEL with level 1, 2 or 3, e.g. {name}:2"
        )
    return (Perturbation(name, int(level) if level.isdecimal() else 0),)


# Changes of the model's appearance


class Scene:
    """The MuJoCo model of an environment at an initial state.

    Raises:
        LookupError: the environment has no MuJoCo simulation.
    """

    def __init__(self, env: TaskEnv) -> None:
        self.env = env
        self.model, self.data = env.simulation()
        self._changed: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def change(self, field: NDArray[Any]) -> NDArray[Any]:
        """A field of the model, which `restore` will set back."""
        self._changed.append((field, field.copy()))
        return field

    def draw(self, *decor: Decor) -> None:
        assert self.env.decor is not None
        self.env.decor = (*self.env.decor, *decor)

    def show(self) -> None:
        """Recompute what frames depend on and the simulation does not."""
        import mujoco

        mujoco.mj_camlight(self.model, self.data)

    def restore(self) -> None:
        while self._changed:
            field, value = self._changed.pop()
            field[:] = value
        if self.env.decor:
            self.env.decor = ()

    def tables(self) -> list[int]:
        """The shapes of the table, or else of the bins, largest box first."""
        model = self.model
        fixed = np.flatnonzero(model.body_weldid[model.geom_bodyid] == 0)
        names = {
            i: f"{model.geom(i).name} {model.body(model.geom_bodyid[i]).name}".lower()
            for i in fixed.tolist()
        }
        for word in ("table", "bin"):
            found = [i for i, name in names.items() if word in name]
            boxes = [i for i in found if model.geom_type[i] == _BOX]
            if boxes:
                top = max(boxes, key=lambda i: float(model.geom_size[i, :2].prod()))
                return [top, *(i for i in found if i != top)]
        return []

    def objects(self) -> list[int]:
        """The bodies that move and do not belong to a robot."""
        model = self.model
        driven = model.actuator_trnid[model.actuator_trntype <= _JOINTS, 0]
        robots = set(model.body_rootid[model.jnt_bodyid[driven]].tolist())
        return [
            i
            for i in range(model.nbody)
            if model.body_weldid[i] != 0
            and model.body_rootid[i] not in robots
            and model.body_mocapid[model.body_rootid[i]] < 0
        ]

    def table_top(self) -> tuple[Vector, Vector]:
        """The lowest and highest corner of the table's upper side, `(3,)` metres each."""
        top = self.tables()[0]
        rotation = np.abs(self.data.geom_xmat[top].reshape(3, 3))
        half = rotation @ self.model.geom_size[top]
        centre = self.data.geom_xpos[top].copy()
        centre[2] += half[2]
        half[2] = 0
        return centre - half, centre + half

    def centre(self) -> Vector:
        """The middle of the scene, `(3,)` metres: on the table, between its middle and
        the objects.
        """
        objects = self.objects()
        middle = self.data.xpos[objects].mean(axis=0) if objects else self.model.stat.center
        if not self.tables():
            return np.array(middle)
        low, high = self.table_top()
        return np.asarray((np.clip(middle, low, high) + (low + high) / 2) / 2)


#: mjGEOM_BOX and mjTRN_JOINTINPARENT, the last transmission to a joint.
_BOX, _JOINTS = 6, 1


def _move_cameras(scene: Scene, amount: float, rng: Generator) -> None:
    model, data = scene.model, scene.data
    centre = scene.centre()
    fields = [scene.change(f) for f in (model.cam_pos, model.cam_pos0, model.cam_poscom0)]
    for i in range(model.ncam):
        distance = float(np.linalg.norm(data.cam_xpos[i] - centre))
        shift = amount * distance * _direction(rng)
        # The first is relative to the camera's body, the others are in the world's
        # axes.
        body = data.xmat[model.cam_bodyid[i]].reshape(3, 3)
        for field, by in zip(fields, (body.T @ shift, shift, shift), strict=True):
            field[i] += by


def _turn_cameras(scene: Scene, amount: float, rng: Generator) -> None:
    import mujoco

    model = scene.model
    quats, matrices = scene.change(model.cam_quat), scene.change(model.cam_mat0)
    for i in range(model.ncam):
        turn, rotation = np.empty(4), np.empty(9)
        mujoco.mju_axisAngle2Quat(turn, _direction(rng), np.deg2rad(amount))
        mujoco.mju_quat2Mat(rotation, turn)
        mujoco.mju_mulQuat(quats[i], quats[i].copy(), turn)
        matrices[i] = (matrices[i].reshape(3, 3) @ rotation.reshape(3, 3)).ravel()


def _scale_lights(scene: Scene, factors: Vector) -> None:
    model = scene.model
    headlight = model.vis.headlight
    for field in (model.light_ambient, model.light_diffuse, model.light_specular):
        scene.change(field)[:] *= factors
    for field in (headlight.ambient, headlight.diffuse, headlight.specular):
        scene.change(field)[:] *= factors


def _scale_light(scene: Scene, amount: float, rng: Generator) -> None:
    _scale_lights(scene, np.full(3, amount ** rng.choice([-1.0, 1.0])))


def _tint_light(scene: Scene, amount: float, rng: Generator) -> None:
    tint = rng.permutation([1.0, 0.5, 0.0])
    _scale_lights(scene, 1 - amount * tint)


def _turn_lights(scene: Scene, amount: float, rng: Generator) -> None:
    """Tilt the lights about the scene, and give them a share of the headlight, which
    shines from the camera.
    """
    import mujoco

    model, centre = scene.model, scene.centre()
    azimuth = rng.uniform(0, 2 * np.pi)
    quat, axis = np.empty(4), np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
    mujoco.mju_axisAngle2Quat(quat, axis, np.deg2rad(amount))
    rotation = np.empty(9)
    mujoco.mju_quat2Mat(rotation, quat)
    rotation = rotation.reshape(3, 3)
    fixed = model.light_bodyid == 0
    positions, directions = scene.change(model.light_pos), scene.change(model.light_dir)
    positions[fixed] = centre + (positions[fixed] - centre) @ rotation.T
    directions[fixed] = directions[fixed] @ rotation.T
    if fixed.any():
        share = scene.change(model.vis.headlight.diffuse) * amount / 90
        model.vis.headlight.diffuse[:] -= share
        scene.change(model.light_diffuse)[fixed] += share / fixed.sum()


def _shade(scene: Scene, amount: float, rng: Generator) -> None:
    """Darken a rectangle of the table."""
    low, high = scene.table_top()
    at = np.clip(scene.centre()[:2] + rng.uniform(-0.08, 0.08, 2), low[:2] + 0.05, high[:2] - 0.05)
    half = np.minimum(rng.uniform(0.12, 0.2), np.minimum(at - low[:2], high[:2] - at))
    place = (at[0], at[1], low[2] + 0.0006)
    scene.draw(Decor("plane", place, (half[0], half[1], 0), (0, 0, 0, amount)))


def _colour(scene: Scene, geoms: list[int], amount: float, rng: Generator) -> None:
    """Mix a random colour into each colour of some shapes, which lose their textures."""
    model = scene.model
    colours, materials = scene.change(model.geom_rgba), scene.change(model.geom_matid)
    mixed: dict[bytes, Vector] = {}  # shapes of one colour stay of one colour
    for i in geoms:
        before = _colour_of(model, i)
        if (key := before.tobytes()) not in mixed:
            mixed[key] = (1 - amount) * before[:3] + amount * rng.uniform(0, 1, 3)
        colours[i], materials[i] = [*mixed[key], before[3]], -1


def _colour_of(model: Any, geom: int) -> Vector:
    """The colour and opacity of a shape, `(4,)`, with the mean of its texture."""
    material, own = model.geom_matid[geom], model.geom_rgba[geom].astype(float)
    if material < 0:
        return np.asarray(own)
    rgba = own if np.any(own != _DEFAULT_RGBA) else model.mat_rgba[material].astype(float)
    if (texture := model.mat_texid[material].max()) >= 0:
        size = model.tex_height[texture], model.tex_width[texture], model.tex_nchannel[texture]
        start = model.tex_adr[texture]
        pixels = model.tex_data[start : start + np.prod(size, dtype=int)].reshape(size)
        rgba[:3] *= pixels[::8, ::8, :3].mean(axis=(0, 1)) / 255
    return np.asarray(rgba)


#: MuJoCo's default colour of a shape.
_DEFAULT_RGBA = np.array([0.5, 0.5, 0.5, 1.0])


def _colour_table(scene: Scene, amount: float, rng: Generator) -> None:
    _colour(scene, scene.tables(), amount, rng)


def _colour_objects(scene: Scene, amount: float, rng: Generator) -> None:
    objects = set(scene.objects())
    geoms = [i for i, body in enumerate(scene.model.geom_bodyid.tolist()) if body in objects]
    _colour(scene, geoms, amount, rng)


def _stripe_table(scene: Scene, amount: float, rng: Generator) -> None:
    low, high = scene.table_top()
    along = int(rng.integers(2))
    width = min(rng.uniform(0.025, 0.05), (high - low)[along] / 4)
    colour = rng.uniform(0, 1, 3)
    for at in np.arange(low[along] + width, high[along] - width, 4 * width):
        centre, half = (low + high) / 2, (high - low) / 2
        centre[along], half[along] = at, width
        centre[2] += 0.0003
        scene.draw(Decor("plane", tuple(centre), tuple(half), (*colour, amount)))


def _add_distractors(scene: Scene, amount: float, rng: Generator) -> None:
    """Shapes on the table, at a distance from objects, goals and each other."""
    model, data = scene.model, scene.data
    low, high = scene.table_top()
    centre = scene.centre()
    low, high = np.maximum(low + 0.03, centre - 0.2), np.minimum(high - 0.03, centre + 0.2)
    goals = [i for i in range(model.nsite) if "goal" in model.site(i).name.lower()]
    markers = np.flatnonzero(model.body_mocapid >= 0).tolist()
    taken = [*data.xpos[[*scene.objects(), *markers]][:, :2], *data.site_xpos[goals][:, :2]]
    for _ in range(round(amount)):
        spots = rng.uniform(low[:2], high[:2], (20, 2))
        gaps = [min((float(np.hypot(*(at - one))) for one in taken), default=1.0) for at in spots]
        spot = spots[int(np.argmax(np.minimum(np.array(gaps), 0.07)))]
        taken.append(spot)
        size = rng.uniform(0.012, 0.028, 3)
        shape = str(rng.choice(["box", "cylinder", "ellipsoid"]))
        position = (spot[0], spot[1], low[2] - 0.03 + size[2])
        scene.draw(Decor(shape, position, tuple(size), (*rng.uniform(0, 1, 3), 1)))


def _direction(rng: Generator) -> Vector:
    """A unit vector `(3,)`, uniform on the sphere."""
    drawn = rng.normal(size=3)
    return np.asarray(drawn / np.linalg.norm(drawn))


# Changes of the observations


def _noise(
    frame: Frame, amount: float, episode_rng: MakeGenerator, frame_rng: MakeGenerator
) -> Frame:
    # Quantiles of the normal distribution, drawn with equal probability: a third of
    # the time of `standard_normal`.
    drawn = frame_rng().integers(_QUANTILES, size=frame.shape, dtype=np.uint16)
    noise = 255 * amount * _normal_quantiles()[drawn]
    noisy: Frame = np.clip(frame + noise, 0, 255).round().astype(np.uint8)
    return noisy


_QUANTILES = 2**16


@cache
def _normal_quantiles() -> NDArray[np.float32]:
    """The normal distribution's quantiles at `_QUANTILES` equally spaced probabilities."""
    from scipy.special import ndtri

    return np.asarray(ndtri((np.arange(_QUANTILES) + 0.5) / _QUANTILES), np.float32)


def _blur(
    frame: Frame, amount: float, episode_rng: MakeGenerator, frame_rng: MakeGenerator
) -> Frame:
    radius = amount * frame.shape[0]
    return np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(radius)))


def _compress(
    frame: Frame, amount: float, episode_rng: MakeGenerator, frame_rng: MakeGenerator
) -> Frame:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=round(amount))
    return np.asarray(Image.open(file))


def _occlude(
    frame: Frame, amount: float, episode_rng: MakeGenerator, frame_rng: MakeGenerator
) -> Frame:
    rng, size = episode_rng(), np.array(frame.shape[:2])
    patch = np.round(size * amount**0.5).astype(int)
    top, left = rng.integers(0, size - patch + 1)
    covered = frame.copy()
    covered[top : top + patch[0], left : left + patch[1]] = rng.integers(256)
    return covered


# The registry


@dataclass(frozen=True)
class ModelChange:
    """Changes how the model looks, once per episode.

    Args:
        about: what it does, for the documentation.
        amounts: strength at each level, passed to `change`.
        change: called with the scene, the strength and a random generator.
        needs: parts of the scene that it needs, of "table", "objects" and "decor".
    """

    about: str
    amounts: tuple[float, float, float]
    change: Callable[[Scene, float, Generator], None]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrameChange:
    """Changes every frame of every camera.

    Args:
        about, amounts: see `ModelChange`.
        change: called with a frame, the strength, and two functions that make a random
            generator: the first the same one for all frames of a camera in an episode,
            the second one of this frame. Each call starts from the same numbers.
            Returns a frame.
    """

    about: str
    amounts: tuple[float, float, float]
    change: Callable[[Frame, float, MakeGenerator, MakeGenerator], Frame]


@dataclass(frozen=True)
class OtherChange:
    """What `PerturbedEnv` does itself: a camera is lost, vectors are noisy, actions
    late.

    Args:
        about, amounts: see `ModelChange`.
    """

    about: str
    amounts: tuple[float, float, float]


_TABLE, _OBJECTS, _DECOR = "table", "objects", "decor"
#: Every perturbation by its name.
PERTURBATIONS: dict[str, ModelChange | FrameChange | OtherChange] = {
    "camera-position": ModelChange(
        "Every camera moves in a random direction by 4, 8 or 16 % of its distance to the objects.",
        (0.04, 0.08, 0.16),
        _move_cameras,
    ),
    "camera-rotation": ModelChange(
        "Every camera turns about a random axis by 3, 6 or 12 degrees.",
        (3.0, 6.0, 12.0),
        _turn_cameras,
    ),
    "light-intensity": ModelChange(
        "All light is stronger or weaker, by a factor of 1.3, 1.7 or 2.5.",
        (1.3, 1.7, 2.5),
        _scale_light,
    ),
    "light-direction": ModelChange(
        "The lights tilt in a random direction by 20, 40 or 60 degrees, and shine more strongly"
        " than the camera's own light.",
        (20.0, 40.0, 60.0),
        _turn_lights,
    ),
    "light-color": ModelChange(
        "One primary colour of all light is weaker by 25, 50 or 75 %, another by half of that.",
        (0.25, 0.5, 0.75),
        _tint_light,
    ),
    "shadow": ModelChange(
        "A shadow darkens a part of the table by 25, 50 or 75 %.",
        (0.25, 0.5, 0.75),
        _shade,
        (_TABLE, _DECOR),
    ),
    "table-color": ModelChange(
        "The table loses its texture, and its colour is mixed with 25, 50 or 75 % of a random one.",
        (0.25, 0.5, 0.75),
        _colour_table,
        (_TABLE,),
    ),
    "table-texture": ModelChange(
        "The table has stripes of a random colour, of 30, 60 or 100 % opacity.",
        (0.3, 0.6, 1.0),
        _stripe_table,
        (_TABLE, _DECOR),
    ),
    "object-color": ModelChange(
        "Objects lose their textures, and each of their colours is mixed with 25, 50 or 75 % of a"
        " random one.",
        (0.25, 0.5, 0.75),
        _colour_objects,
        (_OBJECTS,),
    ),
    "distractors": ModelChange(
        "1, 3 or 6 shapes of random colours lie beside the objects. Nothing touches them.",
        (1, 3, 6),
        _add_distractors,
        (_TABLE, _DECOR),
    ),
    "noise": FrameChange(
        "Gaussian noise, of a standard deviation of 4, 8 or 16 % of the full range.",
        (0.04, 0.08, 0.16),
        _noise,
    ),
    "blur": FrameChange(
        "Gaussian blur, of a radius of 1, 2 or 4 % of the frame's height.",
        (0.01, 0.02, 0.04),
        _blur,
    ),
    "jpeg": FrameChange("JPEG compression, of quality 30, 12 or 5.", (30, 12, 5), _compress),
    "occlusion": FrameChange(
        "A patch, black to white, covers 5, 12 or 25 % of every frame, at a fixed place.",
        (0.05, 0.12, 0.25),
        _occlude,
    ),
    "dropped-camera": OtherChange(
        "One camera is black in 10, 30 or 100 % of its frames.", (0.1, 0.3, 1)
    ),
    "proprioception-noise": OtherChange(
        "Gaussian noise on every proprioceptive vector, of a standard deviation of 0.005, 0.01 or"
        " 0.02 in its unit: 5, 10 or 20 mm.",
        (0.005, 0.01, 0.02),
    ),
    "action-delay": OtherChange(
        "Actions are executed 1, 2 or 4 control steps late; the first is repeated until then.",
        (1, 2, 4),
    ),
}


def unsupported_reason(env: TaskEnv, name: str) -> str:
    """Why an environment does not support a perturbation, in one line; else empty."""
    kind = PERTURBATIONS[name]
    about = f"{env.task_id} does not support the perturbation {name}"
    if name == "proprioception-noise" and not env.proprioception:
        return f"{about}: it has no proprioception"
    if name in ("proprioception-noise", "action-delay"):
        return ""
    if not camera_keys(env):
        return f"{about}: the policy sees no camera"
    if not isinstance(kind, ModelChange):
        return ""
    try:
        scene = Scene(env)
    except LookupError:
        return f"{about}: it has no MuJoCo simulation; perturb its frames, vectors or actions"
    if _DECOR in kind.needs and env.decor is None:
        return f"{about}: it does not draw its attribute decor"
    if _TABLE in kind.needs and not scene.tables():
        return f"{about}: its model has no shape of a table or bin"
    if _OBJECTS in kind.needs and not scene.objects():
        return f"{about}: its model has no movable object"
    return ""


class PerturbedEnv(TaskEnv):
    """An environment that can be perturbed. It is unperturbed after `reset` and
    `set_state`, until `perturb` is called.

    Args:
        env: any environment; it belongs to this one from now on.
    """

    def __init__(self, env: TaskEnv) -> None:
        self.env = env
        for name in (*TaskEnv.__annotations__, "observation_space", "action_space"):
            setattr(self, name, getattr(env, name))
        self._perturbation: Perturbation | None = None
        self._scene: Scene | None = None
        self._index = self._steps = 0
        self._late: deque[NDArray[np.floating[Any]]] = deque()

    def perturb(self, perturbation: Perturbation, index: int) -> Observation:
        """Perturb the episode that begins at this instant; returns its observation.

        Args:
            index: index of the initial state.

        Raises:
            UserError: this environment does not support it.
        """
        self._clear()
        if reason := unsupported_reason(self.env, perturbation.name):
            raise UserError(reason)
        self._perturbation, self._index, self._steps = perturbation, index, 0
        kind = PERTURBATIONS[perturbation.name]
        if isinstance(kind, ModelChange):
            self._scene = Scene(self.env)
            kind.change(self._scene, perturbation.amount, self._rng())
            self._scene.show()
        return self.observe()

    def restore(self, state: SimState, step: int) -> Observation:
        """Restore an instant of the episode that `perturb` began, after `step` control
        steps; returns its perturbed observation. Delayed actions are not restored.
        """
        self._steps = step
        return self._perturbed(self.env.set_state(state))

    def _perturbed(self, observation: Observation) -> Observation:
        if (perturbation := self._perturbation) is None:
            return observation
        step = self._steps
        kind, amount = PERTURBATIONS[perturbation.name], perturbation.amount
        cameras = [key for key in camera_keys(self) if key in observation]
        changed = dict(observation)
        if isinstance(kind, FrameChange):
            for i, key in enumerate(cameras):
                episode_rng, frame_rng = partial(self._rng, i), partial(self._rng, i, step)
                changed[key] = kind.change(observation[key], amount, episode_rng, frame_rng)
        elif perturbation.name == "dropped-camera":
            lost = cameras[self._rng().integers(len(cameras))]
            if self._rng(0, step).uniform() < amount:
                changed[lost] = np.zeros_like(observation[lost])
        elif perturbation.name == "proprioception-noise":
            rng = self._rng(0, step)
            for key in self.proprioception:
                noise = rng.normal(0, amount, observation[key].shape)
                changed[key] = (observation[key] + noise).astype(observation[key].dtype)
        return changed

    # The environment contract.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        self._clear()
        return self.env.reset(seed=seed, options=options)

    def advance(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[float, bool, bool, dict[str, Any]]:
        self._steps += 1
        if self._perturbation is not None and self._perturbation.name == "action-delay":
            if self._steps == 1:
                self._late = deque([action] * round(self._perturbation.amount))
            self._late.append(action)
            action = self._late.popleft()
        return self.env.advance(action)

    def observe(self) -> Observation:
        return self._perturbed(self.env.observe())

    def get_state(self) -> SimState:
        return self.env.get_state()

    def set_state(self, state: SimState) -> Observation:
        self._clear()
        return self.env.set_state(state)

    def benchmark_states(self) -> Sequence[SimState]:
        return self.env.benchmark_states()

    def begin(self, obs: Observation) -> Observation:
        begun = self.env.begin(obs)
        return obs if begun is obs else self._perturbed(begun)

    @property
    def env_args(self) -> dict[str, Any]:
        return self.env.env_args

    def success(self) -> bool:
        return self.env.success()

    def expert_action(self) -> NDArray[np.float32]:
        return self.env.expert_action()

    def simulation(self) -> tuple[Any, Any]:
        return self.env.simulation()

    def close(self) -> None:
        self.env.close()

    def _clear(self) -> None:
        if self._scene is not None:
            self._scene.restore()
        self._scene = self._perturbation = None
        self._steps = 0

    def _rng(self, *further: int) -> Generator:
        """The generator of this episode, or of a camera and a control step in it. It is
        the same at all levels, so that a higher one does more of the same.
        """
        assert self._perturbation is not None
        name = zlib.crc32(self._perturbation.name.encode())
        return np.random.default_rng([name, self._index, *(1 + each for each in further)])
