"""One picture per person: what the lifter was given, where it looked, what it kept and what came out."""

from __future__ import annotations

import os
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from mpl_toolkits.mplot3d.axes3d import Axes3D
from numpy.typing import ArrayLike

from liftbyimage._files import write_atomically
from liftbyimage.data.skeleton import BONES, JOINT_NAMES

# Okabe and Ito's palette stays apart under every common colour blindness.
LEFT, RIGHT, MIDDLE = "#0072B2", "#D55E00", "#2B2B2B"
TRUTH, COARSE = "#9A9A9A", "#009E73"
INK, FLOOR = "#222222", "#DADADA"

_FLOOR_CELL = 0.25  # metres
_HALO = [patheffects.withStroke(linewidth=4.6, foreground="white", alpha=0.85)]


def picture_of_person(
    crop: np.ndarray,
    pose_2d: ArrayLike,
    importance: ArrayLike | None,
    index: ArrayLike | None,
    grid: tuple[int, int] | None,
    pose_3d: ArrayLike,
    coarse_pose_3d: ArrayLike | None = None,
    truth_3d: ArrayLike | None = None,
    title: str | None = None,
) -> Figure:
    """Four panels: the crop with its 2D skeleton, the attention over it, the patches kept, the pose in 3D.

    The two in the middle are left out where `importance`, `index` and `grid` are None: a lifter without patches.

    Arrays or CPU tensors. Attention is shown as a multiple of the uniform 1/P on a logarithmic scale. The 3D
    panel looks from the camera's right; its floor is parallel to the camera's x and z axes.

    Args:
        crop: uint8 [H, W, 3], RGB.
        pose_2d: [17, 2], crop px.
        importance: [P] of the P = Hf·Wf patches, row major.
        index: [K], the patches kept, each 0 … P − 1.
        grid: (Hf, Wf).
        pose_3d: [17, 3], metres, root-relative, camera axes (x right, y down, z forward).
        coarse_pose_3d, truth_3d: the same, or None. With a truth, the panel states the errors (MPJPE, mm).
        title: one line above the panels.

    Raises:
        ValueError: an array has another shape, `index` leaves the grid, or only some of `importance`, `index` and
            `grid` are None.
    """
    crop = np.asarray(crop)
    if crop.ndim != 3 or crop.shape[2] != 3 or crop.dtype != np.uint8:
        raise ValueError(f"picture_of_person: crop must be uint8 [H, W, 3], got {crop.dtype} {list(crop.shape)}")
    joints = len(JOINT_NAMES)
    points = _array("pose_2d", pose_2d, (joints, 2))
    patches = _patches(importance, index, grid)
    poses = {"pose_3d": pose_3d, "coarse_pose_3d": coarse_pose_3d, "truth_3d": truth_3d}
    pose, coarse, truth = (None if value is None else _array(name, value, (joints, 3)) for name, value in poses.items())
    assert pose is not None

    image_panels = 1 if patches is None else 3
    figure = Figure(figsize=(3.8 + 2.6 * image_panels, 4.5), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    left = 0.139 / figure.get_figwidth()
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9.5, "text.color": INK}):
        panels = figure.add_gridspec(
            1,
            image_panels + 1,
            width_ratios=(*(1,) * image_panels, 1.4),
            left=left,
            right=0.998,
            top=0.83,
            bottom=0.115,
            wspace=0.02,
        )
        _draw_skeleton(_image_axes(figure, panels[0], crop, "input: crop and 2D pose"), points)
        if patches is not None:
            attention, kept = patches
            _draw_attention(figure, panels[1], crop, attention)
            _draw_kept(figure, panels[2], crop, kept)
        _draw_poses(figure, panels[image_panels], pose, coarse, truth)
        if title:
            figure.text(left, 0.945, title, fontsize=12.5, fontweight="bold", va="center")
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: float = 110) -> None:
    """Write a PNG beside `path`, then rename it: `path` is the old file or the whole new one."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def _array(name: str, values: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    array = _numpy(values).astype(np.float64)
    if array.shape != shape:
        raise ValueError(f"picture_of_person: {name} must be {list(shape)}, got {list(array.shape)}")
    return array


def _numpy(values: ArrayLike) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _patches(
    importance: ArrayLike | None, index: ArrayLike | None, grid: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Attention and what was kept, both [Hf, Wf]; None for a lifter without patches."""
    given = {"importance": importance, "index": index, "grid": grid}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        if len(missing) < len(given):
            raise ValueError(
                "picture_of_person: importance, index and grid must be given together, "
                f"got no {' and no '.join(missing)}"
            )
        return None
    rows, columns = grid
    return _array("importance", importance, (rows * columns,)).reshape(rows, columns), _kept_mask(index, grid)


def _kept_mask(index: ArrayLike, grid: tuple[int, int]) -> np.ndarray:
    rows, columns = grid
    kept = _numpy(index)
    if kept.ndim != 1 or kept.size and not (kept.min() >= 0 and kept.max() < rows * columns):
        raise ValueError(
            f"picture_of_person: index must be [K] of patches 0 … {rows * columns - 1}, got "
            + (f"{kept.min()} … {kept.max()}" if kept.ndim == 1 else f"{list(kept.shape)}")
        )
    mask = np.zeros(rows * columns, dtype=bool)
    mask[kept] = True
    return mask.reshape(rows, columns)


def _image_axes(figure: Figure, place: Any, image: np.ndarray, title: str) -> Axes:
    axes = figure.add_subplot(place)
    axes.imshow(image, interpolation="lanczos")
    axes.set_axis_off()
    axes.set_anchor("NW")
    axes.set_title(title, fontsize=10, pad=6, loc="left")
    # Joints outside the crop must not shrink it.
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)
    return axes


def _grey(crop: np.ndarray) -> np.ndarray:
    return np.repeat(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2).astype(np.float64) / 255


def joint_colour(joint: int) -> str:
    """The colour, #RRGGBB, of a joint and of the bone that ends in it."""
    name = JOINT_NAMES[joint]
    return LEFT if name.startswith("left") else RIGHT if name.startswith("right") else MIDDLE


def _draw_skeleton(axes: Axes, points: np.ndarray) -> None:
    for parent, child in BONES:
        x, y = points[[parent, child]].T
        axes.plot(x, y, color=joint_colour(child), lw=2.6, solid_capstyle="round", path_effects=_HALO, clip_on=True)
    axes.scatter(*points.T, s=20, c=[joint_colour(joint) for joint in range(len(points))], ec="white", lw=0.8, zorder=3)


def _draw_attention(figure: Figure, place: Any, crop: np.ndarray, attention: np.ndarray) -> None:
    height, width = crop.shape[:2]
    ratio = attention / max(attention.mean(), np.finfo(np.float64).tiny)  # 1 is uniform attention
    ratio = np.maximum(np.nan_to_num(ratio), 1e-4)
    low, high = np.percentile(ratio, (40, 99.9))
    norm = LogNorm(low / 1.05, max(high, low * 2), clip=True)
    smooth = np.exp(cv2.resize(np.log(ratio), (width, height), interpolation=cv2.INTER_CUBIC))
    strength = np.asarray(norm(smooth))[..., None]  # [H, W, 1]
    colour_map = matplotlib.colormaps["inferno"]
    heat = colour_map(strength[..., 0])[..., :3]
    cover = 0.25 + 0.65 * strength
    blend = (1 - cover) * 0.75 * _grey(crop) + cover * heat
    axes = _image_axes(figure, place, blend, "stage 1 looks here")
    bar = axes.inset_axes((0.0, -0.055, 1.0, 0.024))
    scale = figure.colorbar(matplotlib.cm.ScalarMappable(norm, colour_map), cax=bar, orientation="horizontal")
    bar.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 20 * low else (1.0, 2.0, 5.0), numticks=8))
    bar.xaxis.set_major_formatter(_times)
    bar.xaxis.set_minor_locator(NullLocator())
    bar.tick_params(labelsize=8, length=2, pad=1.5, colors=INK)
    scale.outline.set_visible(False)
    bar.set_xlabel("attention, multiple of uniform", fontsize=8, labelpad=1)


def _times(value: float, position: float) -> str:
    return f"{value:g}×"


def _draw_kept(figure: Figure, place: Any, crop: np.ndarray, mask: np.ndarray) -> None:
    height, width = crop.shape[:2]
    kept = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)[..., None]
    dimmed = 0.80 + 0.17 * _grey(crop)
    axes = _image_axes(figure, place, np.where(kept, crop / 255, dimmed), "stage 2 sees only these patches")
    axes.text(
        0.0,
        -0.03,
        f"{mask.sum():,} of {mask.size:,} patches kept ({mask.mean():.0%})",
        transform=axes.transAxes,
        fontsize=8,
        va="top",
    )


def _draw_poses(
    figure: Figure, place: Any, pose: np.ndarray, coarse: np.ndarray | None, truth: np.ndarray | None
) -> None:
    axes = figure.add_subplot(place, projection="3d", computed_zorder=False)
    assert isinstance(axes, Axes3D)
    shown = [_upright(p) for p in (pose, coarse, truth) if p is not None]
    _frame(axes, np.concatenate(shown))
    if truth is not None:
        _draw_bones(axes, _upright(truth), lw=5.0, colour=TRUTH, alpha=0.5)
    if coarse is not None:
        _draw_bones(axes, _upright(coarse), lw=1.1, colour=COARSE)
    refined = _upright(pose)
    _draw_bones(axes, refined, lw=2.6)
    axes.scatter(
        *refined.T,
        s=14,
        c=[joint_colour(joint) for joint in range(len(refined))],
        ec="white",
        lw=0.6,
        depthshade=False,
        zorder=4,
    )
    _draw_key(axes, _errors(pose, coarse, truth), coarse is not None, truth is not None)


def _errors(pose: np.ndarray, coarse: np.ndarray | None, truth: np.ndarray | None) -> str:
    if truth is None:
        return ""
    refined, first = (
        None if p is None else f"{1000 * np.linalg.norm(p - truth, axis=1).mean():.0f}" for p in (pose, coarse)
    )
    return f": {refined} mm off" + (f" (coarse {first} mm)" if first else "")


def _upright(pose: np.ndarray) -> np.ndarray:
    """Camera axes (x right, y down, z forward) to the plot's (right, forward, up)."""
    return np.stack([pose[:, 0], pose[:, 2], -pose[:, 1]], axis=1)


def _draw_bones(axes: Axes3D, joints: np.ndarray, lw: float, colour: str | None = None, alpha: float = 1.0) -> None:
    for parent, child in BONES:
        axes.plot(
            *joints[[parent, child]].T,
            color=colour or joint_colour(child),
            lw=lw,
            alpha=alpha,
            solid_capstyle="round",
            clip_on=False,
        )


def _frame(axes: Axes3D, joints: np.ndarray) -> None:
    """Equal scales on all axes, a floor grid under the lowest joint instead of walls and ticks."""
    low, high = joints.min(axis=0), joints.max(axis=0)
    floor = low[2] - 0.02
    first = np.floor((low[:2] - 0.1) / _FLOOR_CELL)
    last = np.ceil((high[:2] + 0.1) / _FLOOR_CELL)
    x = np.arange(first[0], last[0] + 1) * _FLOOR_CELL
    y = np.arange(first[1], last[1] + 1) * _FLOOR_CELL
    floor_line = {"color": FLOOR, "lw": 0.8, "zorder": 0, "clip_on": False}
    for value in x:
        axes.plot([value, value], [y[0], y[-1]], [floor, floor], **floor_line)
    for value in y:
        axes.plot([x[0], x[-1]], [value, value], [floor, floor], **floor_line)
    limits = np.array([[x[0], x[-1]], [y[0], y[-1]], [floor, high[2] + 0.03]])
    axes.set(xlim=limits[0], ylim=limits[1], zlim=limits[2])
    axes.set_box_aspect(np.ptp(limits, axis=1), zoom=1.18)
    axes.view_init(elev=12, azim=-62)
    axes.set_axis_off()


def _draw_key(axes: Axes3D, errors: str, coarse: bool, truth: bool) -> None:
    axes.set_title(f"3D pose{errors}", fontsize=10, pad=6, loc="left")
    entries = [
        (Line2D([], [], color=LEFT, lw=2.6), "left"),
        (Line2D([], [], color=RIGHT, lw=2.6), "right"),
    ]
    if coarse:
        entries.append((Line2D([], [], color=COARSE, lw=1.1), "coarse"))
    if truth:
        entries.append((Line2D([], [], color=TRUTH, lw=5.0, alpha=0.5), "truth"))
    handles, labels = zip(*entries, strict=True)
    axes.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.005),
        ncols=4,
        fontsize=8,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.6,
    )
