"Seeds, templates, answers, the best of several, pairs, documents, and an estimate that the run keeps."
import json, math, random
from collections import Counter
from dataclasses import replace
import pytest
from hypothesis import given, settings, strategies as st
from conftest import ROOT
from distillbook.lab.microworld import SUITES, as_conversation, check, examples
from distillbook.synth.generate import (Template, answer_rows, balanced_cells, best_of, by_prompt, document_parts, document_prompts, draw_prompts, draws_needed,
    fill_template, general_templates, is_right, only_result, preference_pairs, preview, read_seeds, styles_of, task_messages, traits, world_item, world_seeds, world_templates, write_seeds)
from distillbook.synth.teachers import Endpoint, ApiTeacher, Ledger, Reply, Sampling


GOOD = dict(id="a", name="colour", instruction="Name a colour.", instances=[dict(input="", output="Red.")], is_classification=False)

def seed_file(folder, *lines):
    path = folder/"seeds.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path

class Parrot:
    "A teacher without a model: its reply is a function of messages and seed; what it names in `fails` it does not answer."
    def __init__(self, reply, name="parrot", fails=lambda request: False): self.reply, self.name, self.fails, self.asked, self.batch_tokens = reply, name, fails, [], 1000
    def check(self, conversations, sampling): pass
    def answer(self, requests, record):
        self.asked += requests
        record([Reply("", "error", error="no luck", key=r.key) if self.fails(r) else
                Reply(self.reply(r.messages, r.seed), "stop", 20, 10, .5 + 1e-9*i, .003, self.name, key=r.key) for i, r in enumerate(requests)])

def rows_of(n, suite="rules", **options):
    return [dict(id=f"{suite}-{i}", messages=e["messages"], lineage=dict(seed=None, template=suite, slots={}), example=e, verdicts={})
            for i, e in enumerate(examples(suite, n, seed=3, **options))]

def answered(scores):
    "Rows of prompts p0, p1, ... with a draw for each score."
    return [dict(id=f"p{p}.{i}", messages=[dict(role="user", content=f"q{p}"), dict(role="assistant", content=f"a{i}")], lineage=dict(prompt=f"p{p}", draw=i), example=None, verdicts=dict(points=s))
            for p, some in enumerate(scores) for i, s in enumerate(some)]

points = lambda row: row["verdicts"]["points"]


# Seed tasks

def test_shipped_seeds_are_what_their_function_writes(tmp_path):
    write_seeds(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in (ROOT/"data"/"seeds").iterdir()}

def test_shipped_seeds_number_thirty_a_suite_of_the_train_half_and_their_answers_are_right():
    tasks = read_seeds(ROOT/"data"/"seeds")
    assert Counter(task["example"]["suite"] for task in tasks) == {suite: 30 for suite in SUITES}
    assert Counter(task["example"]["difficulty"] for task in tasks) == {1: 100, 2: 100, 3: 100}
    assert len({json.dumps(task_messages(task)) for task in tasks}) == len(tasks)
    wrong = [task["id"] for task in tasks if task["example"]["suite"] != "code" and not check(task["example"], task["instances"][0]["output"])]
    assert not wrong
    code = [task for task in tasks if task["example"]["suite"] == "code"][::10]      # each starts a child process
    assert all(check(task["example"], task["instances"][0]["output"]) for task in code)

def test_no_test_question_is_a_seed():
    tested = {json.dumps(e["messages"]) for suite in SUITES for d in (1, 2, 3) for e in examples(suite, 200, "test", 1, d)}
    assert not tested & {json.dumps(task_messages(task)) for task in read_seeds(ROOT/"data"/"seeds")}

@pytest.mark.parametrize("line, fault", [
    ('{"id": "b", "name": "x"', "line 2: not JSON"),
    ("[1, 2]", "line 2: an object is expected, not list"),
    (dict(GOOD, id="a"), "line 2: the id 'a' is taken by seeds.jsonl, line 1"),
    ({"id": "b"}, "line 2: lacks instruction and instances"),
    (dict(GOOD, id="b", instruction="  "), "line 2: instruction must be a text that is not empty"),
    (dict(GOOD, id=7), "line 2: id must be a text"),
    (dict(GOOD, id="b", instances=[]), "line 2: instances must be a list of at least one"),
    (dict(GOOD, id="b", instances=["x"]), "line 2: instances[0] must be an object"),
    (dict(GOOD, id="b", instances=[dict(input="")]), "line 2: instances[0] lacks output"),
    (dict(GOOD, id="b", instances=GOOD["instances"] + [dict(input=3, output="x")]), "line 2: instances[1].input must be a text, not 3"),
    (dict(GOOD, id="b", instances=[dict(input="", output=" ")]), "line 2: instances[0].output is empty"),
    (dict(GOOD, id="b", example=dict(suite="rules")), "line 2: example must hold"),
])
def test_a_malformed_seed_raises_with_file_line_and_fault(tmp_path, line, fault):
    with pytest.raises(ValueError) as error: read_seeds(seed_file(tmp_path, GOOD, line))
    assert "seeds.jsonl, " + fault in str(error.value)

def test_lines_are_counted_with_blank_ones_and_odd_separators(tmp_path):
    odd = dict(GOOD, id="b", instruction="A line separator \u2028 inside.")
    path = seed_file(tmp_path, GOOD, "", json.dumps(odd, ensure_ascii=False), '{"id": ')
    with pytest.raises(ValueError, match="line 4: not JSON"): read_seeds(path)

def test_bytes_that_are_not_utf8_an_empty_file_and_no_file(tmp_path):
    path = tmp_path/"seeds.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(ValueError, match="seeds.jsonl, line 2: not UTF-8"): read_seeds(path)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no seed task"): read_seeds(path)
    with pytest.raises(FileNotFoundError, match="no seed tasks"): read_seeds(tmp_path/"absent.jsonl")
    (tmp_path/"empty").mkdir()
    with pytest.raises(FileNotFoundError): read_seeds(tmp_path/"empty")

def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    path = tmp_path/"seeds.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(dict(GOOD, id="b")).encode() + b"\r\n")
    assert [task["id"] for task in read_seeds(path)] == ["a", "b"]

def test_an_input_goes_below_the_instruction():
    task = dict(GOOD, instruction="Add up: ", instances=[dict(input="2 and 3", output="5")])
    assert task_messages(task) == [dict(role="user", content="Add up:\n\n2 and 3")]
    item = world_seeds("persona", 3)[0]
    assert task_messages(item) == item["example"]["messages"]
    assert item["example"]["messages"][0]["content"] in item["instances"][0]["input"]

def test_a_suite_without_so_many_questions_says_so(monkeypatch):
    import distillbook.synth.generate as module
    monkeypatch.setattr(module, "examples", lambda suite, n, *a, **k: examples(suite, n, seed=0))
    with pytest.raises(ValueError, match="no 30 different questions"): world_seeds("safety")


# Templates

@given(st.lists(st.integers(1, 6), min_size=0, max_size=4), st.data())
@settings(max_examples=60)
def test_cells_are_different_and_balanced(sizes, data):
    total = math.prod(sizes)
    n = data.draw(st.integers(0, total))
    cells = balanced_cells(sizes, n, random.Random(0))
    assert len(cells) == len(set(cells)) == n
    assert all(0 <= cell[k] < size for cell in cells for k, size in enumerate(sizes))
    if n == total or 4*n <= total:      # in between a grid may be too full to trade
        for k, size in enumerate(sizes):
            counts = Counter(cell[k] for cell in cells)
            assert max(counts.values(), default=0) - min((counts[v] for v in range(size)), default=0) <= 1

def test_more_cells_than_there_are_raises():
    with pytest.raises(ValueError, match="13 different combinations of 3 x 4 = 12"): balanced_cells([3, 4], 13, random.Random(0))

@pytest.mark.parametrize("options, fault", [
    (dict(text="{tone}"), r"\{tone\} is neither a slot nor one of task"),
    (dict(slots=dict(tone=["kind"])), "the slot tone is nowhere in the text"),
    (dict(text="{tone}", slots=dict(tone=[])), "the slot tone needs values"),
    (dict(text="{tone}", slots=dict(tone=["a", "a"])), "the slot tone needs values, each once"),
    (dict(shown=0), "shown must be 1 or more"),
])
def test_a_template_that_cannot_be_filled_is_refused(options, fault):
    with pytest.raises(ValueError, match=fault): Template("t", **options)

def test_braces_in_a_seed_stay_as_they_are():
    task = dict(GOOD, instruction="Fill {blank} and {0} and {{x}}.")
    messages, item = fill_template(Template("t", "{task} {style}", dict(style=["Now."])), [task], dict(style="Now."), random.Random(0))
    assert messages == [dict(role="user", content="Fill {blank} and {0} and {{x}}. Now.")] and item is None

SEEDS = read_seeds(ROOT/"data"/"seeds")

def test_prompts_are_balanced_different_and_carry_their_lineage():
    rows = draw_prompts(SEEDS, n=400, seed=5)
    assert len(rows) == 400 and len({json.dumps(r["messages"]) for r in rows}) == 400 and len({r["id"] for r in rows}) == 400
    assert set(Counter(r["lineage"]["template"] for r in rows).values()) == {40}
    assert set(Counter(r["lineage"]["seed"] for r in rows).values()) <= {1, 2}
    ids = {task["id"]: task for task in SEEDS}
    for template in world_templates():
        used = [r["lineage"]["slots"] for r in rows if r["lineage"]["template"] == template.name]
        for slot, values in template.slots.items():
            counts = Counter(u[slot] for u in used)
            assert max(counts.values()) - min(counts[v] for v in values) <= 1, (template.name, slot)
    for r in rows:
        assert r["example"]["suite"] == ids[r["lineage"]["seed"]]["example"]["suite"] and r["messages"] == r["example"]["messages"]
        assert r["messages"][-1]["role"] == "user" and r["verdicts"] == {}
    json.dumps(rows)

def test_same_seed_same_prompts_other_seed_others():
    texts = lambda seed: {json.dumps(r["messages"]) for r in draw_prompts(SEEDS[:60], n=60, seed=seed)}
    assert draw_prompts(SEEDS[:60], n=60, seed=1) == draw_prompts(SEEDS[:60], n=60, seed=1)
    assert len(texts(1) & texts(2)) < 10

def test_items_are_as_the_slots_say_and_for_the_rest_as_the_seed():
    for row in draw_prompts(SEEDS, n=200, seed=2):
        slots, item = row["lineage"]["slots"], row["example"]
        found, own = traits(item), next(task for task in SEEDS if task["id"] == row["lineage"]["seed"])["example"]
        assert all(found[name] == slots[name] for name in ("style", "constraint", "edge_case") if name in slots)
        assert item["difficulty"] == slots.get("difficulty", own["difficulty"])
        if "topic" in found: assert found["topic"] == traits(own)["topic"]
        if "length" in slots: assert sum(m["role"] == "user" for m in item["messages"]) == slots["length"]

@pytest.mark.parametrize("suite", SUITES)
def test_every_style_occurs_in_the_world(suite):
    seen = Counter(traits(e)["style"] for e in examples(suite, 400, seed=1))
    assert set(seen) == set(styles_of(suite)), suite

def test_a_slot_for_the_topic_overrides_the_seed():
    template = replace(world_templates(["knowledge"])[0], slots=dict(topic=["river", "bird"]))
    rows = draw_prompts(SEEDS, [template], 20)
    assert Counter(traits(r["example"])["topic"] for r in rows) == dict(river=10, bird=10)

def test_an_item_that_the_world_does_not_hold_says_so():
    with pytest.raises(ValueError, match="no question with .*weather.* in 50 draws"): world_item(world_seeds("knowledge", 1)[0], dict(topic="weather"), random.Random(0), tries=50)

def test_text_templates_raise_when_there_are_not_so_many_prompts():
    template = Template("t", "{task} {style}", dict(style=["a", "b"]))
    assert len(draw_prompts([GOOD, dict(GOOD, id="b", instruction="Name a fruit.")], [template], 4)) == 4
    with pytest.raises(ValueError, match="template t: 3 different combinations of 1 x 2 = 2; add seeds, slots or values"): draw_prompts([GOOD], [template], 3)
    with pytest.raises(ValueError, match="template t: 2 different prompts found and 4 wanted"): draw_prompts([GOOD, dict(GOOD, id="twin")], [template], 4)

def test_templates_that_no_seed_fits_or_that_share_a_name_are_refused():
    with pytest.raises(ValueError, match="no seed is of the suite rules"): draw_prompts([GOOD], world_templates(["rules"]), 3)
    with pytest.raises(ValueError, match="two templates have one name"): draw_prompts([GOOD], [Template("t"), Template("t")], 1)
    with pytest.raises(ValueError, match="at least one seed"): draw_prompts([], None, 1)
    with pytest.raises(ValueError, match="shows 3 seeds and there are 1"): draw_prompts([GOOD], general_templates()[:1], 1)


# Answers

def test_every_answer_carries_its_lineage_and_nothing_is_asked_twice(tmp_path):
    teacher, ledger, rows = Parrot(lambda messages, seed: f"draw {seed}"), Ledger(tmp_path/"l.sqlite"), rows_of(5)
    made = answer_rows(rows, teacher, Sampling(9, 1.), ledger, samples=3, seed=10, progress=False)
    assert [r["messages"][-1]["content"] for r in made] == ["draw 10", "draw 11", "draw 12"]*5
    assert [r["id"] for r in made[:4]] == ["rules-0.10", "rules-0.11", "rules-0.12", "rules-1.10"]
    line = made[4]["lineage"]
    assert line["prompt"] == "rules-1" and line["teacher"] == "parrot" and line["draw"] == 11 and line["sampling"] == dict(max_new_tokens=9, temperature=1., top_p=1.)
    assert ledger.replies([line["request"]])[line["request"]].text == "draw 11" and line["tokens"] == [20, 10]
    answer_rows(rows, teacher, Sampling(9, 1.), ledger, samples=4, seed=10, progress=False)
    assert len(teacher.asked) == 5*4
    assert rows[0]["messages"][-1]["role"] == "user" and "teacher" not in rows[0]["lineage"]      # the prompts stay as they were
    json.dumps(made)

def test_failed_requests_leave_rows_out_with_a_warning_and_come_back():
    ledger, rows = Ledger(":memory:"), rows_of(6)
    broken = Parrot(lambda m, s: "ok", fails=lambda r: r.messages in [rows[1]["messages"], rows[4]["messages"]])
    with pytest.warns(UserWarning, match="2 of 6 requests failed.*no luck"): made = answer_rows(rows, broken, Sampling(9), ledger, progress=False)
    assert [r["id"] for r in made] == ["rules-0", "rules-2", "rules-3", "rules-5"]
    mended = Parrot(lambda m, s: "ok")
    assert [r["id"] for r in answer_rows(rows, mended, Sampling(9), ledger, progress=False)] == [f"rules-{i}" for i in range(6)] and len(mended.asked) == 2
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="all 6 requests failed"): answer_rows(rows, Parrot(None, "dead", lambda r: True), Sampling(9), ledger, progress=False)

def test_samples_need_a_temperature():
    with pytest.raises(ValueError, match="all samples of a prompt are one"): answer_rows(rows_of(1), Parrot(None), Sampling(9), samples=2)
    with pytest.raises(ValueError, match="samples 0"): answer_rows(rows_of(1), Parrot(None), Sampling(9), samples=0)

def test_is_right_asks_the_checker_and_says_what_it_cannot_judge():
    row = rows_of(1)[0]
    assert is_right(row | dict(messages=as_conversation(row["example"]))) == 1.
    assert is_right(row | dict(messages=row["messages"] + [dict(role="assistant", content="Result pizza.")])) == 0.
    with pytest.raises(ValueError, match="has no answer yet"): is_right(row)
    with pytest.raises(ValueError, match="no example to check"): is_right(row | dict(example=None))


# The best of several, and pairs

@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=5))
def test_best_of_keeps_the_first_best_of_each_prompt(scores):
    rows = answered(scores)
    kept = best_of(rows, points)
    assert [r["id"] for r in kept] == [f"p{p}.{some.index(max(some))}" for p, some in enumerate(scores)]
    assert [r["verdicts"]["best_of"]["score"] for r in kept] == list(map(max, scores))
    assert best_of(rows, list(map(points, rows))) == kept
    assert len(best_of(rows, points, at_least=2)) == sum(max(some) >= 2 for some in scores)
    assert by_prompt(rows) == by_prompt(list(rows)) and "best_of" not in rows[0]["verdicts"]

@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(1, 3))
def test_pairs_are_of_one_prompt_and_the_chosen_scores_higher(scores, most):
    rows = answered(scores)
    pairs = preference_pairs(rows, points, most=most)
    for pair in pairs:
        good, bad = pair["lineage"]["scores"]
        assert good > bad and pair["lineage"]["chosen"]["prompt"] == pair["lineage"]["rejected"]["prompt"]
        assert pair["prompt"][-1]["role"] == "user" and [m["role"] for m in pair["chosen"] + pair["rejected"]] == ["assistant", "assistant"]
    assert max(Counter(p["lineage"]["chosen"]["prompt"] for p in pairs).values(), default=0) <= most
    assert {p["lineage"]["chosen"]["prompt"] for p in pairs} == {f"p{i}" for i, some in enumerate(scores) if len(set(some)) > 1}

def test_pairs_by_hand():
    pairs = preference_pairs(answered([[1, 3, 0, 2], [2, 2]]), points, most=2)
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs] == [("a1", "a2"), ("a3", "a0")]
    assert preference_pairs(answered([[1, 3]]), points, gap=2) == []

@pytest.mark.parametrize("bad", [math.nan, None, "high"])
def test_a_score_that_is_no_number_names_the_row(bad):
    for choose in (best_of, preference_pairs):
        with pytest.raises(ValueError, match=r"row p0\.1: its score is"): choose(answered([[1, bad]]), points)
    with pytest.raises(ValueError, match="1 scores for 2 rows"): best_of(answered([[1, 2]]), [1.])

def test_trl_trains_on_the_pairs(shipped_models, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from distillbook.lab.models import load_tokenizer, tiny_qwen3
    words, rows = load_tokenizer("teacher"), rows_of(4)
    drawn = answer_rows(rows, Parrot(lambda m, s: "Result fox." if s else "So a b, b c. Result cat."), Sampling(9, 1.), samples=2, progress=False)
    pairs = preference_pairs(drawn, lambda row: row["lineage"]["draw"])
    data = Dataset.from_list([{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs])
    settings = DPOConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no", logging_steps=1)
    tiny_qwen3(words, hidden_size=32, layers=1, intermediate_size=32, heads=2, kv_heads=1, head_dim=16).save_pretrained(tmp_path/"tiny")
    trainer = DPOTrainer(str(tmp_path/"tiny"), args=settings, train_dataset=data, processing_class=words)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - math.log(2)) < 1e-3      # untrained, the two are equally likely to it and to its reference
    row = trainer.train_dataset[0]
    prompt, chosen = (words.decode(row[name]) for name in ("prompt_ids", "chosen_ids"))
    assert prompt.endswith("<|assistant|>\n") and chosen.startswith("Result fox.<|end|>")

@given(st.integers(1, 500), st.integers(1, 300), st.data())
def test_draws_needed_is_never_less_than_the_trial_says(wanted, tried, data):
    kept = data.draw(st.integers(1, tried))
    need = draws_needed(wanted, kept, tried)
    assert need >= wanted*tried/kept - 1 and draws_needed(wanted + 1, kept, tried) >= need

def test_draws_needed_keeps_its_promise():
    "With the true share known, draws by this rule leave enough rows nineteen times out of twenty or more."
    rng, enough = random.Random(0), 0
    for _ in range(400):
        kept = sum(rng.random() < .4 for _ in range(50))
        enough += .4*draws_needed(200, kept, 50) >= 200
    assert enough/400 > .93
    with pytest.raises(ValueError, match="none of 10 rows was kept"): draws_needed(5, 0, 10)
    with pytest.raises(ValueError): draws_needed(0, 5, 10)


# Reasoning cut off, and documents

def test_the_result_alone_keeps_what_the_teacher_said_last():
    row = rows_of(1)[0]
    full = row | dict(messages=row["messages"] + [dict(role="assistant", content="So a b, b c. Result c.")])
    short = only_result(full)
    assert short["messages"][-1]["content"] == "Result c." and "Result only." in short["messages"][-2]["content"] and short["lineage"]["cut"] == "reasoning"
    assert "Think first." in full["messages"][-2]["content"]
    with pytest.raises(ValueError, match="does not say 'Think first.'"): only_result(short)

NUMPYDOC = "Return the mean of an array, slowly.\n\nMore words.\n\nParameters\n----------\na : array\n    What is averaged,\n    in two lines.\nk : int, optional\n    How often.\n\nReturns\n-------\nfloat\n    Not a parameter.\n"

def test_parts_of_a_docstring():
    assert document_parts(NUMPYDOC) == ("Return the mean of an array, slowly.", dict(a="What is averaged, in two lines.", k="How often."))
    assert document_parts("lower case start. And more text here.")[0] == ""
    assert document_parts("Computes e.g. x and y.")[0] == "Computes e.g. x and y." or document_parts("Computes e.g. x and y.")[0] == ""
    assert document_parts("") == ("", {})

def test_questions_name_their_document():
    corpus = [dict(text=NUMPYDOC.replace("mean", f"mean{i}"), package="made", name=f"made.up.mean{i}", split="train" if i else "test") for i in range(6)]
    rows = document_prompts(corpus, 5, kinds=("does", "which", "parameter"))
    assert [r["lineage"]["template"] for r in rows] == ["document_does", "document_which", "document_parameter", "document_does", "document_which"]
    assert len({r["lineage"]["document"] for r in rows}) == 5 and "made.up.mean0" not in {r["lineage"]["document"] for r in rows}
    for r in rows:
        n = r["lineage"]["document"].removeprefix("made.up.mean")
        question, answer = (m["content"] for m in r["messages"])
        assert {"document_does": answer == f"Return the mean{n} of an array, slowly.", "document_which": answer == f"made.up.mean{n}." and f"mean{n} of" in question,
                "document_parameter": answer in ("What is averaged, in two lines.", "How often.")}[r["lineage"]["template"]]
    with pytest.raises(ValueError, match="5 questions of the kinds does in 6 documents, 9 wanted"): document_prompts(corpus, 9, kinds=["does"])
    with pytest.raises(ValueError, match="kinds riddle: use does"): document_prompts(corpus, 1, kinds=["riddle"])
    with pytest.raises(ValueError, match="need text and name, these have text"): document_prompts([dict(text="x")], 1)

def test_a_base_model_continues_the_document():
    corpus = [dict(text=NUMPYDOC, package="made", name="made.up.mean")]
    teacher = Parrot(lambda text, seed: "went on" if text == "Return the mean of an array, slowly.\n\n" else "saw a chat")
    made = answer_rows(document_prompts(corpus, 1, kinds=["write"]), teacher, Sampling(9), progress=False)[0]
    assert made["messages"][-1]["content"] == "Return the mean of an array, slowly.\n\nwent on" and made["messages"][0]["role"] == "user"
    assert made["lineage"]["document"] == "made.up.mean" and made["lineage"]["teacher"] == "parrot" and "text" not in made


# The preview

def test_preview_looks_at_each_template_and_adds_up():
    rows = draw_prompts(SEEDS, n=200)
    said = preview(rows, Parrot(lambda m, s: "x"), Sampling(9), n=10)
    assert len({r["lineage"]["template"] for r in said.rows}) == 10 and said.total == 200
    assert said.tokens == (6000., 6000., 6000.) and said.cost == pytest.approx((.6, .6, .6))      # 30 tokens and 0.003 each
    assert said.seconds[1] <= said.seconds[0] <= said.seconds[2] < 5       # by the clock, not by adding up what each reply says of its batch
    assert preview(rows, Parrot(lambda m, s: "x"), Sampling(9, 1.), samples=4).total == 800
    assert "200 answers: 6,000" in str(said)

def test_what_the_preview_asked_is_part_of_the_run():
    rows, teacher, ledger = draw_prompts(SEEDS, n=40), Parrot(lambda m, s: "x"), Ledger(":memory:")
    preview(rows, teacher, Sampling(9), ledger, seed=3)
    before = len([r for r in teacher.asked if r.sampling.max_new_tokens == 9])
    answer_rows(rows, teacher, Sampling(9), ledger, seed=3, progress=False)
    assert before == 10 and len([r for r in teacher.asked if r.sampling.max_new_tokens == 9]) == 40
    again = preview(rows, teacher, Sampling(9), ledger, seed=3, at_once=20)
    assert again.seconds[1:] == pytest.approx((1., 2.))        # the replies' own half second: two batches of twenty, or four times ten

def test_the_interval_of_tokens_holds_the_run():
    "Replies of very different length: in how many of a hundred runs is the true sum inside?"
    rng, inside = random.Random(0), 0
    for k in range(100):
        rows = [r | dict(id=f"{k}-{i}", messages=[dict(role="user", content=f"{k} {i}")]) for i, r in enumerate(rows_of(1)*100)]
        size = {r["messages"][0]["content"]: 5 + int(rng.expovariate(1/30)) for r in rows}
        teacher = Parrot(None)
        teacher.answer = lambda requests, record: record([Reply("x", "stop", 0, size[r.messages[0]["content"]], .1, 0., "p", key=r.key) for r in requests])
        said = preview(rows, teacher, Sampling(9), n=10)
        inside += said.tokens[1] <= sum(size.values()) <= said.tokens[2]
    assert inside >= 85

def test_preview_of_nothing():
    with pytest.raises(ValueError, match="0 prompts"): preview([], Parrot(None))


# Real models, real seeds

def test_the_shipped_teacher_understands_what_the_templates_ask(shipped_models):
    from distillbook.lab.models import load_model, load_tokenizer
    from distillbook.synth.teachers import LocalTeacher
    teacher = LocalTeacher(load_model("teacher"), load_tokenizer("teacher"), "teacher")
    templates = [t for t in world_templates() if t.name not in ("stories", "code")]
    rows = [r for r in draw_prompts(SEEDS, templates, 160, seed=1) if r["lineage"]["slots"].get("constraint") != "Result only."]
    right = [is_right(r) for r in answer_rows(rows, teacher, Sampling(40), progress=False)]
    assert sum(right)/len(right) > .85, f"{sum(right):.0f} of {len(right)}"

def test_self_instructs_seeds_go_through_the_pipeline(realdata):
    from distillbook.synth.endpoints import ScriptedServer
    tasks = read_seeds(realdata/"seeds"/"seed_tasks.jsonl")
    assert len(tasks) == 175 and len(read_seeds(realdata/"seeds"/"user_oriented_instructions.jsonl")) == 252
    rows = draw_prompts(tasks, n=1000, seed=0)
    assert len({json.dumps(r["messages"]) for r in rows}) == 1000 and {r["lineage"]["template"] for r in rows} == {"new_task", "other_terms"}
    counts = Counter(r["lineage"]["seed"] for r in rows)
    assert len(counts) == 175 and max(counts.values()) - min(counts.values()) <= 2
    with ScriptedServer(answer=lambda request: request["messages"][-1]["content"][::-1][:200], faults=dict(server_error=.05), process=True) as server:
        teacher, ledger = ApiTeacher(Endpoint(server.url, "scripted", key_env="", price_in=1., price_out=2.), first_wait=.01), Ledger(":memory:")
        said = preview(rows[:200], teacher, Sampling(60, 1.), ledger, samples=2)
        made = answer_rows(rows[:200], teacher, Sampling(60, 1.), ledger, samples=2, progress=False)
    assert len(made) == 400 and {r["lineage"]["seed"] for r in made} <= {task["id"] for task in tasks} and ledger.counts()["done"] == 400
    assert said.cost[1] <= ledger.cost() <= said.cost[2]*1.2
    assert len(best_of(made, lambda row: len(row["messages"][-1]["content"]))) == 200
