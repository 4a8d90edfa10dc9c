"Every notebook runs from its first cell to its last, with the values it was given, and leaves what it promises."
import json, math
import pytest
from conftest import CHAPTERS, NOTEBOOKS, SOLUTIONS, book, cells, source
from distillbook.lab.runs import RunRecord, code_hash
from distillbook.lab.settings import parameters_from_code, resolve_parameters

def name(path): return f"{path.parent.name}/{path.stem}"

@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_chapter_runs_at_smoke(path, smoke):
    result = smoke.get(path)
    assert result["done"].returncode == 0, result["done"].stderr[-3000:]
    assert result["done"].stdout.strip().splitlines()[-1] == str(result["folder"])

@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_parameters_were_those_asked_for(path, smoke):
    "Papermill skips a parameter without a word when the tag is gone, so the executed cell is what counts."
    asked = resolve_parameters(str(path), "smoke")
    executed = cells(smoke.get(path)["notebook"], "code")
    injected = [source(c) for c in executed if "injected-parameters" in c["metadata"].get("tags", [])]
    assert len(injected) == 1 and parameters_from_code(injected[0].replace("# Parameters", "")) == asked
    assert RunRecord.load(smoke.get(path)["folder"]).parameters == asked

@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_record_is_complete(path, smoke):
    record = RunRecord.load(smoke.get(path)["folder"])
    assert (record.chapter, record.profile, record.code_hash) == (path.stem, "smoke", code_hash(path))
    assert record.seconds > 0 and record.peak_memory_mb > 10 and record.device and "python" in record.versions
    assert record.seeds == list(range(record.parameters.get("seed", 0), record.parameters.get("seed", 0) + record.parameters.get("seeds", 1)))
    assert record.measures, "a chapter measures something"
    for m in record.measures:
        assert math.isfinite(m.value) and m.n >= 1, m
        assert math.isnan(m.low) or m.low <= m.value <= m.high, m
    for c in record.claims: assert c.verdict in ("holds", "fails", "mixed", "not testable here") and c.why, c

@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_every_cell_ran(path, smoke):
    executed = cells(smoke.get(path)["notebook"], "code")
    quiet = [source(c)[:80] for c in executed if source(c).strip() and c["execution_count"] is None]
    assert not quiet, f"cells that did not run: {quiet}"

@pytest.mark.parametrize("path", SOLUTIONS, ids=name)
def test_solutions_run(path, smoke):
    result = smoke.get(path)
    assert result["done"].returncode == 0, result["done"].stderr[-3000:]

@pytest.mark.gpu
@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_chapter_runs_on_a_gpu(path, tmp_path):
    done = book("run", path, "--profile", "gpu", "--out", tmp_path/"run", timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert RunRecord.load(tmp_path/"run").seconds < 300

def test_a_solution_that_fails_is_told(smoke, tmp_path):
    notebook = dict(nbformat=4, nbformat_minor=5, metadata={}, cells=[dict(id=str(n), cell_type="code", metadata={}, source=text, outputs=[], execution_count=None)
                                                                      for n, text in enumerate(("x = 1", "x/0", "import os; os._exit(0)"))])
    (tmp_path/"fails.ipynb").write_text(json.dumps(notebook))
    done = smoke.solver(tmp_path/"fails.ipynb", tmp_path/"log.txt")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "cell 1" in done.stderr
