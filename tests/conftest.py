"""Without a GPU, Triton kernels run in its interpreter; the variable must be set before Triton is first imported."""

import importlib.util
import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def products_rounded_once():
    """Products of Triton's interpreter in float64, rounded once to float32.

    The interpreter hands them to NumPy's BLAS, which rounds differently from one processor to the next: a case of
    large logits, whose error is that of its products, passed on one machine and failed on another.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if d.data.dtype != np.float32:
            return plain(self, a, b, d, input_precision, max_num_imprecise_acc)
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(np.float32), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
    yield
    interpreter.InterpreterBuilder.create_dot = plain


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail where a test would skip for want of a GPU")
    parser.addoption("--require-browser", action="store_true", help="fail where a test would skip for want of Chromium")
    parser.addoption(
        "--packages-into", metavar="FOLDER", help="test_packaging.py compiles, and leaves archive and wheel here"
    )


def pytest_configure(config):
    if config.getoption("require_gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("--require-gpu: torch sees no CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped:
        reason = str(report.longrepr)
        for option, words in (("require_gpu", ("CUDA", "GPU")), ("require_browser", ("Chromium", "playwright"))):
            if item.config.getoption(option) and any(word in reason for word in words):
                report.outcome = "failed"
                report.longrepr = f"skipped although --{option.replace('_', '-')} was given: {reason}"
    return report
