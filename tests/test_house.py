"The house rules: what is exported, committed and printed fits together."
import ast, hashlib, importlib, json, re, shutil, subprocess, sys, time, tomllib
from pathlib import Path
import pytest
from conftest import CHAPTERS, NOTEBOOKS, ROOT, SOLUTIONS, cells, environment, source
from distillbook.lab.cli import data_sums, header_numbers, read_constraints, readme_text, reference_record
from distillbook.lab.exercises import Exercise
from distillbook.lab.runs import claims_ledger, code_hash

PARTS = ["lab", "synth", "distill", "adapt", "merge", "ship", "trust", "scale"]
MODULES = sorted(p for p in (ROOT/"distillbook").rglob("*.py") if not p.name.startswith("_"))
def name(path): return str(path.relative_to(ROOT))
def module_name(path): return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what export and clean work on."
    folder = tmp_path_factory.mktemp("house")/"book"
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for part in ("nbs", "distillbook"): shutil.copytree(ROOT/part, folder/part, ignore=skip)
    for file in ("pyproject.toml", "settings.ini", "README.md"): shutil.copy(ROOT/file, folder)
    return folder

def tool(command, folder):
    module = dict(export="doclinks", clean="clean")[command]
    script = f"from nbdev.{module} import nbdev_{command}; nbdev_{command}()"
    subprocess.run([sys.executable, "-c", script], cwd=folder, env={**environment(), "PYTHONPATH": str(folder)}, check=True, capture_output=True, text=True)

def test_package_is_what_the_notebooks_export(copy):
    before = {p.relative_to(ROOT): p.read_text() for p in (ROOT/"distillbook").rglob("*.py")}
    for p in (copy/"distillbook").rglob("*.py"):
        if not p.name.startswith("__"): p.unlink()
    tool("export", copy)
    after = {p.relative_to(copy): p.read_text() for p in (copy/"distillbook").rglob("*.py")}
    assert sorted(after) == sorted(before), "a module without a notebook, or a notebook without its module: make export"
    assert not [str(p) for p in after if after[p] != before[p]], "these differ from their notebooks: make export"

def test_notebooks_are_clean_and_keep_their_tags(copy):
    tool("clean", copy)
    dirty = [name(p) for p in NOTEBOOKS if json.loads((copy/p.relative_to(ROOT)).read_text()) != json.loads(p.read_text())]
    assert not dirty, f"nbdev-clean changes {dirty}: make export"
    for p in CHAPTERS:
        tagged = [c for c in cells(copy/p.relative_to(ROOT)) if "parameters" in c["metadata"].get("tags", [])]
        assert len(tagged) == 1, f"{name(p)}: {len(tagged)} cells are tagged parameters after cleaning"

def test_readme_is_the_index():
    assert (ROOT/"README.md").read_text() == readme_text(ROOT/"nbs"/"index.ipynb"), "README.md is not nbs/index.ipynb: make export"

def test_index_shows_the_records_as_they_are(tmp_path):
    from distillbook.lab.cli import Plan, execute
    outcome = execute(Plan(ROOT/"nbs"/"index.ipynb", "laptop", {}, tmp_path), show=False, need_record=False)
    assert not outcome.failure, outcome.failure
    assert readme_text(tmp_path/"index.ipynb") == (ROOT/"README.md").read_text(), "README.md is older than data/records: make export"


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_outputs_are_those_of_the_code(path):
    record = reference_record(path.stem)
    assert record, f"data/records/laptop/{path.stem}.json is missing: make outputs"
    assert record["code_hash"] == code_hash(path), f"{name(path)}: its code changed after its outputs were made: make outputs"
    assert any(c["outputs"] for c in cells(path, "code")), f"{name(path)} carries no outputs: make outputs"
    errors = [o["ename"] for c in cells(path, "code") for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors, f"{name(path)} carries errors: {errors}"

@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_header_box_says_what_the_records_say(path):
    box = [source(c) for c in cells(path, "markdown")[:4] if "You will be able to" in source(c)]
    said = re.search(r"smoke \d+ s, laptop \d+ min, \d+\.\d+ GB", box[0]) if box else None
    assert said, f"{name(path)}: no box with `smoke N s, laptop N min, N.N GB`"
    measured = header_numbers(path.stem)
    assert measured, f"{name(path)}: no reference record at smoke or laptop: make outputs"
    assert said[0] == measured, f"{name(path)} says {said[0]}, its records say {measured}: make outputs"

@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_reference_runs_keep_to_their_time(path):
    recipe = 540 if path.stem == "ship_a_student" else 360      # the flagship trains two students and two continuations: 491 s on a processor without AVX-512
    for profile, limit in (("smoke", 60), ("laptop", recipe if path.parent.name == "recipes" else 300)):
        record = reference_record(path.stem, profile)
        assert record, f"data/records/{profile}/{path.stem}.json is missing: make outputs"
        assert record["seconds"] <= limit, f"{path.stem} took {record['seconds']:.0f} s at {profile}, {limit} s allowed"

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_are_small_and_nothing_is_hidden_from_execution(path):
    assert path.stat().st_size < 400_000, f"{name(path)}: {path.stat().st_size//1000} KB"
    for i, cell in enumerate(cells(path, "code")):
        assert not re.search(r"^#\|\s*eval:\s*false", source(cell), re.M), f"{name(path)}, code cell {i + 1} is kept from running"
        assert len(source(cell).splitlines()) <= 45, f"{name(path)}, code cell {i + 1} has {len(source(cell).splitlines())} lines"

@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_answers_to_exercises_are_folded(path):
    for cell in cells(path, "code"):
        if source(cell).startswith("#| export") and re.search(r"^check_\w+ = Exercise\(", source(cell), re.M):
            assert cell["metadata"].get("jupyter", {}).get("source_hidden"), f"{name(path)} shows the answers: {source(cell)[:60]}"

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_outputs_carry_no_place_of_the_machine_that_made_them(path):
    said = "".join("".join(o.get("text", "")) for c in cells(path, "code") for o in c["outputs"])
    assert "site-packages/" not in said and "/.venv/" not in said, f"{name(path)}: an output names a place of one machine"

def test_no_tracked_text_names_a_place_of_the_machine_that_wrote_it():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode: pytest.skip("not a git checkout: what is tracked is unknown")
    here, found = str(ROOT.parent) + "/", []
    for file in filter(None, tracked.stdout.split("\0")):
        path = ROOT/file
        if not path.is_file() or path.suffix in (".safetensors", ".png"): continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(here) > 2 and here in text or "/ro" + "ot/" in text: found.append(file)
    assert not found, f"a place of one machine stands in {', '.join(found)}"

@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_a_chapter_has_its_title_and_promise(path):
    first = source(cells(path)[0]).splitlines()
    assert cells(path)[0]["cell_type"] == "markdown" and first[0].startswith("# ") and first[1].startswith("> "), name(path)

def test_claims_in_records_are_in_the_ledger():
    ledger = {claim["id"] for claim in claims_ledger()}
    for path in (ROOT/"data"/"records").glob("*/*.json"):
        assert not {c["id"] for c in json.loads(path.read_text())["claims"]} - ledger, path

def test_shipped_files_are_those_of_the_checksums():
    assert (ROOT/"data"/"SHA256SUMS").is_file(), "data/SHA256SUMS is missing: make export"
    assert (ROOT/"data"/"SHA256SUMS").read_text() == data_sums(), "data/ changed: make export writes data/SHA256SUMS"


def imported(code, package):
    "The distillbook modules that Python code imports, at its top or inside functions."
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            found.add(".".join(base + ([node.module] if node.module else [])))
    return {m for m in found if m.startswith("distillbook")}

@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_one_way(path):
    own = PARTS.index(module_name(path).split(".")[1])
    for other in imported(path.read_text(), module_name(path).split(".")[:-1]):
        part = other.split(".")[1] if "." in other else None
        assert part != "recipes" and (part is None or PARTS.index(part) <= own), f"{module_name(path)} imports {other}"

def test_recipes_export_nothing():
    for path in CHAPTERS:
        exports = [c for c in cells(path, "code") if re.search(r"^#\|\s*(export|default_exp)", source(c), re.M)]
        assert path.parent.name != "recipes" or not exports, f"{name(path)} exports"

def test_no_notebook_imports_the_module_that_it_exports():
    for path in CHAPTERS:
        code = "\n".join(source(c) for c in cells(path, "code"))
        exported = re.search(r"^#\|\s*default_exp\s+(\S+)", code, re.M)
        plain = re.sub(r"^[%!].*$", "", code, flags=re.M)
        if exported: assert f"distillbook.{exported[1]}" not in imported(plain, []), name(path)

def test_import_is_fast():
    "Best of five, beside a Python that does nothing."
    def best(code):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)
            times.append(time.perf_counter() - start)
        return min(times)
    bare, ours = best("pass"), best("import distillbook")
    print(f"import distillbook: {ours - bare:.3f} s beside {bare:.3f} s for a bare Python")
    assert ours - bare < 0.5 or ours < 3*bare

def test_pins_cover_every_dependency():
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    pins = {re.sub(r"[-_.]+", "-", k).lower() for k in read_constraints(ROOT/"constraints.txt")}
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    missing = {re.match(r"[A-Za-z0-9_.-]+", d)[0] for d in wanted if re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9_.-]+", d)[0]).lower() not in pins}
    assert not missing, f"constraints.txt does not pin {missing}"
    assert all("+" not in line for line in (ROOT/"constraints.txt").read_text().splitlines() if "==" in line)


EXERCISES = [(module_name(p), key) for p in MODULES for key in re.findall(r"^(check_\w+) = Exercise", p.read_text(), re.M)]

@pytest.fixture(params=EXERCISES, ids=lambda pair: f"{pair[0].removeprefix('distillbook.')}.{pair[1]}")
def exercise(request): return getattr(importlib.import_module(request.param[0]), request.param[1])

def test_the_right_answer_passes(exercise, capsys):
    assert exercise.check(exercise.right).right and capsys.readouterr().out.strip() == "right"

def test_each_usual_mistake_gets_its_own_message(exercise, capsys):
    assert exercise.wrong, f"{exercise.name} names no usual wrong answer"
    for label, (mistake, advice) in exercise.wrong.items():
        outcome = exercise.check(mistake)
        assert not outcome.right and outcome.mistake == label and advice in capsys.readouterr().out

def test_an_untouched_stub_breaks_nothing(exercise, capsys):
    def stub(*arguments): ...
    def raising(*arguments): raise NotImplementedError
    for function in (stub, raising):
        outcome = exercise.check(function)
        assert not outcome.tried and capsys.readouterr().out.strip() == "not tried yet"

def test_an_answer_that_raises_is_told_so(exercise, capsys):
    def wild(*arguments): raise RuntimeError("by accident")
    assert not exercise.check(wild).right

def test_every_exercise_has_a_solution_and_a_stub():
    for module, key in EXERCISES:
        chapter = next(p for p in CHAPTERS if re.search(rf"^#\|\s*default_exp\s+{re.escape(module.removeprefix('distillbook.'))}\s*$", "\n".join(source(c) for c in cells(p, "code")), re.M))
        solution = ROOT/"nbs"/"solutions"/chapter.name
        assert solution.is_file() and key in "\n".join(source(c) for c in cells(solution, "code")), f"{key} of {chapter.stem} has no solution in {solution}"
        calls = [c for c in cells(chapter, "code") if re.search(rf"^{key}\(", source(c), re.M)]
        assert calls, f"{chapter.stem} never calls {key}"

def test_chapters_have_exercises():
    for path in CHAPTERS:
        if path.parent.name != "recipes": assert sum("difficulty" in source(c) or re.search(r"\*\*\d+ · ", source(c)) is not None for c in cells(path, "markdown")) >= 2, f"{name(path)} has fewer than two exercises"
