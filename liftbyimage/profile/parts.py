"""Which methods of a model are the parts that a profile tells apart, in our models and in their plain twins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from liftbyimage import reference
from liftbyimage.models import ContextAwarePoseFormer, LiftByImage, Pipeline
from liftbyimage.profile.scopes import Scope

REST = "rest"


class PlainPipeline(nn.Module):
    """The same encoder before the plain twin of a lifter: what a profile compares with."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.encoder, self.reads = pipeline.encoder, pipeline.lifter.reads
        self.lifter = plain_twin(pipeline.lifter)
        dtype = next(pipeline.lifter.parameters()).dtype
        self.lifter.load_state_dict(pipeline.lifter.state_dict())
        self.lifter.to(next(pipeline.lifter.parameters()).device, dtype).eval()

    def forward(self, images: Tensor, *poses: Tensor) -> Any:
        return self.lifter(getattr(self.encoder, self.reads)(images), *poses)


def why_no_twin(lifter: nn.Module) -> str | None:
    if isinstance(lifter, (LiftByImage, ContextAwarePoseFormer)):
        return None
    return f"a {type(lifter).__name__} is plain PyTorch itself"


def plain_twin(lifter: nn.Module) -> nn.Module:
    """The lifter of `liftbyimage.reference` of the same sizes, with weights of its own."""
    if isinstance(lifter, LiftByImage):
        return reference.ReferenceLiftByImage(lifter.config, lifter.positions)
    assert isinstance(lifter, ContextAwarePoseFormer)
    return reference.ReferenceContextAwarePoseFormer(lifter.config)


def scopes_of(model: Pipeline | PlainPipeline) -> list[Scope]:
    """The parts of a pipeline, or of its plain twin under the same names."""
    scopes = _encoder_scopes(model.encoder, model.lifter.reads if isinstance(model, Pipeline) else model.reads)
    lifter = model.lifter
    if hasattr(lifter, "stage1"):
        return scopes + _lift_by_image_scopes(lifter)
    return scopes + _other_scopes(lifter)


def _other_scopes(lifter: nn.Module) -> list[Scope]:
    """A lifter's own children, and those of its lists one by one; what first reads the maps is one part."""
    scopes = [Scope(_EMBED_LEVELS, lifter, "embed_levels")] if hasattr(lifter, "embed_levels") else []
    for name, child in lifter.named_children():
        if name == "feat_embed":
            scopes += [Scope(_EMBED_LEVELS, module) for module in child.children()]
        elif isinstance(child, nn.ModuleList):
            scopes += [Scope(f"{name} {i}", module) for i, module in enumerate(child)]
        else:
            scopes.append(Scope(_EMBED_POSE if name in ("coord_embed", "pose_embed") else name, child))
    return scopes


_EMBED_LEVELS, _EMBED_POSE = "embed levels", "embed pose"


def _encoder_scopes(encoder: nn.Module | None, reads: str | None) -> list[Scope]:
    """The encoder's own children; what it does between them is "encoder, rest"."""
    if encoder is None:
        return []
    scopes = [Scope("encoder, rest", encoder, str(reads))]
    for name, child in encoder.named_children():
        part = "encoder stem" if isinstance(child, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)) else f"encoder {name}"
        # HRNet runs pieces of its last stage one by one: they belong to the stage that holds them.
        pieces = [module for path, module in child.named_modules() if path.count(".") < _PIECES]
        scopes += [Scope(part, module) for module in pieces if not isinstance(module, nn.ModuleList)]
    return scopes


_PIECES = 3  # levels below an encoder's child that are looked at


def _lift_by_image_scopes(lifter: nn.Module) -> list[Scope]:
    ours = isinstance(lifter, LiftByImage)
    scopes = [Scope(_EMBED_POSE, lifter.pose_embed)]
    if ours:
        scopes += [Scope("embed patches", lifter, "embed_patches"), Scope("select patches", lifter.selection)]
        scopes += [Scope("stage 2, rest", lifter, "explore")]
    else:
        scopes += [Scope("embed patches", lifter.feature_norm), Scope("embed patches", lifter.embed)]
    before, after = ("ask", "digest") if ours else ("look_around", "finish")
    for stage in (1, 2):
        for number, layer in enumerate(getattr(lifter, f"stage{stage}")):
            name = f"stage {stage} layer {number}"
            scopes += [
                Scope(f"{name}: attention to patches", layer),
                Scope(f"{name}: among joints", layer, before),
                Scope(f"{name}: feed-forward", layer, after),
            ]
    return scopes + [
        Scope("coarse head", lifter.coarse_head),
        Scope("refined head", lifter.refined_head),
    ]


def example_inputs(pipeline: Pipeline, batch: int, crop: tuple[int, int]) -> tuple[Tensor, ...]:
    """Seeded images [B, 3, H, W] and 2D poses [B, J, 2], in the dtypes and on the device of the pipeline."""
    generator = torch.Generator().manual_seed(0)
    weight = next(pipeline.lifter.parameters())
    source = weight if pipeline.encoder is None else next(pipeline.encoder.parameters())
    images = torch.randn(batch, 3, *crop, generator=generator).to(source.device, source.dtype)
    poses = 2 if isinstance(pipeline.lifter, ContextAwarePoseFormer) else 1
    shape = (batch, pipeline.lifter.config.num_joints, 2)
    drawn = [torch.rand(shape, generator=generator) * 1.8 - 0.9 for _ in range(poses)]
    return images, *(pose.to(weight.device, weight.dtype) for pose in drawn)


def tensors_of(output: Any) -> dict[str, Tensor]:
    """The floating-point results of a lifter by name; which patches were kept may differ by rounding."""
    if isinstance(output, Tensor):
        return {"pose_3d": output}
    return dict(zip(("pose_3d", "coarse_pose_3d", "importance"), output, strict=False))
