"""The ops' cases in Triton, in bfloat16, without a GPU: what the rounding of intermediate results to bfloat16 costs."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from liftbyimage.testing import CASES, check_against_float64, make_inputs

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")

# Of each op's cases those in which rounding shows most, and sizes that fill no tile. The residual ops' kernels are
# those of the joint side; sample_context keeps every intermediate result in float32.
TELLING = {
    "attend_patches": ("with_attention_odd", "odd_widths", "large_logits"),
    "pose_guided_attention": ("widths_differ", "one_tensor", "large_logits"),
    "guide_patches": ("widths_differ", "sharp", "large_logits"),
    "attend_tokens": ("head_width_80", "head_width_3", "large_logits"),
    "joint_queries": ("folded", "head_width_80", "large_logits"),
    "update_joints": ("folded", "head_width_80", "large_logits"),
}


@pytest.fixture
def bfloat16(monkeypatch: Any) -> None:
    import bfloat16_interpreter

    bfloat16_interpreter.install(monkeypatch)


@pytest.mark.parametrize("op, name", [(op, name) for op, names in TELLING.items() for name in names])
def test_bfloat16_against_float64(bfloat16: None, op: str, name: str) -> None:
    [case] = [case for case in CASES[op] if case.name == name]
    check_against_float64(op, make_inputs(op, case, torch.bfloat16), torch.bfloat16, "triton")


def test_emulated_bfloat16_is_torchs(bfloat16: None) -> None:
    """Loads, stores and casts: to nearest, ties to even, beyond the largest to infinity."""
    import triton
    import triton.language as tl

    @triton.jit
    def round_trip(source, rounded, back, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(rounded + at, tl.load(source + at).to(tl.bfloat16))
        tl.store(back + at, tl.load(rounded + at).to(tl.float32))

    edges = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-9, 3.4e38, 1e-40, 0.0, -0.0, float("inf")]
    values = torch.tensor(edges + np.linspace(-5, 5, 56).tolist())
    rounded, back = torch.empty(64, dtype=torch.bfloat16), torch.empty(64)
    round_trip[(1,)](values, rounded, back, SIZE=64)
    assert torch.equal(rounded, values.bfloat16()) and torch.equal(back, values.bfloat16().float())
