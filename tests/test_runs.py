"Intervals, verdicts, records that are whole, and a cache that knows what a result depends on."
import dataclasses, json, math, os, resource, shutil, signal, subprocess, sys, textwrap, time
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, strategies as st
from scipy import stats
from distillbook.lab import runs
from distillbook.lab.runs import (Measure, Run, RunRecord, atomic_write, bootstrap_interval, cached, cache_key, claims_ledger, code_hash, data_hash, figure,
                                  fingerprint, judge, mean_interval, over_calls, over_seeds, paired_interval, proportion_interval, start_run)

ROOT = Path(__file__).resolve().parent.parent
numbers = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20)

@pytest.fixture
def run(tmp_path): return Run(RunRecord("99_example", "laptop"), tmp_path/"run")

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBOOK_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"

def python(script, *arguments, **variables):
    "A child process with this checkout's package."
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in variables.items()}})


# -- intervals ---------------------------------------------------------------------------------------------------------
def test_mean_interval_by_hand():
    assert mean_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-4)
    mean, low, high = mean_interval([4.])
    assert mean == 4 and math.isnan(low) and math.isnan(high)

@given(numbers)
def test_mean_interval_is_scipys(values):
    if np.ptp(values) < 1e-9: return
    assert mean_interval(values)[1:] == pytest.approx(stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values)), rel=1e-6, abs=1e-6)

@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_proportion_interval_is_scipys(case):
    k, n = case
    theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
    p, low, high = proportion_interval(k, n)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9) and 0 <= low <= p <= high <= 1 and low < high

def test_paired_interval_is_scipys_and_narrower():
    a, b = [3.99, 4.03, 3.96], [3.87, 3.90, 3.85]
    assert paired_interval(a, b)[1:] == pytest.approx(tuple(stats.ttest_rel(a, b).confidence_interval()))
    apart = stats.ttest_ind(a, b).confidence_interval()
    assert paired_interval(a, b)[2] - paired_interval(a, b)[1] < apart.high - apart.low

def test_bootstrap_is_near_scipys_and_repeats():
    values = np.random.default_rng(0).exponential(size=60)
    theirs = stats.bootstrap((values,), np.median, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert bootstrap_interval(values, np.median, seed=1)[1:] == pytest.approx((theirs.low, theirs.high), abs=0.06)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    rows = np.stack([values, 2*values], 1)
    assert bootstrap_interval(rows, lambda x: x[:, 1].mean()/x[:, 0].mean()) == pytest.approx((2, 2, 2))

def test_intervals_cover_at_their_level():
    draw = np.random.default_rng(7)
    for n in (3, 5, 20):
        hits = sum(low <= 0 <= high for _, low, high in (mean_interval(draw.normal(size=n)) for _ in range(1500)))
        assert 0.93 < hits/1500 < 0.97, n
    hits = sum(low <= 0.9 <= high for _, low, high in (proportion_interval(int(k), 50) for k in draw.binomial(50, 0.9, 1500)))
    assert 0.92 < hits/1500 < 0.985

@pytest.mark.parametrize("call, message", [(lambda: mean_interval([]), "no values"), (lambda: mean_interval([1, math.nan]), "value 1 is not a finite"), (lambda: proportion_interval(3, 2), "3 successes in 2"),
                                           (lambda: proportion_interval(0, 0), "0 trials"), (lambda: paired_interval([1, 2], [1]), "2 and 1"), (lambda: bootstrap_interval([]), "no values"),
                                           (lambda: bootstrap_interval([1, math.nan, 2]), "not a finite")])
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message): call()


# -- verdicts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("low, high, limits, verdict", [(.1, .3, dict(at_least=0), "holds"), (-.1, .3, dict(at_least=0), "mixed"), (-.3, -.1, dict(at_least=0), "fails"),
                                                       (.1, .3, dict(at_most=.4), "holds"), (.1, .3, dict(at_most=.2), "mixed"), (.1, .3, dict(at_most=0), "fails"),
                                                       (.1, .3, dict(at_least=0, at_most=.5), "holds"), (.1, .3, dict(at_least=.2, at_most=.5), "mixed"),
                                                       (.6, .7, dict(at_least=0, at_most=.5), "fails"), (0, 0, dict(at_least=0), "mixed"), (math.nan, math.nan, dict(at_least=0), "not testable here")])
def test_verdicts(low, high, limits, verdict): assert judge(Measure("m", (low + high)/2, n=5, low=low, high=high), **limits)[0] == verdict

def test_two_runs_give_no_verdict(run):
    assert run.claim("D3", run.measure("gain", [.5, .6]), at_least=0).verdict == "not testable here"
    with pytest.raises(ValueError, match="needs a threshold"): judge(Measure("m", 1.))

def test_a_lucky_difference_rarely_holds():
    draw = np.random.default_rng(3)
    held = sum(judge(Measure("m", *(v := mean_interval(draw.normal(size=5)))[:1], "", 5, *v[1:]), at_least=0)[0] == "holds" for _ in range(1500))
    assert held/1500 < 0.045       # 2.5% are expected of a claim with nothing behind it


# -- measures ----------------------------------------------------------------------------------------------------------
def test_measures_of_lists_and_numbers(run):
    made = run.measure("loss", np.array([1., 2., 3.]), "nats a token")
    assert (made.value, made.n, made.low) == (2, 3, pytest.approx(-0.4841, abs=1e-4))
    assert math.isnan(run.measure("size", 7, "MB").low) and run.measure("one", [4.]).n == 1
    share = run.measure("accuracy", .9, "share", 10, *proportion_interval(9, 10)[1:])
    assert f"{share:.2f} {share.low:.3f}" == "0.90 0.596" and str(share) == "0.9 share (0.5958 to 0.9821, n = 10)"
    run.measure("loss", 5.)
    assert [m.value for m in run.record.measures if m.name == "loss"] == [5.]

@pytest.mark.parametrize("value, more, message", [(math.nan, {}, "loss is nan"), ([1, math.inf], {}, "not a finite"), ([], {}, "no values"), ([1, 2], dict(n=2), "brings its own"), (1., dict(low=2, high=3), "outside its interval")])
def test_bad_measures_are_refused(run, value, more, message):
    with pytest.raises(ValueError, match=message): run.measure("loss", value, **more)


# -- records -----------------------------------------------------------------------------------------------------------
def test_a_record_comes_back_equal(run, tmp_path):
    run.claim("D3", run.measure("gain", [.1, .2, .3], "nats"), at_least=0, at_most=1); run.not_testable("D4", "no GPU."); run.measure("size", 7)
    (tmp_path/"corpus.txt").write_text("text"); run.input(tmp_path/"corpus.txt")
    made = run.finish()
    back = RunRecord.load(run.folder)
    assert str(back) == str(made) and list(back.data_hashes.values()) == [data_hash(tmp_path/"corpus.txt")]
    text = (run.folder/"record.json").read_text()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["measures"][1]["low"] is None and data["claims"][0]["threshold"] == [0, 1] and data["claims"][1]["effect"] is None
    assert list(data) == "chapter profile parameters seeds measures claims versions code_hash data_hashes device seconds peak_memory_mb".split()

def test_a_run_of_ones_own_keeps_plain_values_and_refuses_others_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBOOK_RUN", str(tmp_path))
    run = start_run("my_own_experiment", dict(rate=.1, words="a", module=np, path=Path("x"), _hidden=1))
    assert run.record.parameters == dict(rate=.1, words="a") and run.finish().seconds >= 0
    values = runs.notebook_parameters(runs.notebook_path("00_settings"))
    with pytest.raises(TypeError, match="these are not: draws"): start_run("00_settings", {**values, "draws": Path("x")})

def test_the_memory_of_children_counts():
    before = runs.peak_memory_mb()
    child = subprocess.Popen([sys.executable, "-c", "held = b'x' * 200_000_000; print('ready', flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n" and runs.peak_memory_mb() > before + 190
    child.communicate("\n")
    assert runs.peak_memory_mb() < before + 150

def test_start_run_takes_the_notebooks_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBOOK_HOME", str(ROOT)); monkeypatch.setenv("DISTILLBOOK_RUN", str(tmp_path/"here")); monkeypatch.delenv("DISTILLBOOK_PROFILE", raising=False)
    values = runs.notebook_parameters(runs.notebook_path("00_settings"))
    run = start_run("00_settings", {**values, "other": object()})
    assert run.record.parameters == values and run.seeds == list(range(values["seed"], values["seed"] + values["seeds"])) and run.record.profile == "laptop"
    assert start_run("00_settings", {**values, "seeds": 1}).record.profile == "interactive"
    monkeypatch.setenv("DISTILLBOOK_PROFILE", "smoke")
    record = run.finish()
    assert (tmp_path/"here/record.json").is_file() and record.code_hash == code_hash("00_settings") and record.seconds > 0 and record.peak_memory_mb > 20
    with pytest.raises(ValueError, match="missing: seeds"): start_run("00_settings", {k: v for k, v in values.items() if k != "seeds"})

def test_numbers_of_numpy_that_json_does_not_know_are_null(tmp_path):
    RunRecord("a", "laptop", dict(rate=np.float32("nan"), steps=np.int64(3), limit=np.float64("inf"))).save(tmp_path)
    assert RunRecord.load(tmp_path).parameters == dict(rate=None, steps=3, limit=None)

def test_damaged_records_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run record .*record.json"): RunRecord.load(tmp_path)
    for text in ("{", "[]", "{}", '{"measures": [{"nome": 1}], "claims": []}'):
        (tmp_path/"record.json").write_text(text)
        with pytest.raises(ValueError, match="record.json is not a run record"): RunRecord.load(tmp_path)

def test_figures_tables_and_sentences(run, capsys):
    import ipykernel, IPython      # imported, but no kernel runs: this is a terminal
    fig, axes = figure(columns=2); axes[0].plot([1, 2])
    run.figure(fig, "two"); gain = run.measure("gain", [.1, .2, .3], "nats")
    run.table([dict(student="a", gain=gain), dict(student="b", gain=1.)], "gains"); run.say("{gain:.1f} {gain.unit}", gain=gain)
    assert sorted(p.name for p in run.folder.iterdir()) == ["gains.csv", "two.png", "two.svg"]
    assert (run.folder/"gains.csv").read_text().splitlines()[0] == "student,gain,gain_low,gain_high" and "0.2 nats\n" in capsys.readouterr().out
    assert (run.folder/"two.svg").read_text().startswith("<?xml")

def test_a_running_kernel_is_asked_for_and_not_an_import(tmp_path):
    script = """
    import sys
    from distillbook.lab.runs import _in_notebook, _show
    print([_in_notebook(), "IPython" in sys.modules])
    import ipykernel.kernelapp, IPython
    from IPython.core.interactiveshell import InteractiveShell
    print(_in_notebook())
    InteractiveShell.instance()
    print(_in_notebook()); _show("plain", text_markdown="**rich**")
    """
    assert python(script, IPYTHONDIR=tmp_path).communicate()[0].splitlines() == ["[False, False]", "False", "False", "plain"]

def test_a_kernel_gets_the_rich_forms(tmp_path, monkeypatch):
    import nbclient, nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    code = f"""from distillbook.lab.runs import Run, RunRecord, figure
run = Run(RunRecord("99_example", "laptop"), {str(tmp_path)!r})
run.say("a sentence"); run.table([dict(student="a", gain=1.)], "gains"); run.figure(figure()[0], "empty", alt="nothing")"""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = nbclient.NotebookClient(new_notebook(cells=[new_code_cell(code)]), kernel_name="python3", timeout=120).execute()
    forms = [set(output["data"]) for output in done.cells[0].outputs if output["output_type"] == "display_data"]
    assert [{"text/markdown", "text/html", "image/png"} & form for form in forms] == [{"text/markdown"}, {"text/html"}, {"image/png"}]

def test_code_hash_follows_code_and_nothing_else(tmp_path):
    def code(source, **more): return dict(cell_type="code", source=source, outputs=[], metadata={}) | more
    def hashed(*cells):
        (tmp_path/"n.ipynb").write_text(json.dumps(dict(cells=cells)))
        return code_hash(tmp_path/"n.ipynb")
    first = hashed(code("a = 1"), code("b = 2"))
    assert hashed(code("a = 1", outputs=[{"text": "1"}]), dict(cell_type="markdown", source="words", metadata={}), code(["b ", "= 2"])) == first
    assert hashed(code("a = 1"), code("a = 9", metadata={"tags": ["injected-parameters"]}), code("b = 2")) == first
    assert first not in (hashed(code("b = 2"), code("a = 1")), hashed(code("a = 1b = 2")), hashed(code("a = 1"), code("b = 3")))


# -- files that are whole ----------------------------------------------------------------------------------------------
def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    atomic_write(tmp_path/"a/b.txt", "one"); atomic_write(tmp_path/"a/b.txt", b"two")
    assert (tmp_path/"a/b.txt").read_text() == "two" and [p.name for p in (tmp_path/"a").iterdir()] == ["b.txt"]

def test_a_write_that_does_not_fit_keeps_the_old_record(tmp_path):
    RunRecord("old", "laptop").save(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write .*record.json: File too large; the previous file is untouched"):
            RunRecord("new", "laptop", dict(text="x"*5000)).save(tmp_path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits); signal.signal(signal.SIGXFSZ, before)
    assert RunRecord.load(tmp_path).chapter == "old" and [p.name for p in tmp_path.iterdir()] == ["record.json"]

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 256 kB, where the system lets us mount one."
    place = tmp_path/"disk"
    place.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True).returncode: pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)

def test_a_full_disk_keeps_the_old_record_and_finished_results(small_disk, monkeypatch):
    RunRecord("old", "laptop").save(small_disk)
    monkeypatch.setenv("DISTILLBOOK_CACHE", str(small_disk/"cache"))
    def small(folder): (folder/"a").write_bytes(b"1"*1000); return {"done": True}
    def large(folder): (folder/"a").write_bytes(b"1"*500_000); return {"done": True}
    kept = cached(small)
    with pytest.raises(OSError, match="No space left") as caught: cached(large)
    assert str(small_disk/"cache") in caught.value.__notes__[0] and "large" in caught.value.__notes__[0]
    with pytest.raises(OSError, match="could not write .*record.json: No space left"): RunRecord("new", "laptop", dict(text="x"*500_000)).save(small_disk)
    assert RunRecord.load(small_disk).chapter == "old" and cached(small) == kept and (kept["folder"]/"a").stat().st_size == 1000

def test_a_killed_writer_leaves_a_whole_record(tmp_path):
    script = """
    import sys
    from distillbook.lab.runs import RunRecord
    i = 0
    while True:
        i += 1
        RunRecord("writer", "laptop", dict(i=i, text="x"*200_000)).save(sys.argv[1])
        if i == 1: print("ready", flush=True)
    """
    for wait in (0.0, 0.013, 0.05):
        child = python(script, tmp_path)
        assert child.stdout.readline() == "ready\n"
        time.sleep(wait); child.kill(); child.communicate()
        assert len(RunRecord.load(tmp_path).parameters["text"]) == 200_000


# -- what a result depends on ------------------------------------------------------------------------------------------
FACTOR = 2
def helper(x): return FACTOR*x
class Scaler:
    def __init__(self, by): self.by = by
    def scale(self, x): return helper(x)*self.by
def step(seed, n=1): return {"value": Scaler(n).scale(seed)}

def test_a_result_is_kept_and_survives_as_json(cache):
    calls = []
    Path(cache).mkdir()
    log = cache/"log"
    def count(seed, log): 
        with open(os.fspath(log) + ".txt", "a") as file: file.write("x")
        return {"mean": np.float32(0.5), "array": np.arange(2), "pair": (1, 2)}
    first = cached(count, seed=0, log=str(log))
    assert first == cached(count, seed=0, log=str(log)) == {"mean": 0.5, "array": [0, 1], "pair": [1, 2]}
    cached(count, seed=1, log=str(log))
    assert Path(f"{log}.txt").read_text() == "xx"

def test_the_key_follows_helpers_globals_and_classes(monkeypatch):
    key = cache_key(step, {"seed": 1})
    assert key == cache_key(step, {"seed": 1}) != cache_key(step, {"seed": 2})
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert cache_key(step, {"seed": 1}) != key
    monkeypatch.undo()
    monkeypatch.setitem(globals(), "helper", lambda x: x)
    assert cache_key(step, {"seed": 1}) != key

def test_the_key_ignores_comments_and_layout(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    def key(text):
        (tmp_path/"made.py").write_text(text)
        import importlib, linecache
        sys.modules.pop("made", None); importlib.invalidate_caches(); linecache.clearcache()
        shutil.rmtree(tmp_path/"__pycache__", ignore_errors=True)
        return cache_key(importlib.import_module("made").work, {})
    plain = key("def half(x): return x/2\ndef work(): return half(1)\n")
    assert key("# a note\ndef half(x):\n    return x / 2   # why\n\ndef work(): return half(1)\n") == plain
    assert key("def half(x): return x/3\ndef work(): return half(1)\n") != plain

def test_the_key_follows_the_book_but_not_other_libraries():
    def uses(x): return mean_interval(x)
    def imports_inside(x):
        from distillbook.lab.runs import mean_interval as interval
        return interval(x)
    parts = json.dumps([fingerprint(uses), fingerprint(imports_inside)])
    assert parts.count("distillbook.lab.runs._numbers") == 2 and "scipy.stats" not in json.dumps(fingerprint(uses)[0])

def test_every_lambda_closure_default_and_class_attribute_counts():
    def make(n):
        add, times = (lambda x: x + 1), eval(f"lambda x: x * {n}")
        def step(x): return add(times(x))
        return step
    assert cache_key(make(2), {}) != cache_key(make(3), {})
    def adder(n):
        def add(x): return x + n
        return add
    def two(n):
        first, second = adder(1), adder(n)
        def step(x): return first(second(x))
        return step
    assert cache_key(two(2), {}) != cache_key(two(3), {})
    def default(rate):
        def step(x, lr=rate): return x * lr
        return step
    assert cache_key(default(1), {}) != cache_key(default(2), {}) and cache_key(default(1), {}) == cache_key(default(1), {})
    def kept(rate):
        class Settings: lr = rate
        def step(x): return x * Settings.lr
        return step
    assert cache_key(kept(1), {}) != cache_key(kept(2), {})

def test_a_number_is_not_its_text_and_order_in_a_dict_is_nothing():
    assert fingerprint(1.5) != fingerprint("1.5") and fingerprint(dict(a=1, b=2)) == fingerprint(dict(b=2, a=1)) != fingerprint(dict(a=2, b=1))

def test_closures_and_partials_count():
    import functools
    def make(rate):
        def train(seed): return rate*seed
        return train
    assert cache_key(make(1), {}) != cache_key(make(2), {}) and cache_key(make(1), {}) == cache_key(make(1), {})
    assert cache_key(functools.partial(step, n=1), {}) != cache_key(functools.partial(step, n=2), {})

def test_a_global_tokenizer_or_model_counts_and_library_functions_do_not(monkeypatch):
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    def made(word): return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({word: 0, "?": 1}, unk_token="?")), unk_token="?")
    def uses(): return thing("a"), np.exp(1), torch.relu(torch.ones(1))
    def key(value):
        monkeypatch.setitem(globals(), "thing", value)
        return cache_key(uses, {})
    assert key(made("a")) == key(made("a")) != key(made("b"))
    torch.manual_seed(0); one = torch.nn.Linear(1, 1); two = torch.nn.Linear(1, 1)
    assert key(one) == key(one) != key(two)
    assert key(np.exp) == key(np.log) == key(torch.relu)      # named in the source already

@dataclasses.dataclass
class Rater:
    by: int
    def rate(self, x): return x*self.by
class Closed:
    def rate(self, x): return next(HIDDEN)

def test_a_global_method_counts_with_the_object_that_it_is_bound_to(monkeypatch):
    def uses(): return rate(1)
    def key(method):
        monkeypatch.setitem(globals(), "rate", method)
        return cache_key(uses, {})
    assert key(Rater(1).rate) == key(Rater(1).rate) != key(Rater(2).rate)
    with pytest.raises(TypeError, match="uses the global `rate` .Closed."): key(Closed().rate)
    key(np.random.default_rng(0).normal)      # of another library: named in the source already

def test_text_of_dots_is_text(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert [fingerprint(text) for text in (".", "..", "/", "", "./")] == [".", "..", "/", "", "./"]

HIDDEN = iter([])
def test_a_global_that_cannot_be_compared_is_refused():
    def careless(): return next(HIDDEN)
    with pytest.raises(TypeError, match="uses the global `HIDDEN` .list_iterator."): cache_key(careless, {})
    with pytest.raises(TypeError, match="cannot compare a builtins.list_iterator"): fingerprint(iter([]))

def test_a_path_stands_for_its_contents(tmp_path):
    file = tmp_path/"corpus.txt"
    file.write_text("one"); one = fingerprint(str(file)), fingerprint(tmp_path)
    file.write_text("two"); two = fingerprint(file), fingerprint(tmp_path)
    assert one[0] != two[0] and one[1] != two[1] and fingerprint("corpus.nowhere") == "corpus.nowhere"
    file.rename(tmp_path/"other.txt")
    assert fingerprint(tmp_path) != two[1] and fingerprint(tmp_path/"other.txt") == two[0]

def test_tensors_models_and_datasets_are_compared_by_contents():
    import torch
    from datasets import Dataset
    make = lambda: torch.nn.Linear(2, 2)
    torch.manual_seed(0); a = make(); torch.manual_seed(0); b = make(); c = make()
    assert fingerprint(a) == fingerprint(b) != fingerprint(c)
    assert fingerprint(torch.ones(2, dtype=torch.bfloat16)) != fingerprint(torch.ones(2)) and fingerprint(torch.tensor(1.)) == fingerprint(torch.tensor(1.))
    assert fingerprint(Dataset.from_dict({"text": ["a"]})) == fingerprint(Dataset.from_dict({"text": ["a"]})) != fingerprint(Dataset.from_dict({"text": ["b"]}))


# -- the cache under fire ----------------------------------------------------------------------------------------------
def test_folders_move_with_the_result(cache):
    def writes(folder): assert not list(folder.iterdir()); (folder/"model.txt").write_text("weights")
    result = cached(writes)
    assert (result["folder"]/"model.txt").read_text() == "weights" and cached(writes) == result
    def leaks(folder): return {"path": str(folder/"model")}
    with pytest.raises(ValueError, match="leaks returned a path inside its folder"): cached(leaks)
    def returns_object(): return {"model": object()}
    with pytest.raises(TypeError, match="returns_object returned a object"): cached(returns_object)

def test_a_failed_step_leaves_nothing_and_falsy_results_are_results(cache):
    def fails(folder): (folder/"half").write_text("x"); raise RuntimeError("no")
    with pytest.raises(RuntimeError): cached(fails)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]
    def empty(log=str(cache/"n")):
        with open(log + ".txt", "a") as file: file.write("x")
        return {}
    assert cached(empty) == cached(empty) == {} and (cache/"n.txt").read_text() == "x"

def test_a_damaged_result_is_made_again(cache):
    def one(): return {"value": 1}
    cached(one)
    file = next(cache.glob("one-*/result.json"))
    file.write_text('{"seconds": 1, "resu')
    assert cached(one) == {"value": 1} and json.loads(file.read_text())["result"] == {"value": 1}

KILLED = """
import os, sys, time
from pathlib import Path
from distillbook.lab.runs import over_seeds
def slow(seed, log, folder, checkpoints):
    with open(os.environ["LOG"], "a") as file: file.write(f"{seed} ")
    done = len(list(checkpoints.iterdir()))
    for i in range(done, 4):
        time.sleep(float(os.environ.get("PAUSE", "0.02")))
        (folder/f"part{i}").write_text("x"*50_000); (checkpoints/f"{i}").write_text("")
    return {"seed": seed, "from": done}
print("ready", flush=True)
print([r["seed"] for r in over_seeds(slow, 4, log="a")])
"""

@pytest.mark.parametrize("wait", [0.01, 0.05, 0.11, 0.19, 0.3])
def test_kill_at_any_moment_and_go_on(cache, tmp_path, wait):
    settings_ = dict(LOG=tmp_path/"log", PAUSE=0.02)
    (tmp_path/"slow.py").write_text(KILLED)
    def start(): return subprocess.Popen([sys.executable, tmp_path/"slow.py"], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in settings_.items()}})
    child = start()
    assert child.stdout.readline() == "ready\n"
    time.sleep(wait); child.kill(); child.communicate()
    finished = len(list(cache.glob("slow-*/result.json")))
    begun = (tmp_path/"log").read_text().split() if (tmp_path/"log").exists() else []
    again = start(); out, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "[0, 1, 2, 3]" in out
    assert (tmp_path/"log").read_text().split()[len(begun):] == [str(s) for s in range(finished, 4)]
    assert len(list(cache.glob("slow-*/result.json"))) == 4 and not list(cache.glob("*.making")) and not list(cache.glob("*.checkpoints"))

def test_two_processes_do_the_work_once(cache, tmp_path):
    (tmp_path/"slow.py").write_text(KILLED)
    start = lambda: subprocess.Popen([sys.executable, tmp_path/"slow.py"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), "LOG": str(tmp_path/"log")})
    for child in [start() for _ in range(3)]:
        out, errors = child.communicate(timeout=120)
        assert child.returncode == 0 and "[0, 1, 2, 3]" in out, errors
    assert sorted((tmp_path/"log").read_text().split()) == list("0123")

def test_checkpoints_outlive_a_failure_and_go_when_done(cache):
    def train(checkpoints):
        steps = len(list(checkpoints.iterdir()))
        (checkpoints/str(steps)).write_text("")
        if steps < 2: raise RuntimeError("stopped")
        return {"steps": steps}
    for _ in range(2):
        with pytest.raises(RuntimeError): cached(train)
    assert cached(train) == {"steps": 2} and not list(cache.glob("*.checkpoints"))

def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("DISTILLBOOK_CACHE", str(tmp_path/"file"/"cache"))
    with pytest.raises(OSError, match="could not make the cache folder .*file.cache"): cached(step, seed=1)


# -- the ledger --------------------------------------------------------------------------------------------------------
def test_the_ledger_is_whole():
    ledger = claims_ledger(ROOT/"data/claims.yaml")
    ids = [row["id"] for row in ledger]
    groups = dict(D=20, S=8, C=4, M=8, F=8, L=3, Q=8, I=4, E=3, X=5)
    assert [i for row in ledger if row["document"] for i in [row["id"]] if i != "D21"] == [f"{letter}{i}" for letter, n in groups.items() for i in range(1, n + 1)]
    assert len(set(ids)) == len(ids)
    for row in ledger:      # a chapter's own claims come from no document; they begin with its number, or are the laboratory's
        assert set(row["document"]) <= {1, 2, 3, 4} and len(row["claim"]) > 20 and len(row["test"]) > 20, row["id"]
        assert row["document"] or row["id"].split("-")[0] == row["chapter"].split("_")[0] or row["chapter"] in ("04_models", "05_evaluate", "09_training"), row["id"]

def test_a_ledger_entry_that_lacks_something_is_named(tmp_path):
    (tmp_path/"claims.yaml").write_text("- {id: D1, claim: x, document: [1], chapter: y}\n")
    with pytest.raises(ValueError, match="entry 0 .D1. lacks test"): claims_ledger(tmp_path/"claims.yaml")

def test_verdicts_of_the_records_are_in_the_ledger():
    known = {row["id"] for row in claims_ledger(ROOT/"data/claims.yaml")}
    for file in (ROOT/"data/records").rglob("*.json"):
        assert {c.id for c in RunRecord.load(file).claims} <= known, file

def test_imports_stay_light():
    script = "import sys, distillbook.lab.runs; print([m for m in ('torch', 'numpy', 'scipy', 'pandas', 'matplotlib', 'transformers', 'IPython', 'ipykernel') if m in sys.modules])"
    assert python(script).communicate()[0].strip() == "[]"

def meet(seed, folder, place=None, unseen=None):
    "Ends when two calls are under way at once, each with one thread; keeps a file."
    import torch
    (Path(place)/f"{seed}-{os.getpid()}").touch()
    ends = time.monotonic() + 120
    while len({p.name.split("-")[1] for p in Path(place).iterdir()}) < 2 and time.monotonic() < ends: time.sleep(.05)
    (folder/"note").write_text(str(seed))
    return dict(seed=seed, threads=torch.get_num_threads(), met=time.monotonic() < ends, unseen=unseen)

def test_calls_go_to_two_processes_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBOOK_CACHE", str(tmp_path/"cache"))
    place = tmp_path/"meeting"; place.mkdir()
    calls = [dict(seed=i) for i in range(4)]
    first = over_calls(meet, calls, jobs=2, place=str(place), unseen=1)
    assert [r["seed"] for r in first] == [0, 1, 2, 3] and all(r["met"] and r["threads"] == 1 for r in first)
    assert [(r["folder"]/"note").read_text() for r in first] == list("0123")
    assert over_calls(meet, calls, jobs=2, unseen=2) == over_seeds(meet, 4) == first, "what is outside the key changed the result"
    assert len(list(place.iterdir())) == 4, "a kept call was made again"

def square(number, fail=False):
    if fail: raise RuntimeError(f"no square of {number}")
    return dict(square=number**2, process=os.getpid())

def test_a_notebooks_own_function_goes_to_a_process_and_an_error_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBOOK_CACHE", str(tmp_path))
    notebooks_own = dict(globals() | {"__name__": "__main__"})      # as a function of a notebook has it: by value, with no module to import
    exec("def cube(number):\n    return dict(cube=number**OFFSET)\nOFFSET = 3", notebooks_own)
    assert [r["cube"] for r in over_calls(notebooks_own["cube"], [dict(number=n) for n in (1, 2, 3)], jobs=2)] == [1, 8, 27]
    assert over_calls(square, [dict(number=9)])[0]["process"] == os.getpid()
    with pytest.raises(RuntimeError, match="no square of 7"): over_calls(square, [dict(number=7, fail=True), dict(number=8)], jobs=2)
