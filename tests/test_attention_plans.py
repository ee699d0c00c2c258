"""Plans of the Triton attention kernels: the resource model against the compiler, the choice, and autotuning."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).resolve().parent
SHAPE = (4, 1, 3072, ())


def module(name):
    return importlib.import_module(f"liftbyimage.kernels.{name}")


@pytest.fixture
def plans():
    return module("_attention_plans")


def device(kibibytes, warp_groups=False):
    return module("_resources").Device(kibibytes * 1024, warp_groups)


def works(plans):
    """Rows of one head and of eight, widths that are padded, split and different, both sizes of element."""
    widths = [(16, 16, 1), (48, 48, 48), (130, 140, 150), (184, 184, 1), (256, 256, 256), (64, 256, 512), (512,) * 3]
    return [
        plans.Work(dtype, rows, of, value_is_key)
        for dtype in (torch.bfloat16, torch.float32)
        for rows in (1, 17, 136)
        for of in widths
        for value_is_key in (False, True)
        if of[0] == of[1] or not value_is_key
    ]


def test_the_model_bounds_what_the_compiler_takes():
    """A sample of the candidates, and in a process of its own: in this one Triton may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "plan_resources.py"), "--jobs", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {one["kernel"] for one in found} == {
        kernel for of in module("_attention_plans").KERNELS.values() for kernel in of
    }
    assert {one["architecture"] for one in found} == {80, 90}
    assert all(0 < one["shared"] <= one["shared_by_model"] for one in found)


@pytest.mark.parametrize("kibibytes, warp_groups", [(99, False), (163, False), (163, True), (227, True)])
def test_the_preferred_plan_fits_all_but_the_smallest_gpus(plans, kibibytes, warp_groups):
    for stage in plans.KERNELS:
        for work in works(plans):
            assert plans.fitting(stage, work, device(kibibytes, warp_groups))[0] == plans.candidates(stage, work)[0]


def test_the_preferred_plan_of_the_default_widths(plans):
    work = plans.Work(torch.bfloat16, 136, (256, 256, 256), True)
    preferred = {stage: tuple(plans.candidates(stage, work)[0].tiles) for stage in plans.KERNELS}
    assert preferred == {
        "forward": (64, 32, 256, 256, 256, 64, True, 8, 2),
        "row_statistics": (64, 32, 256, 256, 256, 64, True, 8, 2),
        "row_gradients": (64, 32, 256, 256, 256, 64, False, 8, 1),
        "token_gradients": (64, 16, 128, 128, 128, 64, False, 8, 1),
    }


def test_a_small_gpu_gets_smaller_tiles(plans):
    work = plans.Work(torch.float16, 136, (256, 256, 256), True)
    t4 = device(64)._replace(tensor_cores=False)
    on_t4 = {stage: plans.fitting(stage, work, t4)[0] for stage in plans.KERNELS}
    assert on_t4["forward"] != plans.candidates("forward", work)[0]
    assert not any(plan.tiles.whole for plan in on_t4.values())


@pytest.mark.parametrize("warp_groups", [False, True])
def test_some_plan_fits_48_kib(plans, warp_groups):
    for stage in plans.KERNELS:
        for work in works(plans):
            assert plans.fitting(stage, work, device(48, warp_groups))
            assert plans.fitting(stage, work, device(48, warp_groups)._replace(tensor_cores=False))


@pytest.mark.parametrize(
    "version, fenced",
    [
        ("3.5.0", set()), ("3.6.0", set()), ("3.7.0+git1", set()), ("3.7.1", {9}), ("3.8.0", {9}),
        ("3.9.0", {9, 10, 11}), ("3.10.0", {9, 10, 11}), ("4.0", {9, 10, 11}),
    ],
)  # fmt: skip
def test_versions_of_triton_that_fence_prefetched_tiles(version, fenced):
    fences = module("_resources").fences_prefetched
    assert {major for major in (7, 8, 9, 10, 11, 12) if fences(major, version)} == {7, 8, 12} | fenced


def test_where_prefetched_tiles_are_not_fenced_no_attention_plan_prefetches(plans):
    unfenced = device(227, warp_groups=True)._replace(fenced=False)
    for stage in plans.KERNELS:
        for work in works(plans):
            found = plans.fitting(stage, work, unfenced)
            if work.dtype == torch.float32:
                assert found == plans.fitting(stage, work, unfenced._replace(fenced=True))
            else:
                assert {plan.options["num_stages"] for plan in found} == {1}
                preferred = plans.candidates(stage, work)[0]
                assert found[0].tiles == preferred.tiles._replace(num_stages=1)


class Recorder:
    """In a kernel's stead: the stages that it would be launched with."""

    def __init__(self):
        self.stages = []

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: self.stages.append(keywords["num_stages"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fenced", [True, False])
def test_where_prefetched_tiles_are_not_fenced_no_joint_kernel_prefetches(monkeypatch, dtype, fenced):
    limits = device(227, warp_groups=True)._replace(fenced=fenced)
    monkeypatch.setattr(module("_resources"), "device_of", lambda tensor: limits)
    recorder = Recorder()
    for kernel in ("_linear.linear", "_heads.heads", "attend_tokens.forward", "attend_tokens.backward"):
        name, kernel = kernel.split(".")
        monkeypatch.setattr(module(name), f"{kernel}_kernel", recorder)
    x, weight, packed = (torch.empty(*shape, dtype=dtype) for shape in [(64, 64), (8, 64, 64), (2, 64, 3 * 64)])
    module("_linear").linear(x, x, x[0])
    module("_heads").multiply_heads(x.view(1, 8, 8, 64), weight, None, x.view(1, 8, 8, 64))
    module("attend_tokens").forward(packed, 1, 1.0)
    module("attend_tokens").backward(packed[..., :64], packed, 1, 1.0)
    assert recorder.stages == ([2, 2, 1, 1] if dtype == torch.float32 else [3, 2, 2, 2] if fenced else [1, 1, 1, 1])


def test_without_a_plan_that_fits_the_error_says_what_is_needed(plans):
    work = plans.Work(torch.float32, 17, (48, 48, 48), True)
    expected = r"^forward of attention in torch.float32 needs \d+ bytes of shared memory per block, this GPU has 1024$"
    with pytest.raises(ValueError, match=expected):
        plans.fitting("forward", work, device(1))


@pytest.mark.parametrize("stage", ["forward", "row_statistics", "row_gradients", "token_gradients"])
def test_plans_are_distinct(plans, stage):
    for work in works(plans):
        tiles = [plan.tiles for plan in plans.candidates(stage, work)]
        assert len(set(tiles)) == len(tiles)


def test_float32_contracts_alike_in_every_plan(plans):
    """What one stage sums up, another divides by."""
    for work in works(plans):
        if work.dtype == torch.float32:
            found = {plan.tiles[5:7] for stage in plans.KERNELS for plan in plans.candidates(stage, work)}
            assert found == {(32, False)}


class Clock:
    """A timer that says what it is told: less for each plan that is tried."""

    def __init__(self):
        self.times = []

    def __call__(self, launch):
        launch()
        self.times.append(100.0 - len(self.times))
        return self.times[-1]


@pytest.fixture
def autotuned(plans, monkeypatch):
    """As on a GPU, with a clock in its stead: choose(stage, work, …) gives the plan and those that were tried."""
    monkeypatch.setenv("LIFTBYIMAGE_AUTOTUNE", "1")
    monkeypatch.setattr(plans, "TUNER", module("_tuning").Tuner(Clock()))

    def choose(stage, work, limits, shape=SHAPE, capturing=False):
        monkeypatch.setattr(plans, "device_of", lambda tensor: limits)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        tried = []
        return plans.chosen(stage, work, plans.Shape(*shape), torch.empty(0), tried.append), tried

    return choose


@pytest.mark.parametrize("kibibytes", [48, 99, 163, 227])
@pytest.mark.parametrize("warp_groups", [False, True])
def test_no_plan_beyond_the_limits_is_tried(plans, autotuned, kibibytes, warp_groups):
    limits = device(kibibytes, warp_groups)
    for stage, kernels in plans.KERNELS.items():
        for work in works(plans):
            _, tried = autotuned(stage, work, limits)
            fitting = plans.fitting(stage, work, limits)
            assert tried == (list(fitting) if tried else [])
            size = work.dtype.itemsize
            for plan in tried:
                for kernel in kernels:
                    model = (kernel, plan.tiles, size, work.value_is_key)
                    assert module("_resources").shared_bytes(*model, warp_groups) <= kibibytes * 1024


def test_the_fastest_is_kept_and_each_is_timed_once(plans, autotuned):
    work = plans.Work(torch.bfloat16, 136, (256, 256, 256), True)
    fastest, tried = autotuned("forward", work, device(163))
    assert tried == list(plans.fitting("forward", work, device(163)))
    assert len(tried) > 2
    assert fastest == tried[-1]
    assert autotuned("forward", work, device(163)) == (fastest, [])
    assert autotuned("forward", work, device(163), (3, 1, 2500, ())) == (fastest, [])  # of the same buckets
    assert len(autotuned("forward", work, device(163), (5, 1, 3072, ()))[1]) == len(tried)
    assert len(autotuned("forward", work, device(163), (4, 1, 768, ()))[1]) == len(tried)
    assert autotuned("row_statistics", work, device(163))[1]


def test_nothing_is_timed_while_a_graph_is_captured(plans, autotuned):
    work = plans.Work(torch.bfloat16, 136, (256, 256, 256), True)
    first = plans.fitting("forward", work, device(163))[0]
    assert autotuned("forward", work, device(163), capturing=True) == (first, [])
    fastest, tried = autotuned("forward", work, device(163))
    assert tried and fastest != first
    assert autotuned("forward", work, device(163), capturing=True) == (fastest, [])


@pytest.mark.parametrize("value", ["", "0"])
def test_nothing_is_timed_unasked(plans, autotuned, monkeypatch, value):
    monkeypatch.setenv("LIFTBYIMAGE_AUTOTUNE", value)
    work = plans.Work(torch.bfloat16, 136, (256, 256, 256), True)
    assert autotuned("forward", work, device(163)) == (plans.candidates("forward", work)[0], [])


def test_nothing_is_timed_without_a_gpu(plans, monkeypatch):
    monkeypatch.setenv("LIFTBYIMAGE_AUTOTUNE", "1")
    work = plans.Work(torch.float32, 136, (256, 256, 256), True)
    tried = []
    plan = plans.chosen("forward", work, plans.Shape(*SHAPE), torch.empty(0, device="meta"), tried.append)
    assert (plan, tried) == (plans.candidates("forward", work)[0], [])


def test_another_value_of_the_variable_is_refused(plans, autotuned, monkeypatch):
    monkeypatch.setenv("LIFTBYIMAGE_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="^LIFTBYIMAGE_AUTOTUNE must be 1, 0 or unset, got 'yes'$"):
        autotuned("forward", plans.Work(torch.bfloat16, 17, (48, 48, 48), True), device(163))


def test_a_plan_that_does_not_fit_after_all_is_an_error():
    errors = pytest.importorskip("triton.runtime.errors")

    def launch(plan):
        if plan == "too large":
            raise errors.OutOfResources(100_000, 65_536, "shared memory")

    tuner = module("_tuning").Tuner(Clock())
    for _ in range(2):
        with pytest.raises(errors.OutOfResources, match="Required: 100000"):
            tuner.choose("key", ["small", "too large"], launch, capturing=False)


def test_the_limits_are_those_of_the_device(monkeypatch):
    resources = module("_resources")
    tensor = torch.empty(0)
    assert resources.device_of(tensor) is resources.NO_GPU
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    class Driver:
        class active:
            class utils:
                get_device_properties = staticmethod(lambda index: {"max_shared_mem": 1000 + index})

    monkeypatch.setattr(resources.triton.runtime, "driver", Driver)
    for capability, warp_groups in [
        ((7, 5), False),
        ((8, 9), False),
        ((9, 0), True),
        ((10, 0), True),
        ((12, 0), False),
    ]:
        fenced = resources.fences_prefetched(capability[0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        assert resources._device.__wrapped__(3) == (1003, warp_groups, capability >= (8, 0), fenced)
