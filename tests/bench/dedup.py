"""Memory, time and result of deduplication by embedding, beside semhash on the same vectors.

    pip install semhash==0.5.0                      # for this bench alone; the book does not need it
    python tests/bench/dedup.py                     # 25,000, 50,000 and 100,000 rows
    python tests/bench/dedup.py --rows 25000        # one size; each writes its line into the table

The vectors: unit vectors of 384 dimensions (the size of MiniLM's), drawn at random around 200 topics, so that cosines
between strangers spread from 0 to about 0.6 as those of texts do; one row in ten is a planted near-duplicate of an earlier
one, at a cosine of about 0.97. Each contestant runs in a process of its own, with as many threads as OMP_NUM_THREADS allows.
  blocked   distillbook.synth.curate.embedding_duplicates
  semhash   SemHash.from_embeddings(...).self_deduplicate on the same vectors: 'exact' with the backend that compares all pairs, else with its usual index
Extra memory is the peak resident size of the process less its size with the vectors in place.
The table goes to dedup.csv in the folder --out (default: runs/bench).
"""
import argparse, csv, json, os, resource, subprocess, sys, time
from pathlib import Path
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CONTESTANTS = ("blocked", "semhash exact", "semhash")


def vectors_of(rows, seed=0, dimensions=384, topics=200, share=.1, cosine=.97):
    "Unit vectors, and for each row the earlier row that it copies, or itself."
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(topics, dimensions)).astype(np.float32)
    x = centres[draw.integers(0, topics, rows)] + draw.normal(size=(rows, dimensions)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    source = np.arange(rows)
    copies = np.sort(draw.choice(np.arange(rows//2, rows), round(rows*share), replace=False))
    source[copies] = draw.integers(0, rows//2, len(copies))      # originals lie in the first half, copies in the second
    noise = draw.normal(size=(len(copies), dimensions)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    x[copies] = x[source[copies]] + noise*np.float32((1/cosine**2 - 1)**.5)
    return x/np.linalg.norm(x, axis=1, keepdims=True), source


def kept_rows(contestant, vectors, threshold):
    "The rows that stay."
    if contestant == "blocked":
        from distillbook.synth.curate import embedding_duplicates
        return [i for i, k in enumerate(embedding_duplicates(vectors, threshold, progress=False)) if k == i]
    from semhash import SemHash
    names = [str(i) for i in range(len(vectors))]
    hashed = SemHash.from_embeddings(vectors, names, model=None, ann_backend="basic" if contestant == "semhash exact" else "usearch")
    return [int(name) for name in hashed.self_deduplicate(threshold=threshold).selected]


def measure(contestant, rows, threshold):
    import psutil
    sys.path.insert(0, str(ROOT))
    vectors, source = vectors_of(rows)
    kept_rows(contestant, vectors[:2000], threshold)       # imports and first calls are no part of it
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    kept = kept_rows(contestant, vectors, threshold)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == "darwin" else 1024)
    dropped, planted = set(range(rows)) - set(kept), set(np.flatnonzero(source != np.arange(rows)).tolist())
    print(json.dumps(dict(contestant=contestant, rows=rows, seconds=round(seconds, 1), extra_MB=round((peak - before)/2**20), vectors_MB=round(vectors.nbytes/2**20),
        dropped=len(dropped), planted=len(planted), precision=round(len(dropped & planted)/max(1, len(dropped)), 4), recall=round(len(dropped & planted)/len(planted), 4))))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, nargs="+", default=[25_000, 50_000, 100_000])
    p.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    p.add_argument("--threshold", type=float, default=.95)
    p.add_argument("--out", type=Path, default=ROOT/"runs"/"bench")
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return measure(a.child[0], int(a.child[1]), a.threshold)
    a.out.mkdir(parents=True, exist_ok=True)
    table = a.out/"dedup.csv"
    for rows in a.rows:
        for contestant in a.contestants:
            done = subprocess.run([sys.executable, __file__, "--threshold", str(a.threshold), "--child", contestant, str(rows)], capture_output=True, text=True)
            if done.returncode: sys.exit(f"{contestant}, {rows} rows: {done.stderr.strip().splitlines()[-1]}")
            line = json.loads(done.stdout.strip().splitlines()[-1])
            fresh = not table.exists()
            with table.open("a", newline="") as file:
                writer = csv.DictWriter(file, line)
                if fresh: writer.writeheader()
                writer.writerow(line)
            print("  ".join(f"{k} {v}" for k, v in line.items()), flush=True)


if __name__ == "__main__": main()
