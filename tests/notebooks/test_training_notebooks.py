"""Notebooks that train, which takes up to a minute each on two idle cores; `make notebooks` runs this."""

import pytest
from test_notebooks import TRAINING, check_run


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_notebook_that_trains_runs_in_order_and_shows_something(path, tmp_path, monkeypatch):
    check_run(path, tmp_path, monkeypatch)
