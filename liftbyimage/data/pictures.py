"""A folder of pictures and a file with the 2D pose of the person in each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from liftbyimage._files import sha256_of
from liftbyimage.data.crop import CROP_SIZE, box_to_crop_matrix, crop_size, read_image, warp_crop
from liftbyimage.data.pose_file import EVERY_IMAGE, check_pixels, read_pose_file
from liftbyimage.data.source import CorruptRecord, Source


class PicturePeople(Source):
    """The pictures that a pose file names, in its order; nobody knows their 3D poses or masks.

    The crop is that of `lift`: round the entry's box, or the extent of its confident joints. `groups` are the folders
    of the pictures, as the pose file writes them, "." for those in `root`. `description` knows the pose file's
    contents, but not whether a picture has changed.

    Args:
        root: the folder that the names in the pose file start from.
        poses: the pose file, `root`/poses.json by default; its format is `data.pose_file.read_pose_file`'s.
        size: crop (height, width) in px, or text such as "128x96".

    Raises:
        ValueError: a missing folder, or what `read_pose_file` refuses.
    """

    def __init__(
        self, root: str | Path, *, poses: str | Path = "poses.json", size: Sequence[int] | str = CROP_SIZE
    ) -> None:
        self.root, self.size = Path(root), crop_size(size)
        file = self.root / poses
        if not file.is_file():
            raise ValueError(
                f"root {root}: expected a folder with pictures and {poses}, "
                '{"NAME.jpg": {"keypoints": [[x, y], …]}, …}, missing ' + str(file)
            )
        self._poses = list(read_pose_file(file).items())
        if not self._poses or self._poses[0][0] == EVERY_IMAGE:
            raise ValueError(f"pose file {file}: expected the pose of each picture by its name, got no names")
        folders = [Path(name).parent.as_posix() for name, _ in self._poses]
        self.groups = tuple(dict.fromkeys(folders))
        self._group = [self.groups.index(folder) for folder in folders]
        self.description = {"source": "pictures", "poses_sha256": sha256_of(file), "size": list(self.size)}

    def __len__(self) -> int:
        return len(self._poses)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, pose = self._poses[index]
        try:
            image = read_image(self.root / name)
            check_pixels(self.root / name, pose, image)
        except (OSError, ValueError) as error:
            raise CorruptRecord(str(error)) from None
        matrix = box_to_crop_matrix(pose.box, self.size)
        return {
            "image": warp_crop(image, matrix, self.size),
            "keypoints": pose.keypoints.astype(np.float32),
            "crop_matrix": matrix,
            "image_size": np.array(image.shape[1::-1], dtype=np.float32),
            "group": self._group[index],
        }
