"""Merges from disk beside mergekit 0.1.5: the same models out, and what they cost. mergekit wants an environment of its own:

    python -m venv /somewhere && /somewhere/bin/pip install torch==2.13.0 mergekit==0.1.5
    python tests/bench/merge.py --mergekit /somewhere/bin [--small]

Writes its table to data/measured/merge.json, where chapter 44 reads it. Needs 8 GB of disk and twenty minutes; --small checks equality alone and writes nothing.
With DISTILLBOOK_REALDATA a published model and three tuned from it are among the merged ones.
"""
import argparse, json, os, platform, shutil, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from distillbook.lab.corpora import collate, pack
from distillbook.lab.models import load_model, load_tokenizer
from distillbook.lab.settings import project_root
from distillbook.lab.training import train
from distillbook.merge.disk import ShardWriter, merge_folders, read_merge_config, setting
from distillbook.merge.weights import drop, karcher, train_expert
from distillbook.merge.methods import drop_by_rank

WEIGHTS = {"a": 1., "b": .6, "c": .3}
SHARED = {                            # method -> (needs a base, models, parameters)
    "linear": (False, "abc", dict(weight=WEIGHTS)), "slerp": (True, "a", dict(t=.3)), "karcher": (False, "abc", {}), "karcher, in float64": (False, "abc", {}), "model_stock": (True, "abc", {}),
    "task_arithmetic": (True, "abc", dict(weight=WEIGHTS)), "ties": (True, "abc", dict(weight=WEIGHTS, density=.4)), "ties, lambda 0.7, not normalised": (True, "abc", dict(weight=WEIGHTS, density=.2, normalize=False) | {"lambda": .7}),
    "ties, weights of both signs": (True, "abc", dict(weight=dict(a=1., b=-.7, c=.4), density=.5)), "ties, gradient": (True, "abc", dict(weight=.5, density=[.2, .9, .4])),
    "breadcrumbs": (True, "abc", dict(weight=WEIGHTS, density=.7, gamma=.02)), "breadcrumbs_ties": (True, "abc", dict(weight=WEIGHTS, density=.7, gamma=.02)),
    "dare_linear, density 1": (True, "abc", dict(weight=WEIGHTS, density=1.)), "dare_ties, density 1": (True, "abc", dict(weight=WEIGHTS, density=1.)), "della, density 1": (True, "abc", dict(weight=WEIGHTS, density=1.)),
}

def configuration(name, folder, based, models, parameters):
    "mergekit's YAML for one of the merges; JSON is YAML."
    shared = {k: v for k, v in parameters.items() if not isinstance(v, dict)}
    entries = [dict(model=f"{folder}/{m}", parameters={k: v[m] for k, v in parameters.items() if isinstance(v, dict)}) for m in (["base", *models] if name.startswith("slerp") else models)]
    return json.dumps(dict(merge_method=name.split(",")[0], models=entries, parameters=shared, dtype="float64" if name.endswith("float64") else "float32") | (dict(base_model=f"{folder}/base") if based else {}), indent=1)

def timed(command, **more):
    "Seconds and megabytes of a command. The peak is read while it runs: what the system counts for a finished child begins with its parent's."
    begun, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as error:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=error, text=True, **more)
        while child.poll() is None:
            try: peak = max([peak, *(int(line.split()[1])/1024 for line in Path(f"/proc/{child.pid}/status").read_text().splitlines() if line.startswith("VmHWM"))])
            except (FileNotFoundError, ProcessLookupError): break
            time.sleep(.05)
        if child.wait(): error.seek(0); raise RuntimeError(f"{command}: {error.read()[-3000:]}")
    return dict(seconds=time.perf_counter() - begun, megabytes=peak)

OURS = "import sys; from pathlib import Path; from distillbook.merge.disk import *; merge_folders(read_merge_config(Path(sys.argv[1])), sys.argv[2], progress=False)"
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

def read_folder(folder): return {n: t.double() for p in Path(folder).glob("*.safetensors") for n, t in load_file(p).items()}

def at_the_border(states, name, settings, depth):
    "Entries of a tensor that are exactly as large as the last one kept, or the last outlier, in one of the changes: any of several equal ones may be chosen."
    found, density, gamma = torch.zeros(states[0][name].shape, dtype=torch.bool), settings.get("density", 1.), settings.get("gamma", 0.)
    density = setting(density, name, depth)
    if density >= 1: return found
    for state in states[1:]:
        change = (state[name].float() - states[0][name].float()).abs()
        ordered, kept, top = change.flatten().sort(descending=True).values, max(1, int(density*change.numel())), int(gamma*change.numel())
        for place in {min(kept + top, len(ordered)), *([top] if top else [])}: found |= change == ordered[place - 1]
    return found

def difference(ours, theirs, states, settings):
    "Largest difference of a weight away from borders, and at them, and how many weights lie there."
    mine, other = read_folder(ours), read_folder(theirs)
    if "lm_head.weight" not in mine: other.pop("lm_head.weight", None)
    assert set(mine) == set(other), sorted(set(mine) ^ set(other))
    layers = 1 + max(int(n.split(".")[2]) for n in mine if ".layers." in n)
    away = at = 0.; count = 0
    for n in mine:
        gap = (mine[n] - other[n]).abs()
        border = at_the_border(states, n, settings, int(n.split(".")[2])/(layers - 1) if ".layers." in n else 0.)
        away, at, count = max(away, gap.masked_fill(border, 0.).max().item()), max(at, gap.masked_fill(~border, 0.).max().item()), count + int((border & (gap > 1e-6)).sum())
    return dict(largest=away, at_the_border=at, weights_that_differ_there=count)

def random_models(folder, tied):
    "A base and three more with random weights, one of them in shards."
    tokenizer = load_tokenizer("base")
    for k, name in enumerate(("base", "a", "b", "c")):
        torch.manual_seed(k)
        sizes = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied)
        network = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)) if tied else Qwen2ForCausalLM(Qwen2Config(**sizes))
        network.save_pretrained(folder/name, max_shard_size="300KB" if k == 2 else "5GB"); tokenizer.save_pretrained(folder/name)

def tuned_models(folder):
    "The book's student and three experts tuned from it, 20 steps each."
    load_model("student").save_pretrained(folder/"base"); load_tokenizer("student").save_pretrained(folder/"base")
    for name, domain in zip("abc", ("medical", "legal", "finance")): train_expert(folder/name, None, 0, domain, "student", 20, 16, 0.0003)

def real_models(folder, data):
    "A published model and three that were tuned from it on other texts, 20 steps each."
    place = data/"models"/"stories260K"/"hf"
    tokenizer = AutoTokenizer.from_pretrained(place)
    AutoModelForCausalLM.from_pretrained(place).save_pretrained(folder/"base"); tokenizer.save_pretrained(folder/"base")
    for name, text in zip("abc", ("tinyshakespeare", "pride_and_prejudice", "darwin")):
        ids = tokenizer((data/"text"/f"{text}.txt").read_text(encoding="utf-8")[20_000:80_000])["input_ids"]
        network = AutoModelForCausalLM.from_pretrained(place)
        train(network, pack([ids], 128, split=True), None, 20, 8, 1e-3, collate=collate, seed=0, progress=False)
        network.save_pretrained(folder/name); tokenizer.save_pretrained(folder/name)

THEIRS = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for text, out in zip(sys.argv[1::2], sys.argv[2::2]): run_merge(MergeConfiguration.model_validate(yaml.safe_load(open(text))), out, MergeOptions(write_model_card=False))
"""
def equality(mergekit, work):
    "Largest difference of a weight for each shared method, in float32, over random models, tuned ones and, where DISTILLBOOK_REALDATA is set, published ones."
    found, data = {}, os.environ.get("DISTILLBOOK_REALDATA")
    kinds = {"random Qwen3, tied": lambda f: random_models(f, True), "random Qwen2, apart": lambda f: random_models(f, False), "student and experts": tuned_models}
    if data: kinds["stories260K, tuned"] = lambda f: real_models(f, Path(data))
    for kind, make in kinds.items():
        folder, jobs = work/kind.replace(", ", "_").replace(" ", "_"), []
        make(folder)
        for k, (name, (based, models, parameters)) in enumerate(SHARED.items()):
            text = folder/f"{k}.yml"
            text.write_text(configuration(name, folder, based, models, parameters))
            merge_folders(read_merge_config(text), folder/f"ours{k}", progress=False)
            jobs += [str(text), str(folder/f"theirs{k}")]
        timed([str(mergekit/"python"), "-c", THEIRS, *jobs], env=os.environ | dict(PYTHONPATH=""))
        states = [read_folder(folder/m) for m in ("base", "a", "b", "c")]
        for k, (name, (*_, parameters)) in enumerate(SHARED.items()):
            row = found[f"{name} ({kind})"] = difference(folder/f"ours{k}", folder/f"theirs{k}", states, parameters)
            print(f"{name:35} {kind:22} {row['largest']:.1e} {row['at_the_border']:.1e} {row['weights_that_differ_there']}", flush=True)
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
HAND = """
import json, torch
from mergekit.merge_methods.karcher import karcher_merge_tensors
three = [torch.tensor([1., 0.]), torch.tensor([1., 0.]), torch.tensor([1., 5e-4])]
print(json.dumps({str(d).removeprefix("torch."): karcher_merge_tensors([t.to(d) for t in three], [1/3]*3)[1].item() for d in (torch.float32, torch.float64)}))
"""
def hand_case(mergekit):
    "The second number of the Karcher mean of (1, 0), (1, 0) and (1, 0.0005): an angle whose cosine rounds to 1 is skipped in float32, and the mean moves to the third."
    told = subprocess.run([str(mergekit/"python"), "-c", HAND], capture_output=True, text=True, check=True, env=os.environ | dict(PYTHONPATH="")).stdout
    return json.loads(told.splitlines()[-1]) | dict(here=karcher([torch.tensor([1., 0.]), torch.tensor([1., 0.]), torch.tensor([1., 5e-4])])[1].item())

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
    found = dict(versions=versions, machine=f"{platform.machine()}, {os.cpu_count()} cores", differences=equality(asked.mergekit, work), difference_of_drops=draws(asked.mergekit, work), karcher_by_hand=hand_case(asked.mergekit))
    if not asked.small:
        found["costs"] = costs(asked.mergekit, work)
        out = project_root()/"data"/"measured"/"merge.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n"); print(out)
    print("largest difference", max(d["largest"] for d in found["differences"].values()), "of drops", found["difference_of_drops"])
    if not asked.work: shutil.rmtree(work)

if __name__ == "__main__": main()
