"""One suite for all ops: every case × backend × dtype against the float64 reference, and the shared promises."""

import functools
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from liftbyimage import ops
from liftbyimage.ops._explain import OPS, backends_of
from liftbyimage.testing import (
    CASES,
    Case,
    check_against_float64,
    convert,
    differentiable,
    make_inputs,
    named_outputs,
    named_tensors,
    run,
    spy,
)

JOINT_OPS = ("joint_queries", "update_joints")
TOKEN_OPS = ("residual_feed_forward", "residual_attention")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {
    "reference": (torch.float32, torch.float64),
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


def device_of(backend):
    return "cpu" if backend == "cpu" else DEVICE


def require(op, backend, inputs):
    """Skip with the backend's own reason where it cannot serve."""
    tensors = list(named_tensors(inputs).values())
    reason = {b.name: b for b in backends_of(op)}[backend].why_not(*tensors)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def combinations():
    for op in OPS:
        for backend, case in itertools.product(backends_of(op), CASES[op]):
            interpreted = backend.name == "triton" and DEVICE == "cpu"
            if interpreted and case.slow_interpreter:
                continue
            for dtype in DTYPES[backend.name]:
                if op in JOINT_OPS and backend.name == "cpu" and dtype.itemsize < 4:
                    continue  # float32 and float64 only, as test_ops_bad_input states
                if op in TOKEN_OPS and backend.name == "cpu" and dtype == torch.float16:
                    continue  # as test_ops_bad_input states
                if interpreted and dtype == torch.bfloat16:
                    continue  # the interpreter's tl.dot is wrong in bfloat16: test_triton_bfloat16 emulates it
                name = f"{op}-{case}-{backend.name}-{str(dtype).removeprefix('torch.')}"
                yield pytest.param(op, case, backend.name, dtype, id=name)


@pytest.mark.parametrize("op, case, backend, dtype", list(combinations()))
def test_forward_and_gradients_against_float64(op, case, backend, dtype):
    inputs = make_inputs(op, case, dtype, device_of(backend))
    require(op, backend, inputs)
    check_against_float64(op, inputs, dtype, backend)


def serving(op, *, floating64=False):
    names = []
    for backend in backends_of(op):
        if floating64 and backend.name in ("triton", "cuda"):
            continue
        names.append(backend.name)
    return names


OP_BACKENDS = [(op, backend) for op in OPS for backend in serving(op)]
SMALL = {
    "attend_patches": Case("small", B=2, H=2, J=3, P=5, E=4, F=3, need_attention=True),
    "pose_guided_attention": Case("small", B=2, H=2, J=3, P=5, E=4, F=3, D=6),
    "guide_patches": Case("small", B=2, H=2, J=3, P=5, E=4),
    "prune_patches": Case("small", B=2, P=7, D=3, K=4),
    "joint_queries": Case("small", B=2, H=2, J=3, D=6, E=5),
    "update_joints": Case("small", B=2, H=2, J=3, D=6, E=5, F=7),
    "sample_context": Case("small", B=2, H=2, J=3, S=2, maps=((3, 4, 5), (5, 2, 3))),
    "residual_context": Case("small", B=2, H=2, J=3, D=6, S=2, maps=((3, 4, 5), (5, 2, 3))),
    "attend_tokens": Case("small", B=2, H=2, J=3, D=6),
    "residual_attention": Case("small", B=2, H=2, J=3, D=6),
    "residual_feed_forward": Case("small", B=2, J=3, D=6, F=7),
}
RECOMPUTING = JOINT_OPS  # their gradients are PyTorch's own
WEIGHTED = (*JOINT_OPS, *TOKEN_OPS, "residual_context")  # of their inputs only those that follow belong to a sample
PER_SAMPLE = ("joints", "context", "tokens", "branch_scale", "pose", "reference", "feature_maps")
GIVEN = ("importance", "branch_scale")  # taken as constants: no gradient


@pytest.mark.parametrize("op, backend", [(op, b) for op in OPS for b in serving(op, floating64=True)])
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(op, backend, shared):
    case = SMALL[op]
    if shared:
        case = Case("shared", B=2, H=2, J=3, P=5, E=4, F=4, D=4, K=2, value_is_key=True, patches_is_key=True)
    inputs = make_inputs(op, case, torch.float64, device_of(backend))
    require(op, backend, inputs)
    inputs = differentiable(inputs, torch.float64)
    given = {id(tensor): tensor for name, tensor in named_tensors(inputs).items() if name not in GIVEN}

    def function(*tensors):
        replaced = dict(zip(given, tensors, strict=True))
        call = convert(inputs, lambda tensor: replaced.get(id(tensor), tensor.detach()))
        result = getattr(ops, op)(**call, backend=backend)
        return tuple(v for v in result if v is not None and v.is_floating_point())

    assert torch.autograd.gradcheck(function, list(given.values()))


@pytest.mark.parametrize("op, backend", OP_BACKENDS)
def test_only_some_gradients_arrive(op, backend):
    """Each output alone drives the backward; the rest of the incoming gradients are missing, not zero tensors."""
    dtype = torch.float32
    inputs = make_inputs(op, SMALL[op], dtype, device_of(backend))
    require(op, backend, inputs)
    reference = named_outputs(getattr(ops, op)(**differentiable(inputs, torch.float64), backend="reference"))
    for name in (n for n, v in reference.items() if v.requires_grad):
        grads = []
        for dtype_, backend_ in ((torch.float64, "reference"), (dtype, backend)):
            leaves = differentiable(inputs, dtype_)
            output = named_outputs(getattr(ops, op)(**leaves, backend=backend_))[name]
            weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=output.device)
            (output * weights.reshape(output.shape).to(output.dtype)).sum().backward()
            grads.append({n: v.grad for n, v in named_tensors(leaves).items()})
        for argument, expected in grads[0].items():
            actual = grads[1][argument]
            if expected is None:
                assert actual is None or not actual.any(), (name, argument)
            else:
                actual = torch.zeros_like(expected) if actual is None else actual.double()
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=f"{name} → {argument}")


@pytest.mark.parametrize("op, backend", OP_BACKENDS)
@pytest.mark.parametrize("frozen", ["query", "key"])
def test_frozen_inputs_get_no_gradient(op, backend, frozen):
    if op == "prune_patches":
        frozen = "patches"
    if op == "guide_patches" and frozen == "key":
        frozen = "channels"
    if op in JOINT_OPS:
        frozen = {"query": "joints", "key": "out_proj_weight"}[frozen]
    if op == "sample_context":
        frozen = {"query": "reference", "key": "feature_maps[1]"}[frozen]
    if op == "residual_context":
        frozen = {"query": "tokens", "key": "embed_weights[1]"}[frozen]
    if op == "attend_tokens":
        frozen = "query_key_value"
    if op in TOKEN_OPS:
        weight = "linear1_weight" if op == "residual_feed_forward" else "out_proj_weight"
        frozen = {"query": "tokens", "key": weight}[frozen]
    inputs = make_inputs(op, SMALL[op], torch.float32, device_of(backend))
    require(op, backend, inputs)
    expected = run(op, differentiable(inputs, torch.float32), backend)[1]
    leaves = differentiable(inputs, torch.float32)
    named_tensors(leaves)[frozen].requires_grad_(False)
    outputs, grads = run(op, leaves, backend)
    assert frozen not in grads
    assert all(torch.equal(grads[name], expected[name]) for name in grads)
    assert bool(grads) == (op not in ("prune_patches", "attend_tokens"))  # which have one differentiable input


@pytest.mark.parametrize("op, backend", OP_BACKENDS)
def test_bitwise_repeatable(op, backend):
    # On a GPU PyTorch's own gradients of places in a map are summed in no fixed order.
    device = "cpu" if backend == "reference" else device_of(backend)
    inputs = make_inputs(op, CASES[op][0], torch.float32, device)
    require(op, backend, inputs)
    first, first_grads = run(op, differentiable(inputs, torch.float32), backend)
    for _ in range(2):
        again, again_grads = run(op, differentiable(inputs, torch.float32), backend)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert all(torch.equal(first_grads[name], again_grads[name]) for name in first_grads)


@pytest.mark.parametrize("op, backend", [(op, b.name) for op in OPS for b in backends_of(op) if b.batch_independent])
def test_a_sample_does_not_depend_on_its_batch(op, backend):
    case = Case("batch", B=5, H=4, J=17, P=96, E=32, F=32, D=32, K=28, S=2, value_is_key=True, maps=((9, 3, 2),))
    inputs = make_inputs(op, case, torch.float32, device_of(backend))
    require(op, backend, inputs)
    whole, whole_grads = run(op, differentiable(inputs, torch.float32), backend)
    batched = {n: v for n, v in inputs.items() if op not in WEIGHTED or n in PER_SAMPLE}
    alone = inputs | convert(batched, lambda tensor: tensor[3:4])
    result = named_outputs(getattr(ops, op)(**alone, backend=backend))
    for name, value in whole.items():
        assert torch.equal(value[3:4], result[name]), name


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 64])
def test_cpu_result_does_not_depend_on_threads(op, dtype, width):
    case = Case("threads", B=1, H=8, P=700, E=width, F=width, D=width, K=210, need_attention=True)
    inputs = make_inputs(op, case, dtype)
    require(op, "cpu", inputs)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(op, differentiable(inputs, dtype), "cpu"))
    finally:
        torch.set_num_threads(threads)
    outputs, gradients = zip(*results, strict=True)
    # PyTorch's own gradients sum as many partial results as there are threads.
    for first, second in (outputs,) if op in RECOMPUTING else (outputs, gradients):
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", [b.name for b in backends_of("guide_patches")])
def test_guided_channels_are_the_attention_of_attend_patches(backend):
    inputs = make_inputs("guide_patches", Case("", P=33, J=5), torch.float32, device_of(backend))
    require("guide_patches", backend, inputs)
    query, channels = inputs["query"], inputs["channels"]
    tokens = channels[:, None]
    expected = ops.attend_patches(query, tokens, tokens, need_attention=True, backend=backend)
    result = ops.guide_patches(query, channels, backend=backend)
    assert torch.equal(result.context, expected.context)
    assert torch.equal(result.channels[:, :, : channels.shape[2]], channels)
    columns = expected.attention.flatten(1, 2).transpose(1, 2)  # [B, P, R]
    assert torch.equal(result.channels[:, :, channels.shape[2] :], columns)


@pytest.mark.parametrize("backend", [b.name for b in backends_of("guide_patches")])
def test_not_a_number_in_a_guiding_query(backend):
    inputs = make_inputs("guide_patches", Case("nan", P=9, J=3), torch.float32, device_of(backend))
    require("guide_patches", backend, inputs)
    inputs["query"][0, 1, 2] = float("nan")
    result = ops.guide_patches(**inputs, backend=backend)
    row, width = 3 + 2, inputs["channels"].shape[2]
    affected = torch.zeros(result.channels.shape[2], dtype=torch.bool, device=result.channels.device)
    affected[width + row] = True
    assert result.channels[0, :, affected].isnan().all() and result.channels[0, :, ~affected].isfinite().all()
    assert result.channels[1].isfinite().all() and result.context[1].isfinite().all()
    assert result.context[0, 1, 2].isnan().all() and result.context[0, 0].isfinite().all()


@pytest.mark.parametrize("op", ["attend_patches", "pose_guided_attention"])
def test_bfloat16_in_float32_where_torch_may_not_use_onednn(op):
    """The processor's own bfloat16 products are reached through oneDNN; without it the same contract holds."""
    inputs = make_inputs(op, Case("without", H=8, P=70, value_is_key=True), torch.bfloat16)
    require(op, "cpu", inputs)
    with torch.backends.mkldnn.flags(enabled=False):
        check_against_float64(op, inputs, torch.bfloat16, "cpu")


def test_bfloat16_in_float32_where_onednn_may_not_use_the_instructions():
    """The environment can forbid oneDNN what the processor offers; oneDNN itself is asked, once per process."""
    inputs = make_inputs("attend_patches", SMALL["attend_patches"], torch.bfloat16)
    require("attend_patches", "cpu", inputs)
    program = (
        "import torch; from liftbyimage.testing import Case, check_against_float64, make_inputs;"
        "inputs = make_inputs('attend_patches', Case('', H=8, P=70, value_is_key=True), torch.bfloat16);"
        "check_against_float64('attend_patches', inputs, torch.bfloat16, 'cpu')"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_concurrent_callers_get_what_a_serial_run_gets():
    jobs = []
    for seed in range(2):
        for op in ("attend_patches", "pose_guided_attention"):
            case = Case("concurrent", B=3, H=8, P=450 + 100 * seed, E=48, F=48, D=48, value_is_key=True)
            jobs += [(op, make_inputs(op, case, dtype, seed=seed)) for dtype in (torch.float32, torch.bfloat16)]
    require("attend_patches", "cpu", jobs[0][1])

    def results(first):
        order = jobs[first:] + jobs[:first]  # every caller starts elsewhere, so that different calls overlap
        pairs = [run(op, differentiable(inputs, inputs["query"].dtype), "cpu") for op, inputs in order]
        return pairs[len(jobs) - first :] + pairs[: len(jobs) - first]

    expected = results(0)
    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(results, range(4)):
            for one, other in zip(actual, expected, strict=True):
                for mine, theirs in zip(one, other, strict=True):
                    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("op, backend", [pair for pair in OP_BACKENDS if pair[1] in ("cpu", "triton")])
def test_opcheck(op, backend):
    import importlib

    module = importlib.import_module(f"liftbyimage.ops.{op}")
    inputs = make_inputs(op, SMALL[op], torch.float32, device_of(backend))
    require(op, backend, inputs)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    tensors = [value for value in inputs.values() if isinstance(value, (torch.Tensor, list))]
    rest = {
        "attend_patches": [0.5, True, True],
        "pose_guided_attention": [0.5],
        "guide_patches": [0.5],
        "prune_patches": [inputs.get("keep")],
        "joint_queries": [inputs.get("fold"), 2, 1e-5],
        "update_joints": [1e-5],
        "sample_context": [True],
        "residual_context": [None, 2, 1e-5],
        "attend_tokens": [2, 0.5],
        "residual_attention": [None, 2, 1e-5, True],
        "residual_feed_forward": [None, 1e-5, True],
    }[op]
    if op == "joint_queries":
        tensors.pop()  # the fold, which has its own place among the rest
    chosen = module._BY_NAME[backend]
    forward, backward = chosen.forward, chosen.backward
    torch.library.opcheck(forward, (*tensors, *rest), test_utils=tests)
    outputs = forward(*tensors, *rest)
    if op == "prune_patches":
        arguments = (torch.randn_like(outputs[0]), outputs[1], inputs["patches"].shape[1])
    elif op == "attend_patches":
        grads = [torch.randn_like(output) for output in outputs[:3]]
        arguments = (*grads, *tensors, outputs[0], outputs[3], 0.5, True)
    elif op == "guide_patches":
        grads = [torch.randn_like(output) for output in outputs[:2]]
        arguments = (*grads, *tensors, outputs[0], outputs[2], 0.5, True)
    elif op == "joint_queries":
        grads = [torch.randn_like(output) for output in outputs]
        arguments = (*grads, *tensors, *rest, [True] * 10)
    elif op == "update_joints":
        arguments = (torch.randn_like(outputs), *tensors, *rest, [True, False] * 7)
    elif op == "sample_context":
        arguments = ([torch.randn_like(output) for output in outputs], *tensors, *rest, True, False, [True, False])
    elif op == "residual_context":
        arguments = (torch.randn_like(outputs), *tensors, *rest, [True, False] * 8)
    elif op == "attend_tokens":
        arguments = (torch.randn_like(outputs), *tensors, *rest)
    elif op == "residual_attention":
        arguments = (torch.randn_like(outputs[0]), *tensors, None, *outputs[1:], 2, [True, False] * 4)
    elif op == "residual_feed_forward":
        arguments = (torch.randn_like(outputs[0]), *tensors, None, *outputs[1:], [True, False] * 4)
    else:
        grads = [torch.randn_like(output) for output in outputs[:3]]
        arguments = (*grads, *tensors[:4], outputs[0], outputs[3], 0.5, True, False)
    torch.library.opcheck(backward, arguments, test_utils=tests)


@pytest.mark.parametrize(
    "op, direction",
    [
        (op, direction)
        for op, backend in OP_BACKENDS
        for direction in ("forward", "backward")
        if backend == "triton" and not (op in RECOMPUTING and direction == "backward")  # which is one op for all
    ],
)
def test_compiled_and_triton_ops_have_one_schema(op, direction):
    import importlib

    module = importlib.import_module(f"liftbyimage.ops.{op}")
    require(op, "cpu", make_inputs(op, SMALL[op], torch.float32))
    native = str(getattr(module, f"_native_{direction}")._schema)
    triton = str(getattr(module, f"_triton_{direction}")._schema)
    assert native.partition("(")[2] == triton.partition("(")[2]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compile_fullgraph(op, backend):
    torch.compiler.reset()  # one function is compiled for every op and backend, more than the recompile limit
    inputs = make_inputs(op, SMALL[op], torch.float32)
    require(op, backend, inputs)

    def call(**arguments):
        return tuple(v for v in getattr(ops, op)(**arguments, backend=backend) if v is not None)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    eager_leaves, compiled_leaves = (differentiable(inputs, torch.float32) for _ in range(2))
    expected, actual = call(**eager_leaves), compiled(**compiled_leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    for outputs in (expected, actual):
        sum(o.float().square().sum() for o in outputs if o.requires_grad).backward()
    for name, leaf in named_tensors(eager_leaves).items():
        if leaf.grad is not None:
            torch.testing.assert_close(named_tensors(compiled_leaves)[name].grad, leaf.grad)


@pytest.mark.parametrize("op", OPS)
def test_compile_chooses_the_backend_and_keeps_one_tensor_one(op):
    torch.compiler.reset()  # as above
    case = CASES[op][-1] if op == "prune_patches" else Case("one", value_is_key=True, patches_is_key=True)
    inputs = make_inputs(op, case, torch.float32)
    compiled = torch.compile(lambda **arguments: getattr(ops, op)(**arguments)[0], fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), getattr(ops, op)(**inputs)[0])


def test_compiled_gradients_of_attention_without_importance():
    torch.compiler.reset()
    inputs = make_inputs("attend_patches", Case("one"), torch.float32)
    gradients = []
    for wrap in (lambda call: call, lambda call: torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = differentiable(inputs, torch.float32)
        call = wrap(
            lambda **arguments: (
                ops.attend_patches(**{**arguments, "need_importance": False, "need_attention": False}).context
            )
        )
        call(**leaves).square().sum().backward()
        gradients.append([leaf.grad for leaf in named_tensors(leaves).values()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("op, backend", OP_BACKENDS)
def test_autocast_casts_inputs(op, backend):
    inputs = make_inputs(op, SMALL[op], torch.float32, device_of(backend))
    require(op, backend, inputs)
    low = torch.float16 if backend == "triton" and DEVICE == "cpu" else torch.bfloat16
    computed_in = torch.float32 if op in ("sample_context", "residual_context") else low  # places need the digits
    explicit = convert(inputs, lambda tensor: tensor.to(computed_in))
    if op == "prune_patches":
        explicit["importance"] = inputs["importance"]
    require(op, backend, explicit)
    with torch.autocast(device_of(backend), dtype=low):
        result = getattr(ops, op)(**inputs, backend=backend)
    expected = getattr(ops, op)(**explicit, backend=backend)
    assert result[0].dtype == computed_in
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True) if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_float64_alone(op):
    inputs = make_inputs(op, SMALL[op], torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert getattr(ops, op)(**inputs)[0].dtype == torch.float64


@pytest.mark.parametrize("op, backend", OP_BACKENDS)
def test_the_intended_backend_runs(op, backend, monkeypatch):
    inputs = make_inputs(op, SMALL[op], torch.float32, device_of(backend))
    require(op, backend, inputs)
    with spy(op, monkeypatch) as ran:
        getattr(ops, op)(**inputs, backend=backend)
    assert ran == ([] if backend == "reference" else [backend])


@pytest.mark.parametrize("op, backend", OP_BACKENDS)
def test_every_output_is_written(op, backend):
    """Uninitialised memory is filled with NaN, so that an output left unwritten shows."""
    inputs = make_inputs(op, Case("poison", P=37, J=5, need_attention=True, K=11), torch.float32, device_of(backend))
    require(op, backend, inputs)
    previous = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        check_against_float64(op, inputs, torch.float32, backend)
    finally:
        torch.use_deterministic_algorithms(previous)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize(
    "op, backend", [(op, b) for op, b in OP_BACKENDS if op in ("attend_patches", "pose_guided_attention")]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_what_depends_on_it(op, backend, bad):
    inputs = make_inputs(op, Case("nan", P=9, J=3), torch.float32, device_of(backend))
    require(op, backend, inputs)
    inputs["query"][0, 1, 2] = bad
    result = getattr(ops, op)(**inputs, backend=backend)
    assert result.context[0, 1, 2].isnan().all()
    others = torch.ones(result.context.shape[:3], dtype=torch.bool, device=result.context.device)
    others[0, 1, 2] = False
    assert result.context[others].isfinite().all()
    assert result.importance[0].isnan().all() and result.importance[1].isfinite().all()
    if op == "pose_guided_attention":
        assert result.patches[0].isnan().all() and result.patches[1].isfinite().all()


@pytest.mark.parametrize("op, backend", [pair for pair in OP_BACKENDS if pair[0] in JOINT_OPS + TOKEN_OPS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_stays_in_its_sample_and_joint(op, backend, bad):
    inputs = make_inputs(op, Case("nan", J=3), torch.float32, device_of(backend))
    require(op, backend, inputs)
    inputs["joints" if op in JOINT_OPS else "tokens"][0, 1, 2] = bad
    alone = op in ("update_joints", "residual_feed_forward")  # self-attention carries it to every joint of the sample
    for result in named_outputs(getattr(ops, op)(**inputs, backend=backend)).values():
        by_joint = result.transpose(1, 2).flatten(2) if result.dim() == 4 else result  # [B, J, …]
        assert by_joint[0, 1].isnan().all() and by_joint[1].isfinite().all()
        others = by_joint[0, [0, 2]]
        assert others.isfinite().all() if alone else others.isnan().all()


@pytest.mark.parametrize("backend", [b.name for b in backends_of("prune_patches")])
def test_prune_order(backend):
    nan, inf = float("nan"), float("inf")
    importance = torch.tensor(
        [
            [nan, 1.0, -inf, nan, 2.0, 1.0, 0.0, -0.0],
            [nan, nan, nan, nan, nan, nan, nan, nan],
            [0.0, -0.0, 0.0, -0.0, 0.0, -0.0, 0.0, -0.0],
            [-inf, nan, -inf, inf, -1.0, -2.0, inf, nan],
        ],
        device=device_of(backend),
    )
    patches = torch.arange(32.0, device=importance.device).reshape(4, 8, 1)
    require("prune_patches", backend, {"patches": patches, "importance": importance})
    expected = {
        1: [[4], [0], [0], [3]],
        2: [[1, 4], [0, 1], [0, 1], [3, 6]],
        5: [[1, 4, 5, 6, 7], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 3, 4, 5, 6]],
        7: [[0, 1, 2, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]],
    }
    for keep, index in expected.items():
        kept = ops.prune_patches(patches, importance, keep, backend=backend)
        assert kept.index.tolist() == index
        assert torch.equal(kept.patches[..., 0], torch.gather(patches[..., 0], 1, kept.index))


def test_prune_equals_topk_without_ties():
    importance = torch.randperm(3072).float()[None]
    patches = torch.randn(1, 3072, 8)
    kept = ops.prune_patches(patches, importance, 921)
    expected = torch.topk(importance, 921).indices.sort(dim=1).values
    assert torch.equal(kept.index, expected)


@pytest.mark.parametrize(
    "num_patches, retention, expected", [(3072, 0.3, 921), (3072, 1.0, 3072), (1, 0.01, 1), (10, 0.05, 1)]
)
def test_keep_count(num_patches, retention, expected):
    assert ops.keep_count(num_patches, retention) == expected


def test_attention_is_scaled_dot_product_attention():
    inputs = make_inputs("attend_patches", Case("sdpa", shared_head=False), torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(**{k: inputs[k] for k in ("query", "key", "value")})
    torch.testing.assert_close(ops.attend_patches(**inputs).context, expected)


def test_scale_zero_is_not_mistaken_for_none():
    inputs = make_inputs("attend_patches", SMALL["attend_patches"], torch.float32)
    inputs["scale"] = 0.0
    result = ops.attend_patches(**inputs)
    torch.testing.assert_close(result.importance, torch.full_like(result.importance, 1 / 5))


@pytest.mark.parametrize("backend", ["cpu"])
def test_more_scores_than_32_bit_indices_reach(backend):
    """B·H·J·P is 2.2e9: the last sample equals the same sample alone."""
    case = Case("huge", B=20, H=8, J=17, P=800_000, E=1, F=1)
    inputs = make_inputs("attend_patches", case, torch.float32, device_of(backend))
    require("attend_patches", backend, inputs)
    assert case.B * case.H * case.J * case.P > 2**31
    whole = ops.attend_patches(**inputs, backend=backend)
    alone = ops.attend_patches(**convert(inputs, lambda tensor: tensor[-1:]), backend=backend)
    assert torch.equal(whole.context[-1:], alone.context)
    assert torch.equal(whole.importance[-1:], alone.importance)


@pytest.mark.parametrize("backend", [b.name for b in backends_of("attend_patches")])
@pytest.mark.parametrize("logit", [88.0, 104.0, 200.0, 1e4, 3e38])
def test_attention_far_below_the_maximum_is_exactly_zero(backend, logit):
    """Denormals may be kept or dropped; below them nothing may be left, and the maximum takes all."""
    query = torch.tensor([1.0, -1.0], device=device_of(backend)).reshape(1, 2, 1, 1)
    key = torch.tensor([logit, 0.0, -logit] * 11, device=device_of(backend)).reshape(1, 1, 33, 1)
    require("attend_patches", backend, {"query": query, "key": key, "value": key})
    attention = ops.attend_patches(query, key, key, scale=1.0, need_attention=True, backend=backend).attention
    expected = torch.tensor([[1, 0, 0] * 11, [0, 0, 1] * 11], device=attention.device) / 11
    torch.testing.assert_close(attention[0, :, 0], expected, rtol=1e-6, atol=1e-37)
    assert logit < 104 or torch.equal(attention[0, :, 0] == 0, expected == 0)


def test_importance_sums_to_one_and_attention_is_patch_major():
    inputs = make_inputs("attend_patches", Case("layout", P=33, need_attention=True), torch.float32)
    result = ops.attend_patches(**inputs)
    torch.testing.assert_close(result.importance.sum(1), torch.ones(2))
    assert result.attention.stride() == (33 * 68, 17, 1, 68)
    torch.testing.assert_close(result.attention.mean((1, 2)), result.importance)


@pytest.mark.parametrize("op", OPS)
def test_flop_counter_counts_the_products(op):
    from torch.utils.flop_counter import FlopCounterMode

    inputs = make_inputs(op, SMALL[op], torch.float32)
    require(op, "cpu", inputs)
    counts = {}
    for backend in ("cpu", "reference"):
        with FlopCounterMode(display=False) as counter:
            getattr(ops, op)(**inputs, backend=backend)
        counts[backend] = counter.get_total_flops()
    assert counts["cpu"] == counts["reference"]
    multiply_adds = {
        "attend_patches": 2 * 2 * 3 * 5 * (4 + 3),
        "pose_guided_attention": 2 * 2 * 3 * 5 * (4 + 3 + 6),
        "guide_patches": 2 * 2 * 3 * 5 * (4 + 4),
        "prune_patches": 0,
        "joint_queries": 2 * 3 * 6 * (3 * 6 + 2 * 3 + 6 + 6 + 5),
        "update_joints": 2 * 3 * 6 * (5 + 6 + 7 + 7),
        "sample_context": 2 * 3 * 2 * 2 * (3 + 5),
        "residual_context": 2 * 3 * (2 * 6 * (4 + 8) + (3 + 5) * (2 * 2 + 6)),
        "attend_tokens": 2 * 3 * 6 * (3 + 3),
        "residual_attention": 2 * 3 * 6 * (3 * 6 + 2 * 3 + 6),
        "residual_feed_forward": 2 * 3 * 6 * (7 + 7),
    }
    assert counts["cpu"] == 2 * multiply_adds[op]


@pytest.mark.parametrize("backend", [b.name for b in backends_of("update_joints")])
@pytest.mark.parametrize("formulation", ["absorbed", "projected"])
def test_the_joint_ops_are_a_decoder_layer(backend, formulation):
    """Weights of torch.nn.TransformerDecoderLayer, and its result, with an attention to patches between the two ops."""
    dim, heads, joints, patches = 32, 4, 17, 40
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(dim, heads, 48, 0.0, "gelu", batch_first=True).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens, memory = torch.randn(2, joints, dim), torch.randn(2, patches, dim)
    this, image = layer.self_attn, layer.multihead_attn
    query_weight, key_weight, value_weight = image.in_proj_weight.chunk(3)
    query_bias, key_bias, value_bias = image.in_proj_bias.chunk(3)
    absorbed = formulation == "absorbed"
    with torch.no_grad():
        key = value = memory[:, None]
        if not absorbed:
            key = (memory @ key_weight.T + key_bias).unflatten(2, (heads, -1)).transpose(1, 2)
            value = (memory @ value_weight.T + value_bias).unflatten(2, (heads, -1)).transpose(1, 2)
        asked = ops.joint_queries(
            *(tokens, this.in_proj_weight, this.in_proj_bias, this.out_proj.weight, this.out_proj.bias),
            *(layer.norm1.weight, layer.norm1.bias, query_weight, query_bias),
            key_weight.unflatten(0, (heads, -1)) if absorbed else None,
            heads=heads,
            backend=backend,
        )
        context = ops.attend_patches(asked.query, key, value, scale=(dim // heads) ** -0.5).context
        updated = ops.update_joints(
            *(asked.joints, context),
            value_weight.unflatten(0, (heads, -1)).transpose(1, 2) if absorbed else None,
            value_bias if absorbed else None,
            *(image.out_proj.weight, image.out_proj.bias, layer.norm2.weight, layer.norm2.bias),
            *(layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias),
            *(layer.norm3.weight, layer.norm3.bias),
            backend=backend,
        )
        torch.testing.assert_close(updated, layer(tokens, memory))


SAMPLING = [b.name for b in backends_of("sample_context")]


@pytest.mark.parametrize("backend", SAMPLING)
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_not_a_number_in_a_place_stays_in_its_row(backend, padding):
    case = Case("nan", J=3, padding=padding)
    inputs = make_inputs("sample_context", case, torch.float32, device_of(backend))
    require("sample_context", backend, inputs)
    inputs["offsets"][0, 1, 2, 3, 1, 0] = float("nan")
    leaves = differentiable(inputs, torch.float32)
    contexts, gradients = run("sample_context", leaves, backend)
    for level, context in enumerate(contexts.values()):
        rows = context.isnan()
        assert rows[0, 2, 3].all() if level == 1 else not rows.any()
        assert rows.sum() == (rows[0, 2, 3].sum() if level == 1 else 0)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert not gradients["offsets"][0, 1, 2, 3].any() and not gradients["weights"][0, 1, 2, 3].any()
    assert gradients["offsets"][0, 1, 2, 2].any() and gradients["weights"][0, 1, 2, 2].any()


@pytest.mark.parametrize("backend", SAMPLING)
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("far", [float("inf"), -float("inf"), 1e30, -7.0])
def test_places_far_outside(backend, padding, far):
    inputs = make_inputs("sample_context", Case("far", J=2, padding=padding), torch.float32, device_of(backend))
    require("sample_context", backend, inputs)
    inputs["offsets"][..., 0] = far
    leaves = differentiable(inputs, torch.float32)
    contexts, gradients = run("sample_context", leaves, backend)
    border = inputs | {"offsets": inputs["offsets"].clamp(-5, 5)}
    assert all(torch.equal(contexts[name], value) for name, value in run("sample_context", border, backend)[0].items())
    assert all(context.any() for context in contexts.values()) == (padding == "border")
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert not gradients["offsets"][..., 0].any()


@pytest.mark.parametrize("backend", SAMPLING)
def test_a_place_on_the_border_has_no_gradient_whatever_the_map_holds(backend):
    inputs = make_inputs("sample_context", Case("border", J=2), torch.float32, device_of(backend))
    require("sample_context", backend, inputs)
    inputs["offsets"][..., 0] = 7.0
    for feature_map in inputs["feature_maps"]:
        feature_map[..., -1] = float("nan")
    gradients = run("sample_context", differentiable(inputs, torch.float32), backend)[1]
    assert torch.equal(gradients["offsets"][..., 0], torch.zeros_like(gradients["offsets"][..., 0]))


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_sampling_is_grid_sample(padding):
    inputs = make_inputs("sample_context", Case("oracle", magnitude=2.0, padding=padding), torch.float64)
    leaves = differentiable(inputs, torch.float64)
    contexts, gradients = run("sample_context", leaves)
    places = (leaves["reference"][:, None, :, None, None] + leaves["offsets"]).flatten(3, 4)
    expected = []
    for level, feature_map in enumerate(leaves["feature_maps"]):
        read = torch.nn.functional.grid_sample(
            feature_map, places[:, level], padding_mode=padding, align_corners=True
        ).unflatten(3, inputs["offsets"].shape[3:5])
        expected.append(torch.einsum("bcjhs,bjhs->bjhc", read, leaves["weights"][:, level]))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in expected]
    tensors = named_tensors(leaves)
    for actual, wanted in zip(contexts.values(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    for name, wanted in zip(tensors, torch.autograd.grad(expected, list(tensors.values()), cotangents), strict=True):
        torch.testing.assert_close(gradients[name], wanted)


def test_frozen_maps_get_no_gradient_memory():
    from liftbyimage.ops.sample_context import BACKENDS

    inputs = make_inputs("sample_context", SMALL["sample_context"], torch.float32)
    require("sample_context", "cpu", inputs)
    arguments = [inputs[name] for name in ("feature_maps", "reference", "offsets", "weights")]
    contexts = BACKENDS[0].forward(*arguments, False)
    places, weights, maps = BACKENDS[0].backward(contexts, *arguments, False, False, True, [False, True])
    assert [places.numel(), maps[0].numel()] == [0, 0]
    assert weights.shape == inputs["weights"].shape and maps[1].shape == inputs["feature_maps"][1].shape


@pytest.mark.parametrize("backend", [b.name for b in backends_of("residual_context")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_in_a_token_stays_in_it(backend, bad):
    inputs = make_inputs("residual_context", Case("nan", J=3), torch.float32, device_of(backend))
    require("residual_context", backend, inputs)
    inputs["tokens"][0, 1, 2, 3] = bad
    spoilt = ops.residual_context(**inputs, backend=backend).isnan()
    assert spoilt[0, 1, 2].all() and spoilt.sum() == spoilt[0, 1, 2].numel()


@pytest.mark.parametrize("backend", [b.name for b in backends_of("attend_tokens")])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attended_tokens_are_scaled_dot_product_attention(backend, scale):
    case = Case("sdpa", B=3, H=8, J=17, D=640, scale=scale)
    inputs = make_inputs("attend_tokens", case, torch.float32, device_of(backend))
    require("attend_tokens", backend, inputs)
    parts = inputs["query_key_value"].unflatten(2, (3, 8, 80)).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(*parts, scale=scale).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ops.attend_tokens(**inputs, backend=backend), expected)


@pytest.mark.parametrize("backend", [b.name for b in backends_of("attend_tokens")])
def test_not_a_number_stays_in_its_head(backend):
    inputs = make_inputs("attend_tokens", Case("nan", J=5, D=64), torch.float32, device_of(backend))
    require("attend_tokens", backend, inputs)
    packed = inputs["query_key_value"]
    packed[0, 2, 16] = float("nan")  # the query of token 2 in head 1
    packed[0, 3, 64 + 33] = float("nan")  # the key of token 3 in head 2
    packed[0, 3, 128 + 50] = float("nan")  # column 2 of the value of token 3 in head 3
    by_head = ops.attend_tokens(**inputs, backend=backend).unflatten(2, (4, 16))  # [B, T, H, E]
    lost = torch.zeros_like(by_head, dtype=torch.bool)
    lost[0, 2, 1] = lost[0, :, 2] = True
    assert by_head[lost].isnan().all()
    assert not by_head[0, :, 3, 2].isfinite().any()
    lost[0, :, 3, 2] = True
    assert by_head[~lost].isfinite().all()


@pytest.mark.parametrize("backend", [b.name for b in backends_of("attend_tokens")])
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.3])
def test_tokens_far_below_the_largest_score_get_nothing(backend, scale):
    packed = torch.zeros(1, 19, 3, device=device_of(backend))
    packed[0, :, 0] = 1.0
    packed[0, :, 1] = -1e30
    packed[0, 4, 1] = 1e30 if scale > 0 else -3e30
    packed[0, :, 2] = torch.arange(19.0)
    require("attend_tokens", backend, {"query_key_value": packed})
    attended = ops.attend_tokens(packed, heads=1, scale=scale, backend=backend)
    assert torch.equal(attended, torch.full_like(attended, 4.0))


@pytest.mark.parametrize("backend", [b.name for b in backends_of("residual_attention")])
def test_residual_attention_is_that_of_an_encoder_layer(backend):
    """The attention block of torch.nn.TransformerEncoderLayer, whose feed-forward is made to add nothing."""
    dim, heads = 64, 4
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(dim, heads, 8, 0.0, norm_first=True, batch_first=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.zeros_(layer.linear2.weight)
    torch.nn.init.zeros_(layer.linear2.bias)
    tokens, grad = torch.randn(3, 17, dim, requires_grad=True), torch.randn(3, 17, dim)
    own = layer.self_attn
    weights = (layer.norm1.weight, layer.norm1.bias, own.in_proj_weight, own.in_proj_bias)
    leaves = (tokens, *weights, own.out_proj.weight, own.out_proj.bias)
    require("residual_attention", backend, {"tokens": tokens})
    updated = ops.residual_attention(*leaves, heads=heads, eps=layer.norm1.eps, backend=backend)
    expected = layer(tokens)
    torch.testing.assert_close(updated, expected)
    pairs = zip(torch.autograd.grad(updated, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    for actual, right in pairs:
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [b.name for b in backends_of("residual_attention")])
def test_a_dropped_branch_leaves_its_sample_alone(backend):
    case = Case("dropped", B=5, D=32, dropped=3)
    inputs = make_inputs("residual_attention", case, torch.float32, device_of(backend))
    require("residual_attention", backend, inputs)
    dropped = inputs["branch_scale"] == 0
    assert dropped.tolist() == [True, True, False, True, False]
    leaves = differentiable(inputs, torch.float32)
    updated = ops.residual_attention(**leaves, backend=backend)
    cotangent = torch.randn_like(updated)
    updated.backward(cotangent)
    assert torch.equal(updated[dropped], leaves["tokens"][dropped])
    assert torch.equal(leaves["tokens"].grad[dropped], cotangent[dropped])
    assert not torch.equal(updated[~dropped], leaves["tokens"][~dropped])
    assert leaves["branch_scale"].grad is None
    spoilt = inputs | {"tokens": inputs["tokens"].clone()}
    spoilt["tokens"][1] = float("nan")  # passes through a sample whose branch is not computed
    result = ops.residual_attention(**spoilt, backend=backend)
    assert result[1].isnan().all() and torch.equal(result[[0, 2, 3, 4]], updated[[0, 2, 3, 4]])


def test_a_dropped_sample_gives_weights_no_gradient():
    inputs = make_inputs("residual_attention", Case("dropped", B=5, D=32, dropped=3), torch.float32)
    require("residual_attention", "cpu", inputs)
    kept = inputs["branch_scale"] != 0
    gradients = []
    for rows, value in ((slice(None), float("nan")), (kept, 0.0)):
        leaves = differentiable(inputs, torch.float32)
        tokens = inputs["tokens"].clone()
        tokens[~kept] = value
        call = leaves | {"tokens": tokens[rows], "branch_scale": inputs["branch_scale"][rows]}
        ops.residual_attention(**call, backend="cpu")[kept[rows]].square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values() if isinstance(leaf, torch.Tensor)])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True) if pair[1] is not None)


def feed_forward_arguments(layer):
    """What `residual_feed_forward` takes from a pre-norm torch.nn.TransformerEncoderLayer, beside its tokens."""
    linear1, linear2 = layer.linear1, layer.linear2
    return layer.norm2.weight, layer.norm2.bias, linear1.weight, linear1.bias, linear2.weight, linear2.bias


@pytest.mark.parametrize("backend", [b.name for b in backends_of("residual_feed_forward")])
def test_residual_feed_forward_is_half_an_encoder_layer(backend):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        32, 4, 48, 0.0, "gelu", batch_first=True, norm_first=True, layer_norm_eps=1e-6
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(3, 17, 32, requires_grad=True)
    arguments = feed_forward_arguments(layer)
    expected = tokens + layer._ff_block(layer.norm2(tokens))
    actual = ops.residual_feed_forward(tokens, *arguments, eps=1e-6, backend=backend)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    gradients = (torch.autograd.grad(result, (tokens, *arguments), cotangent) for result in (actual, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [b.name for b in backends_of("residual_feed_forward")])
@pytest.mark.parametrize("kept", [(), (1,), (0, 2)])
def test_a_dropped_branch_is_not_computed(backend, kept):
    """A dropped sample passes bit for bit, whatever its branch would be, and adds nothing to the weights' gradients.

    The others are what they are without it: bit for bit where the backend promises that of any batch, else to rounding.
    """
    inputs = make_inputs("residual_feed_forward", Case("dropped", B=3, J=5, D=20, F=33), torch.float32)
    require("residual_feed_forward", backend, inputs)
    independent = {b.name: b.batch_independent for b in backends_of("residual_feed_forward")}[backend]
    same = functools.partial(torch.testing.assert_close, **({"rtol": 0, "atol": 0} if independent else {}))
    scale = torch.zeros(3)
    scale[list(kept)] = 1.25
    dropped = [sample for sample in range(3) if sample not in kept]
    inputs["tokens"][dropped, 0, 0] = float("inf")
    leaves = differentiable(inputs, torch.float32)
    updated = ops.residual_feed_forward(**leaves, branch_scale=scale, backend=backend)
    assert torch.equal(updated[dropped], inputs["tokens"][dropped])
    if backend == "reference":
        return  # its gradients are PyTorch's own, which pass 0 · inf
    updated[list(kept)].square().sum().backward()
    alone = differentiable(inputs | {"tokens": inputs["tokens"][list(kept)]}, torch.float32)
    expected = ops.residual_feed_forward(**alone, branch_scale=scale[list(kept)], backend=backend)
    same(updated[list(kept)], expected)
    expected.square().sum().backward()
    for name, leaf in leaves.items():
        same(leaf.grad[list(kept)] if name == "tokens" else leaf.grad, alone[name].grad, msg=name)
    assert not leaves["tokens"].grad[dropped].any()


def test_residual_feed_forward_over_many_rows():
    """More rows than one chunk of the backward pass: weight gradients add up over chunks, for any number of threads."""
    case = Case("chunks", B=160, J=17, D=24, F=40, dropped=7)
    inputs = make_inputs("residual_feed_forward", case, torch.float32)
    require("residual_feed_forward", "cpu", inputs)
    check_against_float64("residual_feed_forward", inputs, torch.float32, "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run("residual_feed_forward", differentiable(inputs, torch.float32), "cpu"))
    finally:
        torch.set_num_threads(threads)
    for outputs, gradients in results[1:]:
        assert torch.equal(outputs["tokens"], results[0][0]["tokens"])
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gelu_of_extreme_values(dtype):
    """One token of width 1 is normalized to norm_bias, so that the op shows its gelu alone."""
    x = torch.tensor([-1e6, -40.0, -5.4, -5.2, -1.0, -0.0, 1e-7, 0.3, 5.2, 5.4, 40.0, 1e6], dtype=dtype)
    one, zero = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
    require("residual_feed_forward", "cpu", {"x": x})
    tokens = torch.zeros(1, 1, 1, dtype=dtype)
    for value in x:
        arguments = (one, zero, value.reshape(1, 1), value.reshape(1), one[None], zero)
        result = ops.residual_feed_forward(tokens, *arguments, backend="cpu")
        expected = torch.nn.functional.gelu(value.double())
        torch.testing.assert_close(
            result[0, 0, 0].double(), expected, rtol=1e-5 if dtype.itemsize > 2 else 1e-2, atol=2e-6
        )


@pytest.mark.parametrize("backend", [b.name for b in backends_of("residual_context")])
def test_residual_context_is_half_a_published_block(backend):
    """Without its feed-forward, which adds zero, and with the published order of projection and sum."""
    from liftbyimage.reference.context_aware_poseformer import ContextBlock

    case = Case("block", D=32, H=4, S=3)
    inputs = make_inputs("residual_context", case, torch.float32, device_of(backend))
    require("residual_context", backend, inputs)
    channels = [sizes[0] for sizes in case.maps]
    block = ContextBlock(case.D, channels, case.H, case.S, mlp_ratio=2, drop_path=0.0).to(inputs["tokens"].device)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    norm, weights, offsets, embeds = block.norm1, block.attention_weights, block.sampling_offsets, block.embed_proj
    parameters = {"norm_weight": norm.weight, "norm_bias": norm.bias}
    parameters |= {"weights_weight": weights.weight, "weights_bias": weights.bias}
    parameters |= {"offsets_weight": offsets.weight, "offsets_bias": offsets.bias}
    parameters["embed_weights"] = [embed.weight for embed in embeds]
    parameters["embed_biases"] = [embed.bias for embed in embeds]
    result = ops.residual_context(**inputs | parameters, backend=backend)
    everything = torch.cat([inputs["pose"][:, None], inputs["tokens"]], dim=1)
    expected = block(everything, inputs["reference"], inputs["feature_maps"])[:, 1:]
    torch.testing.assert_close(result, expected)
    learned = list(named_tensors(parameters).values())
    for actual, wanted in zip(
        torch.autograd.grad(result.square().sum(), learned),
        torch.autograd.grad(expected.square().sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [b.name for b in backends_of("residual_context")])
@pytest.mark.parametrize("kept", [(), (1,), (0, 2)])
def test_a_dropped_sample_reads_nothing(backend, kept):
    """It passes bit for bit, whatever its branch would be, and every gradient is as if it were not there."""
    case = Case("dropped", B=3, J=5, D=24, maps=((20, 5, 4), (9, 3, 2)))
    inputs = make_inputs("residual_context", case, torch.float32, device_of(backend))
    require("residual_context", backend, inputs)
    kept, dropped = list(kept), [sample for sample in range(3) if sample not in kept]
    scale = inputs["tokens"].new_zeros(3)
    scale[kept] = 1.25
    for spoilt in (inputs["tokens"], inputs["pose"], inputs["feature_maps"][1]):
        spoilt[dropped] = float("inf")
    leaves = differentiable(inputs, torch.float32)
    updated = ops.residual_context(**leaves, branch_scale=scale, backend=backend)
    assert torch.equal(updated[dropped], inputs["tokens"][dropped])
    if backend == "reference":
        return  # its gradients are PyTorch's own, which pass 0 · inf
    batched = convert({name: inputs[name] for name in PER_SAMPLE if name in inputs}, lambda tensor: tensor[kept])
    alone = differentiable(inputs | batched, torch.float32)
    expected = ops.residual_context(**alone, branch_scale=scale[kept], backend=backend)
    assert torch.equal(updated[kept], expected)
    updated[kept].square().sum().backward()
    expected.square().sum().backward()
    expected_grads = {name: leaf.grad for name, leaf in named_tensors(alone).items()}
    for name, leaf in named_tensors(leaves).items():
        per_sample = name.partition("[")[0] in PER_SAMPLE
        assert torch.equal(leaf.grad[kept] if per_sample else leaf.grad, expected_grads[name]), name
        assert not (per_sample and leaf.grad[dropped].any()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_residual_context_do_not_depend_on_threads(dtype):
    """More samples than parts of the backward pass, each of several chunks, and unequal parts."""
    case = Case("parts", B=75, J=19, D=24, maps=((20, 5, 4), (33, 2, 3)), dropped=2)
    inputs = make_inputs("residual_context", case, dtype)
    require("residual_context", "cpu", inputs)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run("residual_context", differentiable(inputs, dtype), "cpu"))
    finally:
        torch.set_num_threads(threads)
    for outputs, gradients in results[1:]:
        assert torch.equal(outputs["tokens"], results[0][0]["tokens"])
        assert gradients.keys() == results[0][1].keys() and "feature_maps[1]" in gradients
        assert all(torch.equal(gradients[name], results[0][1][name]) for name in gradients)
