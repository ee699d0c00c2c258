"""Lifting by Image: the two-stage lifter.

Stage 1 (broad query): joints query all image patches in three layers, the middle one pose-guided; a linear head gives a
coarse pose, and the last layer's attention gives each patch's importance. Adaptive feature selection keeps the top
patches. Stage 2 (focused exploration): three more layers over the kept, pose-guided patches; a linear head gives
the refined pose. No gradient flows from stage 2 into stage 1.

Source: F. Zhou, J. Yin, P. Li, "Lifting by Image – Leveraging Image Cues for Accurate 3D Human Pose Estimation",
AAAI 2024. No public code exists; where the paper is silent the choices are documented in docs/systems.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from liftbyimage.data.crop import CROP_SIZE, flip_normalised, flip_pose, normalised_pose
from liftbyimage.metrics import root_relative
from liftbyimage.models.capture import CapturedModule, capture
from liftbyimage.nn import FactoredPatches, FeatureSelection, PoseGuidedLayer, TransformerLayer
from liftbyimage.nn.formulation import Formulation, check_formulation
from liftbyimage.ops._checks import check_dtype

NUM_FREQUENCIES = 4
POSITION_CHANNELS = NUM_FREQUENCIES * 2 * 2  # sine and cosine, of x and y
_LAYERS = 3  # of each stage


@dataclass(frozen=True)
class LiftByImageConfig:
    """Sizes of a LiftByImage model; the defaults are the paper's with an HRNet-w32 encoder.

    image_channels C and grid (Hf, Wf) of the encoder's map, token width dim D, heads, feed-forward mlp_ratio·D,
    dropout, retention r of the patches kept for stage 2, joints J, whether patches get a feed-forward
    (PoseGuidedLayer), and which of stage 1's three layers is the pose-guided one: 1, the middle one, as in the paper,
    0, 2, or None for plain cross-attention in all three.
    """

    image_channels: int = 32
    grid: tuple[int, int] = (64, 48)
    dim: int = 256
    heads: int = 8
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    retention: float = 0.3
    num_joints: int = 17
    image_feed_forward: bool = False
    pose_guided_layer: int | None = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"LiftByImageConfig: grid must be (Hf, Wf) of positive ints, got {self.grid}")
        for name in ("image_channels", "num_joints"):
            if getattr(self, name) < 1:
                raise ValueError(f"LiftByImageConfig: {name} must be >= 1, got {getattr(self, name)}")
        if self.pose_guided_layer not in (None, *range(_LAYERS)):
            raise ValueError(
                f"LiftByImageConfig: pose_guided_layer must be 0, 1, 2 or None, got {self.pose_guided_layer!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "grid": list(self.grid)}


class LiftedPose(NamedTuple):
    pose_3d: Tensor  # [B, J, 3] metres, root-relative, camera axes: refined, of stage 2
    coarse_pose_3d: Tensor  # [B, J, 3] the same, of stage 1
    importance: Tensor  # [B, P] attention paid to each patch by stage 1's last layer; sums to 1
    index: Tensor  # [B, K] the patches kept for stage 2, ascending


def position_channels(grid: tuple[int, int]) -> Tensor:
    """Fixed sine/cosine channels of every patch's centre, [P, 16]: per frequency sin x, sin y, cos x, cos y.

    Coordinates are in [-1, 1]; the lowest frequency has half a period over that range, each next one twice as many.
    """
    rows, columns = grid
    y = (torch.arange(rows) + 0.5) / rows * 2 - 1
    x = (torch.arange(columns) + 0.5) / columns * 2 - 1
    centres = torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=1)  # [P, 2]
    channels = []
    for octave in range(NUM_FREQUENCIES):
        angle = centres * (math.pi / 2 * 2**octave)
        channels += [angle.sin(), angle.cos()]
    return torch.cat(channels, dim=1)


def _through(
    layer: nn.Module, joints: Tensor, patches: Tensor | FactoredPatches
) -> tuple[Tensor, Tensor | FactoredPatches]:
    """Joints and patches after a layer of stage 1; only a pose-guided one changes patches."""
    if isinstance(layer, PoseGuidedLayer):
        return layer(joints, patches)
    return layer(joints, patches), patches


class LiftByImage(nn.Module):
    """The two-stage lifter: encoder features and a 2D pose in, a coarse and a refined 3D pose out.

    `stage1_parameters()` and `stage2_parameters()` give what each training stage optimises.

    Args:
        config: sizes.
        formulation: how its layers attend to patches: "projected" or "absorbed" on tokens that are formed,
            "factored" without ever forming one, "auto" as each layer is cheapest (docs/kernels/factored.md). Outputs
            agree to rounding.
    """

    name, config_type = "lift-by-image", LiftByImageConfig
    reads = "features"  # the encoder's method that gives what this lifter reads
    encoder_is_frozen = False

    def __init__(self, config: LiftByImageConfig | None = None, formulation: Formulation = "auto") -> None:
        super().__init__()
        if config is not None and not isinstance(config, LiftByImageConfig):
            raise TypeError(f"LiftByImage: config must be a LiftByImageConfig, got {type(config).__name__}")
        self.config = config = config or LiftByImageConfig()
        self.formulation = check_formulation(formulation)
        if formulation == "factored" and config.image_feed_forward:
            raise ValueError(
                "LiftByImage: formulation 'factored' needs image_feed_forward=False; a feed-forward forms the tokens"
            )
        sizes = (config.dim, config.heads, config.mlp_ratio, config.dropout)
        self.feature_norm = nn.BatchNorm2d(config.image_channels)
        self.embed = nn.Linear(config.image_channels + POSITION_CHANNELS, config.dim)
        self.pose_embed = nn.Linear(2, config.dim)
        # As large as a normalised token, or all joints ask the same question for the first hundred steps.
        self.joint_embedding = nn.Parameter(torch.randn(config.num_joints, config.dim))
        self.stage1 = nn.ModuleList(
            [
                PoseGuidedLayer(*sizes, formulation, config.image_feed_forward)
                if layer == config.pose_guided_layer
                else TransformerLayer(*sizes, formulation)
                for layer in range(_LAYERS)
            ]
        )
        self.coarse_head = nn.Linear(config.dim, 3)
        self.selection = FeatureSelection(config.retention)
        self.stage2 = nn.ModuleList([TransformerLayer(*sizes, formulation) for _ in range(_LAYERS)])
        self.refined_head = nn.Linear(config.dim, 3)
        self.register_buffer("positions", position_channels(config.grid), persistent=False)  # [P, 16]

    def forward(self, features: Tensor, pose_2d: Tensor) -> LiftedPose:
        """Lift a batch.

        Args:
            features: [B, C, Hf, Wf] of the encoder.
            pose_2d: [B, J, 2], crop pixels normalised to [-1, 1] (x over width, y over height).

        Returns:
            LiftedPose, in metres, root-relative, camera axes (x right, y down, z forward).
        """
        self._check(features, pose_2d)
        joints, patches, importance = self.broad_query(features, pose_2d)
        coarse = root_relative(self.coarse_head(joints))
        kept = self.selection(patches.detach(), importance.detach())
        refined = self.explore(joints.detach(), kept.patches)
        return LiftedPose(refined, coarse, importance, kept.index)

    def capture(self, batch: int) -> CapturedModule:
        """Record `forward` for `batch` samples as a CUDA graph (`models.capture`): replayed, it is one launch.

        Args:
            batch: B, the number of samples of every later call.

        Returns:
            CapturedModule, called like `forward` with features [B, C, Hf, Wf] and pose_2d [B, J, 2] in the dtype and
            on the device of the parameters; it returns a LiftedPose without gradients. Weights loaded later take
            effect.

        Raises:
            TypeError: batch is no int.
            ValueError: batch is below 1, the model is in training mode, or a parameter is not on a CUDA device.
        """
        if isinstance(batch, bool) or not isinstance(batch, int):
            raise TypeError(f"LiftByImage.capture: batch must be an int >= 1, got {type(batch).__name__}")
        if batch < 1:
            raise ValueError(f"LiftByImage.capture: batch must be an int >= 1, got {batch}")
        if self.training:
            raise ValueError("LiftByImage.capture: the model must be in eval mode, got one in training mode")
        for name, parameter in self.named_parameters():
            if parameter.device.type != "cuda":
                raise ValueError(
                    f"LiftByImage.capture: parameters must be on a CUDA device, got {parameter.device.type} for {name}"
                )
        config, weight = self.config, self.embed.weight
        features = weight.new_zeros(batch, config.image_channels, *config.grid)
        return capture(self, features, weight.new_zeros(batch, config.num_joints, 2))

    def broad_query(self, features: Tensor, pose_2d: Tensor) -> tuple[Tensor, Tensor | FactoredPatches, Tensor]:
        """Stage 1: joints [B, J, D], pose-guided patches [B, P, D], importance [B, P]."""
        joints, patches = self._tokens(features, pose_2d)
        *before, last = self.stage1
        for layer in before:
            joints, patches = _through(layer, joints, patches)
        if isinstance(last, PoseGuidedLayer):
            return last(joints, patches, need_importance=True)
        joints, importance = last(joints, patches, need_importance=True)
        return joints, patches, importance

    def attention_maps(self, features: Tensor, pose_2d: Tensor) -> list[Tensor]:
        """Where each joint looks in the image, in every layer of stage 1 (arguments as `forward`).

        Each layer's attention is computed once more for it, so that `forward` need not keep it.

        Returns:
            One [B, H, J, P] per layer, in the model's dtype: each head's softmax over the P = Hf·Wf patches, row major.
            In evaluation mode the last one's mean over heads and joints is `LiftedPose.importance`.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        self._check(features, pose_2d)
        joints, patches = self._tokens(features, pose_2d)
        *before, last = self.stage1
        maps = []
        for layer in before:
            maps.append(layer.attention_map(joints, patches))
            joints, patches = _through(layer, joints, patches)
        return [*maps, last.attention_map(joints, patches)]

    def explore(self, joints: Tensor, kept: Tensor | FactoredPatches) -> Tensor:
        """Stage 2 over the kept patches [B, K, D]: the refined pose [B, J, 3]."""
        if self.formulation == "auto":
            kept = self.stage2[0].attention_size(joints.shape[1]).cheapest_to_read(kept, len(self.stage2))
        for layer in self.stage2:
            joints = layer(joints, kept)
        return root_relative(self.refined_head(joints))

    def _tokens(self, features: Tensor, pose_2d: Tensor) -> tuple[Tensor, Tensor | FactoredPatches]:
        """What stage 1 starts from: joints [B, J, D] and patches [B, P, D]."""
        return self.pose_embed(pose_2d) + self.joint_embedding, self.embed_patches(features)

    def embed_patches(self, features: Tensor) -> Tensor | FactoredPatches:
        """Image tokens [B, P, D] = linear([batch-norm(features) | position channels]); factored unless formed ones
        were asked for.

        In evaluation the batch norm's scale and shift join the embedding. Its mean is subtracted from the channels: a
        mean far larger than the deviation would otherwise cost digits of every score.
        """
        norm, channels = self.feature_norm, self.config.image_channels
        embedding, bias = self.embed.weight.T, self.embed.bias  # [W, D]
        if norm.training:
            features = norm(features)
        else:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)  # [C]
            features = features - norm.running_mean[:, None, None]
            bias = torch.addmv(bias, self.embed.weight[:, :channels], norm.bias)
            embedding = torch.cat([embedding[:channels] * scale[:, None], embedding[channels:]])
        positions = self.positions.to(features.dtype).expand(features.shape[0], -1, -1)
        patches = FactoredPatches(torch.cat([features.flatten(2).transpose(1, 2), positions], dim=2), embedding, bias)
        return patches.dense() if self.formulation in ("projected", "absorbed") else patches

    @staticmethod
    def sizes(encoder: nn.Module, crop_size: tuple[int, int]) -> dict[str, Any]:
        """What an encoder and crops of (height, width) px decide of the configuration."""
        return {"image_channels": encoder.channels, "grid": tuple(side // encoder.stride for side in crop_size)}

    def check_encoder(self, encoder: nn.Module) -> None:
        channels = getattr(encoder, "channels", None)
        if channels != self.config.image_channels:
            raise ValueError(
                f"Pipeline: encoder must give the lifter's {self.config.image_channels} channels, got {channels}"
            )

    def pose_inputs(
        self,
        keypoints: np.ndarray,
        crop_matrix: np.ndarray,
        image_size: np.ndarray,
        crop_size: tuple[int, int] = CROP_SIZE,
    ) -> tuple[Tensor, ...]:
        """(pose_2d,) of keypoints [N, J, 2] in px of pictures, which crop_matrix [N, 2, 3] maps to px of crops.

        crop_size is (height, width); image_size [N, 2] (width, height) is what other lifters need.
        """
        return (normalised_pose(keypoints, crop_matrix, crop_size),)

    def flip_inputs(self, pose_2d: Tensor, crop_width: int = CROP_SIZE[1]) -> tuple[Tensor, ...]:
        """pose_2d [B, 17, 2] of the mirrored crop; its width changes nothing."""
        return (flip_normalised(pose_2d),)

    def flip_output(self, pose_3d: Tensor) -> Tensor:
        """A pose [B, 17, 3] of the mirrored crop, mirrored back."""
        return flip_pose(pose_3d)

    def stage1_parameters(self) -> list[nn.Parameter]:
        modules = (self.feature_norm, self.embed, self.pose_embed, self.stage1, self.coarse_head)
        return [self.joint_embedding, *(p for module in modules for p in module.parameters())]

    def stage2_parameters(self) -> list[nn.Parameter]:
        return [p for module in (self.stage2, self.refined_head) for p in module.parameters()]

    def _check(self, features: Tensor, pose_2d: Tensor) -> None:
        config = self.config
        expected = (config.image_channels, *config.grid)
        if features.dim() != 4 or tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"LiftByImage: features must have shape [B, {', '.join(map(str, expected))}], "
                f"got {list(features.shape)}"
            )
        for name, tensor in (("features", features), ("pose_2d", pose_2d)):
            check_dtype("LiftByImage", name, tensor, "the model's", self.embed.weight.dtype)
        if tuple(pose_2d.shape) != (features.shape[0], config.num_joints, 2):
            raise ValueError(
                f"LiftByImage: pose_2d must have shape [{features.shape[0]}, {config.num_joints}, 2], "
                f"got {list(pose_2d.shape)}"
            )
