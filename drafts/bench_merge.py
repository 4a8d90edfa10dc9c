"""Merges from disk beside mergekit 0.1.5: the same models out, and what they cost. mergekit wants an environment of its own:

    python -m venv /somewhere && /somewhere/bin/pip install torch==2.13.0 mergekit==0.1.5
    python tests/bench/merge.py --mergekit /somewhere/bin [--small]

Writes its table to data/measured/merge.json, where chapter 44 reads it. Needs 8 GB of disk and ten minutes; --small checks equality alone.
"""
import argparse, json, os, platform, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from distillbook.lab.models import load_tokenizer
from distillbook.lab.settings import project_root
from distillbook.merge.disk import ShardWriter, open_model
from distillbook.merge.weights import drop
from distillbook.merge.methods import drop_by_rank

WEIGHTS = {"a": 1., "b": .6, "c": .3}
SHARED = {                            # method -> (needs a base, models, parameters)
    "linear": (False, "abc", dict(weight=WEIGHTS)), "slerp": (True, "a", dict(t=.3)), "karcher": (False, "abc", {}), "model_stock": (True, "abc", {}),
    "task_arithmetic": (True, "abc", dict(weight=WEIGHTS)), "ties": (True, "abc", dict(weight=WEIGHTS, density=.4)), "ties, lambda 0.7, not normalised": (True, "abc", dict(weight=WEIGHTS, density=.2, normalize=False) | {"lambda": .7}),
    "ties, weights of both signs": (True, "abc", dict(weight=dict(a=1., b=-.7, c=.4), density=.5)), "ties, gradient": (True, "abc", dict(weight=.5, density=[.2, .9, .4])),
    "breadcrumbs": (True, "abc", dict(weight=WEIGHTS, density=.7, gamma=.02)), "breadcrumbs_ties": (True, "abc", dict(weight=WEIGHTS, density=.7, gamma=.02)),
    "dare_linear, density 1": (True, "abc", dict(weight=WEIGHTS, density=1.)), "dare_ties, density 1": (True, "abc", dict(weight=WEIGHTS, density=1.)), "della, density 1": (True, "abc", dict(weight=WEIGHTS, density=1.)),
}

def configuration(name, folder, based, models, parameters):
    "mergekit's YAML for one of the merges; JSON is YAML."
    shared = {k: v for k, v in parameters.items() if not isinstance(v, dict)}
    entries = [dict(model=f"{folder}/{m}", parameters={k: v[m] for k, v in parameters.items() if isinstance(v, dict)}) for m in (["base", *models] if name.startswith("slerp") else models)]
    return json.dumps(dict(merge_method=name.split(",")[0], models=entries, parameters=shared, dtype="float32") | (dict(base_model=f"{folder}/base") if based else {}), indent=1)

def timed(command, **more):
    "Seconds and megabytes of a command."
    begun = time.perf_counter()
    with open(os.devnull, "w") as nothing: child = subprocess.Popen(command, stdout=nothing, stderr=subprocess.PIPE, text=True, **more)
    error = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status: raise RuntimeError(f"{command}: {error[-3000:]}")
    return dict(seconds=time.perf_counter() - begun, megabytes=usage.ru_maxrss/1024)

OURS = "import sys; from distillbook.merge.disk import *; merge_folders(read_merge_config(Path(sys.argv[1])), sys.argv[2], progress=False)"
COPY = """
import sys
from distillbook.merge.disk import *
from distillbook.merge.disk import _steps
files = [open_model(p) for p in sys.argv[2:]]
writer = ShardWriter(sys.argv[1], [(n, s.dtype, s.shape) for n, s in files[0].tensors.items()])
for n, s in files[0].tensors.items():
    writer.begin(n)
    for begin, end in _steps(s.shape, PIECE):
        for f in files[1:]: read_part(f.tensors[n], begin, end)
        writer.write(read_part(s, begin, end))
writer.finish()
"""

def largest_difference(ours, theirs):
    mine, other = ({n: t for p in Path(folder).glob("*.safetensors") for n, t in load_file(p).items()} for folder in (ours, theirs))
    other.pop("lm_head.weight", None) if "lm_head.weight" not in mine else None
    assert set(mine) == set(other), sorted(set(mine) ^ set(other))
    return max((mine[n].double() - other[n].double()).abs().max().item() for n in mine)

def equality(mergekit, work):
    "Largest difference of a weight for each shared method, over two sets of random models in float32."
    tokenizer, found = load_tokenizer("base"), {}
    for kind in ("qwen3, tied", "qwen2, apart"):
        folder = work/kind.split(",")[0]
        for k, name in enumerate(("base", "a", "b", "c")):
            torch.manual_seed(k)
            sizes = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings="tied" in kind)
            network = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)) if "qwen3" in kind else Qwen2ForCausalLM(Qwen2Config(**sizes))
            network.save_pretrained(folder/name, max_shard_size="300KB" if k == 2 else "5GB"); tokenizer.save_pretrained(folder/name)
        for name, (based, models, parameters) in SHARED.items():
            if name == "slerp": models = "a"
            (work/"c.yml").write_text(configuration(name, folder, based, models, parameters))
            for out in ("ours", "theirs"): shutil.rmtree(work/out, ignore_errors=True)
            timed([sys.executable, "-c", OURS, str(work/"c.yml"), str(work/"ours")])
            timed([str(mergekit/"mergekit-yaml"), str(work/"c.yml"), str(work/"theirs"), "--no-write-model-card"], env=os.environ | dict(PYTHONPATH=""))
            found[f"{name} ({kind})"] = largest_difference(work/"ours", work/"theirs")
            print(f"{name:35} {kind:14} {found[f'{name} ({kind})']:.1e}", flush=True)
    return found

DRAWS = """
import sys, torch
from safetensors.torch import load_file, save_file
from mergekit.sparsify import RescaleNorm, bernoulli, della_magprune
given, out = load_file(sys.argv[1])["x"], {}
for density in (0.2, 0.5, 0.8):
    torch.manual_seed(7); out[f"drop {density}"] = bernoulli(given, density, RescaleNorm.l1)
    torch.manual_seed(7); out[f"rank {density}"] = della_magprune(given, density, 0.15, RescaleNorm.l1)
save_file(out, sys.argv[2])
"""
def draws(mergekit, work):
    "Largest difference of random drops from the same random numbers."
    from safetensors.torch import save_file
    given = torch.randn(50, 70, generator=torch.Generator().manual_seed(1))
    save_file({"x": given}, work/"x.safetensors")
    timed([str(mergekit/"python"), "-c", DRAWS, str(work/"x.safetensors"), str(work/"y.safetensors")], env=os.environ | dict(PYTHONPATH=""))
    gap = 0.
    for name, theirs in load_file(work/"y.safetensors").items():
        kind, density = name.split()
        torch.manual_seed(7)
        ours = (drop if kind == "drop" else drop_by_rank)(given, float(density), torch.default_generator, rescale="realised")
        gap = max(gap, (ours - theirs).abs().max().item())
    return gap

def large_model(place, seed, hidden=896, layers=24, inner=4864, vocabulary=151_936):
    "A random Qwen2 of half a billion parameters, bfloat16, in shards; written without ever being in memory."
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True)
    with torch.device("meta"): shapes = {n: t.shape for n, t in Qwen2ForCausalLM(config).state_dict().items() if n != "lm_head.weight"}
    writer, draw = ShardWriter(place, [(n, torch.bfloat16, s) for n, s in shapes.items()], 300_000_000), torch.Generator().manual_seed(seed)
    for n, s in shapes.items():
        writer.begin(n)
        for size in torch.zeros(s.numel()).split(1 << 22): writer.write(torch.randn(len(size), generator=draw)*.02)
    writer.finish()
    config.architectures = ["Qwen2ForCausalLM"]; config.save_pretrained(place); load_tokenizer("base").save_pretrained(place)

def costs(mergekit, work, rounds=3):
    "Seconds and megabytes of linear and TIES on four models, ours, mergekit's, and reading and writing alone, in turn."
    places = [work/f"large{k}" for k in range(4)]
    for k, place in enumerate(places):
        if not place.exists(): large_model(place, k)
    rows = []
    for method in ("linear", "ties"):
        entries = [dict(model=str(p), parameters=dict(weight=.5) | (dict(density=.3) if method == "ties" else {})) for p in places[method == "ties":]]
        (work/f"{method}.yml").write_text(json.dumps(dict(merge_method=method, models=entries, dtype="bfloat16") | (dict(base_model=str(places[0])) if method == "ties" else {}), indent=1))
        for round in range(rounds if method == "linear" else 1 + rounds//2):
            for who, command in (("ours", [sys.executable, "-c", OURS, str(work/f"{method}.yml"), str(work/"out")]), ("copy", [sys.executable, "-c", COPY, str(work/"out"), *map(str, places)]),
                                 ("mergekit", [str(mergekit/"mergekit-yaml"), str(work/f"{method}.yml"), str(work/"out"), "--no-write-model-card"])):
                shutil.rmtree(work/"out", ignore_errors=True)
                rows.append(dict(method=method, who=who, round=round, **timed(command, env=os.environ | (dict(PYTHONPATH="") if who == "mergekit" else {}))))
                print(rows[-1], flush=True)
    return rows

def main():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--mergekit", type=Path, required=True); ask.add_argument("--small", action="store_true"); ask.add_argument("--work", type=Path)
    asked = ask.parse_args()
    work = asked.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    versions = json.loads(subprocess.run([str(asked.mergekit/"python"), "-c", "import json, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in ('mergekit', 'torch', 'transformers', 'safetensors')}))"], capture_output=True, text=True, check=True).stdout)
    found = dict(versions=versions, machine=f"{platform.machine()}, {os.cpu_count()} cores", differences=equality(asked.mergekit, work), difference_of_drops=draws(asked.mergekit, work))
    if not asked.small: found["costs"] = costs(asked.mergekit, work)
    out = project_root()/"data"/"measured"/"merge.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(out, "largest difference", max(found["differences"].values()), "of drops", found["difference_of_drops"])
    if not asked.work: shutil.rmtree(work)

if __name__ == "__main__": main()
