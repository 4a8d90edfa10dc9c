"Part 5: rounding, GPTQ, AWQ, files for runtimes, and the gate; each against a library or an oracle written out."
import copy, json, math, random, subprocess, sys
import numpy as np, pytest, torch
from conftest import ROOT, environment, wait_for
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from distillbook.adapt.forgetting import summarize
from distillbook.lab.models import load_model, load_tokenizer, train_tokenizer
from distillbook.ship.awq import IntLinear, Pair, awq_model, clipped, fold, int8_model, scale_pairs, shared_scale, smooth_model, whole_product
from distillbook.ship.gguf import WRITERS, check_architecture, importance_of, llamacpp_dequantize, llamacpp_quantize, read_quantized, tensor_type, write_quantized_gguf
from distillbook.ship.gptq import calibrated, decoder_layers, gptq, gptq_model, gptq_treatment, hollow_model, layer_by_layer, read_weights, text_rows, weight_files
from distillbook.ship.precision import compare_beliefs, inner_matrices, pack_bits, quantize, rounded_model, unpack_bits
from distillbook.ship.release import Bars, Candidate, choose, compress_model, pack_int32, ship_gate, stored, unpack_int32, write_compressed

TOKENIZER = train_tokenizer(["The quick brown fox jumps over the lazy dog, 12 times or 345. "*4], 320)

def qwen3(seed=0, **more):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(TOKENIZER), hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True)
    return loudly(Qwen3ForCausalLM(Qwen3Config(**(sizes | more)))).eval()

def loudly(network):
    "Weights large enough for layers to matter."
    for p in network.parameters():
        if p.ndim == 2: p.data.mul_(6)
    return network

def token_rows(count, length=32, vocabulary=None, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(vocabulary or len(TOKENIZER)) for _ in range(length)] for _ in range(count)]

# rounding

@given(st.integers(2, 8), st.sampled_from(["symmetric", "full", "affine"]), st.sampled_from([1, 4, 16, "channel", "tensor"]), st.integers(1, 5), st.integers(0, 2**31))
def test_each_weight_goes_to_the_nearest_mark(bits, kind, group, rows, seed):
    symmetric = kind != "affine"
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 16, generator=draw)*10**torch.randint(-6, 6, (1,), generator=draw).item()
    found = quantize(weight, bits, group, symmetric, kind == "full")
    gap = (found.dequantize() - weight).abs().reshape(found.codes.shape)
    edge = 1 if symmetric else 1.0 + 1e-3                     # an affine zero is rounded too, so the last mark may lie half a step off
    assert (gap <= found.scale*(0.5*edge + (0 if symmetric else 0.5)) + 1e-6*weight.abs().max()).all()
    low, high = dict(symmetric=(1 - 2**(bits - 1), 2**(bits - 1) - 1), full=(-2**(bits - 1), 2**(bits - 1) - 1), affine=(0, 2**bits - 1))[kind]
    assert low <= found.codes.min() and found.codes.max() <= high

@given(st.integers(2, 8), st.sampled_from([8, 16, 32]), st.integers(0, 2**31))
def test_all_marks_are_compressed_tensors_own(bits, size, seed):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
    args, groups = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=size), weight.view(6, -1, size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    ours = quantize(weight, bits, size, full=True)
    torch.testing.assert_close(ours.scale.squeeze(-1), scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.dequantize(), fake_quantize(weight, scale, zero, args), rtol=1e-5, atol=1e-6)

@given(st.integers(2, 8), st.integers(0, 70), st.integers(0, 2**31))
def test_packed_bits_come_back(bits, count, seed):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, bits)
    assert len(packed) == math.ceil(count*bits/8) and torch.equal(unpack_bits(packed, bits, count).long(), codes)

def test_more_bits_lose_less_and_smaller_groups_too():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    lost = lambda *given: (quantize(weight, *given).dequantize() - weight).square().sum().item()
    assert [lost(b, 32) for b in range(2, 9)] == sorted((lost(b, 32) for b in range(2, 9)), reverse=True)
    assert [lost(4, g) for g in (8, 16, 32, 64, "channel", "tensor")] == sorted(lost(4, g) for g in (8, 16, 32, 64, "channel", "tensor"))

def test_what_cannot_be_rounded_is_said():
    for given, what in (((torch.ones(2, 4), 1), "bits must be 2 to 8"), ((torch.ones(2, 4), 9), "bits must be"), ((torch.ones(2, 4), 4, 3), "do not fill"), ((torch.ones(2, 4), 4, "row"), "do not fill"), ((torch.tensor([[1., math.nan]]), 4), "not finite")):
        with pytest.raises(ValueError, match=what): quantize(*given)

def test_int8_is_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).half()
    codes, scales, _ = bnb.int8_vectorwise_quant(weight)
    ours = quantize(weight.float(), 8)
    differ = (ours.codes.view(weight.shape) != codes).nonzero().tolist()
    for i, j in differ: assert abs((weight.double()[i, j]/ours.scale.double()[i].item()).item() % 1 - 0.5) < 1e-3       # only at the middle between two marks
    assert len(differ) < 0.002*weight.numel()
    torch.testing.assert_close(ours.scale.flatten()*127, scales.float().flatten(), rtol=1e-4, atol=0)

def test_beliefs_of_a_model_compared_by_hand():
    first, second, rows = qwen3(0), qwen3(1), [[1, 2, 3, 4], [5, 6, 7]]
    found, kl, nats, changed = compare_beliefs(second, first, rows), 0., 0., 0
    for row in rows:
        with torch.no_grad(): p, q = (m(torch.tensor([row])).logits[0].double().log_softmax(-1) for m in (first, second))
        for k in range(len(row) - 1):
            kl += (p[k].exp()*(p[k] - q[k])).sum().item(); nats -= q[k, row[k + 1]].item(); changed += int(p[k].argmax() != q[k].argmax())
    assert found["tokens"] == 5 and found["kl"] == pytest.approx(kl/5, rel=1e-4) and found["nats"] == pytest.approx(nats/5, rel=1e-5) and found["changed"] == changed/5
    with pytest.raises(ValueError, match="no text"): compare_beliefs(first, first, [])

# GPTQ

def slow_gptq(weight, hessian, bits, group_size, damping=0.01):
    "Optimal brain quantization column by column with the inverse updated by its formula, in float64 (Frantar and Alistarh 2022)."
    w, H = weight.double().clone(), hessian.double().clone()
    H.diagonal().add_(damping*H.diagonal().mean())
    n, out = w.shape[1], torch.zeros_like(w)
    left = torch.linalg.inv(H)
    for j in range(n):
        if j % group_size == 0: scale = (w[:, j:j + group_size].abs().amax(1)/(2**(bits - 1) - 1)).clamp(min=1e-30)
        out[:, j] = (w[:, j]/scale).round().clamp(1 - 2**(bits - 1), 2**(bits - 1) - 1)*scale
        w[:, j:] -= torch.outer((w[:, j] - out[:, j])/left[0, 0], left[0])
        left = left[1:, 1:] - torch.outer(left[1:, 0], left[0, 1:])/left[0, 0]
    return out

@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_optimal_brain_quantization(bits):
    draw = torch.Generator().manual_seed(bits)
    x, weight = torch.randn(200, 32, generator=draw) @ torch.randn(32, 32, generator=draw), torch.randn(12, 32, generator=draw)
    ours, slow = gptq(weight, x.T @ x, bits, 8).dequantize(), slow_gptq(weight, x.T @ x, bits, 8)
    assert ((ours - slow).abs() < 1e-3).float().mean() > 0.98        # a weight in the middle between two marks may go either way in float32
    error = lambda w: ((w.double() - weight.double()) @ x.double().T).square().sum().item()
    assert error(ours) == pytest.approx(error(slow), rel=0.02) and error(ours) < error(quantize(weight, bits, 8).dequantize())

def test_gptq_takes_what_it_is_given():
    weight, hessian = torch.randn(4, 16), torch.eye(16)
    for options in (dict(), dict(group_size=4), dict(group_size=4, symmetric=False), dict(act_order=True), dict(group_size=4, act_order=True), dict(group_size=4, full=True)):
        size = options.get("group_size", "channel")
        assert torch.equal(gptq(weight, hessian, 4, **options).codes, quantize(weight, 4, size, options.get("symmetric", True), options.get("full", False)).codes), options
    assert torch.isfinite(gptq(weight, torch.zeros(16, 16), 4).dequantize()).all()       # no input ever came
    x = torch.randn(3, 16)
    assert torch.isfinite(gptq(weight, x.T @ x, 4).dequantize()).all()                   # fewer tokens than inputs
    with pytest.raises(ValueError, match="16 inputs"): gptq(weight, torch.eye(4), 4)
    with pytest.raises(ValueError, match="NaN"): gptq(weight, hessian*math.nan, 4)

def layer_error(weight, rounded, hessian): return (((rounded - weight) @ hessian)*(rounded - weight)).sum().item()

def gptq_never_loses(network, rows, group=32):
    "GPTQ's error on each matrix, with the inputs that it saw, against rounding's."
    worse = []
    def treat(layer, hessians, states, shared):
        for name, H in hessians.items():
            m = layer.get_submodule(name)
            careful, plain = gptq(m.weight.data, H, 4, group).dequantize(), quantize(m.weight.data, 4, group).dequantize()
            if layer_error(m.weight.data, careful, H) > layer_error(m.weight.data, plain, H): worse.append(name)
            m.weight.data.copy_(careful)
    calibrated(network, rows, treat, progress=False)
    return worse

def test_gptq_is_never_worse_than_rounding_on_the_teacher(shipped_models):
    assert gptq_never_loses(load_model("teacher"), token_rows(2, 128, 4096)) == []

@pytest.mark.parametrize("seed", range(5))
def test_gptq_and_the_order_of_widths_on_stories(realdata, seed):
    place = realdata/"models"/"stories260K"/"hf"
    words, whole = load_tokenizer(place), load_model(place)
    ids = words((realdata/"text"/"tinystories.txt").read_text(encoding="utf-8")[:60_000], add_special_tokens=False)["input_ids"]
    rows = [ids[128*k:128*(k + 1)] for k in range(8*seed, 8*seed + 8)]
    held_out = [ids[128*k:128*(k + 1)] for k in range(60, 84)]
    assert len(held_out[-1]) == 128
    assert gptq_never_loses(copy.deepcopy(whole), rows, "channel") == []
    kl = {}
    for bits in (8, 6, 5, 4, 3, 2):
        network = copy.deepcopy(whole)
        gptq_model(network, rows, bits, progress=False)
        kl[bits] = compare_beliefs(network, whole, held_out)
    assert [kl[b]["kl"] for b in kl] == sorted(kl[b]["kl"] for b in kl)
    assert kl[8]["nats"] < kl[4]["nats"] + 0.01 < kl[2]["nats"]

def test_layer_by_layer_is_the_model(shipped_models):
    "Nothing treated, nothing changed; and each matrix sees the inputs that the whole model gives it."
    network, rows, seen, direct = qwen3(), token_rows(3), {}, {}
    hooks = [m.register_forward_pre_hook(lambda module, args, name=name: direct.__setitem__(name, direct.get(name, 0) + args[0].flatten(0, 1).T @ args[0].flatten(0, 1))) for name, m in inner_matrices(network).items()]
    with torch.no_grad(): before = [network(torch.tensor([row])).logits for row in rows]
    for hook in hooks: hook.remove()
    names = {id(m): n for n, m in inner_matrices(network).items()}
    calibrated(network, rows, lambda layer, hessians, states, shared: seen.update({names[id(layer.get_submodule(n))]: H for n, H in hessians.items()}), progress=False)
    assert set(seen) == set(direct)
    for name in seen: torch.testing.assert_close(seen[name], direct[name], rtol=1e-4, atol=1e-4)
    with torch.no_grad(): assert all(torch.equal(network(torch.tensor([row])).logits, b) for row, b in zip(rows, before))
    with pytest.raises(ValueError, match="one length"): calibrated(network, [[1, 2], [1]], lambda *a: None)
    with pytest.raises(ValueError, match="neither"): decoder_layers(nn.Linear(2, 2))

def test_matrices_that_read_the_same_do_not_mix_with_others():
    "Inputs are shared by their identity: a layer whose matrices read different things keeps them apart."
    network, rows, seen = qwen3(5), token_rows(2), {}
    calibrated(network, rows, lambda layer, hessians, states, shared: seen.update({(id(layer), n): H for n, H in hessians.items()}), progress=False)
    for layer in network.model.layers:
        of = lambda name: seen[id(layer), name]
        assert torch.equal(of("self_attn.q_proj"), of("self_attn.v_proj")) and torch.equal(of("mlp.gate_proj"), of("mlp.up_proj"))
        assert not torch.equal(of("self_attn.q_proj"), of("mlp.up_proj")) and not torch.equal(of("self_attn.q_proj"), of("self_attn.o_proj"))

def test_rows_of_text():
    texts = [f"fox number {i}" for i in range(20)]
    rows = text_rows(texts, TOKENIZER, 3, 10, 1)
    assert [len(row) for row in rows] == [10]*3 and rows == text_rows(texts, TOKENIZER, 3, 10, 1) != text_rows(texts, TOKENIZER, 3, 10, 2)
    joined = [sum(rows, []), [i for k in random.Random(1).sample(range(20), 20) for i in [*TOKENIZER(texts[k], add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]]]
    assert joined[0] == joined[1][:30]
    with pytest.raises(ValueError, match="20 texts have"): text_rows(texts, TOKENIZER, 100, 100, 0)

def test_layers_that_see_different_parts_of_a_text_are_refused():
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    mixed = Qwen2ForCausalLM(Qwen2Config(**sizes, use_sliding_window=True, sliding_window=4, max_window_layers=1))
    assert len(set(mixed.config.layer_types)) == 2
    with pytest.raises(ValueError, match="different parts of a text"): calibrated(mixed, [[1, 2]], lambda *given: None, progress=False)

def saved(network, folder, **options):
    network.save_pretrained(folder, **options); TOKENIZER.save_pretrained(folder)
    return folder

def uneven(network):
    "Norms and biases that differ from each other, so that a wrong one is seen."
    for p in network.parameters():
        if p.ndim == 1: p.data.add_(0.3*torch.randn_like(p))
    return network

LARGER_THAN_MEMORY = {
    "Qwen3, tied, in one file": lambda: (uneven(qwen3()), {}),
    "Qwen3 in bfloat16, in parts": lambda: (uneven(qwen3(1)).to(torch.bfloat16), dict(max_shard_size="40KB")),
    "Llama with a head of its own, in parts": lambda: (uneven(loudly(LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)))), dict(max_shard_size="100KB")),
    "Qwen2 with biases": lambda: (uneven(loudly(Qwen2ForCausalLM(Qwen2Config(vocab_size=len(TOKENIZER), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1)))), {})}

@pytest.mark.parametrize("kind", LARGER_THAN_MEMORY)
def test_a_model_read_layer_by_layer_is_the_model(kind, tmp_path):
    network, options = LARGER_THAN_MEMORY[kind]()
    saved(network, tmp_path, **options)
    hollow, present = hollow_model(tmp_path)
    held = {k for k, w in hollow.state_dict().items() if w.device.type != "meta"}
    assert not any("layers." in k for k in held) and {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= held
    there, found, rows = [], {}, token_rows(3)
    for number, layer, states in layer_by_layer(hollow, rows, gptq_treatment(hollow, found, 4, group_size=32), present):
        there.append(sum(any(p.device.type != "meta" for p in one.parameters()) for one in hollow.model.layers))
    assert there == [1]*network.config.num_hidden_layers
    whole = gptq_model(load_model(tmp_path, "bfloat16" if "bfloat16" in kind else "float32"), rows, 4, progress=False, group_size=32)
    assert set(found) == set(whole) and all(torch.equal(found[n].codes, q.codes) and torch.equal(found[n].scale, q.scale) for n, q in whole.items())
    with torch.no_grad(): last = load_model(tmp_path).model(torch.tensor(rows[:1])).last_hidden_state
    hollow, present = hollow_model(tmp_path)
    for *_, states in layer_by_layer(hollow, rows, lambda *given: None, present): pass
    torch.testing.assert_close(hollow.model.norm.float()(states[0]), last, rtol=1e-3, atol=1e-3)         # nothing treated: what comes out is what the whole model makes

def test_hollow_models_refuse_what_they_cannot_read(tmp_path):
    saved(qwen3(), tmp_path/"model")
    held = weight_files(tmp_path/"model")
    with pytest.raises(ValueError, match="hold no model.nothing"): read_weights(dict(a="model.nothing"), held)
    (tmp_path/"adapter").mkdir(); (tmp_path/"adapter"/"adapter_config.json").write_text(json.dumps(dict(base_model_name_or_path=str(tmp_path/"model"))))
    with pytest.raises(ValueError, match="holds an adapter"): hollow_model(tmp_path/"adapter")
    (tmp_path/"pickle").mkdir(); (tmp_path/"pickle"/"config.json").write_text((tmp_path/"model"/"config.json").read_text()); (tmp_path/"pickle"/"pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle"): hollow_model(tmp_path/"pickle")
    with pytest.raises(FileNotFoundError, match="cannot be had"): hollow_model("nobody/nothing")
    found = {n: quantize(m.weight.data, 4, 32) for n, m in inner_matrices(qwen3()).items()}
    with pytest.raises(ValueError, match="quantized already"): hollow_model(write_compressed(qwen3(), found, TOKENIZER, tmp_path/"quantized"))
    untied = saved(qwen3(tie_word_embeddings=False), tmp_path/"untied")
    told = json.loads((untied/"config.json").read_text())
    (untied/"config.json").write_text(json.dumps(told | dict(tie_word_embeddings=True)))
    with pytest.raises(ValueError, match="holds two that differ"): hollow_model(untied)

def test_one_whole_file_goes_before_parts(tmp_path):
    "A folder with both is read as transformers reads it."
    saved(qwen3(0), tmp_path, max_shard_size="40KB"); saved(qwen3(1), tmp_path/"one")
    (tmp_path/"one"/"model.safetensors").rename(tmp_path/"model.safetensors")
    assert {p.name for p in weight_files(tmp_path).values()} == {"model.safetensors"}
    held, theirs = weight_files(tmp_path), load_model(tmp_path).state_dict()
    assert all(torch.equal(w, theirs[k]) for k, w in read_weights({k: k for k in held}, held).items())
    for f in tmp_path.glob("model*"): f.unlink()
    with pytest.raises(FileNotFoundError, match="has neither"): weight_files(tmp_path)

def test_a_head_that_is_not_the_table_is_written(tmp_path):
    "Whatever the configuration says."
    network = qwen3(tie_word_embeddings=False)
    network.config.tie_word_embeddings = True
    found = {n: quantize(m.weight.data, 4, 32) for n, m in inner_matrices(network).items()}
    written = tensors_of(write_compressed(network, found, TOKENIZER, tmp_path/"out"))
    assert torch.equal(written["lm_head.weight"], network.lm_head.weight.bfloat16()) and not torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])

# AWQ, SmoothQuant, whole numbers

@given(st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.integers(0, 2**31))
@settings(max_examples=15)
def test_scales_of_shared_heads_agree(heads, seed):
    attention, kv = heads
    pair = Pair(nn.Linear(8, kv*8), [nn.Linear(attention*8, 8)], attention//kv)
    scale = shared_scale(torch.rand(attention*8, generator=torch.Generator().manual_seed(seed)) + .1, pair, 8)
    assert scale.shape == (attention*8,)
    by_head = scale.view(kv, attention//kv, 8)
    assert torch.equal(by_head, by_head[:, :1].expand_as(by_head))

def test_folding_refuses_what_would_break_the_model():
    pair = Pair(nn.LayerNorm(4), [nn.Linear(4, 4)])
    for scale in (torch.zeros(4), -torch.ones(4), torch.full((4,), math.inf)):
        with pytest.raises(ValueError, match="above zero"): fold(pair, scale)
    with pytest.raises(ValueError, match="not known here"): scale_pairs(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)).transformer.h[0], 2, 2)

def test_smoothing_changes_nothing_and_flattens_inputs():
    network, rows = qwen3(3), token_rows(4)
    network.model.layers[0].input_layernorm.weight.data[5] = 60.
    smooth, largest = copy.deepcopy(network), {}
    smooth_model(smooth, rows, progress=False)
    for name, m in (("before", network), ("after", smooth)):
        hook = m.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args, name=name: largest.update({name: (args[0].abs().amax((0, 1)).max()/args[0].abs().amax((0, 1)).median()).item()}))
        with torch.no_grad(): largest[name, "logits"] = m(torch.tensor(rows[:1])).logits
        hook.remove()
    torch.testing.assert_close(largest["before", "logits"], largest["after", "logits"], rtol=1e-3, atol=1e-3)
    assert largest["after"] < 0.5*largest["before"]
    with pytest.raises(ValueError, match="power"): smooth_model(network, rows, power=2)

@given(st.integers(1, 40), st.sampled_from([3, 64, 1024, 1025, 3000]), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=25)
def test_products_of_whole_numbers_are_exact(rows, inputs, outputs, seed):
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-127, 128, (n, inputs), generator=draw, dtype=torch.int8) for n in (rows, outputs))
    if seed % 3 == 0: a, b = torch.full_like(a, 127), torch.full_like(b, -127)
    assert torch.equal(whole_product(a, b).long(), a.long() @ b.long().T)

def test_a_whole_number_layer_by_hand():
    layer = nn.Linear(32, 8)
    ints, x = IntLinear(layer), torch.randn(2, 5, 32)
    scale = x.abs().amax(-1, keepdim=True)/127
    wanted = (x/scale).round().double()*scale.double() @ quantize(layer.weight.data, 8).dequantize().double().T + layer.bias.double()
    torch.testing.assert_close(ints(x).double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(ints(torch.zeros(1, 32)), layer.bias[None])
    network = int8_model(qwen3())
    assert all(isinstance(m, IntLinear) for n, m in network.named_modules() if n.endswith("_proj")) and compare_beliefs(network, qwen3(), token_rows(2))["kl"] < 0.05

def test_cutting_never_makes_a_group_worse():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 64, generator=draw), torch.randn(8, 64, generator=draw)**3
    H, cut = x.T @ x, clipped(weight, x.T @ x, 3, 16)
    for g in range(0, 64, 16):
        block = slice(g, g + 16)
        for row in range(8):
            error = lambda w: layer_error(weight[row:row + 1, block], quantize(w[row:row + 1, block], 3).dequantize(), H[block, block])
            assert error(cut) <= error(weight)*(1 + 1e-5)

def test_awq_leaves_a_model_that_is_near(shipped_models):
    network, rows = qwen3(), token_rows(4)
    found = awq_model(network, rows, 4, 16, points=4, progress=False)
    assert set(found) == set(inner_matrices(network))
    plain = qwen3(); rounded_model(plain, lambda w: quantize(w, 4, 16))
    assert compare_beliefs(network, qwen3(), rows)["kl"] < 1.1*compare_beliefs(plain, qwen3(), rows)["kl"]

# files for llama.cpp

@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from(["normal", "zero", "one", "equal", "tiny", "huge"]), st.integers(0, 2**31))
@settings(max_examples=40)
def test_q8_0_is_the_packages_own(rows, blocks, kind, seed):
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(rows, 32*blocks, generator=torch.Generator().manual_seed(seed))
    weight = dict(normal=weight, zero=weight*0, one=torch.nn.functional.one_hot(torch.zeros(rows, dtype=torch.long), 32*blocks).float(), equal=weight*0 + .3, tiny=weight*1e-7, huge=weight*1e4)[kind]
    with np.errstate(all="ignore"): theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(WRITERS["Q8_0"](weight), theirs)

@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("shape", ["normal", "cubed", "shifted", "zero", "one", "equal", "positive"])
def test_blocks_are_read_alike_and_as_good_as_llamacpps(kind, shape):
    gguf = pytest.importorskip("gguf"); pytest.importorskip("xllamacpp")
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(16, 512, generator=draw)
    weight = dict(normal=x, cubed=x**3, shifted=x + 2, zero=x*0, one=(torch.arange(512) == 77).float().expand(16, -1)*3., equal=x*0 - .7, positive=x.abs())[shape].contiguous()
    matters = torch.rand(512, generator=draw)*3 + .01
    for importance in (None, matters):
        ours, theirs = WRITERS[kind](weight, importance), llamacpp_quantize(weight, kind, importance)
        read = torch.from_numpy(gguf.quants.dequantize(ours, gguf.GGMLQuantizationType[kind]))
        assert torch.equal(read, llamacpp_dequantize(ours, kind, 512)) and torch.isfinite(read).all()
        error = lambda packed: ((llamacpp_dequantize(packed, kind, 512) - weight).square()*(1. if importance is None else importance)).sum().sqrt().item()
        assert error(ours) <= 1.02*error(theirs) + 1e-3*weight.norm().item()*(shape in ("zero", "one", "equal"))

def test_rows_that_do_not_fill_a_block_are_refused_or_get_another_type():
    with pytest.raises(ValueError, match="blocks of 256"): WRITERS["Q4_K"](torch.ones(2, 128))
    assert tensor_type("model.layers.0.mlp.up_proj.weight", "Q4_K_M", 4, 96, True) == "Q8_0" and tensor_type("model.layers.0.mlp.up_proj.weight", "Q4_K_M", 4, 100, True) == "F16"
    assert tensor_type("model.embed_tokens.weight", "Q4_K_M", 4, 512, True) == "Q6_K" and tensor_type("model.embed_tokens.weight", "Q4_K_M", 4, 512, False) == "Q4_K"

def family(name):
    torch.manual_seed(1)
    sizes = dict(vocab_size=len(TOKENIZER), hidden_size=256, num_hidden_layers=2, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=TOKENIZER.eos_token_id, bos_token_id=TOKENIZER.bos_token_id)
    build = {"qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32, tie_word_embeddings=False)), "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)), "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
             "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), n_embd=256, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0))}
    network = loudly(build[name]()).eval()
    for p in network.parameters():
        if p.ndim == 1: p.data.add_(torch.randn_like(p)*.1)                 # biases and norms that matter
    return network

@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "gpt2"])
def test_the_runtime_believes_what_our_model_believes(name, tmp_path):
    "Each family in floats and quantized: the runtime's beliefs against those of the model with the file's numbers."
    pytest.importorskip("xllamacpp")
    from distillbook.synth.endpoints import llama_server
    from test_endpoints import server_logprobs
    network, row = family(name), token_rows(1, 24)[0]
    for kind in ("F32", "Q8_0", "Q4_K_M"):
        types = write_quantized_gguf(network, tmp_path/f"{kind}.gguf", kind, tokenizer=TOKENIZER)
        numbers = copy.deepcopy(network)
        bits = read_quantized(tmp_path/f"{kind}.gguf", numbers)
        assert set(types.values()) >= ({"F32"} if kind == "F32" else {"Q8_0"} if kind == "Q8_0" else {"Q4_K", "Q6_K"}) and bits > 4
        if kind == "F32": assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), numbers.state_dict().values()))
        with torch.no_grad(): ours = numbers(torch.tensor([row])).logits[0, -1].log_softmax(-1)
        with llama_server(tmp_path/f"{kind}.gguf", slots=1, context=64, threads=1, exact=True) as url: theirs = torch.tensor(server_logprobs(url, row, len(TOKENIZER)))
        kl = (ours.exp()*(ours - theirs)).sum().item()
        assert kl < (1e-6 if kind == "F32" else 0.05), f"{name} {kind}: {kl}"

def test_what_the_writer_does_not_know_is_refused(tmp_path):
    from transformers import OPTConfig
    plain = LlamaConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    for config, what in ((OPTConfig(), "opt cannot be written"), (LlamaConfig(attention_bias=True), "attention_bias"), (LlamaConfig(hidden_act="gelu"), "hidden_act"),
                         (LlamaConfig(rope_parameters=dict(rope_type="linear", factor=2., rope_theta=1e4)), "rope_type"), (GPT2Config(activation_function="relu"), "activation_function"), (Qwen2Config(use_sliding_window=True), "use_sliding_window")):
        with pytest.raises(ValueError, match=what): check_architecture(config)
    check_architecture(plain); check_architecture(GPT2Config())
    broken = qwen3(); broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"): write_quantized_gguf(broken, tmp_path/"x.gguf", "Q8_0", tokenizer=TOKENIZER)
    assert not list(tmp_path.iterdir())
    write_quantized_gguf(qwen3(), tmp_path/"small.gguf", "Q8_0", tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="holds no"): read_quantized(tmp_path/"small.gguf", qwen3(num_hidden_layers=3))

def test_importance_is_the_mean_square_of_inputs(shipped_models):
    network, rows, seen = qwen3(), token_rows(2), []
    found = importance_of(network, rows, progress=False)
    hook = network.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad(): [network(torch.tensor([row])) for row in rows]
    hook.remove()
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj"], torch.cat(seen).square().mean(0), rtol=1e-4, atol=1e-6)

# files for transformers and vLLM

@given(st.sampled_from([4, 8]), st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31))
def test_words_of_codes_come_back(bits, rows, inputs, seed):
    codes = torch.randint(-2**(bits - 1), 2**(bits - 1), (rows, inputs), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack_int32(pack_int32(codes, bits), bits, inputs).long(), codes)

@pytest.mark.parametrize("kind", ["W4A16", "W8A16", "W8A8"])
def test_transformers_reads_what_we_write(kind, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM
    network = qwen3(tie_word_embeddings=kind != "W8A16").to(torch.bfloat16).float()
    found = {n: quantize(m.weight.data, int(kind[1]), 32 if kind == "W4A16" else "channel") for n, m in inner_matrices(network).items()}
    folder = write_compressed(network, found, TOKENIZER, tmp_path/"model", whole_inputs=kind == "W8A8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for n, m in inner_matrices(network).items(): m.weight.data.copy_(stored(found[n]).dequantize())
    ours, rows = (int8_model(network) if kind == "W8A8" else network), token_rows(4)
    belief = compare_beliefs(theirs, ours, rows)
    assert belief["kl"] < (1e-3 if kind == "W8A8" else 1e-5), belief["kl"]

def test_what_the_format_has_no_words_for_is_refused(tmp_path):
    network = qwen3()
    of = lambda *given: {n: quantize(m.weight.data, *given) for n, m in inner_matrices(network).items()}
    name = next(iter(of(4, 32)))
    for found, options, what in ((of(3, 32), {}, "4 or 8 bits"), (of(4, 32, False), {}, "zero in the middle"), (of(4, 32), dict(whole_inputs=True), "8 bits go with"), (of(4, 32) | {name: of(8, 32)[name]}, {}, "same bits"), ({name: of(4, 32)[name]}, {}, "every matrix")):
        with pytest.raises(ValueError, match=what): write_compressed(network, found, TOKENIZER, tmp_path/"model", **options)
    assert not list(tmp_path.iterdir())
    for codes, bits in ((torch.tensor([[8]]), 4), (torch.tensor([[-9]]), 4), (torch.tensor([[1]]), 3)):
        with pytest.raises(ValueError): pack_int32(codes, bits)

def tensors_of(folder):
    held = weight_files(folder)
    return read_weights({name: name for name in held}, held)

@pytest.mark.parametrize("kind", LARGER_THAN_MEMORY)
@pytest.mark.parametrize("how", [dict(bits=4, group_size=32), dict(bits=4, group_size=32, act_order=True), dict(bits=8, group_size="channel", whole_inputs=True), dict(bits=4, group_size=32, method="awq", points=3)])
def test_a_file_made_layer_by_layer_is_the_same_file(kind, how, tmp_path):
    network, options = LARGER_THAN_MEMORY[kind]()
    saved(network, tmp_path/"model", **options)
    rows, whole = token_rows(3), load_model(tmp_path/"model", "bfloat16" if "bfloat16" in kind else "float32")
    given = {k: v for k, v in how.items() if k not in ("method", "whole_inputs", "bits")}
    found = awq_model(whole, rows, how["bits"], progress=False, **given) if how.get("method") == "awq" else gptq_model(whole, rows, how["bits"], progress=False, **given)
    first = write_compressed(whole, found, TOKENIZER, tmp_path/"first", whole_inputs=how.get("whole_inputs", False))
    second = compress_model(tmp_path/"model", tmp_path/"second", rows, progress=False, **how)
    one, two = tensors_of(first), tensors_of(second)
    assert set(one) == set(two) and all(torch.equal(two[k], w) and two[k].dtype == w.dtype for k, w in one.items())
    configs = [json.loads((folder/"config.json").read_text()) for folder in (first, second)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"] and configs[0]["architectures"] == configs[1]["architectures"]
    assert {p.name for p in second.glob("*.safetensors")} == {p.name for p in weight_files(second).values()} and {p.name for p in tmp_path.iterdir()} == {"model", "first", "second"}
    if how == dict(bits=4, group_size=32):
        pytest.importorskip("compressed_tensors")
        from transformers import AutoModelForCausalLM
        assert compare_beliefs(*(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (first, second)), token_rows(2))["kl"] == pytest.approx(0, abs=1e-7)

def test_a_file_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    saved(qwen3(), tmp_path/"model")
    rows = token_rows(2)
    for options, what in ((dict(method="rtn"), "method must be one of gptq, awq"), (dict(method="awq", group_size="channel"), "give group_size a number"), (dict(bits=3, group_size=32), "4 or 8 bits"), (dict(group_size=32, symmetric=False), "gptq knows damping, act_order, full here, not symmetric"), (dict(group_size=-1), "above 0 or 'channel'"), (dict(group_size=0), "above 0"), (dict(group_size="tensor"), "above 0"), (dict(group_size=48), "take a divisor"), (dict(bits=8, group_size=32, whole_inputs=True), "one scale a row"), (dict(group_size=32, rows=[[1], [1, 2]]), "one length")):
        with pytest.raises(ValueError, match=what): compress_model(tmp_path/"model", tmp_path/"out", **(dict(rows=rows, progress=False) | options))
    with pytest.raises(FileExistsError): compress_model(tmp_path/"model", tmp_path/"model", rows)
    assert not list(tmp_path.glob(".out*"))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=len(TOKENIZER)))
    with pytest.raises(ValueError, match="no linear matrices"): compress_model(saved(gpt2, tmp_path/"gpt2"), tmp_path/"out", rows)
    assert not (tmp_path/"out").exists()

def test_a_killed_run_goes_on_with_the_layer_it_was_at(tmp_path):
    place, rows = saved(qwen3(num_hidden_layers=6), tmp_path/"model"), token_rows(4)
    script = f"""
import time
from distillbook.ship import release
quick, known = release.METHODS["gptq"]
def slow(*given, **options):
    treat = quick(*given, **options)
    def waits(*given): time.sleep(.5); treat(*given)
    return waits
release.METHODS["gptq"] = slow, known
release.compress_model({str(place)!r}, {str(tmp_path/'out')!r}, {rows!r}, group_size=32, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script], env=environment(), cwd=ROOT)
    try: wait_for(lambda: list(tmp_path.glob(".out.*/layer-00002.safetensors")), "the third layer", 120)
    finally: process.kill(); process.wait()
    partial, = (p for p in tmp_path.glob(".out.*") if p.is_dir())
    kept = {f.name: f.stat().st_ino for f in partial.glob("layer-*.safetensors")}
    assert not (tmp_path/"out").exists() and 3 <= len(kept) < 6
    other = compress_model(place, tmp_path/"other", rows, group_size=32, progress=False)
    made = compress_model(place, tmp_path/"out", rows, group_size=32, progress=False)
    again = {f.name: f.stat().st_ino for f in made.glob("layer-*.safetensors")}
    assert len(again) == 6 and sum(again[name] == number for name, number in kept.items()) >= len(kept) - 1       # the last one may have been written and not yet noted
    one, two = tensors_of(other), tensors_of(made)
    assert set(one) == set(two) and all(torch.equal(two[k], w) for k, w in one.items()) and not list(tmp_path.glob(".out.*"))

def ends_at(number, monkeypatch):
    "A run that ends when so many layers were treated."
    from distillbook.ship import release
    quick, known = release.METHODS["gptq"]
    def breaks(*given, **options):
        treat, count = quick(*given, **options), [0]
        def until(*given):
            if count[0] == number: raise KeyboardInterrupt
            count[0] += 1; treat(*given)
        return until
    monkeypatch.setitem(release.METHODS, "gptq", (breaks, known))

@pytest.mark.parametrize("change", ["group_size", "rows", "options", "weights", "configuration"])
def test_another_model_or_other_settings_begin_anew(change, tmp_path, monkeypatch):
    place, given = saved(qwen3(num_hidden_layers=3), tmp_path/"model"), dict(rows=token_rows(2), group_size=32, progress=False)
    with monkeypatch.context() as m:
        ends_at(2, m)
        with pytest.raises(KeyboardInterrupt): compress_model(place, tmp_path/"out", **given)
    left = {p.name for p in tmp_path.glob(".out.*")}
    assert len(left) == 2                                        # the layers that are done, and the states
    given |= dict(group_size=dict(group_size=16), rows=dict(rows=token_rows(2, seed=1)), options=dict(act_order=True)).get(change, {})
    if change == "weights": saved(qwen3(7, num_hidden_layers=3), place)
    if change == "configuration": (place/"config.json").write_text(json.dumps(json.loads((place/"config.json").read_text()) | dict(rms_norm_eps=0.1)))
    again, anew = compress_model(place, tmp_path/"out", **given), compress_model(place, tmp_path/"anew", **given)
    one, two = tensors_of(again), tensors_of(anew)
    assert set(one) == set(two) and all(torch.equal(two[k], w) for k, w in one.items())
    assert left == {p.name for p in tmp_path.glob(".out.*")}     # what was made with other settings is still there

def test_an_end_at_any_moment_is_made_good(tmp_path, monkeypatch):
    "Before each layer, and at the very end, when all that is missing is the name."
    from pathlib import Path
    place, given = saved(qwen3(num_hidden_layers=3), tmp_path/"model"), dict(rows=token_rows(2), group_size=32, progress=False)
    for number in range(3):
        with monkeypatch.context() as m:
            ends_at(1 if number else 0, m)                       # each run gets one layer further
            with pytest.raises(KeyboardInterrupt): compress_model(place, tmp_path/"out", **given)
    with monkeypatch.context() as m:
        m.setattr(Path, "rename", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): compress_model(place, tmp_path/"out", **given)
    assert not (tmp_path/"out").exists()
    with monkeypatch.context() as m:
        ends_at(0, m)                                            # no layer is treated any more
        made = compress_model(place, tmp_path/"out", **given)
    one, two = tensors_of(made), tensors_of(compress_model(place, tmp_path/"anew", **given))
    assert set(one) == set(two) and all(torch.equal(two[k], w) for k, w in one.items()) and {p.name for p in tmp_path.iterdir()} == {"model", "out", "anew"}

def test_one_layer_is_in_memory_at_a_time(tmp_path):
    "Peak memory over what the process had before, of the same model whole and layer by layer; matrices are rounded, which takes less time than GPTQ."
    script = f"""
import json, sys, torch
from pathlib import Path
from transformers import Qwen3Config, Qwen3ForCausalLM
from distillbook.lab.models import load_model, load_tokenizer
from distillbook.ship import release
from distillbook.ship.gptq import calibrated
from distillbook.ship.precision import inner_matrices, quantize
def rounding(network, found, bits, group_size):
    names = {{id(m): n for n, m in inner_matrices(network).items()}}
    def treat(layer, *others): found.update({{names[id(m)]: quantize(m.weight.data, bits, group_size) for m in layer.modules() if id(m) in names}})
    return treat
release.METHODS["gptq"], place = (rounding, ()), Path({str(tmp_path/'model')!r})
torch.set_default_dtype(torch.bfloat16)
network = Qwen3ForCausalLM(Qwen3Config(vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=4, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True))
torch.set_default_dtype(torch.float32)
words = load_tokenizer("student")
network.save_pretrained(place); words.save_pretrained(place)
del network
rows = torch.randint(512, (2, 32)).tolist()
def status(key): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))/1024
def most(work):
    Path("/proc/self/clear_refs").write_text("5")          # the peak begins at what is there now
    before = status("VmRSS"); work(); return status("VmHWM") - before
def whole(folder):
    network, found = load_model(place, "bfloat16"), {{}}
    calibrated(network, rows, rounding(network, found, 4, 128), progress=False)
    release.write_compressed(network, found, words, folder)
found = {{name: [most(lambda: work(place.parent/f"{{name}}{{k}}")) for k in range(2)][1] for name, work in (("layers", lambda folder: release.compress_model(place, folder, rows, progress=False)), ("whole", whole))}}
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["layers"] < 0.5*found["whole"], found

# the gate and the choice

def report(lost, n=200): return summarize(("a", "b"), {"suite": ([1.]*n, [0.]*lost + [1.]*(n - lost))})
def sample(more): return dict(nats=3. + more, original_nats=3.)

def test_the_gate_says_each_reason():
    assert ship_gate([sample(.01)]*3, report(2), 5.).passed
    gate = ship_gate([sample(.2)]*3, report(60), 5., Bars(megabytes=4.))
    assert not gate.passed and len(gate.reasons) == 4 and "0.200 nats" in gate.reasons[0] and any("suite lost" in r for r in gate.reasons) and "4 are allowed" in gate.reasons[-1]
    assert "not finite" in " ".join(ship_gate([sample(math.nan)]*3, report(0), 1.).reasons)
    with pytest.raises(ValueError, match="one sample"): ship_gate([], report(0), 1.)

FILES = [Candidate("floats", "safetensors", 17., 0., 100.), Candidate("Q8", "gguf", 9., 1e-4, 280.), Candidate("Q4", "gguf", 5.6, .007, 260.), Candidate("W4A16", "compressed-tensors", 5., .009), Candidate("INT2", "compressed-tensors", 4., 2., passed=False)]

@pytest.mark.parametrize("wish, best", [(dict(), "floats"), (dict(prefer="size"), "Q4"), (dict(prefer="speed"), "Q8"), (dict(memory_mb=10.), "Q8"), (dict(memory_mb=6.), "Q4"), (dict(device="gpu", prefer="size"), "W4A16"), (dict(most_kl=.001, prefer="size"), "Q8")])
def test_the_choice(wish, best):
    found, why = choose(FILES, **wish)
    assert found.name == best and why.startswith(best)

def test_the_choice_says_when_nothing_fits():
    for wish, what in ((dict(memory_mb=1.), "nearest is Q4"), (dict(memory_mb=6., most_kl=1e-5), "nothing fits"), (dict(device="tpu"), "cpu or gpu"), (dict(prefer="beauty"), "prefer")):
        with pytest.raises(ValueError, match=what): choose(FILES, **wish)
    with pytest.raises(ValueError, match="runs on a cpu"): choose([FILES[3], FILES[4]])
