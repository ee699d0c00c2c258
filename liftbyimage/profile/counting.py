"""What a call executes: floating-point operations of its products, operations dispatched, memory allocated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the products in one call, a multiply-add counted as 2.

    By `torch.utils.flop_counter` with the formulas that the library's ops register, and some that PyTorch lacks.
    """
    with FlopCounterMode(display=False, custom_mapping=extra_formulas()) as counter:
        call()
    return counter.get_total_flops()


def extra_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas, by op, that `torch.utils.flop_counter` does not have; they take shapes."""
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return {
        cpu_attention: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        torch.ops.mkldnn._convolution_pointwise: _packed_convolution_flops,
        torch.ops.aten._transformer_encoder_layer_fwd: _encoder_layer_flops,
    }


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[2] * (width + value[3]))


def _attention_backward_flops(
    grad_output: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    # scores again, dV = Aᵀ dO, dA = dO Vᵀ, dQ = dS K, dK = dSᵀ Q
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[2] * (3 * width + 2 * value[3]))


def _packed_convolution_flops(x: Any, first: Any, second: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # What follows x is weight and bias, or residual and weight.
    weight = second if second is not None and len(second) == 4 else first
    return int(2 * math.prod(out_shape) * math.prod(weight[1:]))


def _encoder_layer_flops(tokens: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # Projections to query, key, value and back, two products of N × N, and the feed-forward.
    batch, count, dim = tokens
    hidden = args[13][0]
    return int(2 * batch * count * (4 * dim * dim + 2 * count * dim + 2 * dim * hidden))


class OperationCounter(TorchDispatchMode):
    """How often PyTorch's dispatcher hands work to a backend; views of a tensor are no work."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Bytes allocated at most at one time by one call beyond what was there; its results count.

    On a CPU the profiler follows every allocation of the calling thread; scratch of worker threads is not seen.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return max(itertools.accumulate(change for _, change in memory_events(profiler)), default=0)


def memory_events(profiler: Any) -> list[tuple[int, int]]:
    """(when in ns, bytes more or less) of every allocation that `torch.profiler.profile` saw, in order."""
    kineto = profiler.profiler
    assert kineto is not None
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    return sorted((event.start_ns(), event.nbytes()) for event in events)
