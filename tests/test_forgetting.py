"Forgetting is seen where it is, not where it is not, and a script can act on it."
import csv, importlib, importlib.util, json, math, os, shutil, sys
from itertools import product
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from conftest import book
from distillbook.adapt.forgetting import (Forgotten, compare_models, detectable_drop, forgetting_gate, holm, mcnemar_power, mean_kl, report_page, suite_change, summarize)
from distillbook.lab.evaluate import lm_eval_scores, mcnemar, paired_bootstrap
from distillbook.lab.models import load_model, load_tokenizer
from distillbook.lab.runs import RunRecord


# the statistics
@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_what_the_step_down_says(p_values):
    "Rejecting at level a by the sequential procedure is an adjusted p of at most a."
    adjusted = holm(p_values)
    for level in (.01, .05, .2, .7):
        order, rejected = sorted(range(len(p_values)), key=lambda i: p_values[i]), set()
        for k, i in enumerate(order):
            if p_values[i]*(len(p_values) - k) > level: break
            rejected.add(i)
        assert {i for i, a in enumerate(adjusted) if a <= level} == rejected or any(math.isclose(p*(len(p_values) - k), level) for p in p_values for k in range(len(p_values)))
    assert all(a >= p for a, p in zip(adjusted, p_values))

def test_holm_keeps_the_order_of_the_tests():
    assert np.allclose(holm([.04, .01, .03]), [.06, .03, .06]) and holm([]) == []
    with pytest.raises(ValueError, match="between 0 and 1"): holm([-.1])

@pytest.mark.parametrize("n, drop, churn", [(8, .3, .1), (10, .5, 0.), (6, 1., 0.)])
def test_power_is_the_sum_over_all_outcomes(n, drop, churn):
    "Every outcome of n items with its probability, for small n."
    lost, won, total = drop + churn, churn, 0.
    for only_first, only_second in product(range(n + 1), repeat=2):
        if only_first + only_second > n: continue
        same = n - only_first - only_second
        chance = math.factorial(n)/(math.factorial(only_first)*math.factorial(only_second)*math.factorial(same))*lost**only_first*won**only_second*max(0., 1 - lost - won)**same
        p = mcnemar([1]*only_first + [0]*only_second + [1]*same, [0]*only_first + [1]*only_second + [1]*same)["p"]
        total += chance*(p <= .05 and only_first > only_second)
    assert math.isclose(mcnemar_power(n, drop, churn), total, abs_tol=1e-6)

def test_the_detectable_loss_is_where_power_reaches_the_mark():
    for n, churn in ((60, .02), (200, .05), (1000, 0.)):
        d = detectable_drop(n, churn)
        assert mcnemar_power(n, d, churn) >= .8 > mcnemar_power(n, d*.98, churn)
    assert detectable_drop(5) == 1., "five questions can show nothing"
    assert detectable_drop(14_042) < .01 < detectable_drop(164)
    for bad in (dict(n=0, drop=.1), dict(n=9, drop=2.), dict(n=9, drop=.1, churn=-.1), dict(n=9, drop=.9, churn=.2)):
        with pytest.raises(ValueError, match="n >= 1"): mcnemar_power(**bad)

def test_two_hundred_comparisons_of_a_model_with_itself():
    "Answers that change by chance, three suites, Holm: at most one finding in twenty."
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        p_values = []
        for right, flip in ((.9, .05), (.6, .2), (.97, .02)):
            ability = rng.random(100) < right
            p_values.append(mcnemar(*(np.where(rng.random(100) < flip, ~ability, ability) for _ in range(2)))["p"])
        alarms += min(holm(p_values)) < .05
    assert alarms <= 10

def test_planted_losses_of_the_stated_size_are_found():
    rng, found = np.random.default_rng(1), 0
    drop = detectable_drop(200, .02)
    for _ in range(300):
        kind = rng.choice(4, 200, p=[drop + .02, .02, .9 - drop, .06])
        found += mcnemar(np.isin(kind, (0, 2)), np.isin(kind, (1, 2)))["p"] < .05
    assert found/300 > .74, found/300      # 80%, less three standard errors

def test_a_suite_change_counts_what_went_and_came():
    change = suite_change("s", [1., 1., 1., 0., .5], [0., 0., 1., 1., .25])
    assert (change.forgotten, change.learned, change.n) == (3, 1, 5) and math.isclose(change.lost, 25.)
    assert math.isclose(change.lost, 100*paired_bootstrap([1., 1., 1., 0., .5], [0., 0., 1., 1., .25])["difference"])
    with pytest.raises(ValueError, match="one length"): suite_change("s", [1.], [])
    with pytest.raises(ValueError, match="no suite"): summarize(("a", "b"), {})


# the gate and the page
def report(lost, n=100, gained=0, suites=2):
    pair = ([1.]*(n - gained) + [0.]*gained, [0.]*lost + [1.]*(n - lost))
    return summarize(("<before>", "after & more"), {f"suite {i}": pair if i == 0 else ([1.]*n, [1.]*n) for i in range(suites)}, dict(before=2., after=2.5, documents=3, rise=.5, low=.4, high=.6, kl=.1),
                     {"suite 0": [dict(question="<q>", wanted="w", before="b", after="<script>")]})

@pytest.mark.parametrize("lost, gained, allowed, passed", [(0, 0, 3., True), (2, 0, 3., True), (20, 0, 3., False), (20, 20, 3., True), (20, 0, 30., True), (0, 30, 0., True)])
def test_the_gate_wants_a_loss_that_is_large_and_certain(lost, gained, allowed, passed): assert forgetting_gate(report(lost, gained=gained), allowed).passed is passed

def test_the_gate_sees_one_suite_among_many():
    "One suite of eight falls; the mean hardly moves."
    gate = forgetting_gate(report(15, suites=8), allowed_points=3.)
    assert not gate.passed and gate.reasons[0].startswith("suite 0 lost 15.0 points")
    for bad in (dict(allowed_points=-1), dict(alpha=0)):
        with pytest.raises(ValueError, match="allowed_points"): forgetting_gate(report(1), **bad)

def test_the_page_is_complete_and_escaped():
    page = report_page(r := report(20), forgetting_gate(r))
    for part in ("&lt;before&gt;", "after &amp; more", "refused: all lost", "suite 0", "detectable loss", "KL from before to after: 0.100", "&lt;script&gt;"): assert part in page, part
    assert "<script>" not in page and "http" not in page


# two models
@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    "The shipped student with some of its middle turned to noise."
    folder = tmp_path_factory.mktemp("models")/"damaged"
    model, tokenizer = load_model("student"), load_tokenizer("student")
    torch.manual_seed(0)
    with torch.no_grad(): model.model.layers[1].mlp.down_proj.weight += torch.randn_like(model.model.layers[1].mlp.down_proj.weight)
    model.save_pretrained(folder); tokenizer.save_pretrained(folder)
    return folder

def test_a_model_has_forgotten_nothing_of_itself(cache_apart):
    r = compare_models("student", "student", ("knowledge", "rules"), 12, documents=2)
    assert (r.overall.lost, r.overall.p, r.text["rise"]) == (0., 1., 0.) and abs(r.text["kl"]) < 1e-6 and forgetting_gate(r).passed

def test_a_damaged_model_is_seen(damaged, cache_apart):
    r = compare_models("student", damaged, ("knowledge", "rules", "safety"), 30, documents=4)
    assert r.overall.lost > 10 and r.overall.p < .01 and r.text["kl"] > .01 and not forgetting_gate(r).passed
    assert sum(len(x) for x in r.items.values()) == sum(c.forgotten for c in r.suites)
    seconds = r.overall
    assert compare_models("student", damaged, ("knowledge", "rules", "safety"), 30, documents=4).overall == seconds

@pytest.fixture
def cache_apart(cache, monkeypatch): monkeypatch.setenv("DISTILLBOOK_CACHE", str(cache))

def test_kl_is_that_of_torch():
    a, b, tokenizer = load_model("student"), load_model("student"), load_tokenizer("student")
    with torch.no_grad(): b.model.norm.weight *= 1.1
    ids = torch.tensor([tokenizer("Return the mean of an array.")["input_ids"]])
    with torch.no_grad(): wanted = torch.nn.functional.kl_div(b(ids).logits[0].log_softmax(-1), a(ids).logits[0].log_softmax(-1), log_target=True, reduction="sum")/ids.shape[1]
    assert math.isclose(mean_kl(a, b, tokenizer, ["Return the mean of an array."]), wanted.item(), rel_tol=1e-4)
    with pytest.raises(ValueError, match="no token"): mean_kl(a, b, tokenizer, [""])

def test_what_cannot_be_compared_is_said_before_any_work(realdata):
    stories = realdata/"models"/"stories260K"/"hf"
    with pytest.raises(ValueError, match="no chat form"): compare_models(stories, stories, ("knowledge",), 2, documents=0)
    with pytest.raises(ValueError, match="folder of their files"): compare_models("student", "student", (), benchmarks=("mmlu",))
    with pytest.raises(FileNotFoundError, match="no model folder"): compare_models("student", "./nowhere", ("knowledge",))

def test_models_without_a_chat_form_are_compared_on_published_files(realdata, cache_apart):
    pytest.importorskip("lm_eval")
    stories = realdata/"models"/"stories260K"/"hf"
    r = compare_models(stories, stories, (), published=realdata/"benchmarks", benchmarks=("arc_easy",), limit=8, documents=0)
    assert r.overall.n == 8 and r.overall.lost == 0

def test_the_gate_ends_a_script(damaged, tmp_path, cache):
    "As in a shell: exit code 1, one clear line, and everything is written."
    small = ["-p", "items=20", "-p", "suites=rules safety", "-p", "seeds=1", "-p", "pool_items=4", "-p", "comparisons=4", "-p", "steps=1", "-p", "documents=2", "-p", "draws=2", "-p", "jobs=1", "-p", "batch_size=2"]
    done = book("run", "forgetting", "--profile", "smoke", *small, "-p", "before=student", "-p", f"after={damaged}", "-p", "gate=true", "--out", tmp_path/"refused", timeout=300, DISTILLBOOK_CACHE=cache)
    assert done.returncode == 1 and "Forgotten" in done.stderr and "refused: all lost" in done.stderr, done.stderr[-2000:]
    for file in ("record.json", "forgetting.html", "32_forgetting.ipynb", "suites.csv"): assert (tmp_path/"refused"/file).is_file(), file
    assert {m.name: m.value for m in RunRecord.load(tmp_path/"refused").measures}["points_lost"] > 3
    done = book("run", "forgetting", "--profile", "smoke", *small, "-p", "before=student", "-p", "after=student", "-p", "gate=true", "--out", tmp_path/"passed", timeout=300, DISTILLBOOK_CACHE=cache)
    assert done.returncode == 0, done.stderr[-2000:]


# the published benchmarks, by lm-eval's own task files
def hub_rows(name, folder):
    "The published rows in the form that the hub's data set has, which lm-eval's own task files read."
    if name == "hellaswag": return [json.loads(line) for line in (folder/"hellaswag_val_1000.jsonl").read_text().split("\n") if line.strip()]
    if name.startswith("arc"):
        rows = [json.loads(line) for line in (folder/f"{name}.jsonl").read_text().split("\n") if line.strip()]
        return [dict(question=r["query"].removeprefix("Question: "), choices=dict(text=r["choices"], label=list("ABCDEFGH"[:len(r["choices"])])), answerKey="ABCDEFGH"[int(r["gold"])]) for r in rows]
    return [dict(question=q, choices=choices, answer="ABCD".index(letter)) for q, *choices, letter in csv.reader(open(folder/"mmlu"/"test"/f"{name[5:]}_test.csv", newline="", encoding="utf-8"))]

def own_task(name, rows):
    "lm-eval's own task file, with these rows for its data set."
    import datasets, yaml
    tasks = Path(importlib.util.find_spec("lm_eval").origin).parent/"tasks"
    class Loader(yaml.SafeLoader): pass
    Loader.add_constructor("!function", lambda loader, node: getattr(importlib.import_module("lm_eval.tasks.hellaswag.utils"), node.value.split(".")[1]))
    path = tasks/"mmlu"/"default"/"_default_template_yaml" if name.startswith("mmlu") else tasks/("hellaswag" if name == "hellaswag" else "arc")/f"{name}.yaml"
    task = yaml.load(path.read_text(), Loader)
    if name == "arc_challenge": task = yaml.load((tasks/"arc"/"arc_easy.yaml").read_text(), Loader) | task
    for key in ("dataset_path", "dataset_name", "include", "tag", "training_split", "validation_split", "fewshot_split", "fewshot_config", "should_decontaminate", "doc_to_decontamination_query"): task.pop(key, None)
    if name.startswith("mmlu"): task["description"] = f"The following are multiple choice questions (with answers) about {name[5:].replace('_', ' ')}.\n\n"
    return task | dict(task=name, test_split="test", custom_dataset=lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(rows)))

@pytest.mark.peer
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "hellaswag", "mmlu_astronomy", "mmlu_world_religions"])
def test_published_files_give_lm_evals_own_scores(name, realdata):
    pytest.importorskip("lm_eval")
    place = realdata/"models"/"stories260K"/"hf"
    model, tokenizer = load_model(place), load_tokenizer(place)
    ours = lm_eval_scores(model, tokenizer, [name], limit=40, published=realdata/"benchmarks")[name]
    theirs = lm_eval_scores(model, tokenizer, own_task(name, hub_rows(name, realdata/"benchmarks")[:40]), batch_size=16, fewshot=0)[name]
    assert ours["items"] == theirs["items"] and ours["metrics"] == theirs["metrics"] and ours["n"] == 40

@pytest.mark.peer
@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "mmlu_astronomy"])
def test_batches_of_one_and_sixteen_agree(name, realdata):
    pytest.importorskip("lm_eval")
    place = realdata/"models"/"stories260K"/"hf"
    model, tokenizer = load_model(place), load_tokenizer(place)
    one, many = (lm_eval_scores(model, tokenizer, [name], limit=24, batch_size=size, published=realdata/"benchmarks")[name] for size in (1, 16))
    assert abs(one["score"] - many["score"]) < 1e-4 and one["items"] == many["items"]

@pytest.mark.parametrize("name", ["arc_easy", "hellaswag", "mmlu_astronomy"])
def test_a_constant_model_scores_chance(name, realdata):
    "Equal scores for all choices: the shared credit is one over the number of choices, whatever their order."
    from distillbook.lab.evaluate import choice_credit, read_published
    rows = read_published(name, realdata/"benchmarks")["test"]
    credit = [choice_credit([-1.]*len(row["choices"]), row["gold"]) for row in rows]
    assert math.isclose(np.mean(credit), np.mean([1/len(row["choices"]) for row in rows]))
