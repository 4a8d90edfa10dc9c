"""Losses: cases small enough for paper, properties over random input, and TRL's values on one tensor."""
import math, os
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from distillbook.distill import losses as L
from distillbook.distill.losses import (IGNORE, KINDS, ce_loss, count_tokens, distill_loss, fused_kd_loss, jsd, kd_loss,
                                        next_token_labels, reverse_kl, skew_kl)
from distillbook.lab.exercises import Exercise

SOFT = dict(kl=kd_loss, reverse=reverse_kl, jsd=jsd, skew=skew_kl)
property_test = settings(max_examples=25, deadline=None, derandomize=True)


def batch(seed=0, batch=3, seq=7, vocab=11, scale=2.):
    "Student and teacher logits in float64, and labels of which some do not count."
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale*torch.randn(2, batch, seq, vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (batch, seq), generator=generator)
    labels[torch.rand(batch, seq, generator=generator) < .3] = IGNORE
    labels[0, -1] = 0
    return student, teacher, labels


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(*(torch.as_tensor(x, dtype=torch.float64) for x in (a, b)), rtol=tolerance, atol=tolerance)


# By hand

def test_kl_of_two_words():
    p, q = torch.tensor([[.5, .5]]).double().log(), torch.tensor([[.25, .75]]).double().log()
    close(kd_loss(q, p, temperature=1.), .5*math.log(4/3))
    close(reverse_kl(q, p, temperature=1.), .25*math.log(.5) + .75*math.log(1.5))
    mixture = .375, .625
    close(jsd(q, p, temperature=1.), .5*(.5*math.log(.5/mixture[0]) + .5*math.log(.5/mixture[1]) + .25*math.log(.25/mixture[0]) + .75*math.log(.75/mixture[1])))
    close(skew_kl(q, p, temperature=1., skew=.2), .5*math.log(.5/.3) + .5*math.log(.5/.7))


def test_a_uniform_model_pays_the_log_of_the_vocabulary():
    close(ce_loss(torch.zeros(2, 3, 8).double(), torch.ones(2, 3, dtype=torch.long)), math.log(8))


def test_temperature_softens_both_and_the_factor_comes_once():
    "At T = 2 logits (2 log 3, 0) are the odds 3 to 1."
    teacher, student = torch.tensor([[2*math.log(3), 0.]], dtype=torch.float64), torch.zeros(1, 2).double()
    close(kd_loss(student, teacher, temperature=2.), 4*(.75*math.log(1.5) + .25*math.log(.5)))


def test_the_causal_shift():
    assert next_token_labels(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORE]]
    logits = torch.full((1, 3, 8), -50.).double()
    logits[0, 0, 6] = logits[0, 1, 7] = 50
    close(distill_loss(logits, None, torch.tensor([[5, 6, 7]]), "ce"), 0)


def test_counting_follows_the_shift():
    labels = torch.tensor([[5, 6, IGNORE], [IGNORE, 4, 4]])
    assert count_tokens(labels) == 3 and count_tokens(labels, shift=False) == 4


# The traps, one by one

@property_test
@given(st.sampled_from(sorted(SOFT)), st.integers(0, 10**6), st.integers(2, 4))
def test_repeating_the_sequences_changes_nothing(kind, seed, times):
    student, teacher, labels = batch(seed)
    value = SOFT[kind](student, teacher, labels != IGNORE)
    close(SOFT[kind](*(x.repeat(1, times, 1) for x in (student, teacher)), labels.repeat(1, times) != IGNORE), value)


@property_test
@given(st.sampled_from(["kl", "reverse", "jsd", "skew", "hybrid", "auto", "ce"]), st.integers(0, 10**6), st.integers(1, 8))
def test_padding_columns_change_nothing(kind, seed, columns):
    student, teacher, labels = batch(seed)
    value = distill_loss(student, teacher, labels, kind)
    padded = [F.pad(x, (0, columns), value=fill) for x, fill in ((student, 0.), (teacher, 3.))]
    close(distill_loss(*padded, labels, kind, vocabulary_size=student.shape[-1]), value)


def test_padding_columns_do_change_a_loss_that_is_not_told():
    student, teacher, labels = batch()
    padded = [F.pad(x, (0, 8)) for x in (student, teacher)]
    assert abs(distill_loss(*padded, labels, "kl") / distill_loss(student, teacher, labels, "kl") - 1) > .05


@property_test
@given(st.floats(1, 8), st.integers(0, 10**6))
def test_the_factor_keeps_the_gradient_of_one_size(temperature, seed):
    "On logits with a standard deviation of 1; peaked ones lose more, as the chapter measures."
    def norm(temperature):
        student, teacher, _ = batch(seed, 8, 8, 100, scale=1.)
        student.requires_grad_()
        kd_loss(student, teacher, temperature=temperature).backward()
        return student.grad.norm().item()
    assert .5 < norm(temperature) / norm(1.) < 2


@pytest.mark.parametrize("kind", SOFT)
def test_at_a_high_temperature_every_divergence_matches_logits(kind):
    "KL and reverse KL have the gradient (z - v)/V there, the others a fixed share of it: T squared is there once in each."
    gradients = []
    for temperature in (200., 400.):
        student, teacher, _ = batch(1)
        student.requires_grad_()
        SOFT[kind](student, teacher, temperature=temperature).backward()
        gradients.append(student.grad)
    close(gradients[0], gradients[1], 1e-3)
    centred = [x.detach() - x.detach().mean(-1, keepdim=True) for x in (student, teacher)]
    share = dict(kl=1, reverse=1, jsd=.25, skew=.9**2)[kind]
    close(gradients[1], share*(centred[0] - centred[1]) / student.shape[-1] / 21, 2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_accumulation_on_ragged_lengths(kind):
    def gradient(size):
        torch.manual_seed(0)
        weight, hidden, teacher = torch.randn(11, 5).double().requires_grad_(), torch.randn(8, 6, 5).double(), torch.randn(8, 6, 11).double()
        labels = torch.randint(0, 11, (8, 6)).masked_fill(torch.arange(6) >= torch.randint(2, 7, (8, 1)), IGNORE)
        for part in torch.arange(8).split(size):
            distill_loss(hidden[part] @ weight.T, teacher[part], labels[part], kind, num_items=count_tokens(labels)).backward()
        return weight.grad
    close(gradient(1), gradient(8))
    close(gradient(2), gradient(8))


def test_the_ends_of_the_divergence_are_not_swapped():
    student, teacher, _ = batch()
    student = student/4
    close(jsd(student, teacher, beta=0.), kd_loss(student, teacher))
    close(jsd(student, teacher, beta=1.), reverse_kl(student, teacher))
    assert abs(kd_loss(student, teacher) - reverse_kl(student, teacher)) > .1
    close(jsd(student, teacher, beta=1e-6)/1e-6, kd_loss(student, teacher), 1e-3)
    close(jsd(student, teacher, beta=1-1e-6)/1e-6, reverse_kl(student, teacher), 1e-3)


@property_test
@given(st.floats(0, 1), st.integers(0, 10**6), st.floats(.5, 5))
def test_divergences_are_zero_only_between_equals_and_bounded(beta, seed, temperature):
    student, teacher, _ = batch(seed, scale=10.)
    for loss in (kd_loss, reverse_kl, lambda *a, **k: jsd(*a, beta=beta, **k), lambda *a, **k: skew_kl(*a, skew=min(beta, .99), **k)):
        close(loss(student, student.clone(), temperature=temperature), 0)
        assert loss(student, teacher, temperature=temperature) >= -1e-12
    assert jsd(student, teacher, temperature=1., beta=beta) <= math.log(2) + 1e-9 or beta in (0., 1.)
    if 0 < beta < 1: assert skew_kl(student, teacher, temperature=1., skew=beta) <= -math.log(beta) + 1e-9


@property_test
@given(st.sampled_from(KINDS), st.integers(0, 10**6))
def test_what_stands_at_ignored_positions_does_not_matter(kind, seed):
    student, teacher, labels = batch(seed)
    value = distill_loss(student, teacher, labels, kind)
    ignored = (next_token_labels(labels) == IGNORE)[..., None]
    changed = student.masked_fill(ignored, float("nan")).requires_grad_()
    again = distill_loss(changed, teacher.masked_fill(ignored, float("nan")), labels, kind)
    again.backward()
    close(again, value)
    assert changed.grad.isfinite().all() and not changed.grad[ignored[..., 0]].any()


# Every kind through the one entry

def test_hybrid_is_its_parts_with_either_pair_of_weights():
    student, teacher, labels = batch()
    hard, soft = (distill_loss(student, teacher, labels, kind) for kind in ("ce", "kl"))
    close(distill_loss(student, teacher, labels, alpha=.3), .3*hard + .7*soft)
    close(distill_loss(student, teacher, labels, alpha=.5, kd_weight=.5), .5*hard + .5*soft)
    close(distill_loss(student, teacher, labels, alpha=2., kd_weight=3.), 2*hard + 3*soft)
    close(distill_loss(student, teacher, labels, alpha=.3, divergence="reverse"), .3*hard + .7*distill_loss(student, teacher, labels, "reverse"))


def test_auto_is_kl_where_there_are_logits_and_cross_entropy_elsewhere():
    student, teacher, labels = batch()
    close(distill_loss(student, teacher, labels, "auto"), distill_loss(student, teacher, labels, "kl"))
    close(distill_loss(student, None, labels, "auto"), distill_loss(student, None, labels, "ce"))
    known = torch.zeros_like(labels, dtype=torch.bool)
    known[0] = True
    parts = [distill_loss(student[rows], teacher[rows], labels[rows], kind, num_items=count_tokens(labels))
             for rows, kind in ((slice(0, 1), "kl"), (slice(1, 3), "ce"))]
    close(distill_loss(student, teacher, labels, "auto", teacher_mask=known), sum(parts))


def test_without_the_shift_labels_stand_where_their_logits_do():
    student, teacher, labels = batch()
    close(distill_loss(student, teacher, labels, "ce", shift=False), F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=IGNORE))


def test_a_batch_in_which_nothing_counts_is_zero_with_zero_gradient():
    student, teacher, labels = batch()
    student.requires_grad_()
    for kind in KINDS:
        loss = distill_loss(student, teacher, labels.fill_(IGNORE), kind)
        loss.backward()
        assert loss == 0 and not student.grad.any()


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)], ids=["int", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_items_in_the_whole_batch_is_zero_and_keeps_the_graph(kind, num_items):
    "transformers divides 0 by 0 here and its trainer would carry the nan into the weights."
    student, teacher, labels = batch()
    loss = distill_loss(student.requires_grad_(), teacher, labels.fill_(IGNORE), kind, num_items=num_items)
    loss.backward()
    assert loss == 0 and not student.grad.any()
    hidden, weight, *rest, labels = layers()
    fused = fused_kd_loss(hidden, weight, *rest, labels.fill_(IGNORE), kind, num_items=num_items)
    fused.backward()
    assert fused == 0 and not hidden.grad.any() and not weight.grad.any()
    from transformers.loss.loss_utils import ForCausalLMLoss
    assert ForCausalLMLoss(student, torch.full((3, 7), IGNORE), 11, num_items_in_batch=torch.tensor(0)).isnan()


def test_half_precision_logits_are_widened_first():
    student, teacher, labels = batch(vocab=500)
    for kind in KINDS:
        value = distill_loss(student.bfloat16(), teacher.bfloat16(), labels, kind)
        assert value.dtype == torch.float32
        close(value, distill_loss(student.bfloat16().double(), teacher.bfloat16().double(), labels, kind), 1e-5)


def test_a_teacher_that_rules_words_out():
    student, teacher, labels = batch()
    teacher[..., 3] = -torch.inf
    student.requires_grad_()
    loss = distill_loss(student, teacher, labels, "kl")
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["kl", "reverse", "jsd", "skew", "hybrid", "auto"])
def test_words_that_both_models_rule_out_are_as_if_they_were_not_there(kind):
    "A masked vocabulary: value and gradient are those of the vocabulary without the masked words."
    student, teacher, labels = batch()
    labels[labels >= 9] = 0
    short = student[..., :9].clone().requires_grad_()
    value = distill_loss(short, teacher[..., :9], labels, kind)
    student[..., 9:] = teacher[..., 9:] = -torch.inf
    masked = distill_loss(student.requires_grad_(), teacher, labels, kind)
    close(masked, value)
    value.backward(); masked.backward()
    close(student.grad[..., :9], short.grad)
    assert not student.grad[..., 9:].any()


def test_what_only_one_model_rules_out():
    "KL(teacher || student) is infinite where the student rules out what the teacher says, its mirror image where the teacher does; mixtures are finite."
    free, ruled = torch.zeros(1, 2).double(), torch.tensor([[0., -torch.inf]]).double()
    assert kd_loss(ruled, free) == reverse_kl(free, ruled) == torch.inf
    close(kd_loss(free, ruled, temperature=1.), math.log(2))
    close(reverse_kl(ruled, free, temperature=1.), math.log(2))
    for student, teacher in ((free, ruled), (ruled, free)):
        close(jsd(student, teacher, temperature=1.), .5*math.log(1/.75) + .25*math.log(.5/.75) + .25*math.log(.5/.25))
        student = student.clone().requires_grad_()
        (jsd(student, teacher) + skew_kl(student, teacher)).backward()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("wrong, said", [
    (dict(kind="KL"), "none of"), (dict(temperature=0.), "temperature must be above 0"), (dict(temperature=-1.), "temperature must be above 0"),
    (dict(alpha=1.5), "alpha must be in"), (dict(kind="jsd", beta=2.), "beta must be in"), (dict(kind="skew", skew=1.), "skew must be in"),
    *((dict(kind=kind, teacher_mask=torch.ones(3, 7, dtype=torch.bool)), "would ignore it") for kind in KINDS if kind != "auto"),
    (dict(divergence="ce"), "divergence 'ce' is none of"), (dict(vocabulary_size=12), "vocabulary_size is 12 but there are 11")])
def test_settings_that_cannot_be_meant_are_refused(wrong, said):
    student, teacher, labels = batch()
    with pytest.raises(ValueError, match=said): distill_loss(student, teacher, labels, **wrong)


def test_unequal_vocabularies_and_missing_teachers_are_refused():
    student, teacher, labels = batch()
    with pytest.raises(ValueError, match="one tokenizer"): distill_loss(student, teacher[..., :9], labels)
    for kind in ("kl", "hybrid", "jsd"):
        with pytest.raises(ValueError, match="needs the teacher"): distill_loss(student, None, labels, kind)


# Fused with the output layer

def layers(seed=0, batch=2, seq=9, vocab=13, width=5, teacher_width=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    def normal(*shape): return torch.randn(*shape, generator=generator, dtype=dtype)
    labels = torch.randint(0, vocab-2, (batch, seq), generator=generator)
    labels[0, :3] = IGNORE
    return (normal(batch, seq, width).requires_grad_(), normal(vocab, width).requires_grad_(),
            normal(batch, seq, teacher_width), normal(vocab, teacher_width), labels)


def plain(hidden, weight, teacher_hidden, teacher_weight, labels, **settings):
    return distill_loss(hidden @ weight.T, teacher_hidden @ teacher_weight.T, labels, **settings)


@property_test
@given(st.sampled_from(KINDS), st.integers(1, 20), st.integers(0, 10**6), st.sampled_from([None, 11]), st.booleans(), st.sampled_from([None, 5]))
def test_fused_equals_plain(kind, chunk_size, seed, vocabulary_size, shift, num_items):
    settings = dict(kind=kind, vocabulary_size=vocabulary_size, shift=shift, num_items=num_items, temperature=1.7, alpha=.3)
    if kind == "auto": settings["teacher_mask"] = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)) < .5
    tensors = layers(seed)
    value, fused = plain(*tensors, **settings), fused_kd_loss(*tensors, chunk_size=chunk_size, **settings)
    close(fused, value)
    for a, b in zip(torch.autograd.grad(3*fused, tensors[:2]), torch.autograd.grad(3*value, tensors[:2])): close(a, b)


def test_fused_gradients_are_slopes():
    hidden, weight, *rest = layers()
    gradients = torch.autograd.grad(fused_kd_loss(hidden, weight, *rest, chunk_size=4), (hidden, weight))
    steps = [1e-5*torch.randn_like(x) for x in (hidden, weight)]
    up, down = (fused_kd_loss(hidden + sign*steps[0], weight + sign*steps[1], *rest, chunk_size=4).detach() for sign in (1, -1))
    close(sum((g*s).sum() for g, s in zip(gradients, steps))*1e5, (up - down)/2*1e5, 1e-6)


def test_fused_never_holds_more_than_a_chunk_of_logits(monkeypatch):
    seen, whole = [], L._loss_of_rows
    def spy(*settings):
        loss = whole(*settings)
        def watched(student, teacher, *rest): seen.append((len(student), len(teacher))); return loss(student, teacher, *rest)
        return watched
    monkeypatch.setattr(L, "_loss_of_rows", spy)
    fused_kd_loss(*layers(), chunk_size=4)
    assert seen == [(4, 4), (4, 4), (4, 4), (2, 2)]      # 6 and 8 tokens count


def test_fused_gives_gradients_only_where_they_are_wanted():
    hidden, weight, *rest = layers()
    fused_kd_loss(hidden, weight.detach(), *rest).backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad(): assert not fused_kd_loss(hidden, weight, *rest).requires_grad


def test_fused_adds_to_a_tied_weight_and_refuses_a_second_backward():
    hidden, weight, *rest = layers()
    tokens = torch.randint(0, 13, (2, 9))
    expected = torch.autograd.grad(plain(F.embedding(tokens, weight), weight, *rest), weight)[0]
    loss = fused_kd_loss(F.embedding(tokens, weight), weight, *rest, chunk_size=4)
    loss.backward(retain_graph=True)
    close(weight.grad, expected)
    with pytest.raises(RuntimeError, match="already differentiated"): loss.backward()


def test_fused_under_autocast_and_in_bfloat16_is_as_near_as_plain():
    exact = layers(vocab=200, width=32)
    reference = torch.autograd.grad(plain(*exact), exact[1])[0]
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        tensors = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in exact]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): losses = plain(*tensors), fused_kd_loss(*tensors, chunk_size=4)
        gradients = [torch.autograd.grad(loss, tensors[1])[0] for loss in losses]
        assert gradients[1].dtype == dtype and losses[1].dtype == torch.float32
        errors = [((g.double() - reference).norm() / reference.norm()).item() for g in gradients]
        assert errors[1] < 1.5*errors[0] + 1e-3 and abs(losses[1] - losses[0]) < .02*abs(losses[0])


@pytest.mark.parametrize("autocast", [False, True], ids=["weights in float16", "autocast"])
def test_fused_in_float16_keeps_gradients_that_float16_cannot_hold_before_the_scaler(autocast):
    "A token's share of the gradient of a large batch is below 6e-8; GradScaler's factor comes after the gradients are made."
    exact = layers(vocab=200, width=32)
    items, scale = 10**6, 2.**16
    expected = torch.autograd.grad(scale*plain(*exact, num_items=items), exact[:2])
    tensors = [x.detach().to(torch.float32 if autocast else torch.float16).requires_grad_() if x.is_floating_point() else x for x in exact]
    with torch.autocast("cpu", torch.float16, enabled=autocast): loss = fused_kd_loss(*tensors, num_items=items, chunk_size=4)
    (loss*scale).backward()
    for tensor, gradient in zip(tensors, expected):
        assert tensor.grad.dtype == tensor.dtype and ((tensor.grad.double() - gradient).norm() / gradient.norm()) < 2e-2


def test_fused_refuses_a_mask_that_its_kind_would_ignore():
    with pytest.raises(ValueError, match="would ignore it"): fused_kd_loss(*layers(), teacher_mask=torch.ones(2, 9, dtype=torch.bool))


# Beside the libraries

@pytest.fixture(scope="module")
def trl_loss():
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    return pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss


@pytest.mark.peer
@pytest.mark.parametrize("temperature", [1., 2., 5.])
@pytest.mark.parametrize("kind, beta", [("kl", 0), ("reverse", 1), ("jsd", .5), ("jsd", .1), ("jsd", .9)])
def test_trl_gives_the_same_without_the_factor(trl_loss, kind, beta, temperature):
    student, teacher, labels = batch()
    ours = distill_loss(student, teacher, labels, kind, temperature, beta=float(beta), shift=False)
    close(trl_loss(student, teacher, labels=labels, beta=beta, temperature=temperature) * temperature**2, ours, 1e-6)
    ours = distill_loss(student, teacher, labels, kind, temperature, beta=float(beta), shift=False, num_items=40)
    close(trl_loss(student, teacher, labels=labels, beta=beta, temperature=temperature, num_items_in_batch=40) * temperature**2, ours, 1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("skew", [.1, .5])
def test_trl_gives_the_same_skewed_kl_of_a_mixture(trl_loss, skew):
    "TRL has no skewed KL; its forward KL to the logits of the mixture is the same thing."
    student, teacher, labels = batch()
    mixture = (skew*F.softmax(teacher, -1) + (1-skew)*F.softmax(student, -1)).log()
    close(trl_loss(mixture, teacher, labels=labels, beta=0), distill_loss(student, teacher, labels, "skew", 1., skew=skew, shift=False))


@pytest.mark.peer
def test_hybrid_and_auto_from_the_libraries_parts(trl_loss):
    from transformers.loss.loss_utils import ForCausalLMLoss
    student, teacher, labels = (x.float() if x.is_floating_point() else x for x in batch())
    hard = ForCausalLMLoss(student, labels, student.shape[-1])
    soft = trl_loss(student[:, :-1], teacher[:, :-1], labels=labels[:, 1:], beta=0, temperature=2.) * 4
    close(distill_loss(student, teacher, labels, alpha=.3), .3*hard + .7*soft, 1e-5)
    close(distill_loss(student, teacher, labels, "auto"), soft, 1e-5)
    close(distill_loss(student, None, labels, "auto"), hard, 1e-5)


# Exercises

@pytest.mark.parametrize("check", [x for x in vars(L).values() if isinstance(x, Exercise)], ids=lambda x: x.name)
def test_checks_know_the_right_answer_the_usual_mistakes_and_no_answer(check):
    assert check(check.right).right
    assert not check(lambda *a: ...).tried and not check(lambda *a: None).tried
    for label, (mistake, advice) in check.wrong.items():
        outcome = check(mistake)
        assert not outcome.right and outcome.mistake == label and advice in outcome.message
