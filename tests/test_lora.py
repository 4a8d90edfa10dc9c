"LoRA by hand: PEFT's twin to the last bit, its files, its refusals, and a kill in the middle."
import json, math, warnings
import pytest, torch
from torch import nn
from distillbook.adapt.lora import (ATTENTION, MLP, NF4, LoraLinear, insert_lora, load_adapter, lora_layers, merge_lora, nf4, quantize_nf4, save_adapter, train_lora)
from distillbook.distill.prompt_kd import Looks, add_lora
from distillbook.lab.corpora import chat_example, collate
from distillbook.lab.microworld import as_conversation, examples
from distillbook.lab.models import load_model, load_tokenizer, tiny_qwen3

warnings.filterwarnings("ignore", category=FutureWarning)
tokenizer = load_tokenizer("student")
ROWS = [chat_example(as_conversation(item), tokenizer) for item in examples("medical", 24, "train", 3)]
IDS = torch.tensor([ROWS[0]["input_ids"]])
def tiny(seed=0):
    torch.manual_seed(seed)
    return tiny_qwen3(tokenizer, hidden_size=32, layers=2, intermediate_size=32, heads=2, kv_heads=1, head_dim=16, context=256)
def trained(rank=4, alpha=8., **options):
    model = insert_lora(tiny(), rank, alpha, **options)
    with torch.no_grad():
        for layer in lora_layers(model).values(): layer.lora_B.normal_(0, .3)
    return model
def twin_of(hand):
    from peft import LoraConfig, get_peft_model
    s = hand.lora_settings
    twin = get_peft_model(tiny(), LoraConfig(r=s["rank"], lora_alpha=s["alpha"], target_modules=s["targets"], lora_dropout=s["dropout"], use_rslora=s["rank_stabilised"], task_type="CAUSAL_LM"))
    for name, layer in lora_layers(hand).items():
        other = twin.base_model.model.get_submodule(name)
        with torch.no_grad(): other.lora_A["default"].weight.copy_(layer.lora_A); other.lora_B["default"].weight.copy_(layer.lora_B)
    return twin


@pytest.mark.peer
@pytest.mark.parametrize("rank, alpha, targets, stabilised, dropout", [(1, 1., ATTENTION, False, 0.), (4, 16., ATTENTION + MLP, False, 0.), (8, 5., MLP, True, 0.), (4, 8., ("q_proj",), False, .3)])
def test_bits_are_those_of_peft(rank, alpha, targets, stabilised, dropout):
    hand = trained(rank, alpha, targets=targets, rank_stabilised=stabilised, dropout=dropout)
    twin, batch = twin_of(hand), collate(ROWS[:3])
    for model in (hand, twin):
        model.train(); torch.manual_seed(5)
        model.loss = model(**batch).loss
        model.loss.backward()
    assert torch.equal(hand.loss, twin.loss)
    for name, layer in lora_layers(hand).items():
        other = twin.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_A.grad, other.lora_A["default"].weight.grad) and torch.equal(layer.lora_B.grad, other.lora_B["default"].weight.grad), name

@pytest.mark.peer
def test_peft_begins_as_we_do():
    "A is drawn from the same distribution, B is zero."
    twin, hand = add_lora(tiny(), 8, 8, seed=1), insert_lora(tiny(), 8, 8, seed=1)
    for name, layer in lora_layers(hand).items():
        other = twin.base_model.model.get_submodule(name)
        assert (layer.lora_B == 0).all() and (other.lora_B["default"].weight == 0).all()
        assert math.isclose(layer.lora_A.std().item(), other.lora_A["default"].weight.std().item(), rel_tol=.25)

@pytest.mark.peer
@pytest.mark.parametrize("stabilised", [False, True])
def test_files_go_both_ways(stabilised, tmp_path):
    from peft import PeftModel
    hand = trained(rank_stabilised=stabilised).eval()
    tiny().save_pretrained(tmp_path/"base")
    save_adapter(hand, tmp_path/"ours", tmp_path/"base")
    theirs = PeftModel.from_pretrained(tiny().eval(), tmp_path/"ours").eval()
    with torch.no_grad(): assert torch.equal(theirs(IDS).logits, hand(IDS).logits)
    theirs.save_pretrained(tmp_path/"theirs")
    with torch.no_grad():
        assert torch.equal(load_adapter(tiny(), tmp_path/"theirs").eval()(IDS).logits, hand(IDS).logits)
        assert torch.allclose(load_model(tmp_path/"ours")(IDS).logits, hand(IDS).logits, atol=1e-4)

@pytest.mark.peer
@pytest.mark.parametrize("options, said", [(dict(use_dora=True), "use_dora"), (dict(bias="all"), "bias"), (dict(rank_pattern={"q_proj": 2}), "rank_pattern")])
def test_adapters_of_another_kind_are_refused_by_name(options, said, tmp_path):
    from peft import LoraConfig, get_peft_model
    get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said): load_adapter(tiny(), tmp_path)

def test_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(trained(), tmp_path, "base")
    small = tiny_qwen3(tokenizer, hidden_size=32, layers=1, intermediate_size=32, heads=2, kv_heads=1, head_dim=16, context=256)
    with pytest.raises(ValueError, match="model.layers.1"): load_adapter(small, tmp_path)
    wide = tiny_qwen3(tokenizer, hidden_size=64, layers=2, intermediate_size=32, heads=2, kv_heads=1, head_dim=16, context=256)
    with pytest.raises(ValueError, match="the model wants"): load_adapter(wide, tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config"): load_adapter(tiny(), tmp_path/"nothing")

def test_settings_are_written_last(tmp_path, monkeypatch):
    import distillbook.adapt.lora as module
    def full(*_): raise OSError("disk full")
    monkeypatch.setattr(module, "atomic_write", full)
    with pytest.raises(OSError): save_adapter(trained(), tmp_path/"a", "base")
    assert not (tmp_path/"a"/"adapter_config.json").exists()
    with pytest.raises(FileNotFoundError, match="not written to its end"): load_adapter(tiny(), tmp_path/"a")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merging_changes_no_answer(dtype, tolerance):
    model = trained().to(dtype).eval()
    with torch.no_grad():
        before = model(IDS).logits
        merged = merge_lora(model)
        # the change is added in float32, which is the limit in float64 as well
        assert torch.allclose(merged(IDS).logits, before, atol=max(tolerance, 1e-5))
    assert all(w.requires_grad for w in merged.parameters()) and not any(isinstance(m, LoraLinear) for m in merged.modules())

def test_two_adapters_one_after_the_other_add_their_changes():
    one, two = trained(), trained(2, 4., seed=9)
    changes = [{n: l.change().detach() for n, l in lora_layers(m).items()} for m in (one, two)]
    model = tiny()
    weights = {n: model.get_submodule(n).weight.clone() for n in changes[0]}
    merged = merge_lora(one)
    insert_lora(merged, 2, 4., seed=9)
    for name, layer in lora_layers(merged).items():
        with torch.no_grad(): layer.lora_B.copy_(lora_layers(two)[name].lora_B); layer.lora_A.copy_(lora_layers(two)[name].lora_A)
    merge_lora(merged)
    for name in weights: assert torch.allclose(merged.get_submodule(name).weight, weights[name] + changes[0][name] + changes[1][name], atol=1e-5)

@pytest.mark.parametrize("make, said", [
    (lambda: insert_lora(tiny(), 0), "rank must be 1 to"), (lambda: insert_lora(tiny(), 33), "rank must be 1 to"), (lambda: insert_lora(tiny(), targets=("query",)), "no linear layer is called 'query'.*q_proj"),
    (lambda: insert_lora(tiny(), targets=()), "targets is empty"), (lambda: insert_lora(trained()), "adapters already"), (lambda: insert_lora(tiny(), targets=("lm_head",)), "shares its matrix"),
    (lambda: insert_lora(tiny(), dropout=1.), "dropout"), (lambda: merge_lora(tiny()), "no adapters"), (lambda: train_lora(tiny(), ROWS, None, 1), "no adapters")])
def test_what_cannot_be_right_is_refused(make, said):
    with pytest.raises(ValueError, match=said): make()

def test_a_refused_insertion_changes_nothing():
    model = tiny()
    with pytest.raises(ValueError): insert_lora(model, 33)
    assert all(w.requires_grad for w in model.parameters()) and not any(isinstance(m, LoraLinear) for m in model.modules())

def test_only_adapters_are_trained_and_the_callers_draws_go_on():
    torch.manual_seed(3); expected = torch.rand(3)
    base = tiny(); torch.manual_seed(3); model = insert_lora(base, 4)
    assert torch.equal(torch.rand(3), expected)
    assert {n.rpartition(".")[2] for n, w in model.named_parameters() if w.requires_grad} == {"lora_A", "lora_B"}

def test_dropout_is_for_training_only():
    model = trained(dropout=.5)
    model.eval()
    with torch.no_grad(): assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    with torch.no_grad(): assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_killed_anywhere_it_ends_the_same_with_small_checkpoints(tmp_path):
    def go(folder, stop=None):
        def halt(_): raise KeyboardInterrupt
        model = insert_lora(tiny(), 4, 4)
        told = train_lora(model, ROWS, folder, 5, batch_size=4, learning_rate=1e-2, seed=1, save_steps=1, progress=False, callbacks=[Looks([stop], halt)] if stop else [])
        return {n: w.clone() for n, w in model.state_dict().items()}, told["resumed_from"]
    whole, _ = go(tmp_path/"whole")
    for stop in (1, 2, 4):
        with pytest.raises(KeyboardInterrupt): go(tmp_path/str(stop), stop)
        again, resumed_from = go(tmp_path/str(stop))
        assert resumed_from == stop - 1 and all(torch.equal(whole[n], again[n]) for n in whole), f"stopped after step {stop}"
    kept = tmp_path/"whole"/"checkpoint-5"
    assert [f.name for f in kept.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert (kept/"adapter_model.safetensors").stat().st_size < 4*sum(w.numel() for w in tiny().parameters())/4

def test_nf4_levels_zero_blocks_and_shapes():
    levels = torch.tensor(NF4)
    assert torch.equal(nf4(levels.repeat(4), 64), levels.repeat(4)), "a block of the levels themselves stays as it is"
    assert torch.equal(nf4(torch.zeros(2, 64)), torch.zeros(2, 64)) and nf4(torch.randn(3, 128).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no whole number"): nf4(torch.ones(65))

@pytest.mark.peer
def test_four_bit_layers_are_those_of_bitsandbytes_and_carry_adapters():
    bnb = pytest.importorskip("bitsandbytes")
    model = quantize_nf4(load_model("student"))
    plain = load_model("student")
    for name, layer in model.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit): continue
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        original = plain.get_submodule(name).weight
        assert torch.allclose(weight.reshape(original.shape), nf4(original), atol=1e-5), name
    insert_lora(model, 4, 4)
    told = train_lora(model, ROWS, None, 3, batch_size=4, learning_rate=1e-2, progress=False)
    assert all(math.isfinite(x) for x in told["loss"]) and told["loss"][-1] < told["loss"][0]
    with pytest.raises(ValueError, match="quantized"): merge_lora(model)
