from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from liftbyimage.models.tiny_encoder import TinyEncoder


def build(seed: int = 0, channels: int = 32) -> TinyEncoder:
    torch.manual_seed(seed)
    return TinyEncoder(channels)


def test_size_and_shape() -> None:
    with torch.device("meta"):
        encoder = TinyEncoder().eval()
        images = torch.empty(1, 3, 256, 192)
    with FlopCounterMode(display=False) as counter:
        features = encoder.features(images)
    assert features.shape == (1, 32, 64, 48)
    assert (encoder.channels, encoder.stride) == (32, 4)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 215_488
    assert round(counter.get_total_flops() / 2e9, 2) == 0.14


@pytest.mark.parametrize("channels", [1, 24])
@pytest.mark.parametrize("size", [(16, 16), (48, 112)])
def test_other_sizes(channels: int, size: tuple[int, int]) -> None:
    encoder = build(channels=channels).eval()
    features = encoder(torch.randn(2, 3, *size))
    assert encoder.channels == channels
    assert features.shape == (2, channels, size[0] // 4, size[1] // 4)
    assert encoder(torch.empty(0, 3, *size)).shape == (0, channels, size[0] // 4, size[1] // 4)


def test_space_to_depth_loses_nothing() -> None:
    images = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    depth = build()._space_to_depth(images)
    torch.testing.assert_close(depth, F.pixel_unshuffle(images, 4), rtol=0, atol=0)


def test_patches_are_a_view_of_the_features() -> None:
    with torch.no_grad():
        features = build().eval().features(torch.randn(2, 3, 32, 48))
    assert features.flatten(2).transpose(1, 2).is_contiguous()
    assert features.flatten(2).data_ptr() == features.data_ptr()


def test_receptive_field_spans_the_crop() -> None:
    encoder = build().eval().double()
    images = torch.randn(1, 3, 256, 192, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(encoder.features(images)[0, :, 32, 24].sum(), images)
    seen = gradient[0].abs().sum(0) > 0
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    assert (rows.min(), rows.max()) == (16, 227)
    assert (columns.min(), columns.max()) == (0, 191)


def test_features_move_with_the_image() -> None:
    encoder = build().eval().double()
    image = torch.zeros(1, 3, 512, 512, dtype=torch.float64)
    image[:, :, 240:256, 240:272] = torch.randn(1, 3, 16, 32, dtype=torch.float64)
    with torch.no_grad():
        still = encoder(image)
        moved = encoder(image.roll((32, -16), (2, 3)))
    # Away from the padding at the border.
    expected = still.roll((8, -4), (2, 3))[:, :, 40:88, 40:88]
    assert expected.std() > 1e-3
    torch.testing.assert_close(moved[:, :, 40:88, 40:88], expected, rtol=0, atol=1e-10)


def test_samples_are_independent_in_evaluation() -> None:
    encoder = build().eval().double()
    images = torch.randn(3, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images)[1:2], encoder(images[1:2]), rtol=0, atol=1e-12)


def test_training_step_is_bitwise_repeatable() -> None:
    def gradients() -> list[torch.Tensor]:
        encoder = build(1).train()
        images = torch.randn(4, 3, 64, 48, generator=torch.Generator().manual_seed(2))
        features = encoder(images)
        features.square().mean().backward()
        return [features.detach(), *(parameter.grad for parameter in encoder.parameters())]

    first, second = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in first)


def test_learns_where_a_blob_is() -> None:
    generator = torch.Generator().manual_seed(3)
    centres = torch.rand(64, 2, generator=generator) * torch.tensor([48.0, 64.0])
    grid = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="ij"), 2).flip(2)  # [H, W, 2]
    distance = (grid - centres[:, None, None]).square().sum(3)  # [B, H, W]
    images = (distance < 64).float()[:, None] + 0.3 * torch.randn(64, 3, 64, 48, generator=generator)
    target = F.avg_pool2d(torch.exp(-distance / 32)[:, None], 4)
    train, held = slice(0, 48), slice(48, 64)

    encoder = build(4, channels=8)
    head = torch.nn.Conv2d(8, 1, 1)
    optimiser = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for step in range(60):
        batch = slice(16 * (step % 3), 16 * (step % 3) + 16)
        optimiser.zero_grad()
        F.mse_loss(head(encoder(images[batch])), target[batch]).backward()
        optimiser.step()
    encoder.eval()
    with torch.no_grad():
        error = F.mse_loss(head(encoder(images[held])), target[held])
        baseline = F.mse_loss(target[train].mean(0, keepdim=True).expand_as(target[held]), target[held])
    assert error < 0.25 * baseline


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (None, TypeError, "images must be a torch.Tensor, got NoneType"),
        (
            torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
            TypeError,
            "images must be a floating-point tensor, got torch.uint8",
        ),
        (torch.zeros(1, 4, 16, 16), ValueError, "images must have shape [B, 3, H, W], got [1, 4, 16, 16]"),
        (
            torch.zeros(1, 3, 24, 16),
            ValueError,
            "images must have height and width that are multiples of 16, got 24x16",
        ),
        (
            torch.zeros(1, 3, 0, 16),
            ValueError,
            "images must have height and width that are multiples of 16, got 0x16",
        ),
        (
            torch.zeros(1, 3, 16, 16, device="meta"),
            ValueError,
            "images must be on the weights' device cpu, got meta",
        ),
        (
            torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16),
            TypeError,
            "images must have the weights' dtype torch.float32, got torch.bfloat16",
        ),
    ],
)
def test_bad_images(images, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape('TinyEncoder: ' + message)}$"):
        build().features(images)


def test_autocast_takes_any_floating_dtype() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert build().eval()(torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bad_channels() -> None:
    with pytest.raises(ValueError, match="^TinyEncoder: channels must be an integer of at least 1, got 0$"):
        TinyEncoder(0)
