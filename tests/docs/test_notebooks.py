"""Notebooks run from a clean folder, and are stored with what they show."""

import ast
import json
import logging
import sys

import pytest
from code_blocks import CLONED, ROOT


FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Those that train take longer: `make notebooks` runs them.
TRAINING = sorted((FOLDER / "training").glob("*.ipynb"))


def cells_of(path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def check_run(path, tmp_path, monkeypatch):
    """Run a notebook as it stands; it must show something."""
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.setitem(
        sys.modules, "IPython", type("IPython", (), {"get_ipython": staticmethod(lambda: None), "version_info": (9, 0)})
    )
    monkeypatch.setitem(sys.modules, "IPython.display", type("display", (), {"HTML": str}))
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)  # some are quiet while they train
    for name in CLONED:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    shown = []
    names = {"__name__": "__main__", "display": shown.append}
    for number, cell in enumerate(cells_of(path)):
        tree = ast.parse("".join(cell["source"]), f"{path.name}, code cell {number}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), path.name, "eval"), names))
    # As a notebook does: what can show itself is asked to.
    ways = ("_repr_html_", "_repr_png_")
    assert any(getattr(value, way, lambda: None)() for value in shown for way in ways)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_order_and_shows_something(path, tmp_path, monkeypatch):
    check_run(path, tmp_path, monkeypatch)


@pytest.mark.parametrize("path", [*NOTEBOOKS, *TRAINING], ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_outputs_and_no_errors(path):
    cells = cells_of(path)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert len(outputs) >= len(cells) / 2 and not any(output["output_type"] == "error" for output in outputs)
    assert str(ROOT) not in path.read_text() and "/tmp/" not in path.read_text()
