"Chapter 14: mixing, the toy models' theory, and a loop of generations that goes on where it was."
import json, math, os, signal, subprocess, sys, time
from collections import Counter
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.stats import binom
from conftest import ROOT, environment
from distillbook.lab.corpora import load_texts
from distillbook.lab.evaluate import perplexity
from distillbook.lab.models import tiny_qwen3, train_tokenizer
from distillbook.synth.collapse import (Arm, expected_variance, fit_texts, mix_generation, rare_tokens, run_generations, survival, tail_share,
    text_nats, write_texts)

REAL, OWN, OLDER = ([(source, i) for i in range(n)] for source, n in (("real", 20), ("own", 30), ("older", 40)))
def sources(rows): return Counter(source for source, _ in rows)

# mixing

def test_replace_takes_the_last_generation_and_nothing_else():
    assert sorted(mix_generation(REAL, OWN, OLDER)) == OWN
    assert sources(mix_generation(REAL, OWN, OLDER, budget=7)) == {"own": 7}

def test_accumulate_keeps_every_row():
    assert sorted(mix_generation(REAL, OWN, OLDER, "accumulate")) == sorted(REAL + OWN + OLDER)
    assert len(set(mix_generation(REAL, OWN, OLDER, "accumulate", budget=50))) == 50

@pytest.mark.parametrize("budget, share, real", [(20, 0.1, 2), (20, 0., 0), (20, 1., 20), (30, 0.05, 2), (10, 0.25, 3), (7, 0.5, 4), (30, 0.01, 0)])
def test_fixed_budget_has_its_share_of_real_rows(budget, share, real):
    "Half a row is a row: 1.5 and 2.5 become 2 and 3."
    mixed = mix_generation(REAL, OWN, OLDER, "fixed", budget, share)
    assert len(mixed) == len(set(mixed)) == budget and sources(mixed)["real"] == real and sources(mixed)["older"] == 0

@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), st.floats(0, 1), st.integers(0, 9), st.data())
def test_no_row_twice_and_the_budget_is_kept(real, own, older, share, seed, data):
    rows = [[(name, i) for i in range(n)] for name, n in (("real", real), ("own", own), ("older", older))]
    for kind, most in (("replace", own), ("accumulate", real + own + older), ("fixed", min(real, own))):
        budget = data.draw(st.integers(1, most))
        mixed = mix_generation(*rows, kind, budget, share if kind == "fixed" else 0., seed)
        assert len(mixed) == len(set(mixed)) == budget and set(mixed) <= set(sum(rows, []))
        if kind == "fixed": assert abs(sources(mixed)["real"] - share*budget) <= 0.5

def test_draws_follow_the_seed_and_leave_the_inputs_alone():
    real, own = list(REAL), list(OWN)
    a, b, c = (mix_generation(real, own, kind="fixed", budget=20, share=0.5, seed=s) for s in (1, 1, 2))
    assert a == b != c and (real, own) == (REAL, OWN)

def test_every_row_has_the_same_chance():
    drawn = Counter(row for s in range(400) for row in mix_generation(REAL, OWN, kind="fixed", budget=10, share=0.2, seed=s))
    for row in REAL: assert abs(drawn[row]/400 - 2/20) < 0.08
    for row in OWN: assert abs(drawn[row]/400 - 8/30) < 0.12

def test_rows_may_be_dicts():
    rows = [dict(id=str(i), messages=[]) for i in range(4)]
    assert len(mix_generation(rows, rows[:2], kind="fixed", budget=4, share=0.5)) == 4

@pytest.mark.parametrize("arguments, message", [
    (dict(kind="mix"), "none of replace, accumulate, fixed"), (dict(kind="fixed", share=0.1), "needs a budget"), (dict(share=0.1), "belongs to kind 'fixed'"),
    (dict(kind="fixed", budget=10, share=1.5), r"share must be in \[0, 1\], not 1.5"), (dict(kind="fixed", budget=10, share=math.nan), "share must be in"),
    (dict(budget=0), "at least 1 row"), (dict(budget=31), "needs 31 own rows and there are 30"), (dict(kind="fixed", budget=100, share=0.5), "needs 50 real rows and there are 20"),
    (dict(kind="accumulate", budget=91), "needs 91 real, older and own rows and there are 90")])
def test_a_mixture_that_cannot_be_made_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message): mix_generation(REAL, OWN, OLDER, **arguments)

@pytest.mark.parametrize("arguments, message", [(dict(kind="other"), "none of"), (dict(share=.1), "belongs"), (dict(kind="fixed", share=2), "share must"), (dict(lineages=0), "lineages")])
def test_an_arm_that_cannot_be_meant_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message): Arm(**arguments)

# theory of the toys

@pytest.mark.parametrize("size, generations", [(2, 1), (5, 4), (20, 10)])
def test_variance_shrinks_as_theory_says(size, generations):
    rng, mean, spread = np.random.default_rng(0), np.zeros(20_000), np.ones(20_000)
    for _ in range(generations):
        draws = rng.normal(mean, spread, (size, 20_000))
        mean, spread = draws.mean(0), draws.std(0)
    variance = spread**2
    assert abs(variance.mean() - expected_variance(size, generations)) < 5*variance.std()/20_000**.5

def test_variance_by_hand():
    assert expected_variance(1, 1) == 0 and expected_variance(4, 0, 3.) == 3. and expected_variance(4, 2, 16.) == pytest.approx(9.)
    with pytest.raises(ValueError, match="0 draws"): expected_variance(0, 1)

def test_survival_by_hand():
    assert survival(0., 10) == 0 and survival(1., 10, 5) == pytest.approx(1.)
    assert survival(0.3, 1, 7) == pytest.approx(0.3)                           # one draw: it is the word for ever or never
    assert survival(0.5, 2, 2) == pytest.approx(0.625)
    assert survival(0.02, 100) == pytest.approx(1 - 0.98**100) == pytest.approx(binom.sf(0, 100, 0.02))

@pytest.mark.parametrize("p, size, generations", [(0.05, 20, 3), (0.01, 100, 6), (0.4, 5, 4)])
def test_survival_agrees_with_simulation(p, size, generations):
    rng, share = np.random.default_rng(1), np.full(20_000, p)
    for _ in range(generations): share = rng.binomial(size, share)/size
    expected = survival(p, size, generations)
    assert abs((share > 0).mean() - expected) < 5*(expected*(1 - expected)/20_000)**.5

@pytest.mark.parametrize("arguments", [(1.2, 10), (-.1, 10), (.5, 0), (.5, 10, 0), (math.nan, 10)])
def test_survival_refuses_what_is_no_probability(arguments):
    with pytest.raises(ValueError): survival(*arguments)

# tails

def test_tail_by_hand():
    reference = ["red red red fox", "a red hen"]
    assert tail_share(reference, ["the fox"], rarest=1) == pytest.approx(1/3)      # fox, a, hen
    assert tail_share(reference, reference) == 1 and tail_share(reference, []) == 0
    assert tail_share(reference, ["red hen"], n=2, rarest=1) == pytest.approx(1/3)   # red fox, a red, red hen
    with pytest.raises(ValueError, match="no 1-gram that occurs at most 1 times"): tail_share(["a a"], ["a"], rarest=1)

def test_rare_tokens_make_up_their_share_at_most(words):
    texts = ["one one one one one two two three"]*3
    counts = Counter(i for t in texts for i in words(t, add_special_tokens=False)["input_ids"])
    for share in (0.01, 0.2, 0.5, 0.9):
        rare = rare_tokens(texts, words, share)
        assert sum(counts[i] for i in rare) <= share*sum(counts.values())
        assert not rare or max(counts[i] for i in rare) <= min(counts[i] for i in set(counts) - rare)
    with pytest.raises(ValueError, match="share"): rare_tokens(texts, words, 1.)

# the loop

BAG = dict(fit=lambda texts, seed: list(texts), write=lambda model, n, seed: np.random.default_rng(seed).choice(model, n).tolist(),
           look=lambda models, texts: dict(alive=len(set(texts)), learnt=sum(map(len, models))))
LETTERS = [chr(97 + i) for i in range(26)]

def test_generations_learn_from_what_the_arm_says():
    seen = {}
    for name, arm in dict(replace=Arm(), accumulate=Arm("accumulate"), fixed=Arm("fixed", 0.5), two=Arm(lineages=2)).items():
        seen[name] = []
        def fit(texts, seed): seen[name].append((sorted(texts), seed)); return texts
        result = run_generations(LETTERS, fit, lambda model, n, seed: [f"{seed}-{i}" for i in range(n)], lambda models, texts: {}, arm, generations=3, seed=5)
        assert [g["generation"] for g in result] == [0, 1, 2, 3] and all(len(g["texts"]) == 26 for g in result)
    wrote = lambda seed, n=26: {f"{seed}-{i}" for i in range(n)}
    rows = {name: [set(texts) for texts, _ in calls] for name, calls in seen.items()}
    assert rows["replace"] == [set(LETTERS), wrote(50000), wrote(50100), wrote(50200)]
    assert rows["accumulate"] == [set(LETTERS), set(LETTERS) | wrote(50000), set(LETTERS) | wrote(50000) | wrote(50100), set(LETTERS) | wrote(50000) | wrote(50100) | wrote(50200)]
    for g, texts in enumerate(rows["fixed"][1:]): assert len(texts & set(LETTERS)) == 13 == len(texts & wrote(50000 + 100*g))
    assert rows["two"][2] == rows["two"][3] == wrote(50000, 13) | wrote(50001, 13)       # both lineages learn from both
    assert all(len({seed for _, seed in calls}) == len(calls) for calls in seen.values())

def test_real_rows_of_a_fixed_budget_are_drawn_anew():
    drawn = []
    def fit(texts, seed): drawn.append(frozenset(texts) & frozenset(LETTERS)); return texts
    run_generations(LETTERS, fit, lambda model, n, seed: ["?"]*n, lambda models, texts: {}, Arm("fixed", 0.2), generations=5)
    assert len(set(drawn[1:])) > 1

def test_first_models_are_used_and_counted():
    fits = []
    def fit(texts, seed): fits.append(seed); return texts
    result = run_generations(LETTERS, fit, BAG["write"], BAG["look"], generations=1, first=[["z"]])
    assert result[0]["texts"] == ["z"]*26 and len(fits) == 1
    with pytest.raises(ValueError, match="1 first models for 2 lineages"): run_generations(LETTERS, **BAG, arm=Arm(lineages=2), first=[["z"]])

@pytest.mark.parametrize("arm", [Arm(), Arm("accumulate"), Arm("fixed", 0.3), Arm(lineages=3)])
def test_a_run_that_was_cut_off_goes_on(arm, tmp_path):
    for stop in range(4):
        calls, folder = [], tmp_path/str(stop)
        def fit(texts, seed):
            calls.append(seed)
            if len(calls) == stop*arm.lineages + 1: raise KeyboardInterrupt
            return list(texts)
        with pytest.raises(KeyboardInterrupt): run_generations(LETTERS, fit, BAG["write"], BAG["look"], arm, 3, folder)
        resumed = run_generations(LETTERS, fit, BAG["write"], BAG["look"], arm, 3, folder)
        assert resumed == run_generations(LETTERS, **BAG, arm=arm, generations=3)
        assert len(calls) == 4*arm.lineages + 1
    done = len(calls)
    assert len(run_generations(LETTERS, fit, BAG["write"], BAG["look"], arm, 5, folder)) == 6 and len(calls) == done + 2*arm.lineages    # more generations go on too

def test_a_run_survives_kill_minus_nine(tmp_path):
    script = f"""
import time
from distillbook.synth.collapse import run_generations
def write(model, n, seed):
    time.sleep(.2); return [f"{{seed}} {{i}}" for i in range(n)]
run_generations(list("abcdef"), lambda texts, seed: texts, write, lambda models, texts: {{}}, generations=100, folder={str(tmp_path)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script], env=environment(), cwd=ROOT)
    while not (tmp_path/"generation-3.json").is_file():
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL); process.wait()
    kept = sorted(tmp_path.glob("generation-*.json"))
    fits = []
    def fit(texts, seed): fits.append(seed); return texts
    result = run_generations(list("abcdef"), fit, lambda model, n, seed: [f"{seed} {i}" for i in range(n)], lambda models, texts: {}, generations=len(kept), folder=tmp_path)
    assert fits == [100*len(kept)] and [g["texts"][1] for g in result] == [f"{100*g} 1" for g in range(len(kept) + 1)]

@pytest.mark.parametrize("change", [dict(arm=Arm("accumulate")), dict(arm=Arm("fixed", 0.1)), dict(seed=1), dict(real=LETTERS[:25])])
def test_a_folder_of_another_chain_is_refused(change, tmp_path):
    run_generations(**(BAG | dict(real=LETTERS)), generations=1, folder=tmp_path)
    with pytest.raises(ValueError, match="holds the generations of another chain .* was .*, is "): run_generations(**(BAG | dict(real=LETTERS) | change), generations=1, folder=tmp_path)

def test_loops_that_cannot_run_say_why():
    with pytest.raises(ValueError, match="no real texts"): run_generations([], **BAG)
    with pytest.raises(ValueError, match="generation 0: `write` gave 2 texts, 26 were asked for"):
        run_generations(LETTERS, BAG["fit"], lambda model, n, seed: ["a", "b"], BAG["look"])

def test_a_rare_word_dies_out_under_replace_and_never_under_accumulate():
    real = ["rare"] + ["usual"]*19
    bag = BAG | dict(look=lambda models, texts: dict(known=all("rare" in m for m in models)))
    alive = {kind: np.mean([run_generations(real, **bag, arm=Arm(kind), generations=4, seed=s)[-1]["known"] for s in range(300)]) for kind in ("replace", "accumulate")}
    expected = survival(1/20, 20, 4)
    assert alive["accumulate"] == 1 and abs(alive["replace"] - expected) < 5*(expected*(1 - expected)/300)**.5

# language models

TEXTS = ["The cat sat.", "A dog ran far.", "The bird flew home.", "One fish swims."]

@pytest.fixture(scope="module")
def words(): return train_tokenizer(TEXTS + ["one two three"], 300)

@pytest.fixture(scope="module")
def parrot(words):
    torch.manual_seed(0)
    model = tiny_qwen3(words, hidden_size=32, layers=1, intermediate_size=64, heads=2, kv_heads=1, head_dim=16, context=64)
    return fit_texts(model, words, TEXTS, 80, batch_size=4, learning_rate=0.04, length=40, device="cpu")

def test_a_fitted_model_begins_and_ends_its_texts(parrot, words):
    assert set(write_texts(parrot, words, 12, 40, temperature=0.05)) <= set(TEXTS)
    assert len(set(write_texts(parrot, words, 40, 40, seed=1)) & set(TEXTS)) >= 3       # all beginnings, not the likeliest alone

def test_beginnings_are_taken_in_turn(parrot, words):
    told = write_texts(parrot, words, 5, 40, beginnings=["A dog", "The"])
    assert [t.split()[0] for t in told] == ["A", "The", "A", "The", "A"]
    with pytest.raises(ValueError, match="no beginnings"): write_texts(parrot, words, 5, beginnings=[])

def test_writing_follows_its_seed(parrot, words):
    a, b, c = (write_texts(parrot, words, 8, 20, temperature=2., seed=s) for s in (3, 3, 4))
    assert a == b != c

def test_nats_are_those_of_perplexity(parrot, words):
    "Without end tokens the library's own number; with them, the mean over all tokens."
    ids = [words(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
    ours, theirs = text_nats(parrot, words, TEXTS)["nats"], perplexity(parrot, TEXTS, words, length=64, join=False)
    with torch.no_grad(): ends = [-parrot(torch.tensor([[words.bos_token_id] + row])).logits[0, -1].log_softmax(-1)[words.eos_token_id].item() for row in ids]
    total = theirs["nats_per_token"]*theirs["tokens"] + sum(ends)
    assert ours == pytest.approx(total/(theirs["tokens"] + len(TEXTS)), abs=1e-4)

def test_rare_nats_look_at_the_rare_tokens_alone(parrot, words):
    everything = set(words.get_vocab().values())
    assert text_nats(parrot, words, TEXTS)["rare_nats"] is None
    found = text_nats(parrot, words, TEXTS, everything)
    assert found["rare_nats"] == pytest.approx(found["nats"])
    unseen = text_nats(parrot, words, ["The zebra sat."], set(words("zebra", add_special_tokens=False)["input_ids"]))
    assert unseen["rare_nats"] > unseen["nats"]

def test_two_generations_of_real_stories(realdata, tmp_path):
    "On text that is not the book's own."
    files = sorted(p for p in realdata.rglob("*.txt") if p.stat().st_size > 10_000)
    if not files: pytest.skip("no text file in the real inputs")
    real = [" ".join(t.split())[:120] for t in load_texts(files[0])["text"]][:24]
    words = train_tokenizer(real, 400)
    def fit(texts, seed):
        torch.manual_seed(seed)
        return fit_texts(tiny_qwen3(words, hidden_size=32, layers=1, intermediate_size=64, heads=2, kv_heads=1, head_dim=16, context=96), words, texts, 12, 8, 0.04, 64, seed, device="cpu")
    result = run_generations(real, fit, lambda m, n, seed: write_texts(m, words, n, 48, seed=seed), lambda models, texts: text_nats(models[0], words, real), generations=2, folder=tmp_path)
    assert len(result) == 3 and all(math.isfinite(g["nats"]) and g["nats"] > 1 for g in result)
    assert json.loads((tmp_path/"generation-2.json").read_text())["texts"] == result[2]["texts"]
