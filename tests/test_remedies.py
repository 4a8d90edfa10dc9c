"Remedies against forgetting: exact where there is something exact, and the same after a kill."
import copy, math, random
import pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from transformers import Trainer
from distillbook.adapt.remedies import (AnchoredTrainer, KlToBaseTrainer, anchor_penalty, best_look, check_anchor, diagonal_fisher, held_places, pareto_front,
                                        replay_mix, score_at, tune)
from distillbook.distill.losses import IGNORE
from distillbook.distill.prompt_kd import Looks, add_lora
from distillbook.lab.corpora import chat_example, collate
from distillbook.lab.microworld import as_conversation, examples
from distillbook.lab.models import load_tokenizer, tiny_qwen3
from distillbook.lab.training import training_arguments

tokenizer = load_tokenizer("student")
def tiny(seed=0):
    torch.manual_seed(seed)
    return tiny_qwen3(tokenizer, hidden_size=32, layers=2, intermediate_size=32, heads=2, kv_heads=1, head_dim=16, context=256)
ROWS = [chat_example(as_conversation(item), tokenizer) for item in examples("medical", 12, "train", 3) + examples("rules", 12, "train", 3)]
def free(rows): return [dict(row, labels=[IGNORE]*len(row["labels"])) for row in rows]


# replay
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0, .8), st.integers(0, 5))
def test_replay_keeps_every_task_row_and_adds_the_share(n, share, seed):
    mixed = replay_mix([f"t{i}" for i in range(n)], [f"g{i}" for i in range(400)], share, seed)
    general = [row for row in mixed if row[0] == "g"]
    assert sorted(row for row in mixed if row[0] == "t") == sorted(f"t{i}" for i in range(n))
    assert len(set(general)) == len(general) and abs(len(general)/len(mixed) - share) <= .5/len(mixed) + 1e-9

@pytest.mark.parametrize("arguments, said", [((["t"]*9, ["g"], .5), "takes 9 general rows, and there are 1"), ((["t"], [], 1.), "share"), ((["t"], [], -.1), "share"), (([], ["g"], .1), "no task rows")])
def test_replay_says_what_is_missing(arguments, said):
    with pytest.raises(ValueError, match=said): replay_mix(*arguments)


# the Fisher information
class Softmax(torch.nn.Module):
    "A language model over a table: one word in, logits of the next out."
    def __init__(self, words, seed):
        super().__init__()
        self.table = torch.nn.Embedding(words, words, dtype=torch.float64, _weight=torch.randn(words, words, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    device = property(lambda self: self.table.weight.device)
    def forward(self, input_ids, attention_mask=None): return type("Out", (), dict(logits=self.table(input_ids)))

@pytest.mark.parametrize("words, seed", [(2, 0), (3, 1), (5, 2)])
def test_sampled_fisher_is_the_exact_one_on_a_small_softmax(words, seed):
    "Exact: p(1-p) for each logit, mean over the rows that read the word."
    model, rows = Softmax(words, seed), [dict(input_ids=[w, 0], labels=[IGNORE, 0]) for w in range(words)]
    sampled = diagonal_fisher(model, rows, seed, draws=1500)["table.weight"]
    p = model.table.weight.softmax(-1).detach()
    assert torch.allclose(sampled, p*(1 - p)/words, atol=.035/words)

def test_fisher_is_of_rows_one_at_a_time():
    "Two rows that pull apart cancel in a batch's gradient; their importances add up."
    model = tiny()
    both, first = diagonal_fisher(model, ROWS[:2], seed=4), diagonal_fisher(model, ROWS[:1], seed=4)
    for name in both: assert (2*both[name] - first[name] >= -1e-12).all(), name       # what is left is the second row's squared gradient
    assert sum((2*both[name] - first[name]).sum() for name in both) > 0

def test_fisher_leaves_the_model_as_it_was():
    model = tiny().train()
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    before = copy.deepcopy(model.state_dict())
    diagonal_fisher(model, ROWS[:2])
    assert model.training and (model.model.norm.weight.grad == 1).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

def test_fisher_depends_on_labels_places_and_not_on_their_values():
    model, row = tiny(), ROWS[0]
    other = dict(row, labels=[label if label == IGNORE else 7 for label in row["labels"]])
    a, b = (diagonal_fisher(model, [r], seed=5)["model.norm.weight"] for r in (row, other))
    assert torch.equal(a, b)

@pytest.mark.parametrize("rows, said", [([], "needs rows"), (free(ROWS[:1]), "row 0 has no label")])
def test_fisher_of_nothing_is_refused(rows, said):
    with pytest.raises(ValueError, match=said): diagonal_fisher(tiny(), rows)


# the penalties
def trainer_for(cls, model, tmp_path, accumulation=1, rows=ROWS, batch=4, **options):
    args = training_arguments(tmp_path, 1, batch, 1e-3, 0, 0, None, None, accumulation, "float32", "cpu", False, save_strategy="no")
    return cls(model=model, args=args, train_dataset=rows, data_collator=collate, **options)

def gradient_of(cls, tmp_path, accumulation, batch, rows, **options):
    "The gradient of one optimizer step, as the trainer itself adds it up."
    model, anchor = tiny(), tiny(1)
    trainer = trainer_for(cls, model, tmp_path, accumulation, rows, batch, anchor=anchor, **options)
    trainer.create_optimizer_and_scheduler(1)
    trainer.current_gradient_accumulation_steps = accumulation
    batches, items = trainer.get_batch_samples(iter([collate(rows[i:i+batch]) for i in range(0, len(rows), batch)]), accumulation, torch.device("cpu"))
    model.train()
    for part in batches: trainer.training_step(model, part, items)
    return torch.cat([w.grad.flatten() for w in model.parameters()])

@pytest.mark.parametrize("cls", [AnchoredTrainer, KlToBaseTrainer])
@pytest.mark.parametrize("labels", ["all", "some"])
def test_one_large_batch_and_several_small_ones_give_one_gradient(cls, labels, tmp_path):
    "Rows of ragged lengths, so a mean of means would differ."
    rows = ROWS[:3] + ROWS[12:15] + (free(ROWS[15:17]) if labels == "some" else ROWS[15:17])
    rows = [row for pair in zip(rows[:4], rows[4:]) for row in pair]
    one, many = (gradient_of(cls, tmp_path, n, 8//n, rows, strength=.7) for n in (1, 4))
    assert torch.allclose(one, many, atol=1e-6, rtol=1e-4)

def test_anchor_gradient_is_strength_times_importance_times_distance(tmp_path):
    model, anchor = tiny(), tiny(1)
    importance = {name: torch.rand_like(w) for name, w in model.named_parameters()}
    start = {name: (w.detach(), importance[name]) for name, w in anchor.named_parameters()}
    name = "model.layers.1.self_attn.q_proj.weight"
    weight, origin = dict(model.named_parameters())[name], dict(anchor.named_parameters())[name]
    slope, = torch.autograd.grad(anchor_penalty(model, start, 3.), weight)
    assert torch.allclose(slope, 3*importance[name]*(weight - origin).detach(), atol=1e-6)

def test_kl_is_zero_for_the_base_itself_and_counts_no_padding(tmp_path):
    model, same = tiny(), tiny()
    rows = ROWS[:2] + ROWS[12:14]
    plain = trainer_for(Trainer, tiny(), tmp_path, rows=rows)
    held = trainer_for(KlToBaseTrainer, model, tmp_path, rows=rows, anchor=same, strength=5.)
    batch = collate(rows)
    items = (batch["labels"] != IGNORE).sum()
    held.get_batch_samples(iter([batch]), 1, torch.device("cpu")); model.train(); plain.model.train()
    assert torch.allclose(held.compute_loss(model, dict(batch), num_items_in_batch=items), plain.compute_loss(plain.model, dict(batch), num_items_in_batch=items), atol=1e-5)

def test_kl_is_that_of_the_unlabelled_rows(tmp_path):
    model, anchor = tiny(), tiny(1)
    rows = ROWS[:2] + free(ROWS[12:14])
    batch = collate(rows)
    trainer = trainer_for(KlToBaseTrainer, model, tmp_path, rows=rows, anchor=anchor, strength=2.)
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu")); model.train()
    with torch.no_grad():
        got = trainer.compute_loss(model, dict(batch), num_items_in_batch=(batch["labels"] != IGNORE).sum()).item()
        logs = [m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in (model, anchor)]
    ce = F.cross_entropy(logs[0][:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE).item()
    places = batch["attention_mask"].bool() & torch.tensor([False, False, True, True])[:, None]
    kl = F.kl_div(logs[0][places].log_softmax(-1), logs[1][places].log_softmax(-1), log_target=True, reduction="sum").item()/int(places.sum())
    assert math.isclose(got, ce + 2*kl, rel_tol=1e-4)

def test_evaluation_sees_the_plain_loss(tmp_path):
    for cls in (AnchoredTrainer, KlToBaseTrainer):
        trainer = trainer_for(cls, tiny(), tmp_path, anchor=tiny(1), strength=100.)
        assert trainer.evaluate(ROWS[:4])["eval_loss"] < 20

@pytest.mark.parametrize("remedy", ["l2", "ewc", "kl"])
def test_killed_anywhere_it_ends_the_same(remedy, tmp_path):
    anchor = tiny()
    options = dict(importance=diagonal_fisher(anchor, ROWS[12:16])) if remedy == "ewc" else {}
    rows = ROWS[:8] + free(ROWS[12:16]) if remedy == "kl" else ROWS[:12]
    def go(folder, stop=None):
        def halt(_): raise KeyboardInterrupt
        model = tiny()
        tune(model, rows, folder, 4, remedy, 10., anchor, batch_size=3, learning_rate=1e-2, seed=1, save_steps=1, progress=False, callbacks=[Looks([stop], halt)] if stop else [], **options)
        return model.state_dict()
    whole = go(tmp_path/"whole")
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt): go(tmp_path/str(stop), stop)
        again = go(tmp_path/str(stop))
        assert all(torch.equal(whole[name], again[name]) for name in whole), f"stopped after step {stop}"

@pytest.mark.parametrize("arguments, said", [
    (dict(remedy="ridge"), "none of none, l2, ewc, kl"), (dict(remedy="l2"), "does nothing"), (dict(remedy="ewc", strength=1.), "importance= from diagonal_fisher"),
    (dict(remedy="l2", strength=1., importance={}), "only ewc"), (dict(remedy="l2", strength=1.), "give that as anchor="), (dict(remedy="kl", strength=1.), "copy of the model"),
    (dict(remedy="l2", strength=math.nan, anchor=tiny()), "does nothing")])
def test_tune_refuses_what_would_do_nothing_or_fail_late(arguments, said):
    with pytest.raises(ValueError, match=said): tune(tiny(), ROWS[:4], None, 1, batch_size=2, progress=False, **arguments)

def test_adapters_and_other_models_have_no_anchor():
    with pytest.raises(ValueError, match="adapters"): check_anchor(add_lora(tiny(), 2, 2), tiny())
    with pytest.raises(ValueError, match="itself"): check_anchor(model := tiny(), model)

def test_importance_must_cover_every_weight(tmp_path):
    with pytest.raises(ValueError, match="importance has nothing for"): trainer_for(AnchoredTrainer, tiny(), tmp_path, anchor=tiny(), importance={})


# comparing
def seen(*pairs): return [dict(task=t, general=g) for t, g in pairs]
def test_score_at_reads_the_first_crossing():
    looks = seen((20, 90), (60, 70), (50, 60), (80, 50))
    assert score_at(looks, 40) == 80 and score_at(looks, 60) == 70 and score_at(looks, 90) is None
    assert score_at(looks, 10) == 90, "reached before training began"
    assert score_at([], 10) is None

@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_pareto_front_is_beaten_by_nobody(points):
    front = pareto_front(points)
    beats = lambda b, a: b[0] >= a[0] and b[1] <= a[1] and b != a
    assert front and all(not any(beats(b, points[i]) for b in points) for i in front)
    assert all(i in front or any(beats(b, points[i]) for b in points) for i in range(len(points)))

def test_early_stopping_stops_at_patience():
    losses = [dict(loss=x) for x in (3, 2, 2.5, 1, 1.5, 1.6, .5)]
    assert [best_look(losses, patience) for patience in (1, 2, 3)] == [1, 3, 6]
