"""2D pose models for people who have pictures but no 2D poses: where to look, which joints, whether anyone is there."""

from __future__ import annotations

import importlib
import os
import reprlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from liftbyimage._files import check_several, require_file
from liftbyimage.checkpoint import official_hrnet
from liftbyimage.data.crop import CROP_SIZE, box_to_crop_matrix, normalise_image, read_image, warp_crop
from liftbyimage.data.pose_file import SMALLEST_PERSON, ImagePose, joints_box
from liftbyimage.data.skeleton import COCO_NAMES, coco_to_h36m
from liftbyimage.models.heatmaps import HEATMAP_STRIDE, decode_heatmaps

# images [1, 3, 256, 192], RGB, ImageNet-normalised → heatmaps [1, 17, 64, 48] of the joints in COCO order.
PoseModel = Callable[[Tensor], Tensor]
# image uint8 [H, W, 3], RGB → boxes [N, 4] of the people in it, x0, y0, x1, y1 px; N may be 0.
Detector = Callable[[np.ndarray], ArrayLike]

INPUT_SHAPE = (1, 3, *CROP_SIZE)
HEATMAP_SHAPE = (1, len(COCO_NAMES), CROP_SIZE[0] // HEATMAP_STRIDE, CROP_SIZE[1] // HEATMAP_STRIDE)

CONFIDENT = 0.2  # height of a heatmap's peak
FEWEST_JOINTS = 9  # of 17


def load_pose_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> PoseModel:
    """A 2D pose model: an `.onnx` file, or official HRNet weights (w32 or w48, COCO).

    An ONNX model takes one float32 input [1, 3, 256, 192] (RGB, ImageNet-normalised) and gives the heatmaps
    [1, 17, 64, 48] in COCO order as its first output; it runs on the CPU.

    Args:
        device: where official weights compute.

    Raises:
        ValueError: no such file, not one of these models, or onnxruntime is missing.
    """
    path = Path(path)
    require_file(f"pose model {path}", path)
    if path.suffix.lower() == ".onnx":
        return OnnxPoseModel(path)
    model = official_hrnet(path, "pose model").eval().to(device)

    def heatmaps(images: Tensor) -> Tensor:
        return model(images.to(device), ("heatmaps",))["heatmaps"]

    return heatmaps


class OnnxPoseModel:
    """An ONNX model as a PoseModel; `load_pose_model` says which models serve."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ValueError(f"pose model {path}: needs onnxruntime: pip install onnxruntime") from None
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class of its own for every way a file can be broken
            raise ValueError(f"pose model {path}: not an ONNX model that onnxruntime can load") from error
        self._name = _check_inputs(path, self._session.get_inputs())

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {self._name: images.numpy()})[0])


def _check_inputs(path: str | os.PathLike[str], inputs: list[Any]) -> str:
    """The name of the one input. Dimensions left open are names or None."""
    found = [f"{each.type} {list(each.shape)}" for each in inputs]
    fits = len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(inputs[0].shape) == len(INPUT_SHAPE)
    if not fits or any(
        isinstance(given, int) and given != wanted for given, wanted in zip(inputs[0].shape, INPUT_SHAPE, strict=True)
    ):
        raise ValueError(
            f"pose model {path}: must take one input tensor(float) {list(INPUT_SHAPE)}, "
            f"got {', '.join(found) or 'none'}"
        )
    return inputs[0].name


def find_pose(model: PoseModel, image: np.ndarray, box: ArrayLike) -> ImagePose | None:
    """The 2D pose of the person in a box of a picture, or None if nobody is seen there.

    A joint is confident if its heatmap's peak is at least 0.2. Somebody is seen if every joint is finite, at least 9 of
    the 17 are confident, and those span at least 8 px. The pose's box is the extent of its confident joints with the
    margin of `joints_box`: no truth is needed to crop the person for lifting.

    Args:
        model: [1, 3, 256, 192] → heatmaps [1, 17, 64, 48], COCO order.
        image: uint8 [H, W, 3], RGB.
        box: [4], x0, y0, x1, y1 px; enlarged to the crop's aspect and by 1.25, as `box_to_crop_matrix` does.

    Returns:
        Keypoints in Human3.6M order (`coco_to_h36m`), px of the picture.

    Raises:
        TypeError, ValueError: heatmaps of another kind or shape; a bad image or box.
    """
    if np.shape(box) != (4,):
        raise ValueError(f"find_pose: box must be [4] (x0, y0, x1, y1), got {list(np.shape(box))}")
    matrix = box_to_crop_matrix(box)
    with torch.inference_mode():
        heatmaps = model(normalise_image(warp_crop(image, matrix))[None])
        _check_heatmaps(heatmaps)
        keypoints, scores = decode_heatmaps(heatmaps.cpu(), torch.from_numpy(matrix)[None])
    found = coco_to_h36m(torch.cat([keypoints, scores[..., None]], dim=2)[0].double().numpy())  # [17, 3]
    keypoints, confidence = found[:, :2], found[:, 2]
    confident = keypoints[confidence >= CONFIDENT]
    if not np.isfinite(found).all() or len(confident) < FEWEST_JOINTS:
        return None
    if np.ptp(confident, axis=0).max() < SMALLEST_PERSON:
        return None
    return ImagePose(keypoints, confidence, joints_box(confident))


def _check_heatmaps(heatmaps: object) -> None:
    if not isinstance(heatmaps, Tensor):
        raise TypeError(f"pose model: heatmaps must be a torch.Tensor, got {type(heatmaps).__name__}")
    if tuple(heatmaps.shape) != HEATMAP_SHAPE:
        raise ValueError(
            f"pose model: heatmaps must be {list(HEATMAP_SHAPE)}, got {list(heatmaps.shape)}; "
            "a model of another input size, skeleton or kind of output cannot serve"
        )


def find_poses(
    model: PoseModel,
    images: Iterable[str | os.PathLike[str]],
    box: ArrayLike | None = None,
    detect: Detector | None = None,
) -> dict[str, ImagePose]:
    """The pose of the person in each picture, by `str(image)`, as `lift_images` takes them.

    Args:
        model: as `find_pose` takes it.
        images: image files.
        box: [4] px, where to look in every picture.
        detect: finds the people of a picture; its largest box is looked into. With neither, the whole picture is.

    Raises:
        TypeError: `images` is one file.
        ValueError: an image cannot be read, or nobody is seen in it; what the detector gives is no boxes.
    """
    check_several("find_poses", images)
    poses = {}
    for path in images:
        image = read_image(path)  # type: ignore[arg-type]
        look = where_to_look(image, box, detect)
        pose = None if look is None else find_pose(model, image, look)
        if pose is None:
            reason = "the detector found nobody" if look is None else "the pose model saw nobody"
            raise ValueError(f"image {path}: {reason} in it")
        poses[str(path)] = pose
    return poses


def where_to_look(image: np.ndarray, box: ArrayLike | None = None, detect: Detector | None = None) -> np.ndarray | None:
    """The box [4] to look into: the detector's largest (None if it found nobody), or the given one, or everything."""
    if detect is not None:
        return largest_box(detect(image))
    if box is not None:
        return np.asarray(box, dtype=np.float64)
    height, width = image.shape[:2]
    return np.array([-0.5, -0.5, width - 0.5, height - 0.5])


def largest_box(boxes: ArrayLike) -> np.ndarray | None:
    """The box of largest area of [N, 4] (x0, y0, x1, y1), the first among equals; None of none.

    Raises:
        ValueError: no numbers, another shape, or a box that is not finite with x0 < x1 and y0 < y1.
    """
    try:
        given = np.asarray(boxes)
    except (TypeError, ValueError, RuntimeError):  # lists of several lengths; a tensor on a GPU or with gradients
        given = np.empty(0, dtype=object)
    if given.dtype.kind not in "biuf":
        raise ValueError(f"detector: boxes must be [N, 4] numbers, got {reprlib.repr(boxes)}")
    array = given.astype(np.float64)
    if array.size == 0:
        return None
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"detector: boxes must be [N, 4] (x0, y0, x1, y1), got {list(array.shape)}")
    extent = array[:, 2:] - array[:, :2]  # [N, 2]
    if not (np.isfinite(array).all() and (extent > 0).all()):
        raise ValueError(f"detector: boxes must be finite with x0 < x1 and y0 < y1, got {array.tolist()}")
    return array[extent.prod(axis=1).argmax()]


def load_detector(name: str) -> Detector:
    """The function `package.module:function`, found from the current folder or in the environment.

    Raises:
        ValueError: another form of name, no such module, one that fails to import another, or no such function in it.
    """
    module_name, _, function = name.partition(":")
    if not (function and all(module_name.split("."))):  # nor a name relative to a package: there is none
        raise ValueError(f"detector {name}: expected package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):  # the module or its package, not one it imports
            raise ValueError(f"detector {name}: no module named {missing}") from None
        raise ValueError(f"detector {name}: {module_name} cannot be imported: {error}") from error
    detect = getattr(module, function, None)
    if not callable(detect):
        raise ValueError(f"detector {name}: {module_name} has no function {function}")
    return detect
