"""Figures that tests measure with `record_property` are printed at the end of the run; fixtures of several files."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid}: {name} = {value}")


@pytest.fixture(params=["few rows", "bands"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of torch's ``stream`` where every role is a full table: what is tested is small, and few rows."""
    if request.param == "bands":
        monkeypatch.setattr("translution.backends.torch.attention.FEW_BYTES", 0)
    return str(request.param)
