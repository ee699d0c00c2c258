"""The same systems written plainly in PyTorch, without this library's kernels: what every speed figure is against."""

from liftbyimage.reference.context_aware_poseformer import ReferenceContextAwarePoseFormer
from liftbyimage.reference.lift_by_image import ReferenceLiftByImage

__all__ = ["ReferenceContextAwarePoseFormer", "ReferenceLiftByImage"]
