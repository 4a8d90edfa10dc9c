"Tasks in sequence: the table's numbers, the memory, importances, routes."
import copy, random
import pytest, torch
from hypothesis import given, settings, strategies as st
from distillbook.adapt.continual import (Reservoir, Router, add_importance, answer_with, average_score, backward_transfer, forgetting, forward_transfer, request_points)
from distillbook.distill.prompt_kd import add_lora
from distillbook.lab.microworld import examples
from distillbook.lab.models import load_model, load_tokenizer

HAND = [[20, 20, 20], [90, 30, 20], [60, 80, 25], [50, 70, 100]]

def test_numbers_of_a_table_by_hand():
    assert (average_score(HAND), backward_transfer(HAND), forward_transfer(HAND), forgetting(HAND)) == (220/3, -25, 7.5, 25)

def test_one_task_has_neither_past_nor_future():
    assert (average_score([[1], [5]]), backward_transfer([[1], [5]]), forward_transfer([[1], [5]]), forgetting([[1], [5]])) == (5, 0, 0, 0)

def test_forgetting_is_measured_from_the_best_and_transfer_from_the_turn():
    late_bloom = [[0, 0, 0], [5, 0, 0], [9, 5, 0], [3, 5, 5]]
    assert backward_transfer(late_bloom) == -1 and forgetting(late_bloom) == 3

@pytest.mark.parametrize("scores", [[[1, 2], [3, 4]], [[1, 2]], [], [1, 2], [[float("nan")], [1.]]])
@pytest.mark.parametrize("number", [average_score, backward_transfer, forward_transfer, forgetting])
def test_tables_of_another_shape_are_refused(scores, number):
    with pytest.raises(ValueError, match="tasks \\+ 1 rows|finite"): number(scores)

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 3))
def test_reservoir_never_grows_and_never_doubles(capacity, n, seed):
    kept = Reservoir(capacity, seed).add(range(n)).rows
    assert len(kept) == min(capacity, n) and len(set(kept)) == len(kept)

def test_reservoir_is_fair():
    "Each of 40 rows is kept with probability 1/4: chi-square of 2,000 reservoirs."
    from scipy.stats import chisquare
    counts = [0]*40
    for seed in range(2000):
        for row in Reservoir(10, seed).add(range(40)).rows: counts[row] += 1
    # kept rows of one reservoir are not independent, which makes the counts less spread than chi-square expects
    assert chisquare(counts).pvalue > .001 and max(counts) < 600 and min(counts) > 400

def test_importances_add_and_fade():
    a, b = dict(w=torch.tensor([1., 2.])), dict(w=torch.tensor([3., 0.]))
    assert add_importance(add_importance(None, a), b)["w"].tolist() == [4., 2.]
    assert add_importance(a, b, .5)["w"].tolist() == [3.5, 1.]
    for decay in (0., 1.5):
        with pytest.raises(ValueError, match="decay"): add_importance(a, b, decay)
    with pytest.raises(ValueError, match="different models"): add_importance(a, dict(v=b["w"]))

def test_a_new_task_moves_no_other_centre():
    router, points = Router(), torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    router.add("a", points[:10]); before = router.centres["a"].clone()
    router.add("b", points[10:20])
    assert torch.equal(router.centres["a"], before)
    with pytest.raises(ValueError, match="at least one request"): router.add("c", points[:0])
    with pytest.raises(ValueError, match="knows no task"): Router()(points)

def test_points_do_not_depend_on_the_batch():
    model, tokenizer = load_model("student"), load_tokenizer("student")
    asked = [item["messages"] for suite in ("medical", "persona", "rules") for item in examples(suite, 3, "test", 1)]
    one, many = (request_points(model, tokenizer, asked, size) for size in (1, 9))
    assert torch.allclose(one, many, atol=1e-4) and torch.allclose(one.norm(dim=-1), torch.ones(9), atol=1e-5)

def test_answers_come_back_in_order_and_the_adapter_stays():
    model = add_lora(load_model("student"), 2, 2)
    model.add_adapter("b", model.peft_config["default"]); model.set_adapter("b")
    def who(network, items): return [(network.active_adapter, item) for item in items]
    routes = ["default", "b", "default", "b"]
    assert answer_with(model, routes, [1, 2, 3, 4], who) == [("default", 1), ("b", 2), ("default", 3), ("b", 4)]
    assert model.active_adapter == "b"
    def fails(network, items): raise RuntimeError("in the middle")
    with pytest.raises(RuntimeError): answer_with(model, ["default"], [1], fails)
    assert model.active_adapter == "b", "also after an error"
    with pytest.raises(ValueError, match="2 items and 1 routes"): answer_with(model, ["b"], [1, 2], who)
