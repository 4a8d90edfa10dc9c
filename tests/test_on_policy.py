"Chapter 24: the student writes, the teacher judges; two tokenizers; several teachers."
import itertools, math, random
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM
from distillbook.distill.logit_kd import TeacherStates, distill
from distillbook.distill.losses import IGNORE, count_tokens, distill_loss, jsd, reverse_kl
from distillbook.distill.on_policy import (CrossTokenizerTrainer, OnPolicyTrainer, TeacherMixture, TwoTokenizations, advantage_loss, aligned_places,
    distill_across, distill_on_policy, divergence_by_position, encode_with_ends, mixture_log_probs, prompt_of, reply_rows, returns_to_go,
    sample_replies, sorted_distance, uld_loss)
from distillbook.lab.corpora import collate
from distillbook.lab.models import stop_tokens, train_tokenizer
from distillbook.lab.training import last_checkpoint, train

TEXT = "The quick brown fox returns the sum of two arrays, 12 and 345: naïve, größer, 日本. "
TOKENIZER = train_tokenizer([TEXT * 4], 300)
SIZE, STOPS = len(TOKENIZER), stop_tokens(TOKENIZER)
PLAIN = dict(optim="sgd", max_grad_norm=0., weight_decay=0., lr_scheduler_type="constant")

def small(seed=0, width=32, vocabulary=SIZE, layers=1, scale=1.):
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, intermediate_size=32,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(scale)
    return model

TEACHER = small(7, 48, layers=2, scale=3)
PROMPTS = [[10, 11, 12], [20, 21, 22, 23, 24, 25], [30], [40, 41]]
REPLIES = [[50, 51, STOPS[0]], [60, STOPS[1]], [70, 71, 72, 73, STOPS[0]], [STOPS[0]]]
ROWS = reply_rows(PROMPTS, REPLIES)

def learn(student=None, rows=ROWS, steps=1, batch_size=4, folder=None, teacher=TEACHER, **options):
    "A student trained by plain SGD with rate 1, and how far its output layer went."
    student = student or small()
    before = student.lm_head.weight.detach().clone()
    usual = dict(learning_rate=1., batch_size=batch_size, warmup=0, precision="float32", progress=False, arguments=PLAIN, max_new_tokens=8)
    history = distill_on_policy(student, teacher, rows, folder, steps, TOKENIZER, **(usual | options))
    return student.lm_head.weight.detach() - before, history

def gap(a, b): return ((a - b).norm()/b.norm()).item()

# the student's text

def test_replies_end_with_their_first_stop_token(monkeypatch):
    written = torch.tensor([[5, STOPS[0], 9, STOPS[1]], [STOPS[1], STOPS[0], STOPS[0], STOPS[0]], [5, 6, 7, 8]])
    model = small()
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, written], 1))
    assert sample_replies(model, PROMPTS[:3], STOPS, 4) == [[5, STOPS[0]], [STOPS[1]], [5, 6, 7, 8]]

def test_sampling_is_seeded_and_leaves_everything_as_it_was():
    model = small(scale=2).train()
    own, state = model.generation_config, torch.get_rng_state()
    draws = [sample_replies(model, PROMPTS, STOPS, 6, seed=s) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(state, torch.get_rng_state()) and model.generation_config is own and model.training

def test_padding_on_the_left_changes_no_reply():
    model = small(scale=3)
    alone = [sample_replies(model, [p], STOPS, 10, temperature=0)[0] for p in PROMPTS]
    assert sample_replies(model, PROMPTS, STOPS, 10, temperature=0) == alone

def test_no_prompts_no_replies(): assert sample_replies(small(), [], STOPS, 4) == []

def test_samples_follow_the_model():
    "First tokens of many draws against the model's probabilities, by chi-square."
    from scipy.stats import chisquare
    model = small(3, scale=2.5)
    with torch.no_grad(): p = model(torch.tensor([PROMPTS[1]])).logits[0, -1].softmax(-1).double().numpy()
    drawn = np.bincount([r[0] for r in sample_replies(model, [PROMPTS[1]]*3000, STOPS, 1, seed=4)], minlength=SIZE)
    often = p*3000 >= 5
    seen, wanted = np.append(drawn[often], drawn[~often].sum()), np.append(p[often], p[~often].sum())*3000
    assert chisquare(seen, wanted*seen.sum()/wanted.sum()).pvalue > 1e-3

@pytest.mark.parametrize("prompts, said", [([[1], []], "prompt 1 is empty"), ([[1]*125], "exceed the context of 128")])
def test_prompts_that_cannot_be_continued(prompts, said):
    with pytest.raises(ValueError, match=said): sample_replies(small(), prompts, STOPS, 8)

ids_and_labels = st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=12)

@given(st.lists(st.integers(0, 99), min_size=1, max_size=8), st.lists(st.integers(0, 99), min_size=1, max_size=8))
def test_a_prompt_comes_back_from_its_row(prompt, reply):
    row, = reply_rows([prompt], [reply])
    assert prompt_of(row["input_ids"], row["labels"]) == prompt and row["input_ids"] == prompt + reply
    assert [t for t in row["labels"] if t != IGNORE] == reply and row["labels"][:len(prompt)] == [IGNORE]*len(prompt)

@given(ids_and_labels)
def test_a_prompt_ends_before_the_last_stretch_of_labels(pairs):
    ids, counted = zip(*pairs)
    labels = [t if c else IGNORE for t, c in pairs]
    if not any(counted) or not any(not c for c in counted[:max(i for i, c in enumerate(counted) if c)]):
        with pytest.raises(ValueError, match="without a label|has no prompt"): prompt_of(list(ids), labels)
    else:
        prompt = prompt_of(list(ids), labels)
        assert not counted[len(prompt)-1] and counted[len(prompt)] and prompt == list(ids[:len(prompt)])

# the losses

def test_ends_of_beta_by_hand():
    "Student (1/2, 1/2), teacher (3/4, 1/4): the two KLs differ."
    student, teacher, labels = torch.zeros(1, 2, 2), torch.tensor([[[math.log(3), 0.]]*2]), torch.tensor([[0, 0]])
    value = lambda beta: distill_loss(student, teacher, labels, kind="jsd", temperature=1., beta=beta).item()
    assert value(0) == pytest.approx(0.75*math.log(1.5) + 0.25*math.log(0.5), abs=1e-6)      # KL(teacher || student)
    assert value(1) == pytest.approx(0.5*math.log(2/3) + 0.5*math.log(2), abs=1e-6)          # KL(student || teacher)
    assert abs(value(0) - value(1)) > 0.01

@pytest.mark.parametrize("vocabulary", [2, 3, 7])
def test_advantage_has_the_gradient_and_the_value_of_reverse_kl(vocabulary):
    torch.manual_seed(vocabulary)
    logits, teacher = torch.randn(2, 1, 2, vocabulary, dtype=torch.float64).unbind()
    logits.requires_grad_()
    labels = [torch.tensor([[0, w]]) for w in range(vocabulary)]
    p = logits[0, 0].softmax(-1).detach()
    losses = [advantage_loss(logits, teacher, l) for l in labels]
    ours = sum(w*torch.autograd.grad(l, logits, retain_graph=True)[0] for w, l in zip(p, losses))
    exact = distill_loss(logits, teacher, labels[0], kind="reverse", temperature=1.)
    assert torch.allclose(ours, torch.autograd.grad(exact, logits)[0], atol=1e-12)
    assert sum(w*l.item() for w, l in zip(p, losses)).item() == pytest.approx(exact.item(), abs=1e-12)

@pytest.mark.parametrize("discount", [0., 1.])
def test_advantage_of_whole_texts_against_enumeration(discount):
    "All texts of three words from three: with discount 1 the gradient of the KL of texts, with 0 that of each place by itself."
    torch.manual_seed(1)
    beliefs = {p: torch.randn(3, dtype=torch.float64, requires_grad=True) for n in range(3) for p in itertools.product(range(3), repeat=n)}
    other = {p: torch.randn(3, dtype=torch.float64) for p in beliefs}
    logits = lambda table, text: torch.stack([table[text[:k]] for k in range(3)] + [table[()]])[None]
    texts = list(itertools.product(range(3), repeat=3))
    log_p = lambda table, text: sum(table[text[:k]].log_softmax(-1)[text[k]] for k in range(3))
    ours = sum(log_p(beliefs, t).exp().detach()*advantage_loss(logits(beliefs, t), logits(other, t), torch.tensor([[0, *t]]), num_items=1, discount=discount) for t in texts)
    kl = lambda p: (beliefs[p].softmax(-1)*(beliefs[p].log_softmax(-1) - other[p].log_softmax(-1))).sum()
    reach = lambda p: math.exp(sum(beliefs[p[:k]].log_softmax(-1)[p[k]].item() for k in range(len(p))))
    exact = sum(log_p(beliefs, t).exp()*(log_p(beliefs, t) - log_p(other, t)) for t in texts) if discount else sum(reach(p)*kl(p) for p in beliefs)
    assert ours.item() == pytest.approx(exact.item(), rel=1e-9) if not discount else True
    for a, b in zip(torch.autograd.grad(ours, list(beliefs.values())), torch.autograd.grad(exact, list(beliefs.values()))): assert torch.allclose(a, b, atol=1e-10)

def test_cross_entropy_on_own_samples_teaches_nothing():
    logits = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    total = sum(p*torch.autograd.grad(distill_loss(logits, None, torch.tensor([[0, w]]), kind="ce"), logits)[0] for w, p in enumerate(logits[0, 0].softmax(-1).detach()))
    assert total.abs().max() < 1e-12

def test_advantage_counts_labels_alone_and_no_padding_column():
    a, b = torch.randn(2, 2, 6, 9).unbind()
    labels = torch.tensor([[IGNORE, IGNORE, 3, 4, IGNORE, IGNORE], [IGNORE]*6])
    value = advantage_loss(a, b, labels, vocabulary_size=7)
    c = a.clone(); c[0, 3:] += torch.randn(3, 9); c[1] += 1*torch.randn(6, 9); c[..., 7:] += 5; c[0, 0] += torch.randn(9)
    assert torch.allclose(value, advantage_loss(c, b, labels, vocabulary_size=7), atol=1e-6)
    log = lambda x: x[0, [1, 2], :7].log_softmax(-1)[[0, 1], [3, 4]]
    assert value.item() == pytest.approx((log(a) - log(b)).mean().item(), abs=1e-5)
    none = advantage_loss(a.requires_grad_(), b, torch.full((2, 6), IGNORE))
    none.backward(); assert none.item() == 0 and not a.grad.any()

@given(st.lists(st.floats(-3, 3), min_size=1, max_size=7), st.floats(0, 1))
def test_returns_to_go(rewards, discount):
    got = returns_to_go(torch.tensor([rewards], dtype=torch.float64), discount)[0].tolist()
    assert got == pytest.approx([sum(discount**(k - t)*rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))], abs=1e-9)

def test_discounts_out_of_range():
    with pytest.raises(ValueError, match="discount"): returns_to_go(torch.zeros(1, 2), 1.5)

def test_divergence_by_position_by_hand():
    student = small()
    by_place = divergence_by_position(student, TEACHER, ROWS, SIZE, 6)
    assert by_place[5].isnan() and (by_place[:5] > 0).all()
    one = torch.tensor([PROMPTS[2] + REPLIES[2]])
    with torch.no_grad(): exact = reverse_kl(student(one).logits[:, 4:5], TEACHER(one).logits[:, 4:5], temperature=1.)
    assert by_place[4].item() == pytest.approx(exact.item(), rel=1e-4)      # only the third reply is so long

# the trainer

class Watched(OnPolicyTrainer):
    "Keeps the batches that the loss saw."
    seen = []
    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        self.seen.append(({k: v.clone() if hasattr(v, "clone") else v for k, v in inputs.items()}, num_items_in_batch))
        return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)

def watch(steps, share, accumulation=1, batch_size=4, seed=0, **options):
    Watched.seen = []
    train(small(scale=2), ROWS, None, steps, batch_size, 0., warmup=0, seed=seed, accumulation=accumulation, precision="float32", progress=False, trainer_class=Watched,
          teacher=TEACHER, tokenizer=TOKENIZER, teacher_tokenizer=TOKENIZER, kind="reverse", temperature=1., share=share, max_new_tokens=8, **options)
    return Watched.seen

def test_own_batches_keep_the_prompts_and_count_the_replies_alone():
    for inputs, count in watch(3, 1.):
        for ids, labels, mask in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), inputs["attention_mask"].tolist()):
            ids, labels = ids[:sum(mask)], labels[:sum(mask)]
            prompt = prompt_of(ids, labels)
            assert prompt in PROMPTS and 1 <= len(ids) - len(prompt) <= 8
            assert not set(ids[len(prompt):-1]) & set(STOPS), "nothing stands after a stop token"
        assert inputs["labels"][inputs["attention_mask"] == 0].eq(IGNORE).all()
        assert count == count_tokens(inputs["labels"]), "the loss is divided by the tokens that are there"

def test_own_tokens_of_all_accumulated_batches_are_counted():
    seen = watch(2, 1., accumulation=2, batch_size=2)
    for pair in (seen[:2], seen[2:]): assert pair[0][1] == pair[1][1] == sum(count_tokens(inputs["labels"]) for inputs, _ in pair)

@pytest.mark.parametrize("share", [0., 0.3, 1.])
def test_the_share_of_own_batches(share):
    given = sorted(map(tuple, REPLIES))
    own = sum(sorted(tuple(t for t in row if t != IGNORE) for row in inputs["labels"].tolist()) != given for inputs, _ in watch(40, share))
    assert own == {0.: 0, 1.: 40}.get(share, own) and (share != 0.3 or 4 <= own <= 21)

def test_without_own_text_it_is_distill():
    one, other = small(), small()
    usual = dict(batch_size=2, learning_rate=1e-2, seed=5, precision="float32", progress=False)
    distill_on_policy(one, TEACHER, ROWS, None, 3, TOKENIZER, share=0., kind="jsd", loss_options=dict(beta=.3), **usual)
    distill(other, TEACHER, ROWS, None, 3, TOKENIZER, TOKENIZER, "jsd", 1., loss_options=dict(beta=.3), fused=False, **usual)
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)

@pytest.mark.parametrize("advantage", [False, True])
def test_a_step_is_the_gradient_of_the_loss_on_the_samples(advantage):
    inputs, count = watch(1, 1., advantage=advantage)[0]
    student = small(scale=2)
    moved, _ = learn(small(scale=2), share=1., advantage=advantage)
    labels = inputs.pop("labels"); inputs.pop("sampled", None)
    ours = student(**inputs).logits
    with torch.no_grad(): theirs = TEACHER(**inputs).logits
    (advantage_loss(ours, theirs, labels) if advantage else distill_loss(ours, theirs, labels, kind="reverse", temperature=1.)).backward()
    assert gap(moved, -student.lm_head.weight.grad) < 1e-4

@pytest.mark.parametrize("options", [dict(share=1.), dict(share=.5), dict(share=1., advantage=True)], ids=["own", "mixed", "advantage"])
def test_resumed_equals_uninterrupted(options, tmp_path, monkeypatch):
    whole, _ = learn(steps=6, batch_size=2, learning_rate=.1, **options)
    class Killed(Exception): pass
    step = OnPolicyTrainer.training_step
    def dies(self, *args, **kwargs):
        if self.state.global_step == 4: raise Killed
        return step(self, *args, **kwargs)
    monkeypatch.setattr(OnPolicyTrainer, "training_step", dies)
    usual = dict(steps=6, batch_size=2, folder=tmp_path, learning_rate=.1, save_steps=3, **options)
    with pytest.raises(Killed): learn(**usual)
    monkeypatch.undo()
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    torch.manual_seed(99); random.seed(99)
    student = small()
    before = student.lm_head.weight.detach().clone()
    _, history = learn(student, **usual)
    assert history["resumed_from"] == 3 and torch.allclose(student.lm_head.weight - before, whole, atol=1e-6)

def test_a_folder_of_another_run_is_refused(tmp_path):
    learn(steps=2, folder=tmp_path, share=1.)
    for other in (dict(share=.5), dict(kind="kl"), dict(advantage=True), dict(max_new_tokens=4), dict(loss_options=dict(beta=.1)), dict(teacher=small(9))):
        with pytest.raises(ValueError, match="another run"): learn(steps=2, folder=tmp_path, **(dict(share=1.) | other))

def test_empty_replies_are_a_stop_token_and_train():
    "A student that stops at once: each reply is one token."
    class Silent(Qwen3ForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.clone(); out.logits[..., STOPS[0]] += 100
            return out
    student = Silent(small().config)
    assert sample_replies(student, PROMPTS, STOPS, 5) == [[STOPS[0]]]*4
    _, history = learn(student, steps=2, share=1., log_steps=1)
    assert all(map(math.isfinite, history["loss"]))

def test_other_kinds_learn_too():
    for options in (dict(kind="kl"), dict(kind="jsd", loss_options=dict(beta=.1)), dict(kind="skew"), dict(kind="hybrid")):
        moved, history = learn(steps=2, learning_rate=.1, share=.5, **options)
        assert moved.norm() > 0 and all(map(math.isfinite, history["loss"]))

def test_own_text_brings_the_student_to_its_teacher():
    student, teacher = small(scale=2), small(1, scale=2.5)
    before = divergence_by_position(student, teacher, ROWS, SIZE, 1)[0].item()
    distill_on_policy(student, teacher, ROWS*8, None, 40, TOKENIZER, batch_size=16, learning_rate=1e-2, max_new_tokens=6, precision="float32", progress=False)
    assert divergence_by_position(student, teacher, ROWS, SIZE, 1)[0] < before/2

@pytest.mark.parametrize("options, said", [(dict(share=1.2), "share"), (dict(sampling_temperature=0.), "sampling_temperature"), (dict(kind="ce"), "teaches nothing")])
def test_settings_that_cannot_be_meant(options, said):
    with pytest.raises(ValueError, match=said): learn(**options)

def test_packed_rows_are_refused():
    packed = [dict(input_ids=torch.arange(6), labels=torch.tensor([IGNORE, IGNORE, 2, IGNORE, 4, 5]), position_ids=torch.tensor([0, 1, 2, 0, 1, 2]))]*2
    with pytest.raises(ValueError, match="not packed"): learn(rows=packed, batch_size=1, share=1.)

def test_counts(): 
    counts = {}
    learn(steps=2, share=0., counts=counts)
    assert counts == dict(teacher_tokens=2*sum(map(len, REPLIES)), seconds_sampling=0.)
    learn(steps=2, share=1., counts=counts)
    assert counts["teacher_tokens"] >= 8 and counts["seconds_sampling"] > 0

# two vocabularies

def test_sorted_distance_by_hand():
    p, q = torch.tensor([0.1, 0.7, 0.2]), torch.tensor([0.5, 0.5])
    assert sorted_distance(p, q).item() == pytest.approx(0.6) == sorted_distance(q, p).item()

chances = st.lists(st.floats(1e-3, 1), min_size=1, max_size=9).map(lambda x: torch.tensor(x, dtype=torch.float64)/sum(x))

@given(chances, chances, st.randoms(), st.integers(0, 4))
def test_sorted_distance_is_a_distance_between_shapes(p, q, shuffle, padding):
    order = list(range(len(q))); shuffle.shuffle(order)
    d = sorted_distance(p, q)
    assert -1e-9 <= d <= 2 and torch.allclose(d, sorted_distance(q[order], p), atol=1e-9)
    assert torch.allclose(d, sorted_distance(torch.cat([p, torch.zeros(padding, dtype=p.dtype)]), q), atol=1e-9)
    assert sorted_distance(q, q[order]).item() == pytest.approx(0, abs=1e-9)

@given(st.lists(st.lists(st.floats(.01, 1), min_size=4, max_size=4), min_size=2, max_size=2))
def test_no_transport_is_cheaper(two):
    "The definition: the least total variation over all ways to name one's words by the other's, by trying them all."
    p, q = (torch.tensor(x, dtype=torch.float64)/sum(x) for x in two)
    best = min((p - q[list(order)]).abs().sum().item() for order in itertools.permutations(range(4)))
    assert sorted_distance(p, q).item() == pytest.approx(best, abs=1e-9)

def test_sorting_with_and_without_gradient_is_equal():
    p, q = torch.randn(5, 30).softmax(-1), torch.randn(5, 40).softmax(-1)
    assert torch.allclose(sorted_distance(p.clone().requires_grad_(), q), sorted_distance(p, q), atol=1e-6)

OTHER = train_tokenizer([TEXT * 2 + "brown arrays, größer"], 280)
CORPUS = [TEXT, "The sum, the fox: 日本 and naïve arrays 12345.", "größer größer 🦊 fox", "a"]

@pytest.mark.parametrize("text", CORPUS)
def test_places_are_where_both_have_read_the_same(text):
    (a, a_ends), (b, b_ends) = (encode_with_ends(t, text) for t in (TOKENIZER, OTHER))
    places = aligned_places(a_ends, b_ends)
    assert places == sorted(places) and all(0 < i < len(a) and 0 < j < len(b) for i, j in places)
    for i, j in places: assert TOKENIZER.decode(a[:i]) == OTHER.decode(b[:j]) == text[:len(TOKENIZER.decode(a[:i]))]
    starts = lambda t, ids: {t.decode(ids[:k]) for k in range(1, len(ids)) if "�" not in t.decode(ids[:k])}
    assert len(places) == len(starts(TOKENIZER, a) & starts(OTHER, b)), "no such place is left out"

@given(st.text(max_size=30))
def test_places_of_any_text(text):
    (a, a_ends), (b, b_ends) = (encode_with_ends(t, text) for t in (TOKENIZER, OTHER))
    assert [e for e in a_ends if e > 0] == sorted(e for e in a_ends if e > 0)
    for i, j in aligned_places(a_ends, b_ends): assert TOKENIZER.decode(a[:i]) == OTHER.decode(b[:j])

def test_ends_of_another_text_are_refused():
    with pytest.raises(ValueError, match="not of one text"): aligned_places([1, 4], [1, 3])

def test_uld_loss_compares_what_comes_next_at_the_places():
    a, b = torch.randn(2, 5, 6), torch.randn(2, 7, 9)
    places = torch.tensor([(0, 1, 2), (1, 4, 6)])
    want = [sorted_distance(a[0, 0].softmax(-1), b[0, 1].softmax(-1)), sorted_distance(a[1, 3].softmax(-1), b[1, 5].softmax(-1))]
    assert uld_loss(a, b, places).item() == pytest.approx(sum(want).item()/2, abs=1e-6)
    assert uld_loss(a, b, places, num_items=10).item() == pytest.approx(sum(want).item()/10, abs=1e-6)

def test_uld_without_a_place_is_zero():
    a = torch.randn(1, 3, 4, requires_grad=True)
    loss = uld_loss(a, torch.randn(1, 3, 5), torch.zeros(0, 3, dtype=torch.long))
    loss.backward(); assert loss.item() == 0 and not a.grad.any()

def across(batch_size, accumulation, weight=1.5, teacher=TEACHER, data=None, student=None, **options):
    student = student or small(2, vocabulary=len(OTHER))
    before = student.lm_head.weight.detach().clone()
    distill_across(student, teacher, data or TwoTokenizations(CORPUS, OTHER, TOKENIZER), None, 1, weight, batch_size=batch_size, accumulation=accumulation, learning_rate=1.,
                   warmup=0, precision="float32", progress=False, arguments=PLAIN, **options)
    return student.lm_head.weight.detach() - before

def test_parts_of_a_batch_add_up_across_tokenizers():
    whole = across(4, 1)
    assert gap(across(1, 4), whole) < 1e-4 and gap(across(2, 2), whole) < 1e-4
    assert gap(across(4, 1, teacher=None), whole) > 1e-3

def test_without_a_teacher_it_is_cross_entropy():
    plain, rows = small(2, vocabulary=len(OTHER)), TwoTokenizations(CORPUS, OTHER, TOKENIZER)
    before = plain.lm_head.weight.detach().clone()
    train(plain, [dict(input_ids=r["input_ids"], labels=r["labels"]) for r in rows], None, 1, 4, 1., warmup=0, precision="float32", progress=False, arguments=PLAIN)
    assert gap(across(4, 1, teacher=None), plain.lm_head.weight.detach() - before) < 1e-4

def test_kept_states_teach_what_the_live_teacher_does():
    texts = [TEXT, TEXT[::-1]]
    size = min(len(TOKENIZER(t)["input_ids"]) for t in texts)
    texts = [TOKENIZER.decode(TOKENIZER(t)["input_ids"][:size-8]) for t in texts]
    texts = [t for t in texts if len(TOKENIZER(t)["input_ids"]) == size - 8 and "�" not in t]
    data = TwoTokenizations(texts, OTHER, TOKENIZER)
    rows = [dict(input_ids=torch.tensor(r["teacher_ids"]), labels=torch.tensor(r["teacher_ids"])) for r in data]
    kept = TwoTokenizations(texts, OTHER, TOKENIZER, TeacherStates(rows, TEACHER).hidden)
    assert gap(across(len(texts), 1, data=kept), across(len(texts), 1, data=data)) < 0.02

def test_two_tokenizations_resume(tmp_path):
    data, usual = TwoTokenizations(CORPUS, OTHER, TOKENIZER), dict(batch_size=2, precision="float32", progress=False, save_steps=2)
    whole, parts = small(2, vocabulary=len(OTHER)), small(2, vocabulary=len(OTHER))
    distill_across(whole, TEACHER, data, None, 4, **usual)
    class Killed(Exception): pass
    step = CrossTokenizerTrainer.training_step
    def dies(self, *args, **kwargs):
        if self.state.global_step == 3: raise Killed
        return step(self, *args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrossTokenizerTrainer, "training_step", dies)
        with pytest.raises(Killed): distill_across(parts, TEACHER, data, tmp_path, 4, **usual)
    parts = small(2, vocabulary=len(OTHER))
    assert distill_across(parts, TEACHER, data, tmp_path, 4, **usual)["resumed_from"] == 2
    assert torch.allclose(parts.lm_head.weight, whole.lm_head.weight, atol=1e-6)

# several teachers

@given(st.lists(st.lists(st.floats(-4, 4), min_size=3, max_size=3), min_size=1, max_size=4), st.data())
def test_a_mixture_is_the_mean_of_probabilities(rows, data):
    weights = data.draw(st.lists(st.floats(0.05, 3), min_size=len(rows), max_size=len(rows)))
    logits = [torch.tensor(r) for r in rows]
    want = sum(w*x.softmax(-1) for w, x in zip(weights, logits))/sum(weights)
    got = mixture_log_probs(logits, weights).exp()
    assert torch.allclose(got, want, atol=1e-5) and got.sum().item() == pytest.approx(1, abs=1e-5)

@pytest.mark.parametrize("weights, said", [([1, -1], "0 or more"), ([0, 0], "0 or more"), ([1], "2 models and 1 weights")])
def test_weights_that_cannot_be_meant(weights, said):
    with pytest.raises(ValueError, match=said): mixture_log_probs([torch.zeros(3)]*2, weights)

def test_a_mixture_teaches_as_its_mean_does():
    teachers = [TEACHER, small(8, scale=3)]
    mixture = TeacherMixture(teachers, [TOKENIZER]*2, [3., 1.])
    student, batch = small(), collate(ROWS)
    labels = batch.pop("labels")
    with torch.no_grad(): mean = (0.75*teachers[0](**batch).logits.softmax(-1) + 0.25*teachers[1](**batch).logits.softmax(-1)).log()
    distill_loss(student(**batch).logits, mean, labels, kind="kl", temperature=1.).backward()
    moved, _ = learn(teacher=mixture, share=0., kind="kl")
    assert gap(moved, -student.lm_head.weight.grad) < 1e-4
    one, _ = learn(teacher=TeacherMixture(teachers, [TOKENIZER]*2, [1., 0.]), share=0., kind="kl")
    assert gap(one, learn(share=0., kind="kl")[0]) < 1e-4

def test_a_mixture_refuses_what_it_cannot_mix():
    with pytest.raises(ValueError, match="two vocabularies"): TeacherMixture([TEACHER, small(1, vocabulary=len(OTHER))], [TOKENIZER, OTHER])
    with pytest.raises(ValueError, match="1 teachers and 2 tokenizers"): TeacherMixture([TEACHER], [TOKENIZER]*2)
    with pytest.raises(ValueError, match="fused=False"): learn(teacher=TeacherMixture([TEACHER], [TOKENIZER]), fused=True)

def test_weights_of_a_mixture_belong_to_the_run(tmp_path):
    mix = lambda w: TeacherMixture([TEACHER, small(8)], [TOKENIZER]*2, w)
    learn(steps=2, folder=tmp_path, teacher=mix([1., 1.]), share=0.)
    with pytest.raises(ValueError, match="another run"): learn(steps=2, folder=tmp_path, teacher=mix([1., 2.]), share=0.)

# held against TRL

@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [0.5, 1., 3.])
def test_trl_has_the_same_divergence(beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    torch.manual_seed(0)
    a, b, labels = torch.randn(3, 7, 40)*2, torch.randn(3, 7, 40)*2, torch.randint(0, 40, (3, 7))
    labels[0, :4], labels[1] = IGNORE, IGNORE
    mask = labels[:, 1:] != IGNORE
    peer = lambda **more: gkd(a[:, :-1], b[:, :-1], labels[:, 1:], beta=beta, temperature=temperature, **more).item()
    ours = lambda **more: jsd(a[:, :-1], b[:, :-1], mask, temperature, beta=beta, **more).item()/temperature**2
    assert ours() == pytest.approx(peer(), abs=1e-5)
    assert ours(num_items=37) == pytest.approx(peer(num_items_in_batch=torch.tensor(37)), abs=1e-5)
    assert ours(num_items=1) == pytest.approx(peer(reduction="sum"), rel=1e-5)
    assert ours()/40 == pytest.approx(peer(reduction="mean"), rel=1e-4)      # it also divides by the vocabulary

def uld_of_trl(strategy="bayesian", extended=False):
    from types import SimpleNamespace
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    return gold.ULDLoss(SimpleNamespace(uld_crossentropy_weight=0., uld_distillation_weight=1., uld_student_temperature=1., uld_teacher_temperature=1.,
        uld_skip_student_eos=False, uld_skip_teacher_eos=False, use_extended_uld=extended, uld_token_merge_strategy=strategy, uld_use_hybrid_loss=False))

@pytest.mark.parametrize("sizes", [(30, 50), (50, 30), (20, 20)])
def test_trl_has_the_same_sorted_distance(sizes):
    torch.manual_seed(1)
    a, b, labels = torch.randn(1, 8, sizes[0]), torch.randn(1, 8, sizes[1]), torch.randint(0, 20, (1, 8))
    labels[:, :3] = IGNORE
    places = torch.tensor([(0, k, k) for k in range(3, 8)])
    assert uld_loss(a, b, places).item() == pytest.approx(uld_of_trl()(a, b, labels, labels, labels, labels).item(), abs=1e-5)

def test_trl_aligns_the_same_spans():
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    for text in ("The quick brown fox returns 12 arrays.", TEXT.encode("ascii", "ignore").decode()):
        (_, a), (_, b) = (encode_with_ends(t, text) for t in (TOKENIZER, OTHER))
        spans = gold.ULDLoss._align_by_byte_offsets(*([(s, e) for s, e in zip([0, *ends], ends)] for ends in (a, b)))
        assert aligned_places(a, b) == [(one[-1] + 1, other[-1] + 1) for one, other in zip(*spans)][:-1]

def gkd_trainer(tmp_path, batch, lmbda):
    gkd = pytest.importorskip("trl.experimental.gkd")
    import datasets
    settings = gkd.GKDConfig(output_dir=str(tmp_path), lmbda=lmbda, beta=0.5, report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=4)
    return gkd.GKDTrainer(small(), TEACHER, settings, data_collator=lambda rows: batch, processing_class=TOKENIZER,
                          train_dataset=datasets.Dataset.from_list([dict(messages=[dict(role="user", content="?")])]))

def test_trl_takes_the_same_step(tmp_path):
    batch = collate(ROWS)
    count = count_tokens(batch["labels"])
    peer = gkd_trainer(tmp_path, batch, 0.)
    theirs = peer.training_step(peer.model, dict(batch), count).item()
    _, history = learn(share=0., kind="jsd", log_steps=1, learning_rate=0.)
    assert history["loss"][0] == pytest.approx(theirs, abs=1e-5)

def test_trl_divides_own_replies_by_the_tokens_of_the_given_ones(tmp_path, monkeypatch):
    given, own = collate(ROWS), collate(reply_rows(PROMPTS, [r[-1:] for r in REPLIES]))
    peer = gkd_trainer(tmp_path, given, 1.)
    monkeypatch.setattr(peer, "generate_on_policy_outputs", lambda *_: (own["input_ids"], own["attention_mask"], own["labels"]))
    theirs = peer.training_step(peer.model, dict(given), count_tokens(given["labels"])).item()
    labels = own.pop("labels")
    with torch.no_grad(): right = distill_loss(small()(**own).logits, TEACHER(**own).logits, labels, kind="jsd", temperature=1.).item()
    assert theirs == pytest.approx(right*count_tokens(labels).item()/count_tokens(given["labels"]).item(), rel=1e-4)
