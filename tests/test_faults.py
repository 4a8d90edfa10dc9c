"What goes wrong on a real machine: killed runs, wrong names, missing files, a full disk. Nothing finished is lost, and the message names the thing."
import json, os, random, shutil, signal, subprocess, sys, textwrap, time
from pathlib import Path
import pytest
from conftest import CHAPTERS, ROOT, book, environment

def recipe(): return next(p for p in CHAPTERS if p.stem == "ship_a_student")

def stable(record):
    "The measures that a second run must repeat: all but times, speeds and memory."
    clock = ("s", "ms", "min", "MB", "GB", "kB", "MiB")
    return {m["name"]: (m["value"], m["low"], m["high"], m["n"]) for m in record["measures"]
            if m["unit"] not in clock and not any(word in m["name"] for word in ("second", "time", "speed", "memory", "overhead"))}

def kill_after(command, seconds, whole_group, **variables):
    "Start a process, kill -9 it after so many seconds; whether it was still at work."
    child = subprocess.Popen(command, cwd=ROOT, env=environment(**variables), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try: child.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL) if whole_group else child.kill()
        child.wait()
        return True
    return False


def test_a_killed_run_is_finished_by_the_next(smoke, tmp_path, shipped_models):
    "kill -9 at five random moments; the sixth run has the measures of one that was never disturbed."
    undisturbed = smoke.get(recipe())
    assert undisturbed["done"].returncode == 0, undisturbed["done"].stderr[-2000:]
    draw, killed, cache = random.Random(time.time_ns()), [], tmp_path/"cache"
    for attempt in range(5):
        moment = draw.uniform(1, max(5, 0.8*undisturbed["seconds"]))
        command = [sys.executable, "-m", "distillbook", "run", str(recipe()), "--profile", "smoke", "--out", str(tmp_path/f"killed{attempt}")]
        if kill_after(command, moment, whole_group=attempt % 2 == 0, DISTILLBOOK_CACHE=cache): killed.append(round(moment, 1))
    assert killed, "no attempt was killed: every run had finished before its moment"
    print(f"killed after {killed} s of about {undisturbed['seconds']:.0f} s")
    done = book("run", recipe(), "--profile", "smoke", "--out", tmp_path/"finished", DISTILLBOOK_CACHE=cache)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((folder/"record.json").read_text()) for folder in (undisturbed["folder"], tmp_path/"finished"))
    assert stable(first) and stable(second) == stable(first)

TRAINING = """
import json, sys, torch
from pathlib import Path
from distillbook.lab.models import tiny_qwen3, train_tokenizer
from distillbook.lab.training import train
torch.set_num_threads(1)
tokenizer = train_tokenizer(["a few words to learn pieces from, again and again"]*50, vocabulary_size=300)
torch.manual_seed(0)
model = tiny_qwen3(tokenizer, hidden_size=32, layers=1, intermediate_size=32, heads=2, kv_heads=1, head_dim=16)
draw = torch.Generator().manual_seed(1)
rows = [dict(input_ids=x, labels=x) for x in torch.randint(10, 250, (64, 32), generator=draw)]
history = train(model, rows, sys.argv[1], steps=120, batch_size=4, save_steps=10, seed=0, precision="float32", progress=False)
total = sum(p.double().sum().item() for p in model.parameters())
Path(sys.argv[2]).write_text(json.dumps(dict(loss=history["loss"], weights=total)))
"""

def test_a_killed_training_run_goes_on_to_the_same_weights(tmp_path):
    (tmp_path/"training.py").write_text(TRAINING)
    def command(name): return [sys.executable, str(tmp_path/"training.py"), str(tmp_path/name), str(tmp_path/f"{name}.json")]
    start = time.time()
    subprocess.run(command("undisturbed"), cwd=ROOT, env=environment(), check=True, capture_output=True)
    whole, draw, killed = time.time() - start, random.Random(time.time_ns()), []
    for attempt in range(5):
        moment = draw.uniform(0.4, 0.95)*whole
        if kill_after(command("killed"), moment, whole_group=True): killed.append(round(moment, 1))
    assert killed, "no attempt was killed: every run had finished before its moment"
    print(f"killed after {killed} s of {whole:.1f} s")
    subprocess.run(command("killed"), cwd=ROOT, env=environment(), check=True, capture_output=True)
    first, second = (json.loads((tmp_path/f"{name}.json").read_text()) for name in ("undisturbed", "killed"))
    assert second["weights"] == pytest.approx(first["weights"], rel=1e-6) and second["loss"][-1] == pytest.approx(first["loss"][-1], rel=1e-5)


def test_unknown_names_are_named_with_what_is_near():
    done = book("run", "00_settings", "--profile", "labtop")
    assert done.returncode == 2 and "labtop" in done.stderr and "laptop" in done.stderr
    done = book("run", "00_settings", "-p", "sedes=3")
    assert done.returncode == 2 and "sedes" in done.stderr and "seeds" in done.stderr

def test_a_missing_file_is_named(tmp_path):
    done = book("report", tmp_path/"nowhere"/"record.json")
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr

def test_a_missing_project_says_what_to_do(tmp_path):
    done = book("list", DISTILLBOOK_HOME=tmp_path)
    assert done.returncode != 0 and str(tmp_path) in done.stderr and "settings.ini" in done.stderr and "Traceback" not in done.stderr

def test_a_damaged_settings_file_is_named(tmp_path):
    (tmp_path/"nbs"/"0_lab").mkdir(parents=True)
    shutil.copy(ROOT/"nbs"/"0_lab"/"00_settings.ipynb", tmp_path/"nbs"/"0_lab")
    (tmp_path/"settings.ini").write_text("[smoke]\nseeds 1\n")
    done = book("run", "00_settings", "--profile", "smoke", DISTILLBOOK_HOME=tmp_path)
    assert done.returncode == 2 and str(tmp_path/"settings.ini") in done.stderr and "Traceback" not in done.stderr

def test_a_kernel_that_dies_is_reported(tmp_path):
    notebook = dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")), cells=[
        dict(id="a", cell_type="code", metadata=dict(tags=["parameters"]), source="seed = 0", outputs=[], execution_count=None),
        dict(id="b", cell_type="code", metadata={}, source="import os; os.kill(os.getpid(), 9)", outputs=[], execution_count=None)])
    (tmp_path/"dies.ipynb").write_text(json.dumps(notebook))
    done = book("run", tmp_path/"dies.ipynb", "--profile", "smoke", "--out", tmp_path/"run")
    assert done.returncode == 1 and "died" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 256 KB that is full at once."
    place = tmp_path/"small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, text=True) if shutil.which("mount") else None
    if mounted is None or mounted.returncode: pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip() if mounted else 'no mount command'}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)

def test_a_full_disk_is_named_by_a_run(small_disk):
    (small_disk/"filler").write_bytes(b"x"*200_000)
    done = book("run", "08_report", "--profile", "smoke", "--out", small_disk/"run")
    assert done.returncode == 1 and "No space left" in done.stderr and str(small_disk) in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (small_disk/"run"/"record.json").exists()

STEPS = """
import sys
from distillbook.lab.runs import cached
def small(seed): return dict(value=seed*2)
def large(seed, folder):
    (folder/"weights").write_bytes(b"x"*1_000_000)
    return dict(value=seed)
print(cached(small, seed=3))
if sys.argv[1] == "fill": cached(large, seed=3)
"""

def test_a_full_disk_loses_no_finished_step(small_disk, tmp_path):
    (tmp_path/"steps.py").write_text(textwrap.dedent(STEPS))
    def steps(what): return subprocess.run([sys.executable, str(tmp_path/"steps.py"), what], cwd=ROOT, env=environment(DISTILLBOOK_CACHE=small_disk/"cache"), capture_output=True, text=True)
    full = steps("fill")
    assert full.returncode and "No space left" in full.stderr and "large" in full.stderr and str(small_disk) in full.stderr
    again = steps("read")
    assert again.returncode == 0 and again.stdout.strip() == "{'value': 6}"
    assert not [p for p in (small_disk/"cache").rglob("weights")], "the unfinished step was cleaned away"
