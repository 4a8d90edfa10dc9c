"Chapter 05: numbers that stand still when batch, padding, window or order of choices move, and lm-eval beside them."
import copy, json, math, os, random, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from distillbook.lab.evaluate import (Bleu, RougeL, accuracy, chat_prompt, choice_credit, choice_scores, lm_eval_scores, mcnemar, our_task,
    paired_bootstrap, perplexity, published_tasks, read_benchmark, read_published, right_choice, score_windows, split_pair, start_token,
    suite_scores, text_streams, token_nats, write_benchmarks)
from distillbook.lab.microworld import SUITES, check, examples
from distillbook.lab.models import CHAT_TEMPLATE, tiny_qwen3, train_tokenizer

ROOT = Path(__file__).parent.parent
REAL = os.environ.get("DISTILLBOOK_REALDATA")
real = pytest.mark.skipif(not REAL, reason="DISTILLBOOK_REALDATA is not set")

class TableModel(torch.nn.Module):
    "Fixed next-token probabilities, whatever was read."
    device, config = torch.device("cpu"), SimpleNamespace(max_position_embeddings=64)
    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log()
    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))

@pytest.fixture(scope="module")
def tokenizer():
    texts = [" ".join([*(m["content"] for m in e["messages"]), e["answer"], *(e["choices"] or [])]) for s in SUITES for e in examples(s, 60)]
    return train_tokenizer(texts, 800)

@pytest.fixture(scope="module")
def model(tokenizer):
    "Random weights, large enough that its choices differ."
    torch.manual_seed(0)
    model = tiny_qwen3(tokenizer, hidden_size=64, layers=2, intermediate_size=64, heads=2, kv_heads=1, context=512).eval()
    for p in model.parameters():
        if p.ndim > 1: p.data *= 5
    return model

@pytest.fixture(scope="module")
def stories():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = Path(REAL)/"models"/"stories260K"/"hf"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

# perplexity

def test_hand_computation():
    nats, = token_nats(TableModel([1/2, 1/4, 1/8, 1/8]), [[0, 1, 2]], start=3)
    assert np.allclose(nats / math.log(2), [1, 2, 3])

def test_perplexity_of_a_uniform_model_is_its_vocabulary(tokenizer):
    size = len(tokenizer)
    result = perplexity(TableModel([1/size]*size), ["One day a heron sang.", "It rained."], tokenizer, length=8)
    assert result["perplexity"] == pytest.approx(size, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(result["tokens"]*math.log2(size)/result["bytes"], rel=1e-5)
    assert result["bytes"] == len("One day a heron sang.It rained.")

@pytest.fixture(scope="module")
def alphabet():
    "One token a letter. In TableModel below a costs 1 bit, b 2, é 3, and so does the end token."
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "é": 2, "<end>": 3}, unk_token="<end>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")

@pytest.mark.parametrize("corpus, more, bits, tokens, size", [
    (["ab", "é"], {}, (1 + 2 + 3) + (3 + 3), 5, 4),                       # both end tokens scored; é is two bytes, an end token none
    (["ab", "é"], dict(join=False), (1 + 2) + 3, 3, 4),                   # no end token
    (["ab", "", "é"], {}, (1 + 2 + 3) + 3 + (3 + 3), 6, 4),               # an empty document costs its end
    (["ab", "", "é"], dict(join=False), (1 + 2) + 3, 3, 4),
    (np.array([0, 1, 3, 2]), {}, 1 + 2 + 3 + 3, 4, 4),                    # ids: the end token is scored, and decodes to nothing
    (["ab", "é"], dict(max_tokens=3), 1 + 2 + 3, 3, 2),                   # a, b, end
    (["ab", "é"], dict(max_tokens=4, length=2, stride=1), 1 + 2 + 3 + 3, 4, 4),
    (["ab", "é"], dict(max_tokens=2, join=False), 1 + 2, 2, 2)])
def test_bits_per_byte_by_hand(alphabet, corpus, more, bits, tokens, size):
    result = perplexity(TableModel([1/2, 1/4, 1/8, 1/8]), corpus, alphabet, **(dict(length=8) | more))
    assert (result["tokens"], result["bytes"]) == (tokens, size)
    assert result["bits_per_byte"] == pytest.approx(bits/size, rel=1e-6)
    assert result["nats_per_token"] == pytest.approx(bits*math.log(2)/tokens, rel=1e-6)

def test_protocol_is_stored_with_the_number(model, tokenizer):
    result = perplexity(model, ["One day a heron sang."]*9, tokenizer, length=32, stride=8)
    assert (result["length"], result["stride"], result["unit"], result["documents"]) == (32, 8, "nats/token", "joined")
    assert result["tokens"] == len(text_streams(["One day a heron sang."]*9, tokenizer)[0][0])
    assert json.loads(json.dumps(result)) == result

@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40))
def test_windows_score_every_token_once(tokens, length, stride):
    windows = score_windows(tokens, length, stride := min(stride, length))
    assert [t for _, first, end in windows for t in range(first, end)] == list(range(tokens))
    assert all(begin <= first < end <= begin + length for begin, first, end in windows)
    assert all(end - begin == length for begin, _, end in windows) or tokens < length

def test_batch_1_equals_batch_16(model, tokenizer):
    texts = [e["messages"][-1]["content"] for e in examples("persona", 40, seed=1)]
    for join in (True, False):
        one, many = (perplexity(model, texts, tokenizer, length=48, stride=16, batch_size=size, join=join)["nats_per_token"] for size in (1, 16))
        assert abs(one - many) < 1e-4

def test_window_sees_only_its_own_tokens(model, tokenizer):
    ids = text_streams(["A heron sang near the mill and the harbour. "*6], tokenizer)[0][0][:40]
    whole = token_nats(model, [ids], start_token(tokenizer), length=64)[0]
    with torch.no_grad(): logits = model(torch.tensor([[start_token(tokenizer), *ids]])).logits[0, :-1]
    assert np.allclose(whole, torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none").numpy(), atol=1e-4)

def test_separate_documents_do_not_see_each_other(model, tokenizer):
    texts = ["A heron sang near the mill.", "The harbour was quiet."]
    alone = [perplexity(model, [t], tokenizer, join=False) for t in texts]
    both = perplexity(model, texts, tokenizer, join=False)
    assert both["tokens"] == sum(a["tokens"] for a in alone)
    assert both["nats_per_token"]*both["tokens"] == pytest.approx(sum(a["nats_per_token"]*a["tokens"] for a in alone), rel=1e-5)

def test_ids_and_texts_give_one_number(model, tokenizer):
    texts = ["A heron sang.", "It rained."]
    by_ids = perplexity(model, np.array(text_streams(texts, tokenizer)[0][0], np.int32), tokenizer)
    assert by_ids == perplexity(model, texts, tokenizer)

def test_max_tokens_cuts_tokens_and_bytes(model, tokenizer):
    text = "A heron sang near the mill. "*20
    result = perplexity(model, text, tokenizer, max_tokens=30)
    ids = text_streams(text, tokenizer)[0][0][:30]
    assert (result["tokens"], result["bytes"]) == (30, len(tokenizer.decode(ids).encode()))

@pytest.mark.parametrize("arguments, message", [(dict(corpus=[]), "empty"), (dict(corpus=[""]), "empty"), (dict(length=4096), "length must be 1 to 512"),
                                                (dict(stride=0), "stride must be"), (dict(max_tokens=0), "max_tokens must be 1"), (dict(corpus=["", "a"], max_tokens=1), "only special tokens"), (dict(length=8, stride=9), "stride must be")])
def test_bad_perplexity_arguments_are_named(model, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message): perplexity(model, arguments.pop("corpus", ["One day."]), tokenizer, **arguments)

def test_nan_names_the_stream(model, tokenizer):
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="stream 0, token 0"): perplexity(broken, ["One day."], tokenizer)

def modes(model): return [module.training for module in model.modules()]

@pytest.fixture
def partly_training(model):
    "A model in training whose first layer is kept in evaluation mode, as a frozen part would be."
    trained = copy.deepcopy(model).train()
    trained.model.layers[0].eval()
    assert len(set(modes(trained))) == 2
    return trained

def test_training_mode_is_given_back(partly_training, tokenizer):
    before = modes(partly_training)
    perplexity(partly_training, ["One day."], tokenizer); assert modes(partly_training) == before
    choice_scores(partly_training, tokenizer, ["One"], [["day", "night"]]); assert modes(partly_training) == before
    accuracy(partly_training, tokenizer, examples("knowledge", 2) + examples("rules", 1), max_new_tokens=2); assert modes(partly_training) == before

def test_scoring_is_in_evaluation_mode(model, tokenizer):
    noisy = copy.deepcopy(model)
    noisy.model.norm = torch.nn.Sequential(noisy.model.norm, torch.nn.Dropout(.5))
    noisy.train()
    assert np.array_equal(*(choice_scores(noisy, tokenizer, ["One"], [["day", "night"]])[0] for _ in range(2)))
    assert np.array_equal(*(token_nats(noisy, [[5, 6, 7]], start_token(tokenizer))[0] for _ in range(2)))

def test_training_mode_is_given_back_after_an_error(partly_training, tokenizer, monkeypatch):
    before, items = modes(partly_training), examples("knowledge", 2) + examples("rules", 1)
    def stopped(*arguments, **more): raise RuntimeError("stopped")
    def still_stops(call):
        with pytest.raises(RuntimeError, match="stopped"): call()
        assert modes(partly_training) == before
    with monkeypatch.context() as m:
        m.setattr("distillbook.lab.evaluate.generate", stopped)
        still_stops(lambda: accuracy(partly_training, tokenizer, items))
    partly_training.forward = stopped
    still_stops(lambda: perplexity(partly_training, ["One day."], tokenizer))
    still_stops(lambda: token_nats(partly_training, [[1, 2]], 0))
    still_stops(lambda: choice_scores(partly_training, tokenizer, ["One"], [["day"]]))
    still_stops(lambda: accuracy(partly_training, tokenizer, items))

@pytest.mark.peer
def test_lm_eval_gives_mode_and_settings_back(partly_training, tokenizer, tmp_path, monkeypatch):
    evaluator = pytest.importorskip("lm_eval")
    write_benchmarks(tmp_path, n=1, max_new_tokens=2)
    before, settings = modes(partly_training), partly_training.generation_config
    lm_eval_scores(partly_training, tokenizer, ["knowledge"], folder=tmp_path)
    assert modes(partly_training) == before and partly_training.generation_config is settings
    def stopped(*arguments, **more): raise RuntimeError("stopped")
    monkeypatch.setattr(evaluator, "simple_evaluate", stopped)
    with pytest.raises(RuntimeError, match="stopped"): lm_eval_scores(partly_training, tokenizer, ["knowledge"], folder=tmp_path)
    assert modes(partly_training) == before and partly_training.generation_config is settings

@real
def test_published_number_of_stories260K(stories):
    "1.4845 nats a token: the first 900 characters of the file, read in one window after the begin token, no end token scored."
    text = (Path(REAL)/"text"/"tinystories.txt").read_text()[:900]
    result = perplexity(*_swap(stories, [text]), length=512, join=False)
    assert result["nats_per_token"] == pytest.approx(1.4845, abs=5e-5)
    assert result["bytes"] == 900

@real
def test_twenty_stories_are_near_the_published_number(stories):
    import re
    text = (Path(REAL)/"text"/"tinystories.txt").read_text()
    texts = [story.strip()[:900] for story in re.split(r"\n\n(?=Once upon a time|One day)", text)[:20]]
    result = perplexity(*_swap(stories, texts), length=512, join=False)
    assert result["nats_per_token"] == pytest.approx(1.4845, abs=0.15)

def _swap(pair, corpus): return pair[0], corpus, pair[1]

# choices

def test_constant_scorer_earns_chance():
    for right in range(4): assert choice_credit(np.zeros(4), right) == 0.25
    assert choice_credit([-1., -1., -2.], 2) == 0
    assert choice_credit([-1., -1., -2.], 0) == 0.5

@given(st.lists(st.integers(-3, 0), min_size=2, max_size=6))
def test_credit_of_all_choices_adds_up_to_one(scores):
    assert sum(choice_credit(scores, k) for k in range(len(scores))) == pytest.approx(1)

def test_constant_model_scores_chance(model, tokenizer):
    silent = copy.deepcopy(model)
    for p in silent.parameters(): p.data.zero_()
    items = [dict(e, choices=["A", "B", "C", "D"], answer="A") for e in examples("knowledge", 20)]
    assert accuracy(silent, tokenizer, items)["score"] == 0.25

def test_minimal_pairs_have_no_tie_order(model, tokenizer):
    silent = copy.deepcopy(model)
    for p in silent.parameters(): p.data.zero_()
    pairs = [["A heron sings.", "A heron sings."]]*5
    assert [choice_credit(s, 0) for s in choice_scores(silent, tokenizer, [""]*5, pairs)] == [0.5]*5

def test_scores_do_not_move_with_batch_size_or_padding_side(model, tokenizer):
    items = examples("persona", 12, seed=2, split="test") + examples("safety", 6, split="test") + examples("medical", 12, split="test")
    for e in items: e |= dict(kind="choice", choices=e["choices"] or [e["answer"], "I will not.", "the mill", "a"], )
    prompts = [chat_prompt(tokenizer, e["messages"]) for e in items]
    results = []
    for size, side in ((1, "right"), (16, "right"), (16, "left"), (5, "left")):
        tokenizer.padding_side = side
        results.append(np.concatenate(choice_scores(model, tokenizer, prompts, [e["choices"] for e in items], size)))
    for other in results[1:]: assert np.abs(other - results[0]).max() < 1e-4

def test_accuracy_does_not_move_with_batch_size(model, tokenizer):
    items = [e for s in ("medical", "safety", "rules") for e in examples(s, 6, split="test")]
    one, many = (accuracy(model, tokenizer, items, batch_size=size, max_new_tokens=12) for size in (1, 16))
    assert one == many and one["n"] == 18 and len(one["items"]) == len(one["answers"]) == 18
    assert one["low"] <= one["score"] <= one["high"]

def test_choice_score_is_the_sum_of_its_tokens(model, tokenizer):
    prompt = chat_prompt(tokenizer, [dict(role="user", content="Which bird sings?")])
    before, ids = split_pair(tokenizer, prompt, "The wren.")
    with torch.no_grad(): logits = model(torch.tensor([before + ids])).logits[0].log_softmax(-1)
    by_hand = sum(logits[len(before) + k - 1, token].item() for k, token in enumerate(ids))
    assert choice_scores(model, tokenizer, [prompt], [["The wren."]])[0][0] == pytest.approx(by_hand, abs=1e-4)

def test_choices_that_cannot_be_scored_raise(model, tokenizer):
    with pytest.raises(ValueError, match="item 0: prompt and choice take"): choice_scores(model, tokenizer, ["wren "*600], [["a"]])
    with pytest.raises(ValueError, match="no token"): choice_scores(model, tokenizer, ["a"], [[""]])
    with pytest.raises(ValueError, match="must stand once"): right_choice(dict(choices=["a", "a"], answer="a"))
    with pytest.raises(ValueError, match="no items"): accuracy(model, tokenizer, [])
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"): accuracy(model, bare, examples("knowledge", 1))

def test_suite_scores_follow_the_seed(model, tokenizer):
    first = suite_scores(model, tokenizer, ["medical", "knowledge"], n=5, seed=1)
    assert list(first) == ["medical", "knowledge"]
    assert first == suite_scores(model, tokenizer, ["medical", "knowledge"], n=5, seed=1)
    assert first["medical"]["chance"] == 0.25

# pairs

def test_mcnemar_by_hand():
    result = mcnemar([1]*8 + [0]*2 + [1]*50, [0]*8 + [1]*2 + [1]*50)
    assert (result["only_first"], result["only_second"]) == (8, 2)
    assert result["p"] == pytest.approx(2*sum(math.comb(10, k) for k in range(3))/2**10)
    assert mcnemar([1, 0], [1, 0])["p"] == 1

def test_mcnemar_rejects_at_its_level_where_there_is_no_difference():
    rng, rejected = np.random.default_rng(0), 0
    for _ in range(500):
        skill = rng.normal(size=200)
        a, b = (skill + rng.normal(size=(2, 200)) < 0.5)
        rejected += mcnemar(a, b)["p"] < .05
    assert rejected/500 < .06

def test_paired_interval_covers_and_is_narrower():
    rng, held, widths = np.random.default_rng(1), 0, []
    for k in range(300):
        skill = math.sqrt(.6)*rng.normal(size=200)
        a, b = (skill + math.sqrt(.4)*rng.normal(size=(2, 200)) < [[0.5244], [0.3055]])     # accuracies 0.70 and 0.62
        r = paired_bootstrap(a, b, resamples=400, seed=k)
        held += r["low"] <= 0.08 <= r["high"]
        widths.append((r["high"] - r["low"]) / (2*1.96*math.sqrt((a.var() + b.var())/200)))
    assert .92 <= held/300 <= .98
    assert np.mean(widths) < .85

def test_unequal_pairs_raise():
    with pytest.raises(ValueError, match="finite"): paired_bootstrap([1, math.nan], [1, 0])
    with pytest.raises(ValueError, match="one length"): paired_bootstrap([1, 0], [1])
    with pytest.raises(ValueError, match="one length"): mcnemar([], [])

# overlap

SAID = ["The library opens at nine.", "It is closed today", "a b c d e f"]
WANTED = [["The library never opens at nine.", "The library opens at ten."], ["It is closed."], ["a b c d e g"]]

@pytest.mark.peer
def test_bleu_equals_sacrebleu():
    import sacrebleu
    first = [w[0] for w in WANTED]
    assert Bleu().compute(predictions=SAID, references=first)["bleu"] == sacrebleu.corpus_bleu(SAID, [first]).score
    columns = [first, [WANTED[0][1], None, None]]
    assert Bleu().compute(predictions=SAID, references=WANTED)["bleu"] == sacrebleu.corpus_bleu(SAID, columns).score

@pytest.mark.peer
def test_rouge_l_equals_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(["rougeL"])
    best = [max(scorer.score(w, said)["rougeL"].fmeasure for w in wanted) for said, wanted in zip(SAID, WANTED)]
    assert RougeL().compute(predictions=SAID, references=WANTED)["items"] == pytest.approx(best)
    assert RougeL().compute(predictions=["a cat"], references=["a cat"])["rouge_l"] == 1

# lm-eval

def test_benchmark_files_are_those_the_function_writes(tmp_path):
    write_benchmarks(tmp_path)
    for path in tmp_path.iterdir(): assert (ROOT/"data"/"benchmarks"/path.name).read_text() == path.read_text(), f"{path.name}: run write_benchmarks()"

def test_written_items_are_those_of_the_suite(tmp_path):
    write_benchmarks(tmp_path, n=7, seed=5)
    for suite in SUITES: assert read_benchmark(suite, tmp_path) == examples(suite, 7, split="test", seed=5)

def test_the_prompt_of_the_task_file_is_our_chat_template(tokenizer):
    import jinja2, yaml
    text = (ROOT/"data"/"benchmarks"/"distillbook_persona.yaml").read_text().replace("!function", "")
    template = jinja2.Environment(keep_trailing_newline=True).from_string(yaml.safe_load(text)["doc_to_text"])
    for suite in SUITES:
        for e in read_benchmark(suite)[:20]: assert template.render(messages=e["messages"]) == chat_prompt(tokenizer, e["messages"])

def test_right_answers_pass_the_checker_of_their_suite():
    for suite in SUITES:
        for e in read_benchmark(suite)[:10]: assert check(e, e["answer"])

@pytest.mark.peer
def test_lm_eval_scores_are_ours(model, tokenizer, tmp_path):
    pytest.importorskip("lm_eval")
    write_benchmarks(tmp_path, n=8, max_new_tokens=16)
    state = random.getstate()
    theirs = lm_eval_scores(model, tokenizer, folder=tmp_path, batch_size=5)
    assert random.getstate() == state
    for suite in SUITES:
        ours = accuracy(model, tokenizer, read_benchmark(suite, tmp_path), batch_size=3, max_new_tokens=16)
        assert theirs[suite]["items"] == ours["items"], suite
        assert theirs[suite]["metrics"]["acc"] == pytest.approx(ours["score"])
        if ours["chance"] == 0: assert theirs[suite]["answers"] == ours["answers"], suite

@pytest.mark.peer
def test_lm_eval_gives_right_answers_credit(model, tokenizer, tmp_path):
    "A model that recites the right answers scores 1 in both, code executed and all."
    pytest.importorskip("lm_eval")
    write_benchmarks(tmp_path, n=2, max_new_tokens=60)
    suites = ["code", "persona", "safety"]
    reciter = recite(model, tokenizer, [e for s in suites for e in read_benchmark(s, tmp_path)])
    theirs = lm_eval_scores(reciter, tokenizer, suites, folder=tmp_path, batch_size=3)
    for suite in suites:
        assert theirs[suite]["score"] == 1
        assert accuracy(reciter, tokenizer, read_benchmark(suite, tmp_path), batch_size=3)["score"] == 1

def recite(model, tokenizer, items):
    "Train a copy on a few conversations until it knows them by heart."
    torch.manual_seed(0)
    student = tiny_qwen3(tokenizer, hidden_size=64, layers=2, intermediate_size=64, heads=2, kv_heads=1, context=512)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2, weight_decay=0.)
    rows = [tokenizer(chat_prompt(tokenizer, e["messages"]) + e["answer"] + "<|end|>")["input_ids"] for e in items]
    starts = [len(tokenizer(chat_prompt(tokenizer, e["messages"]))["input_ids"]) for e in items]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for k, (row, start) in enumerate(zip(rows, starts)): ids[k, :len(row)], labels[k, start:len(row)] = torch.tensor(row), torch.tensor(row[start:])
    for _ in range(300):
        loss = student(input_ids=ids, labels=labels).loss
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        if loss.item() < 5e-3: break
    return student.eval()

def test_lm_eval_missing_is_said_clearly(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'distillbook\[eval\]'"): lm_eval_scores(model, tokenizer, ["knowledge"])

def test_missing_task_and_benchmark_files_are_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="distillbook_astrology.yaml"): our_task("astrology", tokenizer, tmp_path)
    with pytest.raises(FileNotFoundError, match="hellaswag"): published_tasks("hellaswag", tmp_path)
    with pytest.raises(FileNotFoundError, match="birds_test.csv"): read_published("mmlu_birds", tmp_path)
    with pytest.raises(ValueError, match="not a published benchmark"): read_published("astrology", tmp_path)

def test_arc_in_its_first_published_form(tmp_path):
    row = dict(id="1", question=dict(stem="Which sings?", choices=[dict(text="stone", label="1"), dict(text="wren", label="2")]), answerKey="2")
    (tmp_path/"ARC-Easy-Test.jsonl").write_text(json.dumps(row) + "\n")
    assert read_published("arc_easy", tmp_path)["test"] == [dict(query="Question: Which sings?\nAnswer:", choices=["stone", "wren"], gold=1)]

def test_published_lines_end_only_at_line_feeds(tmp_path):
    row = dict(query="Which\u2028sings?", choices=["stone", "wren\x85"], gold=1)
    (tmp_path/"arc_easy.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_published("arc_easy", tmp_path)["test"] == [dict(query="Which\u2028sings?\nAnswer:", choices=["stone", "wren\x85"], gold=1)]

@real
@pytest.mark.peer
@pytest.mark.parametrize("name", ["hellaswag", "arc_easy", "arc_challenge", "mmlu_anatomy"])
def test_published_benchmarks_through_lm_eval_equal_our_scores(stories, name):
    pytest.importorskip("lm_eval")
    model, tokenizer = stories
    folder = Path(REAL)/"benchmarks"
    theirs = lm_eval_scores(model, tokenizer, [name], published=folder, limit=25)[name]
    task, rows = published_tasks(name, folder)[0], read_published(name, folder)["test"][:25]
    prompts = [tokenizer.bos_token + task.get("description", "") + row["query"] for row in rows]
    scores = choice_scores(model, tokenizer, prompts, [[" " + c for c in row["choices"]] for row in rows])
    assert theirs["items"] == [choice_credit(s, row["gold"]) for s, row in zip(scores, rows)]

@real
def test_all_published_items_are_read():
    folder = Path(REAL)/"benchmarks"
    counts = {name: len(read_published(name, folder)["test"]) for name in ("hellaswag", "arc_easy", "arc_challenge")}
    assert counts == dict(hellaswag=1000, arc_easy=2376, arc_challenge=1172)
    subjects = [path.name[:-9] for path in sorted((folder/"mmlu"/"test").glob("*_test.csv"))]
    assert len(subjects) == 57 and sum(len(read_published(f"mmlu_{s}", folder)["test"]) for s in subjects) == 14_042

@real
@pytest.mark.peer
def test_our_hellaswag_rows_are_lm_evals():
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    import datasets
    path = Path(REAL)/"benchmarks"/"hellaswag_val_1000.jsonl"
    raw = datasets.Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()[:100]])
    theirs = utils.process_docs(raw)
    assert [{k: row[k] for k in ("query", "choices", "gold")} for row in theirs] == read_published("hellaswag", path.parent)["test"][:100]
