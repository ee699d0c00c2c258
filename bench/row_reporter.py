"""Follows what pytest runs in a file that is up to date if the run is killed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from row_states import DUE, LEFT_OUT, RowStates


class StateReporter:
    """A plugin of the process that hears of every report; under pytest-xdist the one that runs no test itself."""

    def __init__(self, states: RowStates) -> None:
        self.states = states
        self.due: set[str] = set()

    def expect(self, tests: Iterable[str]) -> None:
        for test in tests:
            if test not in self.due:
                self.due.add(test)
                self.states.add(test, DUE)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.expect(ids)

    def leave_out(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.states.add(item.nodeid, LEFT_OUT)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
            self.states.add(report.nodeid, report.outcome, reason)
