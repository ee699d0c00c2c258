"""What factored tokens save: one pose-guided layer's attention, and the whole image side of stage 1 with pruning.

`factored layer`: from tokens (textbook) or from their channels (factored) to what joints gathered and updated patches,
which stay factored. Nobody's time includes the embedding, which a model computes once for all layers.

`image side`: embedding, three cross-attentions with their projections, the pose-guided update, importance, and the
kept patches formed. The joints ask the same questions in all three, and the patches to keep are chosen by an importance
that is given, so that rounding cannot choose others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from machine import DTYPE
from measurement import Measurement
from serving import serving_backends
from test_pose_guided_attention import Textbook
from torch import Tensor, nn
from workload import HEADS, JOINTS, TRAINING, Implementation, Setting, Workload, textbook_memory

from liftbyimage import ops
from liftbyimage.nn import FactoredPatches, PoseGuidedLayer
from liftbyimage.nn.attention import Memory, PatchAttention
from liftbyimage.reference.lift_by_image import Attention

WIDTH = 48  # 32 features of HRNet-w32 and 16 position channels
RETENTION = 0.3
# Relative to the output's RMS, beyond twice the reference's error: tokens are formed as one sum of 184 products here,
# each rounded at the size of the whole, while the reference adds a small update to tokens formed (or given) before.
FORMED_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@functools.cache
def embedding(dim: int) -> tuple[Tensor, Tensor]:
    """A fixed embedding [W, D] and bias [D] in float64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, dim, generator=generator, dtype=torch.float64) * WIDTH**-0.5
    return weight, torch.randn(dim, generator=generator, dtype=torch.float64) * 0.1


class TextbookLayer(Textbook):
    def forward(self, joints: Tensor, channels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        attended, attention = self.patch_attention.attend_with_weights(joints, tokens)
        return attended, self.update(joints, tokens, attention)


class FactoredLayer(PoseGuidedLayer):
    def __init__(self, setting: Setting, backend: str) -> None:
        super().__init__(setting.D, HEADS, mlp_ratio=1.0, dropout=0.0, formulation="factored")
        self.backend = backend

    def forward(self, joints: Tensor, channels: Tensor, tokens: Tensor) -> tuple[Tensor, FactoredPatches]:  # type: ignore[override]
        weight, bias = (factor.to(channels) for factor in embedding(self.dim))
        return self.exchange(joints, FactoredPatches(channels, weight, bias))

    def exchange(self, joints: Tensor, patches: FactoredPatches) -> tuple[Tensor, FactoredPatches]:
        attention = self.patch_attention
        memory = attention.memory(patches, "factored")
        query = memory.rows(attention.query(joints, memory.fold))
        guided = ops.guide_patches(query, patches.channels, scale=attention.scale, backend=self.backend)
        updated = patches.guided(guided.channels, self._pose_rows(joints))
        return answer(attention, memory, guided.context), updated


class TextbookImageSide(nn.Module):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, setting.D)
        self.look, self.look_again = Attention(setting.D, HEADS), Attention(setting.D, HEADS)
        self.guide = TextbookLayer(setting)
        self.keep = ops.keep_count(setting.P, RETENTION)

    def forward(self, joints: Tensor, channels: Tensor, priority: Tensor) -> tuple[Tensor, ...]:
        tokens = self.embed(channels)  # [B, P, D]
        looked = self.look.attend(joints, tokens)
        guided, tokens = self.guide(joints, channels, tokens)
        looked_again, attention = self.look_again.attend_with_weights(joints, tokens)
        index = priority.topk(self.keep, dim=1).indices.sort(dim=1).values  # [B, K]
        kept = tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
        return looked, guided, looked_again, attention.mean((1, 2)), kept


class FactoredImageSide(nn.Module):
    def __init__(self, setting: Setting, backend: str) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, setting.D)
        self.look, self.look_again = PatchAttention(setting.D, HEADS), PatchAttention(setting.D, HEADS)
        self.guide = FactoredLayer(setting, backend)
        self.keep = ops.keep_count(setting.P, RETENTION)
        self.backend = backend

    def forward(self, joints: Tensor, channels: Tensor, priority: Tensor) -> tuple[Tensor, ...]:
        patches = FactoredPatches(channels, self.embed.weight.T, self.embed.bias)
        looked, _ = self.attend(self.look, joints, patches)
        guided, patches = self.guide.exchange(joints, patches)
        looked_again, importance = self.attend(self.look_again, joints, patches, need_importance=True)
        kept = ops.prune_patches(patches.channels, priority, self.keep, backend=self.backend)
        return looked, guided, looked_again, importance, patches.replace_channels(kept.patches).dense()

    def attend(
        self, attention: PatchAttention, joints: Tensor, patches: FactoredPatches, need_importance: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        memory = attention.memory(patches, "factored")
        query = memory.rows(attention.query(joints, memory.fold))
        result = ops.attend_patches(
            query,
            memory.key,
            memory.value,
            scale=attention.scale,
            need_importance=need_importance,
            backend=self.backend,
        )
        return answer(attention, memory, result.context), result.importance


def answer(attention: PatchAttention, memory: Memory, context: Tensor) -> Tensor:
    return attention.output(memory.contexts(context), memory.unfold, memory.value_bias)


def _with_backend(module: Callable[[Setting, str], nn.Module], backend: str) -> Callable[[Setting], nn.Module]:
    return lambda setting: module(setting, backend)


def implementations(
    textbook: Callable[[Setting], nn.Module], factored: Callable[[Setting, str], nn.Module]
) -> list[Implementation]:
    return [
        Implementation("reference", textbook),
        Implementation("torch.compile", textbook, compiled=True),
        Implementation("factored in PyTorch", _with_backend(factored, "reference")),
        *(
            Implementation(f"liftbyimage {backend}", _with_backend(factored, backend))
            for backend in serving_backends("attend_patches")
        ),
    ]


def layer_workload(setting: Setting) -> Workload:
    batch, patches, dim = setting.B, setting.P, setting.D

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        joints = torch.randn(batch, JOINTS, dim, generator=generator)
        channels = torch.randn(batch, patches, WIDTH, generator=generator).to(dtype)
        weight, bias = embedding(dim)
        return joints.to(dtype), channels, (channels.double() @ weight + bias).to(dtype)

    rows = JOINTS * HEADS
    return Workload(
        op="factored layer",
        setting=setting,
        reference=TextbookLayer,
        inputs=inputs,
        outputs=("attended", "patches"),
        # Reads channels, writes them again with the attention beside them.
        compulsory_bytes=(batch * patches * (2 * WIDTH + rows) + 6 * dim * dim) * DTYPE.itemsize,
        needed_bytes=textbook_memory(setting),
        bounds=FORMED_BOUNDS,
    )


def image_side_workload(setting: Setting) -> Workload:
    batch, patches, dim = setting.B, setting.P, setting.D
    keep = ops.keep_count(patches, RETENTION)

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shapes = ((batch, JOINTS, dim), (batch, patches, WIDTH), (batch, patches))
        return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    # Channels in, kept patches out; backward once more each, and the gradient of the channels.
    passes = 3 if setting.direction == TRAINING else 1
    attended = (batch, JOINTS, dim)
    return Workload(
        op="image side of stage 1",
        setting=setting,
        reference=TextbookImageSide,
        inputs=inputs,
        outputs=("looked", "guided", "looked again", "importance", "kept"),
        cotangents={"looked": attended, "guided": attended, "looked again": attended, "kept": (batch, keep, dim)},
        compulsory_bytes=passes * batch * (patches * WIDTH + keep * dim) * DTYPE.itemsize,
        needed_bytes=3 * textbook_memory(setting),
        bounds=FORMED_BOUNDS,
    )


@pytest.mark.parametrize("implementation", implementations(TextbookLayer, FactoredLayer), ids=str)
def test_factored_layer(measure: Measurement, setting: Setting, implementation: Implementation) -> None:
    if setting.direction == TRAINING:
        pytest.skip("tokens and their channels are two inputs here; the image side has the backward rows")
    measure(layer_workload(setting), implementation)


@pytest.mark.parametrize("implementation", implementations(TextbookImageSide, FactoredImageSide), ids=str)
def test_image_side(measure: Measurement, setting: Setting, implementation: Implementation) -> None:
    measure(image_side_workload(setting), implementation)
