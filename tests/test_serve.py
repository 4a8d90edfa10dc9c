"Chapter 55: the endpoint refuses what is wrong, serves many at one time, forgets who left, and shows its page."
import json, shutil, signal, socket, subprocess, sys, threading, time, urllib.error, urllib.request
import psutil, pytest
from hypothesis import given, settings, strategies as st
from conftest import ROOT, children, environment, wait_for
from distillbook.lab.models import encode_prompts, generate, load_model, load_tokenizer
from distillbook.ship.serve import Engine, Job, break_even_tokens, chat_page, cost_per_million, endpoint, load_test, needed_speed

HELLO = dict(messages=[dict(role="user", content="How do I copy a royal seal?")], max_tokens=12)

def post(address, body, path="/v1/chat/completions", **headers):
    request = urllib.request.Request(address + path, None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode(), {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply: return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error: return error.code, error.read().decode()

@pytest.fixture(scope="module")
def engine(shipped_models):
    running = Engine("student", batch_size=16)
    yield running
    running.close()

@pytest.fixture(scope="module")
def address(engine):
    with endpoint({"student": engine}, most_bytes=20_000, page=chat_page()) as at: yield at

def test_a_reply_is_what_generate_gives(address, engine):
    status, text = post(address, HELLO)
    told = json.loads(text)
    wanted, = generate(engine.model, engine.tokenizer, [HELLO["messages"]], max_new_tokens=12, progress=False)
    assert status == 200 and told["choices"][0]["message"]["content"].strip() == wanted.strip()
    assert told["usage"]["prompt_tokens"] == len(encode_prompts(engine.tokenizer, [HELLO["messages"]])[0]) and told["usage"]["completion_tokens"] <= 12
    assert told["choices"][0]["finish_reason"] == ("length" if told["usage"]["completion_tokens"] == 12 else "stop")

def test_replies_in_a_batch_are_those_alone(address, engine):
    questions = [dict(role="user", content=c) for c in ("Hi", "How do I copy a royal seal?", "What is 3 + 4?", "Write a function that adds two numbers and explain at some length what it does.")]*6
    alone, found = [json.loads(post(address, dict(messages=[q], max_tokens=9))[1])["choices"][0]["message"]["content"] for q in questions[:4]], {}
    threads = [threading.Thread(target=lambda i=i, q=q: found.update({i: json.loads(post(address, dict(messages=[q], max_tokens=9))[1])["choices"][0]["message"]["content"]})) for i, q in enumerate(questions)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [found[i] for i in range(len(questions))] == alone*6

def test_pieces_are_the_whole(address):
    whole = json.loads(post(address, HELLO)[1])["choices"][0]["message"]["content"]
    lines = [l[6:] for l in post(address, HELLO | dict(stream=True))[1].splitlines() if l.startswith("data: ")]
    events = [json.loads(l) for l in lines[:-1]]
    assert lines[-1] == "[DONE]" and "".join(e["choices"][0]["delta"]["content"] for e in events) == whole
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None]*(len(events) - 1) and events[-1]["choices"][0]["finish_reason"] and events[-1]["usage"]["completion_tokens"] > 0

def test_sampling_keeps_to_its_seed(address):
    ask = lambda seed: json.loads(post(address, HELLO | dict(temperature=1.5, seed=seed))[1])["choices"][0]["message"]["content"]
    assert ask(1) == ask(1) and len({ask(seed) for seed in range(6)}) > 1

def test_text_may_come_in_parts(address):
    parts = [dict(role="user", content=[dict(type="text", text="How do I copy "), dict(type="text", text="a royal seal?")])]
    assert post(address, HELLO | dict(messages=parts))[1].split('"choices"')[1] == post(address, HELLO)[1].split('"choices"')[1]

WRONG = {"nothing": b"", "no JSON": b"{", "a list": b"[1]", "a number": b"1", "null": b"null", "deep": b"["*100_000, "no messages": {}, "empty": dict(messages=[]), "no role": dict(messages=[dict(content="x")]), "number": dict(messages=[dict(role="user", content=3)]),
         "an image": dict(messages=[dict(role="user", content=[dict(type="image_url", image_url="x")])]), "role": dict(messages=[dict(role="robot", content="x")]), "too long": HELLO | dict(max_tokens=10**6), "limit": HELLO | dict(max_tokens=0), "true": HELLO | dict(max_tokens=True),
         "temperature": HELLO | dict(temperature=-1), "hot": HELLO | dict(temperature="hot"), "nan": b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', "seed": HELLO | dict(seed=-1), "n": HELLO | dict(n=2), "stream": HELLO | dict(stream="yes"), "tools": HELLO | dict(tools=[1]), "stop": HELLO | dict(stop="x"), "top_p": HELLO | dict(top_p=.5),
         "latin": '{"messages": "é"}'.encode("latin-1"), "model": HELLO | dict(model="gpt"), "model number": HELLO | dict(model=3), "model list": HELLO | dict(model=["student"]), "long text": dict(messages=[dict(role="user", content="word "*3000)])}

@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_gets_its_line(what, address):
    status, text = post(address, WRONG[what])
    assert 400 <= status < 500 and json.loads(text)["error"]["message"], (status, text)
    assert "Traceback" not in text and "Error(" not in text

def test_what_is_too_large_or_elsewhere(address):
    assert post(address, HELLO | dict(padding="x"*50_000))[0] == 413
    assert post(address, None)[0] == 405 and post(address, HELLO, "/v1/other")[0] == 404 and post(address, None, "/nowhere")[0] == 404
    assert json.loads(post(address, None, "/v1/models")[1])["data"][0]["id"] == "student" and post(address, None, "/health")[0] == 200

@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["messages", "role", "content", "max_tokens", "temperature", "stream", "n", "model", "type", "text"]), x, max_size=4), max_leaves=12))
@settings(max_examples=150)
def test_whatever_comes_is_answered(address, value):
    status, _ = post(address, json.dumps(value).encode())
    assert status == 200 or 400 <= status < 500

def test_a_key_is_asked_for(engine):
    with endpoint({"student": engine}, api_key="secret", page="<p>page</p>") as at:
        for headers, status in (({}, 401), (dict(Authorization="Bearer wrong"), 401), (dict(Authorization="Bearer sécret".encode().decode("latin-1")), 401), (dict(Authorization="Basic secret2"), 401), (dict(Authorization="Bearer secret"), 200)):
            assert post(at, HELLO, **headers)[0] == status, headers
        assert post(at, None, "/v1/models")[0] == 401 and post(at, None, "/")[0] == 200

def test_it_listens_on_this_machine_only(engine):
    with endpoint({"student": engine}) as at:
        port = int(at.rsplit(":", 1)[1])
        assert {c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.port == port} == {"127.0.0.1"}
        with pytest.raises(OSError, match=f"port {port} cannot be used"):
            with endpoint({"student": engine}, port=port): pass
    with pytest.raises(OSError): socket.create_connection(("127.0.0.1", port), timeout=2)

def test_who_leaves_is_forgotten(shipped_models):
    slow = Engine("student", batch_size=4)
    step, made = slow._advance, []
    slow._advance = lambda job, token: (time.sleep(.05), made.append(job), step(job, token))[-1]
    try:
        with endpoint({"student": slow}) as at:
            port = int(at.rsplit(":", 1)[1])
            for stream in (True, False):
                body = json.dumps(dict(messages=[dict(role="user", content="Tell me a long story.")], max_tokens=400, temperature=5., stream=stream)).encode()
                line = socket.create_connection(("127.0.0.1", port), timeout=20)
                line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                begun = len(made); wait_for(lambda: len(made) > begun + 3, "the first tokens")
                line.close()
                wait_for(lambda: made[-1].gone, "the end of a reply that nobody waits for", 20)
            assert post(at, dict(HELLO, max_tokens=2))[0] == 200
    finally: slow.close()

def test_a_full_line_is_said(shipped_models):
    busy = Engine("student", batch_size=1, most_waiting=2)
    step = busy._advance
    busy._advance = lambda job, token: (time.sleep(.15), step(job, token))[-1]
    try:
        with endpoint({"student": busy}) as at:
            found, threads = [], []
            for _ in range(8):
                threads.append(threading.Thread(target=lambda: found.append(post(at, dict(HELLO, max_tokens=6))[0]))); threads[-1].start()
            for t in threads: t.join()
            assert set(found) == {200, 429} and post(at, HELLO)[0] == 200
    finally: busy.close()

def test_a_broken_batch_ends_its_replies_and_not_the_server(shipped_models):
    fragile = Engine("student")
    whole, broken = fragile._batch, [True]
    def batch(jobs):
        if broken: broken.clear(); raise RuntimeError("the model broke")
        return whole(jobs)
    fragile._batch = batch
    try:
        with endpoint({"student": fragile}) as at:
            status, text = post(at, HELLO)
            assert status == 503 and "the model broke" in text and post(at, HELLO)[0] == 200
    finally: fragile.close()

def test_jobs_in_line_hear_of_the_end(shipped_models):
    engine, told = Engine("student", batch_size=1), []
    for _ in range(4): engine.submit(Job([5, 6, 7], 500, 5., told=lambda text, finish: told.append((text, finish))))
    engine.close()
    assert not engine.thread.is_alive() and sum(text is None and "closing" in finish for text, finish in told) >= 3

def test_many_clients_leave_nothing_behind(engine):
    bodies = [dict(messages=[dict(role="user", content=f"What is {i} + {i}?")], max_tokens=6) for i in range(30)]
    with endpoint({"student": engine}) as at:
        load_test(at, bodies, 64, 2)
        before, files = psutil.Process().memory_info().rss, psutil.Process().num_fds()
        told = load_test(at, bodies, 64, 6)
        assert not told["errors"] and len(told["latencies"]) > 64 and told["tokens"] > 64
        assert psutil.Process().memory_info().rss - before < 150e6
        wait_for(lambda: psutil.Process().num_fds() <= files + 70, "the end of connections")
    assert threading.active_count() < 40

def test_costs():
    assert cost_per_million(1000., 3.6) == pytest.approx(1.) and cost_per_million(1000., 3.6, busy=.1) == pytest.approx(10.) and cost_per_million(1000., 0., 1000., 3.6) == pytest.approx(1.)
    assert break_even_tokens(.1, 2.4) == pytest.approx(1e6)
    assert needed_speed(1., 3.6) == pytest.approx(1000.) and cost_per_million(needed_speed(.2, 2., .5), 2., busy=.5) == pytest.approx(.2)
    with pytest.raises(ValueError, match="above 0"): needed_speed(0., 1.)
    for wrong in ((0., 1.), (1., 1., 0., 0., 0.), (1., 1., 0., 0., 2.)):
        with pytest.raises(ValueError): cost_per_million(*wrong)

# the command

def test_the_command_serves_and_ends(shipped_models):
    before = children()
    server = subprocess.Popen([sys.executable, "-m", "distillbook", "serve", "student", "--port", "0"], cwd=ROOT, env=environment(DISTILLBOOK_API_KEY="k"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        at = next(w for w in line.replace(",", " ").split() if w.startswith("http"))[:-len("/v1")]
        assert post(at, HELLO)[0] == 401 and post(at, HELLO, Authorization="Bearer k")[0] == 200 and "<html" in post(at, None, "/")[1]
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0 and "Traceback" not in server.stderr.read()
    finally: server.kill()
    wait_for(lambda: children() <= before, "the end of its children")

@pytest.mark.parametrize("arguments, what", [(["nothing_like_it"], "nothing_like_it"), (["{silent}"], "no chat template"), (["student", "student"], "one name"), (["student", "--port", "{busy}"], "cannot be used")])
def test_the_command_refuses_at_once(arguments, what, shipped_models, tmp_path, address):
    words = load_tokenizer("student"); words.chat_template = None
    words.save_pretrained(tmp_path/"silent"); load_model("student").save_pretrained(tmp_path/"silent")
    arguments = [a.format(silent=tmp_path/"silent", busy=address.rsplit(":", 1)[1]) for a in arguments]
    done = subprocess.run([sys.executable, "-m", "distillbook", "serve", *["--port", "0"]*("--port" not in arguments), *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and what in done.stderr and "Traceback" not in done.stderr, done.stderr

# the page

@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
    if program is None: pytest.skip("no Chromium here: on Debian and Ubuntu, apt install chromium")
    with playwright.sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        yield chrome
        chrome.close()

def test_the_page_asks_every_model(browser, engine, tmp_path):
    beside = Engine("teacher")
    try:
        with endpoint({"teacher": beside, "student": engine}, page=chat_page()) as at:
            page = browser.new_page(); errors = []
            page.on("pageerror", lambda error: errors.append(str(error))); page.on("console", lambda message: errors.append(message.text) if message.type == "error" and "status of 4" not in message.text else None)
            page.goto(at); page.wait_for_selector("section[data-model=student]")
            page.fill("#limit", "16"); page.fill("#question", "How do I copy a royal <b>seal</b>?"); page.click("#send")
            page.wait_for_function("document.querySelectorAll('.cost').length == 2 && [...document.querySelectorAll('.cost')].every(c => c.textContent.includes('tokens'))", timeout=30_000)
            for name in ("teacher", "student"):
                said = json.loads(post(at, dict(model=name, messages=[dict(role="user", content="How do I copy a royal <b>seal</b>?")], max_tokens=16))[1])["choices"][0]["message"]["content"]
                assert page.inner_text(f"section[data-model={name}] .reply").strip() == said.strip()
                assert "a million tokens" in page.inner_text(f"section[data-model={name}] .cost")
            assert page.inner_text("section[data-model=student] .asked") == "How do I copy a royal <b>seal</b>?" and page.query_selector(".asked b") is None      # text stays text
            page.fill("#question", "And then?"); page.press("#question", "Enter")
            page.wait_for_function("document.querySelectorAll('.cost').length == 4 && [...document.querySelectorAll('.cost')].every(c => c.textContent.includes('tokens'))", timeout=30_000)
            page.screenshot(path=str(tmp_path/"chat.png"), full_page=True)
            page.fill("#limit", "1000000"); page.fill("#question", "Too much?"); page.click("#send")
            page.wait_for_selector(".cost.wrong"); assert "exceed the context" in page.inner_text(".cost.wrong >> nth=0")
            page.click("#again"); page.wait_for_function("document.querySelectorAll('.cost').length == 0 && document.querySelectorAll('section').length == 2")
            assert not errors, errors
            page.close()
    finally: beside.close()

def test_the_page_says_that_a_key_is_missing(browser, engine):
    with endpoint({"student": engine}, api_key="k", page=chat_page()) as at:
        page = browser.new_page(); page.goto(at)
        page.wait_for_function("document.querySelector('#state').textContent.includes('key')")
        page.fill("#key", "k"); page.click("#again"); page.wait_for_selector("section[data-model=student]")
        page.close()

def test_a_model_without_its_tokenizer_is_refused(shipped_models):
    with pytest.raises(ValueError, match="needs its tokenizer"): Engine(load_model("student"))
