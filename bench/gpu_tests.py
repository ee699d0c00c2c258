"""pytest plugin of `make gpu`: the most telling tests first, and a file that says what became of each.

Triton compiles for every case and dtype: the CUDA kernels, which compile nothing, go before it, and in Triton the
dtype in which models run before the others.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from row_reporter import StateReporter
from row_states import RowStates

BY_OP = ("test_ops.py", "test_triton_interpreter.py")  # the other files try whole models, and are short
TELLING = ("-cuda-", "-triton-bfloat16", "-triton-float32", "-triton-float16", "cuda", "triton")


def rank(test: str) -> int:
    file, _, name = test.partition("::")
    if Path(file).name not in BY_OP:
        return 0
    return next((place for place, part in enumerate(TELLING, 1) if part in name), len(TELLING) + 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--test-states", type=Path, metavar="FILE", help="write there what becomes of every test")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of pytest-xdist, which has one process that hears of all reports
        config.pluginmanager.register(StateReporter(RowStates(config.getoption("test_states"))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: rank(item.nodeid))
