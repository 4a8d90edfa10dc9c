"""What our distilling trainer costs beside a bare PyTorch loop, and beside TRL's trainer for the same task.

    python tests/bench/trainer_overhead.py [--steps 20] [--rounds 5] [--threads 2] [--fused] [--precision bfloat16]

All three train the same student on the same teacher and rows. They take turns, so that a busy machine slows all of them;
the ratios are of median seconds a step, and of processor seconds a step, which other programs disturb least.
Exit code 1 if ours takes over 1.1 times the bare loop's time.
"""
import argparse, gc, statistics, sys, tempfile, time, warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from torch.utils.data import DataLoader
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback, TrainingArguments
from distillbook.distill.logit_kd import DistillTrainer
from distillbook.distill.losses import distill_loss

VOCABULARY = 4096

def model(width, layers, inner, heads, kv_heads):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True))

def student(): return model(128, 2, 256, 4, 2)

class Words:
    "Stands for the pair's one tokenizer, which the trainer asks for its map and its length."
    def __len__(self): return VOCABULARY
    def get_vocab(self): return {str(i): i for i in range(VOCABULARY)}

class Clock(TrainerCallback):
    "Wall and processor seconds between the ends of steps; the first few steps warm up."
    def __init__(self, skip=3): self.marks, self.skip = [], skip
    def on_step_end(self, *args, **kwargs): self.marks.append((time.perf_counter(), time.process_time()))
    def steps(self):
        kept = self.marks[self.skip:]
        return [tuple(b - a for a, b in zip(*pair)) for pair in zip(kept, kept[1:])]

def stack(rows): return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

def arguments(folder, options, cls=TrainingArguments, **more):
    return cls(output_dir=str(folder), max_steps=options.steps, per_device_train_batch_size=options.batch_size, learning_rate=1e-3,
        lr_scheduler_type="cosine", weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0, bf16=options.precision == "bfloat16", use_cpu=True,
        save_strategy="no", logging_steps=options.steps, logging_nan_inf_filter=False, report_to="none", disable_tqdm=True, log_level="error",
        remove_unused_columns=False, dataloader_pin_memory=False, gradient_checkpointing=False, **more)

def bare(teacher, rows, options, folder):
    "The loop without any trainer: the same optimizer, schedule, clipping, precision and loss."
    ours, clock = student().train(), Clock()
    optimizer = torch.optim.AdamW(ours.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    half = lambda: torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16")
    for batch in DataLoader(rows, options.batch_size, shuffle=True, collate_fn=stack):
        with half():
            with torch.no_grad(): theirs = teacher(input_ids=batch["input_ids"], use_cache=False).logits
            logits = ours(input_ids=batch["input_ids"], use_cache=False).logits
            loss = distill_loss(logits, theirs, batch["labels"], kind=options.kind, temperature=options.temperature, alpha=0.5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step(); schedule.step(); optimizer.zero_grad()
        loss.item()
        clock.on_step_end()
    return clock.steps()

def distill_trainer(teacher, rows, options, folder, fused=False):
    clock = Clock()
    trainer = DistillTrainer(student(), arguments(folder, options), train_dataset=rows, data_collator=stack, callbacks=[clock], teacher=teacher,
        tokenizer=Words(), teacher_tokenizer=Words(), kind=options.kind, temperature=options.temperature, fused=fused)
    trainer.model.config.use_cache = False
    trainer.train()
    return clock.steps()

def fused_trainer(teacher, rows, options, folder): return distill_trainer(teacher, rows, options, folder, fused=True)

def trl_trainer(teacher, rows, options, folder):
    "TRL's GKDTrainer off policy with beta=0: KL(teacher || student), without the cross-entropy part."
    import os; os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    clock = Clock()
    def collate(batch):
        made = stack(batch)
        return made | dict(attention_mask=torch.ones_like(made["input_ids"]))
    args = arguments(folder, options, GKDConfig, lmbda=0.0, beta=0.0, temperature=options.temperature)
    trainer = GKDTrainer(student(), teacher, args, train_dataset=rows, data_collator=collate, processing_class=peer_tokenizer(), callbacks=[clock])
    trainer.train()
    return clock.steps()

def peer_tokenizer():
    from distillbook.lab.models import train_tokenizer
    return train_tokenizer(["a small text", "and one more"], 300)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(steps=20, rounds=5, threads=2, batch_size=8, length=128, temperature=2.0, precision="bfloat16", kind="hybrid").items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    teacher = model(512, 4, 768, 8, 4).eval()
    ids = torch.randint(0, VOCABULARY, (options.steps*options.batch_size, options.length))
    from datasets import Dataset
    rows = [dict(input_ids=x, labels=x.clone()) for x in ids]
    peer_rows = Dataset.from_dict(dict(input_ids=ids.tolist(), labels=ids.tolist())).with_format("torch")
    contenders = {"bare PyTorch loop": bare, "DistillTrainer": distill_trainer, "DistillTrainer, fused": fused_trainer}
    import importlib.util
    if importlib.util.find_spec("trl"): contenders["TRL GKDTrainer (KL only)"] = trl_trainer
    times = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, contender in contenders.items():
            with tempfile.TemporaryDirectory() as folder:
                times[name] += contender(teacher, peer_rows if "TRL" in name else rows, options, folder)
            gc.collect()
    return report(times, options)

def report(times, options):
    middle = {name: [statistics.median(column) for column in zip(*steps)] for name, steps in times.items()}
    wall, cpu = middle["bare PyTorch loop"]
    print(f"{options.batch_size} rows of {options.length} tokens, {options.precision}, {options.threads} threads, {options.rounds} rounds of {options.steps} steps")
    print(f"{'':28}{'s/step':>9}{'ratio':>8}{'cpu s':>9}{'ratio':>8}")
    for name, (w, c) in middle.items(): print(f"{name:28}{w:9.4f}{w/wall:8.3f}{c:9.4f}{c/cpu:8.3f}")
    ratio = min(a/b for a, b in zip(middle["DistillTrainer"], (wall, cpu)))
    print(f"our trainer takes {ratio:.3f} times the bare loop's time: {'within' if ratio <= 1.1 else 'over'} the bar of 1.1")
    return int(ratio > 1.1)

if __name__ == "__main__": sys.exit(main())
