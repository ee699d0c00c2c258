"""Options, settings and fixtures of the benchmarks: `pytest bench --benchmark-only`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import pytest
import torch
from event_clock import EVENT_CLOCK
from measurement import Measurement
from row_reporter import StateReporter
from row_states import RowStates
from verification import Truth
from workload import CENTRAL, FORWARD, SMOKE, TRAINING, Implementation, Setting

STATE_REPORTER = "liftbyimage row states"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("liftbyimage benchmarks")
    group.addoption("--sweep", action="store_true", help="the full grid of shapes instead of the central ones")
    group.addoption("--scaling", action="store_true", help="forward only, one size varied at a time around the centre")
    group.addoption("--smoke", action="store_true", help="one tiny shape: every row verified, no figure of worth")
    group.addoption(
        "--compiled-rows", choices=("all", "none", "only"), default="all", help="rows that torch.compile takes long for"
    )
    group.addoption("--row-states", type=Path, metavar="FILE", help="write there what becomes of every row, as it does")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("row_states") is not None:
        config.pluginmanager.register(StateReporter(RowStates(config.getoption("row_states"))), STATE_REPORTER)


def implementation_of(item: pytest.Item) -> Implementation | None:
    """Of a row that goes through `measure(…)`; the others take their time themselves."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return parameters.get("implementation")


def is_compiled(item: pytest.Item) -> bool:
    implementation = implementation_of(item)
    return implementation is not None and implementation.compiled


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if machine.DEVICE == "cuda":
        for item in items:
            if implementation_of(item) is not None:
                item.add_marker(pytest.mark.benchmark(timer=EVENT_CLOCK))
    chosen = config.getoption("compiled_rows")
    if chosen != "all":
        unwanted = [item for item in items if is_compiled(item) != (chosen == "only")]
        items[:] = [item for item in items if is_compiled(item) == (chosen == "only")]
        config.hook.pytest_deselected(items=unwanted)
        reporter = config.pluginmanager.get_plugin(STATE_REPORTER)
        if reporter is not None and chosen == "none":
            reporter.leave_out(unwanted)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Results are published: what the machine is belongs to them, what it is called does not."""
    for name in ("node", "release"):
        machine_info.pop(name, None)


def settings(config: pytest.Config) -> list[Setting]:
    if config.getoption("smoke"):
        return [Setting(2, direction=direction, central=True, **SMOKE) for direction in (FORWARD, TRAINING)]
    if config.getoption("sweep"):
        return [
            Setting(batch, patches, dim, direction, central=(batch, patches, dim) == (8, 3072, 256))
            for direction in (FORWARD, TRAINING)
            for dim in (128, 256, 512)
            for patches in (192, 768, 3072, 6912)
            for batch in (1, 8, 64, 256)
        ]
    if config.getoption("scaling"):
        varied = [
            *((batch, 3072, 256) for batch in (1, 2, 4, 8, 16, 32)),
            *((8, patches, 256) for patches in (192, 768, 1728, 6912)),
            *((8, 3072, dim) for dim in (128, 512, 768)),
        ]
        return [Setting(*sizes) for sizes in varied]
    batches = (8,) if machine.DEVICE == "cpu" else (8, 256)
    both = [
        Setting(batch, direction=direction, central=True, **CENTRAL)
        for batch in batches
        for direction in (FORWARD, TRAINING)
    ]
    return [Setting(1, **CENTRAL), *both]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "setting" in metafunc.fixturenames:
        metafunc.parametrize("setting", settings(metafunc.config), ids=str)


@pytest.fixture(scope="session")
def ceilings(pytestconfig: pytest.Config) -> machine.Ceilings:
    return machine.measure_ceilings(small=pytestconfig.getoption("smoke"))


@pytest.fixture(scope="session")
def truths() -> dict[str, Truth]:
    return {}


@pytest.fixture(autouse=True)
def own_compiler_state() -> Iterator[None]:
    """What one row compiled, no other row carries."""
    yield
    torch.compiler.reset()


@pytest.fixture
def measure(benchmark: Any, ceilings: machine.Ceilings, truths: dict[str, Truth]) -> Measurement:
    return Measurement(benchmark, ceilings, truths)
