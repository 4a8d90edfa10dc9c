"What the tests share: the command line in a process of its own, notebooks run once at smoke, and inputs that may be absent."
import json, os, subprocess, sys, tempfile, threading, time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
import psutil, pytest
from hypothesis import settings as hypothesis_settings

hypothesis_settings.register_profile("book", deadline=None)     # a busy machine is no error
hypothesis_settings.load_profile("book")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SOLUTIONS = [p for p in NOTEBOOKS if p.parent.name == "solutions"]
CHAPTERS = [p for p in NOTEBOOKS if p not in SOLUTIONS and p.parent.name != "nbs"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")     # notebooks run beside the tests: threads that outnumber the cores wait for each other


def source(cell): return "".join(cell["source"])

def cells(path, kind=None):
    found = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return [c for c in found if kind in (None, c["cell_type"])]

def environment(**more):
    "The environment of a child process: this checkout's package, one thread, no hub."
    here = {"PYTHONPATH": str(ROOT), "DISTILLBOOK_HOME": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
    return {**{k: v for k, v in os.environ.items() if not k.startswith("DISTILLBOOK_RUN")}, **here, **{k: str(v) for k, v in more.items()}}

def book(*arguments, timeout=900, **variables):
    "Run the command line; returns the finished process with its text."
    return subprocess.run([sys.executable, "-m", "distillbook", *map(str, arguments)], capture_output=True, text=True,
                          cwd=ROOT, env=environment(**variables), timeout=timeout)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    "A cache that starts empty, so that every experiment runs in the tests; its corpora are shared by all notebooks."
    return tmp_path_factory.mktemp("cache")

BESIDE = "DISTILLBOOK_BESIDE_THE_TESTS"
def children():
    "Process numbers of all that the tests started, and what those started; not of the notebooks that run beside them."
    found = set()
    for child in psutil.Process().children(recursive=True):
        try:
            if time.time() - child.create_time() < 1: time.sleep(0.2)      # between fork and exec a process has its parent's environment
            if BESIDE not in child.environ(): found.add(child.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess): continue      # it has ended
    return found

def wait_for(condition, what, seconds=30):
    "Look until it is so; an error with what it was when it takes too long."
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"{what} did not happen in {seconds} s"
        time.sleep(0.02)

class Solver:
    "One process that runs the solutions, each in a fork: what is slow to import is imported once."
    def __init__(self, variables): self.variables, self.process, self.lock = variables, None, threading.Lock()
    def __call__(self, path, log):
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = subprocess.Popen([sys.executable, str(ROOT/"tests"/"solve.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                                text=True, cwd=ROOT, env=environment(**self.variables))
            print(path, log, sep="\t", file=self.process.stdin, flush=True)
            code = self.process.stdout.readline()
        return subprocess.CompletedProcess([str(path)], int(code or 1), "", log.read_text(errors="replace") if log.exists() else "the process that runs solutions has ended")
    def close(self):
        if self.process:
            self.process.stdin.close()
            self.process.wait()

class WarmKernels:
    "A process that forks kernels which have imported already; started when the first one is needed."
    def __init__(self, folder, variables): self.folder, self.given, self.process, self.lock = folder, variables, None, threading.Lock()
    def variables(self):
        with self.lock:
            if self.process is None:
                spec = dict(argv=[sys.executable, str(ROOT/"tests"/"warm.py"), "kernel", "{connection_file}"], display_name="python3", language="python")
                (self.folder/"kernels"/"python3").mkdir(parents=True)
                (self.folder/"kernels"/"python3"/"kernel.json").write_text(json.dumps(spec))
                place = Path(tempfile.mkdtemp())/"kernels"          # a socket's path must be short
                self.process = subprocess.Popen([sys.executable, str(ROOT/"tests"/"warm.py"), "serve", str(place)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(**self.given))
                assert self.process.stdout.readline() == "ready\n", "the process that forks kernels has ended"
                self.given = {**self.given, "JUPYTER_PATH": str(self.folder), "DISTILLBOOK_WARM": str(place)}
            return self.given
    def close(self):
        if self.process:
            self.process.kill(); self.process.wait()

class SmokeRuns:
    "Every notebook at smoke, each once, one after the other beside the tests; a test that needs one which has not begun, or waits for one, runs notebooks itself."
    def __init__(self, folder, cache):
        self.folder, self.variables, self.pool, self.started = folder, {"DISTILLBOOK_CACHE": cache, BESIDE: 1}, ThreadPoolExecutor(1), {}
        self.solver, self.kernels = Solver(self.variables), WarmKernels(folder/"jupyter", self.variables)
    def _place(self, path): return self.folder/path.parent.name/path.stem
    def _one(self, path, out):
        start = time.time()
        if path in SOLUTIONS:
            out.mkdir(parents=True)
            done = self.solver(path, out/"log.txt")
        else: done = book("run", path, "--profile", "smoke", "--out", out, **self.kernels.variables())
        return dict(done=done, folder=out, seconds=time.time() - start, notebook=out/path.name)
    def start(self, paths):
        for path in paths:
            if path not in self.started: self.started[path] = self.pool.submit(self._one, path, self._place(path))
    def get(self, path):
        self.start([path])
        while not self.started[path].done():       # rather than wait for the other one, run what has not begun, the last first
            todo = next((p for p in (path, *reversed(list(self.started))) if self.started[p].cancel()), None)
            if todo is None: break
            self.started[todo] = Future()
            try: self.started[todo].set_result(self._one(todo, self._place(todo)))
            except Exception as error: self.started[todo].set_exception(error)
        return self.started[path].result()

@pytest.fixture(scope="session")
def smoke(tmp_path_factory, cache):
    runs = SmokeRuns(tmp_path_factory.mktemp("smoke"), cache)
    yield runs
    runs.pool.shutdown(cancel_futures=True)
    runs.solver.close(); runs.kernels.close()

@pytest.fixture(scope="session", autouse=True)
def notebooks_beside_the_tests(request):
    "The notebooks take a third of the suite's time and half of the machine: they start with the first test, where any test will ask for them."
    if any(item.path.name == "test_notebooks.py" for item in request.session.items): request.getfixturevalue("smoke").start(CHAPTERS + SOLUTIONS)


@pytest.fixture(scope="session")
def shipped_models():
    "The folder of the models that come with the book."
    folder = ROOT/"data"/"models"
    missing = [name for name in ("base", "teacher", "student") if not (folder/name/"model.safetensors").is_file()]
    if missing: pytest.fail(f"{folder} lacks {' and '.join(missing)}: the clone is not complete, or run `distillbook run make_tiny_models --profile full`")
    return folder

@pytest.fixture(scope="session")
def realdata():
    "The folder of larger real inputs."
    folder = os.environ.get("DISTILLBOOK_REALDATA")
    if not folder: pytest.skip("DISTILLBOOK_REALDATA is not set: no larger real inputs here")
    if not Path(folder).is_dir(): pytest.fail(f"DISTILLBOOK_REALDATA is {folder}, which is not a folder")
    return Path(folder)

def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked: return
    import torch
    if torch.cuda.is_available(): return
    for item in marked: item.add_marker(pytest.mark.skip(reason="no CUDA device here; these run on one GPU"))
