"""LIBERO's tasks behind the environment contract."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from fibopolicy.envs.base import Observation, SimState, finite_action, own_env_args
from fibopolicy.envs.libero.experts import expert_action
from fibopolicy.envs.libero.installation import (
    PACKAGE,
    checked_assets,
    import_libero,
    official_states,
    problem_file,
)
from fibopolicy.envs.libero.tasks import (
    ASSETS,
    HORIZONS,
    IDLE_STEPS,
    LIBERO,
    instruction_of,
    suite_of,
)
from fibopolicy.envs.rendering import ImageSize, Quality
from fibopolicy.envs.robosuite.environment import RobosuiteEnv
from fibopolicy.errors import unknown
from fibopolicy.utils.system import versions

#: Pixels, the side of the frames in LIBERO's files.
LIBERO_IMAGE_SIZE = 128
#: The action of a robot that stands still with an open gripper.
IDLE = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float32)


class LiberoEnv(RobosuiteEnv):
    """A task of LIBERO (Liu et al., 2023): a Panda in a scene of many objects.

    Observations, actions and states are those of `RobosuiteEnv`, with the poses of all
    objects, e.g. `plate_1_pos`. `info["language_instruction"]` is the
    instruction given to the robot.

    LIBERO prescribes 50 initial states for each task, `benchmark_states`. In these the
    objects are a little above the ground: `begin` takes 10 idle steps, which do not
    count, and `reset` draws a layout and takes them as well. The states do not say
    where furniture stands, which LIBERO draws anew in each reset, within about 1 cm.
    Here it stands where LIBERO puts it in its first reset after `np.random.seed(0)`.

    Args:
        task_id: "libero/", the suite and the task's name, e.g.
            "libero/object/pick_up_the_milk_and_place_it_in_the_basket".
        cameras: the cameras to render. "agentview_rgb" and "eye_in_hand_rgb" are the
            usual ones under the keys of LIBERO's files.
        image_size, quality: as for `RobosuiteEnv`.
        horizon: control steps until truncation, by default those of published
            evaluations of the suite.
        libero_keys: observations also have the vectors of LIBERO's files: `ee_pos`,
            `ee_ori` (axis times angle), `ee_states` (both), `gripper_states` and
            `joint_states`, and these are the proprioception. They always have where a
            camera is named as in those files.

    Raises:
        UserError: LIBERO or its assets are missing; no such task, camera or option.
    """

    def __init__(
        self,
        task_id: str,
        cameras: tuple[str, ...] | list[str] | None = None,
        image_size: ImageSize = LIBERO_IMAGE_SIZE,
        quality: Quality = "fast",
        horizon: int | None = None,
        render_mode: str | None = None,
        libero_keys: bool = False,
    ) -> None:
        if task_id not in LIBERO:
            raise unknown("LIBERO task", task_id, LIBERO)
        libero = import_libero()
        path = str(problem_file(task_id))
        problem = libero.env_wrapper.BDDLUtils.get_problem_info(path)["problem_name"]
        self._libero_keys = libero_keys or any(name.endswith("_rgb") for name in cameras or ())
        super().__init__(
            f"robosuite/{libero.TASK_MAPPING[problem].__name__}",
            cameras,
            image_size,
            quality,
            HORIZONS[suite_of(task_id)] if horizon is None else horizon,
            render_mode,
            robots=["Panda"],
            initialization_noise=None,
            bddl_file_name=path,
        )
        self.task_id = task_id
        self.instruction: str = instruction_of(task_id)
        self._env.set_xml_processor(_complete_paths)
        if self._libero_keys:
            self.eef_keys = ("ee_pos",)
            self.proprioception = ("ee_pos", "ee_ori", "gripper_states", "joint_states")

    @property
    def goal(self) -> tuple[tuple[str, ...], ...]:
        """The predicates that must all hold, e.g. `(("on", "bowl_1", "plate_1"),)`.
        Their arguments are objects, or parts of them such as a drawer.
        """
        return tuple(tuple(predicate) for predicate in self._env.parsed_problem["goal_state"])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a layout from `seed`, in LIBERO's ranges, and let the objects come to rest."""
        obs, info = super().reset(seed=seed, options=options)
        return obs, info | {"language_instruction": self.instruction}

    def advance(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[float, bool, bool, dict[str, Any]]:
        reward, terminated, truncated, info = super().advance(action)
        return reward, terminated, truncated, info | {"language_instruction": self.instruction}

    def observe(self) -> Observation:
        self._env._post_process()  # a stove that is on glows
        return super().observe()

    def expert_action(self) -> NDArray[np.float32]:
        return expert_action(self.task_id, self._env, self.goal[0])

    def begin(self, obs: Observation) -> Observation:
        if self._env.sim.data.time > 0:  # `reset` drew this state
            return obs
        self._idle()
        return self.observe()

    def benchmark_states(self) -> tuple[SimState, ...]:
        """LIBERO's 50 initial states, as they are published, at time 0."""
        with _seeded(0):
            # LIBERO's first reset loads the model again and adds its samplers of joints
            # to those of the constructor, so that it draws each joint twice.
            for joint in self._env.object_property_initializers:
                joint.sample()
            self._place()
        model = self._source = self._text.current()
        return tuple(SimState(model, state) for state in official_states(self.task_id))

    @property
    def env_args(self) -> dict[str, Any]:
        version, size = versions()[PACKAGE], self._sizes.stored()
        own = own_env_args(self, version, self.cameras, size, libero_keys=self._libero_keys)
        return {**own, "language_instruction": self.instruction}

    def _camera_name(self, camera: str) -> str:
        name = camera.removesuffix("_rgb")
        return "robot0_eye_in_hand" if name == "eye_in_hand" else name

    def _draw_layout(self) -> None:
        with _seeded(int(self.np_random.integers(2**32))):
            self._place()
        self._idle()

    def _place(self) -> None:
        """Draw a layout with NumPy's global generator, as LIBERO does."""
        from robosuite.utils.errors import RandomizationError

        # LIBERO expects a fresh model: to what is drawn in or on furniture it adds where
        # the furniture stands in the model.
        model = self._env.sim.model
        for fixture in self._env.fixtures_dict.values():
            body = model.body_name2id(fixture.root_body)
            model.body_pos[body], model.body_quat[body] = 0, (1, 0, 0, 0)
        while True:
            with contextlib.suppress(RandomizationError):  # no room for an object
                self._env.reset()
                return

    def _idle(self) -> None:
        for _ in range(IDLE_STEPS):
            self._env.step(finite_action(self, IDLE))
        self._steps = 0

    def _vectors(self) -> Observation:
        vectors = super()._vectors()
        if self._libero_keys:
            position, turn = vectors["robot0_eef_pos"], vectors["robot0_eef_quat"]
            angles = Rotation.from_quat(turn).as_rotvec().astype(np.float32)
            vectors |= {
                "ee_pos": position,
                "ee_ori": angles,
                "ee_states": np.concatenate([position, angles]),
                "gripper_states": vectors["robot0_gripper_qpos"],
                "joint_states": vectors["robot0_joint_pos"],
            }
        return vectors


def file_options(env_args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `LiberoEnv` that one of LIBERO's own files describes."""
    kwargs = env_args["env_kwargs"]
    size = kwargs.get("camera_heights", LIBERO_IMAGE_SIZE), kwargs.get("camera_widths")
    return {
        "image_size": size[0] if size[1] in (None, size[0]) else size,
        "quality": env_args.get("render_quality", "full"),
        "libero_keys": True,
    }


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, and give it back its state."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def _complete_paths(model: str) -> str:
    """MJCF text with LIBERO's files as they lie on this machine."""
    return model.replace(f'file="{ASSETS}', f'file="{checked_assets()}/assets/')
