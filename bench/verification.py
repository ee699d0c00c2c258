"""Outputs and gradients are verified against the reference in float64 before anything is timed."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from machine import DEVICE, DTYPE
from torch import Tensor
from workload import VERIFIED_SAMPLES, Call, Step, Workload, build, draw, draw_weights

from liftbyimage.testing import assert_close


@dataclass(frozen=True)
class Truth:
    """The weights and inputs of a workload, and what the reference makes of them in float64 and in the dtype."""

    workload: Workload
    weights: dict[str, Tensor]
    call: Call
    samples: Tensor  # int64 [N], those of the batch that are verified
    oracle: dict[str, Tensor]
    plain: dict[str, Tensor]

    def plain_in(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the reference makes of them in `dtype`."""
        if dtype == DTYPE:
            return self.plain
        module = build(self.workload, self.workload.reference, self.weights).to(dtype)
        few = self.call.map(lambda tensor: tensor[self.samples].to(dtype))
        return Step(self.workload, module).results(few)


def find_truth(workload: Workload) -> Truth:
    batch, half = workload.setting.B, VERIFIED_SAMPLES // 2
    chosen = range(batch) if workload.verified_whole else (*range(half), *range(batch - half, batch))
    samples = torch.tensor([*chosen], device=DEVICE)
    weights, call = draw_weights(workload), draw(workload, seed=1)
    few = call.map(lambda tensor: tensor[samples])
    module = build(workload, workload.reference, weights)
    exact = copy.deepcopy(module).double()
    oracle = Step(workload, exact).results(few.map(Tensor.double))
    plain = Step(workload, module).results(few)
    return Truth(workload, weights, call, samples, oracle, plain)


def verify(truth: Truth, step: Step, bounds: Mapping[torch.dtype, float] | None, dtype: torch.dtype) -> None:
    """Every output and gradient of `step` equals the reference's, or AssertionError names the one that does not.

    The rule is that of liftbyimage.testing, or, where `bounds` are given, a largest error relative to the result's RMS.
    """
    workload = truth.workload
    results, plain = step.results(truth.call), truth.plain_in(dtype)
    assert results.keys() == truth.oracle.keys(), f"results {sorted(results)}, expected {sorted(truth.oracle)}"
    for name, actual in results.items():
        if not workload.verified_whole:
            if name.removeprefix("gradient of ") in step.parameters:
                continue  # sums over the whole batch, of which the oracle saw a part
            actual = actual[truth.samples]
        oracle = truth.oracle[name]
        if bounds is not None:
            _assert_within_bound(name, actual, truth.oracle, plain[name], bounds[dtype])
        elif oracle.dtype == torch.int64:
            assert torch.equal(actual, oracle), f"{name}: differs from the reference"
        else:
            assert_close(name, actual, oracle, plain[name], dtype)


def _assert_within_bound(name: str, actual: Tensor, oracles: Mapping[str, Tensor], plain: Tensor, bound: float) -> None:
    oracle = oracles[name]
    assert actual.shape == oracle.shape, f"{name}: shape {list(actual.shape)}, expected {list(oracle.shape)}"
    if oracle.dtype == torch.int64:
        # Rounding may swap patches of all but equal importance: the sets that were kept are compared.
        pairs = zip(actual.tolist(), oracle.tolist(), strict=True)
        agreement = statistics.fmean(len(set(a) & set(o)) / len(o) for a, o in pairs)
        assert agreement >= 1 - bound, f"{name}: {agreement:.5f} agree with the reference, expected {1 - bound}"
        return
    # Some gradients are zero but for rounding (a bias before a difference of joints): the largest result sets a floor.
    floating = [_rms(result) for result in oracles.values() if result.is_floating_point()]
    scale = max(_rms(oracle), bound * max(floating))
    error = (actual.double() - oracle).abs().max().item()
    allowed = 2 * (plain.double() - oracle).abs().max().item() + bound * scale
    assert error <= allowed, f"{name}: largest error {error:.3e}, allowed {allowed:.3e}"


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()
