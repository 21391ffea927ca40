from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fibopolicy.envs.rendering import SceneRenderer, configure_gl
from fibopolicy.errors import UserError

configure_gl()
import mujoco  # noqa: E402

SCENE = """
<mujoco><visual><quality shadowsize="0"/></visual><worldbody>
  <light pos="0 0 4"/>
  <geom type="plane" size="5 5 .1" rgba=".3 .3 .3 1" group="1"/>
  <camera name="inside" pos="0 0 1" euler="70 10 0" fovy="50"/>
  <camera name="down" pos="0 0 {height}" fovy="30"/>
  {spheres}
</worldbody></mujoco>
"""


def load(colour: str = "1 0 0 1", height: float = 3) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    spheres = "".join(
        f'<geom size="{size:.3f}" pos="{x:.3f} {y:.3f} {z:.3f}" rgba="{colour}" group="1"/>'
        for (x, y, z), size in zip(
            random.uniform([-3, -3, 0], [3, 3, 3], (80, 3)),
            random.uniform(0.05, 0.4, 80),
            strict=True,
        )
    )
    model = mujoco.MjModel.from_xml_string(SCENE.format(spheres=spheres, height=height))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


@pytest.fixture
def renderer() -> SceneRenderer:
    try:
        return SceneRenderer(40, 60)
    except UserError as error:
        pytest.skip(str(error))


def test_leaving_out_geometry_beyond_the_view_changes_no_pixel(renderer: SceneRenderer) -> None:
    model, data = load()
    groups = model.geom_group.copy()
    renderer.load(model)
    for camera in ("inside", "down"):
        whole, culled = (renderer.render(data, camera, cull=cull) for cull in (False, True))
        assert whole.shape == (40, 60, 3)
        assert whole.std() > 10
        np.testing.assert_array_equal(whole, culled)
        hidden = renderer._out_of_view(data, model.camera(camera).id, 60 / 40)
        assert 10 < hidden.sum() < 80
    assert np.array_equal(model.geom_group, groups)
    renderer.close()


def test_a_similar_model_reuses_the_context_and_renders_its_own_frames(
    renderer: SceneRenderer,
) -> None:
    first, second = load(), load(colour="0 1 0 1")
    renderer.load(first[0])
    context = renderer._context
    red = renderer.render(first[1], "down", cull=True)
    renderer.load(second[0])
    assert renderer._context is context
    green = renderer.render(second[1], "down", cull=True)
    other = SceneRenderer(40, 60)
    other.load(second[0])
    np.testing.assert_array_equal(green, other.render(second[1], "down", cull=True))
    other.close()
    assert (red[..., 0].max(), green[..., 0].max()) > (100, 0)
    # after another was closed
    np.testing.assert_array_equal(renderer.render(second[1], "down", cull=True), green)
    renderer.close()
    renderer.close()
