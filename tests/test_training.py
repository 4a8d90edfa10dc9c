"Chapter 09: the training loop, its checkpoints, and the two optimizers."
import copy, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from transformers import Trainer
from distillbook.lab.corpora import pack
from distillbook.lab.models import load_model, tiny_qwen3, train_tokenizer
from distillbook.lab.training import MuonAdamW, last_checkpoint, train, where_to_train

TEXTS = ["The quick brown fox returns the sum of two arrays, 12 and 345.\n" * 4, "def area(width, height):\n    return width * height\n" * 4]
TOKENIZER = train_tokenizer(TEXTS, 300)

def small(seed=0, **sizes):
    torch.manual_seed(seed)
    return tiny_qwen3(TOKENIZER, **(dict(hidden_size=32, layers=2, intermediate_size=32, heads=4, kv_heads=2, head_dim=8) | sizes))

def rows(count=24, length=12):
    ids = torch.randint(0, len(TOKENIZER), (count, length), generator=torch.Generator().manual_seed(1))
    return [dict(input_ids=x, labels=x) for x in ids]

FAST = dict(batch_size=4, precision="float32", log_steps=1, progress=False, device="cpu")

def weights(model): return torch.cat([w.detach().flatten() for w in model.parameters()])

def test_training_learns_and_says_nothing(capfd):
    history = train(small(), rows(8), None, steps=30, learning_rate=1e-2, **FAST)
    assert history["loss"][-1] < history["loss"][0] - .5 and history["step"] == list(range(1, 31))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")

def test_bfloat16_stays_near_float32():
    full, half = (train(small(), rows(8), None, steps=5, **FAST | dict(precision=p))["loss"] for p in ("float32", "bfloat16"))
    assert full == pytest.approx(half, rel=.01)

def test_accumulation_is_exact_on_ragged_rows():
    ragged = [{k: v[:4 + i % 8] for k, v in row.items()} for i, row in enumerate(rows(8))]
    models = small(), small()
    whole = train(models[0], ragged, None, steps=4, **FAST | dict(batch_size=8))
    parts = train(models[1], ragged, None, steps=4, accumulation=8, **FAST | dict(batch_size=1))
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), atol=1e-4, rtol=1e-3)

def test_packed_rows_train_as_they_would_alone():
    documents = [row["input_ids"].tolist() for row in rows(4)]
    packed = train(small(), pack(documents, 48), None, steps=3, **FAST | dict(batch_size=1))
    alone = train(small(), pack(documents, 12), None, steps=3, **FAST)
    assert packed["loss"] == pytest.approx(alone["loss"], rel=1e-5)

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_ends_where_the_whole_run_ends(tmp_path, optimizer):
    options = dict(steps=12, save_steps=4, optimizer=optimizer, **FAST)
    whole = train(first := small(), rows(), tmp_path, **options)
    assert sorted(f.name for f in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    (tmp_path/"checkpoint-12"/"trainer_state.json").write_text("{")       # killed while it was written
    assert last_checkpoint(tmp_path).name == "checkpoint-8"
    resumed = train(second := small(), rows(), tmp_path, **options)
    assert resumed["resumed_from"] == 8 and resumed["loss"] == whole["loss"]
    assert torch.equal(weights(first), weights(second))
    done = train(third := small(), rows(), tmp_path, **options)
    assert done["resumed_from"] == 12 and done["loss"] == whole["loss"] and torch.equal(weights(first), weights(third))

@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json"])
def test_a_checkpoint_without_a_part_is_skipped(tmp_path, missing):
    train(small(), rows(), tmp_path, steps=4, save_steps=2, **FAST)
    (tmp_path/"checkpoint-4"/missing).unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"

def test_another_runs_checkpoints_are_not_continued(tmp_path):
    train(small(), rows(), tmp_path, steps=4, **FAST)
    with pytest.raises(ValueError, match="learning_rate was 0.001, is 0.01.*resume=False"): train(small(), rows(), tmp_path, steps=4, learning_rate=.01, **FAST)
    with pytest.raises(ValueError, match="data was"): train(small(), rows()[1:] + rows()[:1], tmp_path, steps=4, **FAST)
    labels = [*rows()[:-1], dict(rows()[-1], labels=torch.full_like(rows()[-1]["labels"], -100))]
    with pytest.raises(ValueError, match="data was"): train(small(), labels, tmp_path, steps=4, **FAST)
    other = small()
    with torch.no_grad(): other.model.norm.weight[-1] += .1
    with pytest.raises(ValueError, match="start was"): train(other, rows(), tmp_path, steps=4, **FAST)
    with pytest.raises(ValueError, match="arguments was"): train(small(), rows(), tmp_path, steps=4, **(FAST | dict(arguments=dict(weight_decay=.5))))
    again = train(small(), rows(), tmp_path, steps=4, learning_rate=.01, resume=False, **FAST)
    assert again["resumed_from"] == 0

def test_a_model_stopped_half_way_goes_on_in_the_same_process(tmp_path):
    "Its weights have moved since the training began: the checkpoint's are taken all the same."
    whole = train(first := small(), rows(), None, steps=12, **FAST)
    model, calls = small(), []
    def stop(*given):
        calls.append(1)
        if len(calls) == 10: raise KeyboardInterrupt
    hook = model.model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt): train(model, rows(), tmp_path, steps=12, save_steps=4, **FAST)
    hook.remove()
    resumed = train(model, rows(), tmp_path, steps=12, save_steps=4, **FAST)
    assert resumed["resumed_from"] == 8 and torch.equal(weights(first), weights(model))

def test_nan_stops_with_its_step_and_keeps_what_was_good(tmp_path):
    model, calls = small(), []
    def poison(*given):
        "From the fifth batch on, the weights are no longer numbers."
        calls.append(1)
        if len(calls) > 4:
            with torch.no_grad(): model.model.norm.weight.fill_(float("nan"))
    model.model.register_forward_pre_hook(poison)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d+ of 40.*learning rate.*last good checkpoint is .*checkpoint-\d"):
        train(model, rows(), tmp_path, steps=40, save_steps=2, **FAST)
    kept = load_model(last_checkpoint(tmp_path))
    assert torch.isfinite(weights(kept)).all()

def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="No checkpoint was kept"):
        train(small(), rows(), tmp_path, steps=1, learning_rate=float("inf"), warmup=0, **FAST)
    assert not list(tmp_path.glob("checkpoint-*"))

@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_no_autocast_stays_around_a_trained_model(precision):
    train(model := small(), rows(), None, steps=2, **(FAST | dict(precision=precision)))
    with torch.no_grad(): trained = model(input_ids=rows()[0]["input_ids"][None]).logits
    copy = small()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad(): assert torch.equal(copy.eval()(input_ids=rows()[0]["input_ids"][None]).logits, trained)

def test_devices_that_are_not_there_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "gpu"):
        with pytest.raises(ValueError, match="device"): train(small(), rows(), None, steps=1, device=device)
    monkeypatch.setattr("distillbook.lab.training.pick_device", lambda name: name)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"): where_to_train("cuda:1", "float32")

def test_bad_rows_are_told():
    with pytest.raises(ValueError, match="row 0 of the dataset has no token"): train(small(), [dict(input_ids=[], labels=[])], None, steps=1)
    for ids, labels, said in (([-1, 2], [1, 2], "the token -1"), ([1, 2], [1, 99_999], "the label 99999")):
        with pytest.raises(ValueError, match=said): train(small(), [dict(input_ids=ids, labels=labels)], None, steps=1)
    with pytest.raises(ValueError, match="steps >= 1"): train(small(), rows(), None, steps=0)
    with pytest.raises(ValueError, match="no rows"): train(small(), [], None, steps=1)
    with pytest.raises(ValueError, match="row 0 of the dataset has no labels"): train(small(), [dict(input_ids=torch.tensor([1]))], None, steps=1)
    too_large = dict(input_ids=torch.tensor([9, 9_999]), labels=torch.tensor([9, 9]))
    with pytest.raises(ValueError, match="token 9999, but the model has .*another tokenizer"): train(small(), [too_large], None, steps=1)
    with pytest.raises(ValueError, match="precision 'half'"): train(small(), rows(), None, steps=1, precision="half")
    with pytest.raises(ValueError, match="optimizer 'sgd': use adamw or muon"): train(small(), rows(), None, steps=1, optimizer="sgd")

def test_killed_training_goes_on(tmp_path):
    "kill -9 at two moments; the third call ends where an undisturbed run ends."
    script = tmp_path/"script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_training import *\nmodel = small()\n"
        f"history = train(model, rows(), {str(tmp_path/'run')!r}, steps=120, save_steps=3, **FAST)\n"
        "print(history['resumed_from'], history['loss'][-1], weights(model).double().sum().item())")
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    for wanted in (1, 40):      # kill soon after the first checkpoint, and later, while it writes and trains
        process = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.time() + 540
        while process.poll() is None and time.time() < deadline:
            if any(int(f.name[11:]) >= wanted for f in (tmp_path/"run").glob("checkpoint-*")): break
            time.sleep(.01)
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        process.send_signal(signal.SIGKILL); process.wait()
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    resumed_from, loss, total = done.stdout.split()
    whole = train(model := small(), rows(), None, steps=120, **FAST)
    assert int(resumed_from) > 0
    assert float(loss) == pytest.approx(whole["loss"][-1], rel=1e-5)
    assert float(total) == pytest.approx(weights(model).double().sum().item(), rel=1e-4)

def test_precision_follows_the_rule_of_the_settings(monkeypatch):
    for fast, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("distillbook.lab.training.fast_bfloat16", lambda device: fast)
        assert where_to_train("cpu", "auto") == ("cpu", expected)
        assert where_to_train("cpu", "float32") == ("cpu", "float32") and where_to_train("cpu", "bfloat16") == ("cpu", "bfloat16")

# Muon

def muon_step(model, optimizer, row):
    optimizer.zero_grad()
    model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
    optimizer.step()

def test_muon_learns():
    history = train(small(), rows(8), None, steps=30, learning_rate=1e-2, optimizer="muon", **FAST)
    assert history["loss"][-1] < history["loss"][0] - .5

@pytest.mark.parametrize("more", [{}, dict(nesterov=False), dict(ns_steps=3), dict(adjust_lr_fn="original")])
@pytest.mark.parametrize("quick", [True, False])
def test_muon_steps_like_torch_with_and_without_bfloat16(monkeypatch, quick, more):
    import distillbook.lab.training as module
    monkeypatch.setattr(module, "fast_bfloat16", lambda *_: quick)
    draw = torch.Generator().manual_seed(1)
    start, gradients = [torch.randn(24, 40, generator=draw) for _ in range(2)], [[torch.randn(24, 40, generator=draw) for _ in range(2)] for _ in range(4)]
    ends = []
    for kind in (module.Muon, torch.optim.Muon):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = kind(weights, **(dict(lr=.02, weight_decay=.1, adjust_lr_fn="match_rms_adamw") | more))
        for both in gradients:
            for w, g in zip(weights, both): w.grad = g.clone()
            optimizer.step()
        ends.append([w.detach() for w in weights])
        assert set(optimizer.state[weights[0]]) == {"momentum_buffer"}
    for ours, theirs, w in zip(*ends, start): assert (ours - theirs).norm() <= (0. if quick else .05)*(theirs - w).norm()

@pytest.mark.parametrize("quick", [True, False])
def test_a_matrix_without_gradient_is_only_decayed(monkeypatch, quick):
    import distillbook.lab.training as module
    monkeypatch.setattr(module, "fast_bfloat16", lambda *_: quick)
    weight = torch.nn.Parameter(torch.ones(6, 8)); weight.grad = torch.zeros(6, 8)
    module.Muon([weight], lr=.1, weight_decay=.5, adjust_lr_fn="match_rms_adamw").step()
    assert torch.allclose(weight.detach(), torch.full((6, 8), .95))

@pytest.mark.parametrize("tied", [True, False])
def test_tables_and_norms_are_not_given_to_muon(tied):
    model = small()
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    names = {id(weight): name for name, weight in model.named_parameters()}
    muon, adamw = [{names[id(w)] for group in part.param_groups for w in group["params"]} for part in MuonAdamW(model, 1e-3).parts]
    assert not muon & adamw and muon | adamw == set(names.values())
    assert muon == {name for name in names.values() if "_proj" in name}
    assert ("lm_head.weight" in adamw) == (not tied) and "model.embed_tokens.weight" in adamw and "model.norm.weight" in adamw

def test_muons_settings_are_those_of_the_call():
    found = {}
    class Looks(Trainer):
        def create_optimizer(self, *args, **kwargs):
            found.update({type(part).__name__: part.param_groups[0]["weight_decay"] for part in self.optimizer.parts})
            return self.optimizer
    train(small(), rows(8), None, steps=1, optimizer="muon", trainer_class=Looks, arguments=dict(weight_decay=.3), **FAST)
    assert found == {"Muon": .3, "AdamW": 0.}

def test_the_state_of_both_parts_round_trips(tmp_path):
    first = small(); optimizer = MuonAdamW(first, 1e-2)
    for row in rows(3): muon_step(first, optimizer, row)
    torch.save(optimizer.state_dict(), tmp_path/"optimizer.pt")
    second = copy.deepcopy(first); loaded = MuonAdamW(second, 1e-2)
    loaded.load_state_dict(torch.load(tmp_path/"optimizer.pt", weights_only=True))
    for model, each in ((first, optimizer), (second, loaded)): muon_step(model, each, rows(4)[3])
    assert torch.equal(weights(first), weights(second))
    forgetful = small(); forgetful.load_state_dict(first.state_dict())
    fresh = MuonAdamW(forgetful, 1e-2)
    for model, each in ((first, optimizer), (forgetful, fresh)): muon_step(model, each, rows(5)[4])
    assert not torch.equal(weights(first), weights(forgetful)), "the state makes no difference, so this test would see nothing"

def test_a_state_of_another_optimizer_is_refused():
    model = small()
    adamw = torch.optim.AdamW(model.parameters(), 1e-3)
    with pytest.raises(ValueError, match="not that of a MuonAdamW of 2 parts: it has state, param_groups"): MuonAdamW(model, 1e-3).load_state_dict(adamw.state_dict())

def test_a_model_without_matrices_to_train_is_told():
    model = small()
    for name, weight in model.named_parameters(): weight.requires_grad_("_proj" not in name)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no matrix to train inside its layers .*optimizer='adamw'"): train(model, rows(), None, steps=1, optimizer="muon", **FAST)

def test_a_model_with_nothing_but_matrices_to_train_has_muon_alone():
    model = small()
    for name, weight in model.named_parameters(): weight.requires_grad_("_proj" in name)
    before = weights(model)
    optimizer = MuonAdamW(model, 1e-2)
    muon_step(model, optimizer, rows(1)[0])
    changed = {name for (name, weight), old in zip(model.named_parameters(), before.split([w.numel() for w in model.parameters()])) if not torch.equal(weight.flatten(), old)}
    assert len(optimizer.parts) == 1 and changed == {name for name, _ in model.named_parameters() if "_proj" in name}
    again = MuonAdamW(model, 1e-2); again.load_state_dict(optimizer.state_dict())

@pytest.mark.parametrize("first, second", [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_is_not_continued_by_the_other_optimizer(tmp_path, first, second):
    train(small(), rows(), tmp_path, steps=4, optimizer=first, **FAST)
    with pytest.raises(ValueError, match=f"optimizer was {first}, is {second}.*resume=False"): train(small(), rows(), tmp_path, steps=4, optimizer=second, **FAST)
    assert last_checkpoint(tmp_path).name == "checkpoint-4"

def test_two_optimizers_at_once_are_refused(tmp_path):
    model = small()
    given = (torch.optim.SGD(model.parameters(), 1e-2), None)
    with pytest.raises(ValueError, match="optimizer='muon' and optimizers=.*leave one"): train(model, rows(), tmp_path, steps=1, optimizer="muon", optimizers=given, **FAST)
    assert not list(tmp_path.iterdir())
    history = train(model, rows(), None, steps=2, optimizers=given, **FAST)      # without muon the one given is used
    assert len(history["loss"]) == 2

def test_muons_closure_is_called_and_its_loss_comes_back():
    model = small(); row = rows(1)[0]
    optimizer = MuonAdamW(model, 1e-2)
    def closure():
        loss = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
        loss.backward()
        return loss
    before = weights(model)
    assert optimizer.step(closure).item() > 0 and not torch.equal(weights(model), before)
