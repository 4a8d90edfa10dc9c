"Chapters 40 and 43: sums, arcs, task vectors, elections and drops, against float64, hand cases and PEFT."
import itertools, math
import pytest, torch
from hypothesis import given, settings, strategies as st
from peft.utils import merge_utils
from distillbook.merge.methods import SUMS, TASK_VECTORS, drop_by_rank, merge_report, merge_states, merge_tensors, model_stock
from distillbook.merge.weights import (Consensus, drop, inner_products, karcher, karcher_coefficients, linear, merge_deltas, slerp,
    slerp_coefficients, trim, weighted_sum)

def draws(n, *shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(n)]

# sums

@given(st.lists(st.floats(-2, 2), min_size=1, max_size=5), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), st.sampled_from([(3,), (2, 5), (1, 1, 4), (0,), ()]))
def test_a_sum_is_that_of_float64_to_the_type_of_the_result(coefficients, dtype, shape):
    tensors = draws(len(coefficients), *shape, dtype=dtype)
    exact = sum(c*t.double() for c, t in zip(coefficients, tensors))
    got = weighted_sum(tensors, coefficients)
    assert got.dtype == dtype and got.shape == torch.Size(shape)
    assert torch.allclose(got.double(), exact, atol={torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype])

def test_linear_takes_shares_or_weights_as_they_are():
    a, b = draws(2, 4)
    assert torch.allclose(linear([a, b], [1., 3.]), .25*a + .75*b) and torch.allclose(linear([a, b], [1., 3.], normalize=False), a + 3*b)
    with pytest.raises(ValueError, match="sum to zero"): linear([a, b], [1., -1.])
    with pytest.raises(ValueError, match="one for each, and one shape"): weighted_sum([a, b[:2]], [1., 1.])

# arcs

@given(st.floats(0, 1), st.integers(0, 50), st.integers(2, 30))
def test_slerp_is_the_arc_of_float64(t, seed, n):
    a, b = draws(2, n, seed=seed, dtype=torch.float64)
    angle = math.acos(max(-1., min(1., float(a @ b/(a.norm()*b.norm())))))
    if abs(math.cos(angle)) > .9995: return
    exact = (math.sin((1 - t)*angle)*a + math.sin(t*angle)*b)/math.sin(angle)
    assert torch.allclose(slerp(a, b, t), exact, atol=1e-10)
    assert torch.allclose(slerp(a.float(), b.float(), t).double(), exact, atol=1e-4)

def test_ends_of_the_arc_are_the_models_and_its_middle_keeps_the_length():
    a, b = draws(2, 50)
    assert torch.equal(slerp(a, b, 0.), a) and torch.allclose(slerp(a, b, 1.), b)
    a, b = a/a.norm(), b/b.norm()
    assert slerp(a, b, .3).norm() == pytest.approx(1, abs=1e-5) and linear([a, b]).norm() < .9

@pytest.mark.parametrize("other, line", [(lambda a: 2*a, True), (lambda a: a + 1e-4, True), (lambda a: torch.zeros_like(a), True), (lambda a: a.flip(0), False)])
def test_where_slerp_is_a_line(other, line):
    a = torch.arange(1., 9.)
    first, second, fell_back = slerp_coefficients(inner_products([a, other(a)]), .25)
    assert fell_back == line and (not line or (first, second) == (.75, .25))

def test_opposite_tensors_have_no_shortest_way():
    a, = draws(1, 9)
    with pytest.raises(ValueError, match="opposite directions"): slerp(a, -a)
    assert torch.allclose(slerp(a, -3*a, .25, opposite="linear"), .75*a - .75*a)
    with pytest.raises(ValueError, match="'raise' or 'linear'"): slerp(a, -a, opposite="never")

@given(st.integers(2, 6), st.integers(0, 30))
def test_at_the_karcher_mean_all_pulls_cancel(n, seed):
    tensors = draws(n, 40, seed=seed, dtype=torch.float64)
    mean = karcher(tensors)
    direction = mean/mean.norm()
    units = [t/t.norm() for t in tensors]
    pull = sum((u - (u @ direction)*direction)*(torch.acos(u @ direction)/torch.sin(torch.acos(u @ direction))) for u in units)
    assert pull.norm() < 1e-6 and mean.norm() == pytest.approx(sum(t.norm() for t in tensors).item()/n)

def test_karcher_special_cases():
    a, b = draws(2, 7)
    assert torch.allclose(karcher([a, a, a]), a, atol=1e-6) and torch.allclose(karcher([a/a.norm(), b/b.norm()]), slerp(a/a.norm(), b/b.norm()), atol=1e-5)
    assert torch.equal(karcher([torch.zeros(3)]*2), torch.zeros(3)) and torch.allclose(karcher([torch.zeros(7), a]), a/2, atol=1e-6)
    assert torch.isfinite(karcher([a, -a])).all()
    assert karcher_coefficients(inner_products([a, b]), [1., 0.]) == pytest.approx([1., 0.])

# trimming, elections

@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, .3))
def test_trimming_keeps_the_largest(n, density, outliers):
    change, = draws(1, n)
    got = trim(change, density, outliers)
    kept = int(density*n) if outliers or not density else max(1, int(density*n))
    if density == 1: kept = n
    assert (got != 0).sum() == kept and torch.equal(got[got != 0], change[got != 0])
    order = change.abs().sort(descending=True).values
    top = min(int(outliers*n), n - kept) if density < 1 else 0
    assert torch.equal(got.abs()[got != 0].sort(descending=True).values, order[top:top + kept])

@pytest.mark.parametrize("values, options, wanted", [
    ([1., 2., -4.], {}, -4.), ([1., 2., -4.], dict(elect="count"), 1.5), ([1., 2., -4.], dict(elect="none", divide="none"), -1.), ([1., 2., -4.], dict(elect="none"), -1/3),
    ([2., -2.], {}, 2.), ([0., 0.], {}, 0.), ([0., -3.], {}, -3.), ([1., 1.], dict(divide="none"), 2.)])
def test_elections_by_hand(values, options, wanted):
    assert merge_deltas([torch.tensor([v]) for v in values], **options).item() == pytest.approx(wanted)

def test_a_negative_weight_turns_a_change_around():
    up, down = torch.tensor([3.]), torch.tensor([-1.])
    assert merge_deltas([up, down], [-1., 1.]).item() == pytest.approx(-4.)      # -3 and -1 agree; weights -1 + 1 = 0 divide by one
    assert merge_deltas([up, down], [-1., 1.], weighted=False).item() == pytest.approx(3.)              # the vote is 3 - 1: up wins; -3 divided by its weight of -1

@given(st.integers(0, 40), st.integers(1, 6), st.sampled_from(["sum", "count"]), st.booleans(), st.sampled_from(["weights", "models", "none"]))
def test_running_sums_are_the_election_over_all(seed, n, elect, weighted, divide):
    deltas, weights = draws(n, 30, seed=seed, dtype=torch.float64), torch.linspace(-.5, 2, n).tolist()
    stack, w = torch.stack(deltas), torch.tensor(weights, dtype=torch.float64)[:, None]
    votes = stack*w if weighted else stack
    total = votes.sum(0) if elect == "sum" else votes.sign().sum(0)
    agree = votes.sign() == torch.where(total >= 0, 1., -1.)
    merged = (stack*w*agree).sum(0)
    divisor = dict(weights=(w*agree).sum(0), models=agree.sum(0).double(), none=torch.ones(30).double())[divide]
    assert torch.allclose(merge_deltas(deltas, weights, elect=elect, weighted=weighted, divide=divide), merged/torch.where(divisor == 0, 1., divisor), atol=1e-9)

@pytest.mark.parametrize("density", [0.1, 0.5, 1.])
@pytest.mark.parametrize("elect", ["sum", "count"])
def test_ties_of_peft(density, elect):
    deltas, weights = draws(4, 20, 30), [1., .5, 2., -.3]
    theirs = merge_utils.ties(deltas, torch.tensor(weights), density, dict(sum="total", count="frequency")[elect])
    assert (merge_deltas([trim(d, density) for d in deltas], weights, elect=elect, weighted=False, divide="models") - theirs).abs().max() < 1e-6

@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_of_peft(density):
    deltas, weights = draws(3, 20, 30), [1., .5, -.3]
    torch.manual_seed(3)
    theirs = merge_utils.dare_linear(deltas, torch.tensor(weights), density)
    torch.manual_seed(3)
    ours = merge_deltas([drop(d, density, torch.default_generator) for d in deltas], weights, elect="none", divide="none")
    assert (ours - theirs).abs().max() < 1e-6
    torch.manual_seed(3)
    theirs = merge_utils.dare_ties(deltas, torch.tensor(weights), density)
    torch.manual_seed(3)
    ours = merge_deltas([drop(d, density, torch.default_generator) for d in deltas], weights, weighted=False, divide="models")
    assert (ours - theirs).abs().max() < 1e-6

# drops

def test_the_mean_of_drops_is_the_change():
    change, = draws(1, 500)
    for density in (0.1, 0.5):
        drawn = torch.stack([drop(change, density, torch.Generator().manual_seed(s)) for s in range(400)])
        error = (drawn.mean(0) - change)/(drawn.std(0)/20).clamp(min=1e-9)
        assert error.abs().mean() < 1 and error.square().mean() < 1.3
    ranked = torch.stack([drop_by_rank(change.view(5, 100), 0.4, torch.Generator().manual_seed(s)) for s in range(400)])
    error = (ranked.mean(0) - change.view(5, 100))/(ranked.std(0)/20).clamp(min=1e-9)
    assert error.square().mean() < 1.3

def test_the_realised_ratio_is_not_the_mean():
    change = torch.cat([torch.full((95,), .1), torch.full((5,), 10.)])
    drawn = torch.stack([drop(change, 0.1, torch.Generator().manual_seed(s), "realised") for s in range(400)])
    assert (drawn.abs().sum(1) - change.abs().sum())[drawn.abs().sum(1) > 0].abs().max() < 1e-3
    assert abs(drawn.mean(0)[:95].mean() - .1) > .05                     # the small ones come out several times too large

@pytest.mark.parametrize("call, said", [(lambda d, g: drop(d, 1.5, g), "density"), (lambda d, g: drop(d, .5, g, "twice"), "rescale"), (lambda d, g: drop_by_rank(d, .1, g), "epsilon"), (lambda d, g: trim(d, -1), "density")])
def test_drops_that_cannot_be(call, said):
    with pytest.raises(ValueError, match=said): call(torch.ones(4), torch.Generator())

@pytest.mark.parametrize("density", [0., 1.])
def test_all_or_nothing(density):
    change, g = draws(1, 4, 5)[0], torch.Generator().manual_seed(0)
    for got in (drop(change, density, g), drop_by_rank(change, density, g), trim(change, density)): assert torch.equal(got, change*density)

# whole tensors by name

@pytest.mark.parametrize("method", [*SUMS, *TASK_VECTORS])
def test_copies_of_one_model_merge_to_it(method):
    start, = draws(1, 6, 8, seed=1)
    tuned = start + .1*draws(1, 6, 8, seed=2)[0]
    options = dict(weights=[1/3]*3) if method in ("task_arithmetic", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della_linear") else {}
    merged = merge_tensors(method, [tuned]*(1 if method == "slerp" else 3), start, **options, **(dict(t=1.) if method == "slerp" else {}))
    assert torch.allclose(merged, tuned, atol=1e-6)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", [*SUMS, *TASK_VECTORS])
def test_types_are_kept_and_summed_in_float32(method, dtype):
    start, *others = draws(4, 6, 8, dtype=dtype)
    used = others[:1] if method == "slerp" else others
    options = dict(density=.5) if method in TASK_VECTORS else {}
    got = merge_tensors(method, used, start, **options)
    exact = merge_tensors(method, [o.double() for o in used], start.double(), **options)
    assert got.dtype == dtype
    if "dare" not in method and "della" not in method: assert torch.allclose(got.double(), exact, atol=1e-9 if dtype == torch.float64 else .05)

def test_model_stock_by_hand():
    base, a, b = torch.zeros(2), torch.tensor([1., 0.]), torch.tensor([math.cos(1.), math.sin(1.)])
    share = 2*math.cos(1.)/(1 + math.cos(1.))
    assert torch.allclose(model_stock([a, b], base), share*(a + b)/2)
    with pytest.raises(ValueError, match="two models or more"): model_stock([a], base)
    assert torch.isfinite(model_stock([a, -a], base)).all()

@pytest.mark.parametrize("call, said", [(lambda a, b: merge_tensors("ties", [a]), "needs a base"), (lambda a, b: merge_tensors("mean", [a], b), "none of"), (lambda a, b: merge_tensors("slerp", [a, b], b), "3 were given"),
    (lambda a, b: merge_states("linear", [{"x": a}, {"y": b}]), "different tensors")])
def test_merges_that_cannot_be(call, said):
    with pytest.raises(ValueError, match=said): call(*draws(2, 3))

def test_the_report_tells_who_quarrels():
    base = {"calm": torch.zeros(4), "torn": torch.zeros(4)}
    a, b = {"calm": torch.ones(4), "torn": torch.ones(4)}, {"calm": 2*torch.ones(4), "torn": -torch.ones(4)}
    calm, torn = merge_report([a, b], base)
    assert (calm["lowest_cosine"], calm["both_ways"], calm["slerp_is_a_line"]) == (pytest.approx(1), 0, True) and (torn["lowest_cosine"], torn["both_ways"]) == (pytest.approx(-1), 1)
