"A judge's replies are read or left unread, its bias is found, and a person's decisions are kept and counted."
import copy, json, math, os, random, re, signal, sqlite3, subprocess, sys
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from conftest import ROOT, environment
from distillbook.lab.evaluate import chat_prompt, split_pair
from distillbook.lab.microworld import examples
from distillbook.lab.models import load_model, load_tokenizer
from distillbook.lab.runs import proportion_interval
from distillbook.synth import judging
from distillbook.synth.endpoints import ScriptedServer
from distillbook.synth.judging import (PairVerdict, Review, Rubric, UnreadableJudge, acceptance, agreement, biased_judge, judge_pairs, judge_points,
    judge_prompt, likelihood_judge, make_rubric, parse_choice, parse_score, position_bias, read_rubric, review_card, review_sample, reviews_needed, win_share)
from distillbook.synth.teachers import ApiTeacher, Endpoint, EndpointError, Ledger, LocalTeacher, Sampling

RUBRIC = make_rubric({"correct": "it is true", "brief": "it is short"})

def row(answer, id="r", question="What is 2+2?", **more):
    return dict(id=id, messages=[dict(role="user", content=question), dict(role="assistant", content=answer)], lineage=dict(template="sums"), verdicts={}) | more

def said(request): return request["messages"][-1]["content"]


SCORES = {"8/10": 8, "8 / 10": 8, "10/10": 10, "8 out of 10. It lacks 2 facts.": 8, "seven out of ten": 7, "7 out of ten": 7, "Score: 7": 7, "Score:7": 7, "**Score:** 7": 7,
    "Rating - 7": 7, "Score (1-10): 7": 7, "On a scale of 1 to 10, this is a 9.": 9, "Score: seven": 7, "The score is one.": 1, "Final rating: nine": 9, "Score: 7,5": 7.5,
    "7.5": 7.5, "7": 7, "7.": 7, "Seven.": 7, "7 - good": 7, "I would say 7.": 7, "I give this one a seven": 7, "I give this one a 7": 7,
    "I would rate this response a 6 out of 10.": 6, '{"score": 7}': 7, '{"reason": "fine", "rating": "7"}': 7, "Score: 7 (7/10)": 7, "Score: **8** / 10": 8, "Overall: 7/10": 7,
    "Accuracy score: 8, style score: 3. Overall score: 6": 6, "**[[6]]**": 6, "[[7.5]]": 7.5, "[[seven]]": 7, "[[7/10]]": 7, "[[Rating: 8]]": 8, "Rating: [[5]]": 5,
    "[[3]] ... on second thought [[4]]": 4, "It names 3 of the 4 rivers.\nRating: [[5]]": 5, "<think>maybe [[3]]</think>\n[[8]]": 8, "Score: 3 for style. [[9]]": 9}
NO_SCORES = ["", "It fits.", "[[rating]]", "[[11]]", "0", "Score: 0", "Score: -3", "11/10", "8/5", "Rating: 4.5/5", "Score: 8-9", "Accuracy score: 8, style score: 3", "8/10 or 6/10",
    "1. true\n2. brief", "The river has 3 arms and 2 mills.", "3 of 4 rivers are right", "In 1998 it was 40% of it.", "I give one reason: it is late.", "Steps 1-3 are missing.",
    "GPT-4 wrote this", "1,000 words", "Overall the answer has 3 faults.", "The answer scored well in 3 ways", "This one is good", "Rating: 7.8.9", "None of them"]

@pytest.mark.parametrize("text,score", SCORES.items())
def test_scores_are_read(text, score): assert parse_score(text) == score

@pytest.mark.parametrize("text", NO_SCORES)
def test_no_score_is_invented(text): assert parse_score(text) is None

def test_the_scale_decides_what_a_fraction_means():
    assert (parse_score("4/5", 1, 5), parse_score("4/5", 1, 10), parse_score("4 out of five", 1, 5), parse_score("9", 1, 5)) == (4, None, 4, None)
    assert parse_score("85/100", 0, 100) == 85 and parse_score("Score: 0", 0, 5) == 0

@given(st.integers(1, 10), st.sampled_from(["[[{}]]", "Score: {}", "{}/10", "My rating is {}.", "{} out of 10", "Reasons first, of any kind.\n\n{}", '{{"score": {}}}', "**Rating**: **{}**"]))
def test_any_score_in_any_form_is_read(score, form): assert parse_score(form.format(score)) == score

@given(st.text())
def test_any_text_gives_none_or_a_score_on_the_scale(text):
    score = parse_score(text)
    assert score is None or 1 <= score <= 10
    assert parse_choice(text) in ("A", "B", "tie", None)

@given(st.text(alphabet=st.characters(exclude_categories=["N"])).filter(lambda t: not re.search("|".join(judging.NUMBER_WORDS), t, re.I)))
def test_without_a_number_there_is_no_score(text): assert parse_score(text) is None


CHOICES = {"[[A]]": "A", "Both are short. [[B]]": "B", "[[C]]": "tie", "[[Tie]]": "tie", "[[A]] is what they want; [[B]]": "B", "**Answer B** is clearly better.": "B",
    "A is better than B because it is true.": "A", "B": "B", "(B)": "B", "Answer: A": "A", "A\n\nIt is shorter.": "A", "It is shorter.\n\nB": "B", "Assistant B": "B", "I prefer response a.": "A",
    "The better answer is B.": "B", "Winner: A": "A", '{"winner": "B"}': "B", "A wins": "A", "Option (B) is better": "B", "Therefore, Assistant A's response is better.": "A",
    "B is slightly better": "B", "Answer A is much worse.": "B", "Equally polite, but B is better.": "B", "My choice is B": "B", "Verdict: tie": "tie", "Tie": "tie", "It's a tie.": "tie",
    "They are equally good.": "tie", "Neither is better.": "tie", "<think>A is better</think>[[B]]": "B"}
NO_CHOICES = ["", "A better answer would name the river.", "A fine answer.", "A and B", "A is not better than B.", "I do not prefer A.", "A is better in style. B is better in content.",
    "Give [[A]], [[B]], or [[C]] for a tie.", "I choose the second", "Both were read."]

@pytest.mark.parametrize("text,choice", CHOICES.items())
def test_choices_are_read(text, choice): assert parse_choice(text) == choice

@pytest.mark.parametrize("text", NO_CHOICES)
def test_no_choice_is_invented(text): assert parse_choice(text) is None

@pytest.mark.parametrize("text", [t for t in CHOICES if "response a" not in t])
def test_exchanged_letters_give_the_other_choice(text):
    swap = lambda t: re.sub(r"\b[AB]\b", lambda m: "BA"[m[0] == "B"], t)
    assert parse_choice(swap(text)) == {"A": "B", "B": "A"}.get(CHOICES[text], CHOICES[text])


def test_fields_are_filled_in_one_pass():
    prompt = judge_prompt(RUBRIC, row("{answer_b} and {x}"), row("rival"))[0]["content"]
    assert "{answer_b} and {x}" in prompt and prompt.count("rival") == 1
    assert judge_prompt(RUBRIC, row("4"))[0]["content"].count("What is 2+2?") == 1

def test_a_conversation_is_shown_whole():
    talk = dict(id="t", messages=[dict(role="system", content="Be kind."), *row("4")["messages"], dict(role="user", content="And 3+3?"), dict(role="assistant", content="6")])
    shown = judge_prompt(RUBRIC, talk)[0]["content"]
    assert "system: Be kind.\nuser: What is 2+2?\nassistant: 4\nuser: And 3+3?" in shown
    turns = Rubric("turns", [dict(role="user", content="{question_1}|{answer_1}|{question_2}|{answer_2}")], [])
    assert judge_prompt(turns, talk)[0]["content"] == "What is 2+2?|4|And 3+3?|6"

def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="row 'u' has no answer to judge: its last message is of the user"): judge_prompt(RUBRIC, dict(id="u", messages=row("")["messages"][:1]))
    with pytest.raises(ValueError, match="'r' and 's' answer different questions"): judge_prompt(RUBRIC, row("4"), row("4", "s", "What is 3+3?"))
    reference = Rubric("r", [dict(role="user", content="{ref_answer_1}")], [])
    with pytest.raises(ValueError, match="asks for {ref_answer_1}, which row 'r' does not have"): judge_prompt(reference, row("4"))
    assert judge_prompt(reference, row("4", example=dict(answer="four")))[0]["content"] == "four"
    with pytest.raises(ValueError, match="low must be below high"): make_rubric({}, low=5, high=5)

def test_a_file_of_prompts_says_what_is_wrong(tmp_path):
    file = tmp_path/"p.jsonl"
    file.write_text('{"name": "a", "system_prompt": "", "prompt_template": "{answer}"}\n\n{"name": "b"}\n')
    with pytest.raises(ValueError, match="line 3 is not a judge's prompt"): read_rubric(file, "a", "a")
    file.write_text(file.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="has no prompt single-v1 and no pair-v2; it has a"): read_rubric(file)
    assert read_rubric(file, "a", "a").points == [dict(role="user", content="{answer}")]

def test_published_prompts_are_read_and_filled(realdata):
    path = realdata/"benchmarks"/"mt_bench"/"judge_prompts.jsonl"
    published = {p["name"]: p for p in map(json.loads, path.read_text().splitlines())}
    one, two = row("4", example=dict(answer="four")), row("{answer_a}", "s")
    for name, p in published.items():
        if "multi-turn" in name: continue
        rubric = read_rubric(path, name, name)
        prompt = judge_prompt(rubric, one, two) if p["type"] == "pairwise" else judge_prompt(rubric, one)
        assert "What is 2+2?" in said(dict(messages=prompt)) and not re.search(r"\{(question|answer_b|ref_answer_1)\}", said(dict(messages=prompt))), name
        format = p["output_format"]
        assert parse_choice(f"Because. {format}") == "A" if p["type"] == "pairwise" else (parse_score(format), parse_score(format.replace("rating", "5"))) == (None, 5), name
    talk = lambda last: dict(id="t", messages=[*row("4")["messages"], dict(role="user", content="And 3+3?"), dict(role="assistant", content=last)])
    several = read_rubric(path, "single-v1-multi-turn", "pair-v2-multi-turn")
    assert "And 3+3?" in judge_prompt(several, talk("6"))[-1]["content"] and "six" in judge_prompt(several, talk("6"), talk("six"))[-1]["content"]


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path/"ledger.sqlite")
    yield made
    made.close()

def judge_at(server, name="grader", **options): return ApiTeacher([Endpoint(server.url, name)], **options)

def test_scores_come_back_in_copies_of_the_rows(ledger):
    rows = [row("x"*n, str(n), verdicts=dict(length=True)) for n in (1, 5, 9)]
    before = copy.deepcopy(rows)
    answer = lambda request: f"Rating: [[{said(request).count('x'*1)%7 + 1}]]"
    with ScriptedServer(answer) as server:
        judged = judge_points(judge_at(server), rows, RUBRIC, ledger, progress=False)
        assert judge_points(judge_at(server), rows, RUBRIC, ledger, progress=False) == judged
        assert server.counts()["requests"] == 3, "the second time the ledger knew"
    assert rows == before and [r["id"] for r in judged] == ["1", "5", "9"]
    assert all(set(r["verdicts"]) == {"length", "quality"} and 1 <= r["verdicts"]["quality"] <= 7 for r in judged)

def test_a_judge_without_numbers_is_named_counted_and_shown(ledger):
    rows = [row(str(n), str(n)) for n in range(10)]
    with ScriptedServer("This is a fine answer indeed.") as server:
        with pytest.raises(UnreadableJudge) as error: judge_points(judge_at(server), rows, RUBRIC, ledger, progress=False)
    for part in ("the judge grader gave no score in 10 of 10 replies", "at most 20%", "'This is a fine answer indeed.'", "rows are unchanged", "replies are in the ledger"): assert part in str(error.value)
    assert "\n" not in str(error.value) and ledger.counts()["done"] == 10 and not any(r["verdicts"] for r in rows)

def test_a_few_unread_replies_are_none_and_many_raise(ledger):
    rows = [row(str(n), str(n)) for n in range(10)]
    answer = lambda request: "no idea" if "\n3\n" in said(request) or "\n7\n" in said(request) else "[[6]]"
    with ScriptedServer(answer) as server:
        assert [r["verdicts"]["quality"] for r in judge_points(judge_at(server), rows, RUBRIC, ledger, progress=False)] == [6, 6, 6, None, 6, 6, 6, None, 6, 6]
        with pytest.raises(UnreadableJudge, match="2 of 10"): judge_points(judge_at(server), rows, RUBRIC, ledger, unread=0.1, progress=False)

@pytest.mark.filterwarnings('ignore:.*requests failed')
def test_cut_and_failed_replies_are_told_apart():
    rows = [row(str(n), str(n)) for n in range(4)]
    with ScriptedServer("many words before the verdict comes [[7]]") as server:
        with pytest.raises(UnreadableJudge, match="4 were cut at 3 tokens: give more.*no ledger was given"): judge_points(judge_at(server), rows, RUBRIC, None, Sampling(3), progress=False)
    def answer(request): return "[[7]]" if "\n0\n" in said(request) else ""
    with ScriptedServer(answer) as server:
        with pytest.raises(UnreadableJudge, match="3 requests failed, one with: an empty answer"): judge_points(judge_at(server, tries=1), rows, RUBRIC, progress=False)

def test_a_judge_that_is_down_is_one_clear_line(ledger):
    with ScriptedServer("[[7]]") as server:
        judge = judge_at(server, tries=2, first_wait=0.01, longest_wait=0.05)
        judge_points(judge, [row("1", "1")], RUBRIC, ledger, progress=False)
    with pytest.raises(EndpointError): judge_points(judge, [row("1", "1"), row("2", "2")], RUBRIC, ledger, progress=False)
    assert ledger.counts()["done"] == 1

def test_pairs_are_asked_in_both_orders(ledger):
    pairs = [(row("good", "a", f"Q{n}"), row("bad", "b", f"Q{n}")) for n in range(5)]
    with ScriptedServer(biased_judge(lambda a, b: (a == "good") - (b == "good"), 1.)) as server:
        fair = judge_pairs(judge_at(server, "fair"), pairs, RUBRIC, ledger, progress=False)
        assert server.counts()["requests"] == 10
    with ScriptedServer("I always say [[A]].") as server: blind = judge_pairs(judge_at(server, "blind"), pairs, RUBRIC, ledger, progress=False)
    with ScriptedServer("Hard to say.") as server:
        with pytest.raises(UnreadableJudge, match="the judge mute gave no choice in 10 of 10"): judge_pairs(judge_at(server, "mute"), pairs, RUBRIC, ledger, progress=False)
    assert {v.winner for v in fair} == {"first"} and position_bias(fair).value == 0
    assert {v.winner for v in blind} == {"tie"} and position_bias(blind).value == 0.5

def test_winners_of_both_orders():
    winner = lambda forward, backward: PairVerdict(forward, backward).winner
    assert [winner(*both) for both in ("AB", "BA", "AA", "BB")] == ["first", "second", "tie", "tie"]
    assert winner("tie", "tie") == winner("A", "tie") == winner("tie", "A") == "tie"
    assert winner(None, "A") is None and winner("B", None) is None
    assert PairVerdict("A", "A").votes == ("first", "second") and PairVerdict("tie", None).votes == ("tie", None)


VERDICTS = st.builds(PairVerdict, *[st.sampled_from(["A", "B", "tie"])]*2)

def test_position_bias_by_hand():
    four = [PairVerdict("A", "A"), PairVerdict("A", "B"), PairVerdict("B", "A"), PairVerdict("A", "A")]
    m = position_bias(four + [PairVerdict(None, "A")])
    shares = np.array([1, .5, .5, 1, 0, 1])                       # the last two are the imagined pairs
    half = 1.959964*shares.std()/math.sqrt(6)
    assert (m.value, m.n) == (.25, 4) and m.low == pytest.approx(shares.mean() - .5 - half) and m.high == pytest.approx(min(.5, shares.mean() - .5 + half))
    assert position_bias([PairVerdict("tie", "A")]).value == 0.25
    with pytest.raises(ValueError, match="no pair with both replies"): position_bias([PairVerdict(None, "A")])

@given(st.lists(VERDICTS, min_size=1, max_size=60))
def test_a_mirrored_judge_has_the_opposite_bias(verdicts):
    mirror = {"A": "B", "B": "A", "tie": "tie"}
    m, other = position_bias(verdicts), position_bias([PairVerdict(mirror[v.forward], mirror[v.backward]) for v in verdicts])
    assert m.low <= m.value <= m.high and m.low < m.high
    assert (m.value, m.low, m.high) == pytest.approx((-other.value, -other.high, -other.low))

@given(st.lists(VERDICTS, min_size=1, max_size=60))
def test_exchanging_the_answers_keeps_the_bias_and_turns_the_winners(verdicts):
    turned = [PairVerdict(v.backward, v.forward) for v in verdicts]
    assert position_bias(turned) == position_bias(verdicts)
    wins, other = Counter(v.winner for v in verdicts), Counter(v.winner for v in turned)
    assert (wins["first"], wins["second"], wins["tie"]) == (other["second"], other["first"], other["tie"])

def throw(judge, n, seed):
    "A judge's verdicts on n pairs in which each place is as often the better one."
    pairs = [(row("good" if i % 2 else "bad", "a", f"Q{i}"), row("bad" if i % 2 else "good", "b", f"Q{i}")) for i in range(n)]
    ask = lambda a, b: parse_choice(judge(dict(messages=judge_prompt(RUBRIC, a, b), seed=seed)))
    return [PairVerdict(ask(a, b), ask(b, a)) for a, b in pairs]

def prefers(a, b): return (a == "good") - (b == "good")

@pytest.mark.parametrize("bias,ability,n", [(0., .9, 50), (.2, .85, 100), (-.3, .7, 50), (.45, .9, 50)])
def test_the_interval_of_the_bias_covers_it(bias, ability, n):
    judge, hits, trials = biased_judge(prefers, ability, bias), 0, 150
    for seed in range(trials): hits += (m := position_bias(throw(judge, n, seed))).low <= bias <= m.high
    assert proportion_interval(hits, trials, 0.999)[2] >= 0.95, f"{hits} of {trials} intervals hold {bias}"

def test_both_orders_take_the_bias_out():
    verdicts = throw(biased_judge(prefers, .85, .25), 2000, 0)
    once = proportion_interval(sum(v.forward == "A" for v in verdicts), len(verdicts))
    both = win_share(verdicts)
    assert once[1] > 0.7 and both.low < 0.5 < both.high and abs(both.value - 0.5) < 0.06

def test_dice_depend_on_prompt_and_seed_only():
    judge = biased_judge(prefers, .6)
    assert throw(judge, 30, 1) == throw(judge, 30, 1) != throw(judge, 30, 2)
    with pytest.raises(ValueError, match="bias must be in"): biased_judge(prefers, bias=.6)

def test_a_win_share_needs_a_winner():
    with pytest.raises(ValueError, match="no pair has a winner in both orders, of 1"): win_share([PairVerdict("A", "A")])
    assert (win_share([PairVerdict("A", "B")]*3 + [PairVerdict("A", "A")]).value, win_share([PairVerdict("A", "B")]).n) == (1., 1)


def test_kappa_by_hand():
    found = agreement(["yes"]*50 + ["no"]*50, ["yes"]*40 + ["no"]*10 + ["yes"]*5 + ["no"]*45)
    assert found["raw"].value == .85 and found["kappa"].value == pytest.approx((.85 - .5)/.5)
    low, high = proportion_interval(85, 100)[1:]
    assert (found["kappa"].low, found["kappa"].high) == pytest.approx(((low - .5)/.5, (high - .5)/.5))
    assert agreement(["a", None, "b"], ["a", "a", None])["skipped"] == 2
    assert math.isnan(agreement(["a"]*4, ["a"]*4)["kappa"].value) and agreement(["a"]*4, ["a"]*4)["raw"].value == 1
    with pytest.raises(ValueError, match="not 1 and 2"): agreement(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="no item has a verdict of both"): agreement([None], ["a"])

@pytest.mark.peer
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=2, max_size=80))
def test_kappa_is_sklearns(pairs):
    first, second = map(list, zip(*pairs))
    ours = agreement(first, second)["kappa"]
    if len(set(first) | set(second)) > 1:
        assert ours.value == pytest.approx(cohen_kappa_score(first, second)) and ours.low < ours.high
        assert ours.value == pytest.approx(agreement(second, first)["kappa"].value)

@pytest.mark.parametrize("prevalence,kappa,n", [(.5, .6, 60), (.8, .3, 100), (.9, .8, 100), (.5, .9, 60)])
def test_the_interval_of_kappa_covers_it(prevalence, kappa, n):
    chance = prevalence**2 + (1 - prevalence)**2
    apart = (1 - chance - kappa*(1 - chance))/2
    dice, hits = np.random.default_rng(0), 0
    for counts in dice.multinomial(n, [prevalence - apart, apart, apart, 1 - prevalence - apart], size=400):
        first, second = np.repeat(list("aabb"), counts).tolist(), np.repeat(list("abab"), counts).tolist()
        found = agreement(first, second)["kappa"]
        hits += math.isnan(found.value) or found.low <= kappa <= found.high
    assert proportion_interval(hits, 400, 0.999)[2] >= 0.95, f"{hits} of 400"


@pytest.fixture(scope="module")
def teacher(shipped_models): return load_model("teacher"), load_tokenizer("teacher")

def judged_rows():
    items = [e for suite in ("knowledge", "common_sense", "medical") for e in examples(suite, 12, split="test", seed=7)]
    as_row = lambda e, a, n: dict(id=n, messages=e["messages"] + [dict(role="assistant", content=a)], example=e)
    return [as_row(e, a, f"{i}-{a == e['answer']}") for i, e in enumerate(items) for a in (e["answer"], next(c for c in e["choices"] if c != e["answer"]))]

def test_likelihood_is_that_of_the_model(teacher):
    import torch
    model, tokenizer = teacher
    rows = judged_rows()[:3]
    for mean in (True, False):
        for r, score in zip(rows, likelihood_judge(model, tokenizer, rows, mean)):
            before, answer = split_pair(tokenizer, chat_prompt(tokenizer, r["messages"][:-1]), r["messages"][-1]["content"])
            with torch.no_grad(): logits = model(torch.tensor([before + answer])).logits[0, len(before) - 1:-1].log_softmax(-1)
            by_hand = logits[range(len(answer)), answer]
            assert score == pytest.approx(float(by_hand.mean() if mean else by_hand.sum()), abs=1e-3)
    assert likelihood_judge(model, tokenizer, rows, batch_size=1) == pytest.approx(likelihood_judge(model, tokenizer, rows), abs=1e-4)

def test_likelihood_tells_right_from_wrong_in_the_world_that_the_model_knows(teacher):
    rows = judged_rows()
    assert roc_auc_score([r["id"].endswith("True") for r in rows], likelihood_judge(*teacher, rows, mean=False)) > 0.9

def test_an_empty_answer_is_named(teacher):
    with pytest.raises(ValueError, match="row 'nothing' has an empty answer.*1 such rows"): likelihood_judge(*teacher, [row("4"), row("", "nothing")])

def test_the_teacher_was_never_taught_to_judge(teacher, ledger):
    rows = judged_rows()[:6]
    with pytest.raises(UnreadableJudge, match=r"the judge teacher@\w+ gave no score in [56] of 6"): judge_points(LocalTeacher(*teacher, "teacher"), rows, RUBRIC, ledger, Sampling(24), progress=False)
    assert ledger.counts()["done"] == 6


def dataset(sizes): return [row(f"{name}{i}", f"{name}-{i}", lineage=dict(template=name)) for name, n in sizes.items() for i in range(n)]

def test_every_stratum_is_in_the_sample():
    sample = review_sample(dataset(dict(big=200, small=5, one=1)), 0.1)
    assert Counter(r["review"]["stratum"] for r in sample) == dict(big=20, small=2, one=1)
    assert {r["review"]["stratum"]: (r["review"]["rows"], r["review"]["drawn"]) for r in sample} == dict(big=(200, 20), small=(5, 2), one=(1, 1))
    by_length = review_sample(dataset(dict(big=20)), 0.5, by=lambda r: len(r["messages"][-1]["content"]))
    assert {r["review"]["stratum"] for r in by_length} == {"4", "5"}

@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60), min_size=1), st.floats(0.01, 1), st.integers(0, 5), st.integers(0, 3))
def test_a_sample_depends_on_rows_and_seed_only(sizes, share, least, seed):
    rows = dataset(sizes)
    sample, shuffled = review_sample(rows, share, least=least, seed=seed), random.Random(0).sample(rows, len(rows))
    assert sample == review_sample(shuffled, share, least=least, seed=seed)
    assert len({r["id"] for r in sample}) == len(sample) and "review" not in rows[0]
    for name, n in sizes.items(): assert sum(r["review"]["stratum"] == name for r in sample) == min(n, max(least, round(share*n)))

def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(ValueError, match="0 rows"): review_sample([])
    with pytest.raises(ValueError, match=r"share in \(0, 1\]"): review_sample([row("4")], 0)
    with pytest.raises(ValueError, match="two rows have the id 'r'"): review_sample([row("4"), row("5")])
    with pytest.raises(ValueError, match="row 'r' has no 'lineage.topic'"): review_sample([row("4")], by="lineage.topic")


def test_buttons_decide_and_the_next_row_appears(ledger):
    sample = review_sample(dataset(dict(big=30)), 0.1)
    review = Review(sample, ledger, who="me")
    panel = judging.ReviewPanel(review)
    review.panel, ids = panel, list(review.rows)
    assert ids[0] in panel.card.value and "0 of 3 decided" in panel.status.value
    panel.note.value = "so so"
    for name in ("reject", "skip", "accept"): panel.buttons[name].click()
    assert {id: d["decision"] for id, d in review.decisions().items()} == dict(zip(ids, ("reject", "skip", "accept")))
    assert (review.decisions()[ids[0]]["note"], review.decisions()[ids[0]]["who"], panel.note.value) == ("so so", "me", "")
    assert panel.id == ids[1], "the skipped row comes back at the end"
    panel.buttons["accept"].click()
    assert panel.buttons["accept"].disabled and "All rows are decided" in panel.card.value and "3 of 3 decided: 2 accepted, 1 rejected, 0 skipped" in panel.status.value

def test_skipping_goes_round(ledger):
    review = Review(review_sample(dataset(dict(big=30)), 0.1), ledger)
    seen = []
    for _ in range(6): seen.append(review.todo()[0]); review.decide(seen[-1], "skip")
    assert seen[:3] == seen[3:] and len(set(seen)) == 3

def test_a_review_goes_on_in_another_session_and_under_another_name(ledger):
    sample = review_sample(dataset(dict(big=30)), 0.1)
    first = Review(sample, ledger)
    done = first.todo()[0]
    first.decide(done, "accept", "fine")
    assert done not in Review(sample, ledger).todo() and done in Review(sample, ledger, "second").todo()
    first.decide(done, "reject")
    assert Review(sample, ledger).decisions()[done]["decision"] == "reject"
    with pytest.raises(ValueError, match="no row 'x'"): first.decide("x", "accept")
    with pytest.raises(ValueError, match="a decision is accept, reject, skip, not 'maybe'"): first.decide(done, "maybe")
    with pytest.raises(ValueError, match="distinct ids, not 2 rows with 1"): Review([row("4"), row("4")], ledger)

def test_what_could_not_be_saved_stays_on_the_screen(tmp_path):
    ledger = Ledger(tmp_path/"l.sqlite")
    review = Review(review_sample(dataset(dict(big=30)), 0.1), ledger)
    review.panel = panel = judging.ReviewPanel(review)
    shown, write = panel.id, ledger.decide
    def full(*_): raise sqlite3.OperationalError("database or disk is full")
    ledger.decide = full
    panel.buttons["accept"].click()
    assert panel.id == shown and panel.status.value == "<b>not saved</b>: database or disk is full" and not review.decisions()
    ledger.decide = write
    panel.buttons["accept"].click()
    assert panel.id != shown and list(review.decisions()) == [shown]
    ledger.close()

def test_a_killed_session_loses_no_decision(tmp_path):
    script = f"""
import os, signal
from distillbook.synth.judging import Review, ReviewPanel
from distillbook.synth.teachers import Ledger
rows = [dict(id=str(i), messages=[dict(role="user", content="Q"), dict(role="assistant", content="A")]) for i in range(9)]
review = Review(rows, Ledger({str(tmp_path/'l.sqlite')!r}))
review.panel = ReviewPanel(review)
for name in ("accept", "reject", "skip", "accept"): review.panel.buttons[name].click()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    rows = [dict(id=str(i), messages=[dict(role="user", content="Q"), dict(role="assistant", content="A")]) for i in range(9)]
    review = Review(rows, Ledger(tmp_path/"l.sqlite"))
    assert [d["decision"] for d in review.decisions().values()] == ["accept", "reject", "skip", "accept"] and review.todo()[0] == "4"

def test_nothing_that_a_model_wrote_runs_in_the_browser():
    hostile = row("<script>alert(1)</script>", "<b>", "<img src=x onerror=alert(2)>", lineage={"<i>": "</table><script>"}, verdicts={"judge": 7.})
    card = review_card(hostile)
    assert "<script" not in card and "<img" not in card and "<i>" not in card and "&lt;script&gt;" in card and "7.0" in card


def decided(sizes, accepted):
    "A review of everything: the first `accepted[name]` rows of each stratum are good."
    sample = review_sample(dataset(sizes), 1.)
    return sample, {r["id"]: "accept" if int(r["id"].split("-")[1]) < accepted[r["review"]["stratum"]] else "reject" for r in sample}

def test_one_stratum_is_wilsons_interval():
    overall = acceptance(*decided(dict(a=40), dict(a=34)))["overall"]
    assert (overall.value, overall.low, overall.high, overall.n) == pytest.approx((*proportion_interval(34, 40), 40))

def test_strata_count_by_their_size():
    sample = [dict(id=str(i), review=dict(stratum="ab"[i >= 4], rows=(90, 10)[i >= 4], drawn=4)) for i in range(8)]
    found = acceptance(sample, {str(i): "accept" if i < 4 else "reject" for i in range(8)})
    assert found["overall"].value == pytest.approx(.9) and found["overall"].low < .9 < found["overall"].high < 1
    assert (found["strata"]["a"].value, found["strata"]["b"].value, found["undecided"], found["missing"]) == (1, 0, 0, [])
    part = acceptance(sample, {"0": dict(decision="accept"), "1": "skip"})
    assert (part["undecided"], part["missing"], part["overall"].n) == (7, ["b"], 1)
    with pytest.raises(ValueError, match="none of 8 rows"): acceptance(sample, {"0": "skip"})

@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=5))
def test_the_rate_lies_in_its_interval(strata):
    sizes, good = {f"s{i}": n for i, (n, _) in enumerate(strata)}, {f"s{i}": min(n, k) for i, (n, k) in enumerate(strata)}
    overall = acceptance(*decided(sizes, good))["overall"]
    assert 0 <= overall.low <= overall.value + 1e-12 and overall.value <= overall.high + 1e-12 and overall.high <= 1 and overall.low < overall.high
    assert overall.value == pytest.approx(sum(good.values())/sum(sizes.values()))

@pytest.mark.parametrize("sizes,rates,n", [([1000, 50, 20], [.95, .5, .2], [50, 5, 5]), ([600, 100, 100], [1., .9, .8], [60, 10, 10]), ([300, 300], [.3, .95], [30, 30])])
def test_the_interval_of_the_acceptance_covers_it(sizes, rates, n):
    true, dice, hits = sum(s*r for s, r in zip(sizes, rates))/sum(sizes), np.random.default_rng(1), 0
    sample = [dict(id=f"{i}-{j}", review=dict(stratum=str(i), rows=sizes[i], drawn=n[i])) for i in range(len(sizes)) for j in range(n[i])]
    for _ in range(400):
        m = acceptance(sample, {r["id"]: "accept" if dice.random() < rates[int(r["review"]["stratum"])] else "reject" for r in sample})["overall"]
        hits += m.low <= true <= m.high
    assert proportion_interval(hits, 400, 0.999)[2] >= 0.95, f"{hits} of 400"

def test_how_many_rows_a_review_needs():
    from scipy.stats import binom
    assert reviews_needed() == 239                # (1.960*sqrt(.09) + 0.842*sqrt(.0475))^2/.05^2 = 238.4
    for bar, real in ((.9, .95), (.8, .9), (.95, .9)):
        n = reviews_needed(bar, real)
        power = sum(binom.pmf(k, n, real) for k in range(n + 1) if not proportion_interval(k, n)[1] <= bar <= proportion_interval(k, n)[2])
        assert .72 < power < .9, (bar, real, n, power)
    assert reviews_needed(.9, .95, power=.9) > reviews_needed(.9, .95) > reviews_needed(.8, .95)
    with pytest.raises(ValueError, match="two different rates"): reviews_needed(.9, .9)


def real_pairs(realdata):
    "252 instructions, each with a weak and a strong model's answer."
    read = lambda name: [json.loads(line) for line in (realdata/"seeds"/name).read_text(encoding="utf-8").splitlines()]
    weak, strong = read("davinci_predictions.jsonl"), read("text-davinci-003_predictions.jsonl")
    assert [w["prompt"] for w in weak] == [s["prompt"] for s in strong] and len(weak) == 252
    return [(row(s["response"].strip(), f"{i}s", s["prompt"]), row(w["response"].strip(), f"{i}w", s["prompt"])) for i, (w, s) in enumerate(zip(weak, strong))]

MT_BENCH = re.compile(r"\[The Start of Assistant A's Answer\]\n(.*?)\n\[The End of Assistant A's Answer\]\n\n\[The Start of Assistant B's Answer\]\n(.*?)\n\[The End of Assistant B's Answer\]", re.S)

def test_order_effects_on_real_answers(realdata, ledger):
    "A judge by a rule that ignores places has no bias; with a set bias the machinery finds it, through the published prompt."
    rubric, pairs = read_rubric(realdata/"benchmarks"/"mt_bench"/"judge_prompts.jsonl"), real_pairs(realdata)
    def longer(a, b): return (len(a) > len(b)) - (len(a) < len(b))
    def rule(request):
        a, b = MT_BENCH.search(said(request)).groups()
        return f"Assistant A wrote {len(a)} letters. [[{'A' if longer(a, b) > 0 else 'B' if longer(a, b) < 0 else 'C'}]]"
    with ScriptedServer(rule) as server: fair = judge_pairs(judge_at(server, "by length"), pairs, rubric, ledger, progress=False)
    assert position_bias(fair).value == 0 and [v.winner for v in fair] == ["first" if (x := longer(s["messages"][-1]["content"], w["messages"][-1]["content"])) > 0 else "second" if x else "tie" for s, w in pairs]
    for bias in (0.2, -0.3):
        with ScriptedServer(biased_judge(longer, 0.95, bias, MT_BENCH)) as server: found = judge_pairs(judge_at(server, f"leaning {bias}"), pairs, rubric, ledger, progress=False)
        m = position_bias(found)
        assert m.low <= bias <= m.high and m.n == 252
    print(f"the longer answer is the strong model's: {win_share(fair)}; found for a bias of {bias}: {m}")

def test_judges_that_do_not_read(realdata, teacher):
    "Likelihood and embedding relevance run on real text of any kind; neither is a judge of it: no share of the strong model's answers comes near that of a reader."
    cut = lambda r, n=300: dict(r, messages=[dict(m, content=m["content"][:n]) for m in r["messages"]])
    pairs = [(cut(s), cut(w)) for s, w in real_pairs(realdata) if s["messages"][-1]["content"] and w["messages"][-1]["content"]][:24]
    share = {}
    for mean in (True, False):
        strong, weak = (likelihood_judge(*teacher, [p[i] for p in pairs], mean) for i in (0, 1))
        assert all(math.isfinite(x) and x <= 0 for x in strong + weak)
        share["likelihood, " + ("mean" if mean else "sum")] = proportion_interval(sum(a > b for a, b in zip(strong, weak)), len(pairs))
    try:
        from distillbook.synth.curate import embed
        questions, strong, weak = (np.asarray(embed([p[i]["messages"][j]["content"] for p in pairs])) for i, j in ((0, 0), (0, 1), (1, 1)))
        share["embedding relevance"] = proportion_interval(int(((questions*strong).sum(1) > (questions*weak).sum(1)).sum()), len(pairs))
    except ImportError: pass
    print({name: f"{p:.2f} ({low:.2f} to {high:.2f})" for name, (p, low, high) in share.items()})
    assert all(p < 0.8 for p, _, _ in share.values())
