"""Skeleton, cameras, crops and datasets."""

from __future__ import annotations

from liftbyimage.data.camera import Camera, camera_to_world, project, undistort_points, world_to_camera
from liftbyimage.data.crop import (
    CROP_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    apply_affine,
    box_to_crop_matrix,
    denormalise_keypoints,
    flip_crop,
    flip_keypoints,
    flip_pose,
    invert_affine,
    normalise_image,
    normalise_keypoints,
    read_image,
    warp_crop,
)
from liftbyimage.data.skeleton import (
    BONES,
    COCO_NAMES,
    FLIP_PAIRS,
    FLIP_PERMUTATION,
    JOINT_NAMES,
    PARENTS,
    coco_to_h36m,
)

__all__ = [
    "BONES",
    "COCO_NAMES",
    "CROP_SIZE",
    "Camera",
    "FLIP_PAIRS",
    "FLIP_PERMUTATION",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "JOINT_NAMES",
    "PARENTS",
    "apply_affine",
    "box_to_crop_matrix",
    "camera_to_world",
    "coco_to_h36m",
    "denormalise_keypoints",
    "flip_crop",
    "flip_keypoints",
    "flip_pose",
    "invert_affine",
    "normalise_image",
    "normalise_keypoints",
    "project",
    "read_image",
    "undistort_points",
    "warp_crop",
    "world_to_camera",
]
