"Part 5: rounding, GPTQ, AWQ, files for runtimes, and the gate; each against a library or an oracle written out."
import copy, math, random
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from distillbook.adapt.forgetting import summarize
from distillbook.lab.models import load_model, load_tokenizer, train_tokenizer
from distillbook.ship.awq import IntLinear, Pair, awq_model, clipped, fold, int8_model, scale_pairs, shared_scale, smooth_model, whole_product
from distillbook.ship.gguf import WRITERS, check_architecture, importance_of, llamacpp_dequantize, llamacpp_quantize, read_quantized, tensor_type, write_quantized_gguf
from distillbook.ship.gptq import calibrated, decoder_layers, gptq, gptq_model
from distillbook.ship.precision import compare_beliefs, inner_matrices, pack_bits, quantize, rounded_model, unpack_bits
from distillbook.ship.release import Bars, Candidate, choose, pack_int32, ship_gate, stored, unpack_int32, write_compressed

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

@given(st.integers(2, 8), st.booleans(), st.sampled_from([1, 4, 16, "channel", "tensor"]), st.integers(1, 5), st.integers(0, 2**31))
def test_each_weight_goes_to_the_nearest_mark(bits, symmetric, group, rows, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 16, generator=draw)*10**torch.randint(-6, 6, (1,), generator=draw).item()
    found = quantize(weight, bits, group, symmetric)
    gap = (found.dequantize() - weight).abs().reshape(found.codes.shape)
    edge = 1 if symmetric else 1.0 + 1e-3                     # an affine zero is rounded too, so the last mark may lie half a step off
    assert (gap <= found.scale*(0.5*edge + (0 if symmetric else 0.5)) + 1e-6*weight.abs().max()).all()
    low, high = (1 - 2**(bits - 1), 2**(bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert low <= found.codes.min() and found.codes.max() <= high

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
    for options in (dict(), dict(group_size=4), dict(group_size=4, symmetric=False), dict(act_order=True), dict(group_size=4, act_order=True)):
        size = options.get("group_size", "channel")
        assert torch.equal(gptq(weight, hessian, 4, **options).codes, quantize(weight, 4, size, options.get("symmetric", True)).codes), options
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
