"""What the central kernels have to move and to compute, counted from the shapes, and how long that takes at least.

Nothing here is measured but the rates of the machine. A kernel takes at least as long as the slowest of its three
streams does alone: bytes, matrix products, exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass

BATCH, HEADS, JOINTS, PATCHES, WIDTH, KEPT = 256, 8, 17, 3072, 256, 921
ROWS = HEADS * JOINTS
FACTORED = 48  # 32 channels of the encoder and 16 of the position
GUIDED = FACTORED + ROWS  # and one more per row of attention
BF16, FLOAT32, INT64 = 2, 4, 8  # bytes


@dataclass(frozen=True)
class Machine:
    name: str
    bytes_per_second: float  # of a copy
    flops_per_second: float  # of bf16 matrix products
    multiprocessors: int
    clock: float  # Hz
    exps_per_clock: int  # of one multiprocessor

    @property
    def exps_per_second(self) -> float:
        return self.multiprocessors * self.clock * self.exps_per_clock


H200 = Machine("H200", 4.3e12, 790e12, multiprocessors=132, clock=1.755e9, exps_per_clock=16)


@dataclass(frozen=True)
class Prediction:
    """One kernel at batch BATCH in bfloat16."""

    op: str
    direction: str
    kernel: str
    width: int
    products: int  # of ROWS × PATCHES × width multiply-adds per sample
    bytes: int
    exps: int

    @property
    def flops(self) -> int:
        return 2 * self.products * BATCH * ROWS * PATCHES * self.width

    def seconds(self, machine: Machine) -> dict[str, float]:
        return {
            "memory": self.bytes / machine.bytes_per_second,
            "products": self.flops / machine.flops_per_second,
            "exponentials": self.exps / machine.exps_per_second,
        }

    def bound(self, machine: Machine) -> tuple[float, str]:
        """The least time in seconds, and what it is spent on."""
        return max((seconds, stream) for stream, seconds in self.seconds(machine).items())


def attention(op: str, width: int, *, updates: bool, stores: bool) -> list[Prediction]:
    """The five kernels over tokens that are key and value. Every tensor is counted once per kernel that needs it.

    `updates`: patches receive A U. `stores`: the attention is written beside the tokens, otherwise importance is.
    """
    tokens, rows, statistic = PATCHES * width * BF16, ROWS * width * BF16, ROWS * FLOAT32
    outside = PATCHES * ROWS * BF16 if stores else PATCHES * FLOAT32
    out = updates or stores  # patches of the same width are written, and have a gradient
    per_sample = {
        ("forward", "gather"): (2, tokens + 2 * rows + statistic),
        ("forward", "scatter"): (1 + updates, (1 + out) * tokens + (1 + updates) * rows + statistic + outside),
        ("backward", "row_statistics"): (
            1 + updates,
            (1 + updates) * tokens + (3 + 2 * updates) * rows + 2 * statistic + outside,
        ),
        ("backward", "row_gradients"): (
            3 + updates,
            (1 + updates) * tokens + (3 + updates) * rows + 2 * statistic + outside,
        ),
        ("backward", "token_gradients"): (
            4 + updates,
            (2 + out) * tokens + (2 + updates) * rows + 2 * statistic + outside,
        ),
    }
    return [
        Prediction(op, direction, kernel, width, products, BATCH * size, BATCH * ROWS * PATCHES)
        for (direction, kernel), (products, size) in per_sample.items()
    ]


def pruning() -> list[Prediction]:
    kept, index = KEPT * WIDTH * BF16, KEPT * INT64
    per_sample = {
        ("forward", "select"): PATCHES * FLOAT32 + index,
        ("forward", "gather"): index + 2 * kept,
        ("backward", "scatter"): index + kept + PATCHES * WIDTH * BF16,
    }
    return [
        Prediction("prune_patches", direction, kernel, WIDTH, 0, BATCH * size, 0)
        for (direction, kernel), size in per_sample.items()
    ]


def predictions() -> list[Prediction]:
    return [
        *attention("pose_guided_attention", WIDTH, updates=True, stores=False),
        *attention("guide_patches", FACTORED, updates=False, stores=True),
        *attention("attend_patches", GUIDED, updates=False, stores=False),
        *pruning(),
    ]
