"""Exact error texts of the public ops: the op, the argument, what was expected, what came."""

import re
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from liftbyimage import _extension, ops
from liftbyimage.ops import _dispatch
from liftbyimage.testing import Case, make_inputs

SMALL = Case("small", B=2, H=2, J=3, P=5, E=4, F=6, D=6, K=4, S=2, maps=((3, 4, 5), (5, 2, 3)), shared_head=False)


def call(op, **changes):
    inputs = make_inputs(op, SMALL, torch.float32)
    inputs.update(changes)
    return getattr(ops, op)(**inputs)


@pytest.mark.parametrize(
    "op, changes, error, text",
    [
        ("attend_patches", {"query": [1.0]}, TypeError, "query must be a tensor [B, H, J, E], got list"),
        (
            "attend_patches",
            {"query": torch.zeros(2, 3)},
            ValueError,
            "query must have shape [B, H, J, E], got [2, 3]",
        ),
        (
            "attend_patches",
            {"key": torch.zeros(2, 2, 5, 4, dtype=torch.int64)},
            TypeError,
            "key must be float32, float16, bfloat16 or float64, got torch.int64",
        ),
        (
            "attend_patches",
            {"key": torch.zeros(2, 3, 5, 4)},
            ValueError,
            "key must have Hk = 1 or Hk = H = 2 heads, got 3",
        ),
        (
            "attend_patches",
            {"key": torch.zeros(2, 2, 5, 7)},
            ValueError,
            "key must have shape [B, Hk, P, E] = [2, 2, 5, 4], got [2, 2, 5, 7]",
        ),
        (
            "attend_patches",
            {"value": torch.zeros(2, 2, 4, 6)},
            ValueError,
            "value must have shape [B, Hk, P, F] = [2, 2, 5, 6], got [2, 2, 4, 6]",
        ),
        (
            "attend_patches",
            {"value": torch.zeros(2, 2, 5, 6, dtype=torch.float64)},
            TypeError,
            "value must have query's dtype torch.float32, got torch.float64",
        ),
        (
            "attend_patches",
            {"value": torch.zeros(2, 2, 5, 6, device="meta")},
            ValueError,
            "value must be on query's device cpu, got meta",
        ),
        (
            "attend_patches",
            {"query": torch.zeros(2, 2, 0, 4)},
            ValueError,
            "query must have J >= 1, got [2, 2, 0, 4]",
        ),
        ("attend_patches", {"scale": "big"}, TypeError, "scale must be a finite float or None, got str"),
        (
            "attend_patches",
            {"scale": float("nan")},
            ValueError,
            "scale must be a finite float or None, got nan",
        ),
        (
            "attend_patches",
            {"backend": "fast"},
            ValueError,
            "backend must be one of cpu, cuda, triton, reference, got 'fast'",
        ),
        (
            "attend_patches",
            {"backend": ""},
            ValueError,
            "backend must be one of cpu, cuda, triton, reference, got ''",
        ),
        (
            "pose_guided_attention",
            {"pose_value": torch.zeros(2, 2, 3, 5)},
            ValueError,
            "pose_value must have shape [B, H, J, D] = [2, 2, 3, 6], got [2, 2, 3, 5]",
        ),
        (
            "pose_guided_attention",
            {"patches": torch.zeros(2, 4, 6)},
            ValueError,
            "patches must have shape [B, P, D] = [2, 5, 6], got [2, 4, 6]",
        ),
        (
            "pose_guided_attention",
            {"patches": torch.zeros(2, 5, 6, dtype=torch.bfloat16)},
            TypeError,
            "patches must have query's dtype torch.float32, got torch.bfloat16",
        ),
        ("guide_patches", {"query": torch.zeros(2, 3)}, ValueError, "query must have shape [B, H, J, W], got [2, 3]"),
        ("guide_patches", {"channels": None}, TypeError, "channels must be a tensor [B, P, W], got NoneType"),
        (
            "guide_patches",
            {"channels": torch.zeros(2, 5, 7)},
            ValueError,
            "channels must have shape [B, P, W] = [2, 5, 4], got [2, 5, 7]",
        ),
        ("guide_patches", {"channels": torch.zeros(2, 0, 4)}, ValueError, "channels must have P >= 1, got [2, 0, 4]"),
        (
            "guide_patches",
            {"channels": torch.zeros(2, 5, 4, dtype=torch.float64)},
            TypeError,
            "channels must have query's dtype torch.float32, got torch.float64",
        ),
        ("guide_patches", {"scale": float("inf")}, ValueError, "scale must be a finite float or None, got inf"),
        (
            "prune_patches",
            {"keep": 6},
            ValueError,
            "keep must satisfy 1 <= keep <= P = 5, got 6",
        ),
        ("prune_patches", {"keep": 0}, ValueError, "keep must satisfy 1 <= keep <= P = 5, got 0"),
        ("prune_patches", {"keep": 2.0}, TypeError, "keep must be an int, got float"),
        ("prune_patches", {"keep": True}, TypeError, "keep must be an int, got bool"),
        (
            "prune_patches",
            {"importance": torch.zeros(2, 4)},
            ValueError,
            "importance must have shape [B, P] = [2, 5], got [2, 4]",
        ),
        (
            "prune_patches",
            {"importance": torch.zeros(2, 5, dtype=torch.int32)},
            TypeError,
            "importance must be float32, float16, bfloat16 or float64, got torch.int32",
        ),
        (
            "prune_patches",
            {"importance": torch.zeros(2, 5, device="meta")},
            ValueError,
            "importance must be on patches's device cpu, got meta",
        ),
        ("joint_queries", {"joints": None}, TypeError, "joints must be a tensor [B, J, D], got NoneType"),
        ("joint_queries", {"joints": torch.zeros(2, 6)}, ValueError, "joints must have shape [B, J, D], got [2, 6]"),
        ("joint_queries", {"joints": torch.zeros(2, 0, 6)}, ValueError, "joints must have J >= 1, got [2, 0, 6]"),
        ("joint_queries", {"heads": 4}, ValueError, "heads must be an int >= 1 that divides D = 6, got 4"),
        ("joint_queries", {"heads": 0}, ValueError, "heads must be an int >= 1 that divides D = 6, got 0"),
        ("joint_queries", {"heads": 2.0}, TypeError, "heads must be an int >= 1 that divides D = 6, got float"),
        ("joint_queries", {"eps": -1.0}, ValueError, "eps must be a finite float >= 0, got -1.0"),
        ("joint_queries", {"eps": "1e-5"}, TypeError, "eps must be a finite float >= 0, got str"),
        (
            "joint_queries",
            {"in_proj_weight": torch.zeros(6, 6)},
            ValueError,
            "in_proj_weight must have shape [3D, D] = [18, 6], got [6, 6]",
        ),
        (
            "joint_queries",
            {"out_proj_bias": torch.zeros(1, 6)},
            ValueError,
            "out_proj_bias must have shape [D], got [1, 6]",
        ),
        (
            "joint_queries",
            {"norm_weight": torch.zeros(6, dtype=torch.float64)},
            TypeError,
            "norm_weight must have joints's dtype torch.float32, got torch.float64",
        ),
        (
            "joint_queries",
            {"query_bias": torch.zeros(6, device="meta")},
            ValueError,
            "query_bias must be on joints's device cpu, got meta",
        ),
        (
            "joint_queries",
            {"fold": torch.zeros(2, 4, 5)},
            ValueError,
            "fold must have shape [H, D/H, W] = [2, 3, 5], got [2, 4, 5]",
        ),
        ("joint_queries", {"fold": torch.zeros(2, 3, 0)}, ValueError, "fold must have W >= 1, got [2, 3, 0]"),
        (
            "joint_queries",
            {"backend": "cuda"},
            ValueError,
            "backend must be one of cpu, reference, triton, got 'cuda'",
        ),
        (
            "update_joints",
            {"context": torch.zeros(2, 4, 3, 3)},
            ValueError,
            "context must have a number of heads H that divides D = 6, got 4",
        ),
        (
            "update_joints",
            {"context": torch.zeros(2, 2, 3, 4)},
            ValueError,
            "context must have shape [B, H, J, D/H] = [2, 2, 3, 3], got [2, 2, 3, 4]",
        ),
        (
            "update_joints",
            {"context": torch.zeros(1, 2, 3, 3)},
            ValueError,
            "context must have shape [B, H, J, D/H] = [2, 2, 3, 3], got [1, 2, 3, 3]",
        ),
        (
            "update_joints",
            {"context": torch.zeros(2, 2, 3, 3, dtype=torch.float64)},
            TypeError,
            "context must have joints's dtype torch.float32, got torch.float64",
        ),
        (
            "update_joints",
            {"unfold": torch.zeros(2, 4, 3)},
            ValueError,
            "unfold must have shape [H, W, D/H] = [2, 3, 3], got [2, 4, 3]",
        ),
        (
            "update_joints",
            {"value_bias": torch.zeros(5)},
            ValueError,
            "value_bias must have shape [D] = [6], got [5]",
        ),
        (
            "update_joints",
            {"linear1_weight": torch.zeros(0, 6)},
            ValueError,
            "linear1_weight must have F >= 1, got [0, 6]",
        ),
        (
            "update_joints",
            {"linear2_weight": torch.zeros(6, 5)},
            ValueError,
            "linear2_weight must have shape [D, F] = [6, 6], got [6, 5]",
        ),
        ("update_joints", {"norm2_bias": 0.0}, TypeError, "norm2_bias must be a tensor [D], got float"),
        ("update_joints", {"eps": float("nan")}, ValueError, "eps must be a finite float >= 0, got nan"),
        ("sample_context", {"feature_maps": 1.0}, TypeError, "feature_maps must be a list of L tensors, got float"),
        (
            "sample_context",
            {"feature_maps": []},
            ValueError,
            "feature_maps must hold L = 2 maps as offsets does, got 0",
        ),
        (
            "sample_context",
            {"feature_maps": [torch.zeros(2, 3, 4, 5), torch.zeros(3, 4, 5)]},
            ValueError,
            "feature_maps[1] must have shape [B, C, Hf, Wf], got [3, 4, 5]",
        ),
        (
            "sample_context",
            {"feature_maps": [torch.zeros(2, 3, 4, 5), torch.zeros(1, 3, 4, 5)]},
            ValueError,
            "feature_maps[1] must have shape [B, C, Hf, Wf] = [2, 3, 4, 5], got [1, 3, 4, 5]",
        ),
        (
            "sample_context",
            {"feature_maps": [torch.zeros(2, 3, 4, 0), torch.zeros(2, 3, 4, 5)]},
            ValueError,
            "feature_maps[0] must have Wf >= 1, got [2, 3, 4, 0]",
        ),
        (
            "sample_context",
            {"feature_maps": [torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5, dtype=torch.float64)]},
            TypeError,
            "feature_maps[1] must have offsets's dtype torch.float32, got torch.float64",
        ),
        (
            "sample_context",
            {"feature_maps": [torch.zeros(2, 3, 4, 5, device="meta"), torch.zeros(2, 3, 4, 5)]},
            ValueError,
            "feature_maps[0] must be on offsets's device cpu, got meta",
        ),
        (
            "sample_context",
            {"offsets": torch.zeros(2, 2, 3, 2, 2)},
            ValueError,
            "offsets must have shape [B, L, J, H, S, 2], got [2, 2, 3, 2, 2]",
        ),
        (
            "sample_context",
            {"offsets": torch.zeros(2, 2, 3, 2, 2, 3)},
            ValueError,
            "offsets must have shape [B, L, J, H, S, 2] = [2, 2, 3, 2, 2, 2], got [2, 2, 3, 2, 2, 3]",
        ),
        (
            "sample_context",
            {"reference": torch.zeros(2, 4, 2)},
            ValueError,
            "reference must have shape [B, J, 2] = [2, 3, 2], got [2, 4, 2]",
        ),
        (
            "sample_context",
            {"weights": torch.zeros(2, 2, 3, 2, 3)},
            ValueError,
            "weights must have shape [B, L, J, H, S] = [2, 2, 3, 2, 2], got [2, 2, 3, 2, 3]",
        ),
        ("sample_context", {"padding": "reflect"}, ValueError, "padding must be one of border, zeros, got 'reflect'"),
        ("residual_context", {"tokens": None}, TypeError, "tokens must be a tensor [B, L, J, D], got NoneType"),
        (
            "residual_context",
            {"pose": torch.zeros(2, 4, 6)},
            ValueError,
            "pose must have shape [B, J, D] = [2, 3, 6], got [2, 4, 6]",
        ),
        ("residual_context", {"heads": 4}, ValueError, "heads must be an int >= 1 that divides D = 6, got 4"),
        (
            "residual_context",
            {"weights_weight": torch.zeros(5, 6)},
            ValueError,
            "weights_weight must have a multiple of H = 2 rows, got 5",
        ),
        (
            "residual_context",
            {"offsets_weight": torch.zeros(4, 6)},
            ValueError,
            "offsets_weight must have shape [2HS, D] = [8, 6], got [4, 6]",
        ),
        (
            "residual_context",
            {"feature_maps": [torch.zeros(2, 3, 4, 5)]},
            ValueError,
            "feature_maps must hold L = 2 maps as tokens does, got 1",
        ),
        (
            "residual_context",
            {"feature_maps": [torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 2, 3)]},
            ValueError,
            "embed_weights[1] must have shape [D/H, C] = [3, 4], got [3, 5]",
        ),
        (
            "residual_context",
            {"embed_weights": torch.zeros(3, 3)},
            TypeError,
            "embed_weights must be a list of L tensors, got Tensor",
        ),
        (
            "residual_context",
            {"embed_biases": [torch.zeros(3)]},
            ValueError,
            "embed_biases must hold L = 2 tensors as tokens does, got 1",
        ),
        (
            "residual_context",
            {"embed_biases": [torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)]},
            TypeError,
            "embed_biases[1] must have tokens's dtype torch.float32, got torch.bfloat16",
        ),
        (
            "residual_context",
            {"branch_scale": torch.ones(3)},
            ValueError,
            "branch_scale must have shape [B] = [2], got [3]",
        ),
        (
            "residual_context",
            {"branch_scale": 0.5},
            TypeError,
            "branch_scale must be a tensor [B], got float",
        ),
        ("residual_feed_forward", {"tokens": 1}, TypeError, "tokens must be a tensor [B, T, D], got int"),
        (
            "residual_feed_forward",
            {"tokens": torch.zeros(2, 6)},
            ValueError,
            "tokens must have shape [B, T, D], got [2, 6]",
        ),
        (
            "residual_feed_forward",
            {"tokens": torch.zeros(2, 0, 6)},
            ValueError,
            "tokens must have T >= 1, got [2, 0, 6]",
        ),
        (
            "residual_feed_forward",
            {"norm_bias": torch.zeros(5)},
            ValueError,
            "norm_bias must have shape [D] = [6], got [5]",
        ),
        (
            "residual_feed_forward",
            {"linear1_weight": torch.zeros(0, 6)},
            ValueError,
            "linear1_weight must have F >= 1, got [0, 6]",
        ),
        (
            "residual_feed_forward",
            {"linear2_weight": torch.zeros(6, 7)},
            ValueError,
            "linear2_weight must have shape [D, F] = [6, 6], got [6, 7]",
        ),
        (
            "residual_feed_forward",
            {"linear2_bias": torch.zeros(6, dtype=torch.float64)},
            TypeError,
            "linear2_bias must have tokens's dtype torch.float32, got torch.float64",
        ),
        (
            "residual_feed_forward",
            {"branch_scale": 0.5},
            TypeError,
            "branch_scale must be a tensor [B], got float",
        ),
        (
            "residual_feed_forward",
            {"branch_scale": torch.ones(3)},
            ValueError,
            "branch_scale must have shape [B] = [2], got [3]",
        ),
        (
            "residual_feed_forward",
            {"branch_scale": torch.ones(2, device="meta")},
            ValueError,
            "branch_scale must be on tokens's device cpu, got meta",
        ),
        ("residual_feed_forward", {"eps": True}, TypeError, "eps must be a finite float >= 0, got bool"),
        (
            "attend_tokens",
            {"query_key_value": None},
            TypeError,
            "query_key_value must be a tensor [B, T, 3D], got NoneType",
        ),
        (
            "attend_tokens",
            {"query_key_value": torch.zeros(3, 18)},
            ValueError,
            "query_key_value must have shape [B, T, 3D], got [3, 18]",
        ),
        (
            "attend_tokens",
            {"query_key_value": torch.zeros(2, 0, 18)},
            ValueError,
            "query_key_value must have T >= 1, got [2, 0, 18]",
        ),
        (
            "attend_tokens",
            {"query_key_value": torch.zeros(2, 3, 16)},
            ValueError,
            "query_key_value must have a width 3D, got [2, 3, 16]",
        ),
        (
            "attend_tokens",
            {"query_key_value": torch.zeros(2, 3, 18, dtype=torch.int32)},
            TypeError,
            "query_key_value must be float32, float16, bfloat16 or float64, got torch.int32",
        ),
        ("attend_tokens", {"heads": 4}, ValueError, "heads must be an int >= 1 that divides D = 6, got 4"),
        ("attend_tokens", {"heads": True}, TypeError, "heads must be an int >= 1 that divides D = 6, got bool"),
        ("attend_tokens", {"scale": float("nan")}, ValueError, "scale must be a finite float or None, got nan"),
        ("attend_tokens", {"backend": "cuda"}, ValueError, "backend must be one of cpu, triton, reference, got 'cuda'"),
        ("residual_attention", {"tokens": 1}, TypeError, "tokens must be a tensor [B, T, D], got int"),
        (
            "residual_attention",
            {"tokens": torch.zeros(2, 6)},
            ValueError,
            "tokens must have shape [B, T, D], got [2, 6]",
        ),
        ("residual_attention", {"tokens": torch.zeros(2, 0, 6)}, ValueError, "tokens must have T >= 1, got [2, 0, 6]"),
        ("residual_attention", {"heads": 4}, ValueError, "heads must be an int >= 1 that divides D = 6, got 4"),
        ("residual_attention", {"eps": -1.0}, ValueError, "eps must be a finite float >= 0, got -1.0"),
        (
            "residual_attention",
            {"norm_bias": torch.zeros(5)},
            ValueError,
            "norm_bias must have shape [D] = [6], got [5]",
        ),
        (
            "residual_attention",
            {"in_proj_weight": torch.zeros(6, 6)},
            ValueError,
            "in_proj_weight must have shape [3D, D] = [18, 6], got [6, 6]",
        ),
        (
            "residual_attention",
            {"out_proj_weight": torch.zeros(6, 6, dtype=torch.float64)},
            TypeError,
            "out_proj_weight must have tokens's dtype torch.float32, got torch.float64",
        ),
        (
            "residual_attention",
            {"branch_scale": torch.zeros(3)},
            ValueError,
            "branch_scale must have shape [B] = [2], got [3]",
        ),
        (
            "residual_attention",
            {"branch_scale": torch.zeros(2, device="meta")},
            ValueError,
            "branch_scale must be on tokens's device cpu, got meta",
        ),
    ],
)
def test_message(op, changes, error, text):
    with pytest.raises(error, match=f"^{re.escape(f'{op}: {text}')}$"):
        call(op, **changes)


@pytest.mark.parametrize("op", ["joint_queries", "update_joints"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cpu_joint_ops_are_for_full_precision(op, dtype):
    inputs = make_inputs(op, SMALL, dtype)
    expected = f"{op}: backend 'cpu' cannot serve this call: serves float32 and float64, got {dtype}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        getattr(ops, op)(**inputs, backend="cpu")


@pytest.mark.parametrize("op", ["residual_feed_forward", "residual_attention"])
def test_the_cpu_residual_ops_are_not_for_float16(op):
    inputs = make_inputs(op, SMALL, torch.float16)
    reason = "serves float32, float64 and bfloat16, got torch.float16"
    expected = f"{op}: backend 'cpu' cannot serve this call: {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        getattr(ops, op)(**inputs, backend="cpu")


def test_interpreted_triton_is_not_for_bfloat16(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = make_inputs("attend_tokens", SMALL, torch.bfloat16)
    reason = "serves float32 and float16 with TRITON_INTERPRET=1, whose products are wrong in bfloat16"
    with pytest.raises(ValueError, match=f"^attend_tokens: backend 'triton' cannot serve this call: {reason}$"):
        ops.attend_tokens(**inputs, backend="triton")


def test_patches_that_are_key_need_one_shared_head():
    inputs = make_inputs("pose_guided_attention", SMALL, torch.float32)
    inputs["patches"] = inputs["key"]
    expected = "pose_guided_attention: patches may be key itself only where Hk = 1, got Hk = 2"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ops.pose_guided_attention(**inputs)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ((0, 0.5), ValueError, "num_patches must be an int >= 1, got 0"),
        ((3.0, 0.5), TypeError, "num_patches must be an int >= 1, got float"),
        ((3, 0.0), ValueError, "retention must satisfy 0 < retention <= 1, got 0.0"),
        ((3, 1.5), ValueError, "retention must satisfy 0 < retention <= 1, got 1.5"),
        ((3, float("nan")), ValueError, "retention must satisfy 0 < retention <= 1, got nan"),
    ],
)
def test_keep_count_messages(arguments, error, text):
    with pytest.raises(error, match=f"^{re.escape(f'keep_count: {text}')}$"):
        ops.keep_count(*arguments)


def test_a_demanded_backend_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.setenv("LIFTBYIMAGE_BACKEND", "cuda")
    expected = r"^prune_patches: backend 'cuda' cannot serve this call: .* \(demanded by LIFTBYIMAGE_BACKEND\)$"
    with pytest.raises(ValueError, match=expected):
        call("prune_patches")


def test_environment_demands_a_backend(monkeypatch):
    inputs = make_inputs("prune_patches", SMALL, torch.float32)
    monkeypatch.setenv("LIFTBYIMAGE_BACKEND", "reference")
    served = [status.name for status in ops.explain("prune_patches", inputs["patches"]) if status.serves]
    assert served == ["reference"]


def test_explain_messages():
    with pytest.raises(ValueError, match="^explain: op must be one of attend_patches, "):
        ops.explain("attend", torch.zeros(1))
    with pytest.raises(ValueError, match="^explain: tensors must hold the call's tensor arguments, got none$"):
        ops.explain("prune_patches")


def test_the_cpu_residual_attention_is_not_for_float16():
    inputs = make_inputs("residual_attention", SMALL, torch.float16)
    reason = "serves float32, float64 and bfloat16, got torch.float16"
    expected = f"residual_attention: backend 'cpu' cannot serve this call: {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ops.residual_attention(**inputs, backend="cpu")


AMPERE_BYTES, GEFORCE_BYTES = 163 << 10, 99 << 10  # of shared memory that a block may use


def statuses_on_gpu(monkeypatch, op="attend_patches", capability=(9, 0), shared=AMPERE_BYTES, **sizes):
    """What the backends say of values that are not there, on a GPU that is not there either, by their names."""
    properties = types.SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(_extension, "CUDA_MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    forget = [_dispatch._no_tensor_cores.cache_clear, _dispatch._shared_memory.cache_clear]
    for clear in forget:
        clear()
    sizes = {"heads": 8, "joints": 17, "width": 48, "dtype": torch.bfloat16, "key_heads": 1, "one": True, **sizes}
    with FakeTensorMode():

        def new(*shape):
            return torch.empty(1, *shape, sizes["width"], dtype=sizes["dtype"], device=torch.device("cuda", 0))

        query, tokens = new(sizes["heads"], sizes["joints"]), new(sizes["key_heads"], 5)
        value = tokens if sizes["one"] else new(sizes["key_heads"], 5)
        tensors = (query, new(5)) if op == "guide_patches" else (query, tokens, value)
        if op == "pose_guided_attention":
            tensors = (*tensors, query, tokens)
        statuses = {status.name: status for status in ops.explain(op, *tensors)}
    for clear in forget:
        clear()
    return statuses


def tensor_core_reason(monkeypatch, *arguments, **sizes):
    return statuses_on_gpu(monkeypatch, *arguments, **sizes)["cuda"].why_not


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ({}, None),
        ({"dtype": torch.float32}, "serves float16 and bfloat16, got float32"),
        ({"heads": 9}, "serves up to 144 query rows H·J, got 153"),
        ({"width": 52}, "serves widths that are multiples of 8 up to 256, got 52"),
        ({"width": 264}, "serves widths that are multiples of 8 up to 256, got 264"),
        ({"capability": (8, 0), "width": 256}, None),
        ({"capability": (12, 0), "shared": GEFORCE_BYTES, "width": 128}, None),
        ({"capability": (7, 5)}, "needs compute capability 8.0 or later for its tensor cores, got 7.5"),
    ],
)
@pytest.mark.parametrize("op", ["attend_patches", "guide_patches", "pose_guided_attention"])
def test_tensor_cores_say_what_they_do_not_serve(monkeypatch, op, sizes, expected):
    if op == "pose_guided_attention" and sizes.get("dtype") == torch.float32:
        expected = None  # in plain arithmetic
    assert tensor_core_reason(monkeypatch, op, **sizes) == expected


@pytest.mark.parametrize(
    "demanded, dtype, serving",
    [(None, torch.bfloat16, "cuda"), (None, torch.float32, "reference"), ("cuda", torch.float32, "cuda")],
)
def test_known_slower_kernels_serve_where_they_are_demanded(monkeypatch, demanded, dtype, serving):
    if demanded is not None:
        monkeypatch.setenv("LIFTBYIMAGE_BACKEND", demanded)
    statuses = statuses_on_gpu(monkeypatch, "pose_guided_attention", dtype=dtype)
    assert [name for name, status in statuses.items() if status.serves] == [serving]
    assert statuses["cuda"].why_not is None


def test_rows_of_an_update_must_fit_beside_the_query(monkeypatch):
    sizes = {"capability": (8, 9), "shared": GEFORCE_BYTES, "width": 256}
    assert tensor_core_reason(monkeypatch, "attend_patches", **sizes) is None
    expected = "needs 148608 bytes of shared memory for width 256, the GPU lets a block use 101376"
    assert tensor_core_reason(monkeypatch, "pose_guided_attention", **sizes) == expected


def test_pose_guided_attention_in_half_precision_is_for_tensor_cores(monkeypatch):
    expected = "serves one token tensor that is key, value and patches in half precision"
    assert tensor_core_reason(monkeypatch, "pose_guided_attention", one=False) == expected


@pytest.mark.parametrize("sizes", [{"one": False}, {"key_heads": 8}])
def test_tensor_cores_serve_one_head_of_one_token_tensor(monkeypatch, sizes):
    assert tensor_core_reason(monkeypatch, **sizes) == "serves one head of tokens that are key and value"
