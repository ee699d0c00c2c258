"""Options, settings and fixtures of the benchmarks: `pytest bench --benchmark-only`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import machine
import pytest
import torch
from measurement import Measurement
from verification import Truth
from workload import CENTRAL, FORWARD, SMOKE, TRAINING, Setting


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("liftbyimage benchmarks")
    group.addoption("--sweep", action="store_true", help="the full grid of shapes instead of the central ones")
    group.addoption("--scaling", action="store_true", help="forward only, one size varied at a time around the centre")
    group.addoption("--smoke", action="store_true", help="one tiny shape: every row verified, no figure of worth")


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
