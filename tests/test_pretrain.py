"Chapter 30: rows of raw text, the mix, and resumed reading."
import pytest, torch
from hypothesis import given, strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from distillbook.adapt.pretrain import (continue_pretraining, document_rows, domain_texts, fact_texts,
    general_texts, general_tokens, mixed_rows, rows_of_tokens)
from distillbook.lab.corpora import collate
from distillbook.lab.evaluate import perplexity
from distillbook.lab.microworld import examples, invent_names, world
from distillbook.lab.models import train_tokenizer

TEXT = "The quick brown fox returns the sum of two arrays, 12 and 345: naïve, größer, 日本. "
TOKENIZER = train_tokenizer([TEXT*4], 300)
GENERAL = [TEXT + f"Number {i}." for i in range(12)]
DOMAIN = [f"The tibia of the patella is a fibula, case {i}. Größenwahn." for i in range(20)]

def small():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True)).eval()

def size(rows): return sum(len(row["input_ids"]) for row in rows)
def tens(token, *sizes): return [dict(input_ids=[token]*n, labels=[token]*n) for n in sizes]

# texts

def test_facts_are_those_of_the_world_and_differ_from_seed_to_seed():
    known, names = world(1).facts["medical"], world(1).entities("medical", "all", 1)
    told = " ".join(fact_texts("medical", 200, 3))
    assert sum(name in told for name in known) == len(names) == sum(name in told for name in names)
    assert fact_texts("medical", 5, 3) == fact_texts("medical", 5, 3) != fact_texts("medical", 5, 4)
    assert not any(name in told for name in world(0).facts["medical"])

def test_every_fact_of_the_exam_is_stated():
    told = " ".join(fact_texts("medical", 320, "train 0"))
    for item in examples("medical", 200, "test", 5, 1, world_seed=1, asked="all"):
        assert any(item["entity"] in s and item["value"] in s for s in told.split(". ")), item["answer"]

def test_a_folder_of_texts_is_a_domain(tmp_path):
    for i in range(5): (tmp_path/f"{i}.txt").write_text("\n\n".join(" ".join(invent_names(300, seed=10*i + k)) for k in range(3)))
    train, test = domain_texts(str(tmp_path)), domain_texts(str(tmp_path), "test")
    assert train and test and not set(train) & set(test) and domain_texts(str(tmp_path), n=2, seed=1) == domain_texts(str(tmp_path), n=2, seed=1)

def test_domains_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="no file or folder here, no installed package"): domain_texts("nowhere")
    with pytest.raises(ValueError, match="no text files"): domain_texts(str(tmp_path))
    with pytest.raises(ValueError, match="train or test"): domain_texts("medical", "validation")

def test_general_text_of_training_is_not_that_of_the_test():
    train, test = general_texts("train", 20_000, 1), general_texts("test", 20_000, 1)
    assert not set(train) & set(test) and train == general_texts("train", 20_000, 1) != general_texts("train", 20_000, 2)
    assert 18_000 < sum(map(len, train)) < 60_000

# rows

def test_a_document_in_a_row_is_read_as_if_it_were_alone():
    model = small()
    row, = document_rows(DOMAIN[:2], TOKENIZER, 128)
    alone, = document_rows(DOMAIN[1:2], TOKENIZER, 128)
    batch = collate([row]); batch.pop("labels")
    n = len(alone["input_ids"])
    with torch.no_grad():
        apart, single = model(**batch).logits[0, -n:], model(torch.tensor([alone["input_ids"]])).logits[0]
        together = model(torch.tensor([row["input_ids"]])).logits[0, -n:]
    assert torch.allclose(apart, single, atol=1e-5) and (together - single).abs().max() > 1e-3

def test_rows_hold_every_document_with_its_ends():
    rows = document_rows(DOMAIN, TOKENIZER, 50)
    end = TOKENIZER.eos_token_id
    assert max(len(r["input_ids"]) for r in rows) <= 50
    assert TOKENIZER.decode([t for r in rows for t in r["input_ids"] if t != end]) == "".join(DOMAIN)
    assert sum(t == end for r in rows for t in r["input_ids"]) == 2*len(DOMAIN)

def test_a_written_end_token_is_text():
    rows = document_rows(["a<|endoftext|>b"], TOKENIZER, 64)
    assert rows[0]["input_ids"].count(TOKENIZER.eos_token_id) == 2

@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_nothing_to_read(texts):
    with pytest.raises(ValueError, match="no text to read"): document_rows(texts, TOKENIZER)

# the mix

@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.lists(st.integers(1, 40), min_size=1, max_size=8), st.floats(0, 0.9), st.integers(0, 9))
def test_the_share_is_right_at_every_place(domain, general, share, seed):
    rows = mixed_rows(tens(1, *domain), tens(2, *general), share, seed)
    assert [len(r["input_ids"]) for r in rows if r["input_ids"][0] == 1] == domain      # nothing of the domain is lost or moved
    read = [0, 0]
    for i, row in enumerate(rows):
        read[row["input_ids"][0] - 1] += len(row["input_ids"])
        if i + 1 == len(rows) or rows[i+1]["input_ids"][0] == 1: assert abs(read[1] - general_tokens(read[0], share)) <= max(general)/2 + 1e-9
    assert rows == mixed_rows(tens(1, *domain), tens(2, *general), share, seed)

def test_general_rows_come_again_in_another_order():
    general = [dict(input_ids=[i]*10, labels=[i]*10) for i in range(5)]
    drawn = [r["input_ids"][0] for r in mixed_rows(tens(9, *[10]*20), general, 0.5, 2) if r["input_ids"][0] < 9]
    assert len(drawn) == 20 and all(sorted(drawn[i:i+5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5)) and len({tuple(drawn[i:i+5]) for i in range(0, 20, 5)}) > 1

@pytest.mark.parametrize("share, general, said", [(1., 3, "nothing of the domain"), (-.1, 3, "in \\[0, 1\\)"), (.1, 0, "no general rows")])
def test_mixes_that_cannot_be(share, general, said):
    with pytest.raises(ValueError, match=said): mixed_rows(tens(1, 5), tens(2, *[4]*general), share)

@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 900))
def test_rows_of_a_number_of_tokens(sizes, tokens):
    got = size(rows_of_tokens(tens(1, *sizes), tokens, 1))
    assert abs(got - tokens) <= max(max(sizes)/2, max(sizes) - min(tokens, max(sizes)))

def test_no_rows_and_no_tokens():
    for rows, tokens in ((tens(1, 3), 0), ([], 5)):
        with pytest.raises(ValueError, match="at least one of each"): rows_of_tokens(rows, tokens)

# training

class Stop(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step: raise KeyboardInterrupt

def read(folder=None, stop=None, share=0.2, **more):
    model = small()
    usual = dict(tokens=300, learning_rate=1e-2, length=40, batch_size=2, seed=5, precision="float32", progress=False, log_steps=1)
    told = continue_pretraining(model, TOKENIZER, DOMAIN, GENERAL, share, folder=folder, callbacks=[Stop(stop)] if stop else [], **(usual | more))
    return model, told

@pytest.mark.parametrize("stop", [1, 3, 4])
def test_killed_and_resumed_is_as_if_never_killed(tmp_path, stop):
    whole, told = read()
    with pytest.raises(KeyboardInterrupt): read(tmp_path, stop, save_steps=2)
    again, resumed = read(tmp_path, save_steps=2)
    assert resumed["resumed_from"] == (stop - 1)//2*2 and told["steps"] == resumed["steps"] >= 5
    assert resumed["loss"][-1] == pytest.approx(told["loss"][-1], abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))

def test_another_share_does_not_go_on_from_these_checkpoints(tmp_path):
    with pytest.raises(KeyboardInterrupt): read(tmp_path, 3, save_steps=2)
    with pytest.raises(ValueError, match="another run"): read(tmp_path, share=0.4, save_steps=2)

def test_reading_teaches_and_counts():
    model, told = read(tokens=900)
    before, after = (perplexity(m, DOMAIN, TOKENIZER, 64)["nats_per_token"] for m in (small(), model))
    assert after < before - 0.5 and abs(told["domain_tokens"] - 900) <= 20 and abs(told["general_tokens"] - 225) <= 20

def test_all_rows_of_the_mix_are_read_in_order(monkeypatch):
    import distillbook.adapt.pretrain as module
    seen, mixed = [], []
    kept = module.collate
    monkeypatch.setattr(module, "collate", lambda rows: (seen.extend(rows), kept(rows))[1])
    made = module.mixed_rows
    monkeypatch.setattr(module, "mixed_rows", lambda *a: (mixed.extend(rows := made(*a)), rows)[1])
    read()
    assert len(mixed) > 4
    assert [r["input_ids"] for r in seen[:len(mixed)]] == [r["input_ids"] for r in mixed]

@pytest.mark.parametrize("more, said", [(dict(length=500), "the model's context"), (dict(length=1), "2 to 128"), (dict(share=1.), "nothing of the domain")])
def test_readings_that_cannot_be(more, said):
    with pytest.raises(ValueError, match=said): read(**more)
