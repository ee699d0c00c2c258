"""Fused operations with a contract: pure functions of tensors that choose the fastest exact backend.

attend_patches          joints query image patches
pose_guided_attention   the same attention used both ways: patches are updated too (Lifting by Image, Eq. 2)
guide_patches           that for factored patches: the attention becomes channels beside theirs
prune_patches           keep the most important patches (Adaptive Feature Selection)
joint_queries           self-attention over joints, and what they ask of the patches
update_joints           what joints make of the answer: output projection, feed-forward and layer norms
sample_context          read feature maps at learned places about the joints (deformable context)
attend_tokens           self-attention of few tokens from their packed projection
residual_attention      attention half of a pre-norm transformer block, with stochastic depth
residual_feed_forward   feed-forward half of a pre-norm transformer block, with stochastic depth
residual_context        joint tokens ask feature maps and add what they read: half a context block
keep_count              how many patches a retention keeps
explain                 which backend serves a call, and why the others do not
"""

from liftbyimage.ops._explain import BackendStatus, explain
from liftbyimage.ops.attend_patches import AttendedPatches, attend_patches
from liftbyimage.ops.attend_tokens import attend_tokens
from liftbyimage.ops.guide_patches import GuidedPatches, guide_patches
from liftbyimage.ops.joint_queries import JointQueries, joint_queries
from liftbyimage.ops.pose_guided_attention import PoseGuidedAttention, pose_guided_attention
from liftbyimage.ops.prune_patches import PrunedPatches, keep_count, prune_patches
from liftbyimage.ops.residual_attention import residual_attention
from liftbyimage.ops.residual_context import residual_context
from liftbyimage.ops.residual_feed_forward import residual_feed_forward
from liftbyimage.ops.sample_context import sample_context
from liftbyimage.ops.update_joints import update_joints

__all__ = [
    "AttendedPatches",
    "BackendStatus",
    "GuidedPatches",
    "JointQueries",
    "PoseGuidedAttention",
    "PrunedPatches",
    "attend_patches",
    "attend_tokens",
    "explain",
    "guide_patches",
    "joint_queries",
    "keep_count",
    "pose_guided_attention",
    "prune_patches",
    "residual_context",
    "sample_context",
    "residual_attention",
    "residual_feed_forward",
    "update_joints",
]
