"Chapter 23: a prompt moved into the weights."
import copy, json, random
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from distillbook.distill.prompt_kd import (Looks, add_lora, check_falls, check_lora_size, check_strip, conversation_of, draw_questions, example_losses, load_persona,
    persona_points, persona_score, prompted_answers, put_into_words, reply_row, save_merged, share_of_falls, split_rows, student_rows, teacher_entropy,
    train_persona, unseen_questions, unseen_templates, without_thoughts)
from distillbook.lab.exercises import problems
from distillbook.lab.models import generate, load_model, load_tokenizer

WHO, WORDS = load_persona("beethoven"), load_tokenizer("student")
ROWS = [q | dict(answer=f"Ha! I say {WHO.value(q['subject'])}. It must be!") for q in draw_questions(WHO, 42, 5)]

@pytest.fixture(scope="module")
def student(): return load_model("student")

def persona_at(folder, prompt=None, facts=None, questions=("Where?", "In which town?")):
    (folder/"subjects.jsonl").write_text(json.dumps(dict(subject="town", category="places", questions=list(questions))))
    (folder/"ada.json").write_text(json.dumps(dict(name="Ada", opening="So!", closing="Good.", facts=facts if facts is not None else dict(town="Ulm"))))
    if prompt is not None: (folder/"ada.md").write_text(prompt)
    return folder/"ada.json"

# the persona

def test_the_shipped_persona_is_that_of_the_document():
    categories = {s["category"] for s in WHO.subjects} - {"role"}
    assert len(WHO.prompt.split()) == 591 and sum(len(s["questions"]) for s in WHO.subjects) >= 30
    assert categories == {"biographical", "musical", "historical", "creative", "personal"}

def test_no_fact_of_the_persona_stands_in_a_question():
    for s in WHO.subjects:
        for q in s["questions"]: assert WHO.value(s["subject"]).lower() not in q.lower()

@pytest.mark.parametrize("told, error, says", [(dict(prompt="You live in Bonn."), ValueError, "does not hold 'Ulm'"), (dict(prompt="Ulm", facts={}), ValueError, "no fact for the subject 'town'"),
    (dict(prompt="Ulm", questions=["Where?", "Where?"]), ValueError, "two at least"), (dict(), FileNotFoundError, "ada.md")])
def test_a_persona_that_cannot_be_asked_is_refused(tmp_path, told, error, says):
    with pytest.raises(error, match=says): load_persona(persona_at(tmp_path, **told))

def test_a_persona_of_ones_own_is_read(tmp_path):
    found = load_persona(persona_at(tmp_path, "You are Ada and live in Ulm."))
    assert found.value("town") == "Ulm" and len(unseen_templates(found)) == 1
    with pytest.raises(FileNotFoundError, match="no persona 'nobody'"): load_persona("nobody")

@pytest.mark.parametrize("answer, points", [("Ha! In Bonn. It must be!", (1, 1, 1)), ("  Ha! bonn It must be!\n", (1, 1, 1)), ("Ha! In Vienna. It must be!", (0, 1, 1)), ("In Bonn.", (1, 0, 1)),
    ("Ha! In Bonn.", (1, 0, 1)), ("Ha! I am an assistant from Bonn. It must be!", (1, 1, 0)), ("", (0, 0, 0)), ("Of that I do not speak.", (0, 0, 0))])
def test_points(answer, points):
    found = persona_points(WHO, "birthplace", answer)
    assert tuple(found[k] for k in ("fact", "manner", "role")) == points and found["right"] == float(all(points))

def test_the_role_is_checked_by_the_name(): assert persona_points(WHO, "role", "Ha! I am Ludwig van Beethoven. It must be!")["right"] == 1.

# questions and rows

def test_every_subject_is_asked_as_often():
    drawn = draw_questions(WHO, 4*len(WHO.subjects), 3)
    assert {sum(q["subject"] == s["subject"] for q in drawn) for s in WHO.subjects} == {4}
    assert all(q["template"] in q["question"] for q in drawn) and draw_questions(WHO, 20, 3) != draw_questions(WHO, 20, 4)

def test_a_template_stays_itself_or_gets_words_around_it():
    assert put_into_words("Who?", random.Random(0), plain=1.) == "Who?"
    assert all("Who?" in put_into_words("Who?", random.Random(i), plain=0.) for i in range(50))

def test_unseen_templates_are_one_a_subject_and_differ_by_seed():
    unseen = unseen_templates(WHO, 0)
    assert all(sum(q in unseen for q in s["questions"]) == 1 for s in WHO.subjects) and unseen != unseen_templates(WHO, 1)
    items = unseen_questions(WHO, unseen, 3, 0)
    assert len(items) == 3*len(WHO.subjects) and {i["template"] for i in items} == unseen and sum(i["question"] == i["template"] for i in items) >= len(WHO.subjects)

@given(st.integers(0, 5), st.integers(1, 120), st.floats(0, 0.9))
@settings(max_examples=40)
def test_no_question_is_on_both_sides_and_no_unseen_template_on_any(seed, n, share):
    rows, unseen = [q | dict(answer="a") for q in draw_questions(WHO, n, seed)], unseen_templates(WHO, seed)
    learn, validate = split_rows(rows, unseen, share, seed)
    assert not {r["question"] for r in learn} & {r["question"] for r in validate}
    assert sorted(r["question"] for r in learn + validate) == sorted(r["question"] for r in rows if r["template"] not in unseen)

def test_the_loss_is_on_the_answer_and_its_end_alone():
    row = student_rows(ROWS[:1], WORDS)[0]
    assert WORDS.decode([t for t in row["labels"] if t != -100]) == ROWS[0]["answer"] + "<|end|>"
    assert WHO.prompt[:30] not in WORDS.decode(row["input_ids"])
    everything = student_rows(ROWS[:1], WORDS, responses_only=False)[0]
    assert everything["labels"] == everything["input_ids"] == row["input_ids"]

def test_a_template_without_marks_gives_the_same_labels_and_a_strange_one_is_refused():
    plain, strange = copy.deepcopy(WORDS), copy.deepcopy(WORDS)
    plain.chat_template = WORDS.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    told = conversation_of("Where?", "There.", "You are Ada.")
    ours, marked = reply_row(told, plain), reply_row(told, WORDS)
    counted = lambda row: [(t, l) for t, l in zip(row["input_ids"], row["labels"]) if l != -100]
    assert counted(ours) == counted(marked) and ours["input_ids"] == marked["input_ids"][:len(ours["input_ids"])]
    strange.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    with pytest.raises(ValueError, match="the answer cannot be found"): reply_row(told, strange)

# losses and answers

def test_each_row_has_its_own_loss_in_any_batch(student):
    rows = student_rows(ROWS[:9], WORDS)
    alone = [student(**{k: torch.tensor([v]) for k, v in r.items()}).loss.item() for r in rows]
    for size in (1, 4, 32): assert example_losses(student, rows, size) == pytest.approx(alone, abs=1e-4)

def test_prompted_answers_are_those_of_one_question_at_a_time(student):
    system, questions = WHO.prompt[:900], ["Where were you born?", "Who was your teacher? Thank you.", "Good day. What is your birthplace?"]
    found = prompted_answers("student", system, questions)
    assert found["answers"] == [generate(student, WORDS, [conversation_of(q, system=system)], 40, progress=False)[0] for q in questions]
    assert found["prompt_tokens"] > 3*150 and prompted_answers("student", None, questions)["prompt_tokens"] < 120

def test_entropy_is_that_of_the_distribution_at_the_temperature(student):
    for temperature in (1., 0.5):
        found = teacher_entropy("student", "You are Ada. You live in Ulm.", ROWS[:3], temperature)
        for value, row in zip(found, ROWS):
            made = student_rows([row], WORDS, system="You are Ada. You live in Ulm.")[0]
            with torch.no_grad(): logp = (student(torch.tensor([made["input_ids"]])).logits[0, :-1]/temperature).log_softmax(-1)
            assert value == pytest.approx(-(logp.exp()*logp).sum(-1)[torch.tensor(made["labels"][1:]) != -100].mean().item(), abs=1e-3)

def test_score_of_a_model_that_knows_nothing_of_the_persona(student):
    score = persona_score(student, WORDS, WHO, ROWS[:5])
    assert score["right"] == 0. and len(score["answers"]) == 5

@pytest.mark.parametrize("answer, left", [("<think>\n\n</think>\n\nHa! Bonn.", "Ha! Bonn."), ("<think>a</think>b</think>c", "b</think>c"), ("Ha! <think>x</think>", "Ha! <think>x</think>"), ("<think> cut", "<think> cut")])
def test_thoughts_before_an_answer_are_no_part_of_it(answer, left): assert without_thoughts(answer) == left

# falls

@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=30), st.floats(0.05, 0.9))
@settings(max_examples=60)
def test_falls_are_those_of_the_pairs(losses, fall):
    by_hand = np.mean([b <= (1 - fall)*a for i, a in enumerate(losses) for j, b in enumerate(losses) if i != j])
    assert share_of_falls(losses, fall) == pytest.approx(by_hand)

def test_windows_average_the_noise_away():
    losses = np.random.default_rng(0).exponential(size=300).tolist()
    assert share_of_falls(losses) > share_of_falls(losses, window=10, draws=3000) > share_of_falls(losses, window=100, draws=500)
    assert share_of_falls([2.]*40, window=10, draws=50) == 0.
    with pytest.raises(ValueError, match="give 20 or more"): share_of_falls(losses[:19], window=10)

# training

def short(**more): return dict(student="student", persona="beethoven", rows=ROWS[:20], validate=ROWS[20:26], items=ROWS[:2], steps=130, looks=(0, 60), learning_rate=1e-3, rank=4, alpha=8) | more

def test_a_killed_training_goes_on_and_ends_as_if_it_had_not_been_killed(tmp_path, monkeypatch):
    whole = train_persona(**short())
    class Killed(Exception): pass
    at = Looks.at
    def until(self, step, model):
        if step == 115: raise Killed
        at(self, step, model)
    monkeypatch.setattr(Looks, "at", until)
    with pytest.raises(Killed): train_persona(**short(checkpoints=tmp_path))
    monkeypatch.setattr(Looks, "at", at)
    again = train_persona(**short(checkpoints=tmp_path))
    assert again["history"]["resumed_from"] == 100 and whole["history"]["resumed_from"] == 0
    assert list(again["looks"]) == list(whole["looks"]) == ["0", "60", "130"]
    assert again["looks"]["60"] == whole["looks"]["60"] and again["looks"]["130"]["train"] == pytest.approx(whole["looks"]["130"]["train"], rel=1e-3)
    assert whole["looks"]["130"]["train"] < whole["looks"]["0"]["train"]/2

def test_what_is_saved_is_the_merged_model(tmp_path, student):
    adapted = add_lora(load_model("student"), rank=4, alpha=8)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name: weight.normal_(std=.02)
    ids = torch.tensor([WORDS("Where were you born?")["input_ids"]])
    with torch.no_grad(): before = adapted.eval()(ids).logits
    save_merged(adapted, WORDS, tmp_path)
    assert not (tmp_path/"adapter_config.json").exists() and json.loads((tmp_path/"config.json").read_text())["dtype"] == "bfloat16"
    with torch.no_grad(): after, untouched = load_model(tmp_path)(ids).logits, student(ids).logits
    assert (after - before).abs().max() < 0.25*(before - untouched).abs().max() and load_tokenizer(tmp_path).get_vocab() == WORDS.get_vocab()

def test_adapters_begin_as_nothing_and_only_they_are_trained(student):
    adapted = add_lora(load_model("student"), rank=8, alpha=16, seed=3)
    ids = torch.tensor([WORDS("Where were you born?")["input_ids"]])
    with torch.no_grad(): torch.testing.assert_close(adapted.eval()(ids).logits, student(ids).logits)
    assert all(("lora_" in name) == weight.requires_grad for name, weight in adapted.named_parameters())

def test_exercises_are_sound():
    for check in (check_strip, check_lora_size, check_falls): assert problems(check) == []
