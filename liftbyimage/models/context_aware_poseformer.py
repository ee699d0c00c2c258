"""Context-Aware PoseFormer: a single 2D pose, and the feature maps of a frozen 2D-pose backbone read around its joints.

Tokens of the 2D pose and, per level of the backbone, of the map at each joint [B, 1 + L, J, D]; context blocks read
each level's map at learned places; level blocks attend over the 1 + L tokens of a joint; joint blocks over the joints,
whose tokens are their levels' side by side. State-dict names and initialisation are the published ones.

Source: Q. Zhao, C. Zheng, M. Liu, C. Chen, "A Single 2D Pose with Context is Worth Hundreds for 3D Human Pose
Estimation", NeurIPS 2023, and its published code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from liftbyimage.data.crop import CROP_SIZE, apply_affine
from liftbyimage.data.skeleton import FLIP_PERMUTATION, MPI_INF_3DHP_FLIP_PERMUTATION, MPI_INF_3DHP_ROOT
from liftbyimage.nn import ContextBlock, TokenBlock
from liftbyimage.ops import sample_context
from liftbyimage.ops._checks import check_dtype

_MOST_LEVELS = 16
SKELETONS = {"human3.6m": (0, FLIP_PERMUTATION), "mpi-inf-3dhp": (MPI_INF_3DHP_ROOT, MPI_INF_3DHP_FLIP_PERMUTATION)}


@dataclass(frozen=True)
class ContextAwarePoseFormerConfig:
    """Sizes of a ContextAwarePoseFormer; the defaults are the published ones for Human3.6M with HRNet-w32.

    channels C_l of the backbone's maps, one per level (HRNet-w48: 48, 96, 192, 384; CPN: four times 256), token width
    dim D, heads of level and joint blocks, heads and samples of context blocks, blocks of each kind (depth),
    feed-forward mlp_ratio·D, drop_path of the last block (0 for the first, rising linearly), joints J, whether there
    are context blocks, and the skeleton ("human3.6m" or "mpi-inf-3dhp"), which says which joint is the root and which
    change places when mirrored.
    """

    channels: tuple[int, ...] = (32, 64, 128, 256)
    dim: int = 128
    heads: int = 8
    context_heads: int = 4
    samples: int = 4
    depth: int = 4
    mlp_ratio: float = 2.0
    drop_path: float = 0.2
    num_joints: int = 17
    context: bool = True
    skeleton: str = "human3.6m"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        owner = "ContextAwarePoseFormerConfig"
        if not self.channels or not all(isinstance(width, int) and width >= 1 for width in self.channels):
            raise ValueError(f"{owner}: channels must be positive ints, one per level, got {self.channels}")
        for name in ("dim", "heads", "context_heads", "samples", "depth", "num_joints"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{owner}: {name} must be an int >= 1, got {value!r}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"{owner}: mlp_ratio must be more than 0, got {self.mlp_ratio}")
        for name in ("heads", "context_heads"):
            if self.dim % getattr(self, name):
                raise ValueError(f"{owner}: dim must be a multiple of {name}, got {self.dim} and {getattr(self, name)}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"{owner}: drop_path must be in [0, 1), got {self.drop_path}")
        if self.skeleton not in SKELETONS:
            raise ValueError(f"{owner}: skeleton must be one of {', '.join(SKELETONS)}, got {self.skeleton!r}")

    @classmethod
    def mpi_inf_3dhp(cls, width: int = 48) -> ContextAwarePoseFormerConfig:
        """The published configurations for MPI-INF-3DHP with HRNet-w32 (D 64) or -w48 (D 96): no context blocks."""
        if width not in (32, 48):
            raise ValueError(f"ContextAwarePoseFormerConfig.mpi_inf_3dhp: width must be 32 or 48, got {width}")
        channels = tuple(width * 2**level for level in range(4))
        return cls(channels=channels, dim=2 * width, context=False, skeleton="mpi-inf-3dhp")

    @property
    def root(self) -> int:
        """The pelvis."""
        return SKELETONS[self.skeleton][0]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "channels": list(self.channels)}


class ContextAwarePoseFormer(nn.Module):
    """The lifter: feature maps, a 2D pose and where its joints are in the crop; a 3D pose out.

    Args:
        config: sizes.
    """

    name, config_type = "context-aware-poseformer", ContextAwarePoseFormerConfig
    reads = "branches"  # the encoder's method that gives what this lifter reads
    encoder_is_frozen = True  # it stays in evaluation mode and gets no gradient

    def __init__(self, config: ContextAwarePoseFormerConfig | None = None) -> None:
        super().__init__()
        if config is not None and not isinstance(config, ContextAwarePoseFormerConfig):
            raise TypeError(
                f"ContextAwarePoseFormer: config must be a ContextAwarePoseFormerConfig, got {type(config).__name__}"
            )
        self.config = config = config or ContextAwarePoseFormerConfig()
        dim, depth, levels = config.dim, config.depth, len(config.channels)
        drop_paths = [config.drop_path * block / max(1, depth - 1) for block in range(depth)]
        sizes = (config.channels, config.context_heads, config.samples, config.mlp_ratio)
        self.coord_embed = nn.Linear(2, dim)
        self.feat_embed = nn.ModuleList([nn.Linear(width, dim) for width in config.channels])
        self.Spatial_pos_embed = nn.Parameter(torch.zeros(1, 1 + levels, config.num_joints, dim))
        self.context_blocks = nn.ModuleList(
            [ContextBlock(dim, *sizes, drop_path) for drop_path in drop_paths] if config.context else []
        )
        self.res_blocks = nn.ModuleList(
            [TokenBlock(dim, config.heads, config.mlp_ratio, drop_path) for drop_path in drop_paths]
        )
        width = (1 + levels) * dim
        self.joint_blocks = nn.ModuleList(
            [TokenBlock(width, config.heads, config.mlp_ratio, drop_path) for drop_path in drop_paths]
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3))

    def forward(self, feature_maps: Sequence[Tensor], pose_2d: Tensor, pose_crop: Tensor) -> Tensor:
        """Lift a batch.

        Args:
            feature_maps: per level [B, C_l, H_l, W_l], of the backbone (HRNet: `branches`); channels-last memory
                spares a copy.
            pose_2d: [B, J, 2], full-frame pixels as 2x/w − 1 and 2y/w − h/w, of a picture w wide and h high.
            pose_crop: [B, J, 2], crop pixels as x/96 − 1 and y/128 − 1 for a 256×192 crop: where maps are read.
                Joints outside the crop read zeros at first, and the nearest border in the context blocks.

        Returns:
            [B, J, 3] metres, camera axes (x right, y down, z forward), relative to the root as far as it was learned.
        """
        feature_maps, levels, pose = self._start(feature_maps, pose_2d, pose_crop)
        for block in self.context_blocks:
            levels = block(levels, pose, pose_crop, feature_maps)
        tokens = torch.stack([pose, *levels.unbind(dim=1)], dim=2)  # [B, J, 1 + L, D]
        batch, joints = tokens.shape[:2]
        tokens = tokens.flatten(0, 1)  # [B · J, 1 + L, D]
        for block in self.res_blocks:
            tokens = block(tokens)
        tokens = tokens.view(batch, joints, tokens.shape[1] * tokens.shape[2])  # [B, J, (1 + L) · D]
        for block in self.joint_blocks:
            tokens = block(tokens)
        return self.head(tokens)

    def context_places(
        self, feature_maps: Sequence[Tensor], pose_2d: Tensor, pose_crop: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Where each joint reads each level's map in every context block (arguments as `forward`).

        Returns:
            Per block the places [B, L, J, H, S, 2], in the units of pose_crop, and the weights [B, L, J, H, S] with
            which what is read there is summed, 1 over the S samples. A place outside the crop reads its border. No
            blocks: an empty list.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        feature_maps, levels, pose = self._start(feature_maps, pose_2d, pose_crop)
        places = []
        for block in self.context_blocks:
            offsets, weights = block.aim(levels, pose)
            places.append((pose_crop[:, None, :, None, None] + offsets, weights))
            levels = block(levels, pose, pose_crop, feature_maps)
        return places

    def _start(
        self, feature_maps: Sequence[Tensor], pose_2d: Tensor, pose_crop: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """What the context blocks start from: maps, levels [B, L, J, D] and the pose [B, J, D]."""
        self._check(feature_maps, pose_2d, pose_crop)
        feature_maps = [x.contiguous(memory_format=torch.channels_last) for x in feature_maps]
        levels = self.embed_levels(feature_maps, pose_crop)
        return feature_maps, levels, self.coord_embed(pose_2d) + self.Spatial_pos_embed[:, 0]

    def embed_levels(self, feature_maps: Sequence[Tensor], pose_crop: Tensor) -> Tensor:
        """Each level's map at the joints, embedded: [B, L, J, D]."""
        batch, joints, _ = pose_crop.shape
        at_the_joint = pose_crop.new_zeros(()).expand(batch, len(feature_maps), joints, 1, 1, 2)
        whole = pose_crop.new_ones(()).expand(batch, len(feature_maps), joints, 1, 1)
        read = sample_context(feature_maps, pose_crop, at_the_joint, whole, padding="zeros")  # [B, J, 1, C_l] each
        embedded = [embed(context[:, :, 0]) for embed, context in zip(self.feat_embed, read, strict=True)]
        return torch.stack(embedded, dim=1) + self.Spatial_pos_embed[:, 1:]

    @staticmethod
    def sizes(encoder: nn.Module, crop_size: tuple[int, int]) -> dict[str, Any]:
        """What an encoder decides of the configuration; crops may have any size."""
        return {"channels": encoder.branch_channels}

    def check_encoder(self, encoder: nn.Module) -> None:
        channels = getattr(encoder, "branch_channels", None)
        if not callable(getattr(encoder, self.reads, None)) or channels is None:
            raise ValueError(
                "Pipeline: encoder must have the method branches() and branch_channels, which a ContextAwarePoseFormer "
                f"reads, got {type(encoder).__name__}"
            )
        if tuple(channels) != self.config.channels:
            raise ValueError(
                f"Pipeline: encoder must give maps of the lifter's {list(self.config.channels)} channels, "
                f"got {list(channels)}"
            )

    def pose_inputs(
        self,
        keypoints: np.ndarray,
        crop_matrix: np.ndarray,
        image_size: np.ndarray,
        crop_size: tuple[int, int] = CROP_SIZE,
    ) -> tuple[Tensor, ...]:
        """What `forward` takes of keypoints found in pictures.

        Args:
            keypoints: [N, J, 2], px of the pictures.
            crop_matrix: [N, 2, 3], picture px to crop px (`data.crop.box_to_crop_matrix`).
            image_size: [N, 2], (width, height) of the pictures, px.
            crop_size: (height, width) of the crops, px.

        Returns:
            (pose_2d, pose_crop), float32 [N, J, 2] each.

        Raises:
            ValueError: image_size is not [N, 2].
        """
        keypoints, image_size = np.asarray(keypoints, dtype=np.float64), np.asarray(image_size)
        if image_size.shape != (len(keypoints), 2):
            raise ValueError(
                f"ContextAwarePoseFormer.pose_inputs: image_size must be [{len(keypoints)}, 2] (width, height), "
                f"got {list(image_size.shape)}"
            )
        width, height = (image_size[:, axis, None].astype(np.float64) for axis in (0, 1))  # [N, 1]
        x, y = keypoints[..., 0], keypoints[..., 1]
        pose_2d = np.stack([2 * x / width - 1, 2 * y / width - height / width], axis=-1)
        half = np.array([crop_size[1], crop_size[0]]) / 2
        pose_crop = apply_affine(crop_matrix, keypoints) / half - 1
        return torch.from_numpy(pose_2d).float(), torch.from_numpy(pose_crop).float()

    def flip_inputs(self, pose_2d: Tensor, pose_crop: Tensor, crop_width: int = CROP_SIZE[1]) -> tuple[Tensor, ...]:
        """The inputs of the mirrored crop: its pixel x lies at width − 1 − x, while pose_crop is centred on width/2."""
        swap = self._mirrored_joints()
        mirror = pose_2d.new_tensor([-1.0, 1.0])
        shift = pose_crop.new_tensor([-2.0 / crop_width, 0.0])
        return pose_2d[:, swap] * mirror, pose_crop[:, swap] * mirror + shift

    def flip_output(self, pose_3d: Tensor) -> Tensor:
        """A pose [B, J, 3] of the mirrored picture, mirrored back."""
        return pose_3d[:, self._mirrored_joints()] * pose_3d.new_tensor([-1.0, 1.0, 1.0])

    def _mirrored_joints(self) -> list[int]:
        order = list(SKELETONS[self.config.skeleton][1])
        if len(order) != self.config.num_joints:
            raise ValueError(
                f"ContextAwarePoseFormer: only the {len(order)} joints of a known skeleton can be mirrored, "
                f"got {self.config.num_joints}"
            )
        return order

    def as_published(self, pose_3d: Tensor) -> Tensor:
        """A pose [B, J, 3] in the layout of the published models: [B, 1, J, 3], for MPI-INF-3DHP [B, 3, 1, J, 1]."""
        if self.config.skeleton == "mpi-inf-3dhp":
            return pose_3d.transpose(1, 2)[:, :, None, :, None]
        return pose_3d[:, None]

    def _check(self, feature_maps: Sequence[Tensor], pose_2d: Tensor, pose_crop: Tensor) -> None:
        owner, channels = "ContextAwarePoseFormer", self.config.channels
        if not isinstance(feature_maps, (list, tuple)):
            raise TypeError(f"{owner}: feature_maps must be a list of tensors, got {type(feature_maps).__name__}")
        if len(feature_maps) != len(channels):
            raise ValueError(
                f"{owner}: feature_maps must be {len(channels)} maps, one per level, got {len(feature_maps)}"
            )
        named = {f"feature_maps[{level}]": one for level, one in enumerate(feature_maps)}
        for name, value in {**named, "pose_2d": pose_2d, "pose_crop": pose_crop}.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{owner}: {name} must be a tensor, got {type(value).__name__}")
        for name, pose in (("pose_2d", pose_2d), ("pose_crop", pose_crop)):
            check_dtype(owner, name, pose, "the model's", self.coord_embed.weight.dtype)
            if tuple(pose.shape) != (pose_2d.shape[0], self.config.num_joints, 2):
                raise ValueError(
                    f"{owner}: {name} must have shape [B, {self.config.num_joints}, 2], got {list(pose.shape)}"
                )
        batch = pose_2d.shape[0]
        for level, (feature_map, width) in enumerate(zip(feature_maps, channels, strict=True)):
            if feature_map.dim() != 4 or tuple(feature_map.shape[:2]) != (batch, width):
                raise ValueError(
                    f"{owner}: feature_maps[{level}] must have shape [B, {width}, H, W] with pose_2d's B = {batch}, "
                    f"got {list(feature_map.shape)}"
                )
            check_dtype(owner, f"feature_maps[{level}]", feature_map, "the model's", self.coord_embed.weight.dtype)


def config_of(state: Mapping[str, Tensor]) -> ContextAwarePoseFormerConfig:
    """The configuration that the weights of a published lifter have; what a missing weight would tell is the default.

    Heads of level and joint blocks leave no trace in the weights: 8, as published. The variant for MPI-INF-3DHP is
    known by tokens twice as wide as the first map and no context blocks.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    default = ContextAwarePoseFormerConfig()
    channels = _widths(shapes) or default.channels
    joints, dim = shapes.get("Spatial_pos_embed", (1, 0, default.num_joints, default.dim))[2:]
    depth = sum(name.startswith("res_blocks.") and name.endswith(".norm1.weight") for name in shapes)
    hidden = shapes.get("res_blocks.0.mlp.fc1.weight", (default.mlp_ratio * dim,))[0]
    head_width = shapes.get("context_blocks.0.embed_proj.0.weight", (dim // default.context_heads,))[0]
    heads = dim // head_width
    rows = shapes.get("context_blocks.0.attention_weights.weight", (heads * default.samples,))[0]
    context = dim != 2 * channels[0] or any(name.startswith("context_blocks.") for name in shapes)
    return ContextAwarePoseFormerConfig(
        channels=channels,
        dim=dim,
        context_heads=heads,
        samples=rows // heads,
        depth=depth or default.depth,
        mlp_ratio=hidden / dim,
        num_joints=joints,
        context=context,
        skeleton="human3.6m" if context else "mpi-inf-3dhp",
    )


def _widths(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Channels per level, up to the last level that any weight reads; that of a missing weight is anybody's guess."""
    names = [f"feat_embed.{level}.weight" for level in range(_MOST_LEVELS)]
    known = [shapes[name][1] if name in shapes else None for name in names]
    levels = max((level + 1 for level, width in enumerate(known) if width is not None), default=0)
    return tuple(width or 1 for width in known[:levels])
