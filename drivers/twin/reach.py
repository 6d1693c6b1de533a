"""Where the tool of the twin's arm would be at given joint angles: MuJoCo's kinematics on the twin's own scene.

Shares neither code nor numbers with the chain that the runtime keeps its tool in a box with.
"""

import numpy as np
from numpy.typing import NDArray

from onbeat.drivers.twin.world import JOINTS, SCENE, mujoco

TOOL = "grasp"  # the site between the jaws


def tool_reach(q: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The tool (G, 3), m in the table's frame, at joint angles q (G, J); and how far it moves at most per rad (G,), m.

    The second is the sum of its distances to the joints: an error of e rad in every joint moves the tool by less than
    e times that.
    """
    model = mujoco.MjModel.from_xml_path(str(SCENE))
    data, joints = mujoco.MjData(model), len(JOINTS)
    place_m, lever_m = np.empty((len(q), 3)), np.empty(len(q))
    for k, pose in enumerate(q):
        data.qpos[:joints] = pose
        mujoco.mj_kinematics(model, data)
        place_m[k] = data.site(TOOL).xpos
        lever_m[k] = np.linalg.norm(data.xanchor[: joints - 1] - place_m[k], axis=1).sum()
    return place_m, lever_m
