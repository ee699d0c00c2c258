"""A small ASF/AMC database as CMU's is laid out: one subject that walks on the spot."""

from __future__ import annotations

import math
from pathlib import Path

# name, direction, length, axis, dof, parent; one side, the other is its mirror image
_TRUNK = (
    ("lowerback", "0 1 0", 2.0, "0 0 0", "rx ry rz", "root"),
    ("thorax", "0 1 0", 4.0, "0 0 0", "rx ry rz", "lowerback"),
    ("lowerneck", "0 1 0", 1.6, "0 0 0", "rx ry rz", "thorax"),
    ("upperneck", "0 1 0", 1.6, "0 0 0", "rx ry rz", "lowerneck"),
    ("head", "0 1 0", 1.6, "0 0 0", "rx ry rz", "upperneck"),
)
_SIDE = (
    ("hipjoint", "{s}0.65 -0.72 0.25", 2.5, "0 0 0", "", "root"),
    ("femur", "{s}0.34202 -0.939693 0", 7.5, "0 0 {s}20", "rx ry rz", "hipjoint"),
    ("tibia", "{s}0.34202 -0.939693 0", 7.3, "0 0 {s}20", "rx", "femur"),
    ("foot", "{s}0.09 -0.25 0.96", 2.2, "-90 0 {s}20", "rx rz", "tibia"),
    ("clavicle", "{s}0.97 0.24 0", 3.5, "0 0 0", "ry rz", "thorax"),
    ("humerus", "{s}1 0 0", 5.0, "180 {t}30 {t}90", "rx ry rz", "clavicle"),
    ("radius", "{s}1 0 0", 3.3, "180 {t}30 {t}90", "rx", "humerus"),
    ("wrist", "{s}1 0 0", 1.7, "0 {s}90 {s}90", "ry", "radius"),
    ("hand", "{s}1 0 0", 0.7, "0 {s}90 {s}90", "rx rz", "wrist"),
)
HEADER = """:version 1.10
:units
  mass 1.0
  length 0.45
  angle deg
:root
  order TX TY TZ RX RY RZ
  axis XYZ
  position 0 0 0
  orientation 0 0 0
:bonedata
"""


def bones() -> list[tuple[str, str, float, str, str, str]]:
    """Name, direction, length, axis, dof and parent of every bone."""
    sides = []
    for side, s, t in (("l", "", "-"), ("r", "-", "")):
        for name, direction, length, axis, dof, parent in _SIDE:
            parent = parent if parent in ("root", "thorax") else f"{side}{parent}"
            sides.append((f"{side}{name}", direction.format(s=s), length, axis.format(s=s, t=t), dof, parent))
    return [*_TRUNK, *sides]


def asf_text() -> str:
    lines = [HEADER.rstrip("\n")]
    for number, (name, direction, length, axis, dof, _) in enumerate(bones(), start=1):
        lines += ["  begin", f"     id {number}", f"     name {name}", f"     direction {direction}"]
        lines += [f"     length {length}", f"     axis {axis}  XYZ"]
        lines += [f"    dof {dof}", "    limits (-160.0 20.0)", "           (-70.0 70.0)"] if dof else []
        lines += ["  end"]
    lines += [":hierarchy", "  begin"]
    lines += [f"    {parent} {name}" for name, *_, parent in bones()]
    return "\n".join([*lines, "  end", ""])


def amc_text(frames: int) -> str:
    lines = ["#!OML:ASF made for a test", ":FULLY-SPECIFIED", ":DEGREES"]
    for frame in range(frames):
        swing = 30 * math.sin(2 * math.pi * frame / 120)
        lines += [str(frame + 1), f"root {0.02 * frame} 17 {0.2 * frame} 0 10 0"]
        for name, *_, dof, _ in bones():
            if dof:
                lines.append(" ".join([name, *(str(angle) for angle in _angles(name, swing)[: len(dof.split())])]))
    return "\n".join([*lines, ""])


def _angles(name: str, swing: float) -> tuple[float, float, float]:
    side = -1 if name[0] == "r" else 1
    if name.endswith("femur"):
        return -side * swing, 0, -side * 20
    if name.endswith("tibia"):
        return 20 - 0.5 * side * swing, 0, 0
    if name.endswith("humerus"):
        return side * swing, 0, side * 70
    return (15, 0, 0) if name.endswith("radius") else (0, 0, 0)


def write_mocap(root: Path, clips: dict[str, int]) -> Path:
    """Write clips, name ("02_01") → frames, with the skeleton of each subject; returns the root."""
    for name, frames in clips.items():
        folder = root / name.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{folder.name}.asf").write_text(asf_text())
        (folder / f"{name}.amc").write_text(amc_text(frames))
    return root
