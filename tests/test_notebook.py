"""The notebook runs from data to chat."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples/from_data_to_chat.ipynb"
ANSWER = "name: Tom; city: Oslo; item: lamps; count: 12"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    out = capsys.readouterr().out
    assert "100.0 %" in out and "step 25" in out
    assert out.count(ANSWER) == 2
    assert names["evaluation"].adapter_loss < 0.1 < names["evaluation"].base_loss
    assert names["evaluation"].peak_memory_bytes <= 20_000_000
