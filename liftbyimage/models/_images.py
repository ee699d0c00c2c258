from __future__ import annotations

from torch import Tensor

from liftbyimage.ops._checks import check_dtype


def check_images(owner: str, images: Tensor, weight: Tensor, multiple: int) -> None:
    """Require `images` [B, 3, H, W], placed and typed like `weight`, H and W divisible by `multiple`."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{owner}: images must be a torch.Tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"{owner}: images must be a floating-point tensor, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{owner}: images must have shape [B, 3, H, W], got {list(images.shape)}")
    height, width = images.shape[2:]
    if height < multiple or width < multiple or height % multiple or width % multiple:
        raise ValueError(
            f"{owner}: images must have height and width that are multiples of {multiple}, got {height}x{width}"
        )
    if images.device != weight.device:
        raise ValueError(f"{owner}: images must be on the weights' device {weight.device}, got {images.device}")
    check_dtype(owner, "images", images, "the weights'", weight.dtype)
