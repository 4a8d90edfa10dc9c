"Trains the actor's adapter and a small chat student. python drafts/train_on_gpu.py ROWS OUT [small]; ROWS holds what drafts/rows.py wrote."
import json, multiprocessing, os, random, sys, time
sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), os.getcwd()]
import numpy as np, torch
from characters import *
from distillbook.lab.models import load_model, load_tokenizer, small_student, generate
from distillbook.lab.corpora import chat_example, collate
from distillbook.lab.training import train
from distillbook.distill.logit_kd import distill

LENGTH = 1536
def packed(job):
    "So many rows of characters, padded to LENGTH."
    seed, rows = job
    rng, tok, out = random.Random(f"actor {seed}"), load_tokenizer("teacher"), []
    ids, labels, pos = [], [], []
    while len(out) < rows:
        e = chat_example(conversation(rng), tok)
        if len(e["input_ids"]) > LENGTH: continue
        if len(ids) + len(e["input_ids"]) > LENGTH:
            n = LENGTH - len(ids)
            out.append((ids + [0]*n, labels + [-100]*n, pos + [0]*n)); ids, labels, pos = [], [], []
        ids, labels, pos = ids + e["input_ids"], labels + [-100, *e["labels"][1:]], pos + list(range(len(e["input_ids"])))
    return np.array(out, dtype=np.int32)

def as_rows(array): return [dict(input_ids=torch.from_numpy(r[0].astype(np.int64)), labels=torch.from_numpy(r[1].astype(np.int64)), position_ids=torch.from_numpy(r[2].astype(np.int64))) for r in array]

def lessons(path, length=LENGTH):
    "Rows of make_tiny_models, set side by side to rows of `length`."
    kept, out = np.load(path), []
    for L in (512, 1024):
        if f"ids{L}" not in kept: continue
        ids = kept[f"ids{L}"].astype(np.int64); n = len(ids)
        counts = np.unpackbits(kept[f"counts{L}"])[:n*L].reshape(n, L).astype(bool)
        pos = kept[f"pos{L}"].astype(np.int64) if f"pos{L}" in kept else np.tile(np.arange(L), (n, 1))
        labels = np.where(counts, ids, -100); labels[:, 0] = -100
        k = length // L
        take = n // k * k
        out.append(np.stack([x[:take].reshape(-1, k*L) for x in (ids, labels, pos)], 1))
    return out

def measure(model, tok, n_other=200):
    "Persona points on Beethoven's prompt, all templates, and on other invented people."
    prompt = (HERE/"beethoven.md").read_text().strip()
    rng, asks, keys = random.Random(1), [], []
    for s in SUBJECTS:
        for q in s["questions"]:
            for plain in (1., 0.):
                asks.append([dict(role="system", content=prompt), dict(role="user", content=question(rng, q, plain))]); keys.append((BEETHOVEN, s))
    for _ in range(n_other):
        who = draw_character(rng, 20); s = rng.choice(SUBJECTS)
        asks.append([dict(role="system", content=write_prompt(rng, who, 560)), dict(role="user", content=question(rng, rng.choice(s["questions"])))]); keys.append((who, s))
    replies = generate(model, tok, asks, max_new_tokens=48, batch_size=64, progress=False)
    points = [persona_points(w, s, r) for (w, s), r in zip(keys, replies)]
    k = 2*sum(len(s["questions"]) for s in SUBJECTS)
    mean = lambda part: {n: round(float(np.mean([p[n] for p in part])), 3) for n in ("fact", "manner", "role")}
    worst = {s["subject"]: round(float(np.mean([p["fact"] for p, (w, t) in zip(points[:k], keys) if t is s])), 2) for s in SUBJECTS}
    return dict(beethoven=mean(points[:k]), others=mean(points[k:]), by_subject=worst, samples=replies[:k:17])

if __name__ == "__main__":
    carry, out, small = sys.argv[1], sys.argv[2], len(sys.argv) > 3
    begun = time.time(); log = {}
    def say(*a): print(f"[{time.time()-begun:6.1f}]", *a, flush=True)
    tok = load_tokenizer("teacher")
    multiprocessing.set_start_method("fork")
    cores = max(1, (os.cpu_count() or 2) - 2)
    jobs = [(i, 4 if small else 110) for i in range(2 if small else 252)]
    pool = multiprocessing.Pool(cores); chars_later = pool.map_async(packed, jobs)
    from peft import LoraConfig, get_peft_model
    BATCH = 2 if small else 32
    chars = np.concatenate(chars_later.get()); pool.close()
    rehearsal = lessons(f"{carry}/lessons.npz")
    say("characters", chars.shape, "lessons", [r.shape for r in rehearsal])
    rows_chars = as_rows(chars)
    rows_lessons = as_rows(rehearsal[0]) + (as_rows(rehearsal[1]) if len(rehearsal) > 1 else [])
    say("rows", len(rows_chars), len(rows_lessons))
    def actor():
        torch.manual_seed(0)
        m = load_model("teacher", dtype="float32")
        return get_peft_model(m, LoraConfig(r=64, lora_alpha=64, target_modules="all-linear", lora_dropout=0., task_type="CAUSAL_LM"))
    mix = rows_chars + random.Random(0).sample(rows_lessons, min(len(rows_lessons), len(rows_chars)//10))
    def lora(model, rows, steps): return train(model, rows, None, steps, BATCH, 2e-3, collate=collate, seed=1, progress=False, arguments=dict(weight_decay=0.))
    steps = 3 if small else 2600
    model = actor(); history = lora(model, mix, steps)
    log["actor"] = dict(steps=steps, batch=BATCH, loss=history["loss"][::5], seconds=history["seconds"])
    say("actor loss", [round(x, 3) for x in history["loss"][::6]])
    model.to(torch.bfloat16).save_pretrained(f"{out}/actor")
    merged = model.merge_and_unload().eval()
    log["actor_score"] = measure(merged, tok, 8 if small else 200); say("actor", json.dumps(log["actor_score"], ensure_ascii=False))
    # the student
    merged = merged.float(); base = load_model("base", dtype="float32")
    reading = as_rows(lessons(f"{carry}/reading.npz", 512)[0])
    def blank(): torch.manual_seed(0); return small_student(tok)
    def read(m, rows, steps): return distill(m, base, rows, None, steps, tok, tok, temperature=1., learning_rate=3e-3, batch_size=2 if small else 48, seed=0, fused=False, optimizer="muon", collate=collate, progress=False)
    def learn(m, rows, steps): return distill(m, merged, rows, None, steps, tok, tok, temperature=1., learning_rate=2e-3, batch_size=2 if small else 16, seed=0, fused=False, optimizer="muon", collate=collate, progress=False)
    steps = 2 if small else 2400
    student = blank(); h = read(student, reading, steps); log["reading"] = dict(steps=steps, batch=48, loss=h["loss"][::5]); say("reading", [round(x, 3) for x in h["loss"][::6]])
    everything = rows_chars[:9000] + rows_lessons*2
    steps = 2 if small else 3000
    h = learn(student, everything, steps); log["lessons"] = dict(steps=steps, batch=16, loss=h["loss"][::5]); say("lessons", [round(x, 3) for x in h["loss"][::6]])
    student.to(torch.bfloat16).save_pretrained(f"{out}/student")
    log["student_score"] = measure(student.eval(), tok, 8 if small else 200); say("student", json.dumps(log["student_score"], ensure_ascii=False))
    json.dump(log, open(f"{out}/log.json", "w"), indent=1)
    say("done", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
