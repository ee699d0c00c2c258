"""The ops in a plain training loop of one's own: joints query patches, patches learn from joints, the best are kept.

Prints that the gradients of the chosen backend equal the reference's, and the loss before and after.
"""

import torch
from torch import nn
from torch.nn import functional as F

import liftbyimage.ops as ops

BATCH, HEADS, JOINTS, PATCHES, DIM = 4, 2, 17, 48, 16


class Lifter(nn.Module):
    """A small model of somebody's own."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.query = nn.Linear(2, HEADS * DIM)
        self.pose_value = nn.Linear(2, HEADS * DIM)
        self.head = nn.Linear(HEADS * DIM + DIM, 3)

    def forward(self, pose_2d: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """pose_2d [B, J, 2], tokens [B, P, D] → pose [B, J, 3]"""
        query, sent = (
            layer(pose_2d).unflatten(2, (HEADS, DIM)).transpose(1, 2) for layer in (self.query, self.pose_value)
        )  # [B, H, J, D] each
        shared = tokens[:, None]  # [B, 1, P, D]: key and value of all heads
        out = ops.pose_guided_attention(query, shared, shared, sent, tokens, backend=self.backend)
        keep = ops.keep_count(PATCHES, 0.3)
        kept = ops.prune_patches(out.patches, out.importance, keep, backend=self.backend)
        context = out.context.transpose(1, 2).flatten(2)  # [B, J, H · D]
        best = kept.patches.mean(1, keepdim=True).expand(-1, JOINTS, -1)
        return self.head(torch.cat([context, best], dim=2))


def main() -> None:
    torch.manual_seed(0)
    pose_2d, tokens = torch.rand(BATCH, JOINTS, 2) * 2 - 1, torch.randn(BATCH, PATCHES, DIM)
    target = torch.randn(BATCH, JOINTS, 3)
    model, plain = Lifter(), Lifter(backend="reference")
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        F.mse_loss(each(pose_2d, tokens), target).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=f"gradient of {name} differs")
    served = next(s.name for s in ops.explain("prune_patches", tokens, tokens[..., 0]) if s.serves)
    print(f"Gradients by the backend {served} equal the reference's.")

    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        optimiser.zero_grad()
        loss = F.mse_loss(model(pose_2d, tokens), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    print(f"Loss {losses[0]:.3f} before, {losses[-1]:.3f} after 200 steps.")


if __name__ == "__main__":
    main()
