"Chapter 21: the trainer with a teacher."
import copy, json, math, os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from transformers import (CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM,
    PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments)
from tokenizers import Tokenizer
from conftest import ROOT, environment
from distillbook.distill.logit_kd import DistillTrainer, TeacherStates, distill, last_hidden, model_fingerprint, output_weight, random_student
from distillbook.distill.losses import distill_loss
from distillbook.lab.corpora import FixedChunks, load_corpus, tokenize_corpus
from distillbook.lab.evaluate import perplexity
from distillbook.lab.models import load_model, load_tokenizer, train_tokenizer
from distillbook.lab.training import train

TOKENIZER = train_tokenizer(["The quick brown fox returns the sum of two arrays, 12 and 345.\n" * 4], 300)
SIZE = len(TOKENIZER)
PLAIN = dict(optim="sgd", max_grad_norm=0., weight_decay=0., lr_scheduler_type="constant")
PAIR = dict(tokenizer=TOKENIZER, teacher_tokenizer=TOKENIZER)

def small(seed=0, width=32, vocabulary=SIZE, layers=1):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, intermediate_size=32,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True))

TEACHER = small(seed=7, width=48, layers=2).eval()
with torch.no_grad():
    for p in TEACHER.parameters(): p.mul_(3)      # opinions, where random weights have almost none

def ids(length, seed): return torch.randint(0, SIZE, (length,), generator=torch.Generator().manual_seed(seed))
RAGGED = [dict(input_ids=ids(n, n).tolist(), labels=[-100]*(n//3) + ids(n, n).tolist()[n//3:]) for n in (4, 30, 9, 25, 6, 17, 12, 28)]
EVEN = [dict(input_ids=ids(24, n), labels=ids(24, n)) for n in range(16)]

def gradient(batch_size, accumulation, rows=RAGGED, student=None, teacher=TEACHER, **options):
    "Of one step, as plain SGD with rate 1 takes it off the weights."
    student = student or small()
    before = student.lm_head.weight.detach().clone()
    distill(student, teacher, rows, None, 1, learning_rate=1., batch_size=batch_size, accumulation=accumulation, warmup=0, precision="float32",
            progress=False, arguments=PLAIN, **(PAIR | options))
    return before - student.lm_head.weight.detach()

def gap(a, b): return ((a - b).norm()/b.norm()).item()

# gradients

@pytest.mark.parametrize("kind", ["ce", "kl", "hybrid", "reverse", "jsd", "skew", "auto"])
def test_parts_of_a_batch_add_up(kind):
    "1 x 8 and 8 x 1 on ragged rows, plain and fused."
    whole = gradient(8, 1, kind=kind, fused=False)
    assert whole.norm() > 1e-4
    for rows, parts, fused in ((1, 8, False), (4, 2, False), (8, 1, True), (1, 8, True)):
        assert gap(gradient(rows, parts, kind=kind, fused=fused), whole) < 1e-4, (rows, parts, fused)

def test_gradient_is_that_of_the_loss_over_all_tokens():
    from distillbook.lab.corpora import collate
    student, batch = small(), collate(RAGGED)
    labels = batch.pop("labels")
    with torch.no_grad(): told = TEACHER(**batch).logits
    distill_loss(student(**batch).logits, told, labels, temperature=3., alpha=0.3).backward()
    assert gap(gradient(2, 4, temperature=3., alpha=0.3), student.lm_head.weight.grad) < 1e-4

def test_a_row_without_labels_changes_nothing():
    empty = dict(input_ids=[1, 2, 3], labels=[-100]*3)
    assert gap(gradient(1, 9, rows=RAGGED + [empty]), gradient(8, 1)) < 1e-4

@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_in_which_nothing_counts_does_not_end_the_run(fused):
    "Trainer hands the loss a count of 0 there. The step changes nothing, and the next one goes on."
    empty = [dict(input_ids=ids(9, n), labels=torch.full((9,), -100)) for n in range(4)]
    assert not gradient(4, 1, rows=empty, fused=fused).any()
    student = small()
    history = distill(student, TEACHER, empty, None, 2, batch_size=2, precision="float32", progress=False, fused=fused, log_steps=1, **PAIR)
    assert history["loss"] == [0, 0] and all(p.isfinite().all() for p in student.parameters())

def test_cross_entropy_alone_is_transformers_trainer():
    one, other = small(), small()
    usual = dict(steps=4, batch_size=4, learning_rate=1e-2, precision="float32", progress=False)
    distill(one, None, EVEN, None, tokenizer=TOKENIZER, kind="ce", fused=False, **usual)
    train(other, EVEN, None, **usual)
    assert torch.allclose(one.lm_head.weight, other.lm_head.weight, atol=1e-6)

def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    assert gradient(8, 1, student=copy.deepcopy(TEACHER), kind="kl").abs().max() < 1e-5

@pytest.mark.parametrize("fused", [False, True])
def test_padded_vocabulary_changes_nothing(fused):
    "Columns beyond the tokenizer's tokens, a different number in each model, with weights that would get mass."
    def padded(model, extra):
        wide = small(width=model.config.hidden_size, vocabulary=SIZE + extra, layers=model.config.num_hidden_layers)
        state = model.state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"): state[name] = torch.cat([state[name], torch.full((extra, state[name].shape[1]), 0.9)])
        wide.load_state_dict(state)
        return wide
    plain = gradient(8, 1, fused=fused)
    wide = gradient(8, 1, student=padded(small(), 5), teacher=padded(TEACHER, 12).eval(), fused=fused)
    assert gap(wide[:SIZE], plain) < 1e-4 and wide[SIZE:].abs().max() < 1e-6

# the teacher

def test_the_teacher_neither_changes_nor_drops_out():
    torch.manual_seed(0)
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=1, n_head=4, n_positions=128, embd_pdrop=0.5, resid_pdrop=0.5)).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    first, again = (gradient(8, 1, teacher=teacher) for _ in range(2))
    assert torch.equal(first, again) and not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())

def test_kept_states_teach_what_the_live_teacher_does():
    live, kept = gradient(8, 1, rows=EVEN[:8]), gradient(8, 1, rows=TeacherStates(EVEN[:8], TEACHER, batch_size=3))
    assert gap(kept, live) < 0.02      # the states are kept in bfloat16

@pytest.mark.parametrize("model", [small(), GPT2LMHeadModel(GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=1, n_head=4, n_positions=64)).eval()], ids=["qwen3", "gpt2"])
def test_last_hidden_is_what_the_output_layer_receives(model):
    model.eval()
    inputs = dict(input_ids=ids(20, 1)[None])
    with torch.no_grad(): assert torch.allclose(last_hidden(model, inputs) @ output_weight(model).T, model(**inputs).logits, atol=1e-5)

class Warmed(Qwen3ForCausalLM):
    "Scales its logits by a number that no config names."
    def forward(self, input_ids=None, logits_to_keep=0, **options):
        output = super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **options)
        output.logits = output.logits / 1.5
        return output

class Narrowed(Qwen3ForCausalLM):
    "Does something between the last hidden state and the output layer."
    def forward(self, input_ids=None, logits_to_keep=0, **options):
        output = self.model(input_ids=input_ids, **options)
        output.logits = self.lm_head(output.last_hidden_state * 0.5)
        return output

SIZES = dict(vocab_size=SIZE, hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
MORE = {"a cap": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.)), "a scale or a cap: [23]"),
        "a scale": (lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625)), "a scale or a cap: 6.2"),
        "a divisor": (lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.)), "a scale or a cap: 12"),
        "a bias": (lambda: PhiForCausalLM(PhiConfig(**SIZES)), "a bias"),
        "a scale without a name": (lambda: Warmed(small().config), "a scale or a cap: 6[67]"),
        "before the layer": (lambda: Narrowed(small().config), "does not receive the last hidden states")}

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make, said", MORE.values(), ids=MORE)
def test_output_layers_that_do_more_are_refused(make, said, dtype):
    torch.manual_seed(0)
    model = make().to(dtype)
    if "bias" in said: torch.nn.init.ones_(model.lm_head.bias)
    with pytest.raises(ValueError, match=said): output_weight(model)
    with pytest.raises(ValueError, match=said): TeacherStates(EVEN, model)

def test_a_plain_product_passes_in_any_type_and_mode():
    "The model is left as it was: its mode, its hooks, its weights."
    for dtype in (torch.float32, torch.bfloat16):
        model = small().to(dtype).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert output_weight(model) is model.lm_head.weight and model.training and not model.lm_head._forward_pre_hooks
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

def test_states_in_a_file_are_those_in_memory_and_the_teacher_is_asked_once(tmp_path, monkeypatch):
    import distillbook.distill.logit_kd as module
    asked, whole = [], module._ask
    monkeypatch.setattr(module, "_ask", lambda *a: asked.append(1) or whole(*a))
    memory, first, again = TeacherStates(EVEN, TEACHER, 3), TeacherStates(EVEN, TEACHER, 5, folder=tmp_path), TeacherStates(EVEN, TEACHER, folder=tmp_path)
    assert len(asked) == 2 and torch.equal(memory.hidden, first.hidden) and torch.equal(first.hidden, again.hidden)
    TeacherStates(EVEN[1:] + EVEN[:1], TEACHER, folder=tmp_path)
    TeacherStates(EVEN, small(seed=8, width=48, layers=2), folder=tmp_path)
    assert len(asked) == 4

def test_states_of_one_teacher_are_not_read_with_the_output_layer_of_another():
    states = TeacherStates(EVEN, TEACHER)
    with pytest.raises(ValueError, match="the data hold the states of teacher"): distill(small(), small(seed=8, width=48), states, None, 1, **PAIR)

def test_fingerprints_tell_models_apart(tmp_path):
    assert model_fingerprint(None) is None
    assert model_fingerprint(small()) == model_fingerprint(small()) != model_fingerprint(small(seed=1))
    TEACHER.save_pretrained(tmp_path)
    assert model_fingerprint(Qwen3ForCausalLM.from_pretrained(tmp_path)) == model_fingerprint(TEACHER)
    changed = copy.deepcopy(TEACHER)
    with torch.no_grad(): changed.model.layers[1].mlp.down_proj.weight.add_(1e-3)
    assert model_fingerprint(changed) != model_fingerprint(TEACHER)
    last = copy.deepcopy(TEACHER)
    with torch.no_grad(): last.model.embed_tokens.weight[-1, -1] += 1
    assert model_fingerprint(last) != model_fingerprint(TEACHER)

def test_kept_states_and_the_teacher_itself_give_one_gradient_in_float32():
    "Only the rounding of the states lies between them, none of the product's."
    live, kept = (gradient(16, 1, rows=data, fused=fused) for data, fused in ((EVEN, True), (TeacherStates(EVEN, TEACHER), True)))
    plain = gradient(16, 1, rows=TeacherStates(EVEN, TEACHER), fused=False)
    assert gap(kept, live) < 5e-3 and gap(plain, kept) < 1e-5

def test_only_the_last_layers_states_are_kept():
    asked = []
    hook = TEACHER.model.layers[0].register_forward_hook(lambda module, given, output: asked.append(module))
    batch = torch.stack([row["input_ids"] for row in EVEN[:2]])
    with torch.no_grad():
        found, whole = last_hidden(TEACHER, dict(input_ids=batch)), TEACHER(input_ids=batch, output_hidden_states=True)
    hook.remove()
    assert len(asked) == 2 and torch.equal(found, whole.hidden_states[-1]) and not TEACHER.model._forward_hooks

def test_evaluation_is_plain_cross_entropy(tmp_path):
    student = small()
    distill(student, TEACHER, EVEN, tmp_path, 2, batch_size=4, precision="float32", progress=False, eval_dataset=EVEN,
            arguments=dict(eval_strategy="steps", eval_steps=2), **PAIR)
    log = json.loads((tmp_path/"checkpoint-2"/"trainer_state.json").read_text())["log_history"]
    batch = torch.stack([row["input_ids"] for row in EVEN])
    with torch.no_grad(): expected = distill_loss(student(batch).logits, None, batch, kind="ce")
    assert [row["eval_loss"] for row in log if "eval_loss" in row][-1] == pytest.approx(expected.item(), abs=1e-4)

# what is refused

def shuffled_tokenizer():
    "As many tokens, other numbers."
    data = json.loads(TOKENIZER.backend_tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    tokens = [t for t in vocabulary if t not in TOKENIZER.all_special_tokens and not t.startswith("<|")]
    numbers = [vocabulary[t] for t in tokens]
    for token, number in zip(tokens, numbers[1:] + numbers[:1]): vocabulary[token] = number
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="<|endoftext|>")

def test_equal_size_is_not_an_equal_vocabulary():
    other = shuffled_tokenizer()
    assert len(other) == SIZE
    with pytest.raises(ValueError, match="two vocabularies"): distill(small(), TEACHER, EVEN, None, 1, TOKENIZER, other)

def test_what_is_wrong_is_said_before_training(tmp_path):
    for error, options in {"give both tokenizers": dict(teacher_tokenizer=None), "kind 'klx'": dict(kind="klx"), "needs a teacher": dict(teacher=None)}.items():
        with pytest.raises(ValueError, match=error): distill(**(dict(student=small(), teacher=TEACHER, data=EVEN, folder=None, steps=1) | PAIR | options))
    with pytest.raises(ValueError, match="one object"): distill(TEACHER, TEACHER, EVEN, None, 1, **PAIR)
    with pytest.raises(ValueError, match="output columns"): distill(small(), small(vocabulary=SIZE-1), EVEN, None, 1, **PAIR)
    with pytest.raises(FileNotFoundError, match="nowhere"): distill(small(), tmp_path/"nowhere", EVEN, None, 1, TOKENIZER)

def test_the_fused_loss_refuses_several_gpus_in_one_process(monkeypatch):
    "DataParallel copies the model; the fused loss would read the weights of the first copy only."
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="accelerate launch"): distill(small(), TEACHER, EVEN, None, 1, **PAIR)

def test_a_loss_that_is_not_a_number_names_the_step():
    broken = copy.deepcopy(TEACHER)
    with torch.no_grad(): broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 1"): distill(small(), broken, EVEN, None, 3, batch_size=4, progress=False, **PAIR)

def test_checkpoints_of_another_loss_are_refused(tmp_path):
    usual = dict(data=EVEN, folder=tmp_path, steps=2, batch_size=4, progress=False, **PAIR)
    distill(small(), TEACHER, **usual)
    distill(small(), TEACHER, **usual)                                   # the same again only loads
    with pytest.raises(ValueError, match="temperature was 2.0, is 3.0"): distill(small(), TEACHER, temperature=3., **usual)
    with pytest.raises(ValueError, match="kind was hybrid, is kl"): distill(small(), TEACHER, kind="kl", **usual)
    with pytest.raises(ValueError, match="reverse"): distill(small(), TEACHER, loss_options=dict(divergence="reverse"), **usual)
    distill(small(), TEACHER, temperature=3., resume=False, **usual)

def test_checkpoints_of_another_teacher_are_refused(tmp_path):
    usual = dict(data=EVEN, folder=tmp_path, steps=2, batch_size=4, progress=False, **PAIR)
    distill(small(), TEACHER, **usual)
    with pytest.raises(ValueError, match=f"{model_fingerprint(TEACHER)}.*another folder"): distill(small(), small(seed=8, width=48, layers=2), **usual)

def test_a_random_student_takes_sizes_and_no_weights(tmp_path):
    TEACHER.save_pretrained(tmp_path)
    one, same, other = (random_student(str(tmp_path), TOKENIZER, seed) for seed in (1, 1, 2))
    assert one.num_parameters() == TEACHER.num_parameters() and torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight) and not torch.equal(one.lm_head.weight, TEACHER.lm_head.weight)

def test_a_random_student_has_no_column_without_a_token(tmp_path):
    "Such a column would get no gradient, and a perplexity over all columns would count it."
    small(vocabulary=SIZE + 40).save_pretrained(tmp_path)
    student = random_student(str(tmp_path), TOKENIZER)
    assert student.config.vocab_size == len(student.lm_head.weight) == SIZE
    small(vocabulary=SIZE - 1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"room for {SIZE - 1} tokens"): random_student(str(tmp_path), TOKENIZER)

CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_logit_kd as t
from distillbook.distill.logit_kd import distill
student = t.small()
history = distill(student, t.TEACHER, t.EVEN, {folder!r}, {steps}, batch_size={rows}, save_steps={often}, learning_rate=1e-2, precision="float32",
                  device="cpu", progress=False, **{more}, **t.PAIR)
if torch.distributed.is_initialized() and torch.distributed.get_rank(): sys.exit()
torch.save((student.state_dict(), history["loss"]), {result!r})
"""

def child(tmp_path, name, steps=24, rows=4, often=2, more=None):
    script = tmp_path/f"{name}.py"
    script.write_text(CHILD.format(tests=str(ROOT/"tests"), folder=str(tmp_path/name), steps=steps, rows=rows, often=often, more=more or {}, result=str(tmp_path/f"{name}.result")))
    return script

def result(tmp_path, name): return torch.load(tmp_path/f"{name}.result", weights_only=True)

def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path):
    "kill -9 at random moments between the first checkpoint and the end, then once more to the end."
    quiet = dict(env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    subprocess.run([sys.executable, child(tmp_path, "whole")], check=True, timeout=300, **quiet)
    script, kills, chance = child(tmp_path, "killed"), 0, random.Random(0)
    for wait in (0.0, 0.05, 0.15, 0.3, 0.02):
        process = subprocess.Popen([sys.executable, script], **quiet)
        newest = lambda: max([int(f.name[11:]) for f in (tmp_path/"killed").glob("checkpoint-*")], default=0)
        start = newest()
        deadline = time.monotonic() + 300
        while process.poll() is None and newest() <= start:
            if time.monotonic() > deadline: process.kill(); pytest.fail(f"no new checkpoint after {start} in 300 s: {process.communicate()[1][-2000:]}")
            time.sleep(0.005)
        time.sleep(wait * chance.random())
        if process.poll() is None: process.send_signal(signal.SIGKILL); kills += 1
        process.wait(); process.stderr.close()
    subprocess.run([sys.executable, script], check=True, timeout=300, **quiet)
    assert kills >= 2
    (whole, losses), (killed, their_losses) = result(tmp_path, "whole"), result(tmp_path, "killed")
    assert losses == their_losses and all(torch.equal(value, killed[name]) for name, value in whole.items())

def test_two_processes_give_the_gradient_of_one(tmp_path):
    "By accelerate's own launcher: 2 processes x 2 rows against 1 x 4."
    script = child(tmp_path, "two", steps=3, rows=2, more=dict(seed=3))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run(launch, env=environment(ACCELERATE_USE_CPU="true"), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:6000]      # the child's own words come first, the launcher's after them
    subprocess.run([sys.executable, child(tmp_path, "one", steps=3, rows=4, more=dict(seed=3))], check=True, env=environment(), cwd=ROOT, timeout=300)
    (one, _), (two, _) = result(tmp_path, "one"), result(tmp_path, "two")
    for name, value in one.items(): assert torch.allclose(value, two[name], atol=2e-4), name

# a model that nobody here made

def test_a_real_model_teaches_a_smaller_one(realdata, tmp_path):
    place = realdata/"models"/"stories260K"/"hf"
    teacher, tokenizer = load_model(place), load_tokenizer(place)
    text = (realdata/"text"/"tinystories.txt").read_text(encoding="utf-8")[:900]
    assert perplexity(teacher, [text], tokenizer, length=512, join=False)["nats_per_token"] == pytest.approx(1.4845, abs=1e-3)
    ids = tokenize_corpus(load_corpus(str(realdata/"text"/"tinystories.txt")), tokenizer)
    held = tokenize_corpus(load_corpus(str(realdata/"text"/"tinystories.txt"), "validation"), tokenizer)[:3000]
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path/"sizes")
    student = random_student(str(tmp_path/"sizes"), tokenizer, seed=0)
    assert student.num_parameters() < 0.6*teacher.num_parameters()
    def nats(model): return perplexity(model, held, tokenizer, length=128)["nats_per_token"]
    before = nats(student)
    distill(student, place, FixedChunks(ids, 128), tmp_path/"run", 50, tokenizer, learning_rate=4e-3, batch_size=8, progress=False)
    assert nats(teacher) < nats(student) < before - 1
