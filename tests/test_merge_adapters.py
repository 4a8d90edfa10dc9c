"Adapters made into one, against PEFT and against their products; routing and the rule of chapter 42."
import json, shutil
import pytest, torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from distillbook.lab.models import load_tokenizer, tiny_qwen3
from distillbook.merge.adapters import Adapter, RequestRouter, merge_adapters, read_adapter, to_rank, write_adapter
from distillbook.merge.choose import advise

def base():
    torch.manual_seed(0)
    return tiny_qwen3(load_tokenizer("student"), hidden_size=32, layers=2, intermediate_size=48, heads=2, kv_heads=1)

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Three adapters for one small model: two plain ones of different rank, a rank-stabilised one on other layers."
    folder = tmp_path_factory.mktemp("adapters")
    for k, (name, more) in enumerate(dict(a=dict(r=4, lora_alpha=8), b=dict(r=6, lora_alpha=3), c=dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"])).items()):
        network = get_peft_model(base(), LoraConfig(**(dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") | more)))
        draw = torch.Generator().manual_seed(k)
        for n, w in network.named_parameters():
            if "lora_" in n: w.data.normal_(0, .1, generator=draw)
        network.save_pretrained(folder/name)
    return folder

def change(adapter, layer): return adapter.B[layer] @ adapter.A[layer] if layer in adapter.A else 0.

def changes_in_peft(network, name): return {n.removeprefix("base_model.model."): m.get_delta_weight(name) for n, m in network.named_modules() if hasattr(m, "get_delta_weight") and name in m.lora_A}

@pytest.mark.parametrize("name", "abc")
def test_an_adapter_is_read_as_peft_reads_it_and_written_so_that_peft_agrees(place, tmp_path, name):
    ours, theirs = read_adapter(place/name), changes_in_peft(PeftModel.from_pretrained(base(), place/name, adapter_name=name), name)
    assert set(ours.A) == set(theirs)
    for layer in theirs: torch.testing.assert_close(change(ours, layer), theirs[layer])
    again = changes_in_peft(PeftModel.from_pretrained(base(), write_adapter(ours, tmp_path/"new"), adapter_name="new"), "new")
    for layer in theirs: torch.testing.assert_close(again[layer], theirs[layer])

@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(-2, 2, allow_nan=False), st.booleans()), min_size=1, max_size=4), st.integers(0, 100))
def test_concatenation_is_the_sum_of_the_changes(parts, seed):
    draw = torch.Generator().manual_seed(seed)
    adapters, weights = [], []
    for k, (rank, weight, both) in enumerate(parts):
        layers = ["q", "v"] if both or not k else ["q"]
        adapters.append(Adapter({n: torch.randn(rank, 5, generator=draw) for n in layers}, {n: torch.randn(7, rank, generator=draw) for n in layers})); weights.append(weight)
    one = merge_adapters(adapters, weights)
    for layer in one.A: torch.testing.assert_close(change(one, layer).double(), sum(w*(change(a, layer).double() if layer in a.A else torch.zeros(7, 5, dtype=torch.float64)) for a, w in zip(adapters, weights)), atol=1e-4, rtol=1e-4)
    assert one.rank == sum(r for r, *_ in parts)

@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_smaller_rank_loses_the_small_singular_values_and_no_more(rank):
    wanted = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A, B = to_rank(wanted, rank)
    assert A.shape == (rank, 5) and B.shape == (9, rank)
    assert (B @ A - wanted).norm().item() == pytest.approx(torch.linalg.svdvals(wanted)[rank:].square().sum().sqrt().item(), abs=1e-9)

@pytest.mark.parametrize("kind, how, options", [("cat", "concatenate", {}), ("svd", "svd", {}), ("ties_svd", "ties", dict(density=.4)), ("dare_linear_svd", "dare_linear", dict(density=1.)), ("dare_ties_svd", "dare_ties", dict(density=1.))])
@pytest.mark.parametrize("weights", [[.7, .5], [1., -.4]])
def test_merges_equal_those_of_peft(place, kind, how, options, weights):
    network = PeftModel.from_pretrained(base(), place/"a", adapter_name="a")
    network.load_adapter(place/"b", adapter_name="b")
    rank = {} if kind == "cat" else dict(rank=6)
    network.add_weighted_adapter(["a", "b"], weights, "both", combination_type=kind, **options, **({} if kind == "cat" else dict(svd_rank=6)))
    ours = merge_adapters([read_adapter(place/n) for n in "ab"], weights, how, **rank, **options)
    for layer, theirs in changes_in_peft(network, "both").items(): torch.testing.assert_close(change(ours, layer), theirs, atol=1e-6, rtol=1e-4)

def test_factors_apart_are_pefts_linear_and_not_the_sum(place, tmp_path):
    shutil.copytree(place/"a", tmp_path/"second")
    tensors = read_adapter(tmp_path/"second")
    other = Adapter({n: a.flip(0) for n, a in tensors.A.items()}, {n: b + .01 for n, b in tensors.B.items()})
    write_adapter(other, tmp_path/"other")
    network = PeftModel.from_pretrained(base(), place/"a", adapter_name="a")
    network.load_adapter(tmp_path/"other", adapter_name="b")
    network.add_weighted_adapter(["a", "b"], [.7, .5], "both", combination_type="linear")
    first, second = read_adapter(place/"a"), read_adapter(tmp_path/"other")
    ours, exact = merge_adapters([first, second], [.7, .5], "factors"), merge_adapters([first, second], [.7, .5])
    found = changes_in_peft(network, "both")
    layer = next(iter(found))
    assert (change(ours, layer) - change(exact, layer)).abs().max() > 1e-3
    product = (.7**.5*first.B[layer] + .5**.5*second.B[layer]) @ (.7**.5*first.A[layer] + .5**.5*second.A[layer])
    torch.testing.assert_close(change(ours, layer), product)

@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_drops_depend_on_the_seed_alone(place, how):
    both = [read_adapter(place/n) for n in "ab"]
    make = lambda seed: merge_adapters(both, how=how, density=.5, seed=seed, rank=6)
    layer = next(iter(both[0].A))
    assert torch.equal(change(make(1), layer), change(make(1), layer)) and not torch.equal(change(make(1), layer), change(make(2), layer))

@pytest.mark.parametrize("call, said", [
    (lambda a: merge_adapters([]), "0 adapters"), (lambda a: merge_adapters([a], [1., 2.]), "1 adapters and 2 weights"), (lambda a: merge_adapters([a], how="median"), "concatenate, svd"),
    (lambda a: merge_adapters([a, Adapter(a.A, a.B, "elsewhere")]) if a.base else merge_adapters([Adapter(a.A, a.B, "here"), Adapter(a.A, a.B, "elsewhere")]), "different models"),
])
def test_adapters_that_cannot_be_merged(place, call, said):
    with pytest.raises(ValueError, match=said): call(read_adapter(place/"a"))

@pytest.mark.parametrize("change_of, said", [(dict(use_dora=True), "use_dora"), (dict(bias="all"), "bias all"), (dict(peft_type="IA3"), "IA3"), (dict(rank_pattern={"q": 2}), "rank_pattern")])
def test_adapters_that_are_more_than_two_matrices_are_refused(place, tmp_path, change_of, said):
    shutil.copytree(place/"a", tmp_path/"odd")
    path = tmp_path/"odd"/"adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change_of))
    with pytest.raises(ValueError, match=f"{said}.*is not plain LoRA"): read_adapter(tmp_path/"odd")

def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match="it is no adapter"): read_adapter(tmp_path)

def test_a_router_goes_by_name_by_words_or_to_nobody():
    known = {"law": ["who may appeal against the verdict", "which court hears the appeal"], "health": ["which dose of the drug", "what the doctor ordered for the fever"], "": ["write a poem", "add two numbers"]}
    router = RequestRouter(known)
    assert router("which dose of the drug") == "health" and router("the court hears the appeal") == "law"
    assert router("which dose of the drug", "law") == "law" and router("write a poem") == ""
    assert RequestRouter(known, least=1.)("which dose of the drug") == ""
    with pytest.raises(ValueError, match="there are law, health"): router("x", "lore")
    with pytest.raises(ValueError, match="two or more"): RequestRouter({"law": ["x"]})
    with pytest.raises(ValueError, match="no request to know 'health' by"): RequestRouter({"law": ["x"], "health": []})

@pytest.mark.parametrize("given, way", [
    (dict(data_at_hand=True), "retrain"), (dict(data_at_hand=True, tasks_a_month=3), "switch"), (dict(data_at_hand=False), "switch"), (dict(data_at_hand=False, slower=1.5, merge_share=.95), "merge"),
    (dict(data_at_hand=True, tasks_a_month=3, slower=1.5, merge_share=.5), "retrain"), (dict(data_at_hand=False, slower=1.5, merge_share=.5), "switch"), (dict(data_at_hand=False, may_route=False), "merge"), (dict(data_at_hand=False, may_route=False, merge_share=.2), "merge"),
])
def test_advice_follows_the_numbers(given, way):
    advice = advise(3, **given)
    assert advice.way == way and len(advice.why) > 20
def test_one_task_needs_no_advice():
    with pytest.raises(ValueError, match="nothing to put together"): advise(1, True)
