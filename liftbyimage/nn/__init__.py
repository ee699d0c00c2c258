"""Layers with weights, on the fused ops: they choose the cheapest exact formulation by shape."""

from liftbyimage.nn.context_block import ContextBlock
from liftbyimage.nn.factored_patches import FactoredPatches
from liftbyimage.nn.feature_selection import FeatureSelection
from liftbyimage.nn.pose_guided_layer import PoseGuidedLayer
from liftbyimage.nn.token_block import TokenBlock
from liftbyimage.nn.transformer_layer import TransformerLayer

__all__ = ["ContextBlock", "FactoredPatches", "FeatureSelection", "PoseGuidedLayer", "TokenBlock", "TransformerLayer"]
