"""Peak memory, time and gradients of the fused loss, as ratios to the plain loss.

    python tests/bench/fused_loss.py                        # 4,096 tokens x 151,936 words, hidden 1,024
    python tests/bench/fused_loss.py --tokens 512           # the same in small

Three contestants, each in a process of its own, on the same input:
  lean    the usual lines: both logits, log_softmax, F.kl_div (and F.cross_entropy for hybrid), nothing else
  plain   distill_loss on the logits of both models
  fused   fused_kd_loss
Extra memory is the peak resident size of the process less its size with the inputs in place.
At the full size lean needs about 17 GB in all and plain more: --contestants lean fused leaves plain out.
"""
import argparse, json, resource, subprocess, sys, tempfile, time
from pathlib import Path
import psutil, torch
import torch.nn.functional as F

CONTESTANTS = ("lean", "plain", "fused")


def inputs(tokens, vocabulary, hidden):
    "One sequence, so that all tokens but one count; logits of a size that language models have."
    generator = torch.Generator().manual_seed(0)
    def normal(*shape, scale=1.): return torch.empty(*shape).normal_(0, scale, generator=generator)
    student_hidden, teacher_hidden = normal(1, tokens, hidden), normal(1, tokens, hidden)
    student_weight, teacher_weight = (normal(vocabulary, hidden, scale=2/hidden**.5) for _ in range(2))
    labels = torch.randint(0, vocabulary, (1, tokens), generator=generator)
    return student_hidden.requires_grad_(), student_weight.requires_grad_(), teacher_hidden, teacher_weight, labels


def lean_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, kind, temperature):
    "What most training scripts do, with the least memory that they can do it in."
    student = (student_hidden[:, :-1] @ student_weight.T)[0]
    with torch.no_grad():
        teacher = (teacher_hidden[:, :-1] @ teacher_weight.T)[0]
        teacher = F.log_softmax(teacher / temperature, -1)
    soft = F.kl_div(F.log_softmax(student / temperature, -1), teacher, log_target=True, reduction="batchmean") * temperature**2
    return soft if kind == "kl" else .5*F.cross_entropy(student, labels[0, 1:]) + .5*soft


def compute(contestant, tensors, kind, temperature, chunk_size):
    from distillbook.distill.losses import distill_loss, fused_kd_loss
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels = tensors
    if contestant == "lean": return lean_loss(*tensors, kind, temperature)
    if contestant == "fused": return fused_kd_loss(*tensors, kind=kind, temperature=temperature, chunk_size=chunk_size)
    return distill_loss(student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T, labels, kind=kind, temperature=temperature)


def measure(contestant, size, folder):
    "One warm-up on a hundredth of the tokens, then one step; the gradients are left in folder."
    sys.path.insert(0, str(Path(__file__).parents[2]))
    settings = size["kind"], size["temperature"], size["chunk"]
    warm = inputs(max(size["tokens"]//100, 4), size["vocabulary"]//10, size["hidden"])
    compute(contestant, warm, *settings).backward()
    del warm
    tensors = inputs(size["tokens"], size["vocabulary"], size["hidden"])
    before, start, worked = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
    loss = compute(contestant, tensors, *settings)
    loss.backward()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.save([t.grad for t in tensors[:2]], Path(folder, f"{contestant}.pt"))
    return dict(loss=loss.item(), seconds=seconds, cpu_seconds=cpu_seconds, extra_mb=(peak-before)/1e6)


def gradient_error(folder, contestant, reference):
    "Largest difference of any entry, relative to the largest entry; and of the norms."
    one, other = (torch.load(Path(folder, f"{name}.pt"), mmap=True, weights_only=True) for name in (contestant, reference))
    return [dict(entry=((a-b).abs().max() / b.abs().max()).item(), norm=((a-b).norm() / b.norm()).item()) for a, b in zip(one, other)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(tokens=4096, vocabulary=151936, hidden=1024, chunk=128, temperature=2.0, threads=2, kind="kl").items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, choices=CONTESTANTS)
    size = vars(parser.parse_args())
    if size["only"]:
        torch.set_num_threads(size["threads"])
        return print(json.dumps(measure(size["only"], size, size["folder"])))
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name in size["contestants"]:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", name, "--folder", folder], capture_output=True, text=True)
            if done.returncode: sys.exit(f"{name} ended with {done.returncode} (-9 is: out of memory)\n{done.stderr[-2000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:6}", " ".join(f"{key} {value:.4f}" for key, value in found[name].items()), flush=True)
        for name in found:
            if name == "fused": continue
            a, b = found["fused"], found[name]
            print(f"fused / {name}: memory {a['extra_mb']/b['extra_mb']:.3f}, time {a['seconds']/b['seconds']:.3f}, processor time {a['cpu_seconds']/b['cpu_seconds']:.3f}, "
                  f"loss differs by {abs(a['loss']/b['loss']-1):.1e}, gradients (hidden, weight) by {gradient_error(folder, 'fused', name)}")


if __name__ == "__main__": main()
