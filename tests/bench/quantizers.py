"""GPTQ and AWQ beside llm-compressor and GPTQModel: the same model, calibration text and groups; what is lost and how long it takes. llm-compressor sorts columns by the size of their inputs unless told otherwise, and GPTQModel is told to; so their GPTQ stands beside ours that sorts; all but our AWQ use sixteen marks. Each wants an environment of its own:

    python -m venv /one && /one/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python -m venv /two && /two/bin/pip install torch==2.14.1 torchvision==0.29.1 requests gptqmodel==7.7.0
    python tests/bench/quantizers.py [--llmcompressor /one/bin/python] [--gptqmodel /two/bin/python] [--large]

Writes its table to data/measured/quantizers.json, where chapters 51 and 52 read it. About twenty minutes; --large also quantizes a model of a billion random weights, read and written a layer at a time, and notes the memory that it took.
"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
import torch

NATS = '''
@torch.no_grad()
def nats(model, rows):
    total = count = 0
    for row in rows:
        ids = torch.tensor([row])
        beliefs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        total -= beliefs.gather(-1, ids[0, 1:, None]).sum().item(); count += len(row) - 1
    return total/count
'''
exec(NATS)

OTHERS = {"llm-compressor": '''
import json, sys, time, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
torch.set_num_threads(2)
from llmcompressor.pipelines.cache import IntermediatesCache
IntermediatesCache.pin_memory = lambda *given: None         # 0.14.0.1 pins memory for a device that is not there, and stops
job = json.load(open(sys.argv[1]))
data = Dataset.from_list([dict(input_ids=row, attention_mask=[1]*len(row)) for row in job["calibration"]])
scheme = lambda: dict(config_groups=dict(group_0=QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=job["bits"], type="int", symmetric=True, strategy="group", group_size=job["group_size"]))), ignore=["lm_head"])
found = {}
for how in ("rounding", "GPTQ, sorted", "AWQ"):
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    recipe = {"rounding": lambda: [QuantizationModifier(**scheme())], "GPTQ, sorted": lambda: [GPTQModifier(**scheme(), dampening_frac=0.01)], "AWQ": lambda: [AWQModifier(), QuantizationModifier(**scheme())]}[how]()
    begun = time.perf_counter()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=len(job["calibration"][0]), num_calibration_samples=len(data), tokenizer=AutoTokenizer.from_pretrained(job["model"]))
    found[how] = dict(seconds=time.perf_counter() - begun, nats=nats(model.eval(), job["held_out"]))
json.dump(found, open(sys.argv[2], "w"))
''', "GPTQModel": '''
import json, os, sys, tempfile, time, torch
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"                   # 7.7.0 takes one on two cores, and its loader wants two
from transformers import AutoModelForCausalLM
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
torch.set_num_threads(2)
job, found = json.load(open(sys.argv[1])), {}
for how, options in {"GPTQ, sorted": dict(desc_act=True), "GPTQ, group-aware": dict(desc_act=False, act_group_aware=True)}.items():
    model = GPTQModel.load(job["model"], QuantizeConfig(bits=job["bits"], group_size=job["group_size"], sym=True, damp_percent=0.01, **options), device="cpu", dtype=torch.float32)
    begun = time.perf_counter()
    model.quantize([dict(input_ids=row, attention_mask=[1]*len(row)) for row in job["calibration"]], batch_size=1)
    seconds = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        packed, whole = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model, AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
        read = [whole.get_submodule(name).weight.data.copy_(m.dequantize_weight().T.float()) for name, m in packed.named_modules() if hasattr(m, "dequantize_weight")]      # its own matrices compute in 16 bits only
    assert len(read) == 7*whole.config.num_hidden_layers
    found[how] = dict(seconds=seconds, nats=nats(whole, job["held_out"]))
json.dump(found, open(sys.argv[2], "w"))
'''}

def ours(job):
    "What the book's own functions lose on the same job, and their seconds."
    from distillbook.lab.models import load_model
    from distillbook.ship.awq import awq_model
    from distillbook.ship.gptq import gptq_model
    from distillbook.ship.precision import quantize, rounded_model
    bits, group, rows, found = job["bits"], job["group_size"], job["calibration"], {}
    ways = dict(rounding=lambda m: rounded_model(m, lambda w: quantize(w, bits, group, full=True)), GPTQ=lambda m: gptq_model(m, rows, bits, False, group_size=group, full=True), **{"GPTQ, sorted": lambda m: gptq_model(m, rows, bits, False, group_size=group, act_order=True, full=True)}, AWQ=lambda m: awq_model(m, rows, bits, group, progress=False))
    for how, way in ways.items():
        model, begun = load_model(job["model"]), time.perf_counter()
        way(model)
        found[how] = dict(seconds=time.perf_counter() - begun, nats=nats(model, job["held_out"]))
    return found

def compare(pythons, seeds):
    "Every tool on the same jobs: the teacher, five samples of calibration text."
    from distillbook.lab.models import load_model, load_tokenizer
    from distillbook.ship.gptq import some_texts, text_rows
    tokenizer, texts, rows = load_tokenizer("teacher"), {split: some_texts("docstrings", split) for split in ("train", "test")}, []
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        load_model("teacher").save_pretrained(work/"model"); tokenizer.save_pretrained(work/"model")
        held_out = text_rows(texts["test"], tokenizer, 48, 256, 0)
        original = nats(load_model("teacher"), held_out)
        for seed in range(seeds):
            job = dict(model=str(work/"model"), bits=4, group_size=128, calibration=text_rows(texts["train"], tokenizer, 32, 256, seed), held_out=held_out)
            (work/"job.json").write_text(json.dumps(job))
            tools = {"distillbook": ours(job)}
            for name, python in pythons.items():
                (work/"theirs.py").write_text("import torch\n" + NATS + OTHERS[name])
                subprocess.run([python, str(work/"theirs.py"), str(work/"job.json"), str(work/"out.json")], check=True, cwd=work, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}, stdout=subprocess.DEVNULL)
                tools[name] = json.loads((work/"out.json").read_text())
            for tool, ways in tools.items():
                for how, told in ways.items(): rows.append(dict(seed=seed, tool=tool, how=how, original=original, **told)); print(rows[-1], flush=True)
    return rows

LARGE = '''
import json, sys, time, torch
from distillbook.ship.release import compress_model
torch.set_num_threads(2)
rows = torch.randint(151_936, (8, 128), generator=torch.Generator().manual_seed(0)).tolist()
begun = time.perf_counter()
compress_model(sys.argv[1], sys.argv[1] + "-W4A16", rows, progress=False)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))        # of this program alone: ru_maxrss would begin with its parent's
print(json.dumps(dict(seconds=time.perf_counter() - begun, megabytes=peak*1024/1e6)))
'''
def large():
    "A model of a billion random weights, in a process of its own."
    from distillbook.lab.models import load_tokenizer
    from transformers import Qwen3Config, Qwen3ForCausalLM
    with tempfile.TemporaryDirectory() as work:
        config, place = Qwen3Config(vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=14, num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=2048), Path(work)/"model"
        torch.set_default_dtype(torch.bfloat16)
        network = Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        network.save_pretrained(place); load_tokenizer("teacher").save_pretrained(place)
        told = dict(parameters=network.num_parameters(), layers=config.num_hidden_layers, settings="random weights in bfloat16, 4 bits, groups of 128, 8 rows of 128 random tokens")
        del network
        done = subprocess.run([sys.executable, "-c", LARGE, str(place)], check=True, capture_output=True, text=True)
    return told | json.loads(done.stdout.splitlines()[-1])

if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--ours", action="store_true", help="measure the book's own functions again, keep the others' rows"); asked.add_argument("--llmcompressor"); asked.add_argument("--gptqmodel"); asked.add_argument("--large", action="store_true"); asked.add_argument("--seeds", type=int, default=5)
    asked = asked.parse_args()
    from distillbook.lab.settings import project_root
    out = project_root()/"data"/"measured"/"quantizers.json"
    kept = json.loads(out.read_text()) if out.exists() else {}
    pythons = {name: python for name, python in (("llm-compressor", asked.llmcompressor), ("GPTQModel", asked.gptqmodel)) if python}
    if pythons or asked.ours: kept["rows"] = [r for r in kept.get("rows", []) if r["tool"] not in (*pythons, "distillbook")] + compare(pythons, asked.seeds)
    if asked.large: kept["large"] = large()
    kept |= dict(machine=f"{platform.machine()}, {os.cpu_count()} cores", torch=torch.__version__.split("+")[0], settings="teacher, 4 bits, groups of 128, symmetric, 32 rows of 256 tokens of docstrings; held out: 48 rows")
    out.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept, indent=1))
