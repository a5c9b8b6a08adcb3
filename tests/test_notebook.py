"""The notebook runs from top to bottom, and shows what it wrote when it last did."""

import json
import sys
from pathlib import Path
from types import ModuleType

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def code():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def written(cell):
    """What a cell printed."""
    return "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")


def test_the_stored_notebook_is_whole_and_small():
    assert NOTEBOOK.stat().st_size < 200_000
    assert [cell["execution_count"] for cell in code()] == list(range(1, len(code()) + 1))
    kinds = [out["output_type"] for cell in code() for out in cell["outputs"]]
    assert "error" not in kinds
    assert sum("image/png" in out.get("data", {}) for cell in code() for out in cell["outputs"]) == 2
    for cell in code():
        compile(source(cell), str(NOTEBOOK), "exec")


class Shown:
    """A picture or page that a cell shows: its file must be there."""

    def __init__(self, name, **size):
        assert Path(name).stat().st_size > 1000


def test_the_notebook_runs_and_prints_what_is_stored(tmp_path, monkeypatch, capsys):
    display = ModuleType("IPython.display")
    display.Image = display.IFrame = Shown
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    shared = {"__name__": "__main__"}
    for cell in code():
        exec(compile(source(cell), str(NOTEBOOK), "exec"), shared)
        assert capsys.readouterr().out.splitlines()[:1] == written(cell).splitlines()[:1]
    found = {name.name for name in tmp_path.iterdir()}
    assert found == {"profile.json", "profile.png", "budgets.png", "view.html"}
