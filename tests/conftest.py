"""Without a GPU, Triton kernels run in its interpreter; the variable must be set before Triton is first imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


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
