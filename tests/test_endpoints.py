"Endpoints: a GGUF file that llama.cpp reads as transformers reads the folder, servers that end with us, and faults that come as planned."
import asyncio, json, os, random, signal, socket, subprocess, sys, urllib.error, urllib.request
from pathlib import Path
from types import SimpleNamespace
import numpy as np, psutil, pytest, torch
from hypothesis import given, settings, strategies as st
from conftest import children, wait_for
from distillbook.lab.models import CHAT_TEMPLATE, encode_prompts, generate, load_model, load_tokenizer, tiny_qwen3, train_tokenizer
from distillbook.lab.microworld import SUITES, examples
from distillbook.synth import endpoints
from distillbook.synth.endpoints import (FAULTS, ScriptedServer, check_port, llama_server, plain_template, planned_fault, read_log, whole_file,
    write_gguf, _chat_request, _completion, _read_request, _Refused)

gguf = pytest.importorskip("gguf", reason="the extra `serve` is not installed")
pytest.importorskip("xllamacpp", reason="the extra `serve` is not installed")
ASK = dict(model="teacher", messages=[dict(role="user", content="What is the bird of it?")])

def post(url, body, path="/chat/completions", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"} | headers)
    with urllib.request.urlopen(request) as reply: return json.load(reply)
def text_of(reply): return reply["choices"][0]["message"]["content"]
def status_of(url, body, **options):
    try: return 200 if post(url, body, **options) else None
    except urllib.error.HTTPError as error: return error.code
def http(body, path="/v1/chat/completions", more=""):
    return f"POST {path} HTTP/1.1\r\nHost: here\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body
def wire(port, data):
    "What comes back before the server closes."
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: line.recv(65536), b""))


@pytest.fixture(scope="module")
def files(tmp_path_factory, shipped_models):
    folder = tmp_path_factory.mktemp("gguf")
    return {dtype: write_gguf("teacher", folder/f"{dtype}.gguf", dtype) for dtype in ("f32", "f16", "bf16")}

@pytest.fixture(scope="module")
def teacher(shipped_models): return load_model("teacher")
@pytest.fixture(scope="module")
def tokenizer(shipped_models): return load_tokenizer("teacher")

@pytest.fixture(scope="module")
def exact(files):
    with llama_server(files["f32"], slots=1, threads=1, exact=True) as url: yield url

def server_tokens(url, text): return post(url.removesuffix("/v1"), dict(content=text, parse_special=True), "/tokenize")["tokens"]
def server_logprobs(url, ids, size):
    told = post(url.removesuffix("/v1"), dict(prompt=ids, n_predict=1, n_probs=size, temperature=0), "/completion")["completion_probabilities"][0]["top_logprobs"]
    found = np.full(size, np.nan)
    for token in told: found[token["id"]] = token["logprob"]
    return found
def logprobs(model, ids):
    with torch.no_grad(): return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy()

# the file

def test_template_without_markers():
    assert plain_template("{{ a }}{%- generation -%}{{ b }}{% endgeneration %}") == "{{ a }}{{ b }}"
    assert plain_template("{% if add_generation_prompt %}x{% endif %}") == "{% if add_generation_prompt %}x{% endif %}"
    assert "generation %}" not in plain_template(CHAT_TEMPLATE)

def test_template_writes_the_same_text(tokenizer):
    messages = [dict(role=r, content=c) for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"))]
    for prompt in (True, False):
        texts = [tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, chat_template=t) for t in (CHAT_TEMPLATE, plain_template(CHAT_TEMPLATE))]
        assert texts[0] == texts[1]

@pytest.mark.parametrize("dtype, error", [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8)])
def test_every_weight_is_in_the_file(files, teacher, dtype, error):
    reader = gguf.GGUFReader(files[dtype])
    assert sum(t.n_elements for t in reader.tensors) == teacher.num_parameters()      # the tied output matrix is there once
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, teacher.config.num_hidden_layers)
    read = {t.name: t for t in reader.tensors}
    for name, weight in teacher.named_parameters():
        tensor = read.pop(names.get_name(name, try_suffixes=(".weight",)))
        assert tensor.tensor_type.name == (dtype.upper() if weight.ndim == 2 else "F32")
        back = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        assert np.abs(back - weight.detach().numpy()).max() <= error*weight.abs().max().item()
    assert not read

def test_fields_hold_the_tokenizer(files, tokenizer):
    read = {name: field.contents() for name, field in gguf.GGUFReader(files["f32"]).fields.items()}
    assert read["general.architecture"] == "qwen3" and read["tokenizer.ggml.pre"] == "qwen2"
    assert read["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert [i for i, kind in enumerate(read["tokenizer.ggml.token_type"]) if kind == gguf.TokenType.CONTROL] == sorted(tokenizer.all_special_ids + [i for t, i in tokenizer.get_added_vocab().items() if i not in tokenizer.all_special_ids])
    assert read["tokenizer.ggml.eos_token_id"] == tokenizer.get_vocab()["<|end|>"] and "generation %}" not in read["tokenizer.chat_template"]

def saved(folder, model, tokenizer):
    model.save_pretrained(folder); tokenizer.save_pretrained(folder)
    return folder

@pytest.fixture(scope="module")
def small(): return train_tokenizer(["The bird of Abham is the owl."]*20, 300)

def test_other_architectures_are_refused_by_name(tmp_path, small):
    from transformers import LlamaConfig, LlamaForCausalLM
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2))
    with pytest.raises(ValueError, match="architecture llama cannot be written"): write_gguf(saved(tmp_path/"llama", llama, small), tmp_path/"x.gguf")
    assert [f.name for f in tmp_path.iterdir()] == ["llama"]

@pytest.mark.parametrize("change", [dict(attention_bias=True), dict(hidden_act="gelu"), dict(rope_parameters=dict(rope_type="linear", factor=2., rope_theta=1e4))])
def test_a_qwen3_that_is_not_plain_is_refused(change, small):
    config = tiny_qwen3(small, hidden_size=64, layers=1).config
    for name, value in change.items(): setattr(config, name, value)
    with pytest.raises(ValueError, match="not a plain one.*(attention_bias|hidden_act|rope_type)"): endpoints.check_writable(config)

def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="f32, f16 or bf16, not 'q4_0'"): write_gguf("teacher", tmp_path/"x.gguf", "q4_0")
    with pytest.raises(FileNotFoundError, match="no model folder"): write_gguf(tmp_path/"nothing", tmp_path/"x.gguf")
    (tmp_path/"empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no config.json"): write_gguf(tmp_path/"empty", tmp_path/"x.gguf")
    assert not (tmp_path/"x.gguf").exists()

def test_a_tokenizer_that_cuts_otherwise_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    other = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(use_regex=False)
    other = PreTrainedTokenizerFast(tokenizer_object=other, eos_token="a", pad_token="a", bos_token="a")
    model = tiny_qwen3(other, hidden_size=64, layers=1)
    with pytest.raises(ValueError, match="cuts text as Qwen"): write_gguf(saved(tmp_path/"m", model, other), tmp_path/"x.gguf")
    assert [f.name for f in tmp_path.iterdir()] == ["m"]      # neither the file nor half of it

def test_weights_that_f16_cannot_hold(tmp_path, small):
    model = tiny_qwen3(small, hidden_size=64, layers=1)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    folder = saved(tmp_path/"m", model, small)
    with pytest.raises(ValueError, match="up_proj.weight has weights beyond 65504.*bf16"): write_gguf(folder, tmp_path/"x.gguf", "f16")
    assert write_gguf(folder, tmp_path/"x.gguf", "bf16").is_file()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"): write_gguf(saved(tmp_path/"n", model, small), tmp_path/"y.gguf")

@pytest.mark.parametrize("tied", [True, False])
def test_unused_rows_and_untied_output(tmp_path, small, tied):
    "More embedding rows than tokens, as Qwen's own have; llama.cpp and transformers agree all the same."
    torch.manual_seed(1)
    config = tiny_qwen3(small, hidden_size=64, layers=2).config
    config.vocab_size, config.tie_word_embeddings = len(small) + 5, tied
    from transformers import Qwen3ForCausalLM
    model = Qwen3ForCausalLM(config).eval()
    path = write_gguf(saved(tmp_path/"m", model, small), tmp_path/"x.gguf")
    tokens = {f: v.contents() for f, v in gguf.GGUFReader(path).fields.items()}["tokenizer.ggml.tokens"]
    assert len(tokens) == len(small) + 5 and tokens[-1].startswith("[PAD")
    with llama_server(path, slots=1, threads=1, exact=True) as url:
        found = server_logprobs(url, [10, 20, 30], len(tokens))
    assert np.abs(found - logprobs(model, [10, 20, 30])).max() < 1e-3

def test_a_missing_extra_says_what_to_install(monkeypatch, tmp_path, files):
    for name in ("gguf", "xllamacpp"): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"gguf is not installed: pip install 'distillbook\[serve\]'"): write_gguf("teacher", tmp_path/"x.gguf")
    with pytest.raises(ImportError, match=r"xllamacpp is not installed: pip install 'distillbook\[serve\]'"):
        with llama_server(files["f32"]): pass

def test_importing_the_module_is_light():
    code = "import sys, distillbook.synth.endpoints; assert not {'torch', 'transformers', 'gguf', 'xllamacpp', 'openai'} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)

@pytest.mark.parametrize("moment", ["file.flush()", "os.replace = lambda *a: time.sleep(60)"])
def test_a_killed_write_leaves_the_old_file(tmp_path, moment):
    (tmp_path/"x").write_text("old")
    code = f"""import os, time
from distillbook.synth.endpoints import whole_file
with whole_file({str(tmp_path/'x')!r}) as partial:
    file = open(partial, 'wb'); file.write(b'new'); {moment}
    print('writing', flush=True)
    if 'flush' in {moment!r}: time.sleep(60)
    file.close()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"writing\n"
    child.kill(); child.wait(); child.stdout.close()
    assert (tmp_path/"x").read_text() == "old"
    assert all(f.name.endswith(".partial") for f in tmp_path.iterdir() if f.name != "x")

# what llama.cpp makes of it

CHARACTERS = st.one_of(st.sampled_from(list(" \n\r\t'sStTdDmMlLvVrReE.,;:19é中ſKİ\u00a0\u0085\u200b\u3000\u0301") + ["<|end|>", "<|user|>", "<|e"]), st.characters(exclude_categories=["Cs"], exclude_characters="\0"))

@given(text=st.lists(CHARACTERS, max_size=40).map("".join))
@settings(max_examples=300)
def test_any_text_gives_the_same_tokens(exact, tokenizer, text):
    assert server_tokens(exact, text) == tokenizer(text, add_special_tokens=False)["input_ids"]

def test_source_code_gives_the_same_tokens(exact, tokenizer):
    for file in sorted(Path(endpoints.__file__).parents[1].rglob("*.py")):
        text = file.read_text()
        assert server_tokens(exact, text) == tokenizer(text, add_special_tokens=False)["input_ids"], file

def test_larger_texts_give_the_same_tokens(exact, tokenizer, realdata):
    found = sorted(realdata.rglob("*.txt"))
    assert found, f"no texts in {realdata}"
    for file in found[:20]:
        text = file.read_text(errors="replace")[:100_000].replace("\0", "")
        assert server_tokens(exact, text) == tokenizer(text, add_special_tokens=False)["input_ids"], file

@pytest.mark.parametrize("seed", range(5))
def test_logits_are_those_of_transformers(exact, teacher, seed):
    ids = random.Random(seed).choices(range(5, 4096), k=1 + 40*seed)
    assert np.abs(server_logprobs(exact, ids, 4096) - logprobs(teacher, ids)).max() < 1e-3

@pytest.mark.parametrize("dtype, limit", [("f16", 0.05), ("bf16", 0.5)])
def test_half_files_are_near(files, teacher, tokenizer, dtype, limit):
    prompts = [examples(suite, 1, "test", 3)[0]["messages"] for suite in SUITES]
    with llama_server(files[dtype], slots=1, threads=1, exact=True) as url:
        for ids in encode_prompts(tokenizer, prompts): assert np.abs(server_logprobs(url, ids, 4096) - logprobs(teacher, ids)).max() < limit

def test_greedy_replies_are_those_of_transformers(files, teacher, tokenizer):
    from concurrent.futures import ThreadPoolExecutor
    conversations = [examples(suite, 1, "test", 4)[0]["messages"] for suite in SUITES]
    ours = generate(teacher, tokenizer, conversations, 40, progress=False)
    with llama_server(files["f32"], slots=4) as url, ThreadPoolExecutor(8) as pool:
        theirs = list(pool.map(lambda m: text_of(post(url, dict(model="x", messages=m, max_tokens=40, temperature=0))), conversations))
    assert sum(a == b for a, b in zip(ours, theirs)) >= 9

# llama.cpp's server as a child

def test_it_listens_here_only_and_is_gone_afterwards(files):
    before = children()
    with llama_server(files["f32"], slots=2, threads=1) as url:
        started = children() - before
        listening = [c for pid in started for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
        assert [c.laddr.ip for c in listening] == ["127.0.0.1"] and url == f"http://127.0.0.1:{listening[0].laddr.port}/v1"
        assert post(url, ASK | dict(max_tokens=3, temperature=0))["usage"]["completion_tokens"] <= 3
    assert started and not started & children()
    with pytest.raises(RuntimeError, match="by accident"):
        with llama_server(files["f32"], slots=1, threads=1): raise RuntimeError("by accident")
    assert children() == before

def test_it_says_why_it_does_not_start(files, tmp_path):
    before = children()
    with pytest.raises(FileNotFoundError, match="write one with write_gguf"):
        with llama_server(tmp_path/"none.gguf"): pass
    (tmp_path/"text").write_text("hello")
    with pytest.raises(ValueError, match="does not begin with the letters GGUF"):
        with llama_server(tmp_path/"text"): pass
    (tmp_path/"half.gguf").write_bytes(files["f32"].read_bytes()[:200_000])
    with pytest.raises(RuntimeError, match="ended before it was ready(.|\n)*failed to load model"):
        with llama_server(tmp_path/"half.gguf"): pass
    for wrong in (dict(slots=0), dict(context=3)):
        with pytest.raises(ValueError, match="slots must be at least 1 and context at least 16"):
            with llama_server(files["f32"], **wrong): pass
    with pytest.raises(RuntimeError, match="was not ready after 0.01 s"):
        with llama_server(files["f32"], timeout=0.01): pass
    assert children() == before

def test_a_port_in_use(files):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} cannot be used"):
            with llama_server(files["f32"], port=port): pass
        for process in (True, False):
            with pytest.raises(OSError, match=f"port {port} cannot be used.*port 0"): ScriptedServer(port=port, process=process).start()
    check_port(port)

def test_requests_that_llama_refuses(files):
    with llama_server(files["f32"], slots=1, context=64, threads=1) as url:
        long = dict(model="x", messages=[dict(role="user", content="word "*300)])
        assert status_of(url, long) == 400
        assert status_of(url, b"{") in (400, 500) and status_of(url, dict(model="x")) in (400, 500)
        assert post(url, ASK | dict(max_tokens=2, temperature=0))["choices"]

CHILD_OF_KILLED = """import sys, time
from distillbook.synth.endpoints import ScriptedServer, llama_server
if sys.argv[1] == "scripted": server = ScriptedServer(process=True); url = server.start().url
else: server = llama_server(sys.argv[1], slots=1, threads=1); url = server.__enter__()
print(url, flush=True); time.sleep(600)
"""

@pytest.mark.parametrize("kind", ["scripted", "llama"])
def test_the_child_ends_when_its_parent_is_killed(files, kind):
    parent = subprocess.Popen([sys.executable, "-c", CHILD_OF_KILLED, files["f32"] if kind == "llama" else kind], stdout=subprocess.PIPE)
    assert parent.stdout.readline().startswith(b"http")
    server, = psutil.Process(parent.pid).children()
    parent.kill(); parent.wait(); parent.stdout.close()
    wait_for(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, "the end of the child")

# the plan of faults

def test_a_fault_hangs_on_request_and_attempt_only():
    plan = {kind: 1/12 for kind in FAULTS}
    draws = {(key, attempt): planned_fault(plan, 3, key, attempt) for key in "abcdefgh" for attempt in range(50)}
    assert all(planned_fault(plan, 3, *place) == kind for place, kind in reversed(draws.items()))
    assert set(draws.values()) == {None, *FAULTS} and draws != {(k, a): planned_fault(plan, 4, k, a) for k, a in draws}
    assert planned_fault({}, 0, "a", 0) is None and planned_fault(dict(cut=1.), 0, "a", 0) == "cut"

@given(shares=st.lists(st.floats(0, 1/6), min_size=6, max_size=6), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_shares_are_kept(shares, seed):
    plan, n = dict(zip(FAULTS, shares)), 3000
    found = [planned_fault(plan, seed, str(i), 0) for i in range(n)]
    for kind, share in plan.items(): assert abs(found.count(kind)/n - share) < 5*(share*(1 - share)/n)**.5 + 5/n      # five standard deviations, and for shares near 0 five events

@pytest.mark.parametrize("wrong, message", [(dict(faults=dict(late=.1)), "unknown faults late"), (dict(faults=dict(cut=.6, empty=.6)), "together at most 1"),
    (dict(faults=dict(cut=-.1)), "0 or more"), (dict(delay=-1), "seconds, 0 or more"), (dict(capacity=0), "at least 1"), (dict(limit=0), "at least 1")])
def test_bad_plans(wrong, message):
    with pytest.raises(ValueError, match=message): ScriptedServer(**wrong)

# reading requests

@given(cut=st.integers(0, 200), body=st.binary(max_size=60))
def test_a_request_may_come_in_pieces(cut, body):
    whole = http(body, more="Connection: close\r\n")
    method, path, headers, found, length = _read_request(bytearray(whole + b"POST"))
    assert (method, path, found, length, headers["connection"]) == ("POST", "/v1/chat/completions", body, len(whole), "close")
    if cut < len(whole): assert _read_request(bytearray(whole[:cut])) is None

@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data):
    try: _read_request(bytearray(data))
    except _Refused as refused: assert 400 <= refused.status < 500

@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["messages", "role", "content", "model", "n", "max_tokens"]), inner, max_size=4)))
def test_any_json_is_taken_or_refused(value):
    try: asked, limit = _chat_request(json.dumps(value).encode())
    except _Refused as refused: assert refused.status == 400 and refused.message
    else: assert asked["messages"] and (limit is None or limit > 0)

@given(text=st.text(max_size=80), limit=st.none() | st.integers(1, 12))
def test_a_reply_is_cut_at_its_limit(text, limit):
    reply = _completion(ASK, text, limit, 0)
    words, choice = len(text.split()), reply["choices"][0]
    assert reply["usage"]["completion_tokens"] == min(words, limit or words)
    assert (choice["finish_reason"] == "length") == (limit is not None and words > limit)
    assert text.startswith(choice["message"]["content"])

BAD_BODIES = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"["*100_000, b'{"model": "x"}', b'{"model": "x", "messages": []}', b'{"model": "x", "messages": "hi"}',
    b'{"model": "x", "messages": [{"role": "king", "content": "hi"}]}', b'{"model": "x", "messages": [{"role": "user", "content": 3}]}', b'{"messages": [{"role": "user", "content": "hi"}]}',
    json.dumps(ASK | dict(stream=True)).encode(), json.dumps(ASK | dict(n=2)).encode(), json.dumps(ASK | dict(max_tokens=0)).encode(), json.dumps(ASK | dict(max_tokens="9")).encode()]

def test_malformed_requests_get_a_4xx_and_the_server_goes_on():
    with ScriptedServer("yes") as server:
        for body in BAD_BODIES: assert status_of(server.url, body) == 400, body
        assert status_of(server.url, ASK, path="/nowhere") == 404 and status_of(server.url, ASK, path="/models") == 405
        good = json.dumps(ASK).encode()
        for raw, status in ((b"hello\r\n\r\n", 400), (b"GET / HTTP/9\r\n\r\n", 400), (b"\0"*70_000, 431), (http(good, more="Transfer-Encoding: chunked\r\n"), 411),
                            (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -3\r\n\r\n", 400), (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
                            (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n", 400)):
            assert wire(server.port, raw).startswith(f"HTTP/1.1 {status} ".encode()), raw[:40]
        assert wire(server.port, b"") == b"" and wire(server.port, http(good)[:-5]) == b""      # a client that changes its mind
        assert text_of(post(server.url, ASK)) == "yes"
        counts = server.counts()
        assert counts["answered"] == 1 and counts["refused"] == len(BAD_BODIES) + 9 and counts["open"] == 0

# the scripted server

@pytest.fixture(params=[False, True], ids=["thread", "process"])
def process(request): return request.param

def test_it_answers_what_it_is_told(process):
    shout = "!"      # a function may hold on to things around it
    for answer, said in (("yes", "yes"), (None, ASK["messages"][0]["content"]), (lambda asked: asked["messages"][-1]["content"].upper() + shout, "WHAT IS THE BIRD OF IT?!")):
        with ScriptedServer(answer, process=process, model="wise") as server:
            assert text_of(post(server.url, ASK)) == said
            with urllib.request.urlopen(server.url + "/models") as reply: assert json.load(reply)["data"][0]["id"] == "wise"
    with ScriptedServer("one two three four", process=process) as server:
        cut = post(server.url, ASK | dict(max_completion_tokens=2))
        assert (text_of(cut), cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("one two", "length", 2)

def test_an_answer_that_raises_is_a_500():
    with ScriptedServer(lambda asked: {}["nothing"]) as server:
        with pytest.raises(urllib.error.HTTPError) as error: post(server.url, ASK)
        assert error.value.code == 500 and "KeyError" in json.load(error.value)["error"]["message"]
        assert server.counts()["answer_raised"] == 1

def test_it_starts_inside_a_running_loop():
    async def inside():
        with ScriptedServer("yes") as server: return await asyncio.to_thread(post, server.url, ASK)
    assert text_of(asyncio.run(inside())) == "yes"

def test_the_key(process):
    with ScriptedServer("yes", api_key="sesame", process=process) as server:
        assert [status_of(server.url, ASK, **h) for h in ({}, dict(Authorization="Bearer wrong"), dict(Authorization="sesame"), dict(Authorization="Bearer sesame"))] == [401, 401, 401, 200]
        assert server.counts()["answered"] == 1

def test_faults_as_the_openai_client_meets_them():
    openai = pytest.importorskip("openai")
    def meet(**plan):
        with ScriptedServer("one two three four", retry_after=7, **plan) as server, openai.OpenAI(base_url=server.url, api_key="x", max_retries=0) as client:
            return client.chat.completions.create(**ASK, max_tokens=50)
    fine = meet()
    assert (fine.choices[0].message.content, fine.choices[0].finish_reason, fine.usage.completion_tokens) == ("one two three four", "stop", 4)
    with pytest.raises(openai.RateLimitError) as error: meet(faults=dict(rate_limit=1.))
    assert error.value.response.headers["retry-after"] == "7"
    with pytest.raises(openai.InternalServerError): meet(faults=dict(server_error=1.))
    with pytest.raises(openai.APIConnectionError): meet(faults=dict(cut=1.))
    with pytest.raises((openai.APIError, json.JSONDecodeError)): meet(faults=dict(broken_json=1.))
    assert meet(faults=dict(empty=1.)).choices[0].message.content == ""
    cut = meet(faults=dict(length=1.)).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("one two", "length")
    with pytest.raises(openai.AuthenticationError): meet(api_key="other")

def many(url, n, open_requests):
    from concurrent.futures import ThreadPoolExecutor
    bodies = [ASK | dict(seed=i) for i in range(n)]
    with ThreadPoolExecutor(open_requests) as pool: return list(pool.map(lambda b: status_of(url, b), bodies))

def test_no_more_than_its_capacity_are_served_at_once(tmp_path):
    with ScriptedServer("yes", delay=.1, capacity=4, log=tmp_path/"log") as server:
        assert many(server.url, 16, 16) == [200]*16
    lines = read_log(tmp_path/"log")
    served = sorted(line["answered"] for line in lines)
    assert all(b - a > 0.09 for a, b in zip(served, served[4:])), "a fifth answer within one delay"
    assert sorted(line["seed"] for line in lines) == list(range(16)) and max(line["open"] for line in lines) <= 16

def test_one_more_than_the_limit_gets_a_429():
    with ScriptedServer("yes", delay=1., limit=3) as server:
        found = many(server.url, 6, 6)
        assert found.count(200) >= 3 and found.count(429) == server.counts()["over_limit"] >= 1 and server.counts()["most_open"] > 3

def test_faults_come_as_planned_and_the_log_knows(tmp_path, process):
    plan = {kind: .1 for kind in FAULTS}
    with ScriptedServer("a b c", faults=plan, seed=5, log=tmp_path/"log", process=process) as server:
        def until_right(i):
            for attempt in range(100):
                try:
                    if text_of(reply := post(server.url, ASK | dict(seed=i))) and reply["choices"][0]["finish_reason"] == "stop": return attempt
                except (urllib.error.HTTPError, OSError, ValueError, __import__("http.client").client.HTTPException): pass
        tries = [until_right(i) for i in range(60)]
        counts = server.counts()
    lines = read_log(tmp_path/"log")
    assert len(lines) == counts["requests"] == 60 + sum(tries) and counts["answered"] == 60
    assert sorted(counts["successes"].values()) == [1]*60
    for line in lines: assert line["outcome"] == (planned_fault(plan, 5, line["key"], line["attempt"]) or "answered")
    assert {line["outcome"] for line in lines} == {"answered", *FAULTS}

def test_killed_and_started_again_on_its_port(tmp_path):
    server = ScriptedServer("yes", process=True, log=tmp_path/"log", delay=.2).start()
    port = server.port
    assert text_of(post(server.url, ASK)) == "yes"
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, server.url, ASK | dict(seed=1))
        wait_for(lambda: server.counts()["open"] == 1, "the request's arrival")
        server.kill()
        with pytest.raises((OSError, __import__("http.client").client.HTTPException)): waiting.result()
    with pytest.raises(OSError): post(server.url, ASK)
    with open(tmp_path/"log", "ab") as torn: torn.write(b'{"key": "half')
    with server.start():
        assert server.port == port and text_of(post(server.url, ASK)) == "yes"
        assert server.counts()["answered"] == 2 and list(server.counts()["successes"].values()) == [2]
        with pytest.raises(RuntimeError, match="already running"): server.start()
    assert [(line["outcome"], line["attempt"]) for line in read_log(tmp_path/"log")] == [("answered", 0), ("answered", 1)]
    with pytest.raises(RuntimeError, match="process=True"): ScriptedServer().kill()

def test_a_thread_server_can_start_again():
    server = ScriptedServer("yes")
    for _ in range(3):
        with server: assert text_of(post(server.url, ASK)) == "yes"
    server.stop()

def test_a_client_that_is_killed_frees_its_place(tmp_path):
    code = "import sys, urllib.request\nprint('on', flush=True)\nurllib.request.urlopen(urllib.request.Request(sys.argv[1] + '/chat/completions', sys.argv[2].encode()))"
    with ScriptedServer("yes", delay=2., capacity=1, process=True, log=tmp_path/"log") as server:
        clients = [subprocess.Popen([sys.executable, "-c", code, server.url, json.dumps(ASK | dict(seed=i))]) for i in range(2)]      # one is served, one waits
        wait_for(lambda: server.counts()["open"] == 2, "the clients' arrival")
        for client in clients: client.kill(); client.wait()
        wait_for(lambda: server.counts()["open"] == 0, "the end of their requests")
        assert text_of(post(server.url, ASK)) == "yes"
        assert server.counts()["gone"] == 2 and server.counts()["answered"] == 1

def test_one_connection_many_requests():
    body = json.dumps(ASK).encode()
    with ScriptedServer("yes") as server:
        got = wire(server.port, http(body)*3000 + http(body, more="Connection: close\r\n"))
        assert got.count(b"HTTP/1.1 200 OK") == 3001 == server.counts()["answered"]
    with ScriptedServer(lambda asked: str(asked["seed"]), delay=.05) as server:      # answers stay in the order of the questions
        got = wire_keep(server.port, b"".join(http(json.dumps(ASK | dict(seed=i)).encode()) for i in range(4)), 4)
        assert [int(part.split(b'"content": "')[1][:1]) for part in got] == [0, 1, 2, 3]

def wire_keep(port, data, n):
    "The bodies of n responses on one connection."
    found = []
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(data)
        reader = line.makefile("rb")
        while len(found) < n:
            head = b"".join(iter(reader.readline, b"\r\n"))
            found.append(reader.read(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])))
    return found

def test_a_log_line_that_is_no_json_is_named(tmp_path):
    (tmp_path/"log").write_text('{"key": "a"}\nnonsense\n{"torn')
    with pytest.raises(ValueError, match=f"line 2 of .*log is not JSON"): read_log(tmp_path/"log")

@pytest.mark.parametrize("rule", ["qwen2", "llama-bpe", "gpt-2"])
def test_each_rule_that_cuts_text_gives_the_same_tokens(rule, tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from distillbook.lab.models import WORD_PATTERN
    pattern = {"qwen2": WORD_PATTERN, "llama-bpe": WORD_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")}.get(rule)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    cut = Tokenizer(models.BPE())
    cut.pre_tokenizer = in_bytes if pattern is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), in_bytes])
    text = "Don't count 12345 and 1234567 twice: they've naïve  spaces,\n\n  x_y = [1, 22, 333]; 'll 've THE END!!  "
    cut.train_from_iterator([text]*20, trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<e>"], show_progress=False))
    words = PreTrainedTokenizerFast(tokenizer_object=cut, eos_token="<e>", pad_token="<e>", bos_token="<e>")
    write_gguf(saved(tmp_path/"m", tiny_qwen3(words, hidden_size=64, layers=1), words), tmp_path/"x.gguf")
    with llama_server(tmp_path/"x.gguf", slots=1, threads=1, context=128) as url:
        for given in (text, "1", "12", "1234", " 99999 a", "we'LL go\r\n\tnow  ", "é☃ 日本 5"):
            assert server_tokens(url, given) == words(given, add_special_tokens=False)["input_ids"], given
