"""NutAssemblySquare: grasp the square nut by its handle and thread it on the square peg."""

from __future__ import annotations

import numpy as np

from fibopolicy.envs.robosuite_experts.motion import CLOSE, MIDDLE_YAW, Action, Arm, nearest

#: Where the handle is grasped, from the nut's centre, and half its width, metres.
GRIP, HALF_WIDTH = 0.058, 0.0159
#: A hand farther aside of the handle than this does not turn yet, metres: as with a
#: cube, policies must look before they turn.
SEEN = 0.05
#: Heights of the nut's centre above the peg's middle, metres: carried over the peg,
#: just over its top, surely around it.
OVER, TOP, AROUND = 0.13, 0.105, 0.085
#: How far the nut may be off the peg's axis, metres, to go down, to be held just over
#: the top, and to be carried high up. In between the height is in between: a hand that
#: changed its mind at a line would teach policies to wait there.
MISS = (0.005, 0.008, 0.02)


def nut_assembly_square(arm: Arm) -> Action:
    nut, rotation = arm.body("SquareNut_main")
    peg, _ = arm.body("peg1")
    handle = rotation[:, 0]
    # On the peg the handle points at the robot: beside or behind the peg the arm does
    # not reach.
    turn = nearest(float(np.arctan2(-handle[1], -handle[0])), MIDDLE_YAW, 2 * np.pi)
    # A handle can be grasped in two ways, half a turn apart: by the smaller turn, away
    # from the stops of the last joint.
    yaw = nearest(turn, float(np.clip(arm.yaw, MIDDLE_YAW - 1.5, MIDDLE_YAW + 1.5)), np.pi)
    grasp = arm.grasp(nut + GRIP * handle + [0, 0, 0.004], yaw, HALF_WIDTH, turn_within=SEEN)
    if grasp is not None:
        return grasp

    # Held: turn the nut with the hand, which ends at 0 or at half a turn, whichever way
    # it grasped.
    final = 0.0 if np.cos(turn - arm.yaw) > 0 else np.pi
    left = nearest(-turn, final - arm.yaw, 2 * np.pi)
    c, s = np.cos(left), np.sin(left)
    hand = arm.position - nut
    place = peg + [c * hand[0] - s * hand[1], s * hand[0] + c * hand[1], hand[2]]
    off = float(np.linalg.norm((nut - peg)[:2]))
    height = nut[2] - peg[2]
    lift = float(np.interp(off + 0.1 * max(0.0, abs(left) - 0.05), MISS, [0, TOP, OVER]))
    if height < AROUND and off < 0.012:
        lift = 0.0
    if height < lift - 0.02 and off > MISS[-1]:
        place[:2] = arm.position[:2]
    # The hand slows down over the last 12 centimetres: at full speed it shoots past the
    # peg.
    aside = place[:2] - arm.position[:2]
    place[:2] = arm.position[:2] + aside * min(1.0, max(0.01 / (np.linalg.norm(aside) + 1e-9), 0.2))
    place[2] += lift
    return arm.toward(place, arm.yaw + left, CLOSE)
