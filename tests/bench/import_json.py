"""Memory and time to import a large JSON file of logits: python tests/bench/import_json.py [gigabytes] [vocabulary]

Writes a file of the fourth document's form, with whole arrays over a made-up vocabulary, imports it in a process of its own, and
prints a table. Needs that much disk below the folder for temporary files, and removes it afterwards."""
import json, subprocess, sys, tempfile
from pathlib import Path
import numpy as np

CHILD = """
import json, resource, sys, time
import torch
from transformers import PreTrainedTokenizerFast
from distillbook.distill.logit_store import import_logits
words = PreTrainedTokenizerFast(tokenizer_file=sys.argv[3])
loaded, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
store = import_logits(sys.argv[1], sys.argv[2], words, k=50)
print(json.dumps(dict(seconds=time.time() - start, before=loaded, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, positions=store.positions, bytes_per_token=store.bytes_per_token)))
"""

def make_tokenizer(path, vocabulary):
    "Words w0, w1, ... for a vocabulary of any size."
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(path))

def write_file(path, gigabytes, vocabulary, tokens=20):
    "Entries of `tokens` positions until the file is large enough; a few arrays are used again and again."
    rng = np.random.default_rng(0)
    arrays = [json.dumps([round(float(x), 4) for x in rng.normal(0, 3, vocabulary)]) for _ in range(4)]
    with open(path, "w") as file:
        file.write("["); n = 0
        while file.tell() < gigabytes*1e9:
            response = " ".join(f"w{rng.integers(vocabulary)}" for _ in range(tokens))
            file.write((",\n" if n else "") + f'{{"prompt": "w1 w2", "response": "{response}", "logits": [' + ", ".join(arrays[(n + i) % 4] for i in range(tokens)) + "]}")
            n += 1
        file.write("]")
    return n

if __name__ == "__main__":
    gigabytes, vocabulary = float(sys.argv[1]) if len(sys.argv) > 1 else 2., int(sys.argv[2]) if len(sys.argv) > 2 else 128_256
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_tokenizer(folder/"tokenizer.json", vocabulary)
        entries = write_file(folder/"logits.json", gigabytes, vocabulary)
        size = (folder/"logits.json").stat().st_size
        done = subprocess.run([sys.executable, "-c", CHILD, folder/"logits.json", folder/"store", folder/"tokenizer.json"], capture_output=True, text=True)
        if done.returncode: sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
    print("| file | entries | positions | seconds | MB a second (read twice) | memory before | peak memory | bytes a token |")
    print("|---|---|---|---|---|---|---|---|")
    print(f"| {size/1e9:.2f} GB | {entries} | {found['positions']} | {found['seconds']:.0f} | {2*size/1e6/found['seconds']:.0f} | {found['before']/1e3:.0f} MB | {found['peak']/1e3:.0f} MB | {found['bytes_per_token']} |")
