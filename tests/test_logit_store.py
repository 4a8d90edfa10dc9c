"Chapter 22: logits on disk, and files of logits from elsewhere."
import json, math, random, signal, subprocess, sys, time
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from io import BytesIO
from conftest import ROOT, environment
from distillbook.distill.logit_kd import distill, random_student
from distillbook.distill.logit_store import (JsonReader, Layout, LogitFileError, LogitStore, StoreWriter, check_index_bits, check_logits, check_rest_kl, collate_store, decode,
    distill_from_store, encode, import_logits, keep_likeliest, store_loss, to_tokens, Told, write_store)
from distillbook.lab.exercises import problems
from distillbook.lab.models import load_model, load_tokenizer, tiny_qwen3, train_tokenizer

WORDS = train_tokenizer(["The fox sees the moon. The owl sees the fox. What does the owl see?"]*20, 300)
SIZE = len(WORDS)

def small(seed=0, layers=1, width=32):
    torch.manual_seed(seed)
    model = tiny_qwen3(WORDS, hidden_size=width, layers=layers, intermediate_size=32, heads=2, kv_heads=1, head_dim=16, context=128)
    with torch.no_grad(): model.get_output_embeddings().weight.mul_(30)      # opinions
    return model

TEACHER = small(7, 2, 48)
def row(n, seed): ids = torch.randint(5, SIZE, (n,), generator=torch.Generator().manual_seed(seed)); return dict(input_ids=ids, labels=ids.clone())
ROWS = [row(n, n) for n in (12, 30, 9, 25, 6, 17, 12, 28, 30, 11)]
for i in (1, 3): ROWS[i]["labels"][:7] = -100

# the loss

@given(st.integers(0, 10**6), st.sampled_from([1., 2., 4.]), st.integers(2, 40))
@settings(max_examples=30)
def test_with_all_tokens_it_is_the_dense_loss_and_with_fewer_never_more(seed, T, vocabulary):
    g = torch.Generator().manual_seed(seed)
    q, p = torch.randn(5, vocabulary, generator=g)*3, torch.randn(5, vocabulary, generator=g)*3
    dense = T**2*torch.nn.functional.kl_div((q/T).log_softmax(-1), (p/T).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    by_k = [store_loss(q, keep_likeliest(p, k, 0, T), T) for k in range(1, vocabulary + 1)]
    torch.testing.assert_close(by_k[-1], dense, atol=1e-4, rtol=1e-3)
    assert all((by_k[k] <= dense + 1e-3 + 1e-3*dense).all() for k in range(vocabulary)) and all((l > -1e-4).all() for l in by_k)

def test_a_teacher_with_all_its_mass_in_the_top_gives_a_finite_loss_and_gradient():
    logits = torch.tensor([[50., -500., -500., -500.]])
    for k in (1, 2, 4):
        student = torch.randn(1, 4, requires_grad=True)
        loss = store_loss(student, keep_likeliest(logits, k)).sum()
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(student.grad).all() and loss.item() == pytest.approx(-student.log_softmax(-1)[0, 0].item(), abs=1e-3)

def test_a_student_with_all_its_mass_in_the_top_gives_a_finite_loss():
    student = torch.tensor([[40., 40., -40., -40.]], requires_grad=True)
    loss = store_loss(student, keep_likeliest(torch.zeros(1, 4), 2)).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all() and loss > 10

def test_padding_columns_of_the_student_are_no_tokens():
    q, p = torch.randn(6, 20), torch.randn(6, 20)
    padded = torch.cat([q, torch.full((6, 5), 9.)], 1)
    torch.testing.assert_close(store_loss(padded, keep_likeliest(p, 5, 2), vocabulary=20), store_loss(q, keep_likeliest(p, 5, 2)))

def test_the_gradient_has_one_size_at_every_temperature():
    q, p, sizes = torch.randn(200, 50), torch.randn(200, 50), []
    for T in (1., 2., 4., 8.):
        student = q.clone().requires_grad_()
        store_loss(student, keep_likeliest(p, 20, 0, T), T).mean().backward()
        sizes.append(student.grad.norm().item())
    assert max(sizes) < 3*min(sizes)
    with pytest.raises(ValueError, match="temperature 0"): store_loss(q, keep_likeliest(p, 20), 0.)

# records

@given(st.integers(0, 10**6), st.sampled_from([1., 2.]))
@settings(max_examples=10)
def test_drawn_tokens_are_right_on_average(seed, T):
    g = torch.Generator().manual_seed(seed)
    q, p = torch.randn(3, 30, generator=g), torch.randn(3, 30, generator=g)
    dense = T**2*torch.nn.functional.kl_div((q/T).log_softmax(-1), (p/T).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    drawn = torch.stack([store_loss(q, keep_likeliest(p, 10, 4, T, s), T) for s in range(600)])
    assert ((drawn.mean(0) - dense).abs() < 5*drawn.std(0)/600**.5 + 1e-4).all()

def test_a_teacher_without_a_rest_can_be_drawn_from():
    logits = torch.tensor([[50., -500., -500., -500.]])
    told = keep_likeliest(logits, 3, 2)
    student = torch.randn(1, 4, requires_grad=True)
    loss = store_loss(student, told).sum()
    loss.backward()
    assert set(told.tail_ids[0].tolist()) <= {1, 2, 3} and torch.isfinite(student.grad).all() and loss.item() == pytest.approx(-student.log_softmax(-1)[0, 0].item(), abs=1e-3)

@pytest.mark.parametrize("k, tail", [(0, 0), (5, 5), (31, 0), (3, -1)])
def test_what_cannot_be_kept_is_refused(k, tail):
    with pytest.raises(ValueError, match="0 <= tail < k <= 30"): keep_likeliest(torch.zeros(2, 30), k, tail)

@given(st.data())
@settings(max_examples=60)
def test_a_record_keeps_ids_exactly_and_probabilities_nearly(data):
    vocabulary = data.draw(st.integers(2, 3000)); k = data.draw(st.integers(1, min(vocabulary, 60))); bits = data.draw(st.integers(1, 12))
    tail = data.draw(st.integers(0, k - 1)) if k < vocabulary else 0
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))*data.draw(st.floats(0.1, 6))
    told, layout = keep_likeliest(logits, k, tail), Layout(vocabulary, k, bits, tail)
    records = encode(told, layout)
    again = decode(records, layout)
    assert records.shape == (4, layout.size) and torch.equal(again.top_ids, told.top_ids) and torch.equal(again.tail_ids, told.tail_ids)
    torch.testing.assert_close(again.log_probs.exp().sum(1) + again.log_rest.exp(), torch.ones(4), atol=2e-3, rtol=0)
    relative = lambda x: x - x.max(1, keepdim=True).values
    step = -relative(told.log_probs).min(1).values/(2**bits - 1)
    assert ((relative(again.log_probs) - relative(told.log_probs)).abs().max(1).values <= step/2*1.02 + .03).all()

@pytest.mark.parametrize("vocabulary, k, bits, tail, limit", [(128_256, 50, 4, 10, 115), (128_256, 50, 4, 0, 115), (128_256, 128, 8, 20, 330)])
def test_bytes_at_a_large_vocabulary(tmp_path, vocabulary, k, bits, tail, limit):
    rng, top = np.random.default_rng(0), k - tail
    ids = np.stack([np.sort(rng.choice(vocabulary, top, replace=False)) for _ in range(20)])
    ids[0], ids[1] = np.arange(top), np.arange(vocabulary - top, vocabulary)      # both ends
    drawn = np.sort(rng.integers(0, vocabulary, (20, tail)), 1)
    if tail: drawn[0], drawn[1] = 0, vocabulary - 1                               # one word again and again
    logp, layout = np.log(rng.dirichlet(np.ones(top), 20)*.9 + 1e-9).astype(np.float32), Layout(vocabulary, k, bits, tail)
    encode(Told(ids, logp, np.full(20, math.log(.1), np.float32), drawn, np.full(20, -9.)), layout).tofile(tmp_path/"r")
    again = decode(np.fromfile(tmp_path/"r", np.uint8).reshape(20, -1), layout)
    assert (tmp_path/"r").stat().st_size/20 <= limit and (again.top_ids.numpy() == ids).all() and (again.tail_ids.numpy() == drawn).all()

@pytest.mark.parametrize("vocabulary, k, bits, says", [(10, 0, 4, "k = 0"), (10, 11, 4, "k = 11"), (10, 5, 0, "bits = 0"), (10, 5, 17, "bits = 17")])
def test_layouts_that_cannot_be(vocabulary, k, bits, says):
    with pytest.raises(ValueError, match=says): Layout(vocabulary, k, bits)

def test_more_bits_cost_less_error():
    told = keep_likeliest(torch.randn(60, 400)*3, 50)
    def error(bits): return (told.log_probs.exp()*(told.log_probs - decode(encode(told, Layout(400, 50, bits)), Layout(400, 50, bits)).log_probs)).sum(-1).mean().item()
    assert error(2) > error(4) > error(8) > -1e-3

# the store

def test_a_store_gives_back_what_the_teacher_said(tmp_path):
    store = write_store(tmp_path/"s", TEACHER, WORDS, ROWS, k=20, bits=10, tail=5, batch_size=4, shard_rows=4, progress=False)
    assert len(store) == len(ROWS) and len(store.about["shards"]) == 3
    for i in (0, 3, 9, -1):
        found, given_ = store[i], ROWS[i]
        keep = given_["labels"][1:] != -100
        with torch.no_grad(): true = TEACHER(given_["input_ids"][None]).logits[0, :-1][keep]
        told = keep_likeliest(true, 20, 5, seed=i % len(ROWS))
        assert found["input_ids"].tolist() == given_["input_ids"].tolist() and found["labels"].tolist() == given_["labels"].tolist() and found["top_ids"].tolist() == told.top_ids.tolist() and found["tail_ids"].tolist() == told.tail_ids.tolist()
        for name in ("log_probs", "log_rest", "tail_log"): torch.testing.assert_close(found[name], getattr(told, name), atol=.03, rtol=.02)
    with pytest.raises(IndexError): store[10]

def test_packed_rows_are_refused_before_anything_is_written(tmp_path):
    packed = [dict(r, position_ids=torch.arange(len(r["input_ids"]))) for r in ROWS[:2]]
    with pytest.raises(ValueError, match="is packed"): write_store(tmp_path/"s", TEACHER, WORDS, packed, k=5, progress=False)
    assert len(LogitStore(tmp_path/"s")) == 0

@pytest.mark.parametrize("dense", ["float16", "float32"])
def test_a_dense_store_is_exact(tmp_path, dense):
    store = write_store(tmp_path/"s", TEACHER, WORDS, ROWS[:3], dense=dense, temperature=2., batch_size=1, shard_rows=2, progress=False)
    with torch.no_grad(): true = (TEACHER(ROWS[0]["input_ids"][None]).logits[0, :-1]/2).log_softmax(-1)
    torch.testing.assert_close(store[0]["log_probs"], true, atol=1e-2 if dense == "float16" else 1e-5, rtol=1e-3)
    assert "top_ids" not in store[0] and store.bytes_per_token == SIZE*np.dtype(dense).itemsize

def test_other_settings_are_another_store(tmp_path):
    write_store(tmp_path/"s", TEACHER, WORDS, ROWS[:2], k=5, batch_size=1, shard_rows=1, progress=False)
    for change, says in ((dict(k=6), "k was 5, is 6"), (dict(tail=2), "tail was 4, is 2"), (dict(temperature=2.), "temperature was 1.0"), (dict(dense="float16"), "dense was None")):
        with pytest.raises(ValueError, match=says): write_store(tmp_path/"s", TEACHER, WORDS, ROWS[:2], **(dict(k=5) | change), progress=False)
    with pytest.raises(ValueError, match="teacher was"): write_store(tmp_path/"s", small(8), WORDS, ROWS[:2], k=5, progress=False)
    with pytest.raises(ValueError, match="no multiple"): write_store(tmp_path/"t", TEACHER, WORDS, ROWS, batch_size=3, shard_rows=4)
    with pytest.raises(ValueError, match="3 arrays of logits for 11 tokens"): StoreWriter(tmp_path/"u", WORDS, k=5).append(ROWS[0]["input_ids"], ROWS[0]["labels"], torch.zeros(3, SIZE))

def test_damage_is_named(tmp_path):
    store = write_store(tmp_path/"s", TEACHER, WORDS, ROWS, k=5, batch_size=4, shard_rows=4, progress=False)
    for name in ("00001.records", "00001.index.npz"):
        whole = (tmp_path/"s"/name).read_bytes()
        (tmp_path/"s"/name).write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
        assert LogitStore(tmp_path/"s")[0]["input_ids"].tolist() == ROWS[0]["input_ids"].tolist()      # another shard
        with pytest.raises(ValueError, match=name): LogitStore(tmp_path/"s")[5]
        (tmp_path/"s"/name).unlink()
        with pytest.raises(ValueError, match=name): LogitStore(tmp_path/"s")[5]
        (tmp_path/"s"/name).write_bytes(whole)
    (tmp_path/"s"/"store.json").write_text("{")
    with pytest.raises(FileNotFoundError, match="no store of logits"): LogitStore(tmp_path/"s")
    other = train_tokenizer(["Other words."]*9, 290)
    with pytest.raises(ValueError, match="another vocabulary"): store.check(other)

CHILD = """
import sys, torch; sys.path.insert(0, {tests!r}); torch.set_num_threads(1)
from test_logit_store import *
rows, real = ROWS*12, StoreWriter.append
def slow(self, *parts): time.sleep(.004); return real(self, *parts)
StoreWriter.append = slow
print("go", flush=True)
write_store({folder!r}, TEACHER, WORDS, rows, k=8, batch_size=2, shard_rows=4, progress=False)
"""
def test_a_killed_writer_goes_on_and_ends_with_the_same_bytes(tmp_path):
    write_store(tmp_path/"whole", TEACHER, WORDS, ROWS*12, k=8, batch_size=2, shard_rows=4, progress=False)
    code, kills, rng = CHILD.format(tests=str(ROOT/"tests"), folder=str(tmp_path/"killed")), 0, random.Random(0)
    for _ in range(9):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
        assert child.stdout.readline().strip() == b"go"
        if kills < 2:
            time.sleep(rng.uniform(.05, .25)); child.send_signal(signal.SIGKILL)
        child.stdout.close()
        if child.wait(timeout=120) == 0: break
        kills += 1
    assert kills >= 1
    whole, killed = LogitStore(tmp_path/"whole"), LogitStore(tmp_path/"killed")
    assert [s["records_sha256"] for s in killed.about["shards"]] == [s["records_sha256"] for s in whole.about["shards"]] and len(killed) == len(ROWS)*12

# training

def step_from(source, batch_size=4, accumulation=1, alpha=0.):
    student = small(1)
    before = student.get_output_embeddings().weight.detach().clone()
    plain = dict(learning_rate=1., batch_size=batch_size, accumulation=accumulation, warmup=0, precision="float32", progress=False, arguments=dict(optim="sgd", max_grad_norm=0., weight_decay=0., lr_scheduler_type="constant"))
    if isinstance(source, LogitStore): distill_from_store(student, source, WORDS, 1, alpha=alpha, **plain)
    else: distill(student, TEACHER, source, None, 1, tokenizer=WORDS, teacher_tokenizer=WORDS, kind="hybrid", alpha=alpha, temperature=1., fused=False, **plain)
    return before - student.get_output_embeddings().weight.detach()

@pytest.mark.parametrize("alpha", [0., 0.4])
def test_from_a_dense_store_the_gradient_is_that_of_the_live_teacher(tmp_path, alpha):
    store = write_store(tmp_path/"s", TEACHER, WORDS, ROWS[:8], dense="float32", batch_size=1, shard_rows=8, progress=False)
    torch.testing.assert_close(step_from(store, 8, alpha=alpha), step_from([{k: v.tolist() for k, v in r.items()} for r in ROWS[:8]], 8, alpha=alpha), atol=1e-4, rtol=1e-3)

def test_accumulation_does_not_change_the_gradient(tmp_path):
    store = write_store(tmp_path/"s", TEACHER, WORDS, ROWS[:8], k=10, bits=8, progress=False)
    torch.testing.assert_close(step_from(store, 8, 1), step_from(store, 1, 8), atol=1e-5, rtol=1e-3)

def test_a_store_at_another_temperature_is_refused(tmp_path):
    store = write_store(tmp_path/"s", TEACHER, WORDS, ROWS[:4], k=10, temperature=2., progress=False)
    with pytest.raises(ValueError, match="written at temperature 2, not 1"): store.check(WORDS, 1.)
    distill_from_store(small(1), store, WORDS, 1, batch_size=2, progress=False)

def test_a_killed_training_goes_on(tmp_path):
    store = write_store(tmp_path/"s", TEACHER, WORDS, ROWS, k=10, progress=False)
    whole, part = small(1), small(1)
    distill_from_store(whole, store, WORDS, 8, batch_size=2, progress=False)
    class Stop(Exception): pass
    import transformers
    class At(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5: raise Stop
    with pytest.raises(Stop): distill_from_store(part, store, WORDS, 8, tmp_path/"c", batch_size=2, save_steps=4, progress=False, callbacks=[At()])
    again = small(1)
    history = distill_from_store(again, store, WORDS, 8, tmp_path/"c", batch_size=2, save_steps=4, progress=False)
    assert history["resumed_from"] == 4
    torch.testing.assert_close(again.get_output_embeddings().weight, whole.get_output_embeddings().weight, atol=1e-5, rtol=1e-4)

def test_reading_is_faster_than_training():
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        words, teacher = load_tokenizer("base"), load_model("base")
        ids = [torch.randint(5, 4000, (128,)) for _ in range(8)]
        store = write_store(folder, teacher, words, [dict(input_ids=i, labels=i) for i in ids], k=50, bits=4, batch_size=8, shard_rows=8, progress=False)
        pupil, ratios = random_student("tiny", words), []
        for turn in range(5):
            start = time.perf_counter()
            batch = collate_store([store[i] for i in range(8)])
            between = time.perf_counter()
            logits = pupil(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            store_loss(logits, Told(*[batch[name] for name in Told._fields])).mean().backward()
            ratios.append((time.perf_counter() - between)/(between - start))
        assert sorted(ratios)[2] > 5      # ten and more on a quiet machine: the chapter measures it

@pytest.mark.parametrize("k, bits, tail, most_classes", [(50, 4, 10, .02), (128, 8, 20, .002)])
def test_error_on_a_real_model_of_stories(realdata, k, bits, tail, most_classes):
    place = realdata/"models"/"stories260K"/"hf"
    words, model = load_tokenizer(place), load_model(place)
    text = (realdata/"text"/"tinystories.txt").read_text(encoding="utf-8")[:3000]
    with torch.no_grad(): logits = model(torch.tensor([words(text)["input_ids"][:400]])).logits[0]
    told, layout = keep_likeliest(logits, k, tail), Layout(logits.shape[1], k, bits, tail)
    again = decode(encode(told, layout), layout)
    classes = ((told.log_probs.exp()*(told.log_probs - again.log_probs)).sum(-1) + told.log_rest.exp()*(told.log_rest - again.log_rest)).mean().item()
    dense = logits.log_softmax(-1)
    spread = (again.log_rest - math.log(logits.shape[1] - k + tail))[:, None].expand_as(dense).scatter(-1, again.top_ids, again.log_probs)
    whole = (dense.exp()*(dense - spread)).sum(-1).mean().item()
    print(f"stories260K, k = {k}: {layout.size} bytes a token, KL {whole:.5f} nats, in classes {classes:.6f}")
    assert 0 <= classes < most_classes and classes - 1e-3 <= whole < .15

# JSON

@given(st.recursive(st.none() | st.booleans() | st.integers(-10**6, 10**6) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=4), max_leaves=12), st.integers(1, 40))
@settings(max_examples=150)
def test_the_reader_reads_what_json_writes_at_every_seam(value, window):
    text = json.dumps([value], indent=random.choice([None, 1])).encode()
    assert JsonReader(BytesIO(text), window).value() == [value]

@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=20), st.integers(1, 30))
@settings(max_examples=80)
def test_numbers_come_as_they_were_written(values, window):
    found = JsonReader(BytesIO(json.dumps(values).encode()), window).numbers()
    np.testing.assert_array_equal(found, np.array(values, float))

# files from elsewhere

PROMPT, RESPONSE = "<BOS><start_id>user<end_id>\nWhat does the owl see?<eot_id><start_id>assistant<end_id>\n", "The fox.<EOS>"
IDS = to_tokens(RESPONSE, WORDS)
def whole_entry(seed=0): return dict(prompt=PROMPT, response=RESPONSE, logits=torch.randn(len(IDS), SIZE, generator=torch.Generator().manual_seed(seed)).mul(2).tolist())
def top_entry(seed=0, n=6):
    best = torch.tensor(whole_entry(seed)["logits"]).log_softmax(-1).topk(n)
    return dict(prompt=PROMPT, response=RESPONSE, logits=best.values.tolist(), tokenID=best.indices.tolist(), token=[[WORDS.decode([i]) for i in r] for r in best.indices.tolist()])

def spoil(make, change):
    def spoilt():
        entries = [make(0), make(1), make(2)]
        change(entries[1])
        return json.dumps(entries)
    return spoilt
def put(*path, value):
    def change(entry):
        for key in path[:-1]: entry = entry[key]
        entry[path[-1]] = value
    return change
def drop(*path):
    def change(entry):
        for key in path[:-1]: entry = entry[key]
        del entry[path[-1]]
    return change
def cut(text, share): return text[:int(len(text)*share)]

MALFORMED = {      # name: (what writes the file, entry, what is said)
    "one array too few": (spoil(whole_entry, drop("logits", 1)), 1, rf"logits: {len(IDS)-1} arrays for a response of {len(IDS)} tokens"),
    "one array too many": (spoil(whole_entry, lambda e: e["logits"].append(e["logits"][0])), 1, rf"logits: {len(IDS)+1} arrays for a response of {len(IDS)} tokens"),
    "NaN": (spoil(whole_entry, put("logits", 2, 5, value=math.nan)), 1, r"logits\[2\] holds nan at place 5"),
    "infinity": (spoil(whole_entry, put("logits", 1, 0, value=math.inf)), 1, r"logits\[1\] holds inf at place 0"),
    "minus infinity": (spoil(top_entry, put("logits", 0, 3, value=-math.inf)), 1, r"logits\[0\] holds -inf at place 3"),
    "null": (spoil(whole_entry, put("logits", 0, 3, value=None)), 1, r"logits\[0\] holds nan at place 3"),
    "a word among the numbers": (spoil(whole_entry, put("logits", 0, 3, value="high")), 1, r"logits\[0\] is no list of numbers"),
    "a number in the place of an array": (spoil(whole_entry, put("logits", 1, value=3.5)), 1, r"logits\[1\] is no list of numbers"),
    "nested once too deep": (spoil(whole_entry, put("logits", 0, value=[[1., 2.]])), 1, r"logits\[0\] is no list of numbers"),
    "an empty array": (spoil(whole_entry, put("logits", 0, value=[])), 1, r"logits\[0\] is empty"),
    "logits of another vocabulary": (spoil(whole_entry, put("logits", 0, value=[0.]*(SIZE + 7))), 1, rf"logits\[0\] has {SIZE+7} numbers for a vocabulary of {SIZE}"),
    "the likeliest without ids": (spoil(top_entry, drop("tokenID")), 1, r"logits\[0\] has 6 numbers for a vocabulary"),
    "logits is no list": (spoil(whole_entry, put("logits", value="none")), 1, "logits is str, not a list of arrays"),
    "no response": (spoil(whole_entry, drop("response")), 1, "no key 'response'"),
    "no prompt": (spoil(whole_entry, drop("prompt")), 1, "no key 'prompt'"),
    "no logits": (spoil(whole_entry, drop("logits")), 1, "no key 'logits'"),
    "an empty response": (spoil(whole_entry, put("response", value=" ")), 1, "the response is empty"),
    "a response that is a list": (spoil(whole_entry, put("response", value=["The fox."])), 1, "response is list, not a string"),
    "an unknown special token": (spoil(whole_entry, put("prompt", value=PROMPT + "<pad_id>")), 1, "the special token <pad_id> is unknown"),
    "ids of another vocabulary": (spoil(top_entry, put("tokenID", 2, 1, value=128000)), 1, r"tokenID\[2\] holds 128000, and the vocabulary has 0 to"),
    "one id too few": (spoil(top_entry, drop("tokenID", 1, 0)), 1, r"tokenID\[1\] has 5 ids for 6 logits"),
    "one array of ids too few": (spoil(top_entry, drop("tokenID", 1)), 1, rf"tokenID: {len(IDS)-1} arrays for a response of {len(IDS)} tokens"),
    "an id twice": (spoil(top_entry, lambda e: put("tokenID", 1, 1, value=e["tokenID"][1][0])(e)), 1, r"tokenID\[1\] holds \d+ twice"),
    "an id that is no whole number": (spoil(top_entry, put("tokenID", 0, 0, value=1.5)), 1, r"tokenID\[0\] is no list of whole numbers"),
    "a token that is not its id": (spoil(top_entry, put("token", 0, 2, value="zebra")), 1, r"tokenID\[0\] holds \d+, which is .* for this tokenizer and 'zebra' in the file"),
    "too few tokens": (spoil(top_entry, drop("token", 0, 2)), 1, r"tokenID\[0\] has 6 ids, and token\[...\] beside it 5 tokens"),
    "raw logits of the likeliest": (spoil(top_entry, put("logits", 1, value=[9., 8., 7., 6., 5., 4.])), 1, r"logits\[1\] holds 6 of \d+ tokens and no log-probabilities"),
    "cut off": (lambda: cut(json.dumps([whole_entry(0), whole_entry(1)]), .8), 1, "no whole JSON"),
    "cut off in a word": (lambda: '[{"prompt": "a', 0, "a string should end"),
    "something after the end": (lambda: json.dumps([whole_entry()]) + "{}", 1, "nothing more should stand after the list"),
    "an entry that is a number": (lambda: "[3]", 0, "an entry, { ... }, should stand"),
    "a missing comma": (lambda: json.dumps([whole_entry(), whole_entry()]).replace("}, {", "} {"), 1, ", should stand"),
}
@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_with_entry_and_reason(name, tmp_path):
    write, entry, reason = MALFORMED[name]
    (tmp_path/"llama.json").write_text(write())
    with pytest.raises(LogitFileError, match=reason) as error: import_logits(tmp_path/"llama.json", tmp_path/"store", WORDS, k=6)
    assert all(line.startswith(f"entry {entry}") for line in error.value.errors) and len(error.value.errors) <= len(IDS), error.value.errors
    assert [p.name for p in tmp_path.iterdir()] == ["llama.json"]

def test_an_empty_list_and_an_empty_file_hold_no_entry(tmp_path):
    for text in ("[]", "", "\n"):
        (tmp_path/"a.json").write_text(text)
        assert check_logits(tmp_path/"a.json", WORDS).errors == ["a.json holds no entry"]

def test_all_errors_come_in_one_report_with_the_line(tmp_path):
    entries = [whole_entry(i) for i in range(30)]
    for i in range(1, 30): entries[i]["logits"][0][i] = math.nan
    (tmp_path/"a.json").write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]")
    with pytest.raises(LogitFileError, match="29 errors in a.json") as error: import_logits(tmp_path/"a.json", tmp_path/"s", WORDS)
    assert len(error.value.errors) == 29 and "and 9 more" in str(error.value)
    assert error.value.errors[4].startswith("entry 5 (line 7 of a.json): logits[0] holds nan at place 5")

@pytest.mark.parametrize("lines", [False, True])
def test_a_good_file_becomes_a_store(tmp_path, lines):
    entries = [whole_entry(i) for i in range(5)]
    (tmp_path/"a.json").write_text("\n".join(map(json.dumps, entries)) if lines else json.dumps(entries))
    store = import_logits(tmp_path/"a.json", tmp_path/"s", WORDS, k=20, bits=10, tail=5)
    assert len(store) == 5 and store.positions == 5*len(IDS)
    prompt = to_tokens(PROMPT, WORDS)
    assert store[3]["input_ids"].tolist() == prompt + IDS and store[3]["labels"].tolist() == [-100]*len(prompt) + IDS
    told = keep_likeliest(torch.tensor(entries[3]["logits"]), 20, 5)
    assert store[3]["top_ids"].tolist() == told.top_ids.tolist() and store[3]["tail_ids"].shape == (len(IDS), 5)
    torch.testing.assert_close(store[3]["log_probs"], told.log_probs, atol=.03, rtol=.02); torch.testing.assert_close(store[3]["log_rest"], told.log_rest, atol=.03, rtol=.01)
    with pytest.raises(FileExistsError, match="give a new folder"): import_logits(tmp_path/"a.json", tmp_path/"s", WORDS)
    history = distill_from_store(small(1), store, WORDS, 2, batch_size=2, progress=False)
    assert all(map(math.isfinite, history["loss"]))

def test_the_order_of_keys_and_unknown_keys_do_not_matter(tmp_path):
    entry = top_entry()
    turned = dict(reversed(list((entry | dict(model="llama", meta=dict(a=[1, {}]))).items())))
    (tmp_path/"a.json").write_text(json.dumps([entry])); (tmp_path/"b.json").write_text(json.dumps([turned], indent=2))
    first, second = import_logits(tmp_path/"a.json", tmp_path/"a", WORDS, k=6), import_logits(tmp_path/"b.json", tmp_path/"b", WORDS, k=6)
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])

def test_the_likeliest_say_what_the_whole_says(tmp_path):
    (tmp_path/"a.json").write_text(json.dumps([whole_entry()])); (tmp_path/"b.json").write_text(json.dumps([top_entry(n=30)]))
    whole, top = import_logits(tmp_path/"a.json", tmp_path/"a", WORDS, k=8, bits=12, tail=0), import_logits(tmp_path/"b.json", tmp_path/"b", WORDS, k=8, bits=12)
    assert torch.equal(whole[0]["top_ids"], top[0]["top_ids"])
    torch.testing.assert_close(whole[0]["log_probs"], top[0]["log_probs"], atol=.01, rtol=.01); torch.testing.assert_close(whole[0]["log_rest"], top[0]["log_rest"], atol=.01, rtol=.01)

def test_raw_logits_of_the_likeliest_need_a_word_about_the_others(tmp_path):
    entry = top_entry() | dict(logits=[[5., 4., 3., 2., 1., 0.]]*len(IDS))
    (tmp_path/"a.json").write_text(json.dumps([entry]))
    store = import_logits(tmp_path/"a.json", tmp_path/"s", WORDS, k=6, bits=12, rest=0.25)
    assert store[0]["log_probs"].exp().sum(-1).tolist() == pytest.approx([.75]*len(IDS), abs=.01) and store[0]["log_rest"].exp().tolist() == pytest.approx([.25]*len(IDS), abs=.01)
    none = import_logits(tmp_path/"a.json", tmp_path/"t", WORDS, k=50, bits=12, rest=0.)
    assert none.about["k"] == 6 and none[0]["log_probs"].exp().sum(-1).tolist() == pytest.approx([1.]*len(IDS), abs=.01)

def test_ids_in_any_order_put_a_whole_array_in_order(tmp_path):
    entry, order = whole_entry(), torch.randperm(SIZE, generator=torch.Generator().manual_seed(0)).tolist()
    listed = dict(entry, logits=[[values[i] for i in order] for values in entry["logits"]], tokenID=[order]*len(IDS))
    (tmp_path/"a.json").write_text(json.dumps([entry])); (tmp_path/"b.json").write_text(json.dumps([entry, listed]))
    plain, mixed = import_logits(tmp_path/"a.json", tmp_path/"a", WORDS, k=8, tail=0), import_logits(tmp_path/"b.json", tmp_path/"b", WORDS, k=8, tail=0)
    for row in (0, 1):
        assert torch.equal(mixed[row]["top_ids"], plain[0]["top_ids"])
        torch.testing.assert_close(mixed[row]["log_probs"], plain[0]["log_probs"], atol=1e-3, rtol=1e-3)

def test_positions_of_equal_logits_draw_anew(tmp_path):
    values, order = torch.zeros(SIZE).tolist(), list(range(SIZE))
    entry = dict(prompt=PROMPT, response=RESPONSE, logits=[values]*len(IDS))
    for name, made in (("a", entry), ("b", dict(entry, tokenID=[order]*len(IDS)))):
        (tmp_path/f"{name}.json").write_text(json.dumps([made, made]))
        store = import_logits(tmp_path/f"{name}.json", tmp_path/name, WORDS, k=20, tail=10)
        draws = [tuple(ids) for row in (0, 1) for ids in store[row]["tail_ids"].tolist()]
        assert len(set(draws)) == len(draws) == 2*len(IDS)

def test_padded_output_layers_are_cut_when_their_width_is_said(tmp_path):
    entry = whole_entry()
    entry["logits"] = [values + [50.]*4 for values in entry["logits"]]
    (tmp_path/"a.json").write_text(json.dumps([entry])); (tmp_path/"b.json").write_text(json.dumps([whole_entry()]))
    padded, plain = import_logits(tmp_path/"a.json", tmp_path/"a", WORDS, k=5, columns=SIZE + 4), import_logits(tmp_path/"b.json", tmp_path/"b", WORDS, k=5)
    assert all(torch.equal(padded[0][name], plain[0][name]) for name in plain[0])

def test_a_dense_store_wants_all_logits(tmp_path):
    (tmp_path/"a.json").write_text(json.dumps([top_entry()])); (tmp_path/"b.json").write_text(json.dumps([whole_entry()]))
    with pytest.raises(ValueError, match="needs all"): import_logits(tmp_path/"a.json", tmp_path/"a", WORDS, dense="float32")
    dense = import_logits(tmp_path/"b.json", tmp_path/"b", WORDS, dense="float32")
    torch.testing.assert_close(dense[0]["log_probs"], torch.tensor(whole_entry()["logits"]).log_softmax(-1), atol=1e-5, rtol=1e-4)

MEASURE = """
import resource, sys; sys.path.insert(0, {tests!r})
from test_logit_store import *
small_file, large_file = {small!r}, {large!r}
import_logits(small_file, small_file + ".store", WORDS, k=20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_logits(large_file, large_file + ".store", WORDS, k=20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)*1024)
"""
def test_a_large_file_is_not_held_in_memory(tmp_path):
    text = json.dumps(whole_entry())
    for name, copies in (("small.json", 50), ("large.json", 40_000_000//len(text))):
        with open(tmp_path/name, "w") as file:
            for i in range(copies): file.write(("[" if i == 0 else ",\n") + text)
            file.write("]")
    done = subprocess.run([sys.executable, "-c", MEASURE.format(tests=str(ROOT/"tests"), small=str(tmp_path/"small.json"), large=str(tmp_path/"large.json"))], capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    size = (tmp_path/"large.json").stat().st_size
    assert int(done.stdout) < size/4, f"{int(done.stdout)/1e6:.0f} MB more for a file of {size/1e6:.0f} MB"

def test_exercises_are_sound():
    for check in (check_rest_kl, check_index_bits): assert problems(check) == []
