"Chapter 44: files in pieces, mergekit's configurations, and what a merge refuses."
import json, math, shutil, subprocess, sys, textwrap
import pytest, torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM
from distillbook.lab.models import load_model, load_tokenizer, train_tokenizer
from distillbook.merge.disk import Largest, ShardWriter, merge_folders, open_model, read_header, read_merge_config, read_part, setting
from distillbook.merge.methods import SUMS, TASK_VECTORS, merge_states

TOKENIZER = train_tokenizer(["The quick brown fox jumps over the lazy dog. "*4], 300)

def write(place, seed=0, dtype=torch.float32, tokenizer=TOKENIZER, shard="5GB", rows=None, **more):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=rows or len(tokenizer), hidden_size=32, num_hidden_layers=3, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True)
    network = Qwen3ForCausalLM(Qwen3Config(**(sizes | more))).to(dtype)
    network.save_pretrained(place, max_shard_size=shard); tokenizer.save_pretrained(place)
    return {n: w.detach().clone() for n, w in network.state_dict().items()}

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for k, name in enumerate(("base", "a", "b", "c")): write(folder/name, k, torch.bfloat16 if name == "b" else torch.float32, shard="20KB" if name == "c" else "5GB")
    return folder

def config(place, method, models, base=None, parameters=None, **more):
    entries = [dict(model=str(place/m)) if isinstance(m, str) else dict(m, model=str(place/m["model"])) for m in models]
    return read_merge_config(json.dumps(dict(merge_method=method, models=entries, parameters=parameters or {}) | (dict(base_model=str(place/base)) if base else {}) | more, indent=1))

def merged(place, tmp_path, *given, piece=1000, out="out", **more):
    done = merge_folders(config(place, *given, **more), tmp_path/out, piece=piece, progress=False)
    return load_model(tmp_path/out).state_dict(), done

def state(folder): return {n: w.float() for n, w in load_model(folder).state_dict().items()}

# files

@given(st.lists(st.tuples(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6), st.integers(1, 200))
def test_what_is_written_is_read(tmp_path_factory, tensors, shard_bytes):
    folder = tmp_path_factory.mktemp("w")
    given = {f"t{k}": (torch.randn(shape)*9).to(dtype) for k, (dtype, shape) in enumerate(tensors)}
    writer = ShardWriter(folder/"m", [(n, t.dtype, t.shape) for n, t in given.items()], shard_bytes)
    for n, t in given.items():
        writer.begin(n)
        for part in t.flatten().split(3): writer.write(part)
    writer.finish()
    found = {}
    for path in (folder/"m").glob("*.safetensors"):
        found |= load_file(path)
        for n, s in read_header(path).items(): assert torch.equal(read_part(s).view(s.shape), found[n])
    assert set(found) == set(given) and all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in given.items())

def test_a_writer_keeps_to_its_plan(tmp_path):
    writer = ShardWriter(tmp_path/"m", [("a", torch.float32, (4,)), ("b", torch.float32, (2,))])
    with pytest.raises(ValueError, match="out of turn"): writer.begin("b")
    writer = ShardWriter(tmp_path/"m", [("a", torch.float32, (4,)), ("b", torch.float32, (2,))])
    writer.begin("a"); writer.write(torch.ones(3))
    with pytest.raises(ValueError, match="lacks 4 bytes"): writer.begin("b")
    with pytest.raises(ValueError, match="only 4 are left"): writer.write(torch.ones(2))
    with pytest.raises(ValueError, match="not all tensors"): writer.finish()
    writer.abandon()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="twice"): ShardWriter(tmp_path/"m", [("a", torch.float32, (1,))]*2)

@pytest.mark.parametrize("cut", [0, 4, 8, 60, 300, -1])
def test_a_file_that_ends_early_is_refused(place, tmp_path, cut):
    whole = (place/"a"/"model.safetensors").read_bytes()
    (tmp_path/"x.safetensors").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="cut off|no whole|damaged"): read_header(tmp_path/"x.safetensors")

def test_models_that_are_not_there(place, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"): open_model(tmp_path)
    shutil.copytree(place/"c", tmp_path/"c"); victim = sorted((tmp_path/"c").glob("model-*"))[1]; victim.unlink()
    with pytest.raises(FileNotFoundError, match=victim.name): open_model(tmp_path/"c")
    (tmp_path/"d").mkdir(); shutil.copy(place/"a"/"config.json", tmp_path/"d")
    with pytest.raises(FileNotFoundError, match="no model.safetensors"): open_model(tmp_path/"d")

@given(st.integers(1, 300), st.integers(1, 50), st.integers(0, 300), st.booleans(), st.booleans())
def test_the_largest_in_pieces_are_the_largest(n, piece, k, ties, sampled):
    values = torch.randn(n)
    if ties: values = values.round()
    k = min(k, n)
    chosen = Largest(lambda: iter(values.split(piece)), k, n, values[torch.randint(n, (20,))] if sampled else None).start()
    kept = torch.cat([chosen.cut(p) for p in values.split(piece)])
    mask, border = kept != 0, values.abs().sort(descending=True).values[k - 1] if k else math.inf
    assert torch.equal(kept[mask], values[mask]) and mask.sum() == (values[mask] != 0).sum() and (mask.sum() == k or border == 0)
    assert (values.abs()[mask] >= border).all() and (values.abs()[~mask] <= border).all()
    equal = (values.abs() == border) & (values != 0)
    assert mask[equal].int().diff().max().item() <= 0 if equal.sum() > 1 else True      # of equal ones the first

# merges

@pytest.mark.parametrize("method", [*SUMS, *TASK_VECTORS])
def test_disk_and_memory_give_one_model(place, tmp_path, method):
    based, density = method in TASK_VECTORS or method in ("slerp", "model_stock"), 1. if "dare" in method or "della" in method else .3
    names = ["a"] if method == "slerp" else ["a", "b", "c"]
    parameters = (dict(t=.3) if method == "slerp" else {}) | (dict(weight=.7) if method in TASK_VECTORS or method in ("linear", "karcher") else {}) | (dict(density=density) if method in TASK_VECTORS and method != "task_arithmetic" else {})
    got, _ = merged(place, tmp_path, method, names, "base" if based else None, parameters)
    options = (dict(t=.3, opposite="linear") if method == "slerp" else {}) | (dict(weights=[.7]*3) if method in TASK_VECTORS else {}) | (dict(density=density) if method in TASK_VECTORS else {})
    whole = merge_states(method, [state(place/n) for n in names], state(place/"base") if based else None, **options)
    for n, w in whole.items(): assert (got[n] - w).abs().max() < 1e-6, n

@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties"])
def test_computing_in_float64_agrees_with_memory(place, tmp_path, method):
    names = ["a", "b", "c"]
    parameters = dict(density=.3, weight=.7)
    merge_folders(config(place, method, names, "base", parameters, out_dtype="float64"), tmp_path/"out", dtype="float64", piece=1000, progress=False)
    got = {n: t for path in (tmp_path/"out").glob("*.safetensors") for n, t in load_file(path).items()}
    whole = merge_states(method, [{n: w.double() for n, w in state(place/n).items()} for n in names], {n: w.double() for n, w in state(place/"base").items()}, density=.3, weights=[.7]*3)
    for n, w in got.items(): assert w.dtype == torch.float64 and (w - whole[n]).abs().max() < 1e-12, n

@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_drops_depend_on_the_seed_alone(place, tmp_path, method):
    parameters = dict(density=.5, weight=.5)
    first, _ = merged(place, tmp_path, method, ["a", "c"], "base", parameters, out="1")
    again, _ = merged(place, tmp_path, method, ["a", "c"], "base", parameters, out="2")
    merge_folders(config(place, method, ["a", "c"], "base", parameters), tmp_path/"3", seed=1, piece=1000, progress=False)
    other = load_model(tmp_path/"3").state_dict()
    assert all(torch.equal(first[n], again[n]) for n in first) and any(not torch.equal(first[n], other[n]) for n in first)
    base, a, c = (state(place/n) for n in ("base", "a", "c"))
    change = torch.cat([(first[n] - base[n]).flatten() for n in base]); full = torch.cat([(.5*(a[n] - base[n]) + .5*(c[n] - base[n])).flatten() for n in base])
    if method == "dare_linear": assert ((change - full) @ full/(full @ full)).abs() < .05

@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types_of_the_result(place, tmp_path, dtype):
    merge_folders(config(place, "linear", ["a", "b"], parameters=dict(weight=1), dtype=dtype), tmp_path/"out", progress=False)
    assert {s.dtype for s in open_model(tmp_path/"out").tensors.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path/"out"/"config.json").read_text())["dtype"] == dtype and load_model(tmp_path/"out").dtype

def test_shards_of_the_result_load_everywhere(place, tmp_path):
    merge_folders(config(place, "linear", ["a", "c"], parameters=dict(weight=1)), tmp_path/"out", shard_bytes=30_000, progress=False)
    assert len(list((tmp_path/"out").glob("*.safetensors"))) > 2
    network = Qwen3ForCausalLM.from_pretrained(tmp_path/"out")
    a, c = state(place/"a"), state(place/"c")
    assert all(torch.allclose(w, (a[n] + c[n])/2, atol=1e-6) for n, w in network.state_dict().items()) and load_tokenizer(tmp_path/"out").get_vocab() == TOKENIZER.get_vocab()

def test_tied_tables_are_one_table(place, tmp_path):
    got, _ = merged(place, tmp_path, "linear", ["a", "c"], None, dict(weight=1))
    assert "lm_head.weight" not in open_model(tmp_path/"out").tensors and load_model(tmp_path/"out").config.tie_word_embeddings
    doubled = load_file(place/"a"/"model.safetensors")
    shutil.copytree(place/"a", tmp_path/"twice"); save_file(doubled | {"lm_head.weight": doubled["model.embed_tokens.weight"].clone()}, tmp_path/"twice"/"model.safetensors")
    merge_folders(read_merge_config(json.dumps(dict(merge_method="linear", models=[dict(model=str(tmp_path/"twice")), dict(model=str(place/"c"))], parameters=dict(weight=1)), indent=1)), tmp_path/"one", progress=False)
    assert "lm_head.weight" not in open_model(tmp_path/"one").tensors

def test_a_tied_model_lends_its_table_to_an_untied_one(place, tmp_path):
    apart = write(tmp_path/"apart", 7, tie_word_embeddings=False)
    merge_folders(read_merge_config(json.dumps(dict(merge_method="linear", models=[dict(model=str(place/"a")), dict(model=str(tmp_path/"apart"))], parameters=dict(weight=1)), indent=1)), tmp_path/"out", progress=False)
    network, a = load_model(tmp_path/"out"), state(place/"a")
    assert not network.config.tie_word_embeddings
    assert torch.allclose(network.lm_head.weight, (a["model.embed_tokens.weight"] + apart["lm_head.weight"])/2, atol=1e-6) and torch.allclose(network.model.embed_tokens.weight, (a["model.embed_tokens.weight"] + apart["model.embed_tokens.weight"])/2, atol=1e-6)

def test_padded_tables(place, tmp_path):
    padded = write(tmp_path/"padded", 5, rows=320)
    entry = dict(merge_method="linear", models=[dict(model=str(place/"a")), dict(model=str(tmp_path/"padded"))], parameters=dict(weight=1))
    done = merge_folders(read_merge_config(json.dumps(entry, indent=1)), tmp_path/"out", progress=False)
    got, a = state(tmp_path/"out"), state(place/"a")
    assert got["model.embed_tokens.weight"].shape[0] == len(TOKENIZER) and f"[{len(TOKENIZER)}, 320] rows became {len(TOKENIZER)}" in str(done)
    assert torch.allclose(got["model.embed_tokens.weight"], (a["model.embed_tokens.weight"] + padded["model.embed_tokens.weight"][:len(TOKENIZER)])/2, atol=1e-6)
    entry["models"].reverse()
    merge_folders(read_merge_config(json.dumps(entry, indent=1)), tmp_path/"long", progress=False)
    long = state(tmp_path/"long")["model.embed_tokens.weight"]
    assert long.shape[0] == 320 and torch.allclose(long[len(TOKENIZER):], padded["model.embed_tokens.weight"][len(TOKENIZER):], atol=1e-6)

def test_other_vocabularies_are_matched_by_token_or_refused(place, tmp_path):
    words = train_tokenizer(["Another text with other words, so that the pieces differ. "*4], 300)
    theirs = write(tmp_path/"other", 6, tokenizer=words)
    entry = dict(merge_method="linear", models=[dict(model=str(place/"a")), dict(model=str(tmp_path/"other"))], parameters=dict(weight=1))
    with pytest.raises(ValueError, match="another vocabulary"): merge_folders(read_merge_config(json.dumps(entry, indent=1)), tmp_path/"out", progress=False)
    merge_folders(read_merge_config(json.dumps(entry | dict(tokenizer_source="base"), indent=1)), tmp_path/"out", progress=False)
    got, a = state(tmp_path/"out")["model.embed_tokens.weight"], state(place/"a")["model.embed_tokens.weight"]
    for token, row in TOKENIZER.get_vocab().items():
        mate = words.get_vocab().get(token)
        assert torch.allclose(got[row], (a[row] + (a[row] if mate is None else theirs["model.embed_tokens.weight"][mate]))/2, atol=1e-6), token

def test_gpt2_merges_too(tmp_path):
    states = {}
    for k in (0, 1):
        torch.manual_seed(k)
        network = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=2, n_positions=32)); network.save_pretrained(tmp_path/str(k)); states[k] = network.state_dict()
    merge_folders(read_merge_config(f"merge_method: slerp\nbase_model: {tmp_path}/0\nmodels:\n  - model: {tmp_path}/0\n  - model: {tmp_path}/1\nparameters: {{t: [0, 1]}}\n"), tmp_path/"out", progress=False)
    got = GPT2LMHeadModel.from_pretrained(tmp_path/"out").state_dict()
    assert torch.allclose(got["transformer.h.0.mlp.c_fc.weight"], states[0]["transformer.h.0.mlp.c_fc.weight"]) and torch.allclose(got["transformer.h.1.mlp.c_fc.weight"], states[1]["transformer.h.1.mlp.c_fc.weight"])

# configurations

def test_gradients_and_filters(place, tmp_path):
    models = [dict(model="a", parameters=dict(weight=[1, 0])), dict(model="c", parameters=dict(weight=[dict(filter="mlp", value=[0, 1]), dict(value=0.)]))]
    got, _ = merged(place, tmp_path, "linear", models, None, dict(normalize=False))
    a, c = state(place/"a"), state(place/"c")
    for layer, depth in enumerate((0, .5, 1)):
        for part in ("mlp.up_proj", "self_attn.q_proj"):
            n = f"model.layers.{layer}.{part}.weight"
            assert torch.allclose(got[n], (1 - depth)*a[n] + (depth*c[n] if "mlp" in part else 0), atol=1e-6), n
    assert torch.allclose(got["model.norm.weight"], a["model.norm.weight"])      # outside the layers depth is 0

@pytest.mark.parametrize("value, depth, wanted", [(3, .5, 3), ([1, 2, 5], .5, 2), ([1, 2, 5], .75, 3.5), ([4], 1, 4), ([], 0, None), ([dict(filter="q_proj", value=1)], 0, None), (dict(filter="mlp", value=2), 0, 2), ("1e-3", 0, 1e-3)])
def test_settings(value, depth, wanted): assert setting(value, "model.layers.0.mlp.up_proj.weight", depth) == wanted

def test_slices_put_layers_together(place, tmp_path):
    text = f"merge_method: linear\nslices:\n  - sources: [{{model: {place}/a, layer_range: [0, 2], parameters: {{weight: 1}}}}, {{model: {place}/c, layer_range: [1, 3], parameters: {{weight: 3}}}}]\n  - sources: [{{model: {place}/a, layer_range: [0, 3], parameters: {{weight: 1}}}}]\n"
    merge_folders(read_merge_config(text), tmp_path/"out", progress=False)
    network, a, c = load_model(tmp_path/"out"), state(place/"a"), state(place/"c")
    got = network.state_dict()
    assert network.config.num_hidden_layers == 5
    n = "model.layers.{}.mlp.up_proj.weight"
    assert torch.allclose(got[n.format(1)], .25*a[n.format(1)] + .75*c[n.format(2)], atol=1e-6) and torch.allclose(got[n.format(4)], a[n.format(2)])

@pytest.mark.parametrize("change, said", [
    (dict(merge_method="tys"), "none of"), (dict(paramters={}), "paramters .did you mean parameters"), (dict(parameters=dict(densty=1)), "parameters.densty .did you mean density"), (dict(base_model=None), "needs base_model"),
    (dict(models=[dict(model="a", weight=1)]), r"models\[0\].weight"), (dict(models=[]), "either models or slices"), (dict(dtype="float12"), "float12"), (dict(tokenizer_source="union"), "union"), (dict(models=["a"]), "name its model"),
    (dict(merge_method="linear", parameters=dict(density=.5)), "not for linear: parameters.density")])
def test_configurations_with_a_mistake(change, said):
    right = dict(merge_method="ties", base_model="x", models=[dict(model="a"), dict(model="b")], parameters=dict(density=.5))
    with pytest.raises(ValueError, match=said): read_merge_config(json.dumps({k: v for k, v in (right | change).items() if v is not None}, indent=1))

def test_texts_that_are_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="no YAML"): read_merge_config("a: [1\n")
    with pytest.raises(ValueError, match="mapping"): read_merge_config("- a\n- b\n")
    with pytest.raises(FileNotFoundError): read_merge_config(tmp_path/"none.yml")

# refusals

def spoil(folder, how):
    path = folder/"model.safetensors"
    tensors = load_file(path)
    if how == "nan": tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    if how == "infinite": tensors["model.norm.weight"][0] = float("inf")
    if how == "missing": tensors.pop("model.layers.2.mlp.up_proj.weight")
    if how == "extra": tensors["model.extra.weight"] = torch.ones(3)
    if how == "shape": tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 31)
    save_file(tensors, path)

@pytest.mark.parametrize("how, said", [("nan", "layers.1.mlp.up_proj.weight holds NaN"), ("infinite", "model.norm.weight holds NaN or infinite"), ("missing", "has no tensor model.layers.2.mlp.up_proj.weight"), ("extra", "model.extra.weight"), ("shape", "shape .48, 31.")])
def test_models_that_cannot_be_merged_leave_nothing(place, tmp_path, how, said):
    shutil.copytree(place/"a", tmp_path/"x"); spoil(tmp_path/"x", how)
    entry = dict(merge_method="linear", models=[dict(model=str(place/"c")), dict(model=str(tmp_path/"x"))], parameters=dict(weight=1))
    with pytest.raises(ValueError, match=said): merge_folders(read_merge_config(json.dumps(entry, indent=1)), tmp_path/"out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]

def test_other_shapes_and_weights_of_zero(place, tmp_path):
    write(tmp_path/"deep", 3, num_hidden_layers=4)
    entry = dict(merge_method="linear", models=[dict(model=str(place/"c")), dict(model=str(tmp_path/"deep"))], parameters=dict(weight=1))
    with pytest.raises(ValueError, match="num_hidden_layers is 3 and 4"): merge_folders(read_merge_config(json.dumps(entry, indent=1)), tmp_path/"out", progress=False)
    with pytest.raises(ValueError, match="sum to zero"): merged(place, tmp_path, "linear", [dict(model="a", parameters=dict(weight=1)), dict(model="c", parameters=dict(weight=-1))])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep"]
    (tmp_path/"out").mkdir()
    with pytest.raises(FileExistsError): merged(place, tmp_path, "linear", ["a", "c"], None, dict(weight=1))

def test_a_killed_merge_leaves_no_model(place, tmp_path):
    script = textwrap.dedent(f"""
        from distillbook.merge import disk
        import time
        kept = disk.ShardWriter.write
        def slow(self, part): kept(self, part); print("wrote", flush=True); time.sleep(.2)
        disk.ShardWriter.write = slow
        disk.merge_folders(disk.read_merge_config('merge_method: linear\\nmodels:\\n  - model: {place}/a\\n  - model: {place}/c\\nparameters: {{weight: 1}}\\n'), '{tmp_path}/out', progress=False)""")
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for _ in range(3): child.stdout.readline()
    child.kill(); child.wait()
    assert not (tmp_path/"out").exists()
    merge_folders(config(place, "linear", ["a", "c"], parameters=dict(weight=1)), tmp_path/"out", progress=False)      # and the next one is not in its way
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] and load_model(tmp_path/"out")

def test_the_command_merges_and_says_what_is_wrong_in_a_line(place, tmp_path):
    def call(text):
        (tmp_path/"c.yml").write_text(text)
        return subprocess.run([sys.executable, "-m", "distillbook", "merge", str(tmp_path/"c.yml"), str(tmp_path/"out")], capture_output=True, text=True)
    text = f"merge_method: linear\nmodels:\n  - {{model: {place}/a, parameters: {{weight: 1}}}}\n  - {{model: {place}/c, parameters: {{weight: 1}}}}\n"
    wrong = call(text.replace("weight: 1", "wieght: 1"))
    assert wrong.returncode == 2 and "did you mean weight?" in wrong.stderr and len(wrong.stderr.strip().splitlines()) == 1 and not (tmp_path/"out").exists()
    right = call(text)
    assert right.returncode == 0 and right.stdout.strip().splitlines()[-1] == str(tmp_path/"out") and load_model(tmp_path/"out")
    again = call(text)
    assert again.returncode == 2 and "is there already" in again.stderr
