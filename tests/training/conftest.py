"""What the tests of training share: the small run that nothing has broken, and quick reports."""

from pathlib import Path

import pytest

from settings import read, validate
from tests.conftest import small_run
from training.settings import RunConfig


@pytest.fixture(autouse=True)
def no_curves(monkeypatch) -> None:
    """Reports without drawings, which would take as long as a short run; tests/observe/ looks at them."""
    monkeypatch.setattr("observe.report.curves", lambda _history: [])


@pytest.fixture(scope="session")
def whole(tmp_path_factory, prepared) -> Path:
    """The folder of the small run (tests/tiny.yaml), trained by one process without a break. Not to be changed."""
    from training.start import start
    from training.trainer import Outcome

    arguments = small_run(tmp_path_factory.mktemp("whole"), prepared, "whole")
    config = validate(RunConfig, read(arguments[1], arguments[2:]))
    assert start(config) is Outcome.FINISHED
    return config.run.path
