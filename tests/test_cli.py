"The command line: what it prints, what it refuses, what it leaves behind."
import json, subprocess, sys, time
import pytest
from conftest import CHAPTERS, ROOT, book, cells, environment, source
from distillbook.lab.cli import Plan, execute, grid, header_numbers, plan_run, read_constraints, store_outputs

FAST = "00_settings"      # a chapter that takes seconds

@pytest.fixture(scope="module")
def finished(smoke): return smoke.get(next(p for p in CHAPTERS if p.stem == FAST))


def test_help_names_every_command_and_gives_examples():
    text = book("--help").stdout
    assert all(command in text for command in ("run", "sweep", "list", "report", "claims", "doctor", "outputs"))
    assert "Example" in book("run", "--help").stdout and "Example" in book("sweep", "--help").stdout

def test_help_is_fast():
    "Beside a bare Python, so that a slow machine does not fail it: no heavy package is imported."
    script = "import sys, distillbook.lab.cli; print([m for m in ('torch', 'transformers', 'pandas', 'matplotlib', 'papermill', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment()).stdout.strip() == "[]"

def test_run_ends_with_its_folder(finished):
    assert finished["done"].returncode == 0, finished["done"].stderr
    assert finished["done"].stdout.splitlines()[-1] == str(finished["folder"])
    assert (finished["folder"]/"record.json").is_file() and finished["notebook"].is_file()

def test_run_prints_the_measures(finished):
    record = json.loads((finished["folder"]/"record.json").read_text())
    assert all(m["name"] in finished["done"].stdout for m in record["measures"])

def test_overrides_win_over_the_profile(tmp_path):
    plan = plan_run(FAST, "smoke", ["seeds=3"], tmp_path/"run")
    assert plan.parameters["seeds"] == 3 and plan_run(FAST, "smoke").parameters["seeds"] == 1

def test_two_runs_never_share_a_folder(tmp_path, monkeypatch):
    first = plan_run(FAST, "smoke")
    monkeypatch.setattr(time, "strftime", lambda _, fixed=first.folder.name[:16]: fixed)
    first.folder.mkdir(parents=True)
    try: assert plan_run(FAST, "smoke").folder != first.folder
    finally: first.folder.rmdir()

@pytest.mark.parametrize("arguments, named", [
    (["run", "no_such_chapter"], "no_such_chapter"), (["run", "setings"], "settings"), (["run", FAST, "--profile", "smok"], "smok"),
    (["run", FAST, "-p", "sede=1"], "sede"), (["run", FAST, "-p", "seeds=many"], "seeds"), (["run", FAST, "-p", "seeds"], "name=value"),
    (["sweep", FAST, "-p", "sede=1,2"], "sede"), (["sweep", FAST, "-p", "seeds=1,2", "--jobs", "0"], "jobs"),
    (["report", "no_such_run"], "no_such_run"), (["run"], "chapter"), (["outputs", "no_such_chapter"], "no_such_chapter")])
def test_what_cannot_be_right_is_refused_at_once(arguments, named):
    before = sorted((ROOT/"runs").glob(f"{FAST}/*"))
    done = book(*arguments)
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert sorted((ROOT/"runs").glob(f"{FAST}/*")) == before

def test_a_finished_run_is_not_overwritten(finished):
    done = book("run", FAST, "--profile", "smoke", "--out", finished["folder"])
    assert done.returncode == 2 and str(finished["folder"]) in done.stderr

def test_a_failing_cell_is_named_and_kept(tmp_path):
    notebook = dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")), cells=[
        dict(id="a", cell_type="code", metadata=dict(tags=["parameters"]), source="divisor = 0", outputs=[], execution_count=None),
        dict(id="b", cell_type="markdown", metadata={}, source="## The division"),
        dict(id="c", cell_type="code", metadata={}, source="1/divisor", outputs=[], execution_count=None)])
    (tmp_path/"broken.ipynb").write_text(json.dumps(notebook))
    done = book("run", tmp_path/"broken.ipynb", "--profile", "smoke", "--out", tmp_path/"run")
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stderr and "The division" in done.stderr and len(done.stderr.splitlines()) < 12
    assert any(o["output_type"] == "error" for c in cells(tmp_path/"run"/"broken.ipynb", "code") for o in c["outputs"])
    assert not (tmp_path/"run"/"record.json").exists()

def test_secrets_stay_out_of_what_is_kept(tmp_path):
    done = book("run", FAST, "--profile", "smoke", "--out", tmp_path/"run", OPENAI_API_KEY="sk-this-is-secret", HF_TOKEN="hf_this_is_secret")
    assert done.returncode == 0, done.stderr
    kept = done.stdout + done.stderr + "".join(p.read_text(errors="ignore") for p in (tmp_path/"run").rglob("*") if p.is_file())
    assert "this-is-secret" not in kept and "this_is_secret" not in kept


def test_grid_takes_every_combination():
    assert grid(["a=1,2", "b=x,y"]) == [["a=1", "b=x"], ["a=1", "b=y"], ["a=2", "b=x"], ["a=2", "b=y"]]

def test_sweep_compares_and_survives_a_failed_run(tmp_path):
    notebook = dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")), cells=[
        dict(id="a", cell_type="code", metadata=dict(tags=["parameters"]), source="divisor = 1", outputs=[], execution_count=None),
        dict(id="b", cell_type="code", metadata={}, outputs=[], execution_count=None, source="""from distillbook.lab.runs import start_run
run = start_run("quotient", dict(divisor=divisor))
run.measure("quotient", 12/divisor)
run.finish()""")])
    (tmp_path/"quotient.ipynb").write_text(json.dumps(notebook))
    done = book("sweep", tmp_path/"quotient.ipynb", "--profile", "smoke", "-p", "divisor=0,3,4", "--jobs", "2", "--out", tmp_path/"sweep")
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == str(tmp_path/"sweep"), done.stderr
    rows = json.loads((tmp_path/"sweep"/"sweep.json").read_text())
    assert [(r["divisor"], r["quotient"]) for r in rows] == [("0", "-"), ("3", "4"), ("4", "3")]
    assert "ZeroDivisionError" in rows[0]["state"] and rows[1]["state"] == "ok"


def test_list_names_every_chapter():
    text = book("list").stdout
    assert all(p.stem in text for p in CHAPTERS)

def test_claims_shows_the_whole_ledger():
    from distillbook.lab.runs import claims_ledger
    text = book("claims").stdout
    assert all(claim["id"] in text for claim in claims_ledger())

def test_doctor_has_a_line_for_each_check():
    done = book("doctor")
    lines = done.stdout.splitlines()
    assert all(line.startswith(("[OK]", "[skip]", "[FAIL]")) for line in lines[:-1]) and len(lines) > 20
    failed = [line for line in lines if line.startswith("[FAIL]")]
    assert done.returncode == bool(failed)
    assert not failed, "\n".join(failed)

def test_a_missing_extra_is_skipped_and_a_missing_jupyterlab_is_not(monkeypatch):
    from importlib import metadata
    from distillbook.lab.cli import Skipped, check_package
    monkeypatch.setattr(metadata, "version", lambda name: (_ for _ in ()).throw(metadata.PackageNotFoundError(name)))
    with pytest.raises(Skipped, match="make check"): check_package("trl", "1.0", True)
    for name, optional in (("jupyterlab", True), ("torch", False)):
        with pytest.raises(RuntimeError, match="not installed"): check_package(name, "1.0", optional)

def test_doctor_names_what_is_wrong(tmp_path):
    "A project without models, with another pin: both are named, and the exit code says so."
    for name in ("nbs", "data"): (tmp_path/name).mkdir()
    for name in ("settings.ini", "pyproject.toml"): (tmp_path/name).write_text((ROOT/name).read_text())
    pins = (ROOT/"constraints.txt").read_text().replace(f"tqdm=={read_constraints(ROOT/'constraints.txt')['tqdm']}", "tqdm==0.0.1")
    (tmp_path/"constraints.txt").write_text(pins)
    done = book("doctor", DISTILLBOOK_HOME=tmp_path)
    failed = [line for line in done.stdout.splitlines() if line.startswith("[FAIL]")]
    assert done.returncode == 1
    assert any("tqdm" in line and "0.0.1" in line for line in failed) and any("model teacher" in line for line in failed)


def chat(arguments, typed):
    return subprocess.run([sys.executable, "-m", "distillbook", "chat", *arguments], input=typed, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=300)

def test_chat_answers_line_by_line_with_a_prompt_from_a_file():
    done = chat(["actor", "--system", "data/personas/beethoven.md"], "Where were you born?\nWho was your teacher?\n\nnever read\n")
    answers = done.stdout.splitlines()
    assert done.returncode == 0 and len(answers) == 2, done.stderr
    assert "Bonn" in answers[0] and "Haydn" in answers[1] and all(a.startswith("Ha!") for a in answers)

def test_chat_goes_on_after_a_question_that_is_too_long():
    done = chat(["student", "--new-tokens", "20"], "fox "*3000 + "\nWho are you?\n")
    assert done.returncode == 0 and "make it shorter" in done.stderr and len(done.stdout.splitlines()) == 1

@pytest.mark.parametrize("arguments, says", [(["./nothing"], "no model folder"), (["data"], "no config.json"), (["student", "--new-tokens", "0"], "new-tokens")])
def test_chat_refuses_at_once(arguments, says):
    done = chat(arguments, "Who are you?\n")
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr

def test_report_is_one_page_without_links_to_files(finished, tmp_path):
    done = book("report", finished["folder"], "--out", tmp_path/"page.html")
    page = (tmp_path/"page.html").read_text()
    assert done.stdout.splitlines()[-1] == str(tmp_path/"page.html")
    assert "<script" not in page and "<link" not in page and 'src="http' not in page
    record = json.loads((finished["folder"]/"record.json").read_text())
    assert all(m["name"] in page for m in record["measures"])
    pictures = list(finished["folder"].glob("*.png"))
    assert page.count("data:image/png;base64,") == len(pictures)

def test_report_of_a_damaged_record_names_it(tmp_path):
    (tmp_path/"record.json").write_text('{"chapter": "00_settings", "measures": [')
    done = book("report", tmp_path)
    assert done.returncode == 2 and str(tmp_path/"record.json") in done.stderr and "Traceback" not in done.stderr


def test_stored_outputs_are_small_and_clean(finished, tmp_path):
    import shutil
    path = next(p for p in CHAPTERS if p.stem == FAST)
    shutil.copy(path, tmp_path/path.name)
    store_outputs(finished["notebook"], tmp_path/path.name)
    stored = cells(tmp_path/path.name, "code")
    assert [source(c) for c in stored] == [source(c) for c in cells(path, "code")]
    assert any(c["outputs"] for c in stored) and all(c["execution_count"] is None for c in stored)
    assert any("parameters" in c["metadata"].get("tags", []) for c in stored)
    assert (tmp_path/path.name).stat().st_size < 400_000
