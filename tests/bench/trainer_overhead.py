"""What our distilling trainer costs beside a bare PyTorch loop, and beside TRL's trainer for the same task.

    python tests/bench/trainer_overhead.py [--steps 15] [--rounds 9] [--threads 2] [--precision bfloat16]

All train the same student on the same teacher and rows. Each round runs every contender once, each time another one first,
and compares their median steps within that round, so that what else the machine does slows all of them alike. The table gives
the median of the rounds' ratios to the bare loop with a 95% bootstrap interval, for seconds on the clock and for processor
seconds, which are judged apart. All run with glibc told to keep freed memory, as `lab.training` asks it to.
Exit code 1 if our trainer's step takes over 1.1 times the bare loop's, by the clock or by the processor.
"""
import argparse, gc, random, statistics, sys, tempfile, time, warnings
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from torch.utils.data import DataLoader
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from distillbook.distill.logit_kd import DistillTrainer
from distillbook.distill.losses import distill_loss
from distillbook.lab.training import KeepWeightsFinite, keep_freed_memory, stop_at_nan

VOCABULARY, BAR, BARE = 4096, 1.1, "bare PyTorch loop"

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
    "The trainer that `distill` runs: watched, so that it stops at a loss that is not a number."
    clock = Clock()
    trainer = stop_at_nan(DistillTrainer)(student(), arguments(folder, options), train_dataset=rows, data_collator=stack,
        callbacks=[clock, KeepWeightsFinite()], teacher=teacher, tokenizer=Words(), teacher_tokenizer=Words(), kind=options.kind,
        temperature=options.temperature, fused=fused)
    trainer.model.config.use_cache = False
    trainer.remove_callback(PrinterCallback)
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
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.steps()

def peer_tokenizer():
    from distillbook.lab.models import train_tokenizer
    return train_tokenizer(["a small text", "and one more"], 300)

def middle_of(values, resamples=4000):
    "Median with a 95% bootstrap interval."
    chance = random.Random(0)
    drawn = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(resamples))
    return statistics.median(values), drawn[round(0.025*resamples)], drawn[round(0.975*resamples) - 1]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(steps=15, rounds=9, threads=2, batch_size=8, length=128, temperature=2.0, precision="bfloat16", kind="hybrid").items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    keep_freed_memory()
    teacher = model(512, 4, 768, 8, 4).eval()
    ids = torch.randint(0, VOCABULARY, (options.steps*options.batch_size, options.length))
    from datasets import Dataset
    rows = [dict(input_ids=x, labels=x.clone()) for x in ids]
    peer_rows = Dataset.from_dict(dict(input_ids=ids.tolist(), labels=ids.tolist())).with_format("torch")
    contenders = {BARE: bare, "DistillTrainer": distill_trainer, "DistillTrainer, fused": fused_trainer}
    import importlib.util
    if importlib.util.find_spec("trl"): contenders["TRL GKDTrainer (KL only)"] = trl_trainer
    rounds, names = [], list(contenders)
    for number in range(options.rounds + 1):      # the first one warms up
        steps = {}
        for name in names[number % len(names):] + names[:number % len(names)]:
            with tempfile.TemporaryDirectory() as folder:
                taken = contenders[name](teacher, peer_rows if "TRL" in name else rows, options, folder)
            steps[name] = [statistics.median(column) for column in zip(*taken)]      # wall, processor
            gc.collect()
        if number: rounds.append(steps)
    return report(rounds, names, options)

def report(rounds, names, options):
    print(f"{options.batch_size} rows of {options.length} tokens, {options.precision}, {options.threads} threads, {options.rounds} rounds of {options.steps} steps")
    over = []
    for column, clock in enumerate(("clock", "processor")):
        print(f"\nby the {clock:21}{'s/step':>9}{'ratio':>8}   95% interval")
        for name in names:
            ratio, low, high = middle_of([r[name][column]/r[BARE][column] for r in rounds])
            print(f"{name:28}{statistics.median(r[name][column] for r in rounds):9.4f}{ratio:8.3f}   {low:.3f} to {high:.3f}")
            if name == "DistillTrainer": over.append((clock, ratio, low, high))
    print()
    for clock, ratio, low, high in over:
        sure = "clearly" if high <= BAR or low > BAR else "not clearly, run more rounds:"
        print(f"by the {clock} our trainer's step takes {ratio:.3f} times the bare loop's: {sure} {'within' if ratio <= BAR else 'over'} the bar of {BAR}")
    return int(any(ratio > BAR for _, ratio, _, _ in over))

if __name__ == "__main__": sys.exit(main())
