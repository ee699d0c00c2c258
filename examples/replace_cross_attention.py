"""Cross-attention in someone else's PyTorch model, replaced: a whole decoder layer, and a bare nn.MultiheadAttention.

Prints that outputs and gradients are equal, and how the times compare on this machine.
"""

import statistics
import timeit
from collections.abc import Callable

import torch
from torch import Tensor, nn

import liftbyimage.nn
import liftbyimage.ops as ops

BATCH, JOINTS, PATCHES, DIM, HEADS = 2, 17, 768, 64, 4


def replace_layer(layer: nn.TransformerDecoderLayer) -> liftbyimage.nn.TransformerLayer:
    """The five lines, for post-norm and GELU."""
    if layer.norm_first or layer.activation is not nn.functional.gelu or layer.norm1.eps != 1e-5:
        raise ValueError("replace_layer: expected a post-norm layer with GELU and layer_norm_eps 1e-5")
    heads, ratio = layer.self_attn.num_heads, layer.linear1.out_features / layer.linear1.in_features
    fused = liftbyimage.nn.TransformerLayer(layer.self_attn.embed_dim, heads, ratio, layer.dropout.p)
    fused.load_decoder_layer(layer.state_dict())
    return fused.train(layer.training)


class FusedCrossAttention(nn.Module):
    """In the place of `nn.MultiheadAttention(dim, heads, batch_first=True)` where key and value are the patches.

    Key and value projections are folded into the query and the output, so that no key and no value is ever formed.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        extras = attention.dropout or attention.add_zero_attn or attention.bias_k is not None
        if extras or not attention.batch_first or attention.in_proj_weight is None or attention.in_proj_bias is None:
            raise ValueError("FusedCrossAttention: expected batch_first, one width, biases, dropout 0 and no added key")
        self.attention = attention  # its weights stay where the optimiser and checkpoints know them

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        """query [B, J, D], key = value [B, P, D] → [B, J, D]"""
        assert key is value
        of, heads = self.attention, self.attention.num_heads
        query_weight, key_weight, value_weight = of.in_proj_weight.unflatten(0, (3, heads, -1))  # [H, D / H, D] each
        query_bias, _, value_bias = of.in_proj_bias.unflatten(0, (3, heads, 1, -1))  # a key bias only shifts rows
        rows = (query[:, None] @ query_weight.transpose(1, 2) + query_bias) @ key_weight  # [B, H, J, D]
        patches = key[:, None]  # [B, 1, P, D]: key and value of every head, read once
        scale = (of.embed_dim // heads) ** -0.5
        context = ops.attend_patches(rows, patches, patches, scale=scale, need_importance=False).context
        by_head = context @ value_weight.transpose(1, 2) + value_bias  # [B, H, J, D / H]
        return of.out_proj(by_head.transpose(1, 2).flatten(2)), None


def check(name: str, plain: Callable[[], Tensor], ours: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Equal outputs and gradients, then both timed in turn."""
    theirs, mine = plain(), ours()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(theirs)
    gradients = (torch.autograd.grad(out, inputs, cotangent) for out in (mine, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        seconds = [[timeit.timeit(function, number=1) for function in (plain, ours)] for _ in range(20)]
    before, after = (statistics.median(taken) for taken in zip(*seconds, strict=True))
    print(f"{name}: outputs and gradients equal, {before / after:.1f}x as fast in inference here.")


def main() -> None:
    torch.manual_seed(0)
    joints = torch.randn(BATCH, JOINTS, DIM, requires_grad=True)
    patches = torch.randn(BATCH, PATCHES, DIM, requires_grad=True)

    layer = nn.TransformerDecoderLayer(DIM, HEADS, 4 * DIM, activation="gelu", batch_first=True).eval()
    fused = replace_layer(layer)
    check("Decoder layer", lambda: layer(joints, patches), lambda: fused(joints, patches), (joints, patches))

    attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True).eval()
    ours = FusedCrossAttention(attention)
    plain = lambda: attention(joints, patches, patches, need_weights=False)[0]  # noqa: E731
    check(
        "Cross-attention", plain, lambda: ours(joints, patches, patches)[0], (joints, patches, *attention.parameters())
    )


if __name__ == "__main__":
    main()
