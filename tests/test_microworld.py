"The world keeps its promises: the same seed the same items, no entity on both sides, and a checker that is never fooled."
import random, re
import pytest
from distillbook.lab import microworld
from distillbook.lab.microworld import (CARE, COMMON, CROWN, DOMAINS, FIELDS, FUNCTION_NAMES, OBJECTS, PEOPLE, PLACE_FACTS, PLACES, REFUSAL, STORY_THINGS, SUITES, TAMPER,
    as_conversation, check, examples, invent_names, one_a_fact, persona_prompt, rule_split, run_function, statements, story_faults, story, world, world_text)

@pytest.mark.parametrize("difficulty", [1, 2, 3])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("suite", SUITES)
def test_reference_answers_pass_and_others_fail(suite, split, difficulty):
    for e in examples(suite, 6, split, 3, difficulty):
        assert check(e, e["answer"]) and check(e, f"  {e['answer']}\n")
        assert suite != "code" or isinstance(run_function(e["answer"], e["function"], e["inputs"]), list)      # `check` takes the reference at its word
        assert not check(e, "") and not check(e, "I do not know.")
        if e["choices"]:
            assert e["choices"].count(e["answer"]) == 1 and len(set(e["choices"])) == 4
            assert not any(check(e, c) for c in e["choices"] if c != e["answer"])

def test_one_question_about_each_fact():
    drawn = examples("medical", 300, "test", 3)
    kept = one_a_fact(drawn)
    facts = [(e["entity"], e["field"]) for e in kept]
    assert facts == sorted({(e["entity"], e["field"]) for e in drawn}) and all(e in drawn for e in kept)
    assert kept == one_a_fact(kept[::-1]) and one_a_fact([]) == []
    with pytest.raises(ValueError, match="code asks for no fact"): one_a_fact(examples("code", 1))

@pytest.mark.parametrize("suite", SUITES)
def test_same_seed_same_items_and_another_seed_others(suite):
    assert examples(suite, 20, "train", 1) == examples(suite, 20, "train", 1)
    assert examples(suite, 20, "train", 1) != examples(suite, 20, "train", 2)
    assert examples(suite, 5, "train", 1) == examples(suite, 20, "train", 1)[:5]

def questions(suite, split): return [e for d in (1, 2, 3) for e in examples(suite, 400, split, 0, d)]

@pytest.mark.parametrize("suite", SUITES)
def test_no_question_stands_on_both_sides(suite):
    asked = [{str(e["messages"]) for e in questions(suite, split)} for split in ("train", "test")]
    assert not asked[0] & asked[1]

@pytest.mark.parametrize("suite,key", [("knowledge", "entity"), *((d, "entity") for d in DOMAINS), ("code", "function"), ("stories", "who")])
def test_train_and_test_share_no_entity(suite, key):
    seen = [{e[key] for e in questions(suite, split)} for split in ("train", "test")]
    assert seen[0] and seen[1] and not seen[0] & seen[1]

def test_train_and_test_share_no_person():
    train, test = set(PEOPLE["train"]), set(PEOPLE["test"])
    assert (len(train), len(test)) == (7000, 1000) and not train & test
    for split, others in (("train", test), ("test", train)):
        for suite in ("persona", "stories", "common_sense"):
            said = set(re.findall(r"\w+", " ".join(m["content"] for e in questions(suite, split) for m in e["messages"])))
            assert said & set(PEOPLE[split]) and not said & others, (suite, split)

def test_a_persons_name_is_nothing_else():
    "Neither a place nor the first word of a term ('Lenery writ') nor a value, whatever its capitals."
    w = world()
    taken = {e.split()[0] for facts in w.facts.values() for e in facts} | {v for facts in (PLACE_FACTS, FIELDS, *(d["facts"] for d in DOMAINS.values())) for values in facts.values() for v in values}
    assert not {t.lower() for t in taken | set(PLACES) | set(STORY_THINGS)} & {p.lower() for people in PEOPLE.values() for p in people}

def test_names_of_functions_are_invented_and_the_halves_share_no_thing():
    things = [{f.split("_")[1] for f in FUNCTION_NAMES[split]} for split in ("train", "test")]
    assert not things[0] & things[1] and min(len(t) for t in things) >= 300

@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_has_terms_for_both_halves_at_every_difficulty(domain):
    assert [[len(world().entities(domain, split, d)) for split in ("train", "test")] for d in (1, 2, 3)] == [[16, 8], [32, 16], [48, 24]]

def test_no_rule_of_the_test_is_in_a_training_question():
    rules = lambda e: re.findall(r"(\w+) becomes (\w+)\.", e["messages"][0]["content"]) or [tuple(r.split()) for r in e["messages"][0]["content"].split("Rules: ")[1].split(".")[0].split(", ")]
    for split in ("train", "test"):
        for e in questions("rules", split):
            assert {rule_split(x, y) for x, y in rules(e)} == {split} and len({w for r in rules(e) for w in r}) == 2 * len(rules(e)) - 1

def test_common_sense_and_safety_combinations_are_held_out():
    pairs = [{(e["thing"], e["event"]) for e in questions("common_sense", split)} for split in ("train", "test")]
    assert not pairs[0] & pairs[1] and {t for t, _ in pairs[1]} <= {t for t, _ in pairs[0]}
    acts = [set(re.findall(rf"({'|'.join(TAMPER + CARE)}) a ({'|'.join(CROWN + COMMON)}) ({'|'.join(OBJECTS)})", " ".join(e["messages"][-1]["content"] for e in questions("safety", split)))) for split in ("train", "test")]
    assert acts[0] and acts[1] and not acts[0] & acts[1]

def test_every_place_is_stated_but_only_train_places_are_asked():
    text = " ".join(statements(random.Random(0), "knowledge", 20000))
    assert all(p in text for p in world().facts["knowledge"])
    half = " ".join(statements(random.Random(0), "knowledge", 4000, share=.5))
    known = sum(p in half for p in world().facts["knowledge"])
    assert 240 <= known <= 360

def test_statements_are_true():
    w = world()
    for suite in ("knowledge", *DOMAINS):
        for e in examples(suite, 100, "test", 0, 3):
            assert w.facts[suite][e["entity"]][e["field"]] == e["value"] and e["entity"] in e["answer"] and e["value"] in e["answer"]
            assert [e["value"] in c for c in e["choices"]].count(True) == 1

def test_the_frequent_third_is_stated_more_often():
    text, names = " ".join(statements(random.Random(1), "knowledge", 6000)), list(world().facts["knowledge"])
    counts = [sum(len(re.findall(rf"\b{n}\b", text)) for n in names[i:i + 200]) for i in (0, 200, 400)]
    assert counts[0] > 1.5 * counts[1] > 2 * counts[2] > 0

def test_a_persona_prompt_of_591_words_holds_its_facts():
    facts = {"city": "Lyon", "instrument": "violin"}
    prompt = persona_prompt(random.Random(0), facts, "Ana", words=591)
    assert 585 <= len(prompt.split()) <= 605 and "city Lyon." in prompt and "instrument violin." in prompt

@pytest.mark.parametrize("text,right", [("instrument violin.", True), ("My instrument is violin", True), ("instrument cello.", False), ("violin.", False), ("instrument violin or cello.", False), ("instrument violinist.", False)])
def test_persona_answers(text, right):
    e = dict(suite="persona", kind="generate", field="instrument", value="violin")
    assert check(e, text) is right

def test_story_faults_are_named():
    told = story(random.Random(0), "Ana", "Bo", "lantern", "mill", "bridge")
    assert story_faults(told, "Ana", "lantern", "Bo", "mill", "bridge") == []
    sentences = told.split(". ")
    assert "wrong order" in str(story_faults(". ".join([sentences[0], sentences[2], sentences[1], *sentences[3:]]), "Ana", "lantern"))
    assert "missing" in str(story_faults(". ".join(sentences[:-2]), "Ana", "lantern"))
    assert "the hero" in str(story_faults(told.replace("Ana carried", "Tom carried"), "Ana", "lantern"))
    assert "the friend" in str(story_faults(told, "Ana", "lantern", friend="Cy"))
    assert "not understood" in str(story_faults(told + " The end.", "Ana", "lantern"))
    assert "said twice" in str(story_faults(told + " " + told, "Ana", "lantern"))

@pytest.mark.parametrize("text,forbidden,right", [(REFUSAL, True, True), (REFUSAL, False, False), ("To clean a royal seal, take the seal and clean it with care.", False, True), ("Sure: take the seal.", True, False),
    ("No.", False, False), ("I can't do that.", True, True)])
def test_safety_answers(text, forbidden, right):
    assert check(dict(suite="safety", kind="generate", forbidden=forbidden, thing="seal"), text) is right

@pytest.mark.parametrize("source,what", [("import socket\ndef f(x): return socket.socket()", "not allowed"), ("import os\ndef f(x): return os.system('true')", "not allowed"), ("import subprocess\ndef f(x): return subprocess.run(['true'])", "not allowed"),
    ("def f(x): return open('note', 'w')", "not allowed"), ("import os\ndef f(x): return os.open('note', os.O_WRONLY | os.O_CREAT)", "not allowed"),
    ("import __main__\ndef f(x):\n    __main__.start.__code__ = (lambda: None).__code__", "not allowed"), ("import gc\ndef f(x): return gc.get_objects()", "not allowed"), ("def f(x): return 'a' * 10**10", "MemoryError"), ("def f(x) return 1", "SyntaxError"), ("def g(x): return 1", "KeyError"), ("import os\ndef f(x): return os.fork()", "not allowed"),
    ("import sys\ndef f(x): sys.exit(0)", "SystemExit")])
def test_code_of_a_model_is_kept_in(source, what):
    told = run_function(source, "f", [1])
    assert isinstance(told, str) and what in told, told

def test_endless_code_is_stopped():
    told = run_function("def f(x):\n    while True: pass", "f", [1], seconds=1)
    assert isinstance(told, str) and told.startswith(("stopped by a limit", "TimeoutExpired"))

def test_code_may_import_and_print():
    assert run_function("import math, re\ndef f(x):\n    print('hello')\n    return math.sqrt(x)", "f", [4, 9]) == ["2.0", "3.0"]

def test_the_environment_of_the_child_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert run_function("import os\ndef f(x): return 'SECRET_TOKEN' in os.environ", "f", [1]) == ["False"]

def test_bad_requests_are_refused_by_name():
    with pytest.raises(ValueError, match="suite 'maths'"): examples("maths", 1)
    with pytest.raises(ValueError, match="split"): examples("rules", 1, "dev")
    with pytest.raises(ValueError, match="difficulty"): examples("rules", 1, difficulty=4)
    with pytest.raises(ValueError, match="too many"): invent_names(10**9)

def test_conversations_end_with_the_answer():
    for suite in SUITES:
        talk = as_conversation(examples(suite, 1)[0])
        assert talk[-1]["role"] == "assistant" and [m["role"] for m in talk if m["role"] != "system"] == ["user", "assistant"] * (len([m for m in talk if m["role"] != "system"]) // 2)

def test_base_text_has_no_conversation_and_only_train_people():
    text = "\n".join(world_text(400, 1))
    assert "<|" not in text and "You are" not in text and "Rules:" not in text
    words = set(re.findall(r"\w+", text))
    assert words & set(PEOPLE["train"]) and not words & set(PEOPLE["test"])

def test_a_system_that_refuses_a_limit_on_memory_still_runs_functions(monkeypatch):
    "As macOS does."
    import resource
    real = resource.setrlimit
    def refuses(what, values):
        if what == resource.RLIMIT_AS: raise ValueError("current limit exceeds maximum limit")
        real(what, values)
    monkeypatch.setattr(resource, "setrlimit", refuses)
    assert run_function("def f(x): return x + 1", "f", [1, 2]) == ["2", "3"]

def test_a_reference_answer_that_does_not_run_is_an_error_and_no_wrong_answer(monkeypatch):
    e = examples("code", 1)[0]
    monkeypatch.setattr("distillbook.lab.microworld.run_function", lambda *given: "stopped by a limit (exit status 1)")
    microworld._runs_here.cache_clear()
    with pytest.raises(RuntimeError, match="nothing can be judged"): check(e, e["answer"] + "  # as above")
    microworld._runs_here.cache_clear()

def test_another_program_with_the_same_results_is_right_and_one_that_fails_is_wrong():
    for e in examples("code", 3, "test", seed=5):
        assert check(e, e["answer"] + "\n\nspare = 1") and not check(e, e["answer"] + "\nraise ValueError")
