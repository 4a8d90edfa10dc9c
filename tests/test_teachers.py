"Teachers: one name for one request, a ledger that outlives kills, replies that do not depend on their batch, endpoints that fail in every way."
import asyncio, contextlib, json, math, multiprocessing, os, random, signal, sqlite3, subprocess, sys, threading, time
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from distillbook.lab.exercises import problems
from distillbook.lab.models import generate, tiny_qwen3, train_tokenizer
from distillbook.synth import teachers
from distillbook.synth.endpoints import FAULTS, ScriptedServer, read_log
from distillbook.synth.teachers import (AdaptiveLimit, ApiTeacher, Endpoint, EndpointError, GumbelMax, Ledger, LocalTeacher, Reply, Request,
    Sampling, ask, backoff_seconds, check_conversations, read_key, request_key, retry_after, run_apart, token_batches, token_cost)

talk = lambda *texts: [[dict(role="user", content=text)] for text in texts]
numbered = lambda n: talk(*(f"question {i}" for i in range(n)))
fork = multiprocessing.get_context("fork")

class Echo:
    name = "echo"
    def __init__(self): self.asked = []
    def check(self, conversations, sampling): check_conversations(conversations)
    def answer(self, requests, record):
        for r in requests:
            self.asked.append(r.messages[-1]["content"])
            record([Reply(r.messages[-1]["content"].upper(), "stop", 1, 2, cost=.5, model="echo", key=r.key)])

@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path/"ledger.db")
    yield ledger
    ledger.close()

@pytest.fixture(scope="module")
def local():
    tokenizer = train_tokenizer(["The fox sees the moon. The owl sees the fox. What does the owl see?"]*20, 300)
    torch.manual_seed(0)
    return LocalTeacher(tiny_qwen3(tokenizer, hidden_size=64, layers=2, intermediate_size=64, heads=2, kv_heads=1, context=128), tokenizer, "tiny", batch_tokens=400)

def request(seed=0): return Request(request_key("m", talk("q")[0], Sampling(), seed), "m", talk("q")[0], Sampling(), seed)

# names

plain = st.text(max_size=8)
@given(st.lists(st.fixed_dictionaries(dict(role=plain, content=plain)), min_size=1, max_size=4), st.integers(-2**63, 2**63 - 1))
def test_a_key_does_not_depend_on_the_order_of_a_dict(messages, seed):
    turned = [dict(reversed(m.items())) for m in messages]
    assert request_key("m", messages, Sampling(), seed) == request_key("m", turned, Sampling(), seed)

def test_a_key_depends_on_everything_else():
    a, b = talk("a")[0], talk("b")[0]
    keys = {request_key(m, q, s, n) for m in ("m", "n") for q in (a, b, a + b, b + a) for s in (Sampling(), Sampling(5), Sampling(temperature=1.), Sampling(top_p=.5)) for n in (0, 1)}
    assert len(keys) == 2*4*4*2

def test_a_key_is_the_same_in_every_process():
    code = "from distillbook.synth.teachers import *; print(request_key('m', [dict(role='user', content='é\\ud800')], Sampling(3, 1), 7))"
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": s}).stdout for s in ("1",)}
    assert said == {request_key("m", [dict(role="user", content="é\ud800")], Sampling(3, 1.), 7) + "\n"}

@pytest.mark.parametrize("wrong, says", [(dict(max_new_tokens=0), "at least 1"), (dict(temperature=-.1), "below 0"), (dict(temperature=math.nan), "temperature"), (dict(top_p=0.), "top_p")])
def test_sampling_that_means_nothing_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says): Sampling(**wrong)

@pytest.mark.parametrize("conversation, says", [([], "conversation 1 is list"), (None, "conversation 1 is NoneType"), ("text", "is a text"), ([dict(role="user")], "conversation 1, message 0"),
    ([dict(role="robot", content="x")], "role 'robot'"), ([dict(role="user", content=3)], "is int, not text"), (talk("a")[0] + [dict(role="assistant", content="b")], "ends with the assistant")])
def test_bad_conversations_are_named(conversation, says):
    with pytest.raises(ValueError, match=says): check_conversations([talk("fine")[0], conversation])

def test_exercises_are_sound():
    for check in (teachers.check_backoff_times, teachers.check_best_speedup, teachers.check_same_request): assert problems(check) == []

# the ledger

def test_a_good_answer_stays_and_a_failure_is_asked_again(ledger):
    r = request()
    ledger.begin([r, r])
    ledger.record([Reply("", "error", key=r.key, error="busy", cost=1., tries=3)])
    assert ledger.replies([r.key]) == {} and ledger.counts() == dict(done=0, failed=1, open=0)
    ledger.record([Reply("yes", "stop", key=r.key, cost=.5)])
    ledger.record([Reply("no", "stop", key=r.key, cost=9.)])
    found = ledger.replies([r.key])[r.key]
    assert (found.text, found.cost, found.tries, found.error) == ("yes", 1.5, 4, "")

def test_an_error_while_writing_leaves_nothing(ledger):
    a, b = request(0), request(1)
    ledger.begin([a, b])
    with pytest.raises(sqlite3.Error): ledger.record([Reply("x", "stop", key=a.key), Reply(object(), "stop", key=b.key)])
    assert ledger.counts() == dict(done=0, failed=0, open=2)

def test_the_last_decision_counts_and_survives(tmp_path):
    with contextlib.closing(Ledger(tmp_path/"l.db")) as ledger:
        for word in ("reject", "accept"): ledger.decide("row 1", word, "Ada", "note")
        with pytest.raises(ValueError, match="needs a key"): ledger.decide("", "accept")
    with contextlib.closing(Ledger(tmp_path/"l.db")) as ledger: assert [(k, d["decision"], d["who"]) for k, d in ledger.decisions().items()] == [("row 1", "accept", "Ada")]

def test_exports_hold_the_finished_rows_in_order(ledger, tmp_path):
    import pandas as pd
    ask(Echo(), talk("b", "ä\n", "a"), ledger=ledger, progress=False)
    ledger.begin([request()])
    rows = [json.loads(line) for line in ledger.to_jsonl(tmp_path/"rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [r["text"] for r in rows] == ["B", "Ä\n", "A"] and rows == ledger.rows() and len(ledger.rows(everything=True)) == 4
    assert pd.read_parquet(ledger.to_parquet(tmp_path/"rows.parquet"))["text"].tolist() == ["B", "Ä\n", "A"]

def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path):
    (tmp_path/"notes.txt").write_text("some notes that are long enough to be looked at as a database header\n"*20)
    before = (tmp_path/"notes.txt").read_bytes()
    with pytest.raises(ValueError, match="cannot be used as a ledger"): Ledger(tmp_path/"notes.txt")
    assert (tmp_path/"notes.txt").read_bytes() == before
    other = sqlite3.connect(tmp_path/"other.db"); other.execute("CREATE TABLE mine (x)"); other.commit(); other.close()
    with pytest.raises(ValueError, match="another program's"): Ledger(tmp_path/"other.db")

def _tell(path, told):
    ledger = Ledger(path)
    for n in range(10**9):
        ledger.begin([request(n)]); ledger.record([Reply("x", "stop", key=request(n).key)])
        os.write(told, b"x")

def test_what_was_recorded_outlives_a_kill(tmp_path):
    for wait in (.2, .4):
        reading, writing = os.pipe()
        process = fork.Process(target=_tell, args=(tmp_path/f"{wait}.db", writing))
        process.start()
        told = len(os.read(reading, 1))
        time.sleep(wait); process.kill(); process.join()
        told += len(os.read(reading, 10**6)) if told else 0
        os.close(reading); os.close(writing)
        with contextlib.closing(Ledger(tmp_path/f"{wait}.db")) as ledger: assert told <= ledger.counts()["done"] <= told + 1

# ask

def test_ask_keeps_the_order_and_asks_each_request_once(ledger):
    echo = Echo()
    assert [r.text for r in ask(echo, talk("b", "a", "b"), ledger=ledger, progress=False)] == ["B", "A", "B"]
    assert [r.text for r in ask(echo, talk("c", "a"), ledger=ledger, progress=False)] == ["C", "A"] and echo.asked == ["b", "a", "c"]
    assert len(ask(echo, talk("a", "a"), seeds=[0, 1], ledger=ledger, progress=False)) == 2 and echo.asked == ["b", "a", "c", "a"]
    assert ask(echo, [], ledger=ledger, progress=False) == [] and len(ask(echo, talk("a"), progress=False)) == 1

def test_seeds_are_checked():
    with pytest.raises(ValueError, match="2 seeds for 1 conversations"): ask(Echo(), talk("a"), seeds=[1, 2])
    with pytest.raises(ValueError, match="64 bits"): ask(Echo(), talk("a"), seeds=2**63)
    assert ask(Echo(), talk("a"), seeds=np.int64(3), progress=False)[0].key == request_key("echo", talk("a")[0], Sampling(), 3)

def test_many_keys_fit_into_one_question(ledger):
    assert len(ask(Echo(), numbered(1234), ledger=ledger, progress=False)) == len(ledger.rows()) == 1234

# the local teacher

def test_gumbel_draws_have_the_probabilities_of_the_softmax():
    from scipy.stats import chisquare
    p = torch.tensor([.4, .3, .2, .1])
    scores, _ = GumbelMax([f"{n:032x}" for n in range(5000)], Sampling(temperature=1.))(p.log().expand(5000, -1))
    assert chisquare(np.bincount(scores.argmax(-1), minlength=4), 5000*p.numpy()).pvalue > 1e-3

def test_doubt_is_where_two_scores_are_near():
    near = torch.tensor([[1., 1.0001, 0.], [1., 1.1, 0.]])
    assert GumbelMax(["0", "1"], Sampling())(near)[1].tolist() == [True, False]

@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 50), st.integers(1, 2000))
def test_batches_hold_every_row_once_and_keep_to_the_budget(lengths, new, budget):
    batches = token_batches(lengths, new, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b)*(max(lengths[i] for i in b) + new) <= budget for b in batches)

@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, 1.), Sampling(12, 2., .8)])
def test_a_reply_does_not_depend_on_its_batch(local, sampling):
    questions = talk(*("fox "*n + "?" for n in range(1, 13)))
    batch = ask(local, questions, sampling, progress=False)
    assert [r.text for r in batch] == [ask(local, [q], sampling, progress=False)[0].text for q in questions]
    assert [r.text for r in batch] == [r.text for r in ask(local, questions[::-1], sampling, progress=False)][::-1]
    if sampling.temperature: assert [r.text for r in batch] != [r.text for r in ask(local, questions, sampling, 1, progress=False)]

@pytest.mark.parametrize("sampling", [Sampling(8), Sampling(8, 1.)])
def test_a_beginning_that_all_share_is_read_once_and_changes_nothing(local, sampling, monkeypatch):
    shared, read = [dict(role="system", content="The owl sees the fox. "*14)], []
    questions = [shared + q for q in talk(*("fox "*n + "?" for n in range(1, 7)))]
    monkeypatch.setattr(teachers, "read_prefix", lambda model, ids, copies, real=teachers.read_prefix: read.append((len(ids), copies)) or real(model, ids, copies))
    local.batch_tokens, usual = 4000, local.batch_tokens
    try: batch = ask(local, questions, sampling, progress=False)
    finally: local.batch_tokens = usual
    assert len(read) == 1 and read[0][0] >= 64 and read[0][1] == 6
    assert [r.text for r in batch] == [ask(local, [q], sampling, progress=False)[0].text for q in questions]
    assert [r.prompt_tokens for r in batch] == [ask(local, [q], sampling, progress=False)[0].prompt_tokens for q in questions]

def test_greedy_replies_are_those_of_transformers(local):
    questions = talk(*("fox "*n + "owl" for n in range(1, 9)))
    replies = ask(local, questions, Sampling(15), progress=False)
    assert [r.text for r in replies] == generate(local.model, local.tokenizer, questions, 15, progress=False)
    assert all((r.finish == "length") == (r.completion_tokens == 15) or r.finish == "stop" for r in replies) and all(r.prompt_tokens > 0 for r in replies)

def test_a_local_teacher_refuses_before_it_works(local, monkeypatch):
    monkeypatch.setattr(teachers, "local_batch", lambda *_: pytest.fail("it began to work"))
    with pytest.raises(ValueError, match="conversation 1 has .* exceeds the context of 128"): ask(local, talk("a", "fox "*200), Sampling(10))

def test_changed_weights_are_another_model(local):
    import copy
    teacher = LocalTeacher(copy.deepcopy(local.model), local.tokenizer, "tiny")
    assert teacher.name == local.name
    with torch.no_grad(): next(teacher.model.parameters()).add_(1.)
    with pytest.raises(ValueError, match="weights of .* have changed"): ask(teacher, talk("a"))
    assert LocalTeacher(teacher.model, local.tokenizer, "tiny").name != local.name

# waiting and limits

@given(st.integers(1, 60), st.floats(.01, 5), st.floats(5, 100), st.floats(0, 1))
def test_backoff_is_between_half_and_all_of_a_capped_doubling(tries, first, cap, draw):
    whole = min(cap, first*2.**(tries - 1))
    assert whole/2 - 1e-9 <= backoff_seconds(tries, first, cap, draw) <= whole + 1e-9

def test_retry_after_reads_seconds_milliseconds_and_dates():
    from email.utils import format_datetime
    from datetime import datetime, timedelta, timezone
    assert retry_after({"retry-after": "3"}) == 3 and retry_after({"retry-after-ms": "1500"}) == 1.5
    assert 50 < retry_after({"retry-after": format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60))}) <= 60
    assert [retry_after({"retry-after": x}) for x in ("-4", "inf", "nan", "later", "")] == [0]*5

@given(st.lists(st.sampled_from(["answered", "refused", "lost"]), max_size=80))
def test_a_limit_stays_between_one_and_most(events):
    limit = AdaptiveLimit(4., most=20)
    for now, event in enumerate(events):
        limit.open = int(limit.value)
        limit.has_room(now - .5)
        if event == "answered": limit.answered(now, now - .5)
        elif event == "refused": limit.refused(now, now - .5)
        else: limit.lost(now, now - .5, lambda n: .1)
        assert 1 <= limit.value <= 20

@pytest.mark.parametrize("top_p", [.05, .5, .9, 1.])
def test_rounding_never_decides_a_row_that_is_sure(top_p):
    "Logits moved by a quarter of the margin, with near ties at the top and at the edge of the nucleus, one of them token 0: the same token wins, or the row is marked."
    rows, marked = 400, 0
    keys = [f"{n:032x}" for n in range(rows)]
    logits = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0))*3
    logits[::2, 0] = logits[::2].max(-1).values + 1e-6
    logits[1::4, 1::2] = logits[1::4, ::2]
    for sign in (-1, 1):
        moved = logits + sign*GumbelMax.margin/4*torch.randn(rows, 40, generator=torch.Generator().manual_seed(1)).sign()
        (one, unsure), (other, _) = (GumbelMax(keys, Sampling(temperature=1., top_p=top_p))(x) for x in (logits, moved))
        assert (unsure | (one.argmax(-1) == other.argmax(-1))).all()
        marked += int(unsure.sum())
    assert marked < rows or top_p < .5      # few are marked where ties do not fill the nucleus

def test_a_burst_of_answers_doubles_the_limit_and_an_unused_one_stays():
    limit = AdaptiveLimit(8., most=100)
    limit.open = 8
    assert not limit.has_room(0.)
    for _ in range(8):      # all come back before the next is sent
        limit.answered(1., 0.)
        limit.open -= 1
    assert limit.value == 16
    limit.open = 3
    assert limit.has_room(1.)
    for _ in range(3): limit.answered(2., 1.)
    assert limit.value == 16

def test_the_adaptive_limit_comes_near_to_the_ideal_of_a_server_that_only_waits():
    "A ratio of two runs on one machine: 500 requests from 8 open on, against as many open from the start as the server takes."
    def seconds(**limits):
        with ScriptedServer(delay=.4, capacity=50, process=True) as server:
            start = time.monotonic()
            assert not any(r.error for r in ask(ApiTeacher(Endpoint(server.url, "m"), **limits), numbered(500), progress=False))
            return time.monotonic() - start
    assert seconds(start=8) < 1.6*seconds(start=50, most=50)

def test_cost_is_per_million_tokens():
    assert token_cost(1_000_000, 500_000, 2., 8.) == 6. and Endpoint("http://localhost:1/v1", "m", price_in=1.).cost(10, 99) == 1e-5

# endpoints

@pytest.mark.parametrize("wrong, says", [(dict(url="example.com"), "whole address"), (dict(url="https://a:b@example.com/v1"), "more than a place"), (dict(url="https://example.com/v1?key=b"), "more than a place"),
    (dict(key_env="sk-proj-abc"), "NAME"), (dict(price_out=-1), "not negative")])
def test_endpoints_that_cannot_work_are_refused_without_repeating_secrets(wrong, says):
    with pytest.raises(ValueError, match=says) as caught: Endpoint(**(dict(url="https://example.com/v1", model="m") | wrong))
    assert "sk-proj" not in str(caught.value) and "a:b@" not in str(caught.value)

def test_teachers_that_cannot_work_are_refused():
    here = [Endpoint("http://localhost:1/v1", m) for m in ("a", "b")]
    with pytest.raises(ValueError, match="one model"): ApiTeacher(here)
    with pytest.raises(ValueError, match="one model"): ApiTeacher([])
    with pytest.raises(ValueError, match="start 9 and most 3"): ApiTeacher(here[0], start=9, most=3)
    assert ApiTeacher(here, name="both").name == "both"
    with pytest.raises(ValueError, match="is a text"): ask(ApiTeacher(here[0]), ["text"])

def test_a_key_comes_from_the_environment_and_appears_nowhere(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TEST_KEY", " secret-4711 ")
    with ScriptedServer("hello", api_key="secret-4711") as server, contextlib.closing(Ledger(tmp_path/"l.db")) as ledger:
        teacher = ApiTeacher(Endpoint(server.url, "m", key_env="TEST_KEY"))
        replies = ask(teacher, numbered(3), ledger=ledger)
        monkeypatch.setenv("TEST_KEY", "wrong-0815")
        with pytest.raises(EndpointError, match="key was refused") as caught: ask(teacher, talk("another"), ledger=ledger)
        ledger.to_jsonl(tmp_path/"rows.jsonl")
        seen = "".join(map(repr, (teacher, teacher.endpoints, replies, ledger, caught.value, caught.value.__cause__, caught.value.__context__))) + "".join(capfd.readouterr())
    seen = seen.encode() + b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert b"4711" not in seen and b"0815" not in seen
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(ValueError, match="has no TEST_KEY"): read_key(Endpoint("https://example.com/v1", "m", key_env="TEST_KEY"))
    monkeypatch.setenv("TEST_KEY", "broken\nkey")
    with pytest.raises(ValueError, match="set it again") as caught: read_key(Endpoint("https://example.com/v1", "m", key_env="TEST_KEY"))
    assert "broken" not in str(caught.value)

def test_prices_count_failed_tries_too(tmp_path):
    with ScriptedServer("five words are in this", faults=dict(length=.5), seed=3) as server:
        replies = ask(ApiTeacher(Endpoint(server.url, "m", price_out=1e6), first_wait=.01, tries=20, retry_truncated=True), numbered(20), progress=False)
    assert {r.completion_tokens for r in replies} == {5} and all(r.cost == 5 + 2*(r.tries - 1) for r in replies) and max(r.tries for r in replies) > 1

def test_cut_replies_are_kept_unless_they_are_to_be_asked_again():
    with ScriptedServer("one two three four five six") as server:
        kept = ask(ApiTeacher(Endpoint(server.url, "m")), talk("q"), Sampling(3), progress=False)[0]
        with pytest.warns(UserWarning, match="1 of 1 requests failed"):
            again = ask(ApiTeacher(Endpoint(server.url, "m"), tries=2, first_wait=.01, retry_truncated=True), talk("q"), Sampling(3), progress=False)[0]
    assert (kept.text, kept.finish, kept.error) == ("one two three", "length", "")
    assert again.finish == "length" and "cut at 3 tokens after 2 tries" in again.error and again.tries == 2

@pytest.mark.parametrize("fault, says", [("server_error", "gave no answer in 3 tries"), ("cut", "the connection broke"), ("broken_json", "not JSON"), ("rate_limit", "429")])
def test_a_service_that_only_fails_ends_in_one_line(fault, says, ledger):
    with ScriptedServer("x", faults={fault: 1.}, retry_after=.01) as server:
        with pytest.raises(EndpointError, match=says) as caught: ask(ApiTeacher(Endpoint(server.url, "m"), tries=3, first_wait=.01), numbered(4), ledger=ledger, progress=False)
        assert server.counts()["requests"] <= 4*3
    assert "\n" not in str(caught.value) and ledger.counts()["done"] == 0

def test_an_empty_answer_is_recorded_with_its_reason_and_asked_again(ledger):
    with ScriptedServer("", port=0) as server:
        teacher = ApiTeacher(Endpoint(server.url, "m"), tries=2, first_wait=.01)
        with pytest.warns(UserWarning, match="an empty answer"): reply = ask(teacher, talk("q"), ledger=ledger, progress=False)[0]
        assert "after 2 tries" in reply.error and ledger.counts()["failed"] == 1
        server.stop(); server.settings["answer"] = "full"; server.start()
        assert ask(teacher, talk("q"), ledger=ledger, progress=False)[0].text == "full"

def test_an_endpoint_that_is_down_costs_its_budget_and_the_ledger_stays(ledger):
    with ScriptedServer() as server: ask(ApiTeacher(Endpoint(server.url, "m")), numbered(5), ledger=ledger, progress=False)
    with pytest.raises(EndpointError, match=r"gave no answer in 3 tries .* \(no connection\)"): ask(ApiTeacher(Endpoint(server.url, "m"), tries=3, first_wait=.01), numbered(50), ledger=ledger, progress=False)
    assert ledger.counts()["done"] == 5

def test_of_two_endpoints_one_may_be_down():
    with ScriptedServer() as gone: pass
    with ScriptedServer() as server:
        replies = ask(ApiTeacher([Endpoint(gone.url, "m"), Endpoint(server.url, "m")], first_wait=.01), numbered(100), progress=False)
    assert [r.text for r in replies] == [f"question {i}" for i in range(100)]

def test_a_long_retry_after_ends_the_run_and_a_short_one_is_waited_for():
    with ScriptedServer("x", faults=dict(rate_limit=1.), retry_after=500.) as server:
        with pytest.raises(EndpointError, match="left alone for 500 s"): ask(ApiTeacher(Endpoint(server.url, "m")), talk("q"), progress=False)
    with ScriptedServer("x", faults=dict(rate_limit=.3), retry_after=.3, seed=1) as server:
        assert len(ask(ApiTeacher(Endpoint(server.url, "m"), start=1, most=1, first_wait=.001, tries=20), numbered(8), progress=False)) == 8

def test_a_refused_question_is_recorded_and_not_repeated():
    with ScriptedServer("x") as server:
        teacher = ApiTeacher(Endpoint(server.url, "m", limit_name="max_tokens"), tries=5)
        teachers_try, calls = teachers.try_once, []
        async def refuse(*arguments):
            calls.append(1)
            return teachers.Outcome("bad request", "400: too long")
        teachers.try_once = refuse
        try:
            with pytest.warns(UserWarning, match="400: too long"): reply = ask(teacher, talk("q"), progress=False)[0]
        finally: teachers.try_once = teachers_try
    assert len(calls) == 1 and reply.finish == "error" and reply.text == ""

def test_no_more_requests_are_open_than_allowed_and_the_limit_finds_the_servers():
    with ScriptedServer(delay=.02, limit=20, retry_after=.02) as server:
        teacher = ApiTeacher(Endpoint(server.url, "m"), start=4, most=64, first_wait=.02, tries=12)
        assert len(ask(teacher, numbered(300), progress=False)) == 300
        values = [v for _, v in teacher.limits[0].history]
        assert max(values) > 8 and max(values) <= 64 and server.counts()["successes"] and set(server.counts()["successes"].values()) == {1}
    with ScriptedServer(delay=.01) as server:
        ask(ApiTeacher(Endpoint(server.url, "m"), start=7, most=7), numbered(50), progress=False)
        assert server.counts()["most_open"] == 7

def test_it_works_inside_a_running_loop():
    with ScriptedServer() as server:
        async def cell(): return ask(ApiTeacher(Endpoint(server.url, "m")), talk("hello"), progress=False)
        assert asyncio.run(cell())[0].text == "hello"
    async def broken(): raise KeyError("x")
    with pytest.raises(KeyError): run_apart(broken())

def test_ctrl_c_keeps_what_was_answered(tmp_path):
    with ScriptedServer(delay=.05, process=True) as server, contextlib.closing(Ledger(tmp_path/"l.db")) as ledger:
        def interrupt():
            while ledger.counts()["done"] < 5: time.sleep(.02)
            os.kill(os.getpid(), signal.SIGINT)
        timer = threading.Thread(target=interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt): ask(ApiTeacher(Endpoint(server.url, "m"), start=2, most=2), numbered(5000), ledger=ledger, progress=False)
        timer.join()
        first = ledger.counts()
        assert first["done"] > 0 and first["done"] + first["open"] == 5000
        assert not [t for t in threading.enumerate() if "(work)" in t.name and t.is_alive()]

def test_nothing_heavy_is_imported_with_the_module():
    code = "import sys, distillbook.synth.teachers; print([m for m in ('openai', 'gguf', 'xllamacpp', 'sentence_transformers', 'pandas') if m in sys.modules])"
    assert "openai" not in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout

# everything at once

def _client(url, path, n):
    ask(ApiTeacher(Endpoint(url, "scripted"), first_wait=.05, tries=12, retry_truncated=True), numbered(n), ledger=Ledger(path), progress=False)

def _texts(path):
    with contextlib.closing(Ledger(path)) as ledger: return [row["messages"][-1]["content"] for row in ledger.rows()]

def _count(path):
    with contextlib.closing(Ledger(path)) as ledger: return ledger.counts()["done"]

def test_two_thousand_requests_through_ten_kills_a_restart_and_every_fault(tmp_path):
    n, path, seen = 2000, tmp_path/"ledger.db", []
    moments = sorted(random.Random(0).sample(range(1, n), 10))
    with ScriptedServer(delay=.01, faults=dict.fromkeys(FAULTS, .1/len(FAULTS)), retry_after=.05, process=True, log=tmp_path/"log") as server:
        for number, moment in enumerate([*moments, n]):
            process = fork.Process(target=_client, args=(server.url, path, n))
            process.start()
            while process.is_alive() and _count(path) < moment: time.sleep(.02)
            if number == 5: server.kill(); time.sleep(.2); server.start(); time.sleep(.2)
            if moment < n: process.kill()
            process.join()
            seen.append((time.time(), set(_texts(path))))
        assert process.exitcode == 0
    texts, log = _texts(path), read_log(tmp_path/"log")
    assert sorted(texts) == sorted(f"question {i}" for i in range(n))                 # none lost, none twice
    assert not [line for at, done in seen for line in log if line["arrived"] > at and line["asked"] in done]      # nothing asked again that was recorded
    assert set(FAULTS) <= {line["outcome"] for line in log}
    with contextlib.closing(Ledger(path)) as ledger: assert all(row["text"] == row["messages"][-1]["content"] and row["finish"] == "stop" for row in ledger.rows())
