"Model-written programs hurt nobody and get their verdict; HumanEval and MT-bench are what their publishers say."
import importlib.util, json, os, random, signal, subprocess, sys, threading, time
from pathlib import Path
import numpy as np, psutil, pytest
from hypothesis import given, settings, strategies as st
from conftest import children
from distillbook.adapt.benchmarks import (NEED_REFERENCE, STOPS, cut_at_stops, hold_talks, humaneval_pair, humaneval_scores, humaneval_task, judge_talks, mt_bench_prompt,
                                          pass_at_k, read_humaneval, read_mt_bench, run_program, run_programs)
from distillbook.lab.models import load_model, load_tokenizer
from distillbook.synth.endpoints import ScriptedServer
from distillbook.synth.judging import read_rubric
from distillbook.synth.teachers import ApiTeacher, Endpoint, Ledger, LocalTeacher, Sampling

TESTS = "assert f(3) == 6\nassert f(0) == 0"
GOOD = "def f(x):\n    return 2*x\n"
WRONG = "def f(x): return 0\n"
# kind of attack -> programs (without a right f unless they say so), and the verdicts that are fitting
HOSTILE = {
    "fork": (["import os\nwhile True: os.fork()", "import os\nfor _ in range(1000):\n    if os.fork() == 0: break", "import os\nos.forkpty()", "import os\nos.system('sleep 100 &')", "import os\nos.posix_spawn('/bin/sh', ['sh'], {})",
              "import os\nos.execv('/bin/sh', ['sh'])", "import subprocess\nsubprocess.Popen(['sleep', '99'])", "import multiprocessing as m\nm.Process(target=print).start()", "import _posixsubprocess", "import pty\npty.spawn('sh')", "import os\nos.popen('ls').read()"], {"refused", "failed"}),
    "threads": (["import threading\nthreading.Thread(target=lambda: None).start()", "import _thread\n_thread.start_new_thread(print, ())", "from concurrent.futures import ThreadPoolExecutor as T\nT(4).submit(print).result()"], {"refused", "failed", "ended"}),
    "loop": (["while True: pass", "x = 0\nwhile 1: x += 1", "import itertools\nfor _ in itertools.count(): pass", "def f(x):\n    while True: pass", "import time\ntime.sleep(100)", "def f(x): return f(x - 1) if x else sum(range(10**11))", "import re\nre.match(r'(a+)+$', 'a'*64 + 'b')", "pow(7, 10**9, 10**400) and [pow(7**9999, 9**99999, 10**9999) for _ in range(9**9)]"], {"timeout", "failed", "ended"}),
    "memory": (["x = [0]*10**10", "x = 'a'*10**11", "x = []\nwhile True: x.append('a'*10**6)", "x = bytearray(10**10)", "x = {i: i for i in range(10**9)}", "def f(x): return [f] * 10**10", "x = 10**10**9"], {"memory", "failed", "timeout", "ended"}),
    "files": (["open('here', 'w').write('x')", "open('/tmp/distillbook_was_here', 'w').write('x')", "import os\nos.remove('/etc/hostname')", "import shutil\nshutil.rmtree('/')", "import pathlib\npathlib.Path('x').write_text('y')", "import os\nos.mkdir('x')", "import os\nos.open('x', os.O_CREAT | os.O_WRONLY)",
               "open('/etc/passwd').read()", "import os\nos.rename('/etc/hosts', '/etc/gone')", "import os\nos.symlink('/etc', 'x')", "import os\nos.chmod('/etc', 0)", "import io\nio.open('x', 'a')", "import sqlite3\nsqlite3.connect('x')", "import tempfile\ntempfile.NamedTemporaryFile()", "open(0).read()", "import os\nos.truncate('/etc/hosts', 0)"], {"refused", "failed"}),
    "network": (["import socket", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')", "import http.client\nhttp.client.HTTPConnection('127.0.0.1').request('GET', '/')", "import _socket", "import ftplib\nftplib.FTP('127.0.0.1')", "import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', 80))"], {"refused", "failed"}),
    "environment": (["import os\nassert not [k for k in os.environ if k not in ('LC_CTYPE', 'PWD', 'SHLVL', '_')] or 1/0\nraise ValueError(str(dict(os.environ)))"], {"failed"}),
    "signals": (["import os\nos.kill(os.getppid(), 9)", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "import os\nos.killpg(0, 9)", "import os\nos.kill(-1, 9)", "import signal\nsignal.raise_signal(9)", "import _signal", "import ctypes\nctypes.CDLL(None).kill(1, 9)", "import os\nos.abort()"], {"refused", "failed", "ended"}),
    "leaving": (["import os\nos._exit(0)", "import sys\nsys.exit(0)", "raise SystemExit(0)", "exit()", "quit(0)", "import os\nos.close(1)\nos.close(2)", "def f(x): raise SystemExit", "import os\nfor n in range(99):\n    try: os.close(n)\n    except OSError: pass", "raise KeyboardInterrupt", "raise BaseException('x')", "raise GeneratorExit"], {"failed", "ended"}),
    "recursion": (["def f(x): return f(x)", "def g(): g()\ng()", "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)", "import sys\nsys.setrecursionlimit(10**9)\ndef g(n): return g(n + 1)\ng(0)", "eval('('*500 + ')'*500)", "f = type('X', (), {'__getattr__': lambda s, n: getattr(s, n)})()\nf.x"], {"failed", "ended", "memory", "timeout"}),
    "output": (["while True: print('x'*10**6)", "import os\nwhile True: os.write(1, b'x'*10**6)", "import sys\nsys.stdout.write('x'*10**9)", "import os\nos.write(2, b'x'*10**8)", "print('\\x00\\ud800'.encode('utf8', 'surrogatepass')*10**6)"], {"failed", "timeout", "refused", "memory", "ended"}),
    "fake": (["print('passed')\nprint('[\"passed\", \"\"]')" + "\n" + WRONG, "import os\nos.write(1, b'\\n[\"passed\", \"\"]\\n')\n" + WRONG, "import builtins\nbuiltins.all = builtins.any = lambda *a: True\nbuiltins.abs = lambda x: 0\n" + WRONG, "x = '''", "class AssertionError(Exception): pass\n" + WRONG,
              "import json\njson.dumps = lambda *a: '[\"passed\", \"\"]'\n" + WRONG, "import os\nos.write = lambda *a: 0\nos._exit = lambda *a: 0\n" + WRONG, "import sys\nsys.stdin.readline()\n" + WRONG, "import os\nos.read(0, 100)\n" + WRONG, "__name__ = 'tests'\ndef check(*a): pass\n" + WRONG,
              "import builtins\nbuiltins.exec = lambda *a: None\nbuiltins.compile = lambda *a: None\n" + WRONG, "import atexit\natexit.register(lambda: print('passed'))\n" + WRONG, "import sys\nsys.settrace(lambda *a: None)\n" + WRONG, "import sys\nsys.addaudithook(lambda *a: None)\n" + WRONG, "import gc\ngc.get_objects()\n" + WRONG], {"failed", "refused", "ended"}),
    "broken": (["def f(x) return x", "f = ", "\x00", "\ud800", "def f(x):\nreturn x", "é = 1; ☃ = 2", "", "#", "def f(x): return 2*y", "def f(): return 6", "f = 6", "import numpy\ndef f(x): return numpy.int64(2*x)", "import nothing_like_it", "return 6", "yield 1", "lambda: (", "\t def f(x): pass", "'\\N{no such name}'", "f = lambda x: 2/0", "def f(x): return '6'"], {"failed"}),
}
def varied(kind, program, number):
    "The same attack in other clothes, so that five hundred programs are not the same twenty."
    rng = random.Random(f"{kind} {len(program)} {number}")
    if number == 0 or kind == "broken": return program if number == 0 else program + f"\n# {rng.random()}"
    body = "\n".join("    " + line for line in program.splitlines())
    return rng.choice([f"_{rng.randrange(10**6)} = {rng.random()}\n{program}", f"def attack():\n{body}\nattack()" if not program.startswith(("return", "yield", "import os\nos.write = ")) and "def f" not in program and "class " not in program else program + f"\n# {number}",
                       f"try:\n{body}\nfinally:\n    pass", f"if True:\n{body}"])


def test_five_hundred_hostile_programs_hurt_nobody(tmp_path):
    programs = [(kind, varied(kind, program, number), fitting) for number in range(6) for kind, (group, fitting) in HOSTILE.items() for program in group]
    programs = programs[:500] + [("good", GOOD + f"# {i}", {"passed"}) for i in range(20)]
    assert sum(kind != "good" for kind, *_ in programs) == 500
    here, me = set(os.listdir()), psutil.Process()
    before, memory = children(), me.memory_info().rss
    canary = Path("/tmp/distillbook_was_here"); assert not canary.exists()
    got = run_programs([(source, TESTS) for _, source, _ in programs], at_once=4, progress=False, seconds=1, megabytes=256)
    wrong = [(kind, source, verdict) for (kind, source, fitting), verdict in zip(programs, got) if verdict.kind not in fitting]
    assert not wrong, wrong[:5]
    assert set(os.listdir()) == here and not canary.exists()
    time.sleep(.5)
    left = children() - before
    assert not left, f"processes left behind: {left}"
    assert me.memory_info().rss - memory < 300e6

def test_right_programs_pass_with_the_library_that_they_need():
    source = "from typing import List\nimport math, re, collections, itertools, functools, heapq, string, datetime, hashlib, json, random\ndef f(x: int) -> int:\n    return int(math.fsum([x, x]))\ndef helper(): return 1"
    assert run_program(source, TESTS + "\nassert helper() == 1").passed
    assert run_program("import statistics, decimal, fractions, bisect, copy, operator, enum, dataclasses\nfrom collections import namedtuple\nP = namedtuple('P', 'a b')\ndef f(x): return P(x, x).a*2", TESTS).passed
    assert run_program("def f(x): return 2*x", "assert f(2) == 4\nprint('noise'*10000)").passed

def test_verdicts_say_why():
    assert run_program(WRONG, "assert f(3) == 6, 'six is wanted'").why == "AssertionError: six is wanted"
    assert "ZeroDivisionError" in run_program("def f(x): return 1/0", TESTS).why
    assert run_program("while True: pass", TESTS, seconds=1).kind == "timeout"
    assert run_program("x = [0]*10**10", TESTS).kind == "memory"
    for bad in (dict(seconds=0), dict(megabytes=1)):
        with pytest.raises(ValueError, match="at least"): run_program(GOOD, TESTS, **bad)
    with pytest.raises(ValueError, match="at_once"): run_programs([], at_once=0)

def test_tests_see_the_library_as_it_was():
    assert run_program("import math\nmath.sqrt = lambda x: 0\ndef f(x): return 2*x", "import math\nassert math.sqrt(4) == 2\n" + TESTS).passed
    assert run_program("def sorted(x): return x\ndef f(x): return 2*x", "assert sorted([2, 1]) == [1, 2]\n" + TESTS).passed

def test_children_have_no_network():
    "A server that listens here cannot be reached from there, even past the audit hook's list of modules."
    server = __import__("socket").create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    verdict = run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n" + GOOD, TESTS)
    server.close()
    assert verdict.kind == "refused"


# pass@k
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.data())
def test_pass_at_k_counts_all_subsets(drawn, data):
    from itertools import combinations
    passed, k = data.draw(st.integers(0, drawn)), data.draw(st.integers(1, drawn))
    samples = [1]*passed + [0]*(drawn - passed)
    subsets = [any(c) for c in combinations(samples, k)]
    assert abs(pass_at_k(passed, drawn, k) - sum(subsets)/len(subsets)) < 1e-12

@pytest.mark.parametrize("arguments", [(1, 2, 3), (3, 2, 1), (-1, 2, 1), (0, 2, 0)])
def test_impossible_counts_are_refused(arguments):
    with pytest.raises(ValueError, match="pass@"): pass_at_k(*arguments)


# HumanEval
@pytest.mark.peer
def test_humaneval_is_lm_evals_own_task():
    pytest.importorskip("lm_eval")
    import yaml
    class Loader(yaml.SafeLoader): pass
    Loader.add_constructor("!function", lambda loader, node: node.value)
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent/"tasks"/"humaneval"
    theirs, ours = yaml.load((folder/"humaneval.yaml").read_text(), Loader), humaneval_task([])
    for key in ("output_type", "test_split", "doc_to_text", "doc_to_target", "num_fewshot", "generation_kwargs"): assert ours[key] == theirs[key], key
    scope = {}
    exec((folder/"utils.py").read_text().split("def build_predictions(")[1].join(["def build_predictions(", ""]).split("\n\n\n")[0], scope)
    doc = dict(prompt="def f(x):\n", test="def check(c): assert c(3) == 6", entry_point="f")
    assert scope["build_predictions"]([["    return 2*x\n"]], [doc])[0][0] == humaneval_pair(doc, "    return 2*x\n")[0]

def test_published_solutions_pass_and_broken_ones_fail(realdata):
    problems = read_humaneval(realdata/"benchmarks")
    assert len(problems) == 164 and problems[0]["entry_point"] == "has_close_elements"
    chosen = problems[::4]
    right = run_programs([(p["prompt"] + p["canonical_solution"], humaneval_pair(p, "")[1]) for p in chosen], 4, False)
    assert all(v.passed for v in right), [(p["task_id"], v) for p, v in zip(chosen, right) if not v.passed]
    wrong = run_programs([humaneval_pair(p, "    return None\n") for p in chosen], 4, False)
    assert not any(v.passed for v in wrong)

@pytest.mark.peer
def test_scores_through_lm_eval_are_those_of_the_parts(realdata):
    "The same greedy text, scored by hand; and batches of one and sixteen agree."
    pytest.importorskip("lm_eval")
    model, tokenizer = load_model("base"), load_tokenizer("base")
    results = [humaneval_scores(model, tokenizer, realdata/"benchmarks", 6, batch_size=size, max_new_tokens=24) for size in (1, 16)]
    assert results[0]["items"] == results[1]["items"] and results[0]["n"] == 6
    problems = read_humaneval(realdata/"benchmarks")[:6]
    assert results[0]["items"] == [float(run_program(*humaneval_pair(p, a)).passed) for p, a in zip(problems, results[0]["answers"])]

def test_files_that_are_no_humaneval(tmp_path):
    with pytest.raises(FileNotFoundError, match="HumanEval"): read_humaneval(tmp_path)
    (tmp_path/"HumanEval.jsonl").write_text('{"task_id": 1}\n')
    with pytest.raises(ValueError, match="line 1 is no problem"): read_humaneval(tmp_path)

@pytest.mark.parametrize("text, kept", [("a\nclass B", "a"), ("a\n# b\ndef c", "a"), ("    return 1\n", "    return 1\n"), ("\nif x", ""), ("a # b", "a # b")])
def test_a_continuation_ends_where_something_new_begins(text, kept): assert cut_at_stops(text) == kept


# MT-bench
def test_published_questions_and_references(realdata):
    questions = read_mt_bench(realdata/"benchmarks"/"mt_bench")
    assert len(questions) == 80 and all(len(q["turns"]) == 2 for q in questions) and len({q["category"] for q in questions}) == 8
    assert all(q["reference"] for q in questions if q["category"] in NEED_REFERENCE)

def test_the_judge_reads_the_published_prompts_filled(realdata):
    folder = realdata/"benchmarks"/"mt_bench"
    questions = [q for q in read_mt_bench(folder) if q["category"] in ("math", "writing")]
    for question in questions[:1] + questions[-1:]:
        talk = [m for i, turn in enumerate(question["turns"]) for m in (dict(role="user", content=turn), dict(role="assistant", content=f"answer {i + 1} {{question_1}}"))]
        math = question["category"] == "math"
        rubric = read_rubric(folder/"judge_prompts.jsonl", f"single{'-math' if math else ''}-v1-multi-turn", "pair-v2-multi-turn")
        text = "\n".join(m["content"] for m in mt_bench_prompt(rubric, talk, question["reference"] if math else None))
        assert all(turn in text for turn in question["turns"]) and "answer 2 {question_1}" in text, "what an answer says is not filled in"
        assert not math or all(r in text for r in question["reference"])

def test_a_bench_with_a_real_judge_on_loopback(realdata, tmp_path):
    folder = realdata/"benchmarks"/"mt_bench"
    questions = [q for q in read_mt_bench(folder) if q["category"] in ("reasoning", "humanities")][:4]
    ledger = Ledger(tmp_path/"talks.sqlite")
    teacher = LocalTeacher(load_model("student"), load_tokenizer("student"), "student")
    talks = hold_talks(teacher, questions, Sampling(12), ledger)
    assert [len(t) for t in talks] == [4]*4 and hold_talks(teacher, questions, Sampling(12), ledger) == talks
    def judge(request):
        text = request["messages"][-1]["content"]
        return "I cannot say." if "no rating" in text else f"Fair. Rating: [[{1 + len(text) % 10}]]"
    server = ScriptedServer(judge); server.start()
    try: scores = judge_talks(ApiTeacher(Endpoint(server.url, "rule")), questions, talks, folder/"judge_prompts.jsonl", Sampling(32))
    finally: server.stop()
    assert len(scores) == 8 and all(1 <= s["score"] <= 10 for s in scores) and {s["turn"] for s in scores} == {1, 2}

def test_a_bench_without_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match="question.jsonl"): read_mt_bench(tmp_path)
    (tmp_path/"question.jsonl").write_text(json.dumps(dict(question_id=1, category="math", turns=["1+1?"])) + "\n")
    with pytest.raises(ValueError, match="question 1 is of a category whose judge sees a reference"): read_mt_bench(tmp_path)
