"Chapter 04: the tokenizer, models on disk and generation."
import json, os, pickle
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from distillbook.lab.corpora import collate, pack
from distillbook.lab.models import (SPECIAL_TOKENS, bytes_a_token, check_same_vocabulary, encode_prompts, generate,
    load_model, load_tokenizer, model_place, small_student, stop_tokens, tiny_qwen3, to_dtype, train_tokenizer, vocabulary_hash)

TEXTS = ["The quick brown fox returns the sum of two arrays, 12 and 345.\n" * 4, "def area(width, height):\n    return width * height\n" * 4]
TOKENIZER = train_tokenizer(TEXTS, 300)

def small(seed=0, **sizes):
    torch.manual_seed(seed)
    return tiny_qwen3(TOKENIZER, **(dict(hidden_size=32, layers=2, intermediate_size=32, heads=4, kv_heads=2, head_dim=8) | sizes))

def said(text): return [dict(role="user", content=text)]
QUESTIONS = [said("fox"), said("return the sum of two arrays"), said("a"), said("width and height " * 5), said("12 345 12")]

@pytest.fixture
def saved(tmp_path):
    folder = tmp_path/"saved"
    small().save_pretrained(folder); TOKENIZER.save_pretrained(folder)
    return folder

# the tokenizer

@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text

def test_digits_stand_alone_and_bytes_are_counted():
    assert [TOKENIZER.decode([i]) for i in TOKENIZER("345")["input_ids"]] == ["3", "4", "5"]
    assert bytes_a_token(["ï"], train_tokenizer(["a"], 261)) == 1

def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="261"): train_tokenizer(TEXTS, 200)

def test_template_marks_the_replies_and_their_end():
    talk = [dict(role="system", content="Be brief."), *said("One?"), dict(role="assistant", content="1"), *said("Two?"), dict(role="assistant", content="2")]
    out = TOKENIZER.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    assert TOKENIZER.decode([i for i, mark in zip(out["input_ids"], out["assistant_masks"]) if mark]) == "1<|end|>2<|end|>"
    assert TOKENIZER.decode(out["input_ids"]).startswith("<|system|>\nBe brief.<|end|>\n<|user|>\nOne?<|end|>\n<|assistant|>\n1<|end|>\n")
    assert TOKENIZER.decode(encode_prompts(TOKENIZER, [talk[:2]])[0]).endswith("<|user|>\nOne?<|end|>\n<|assistant|>\n")

def test_template_refuses_an_unknown_role():
    with pytest.raises(Exception, match="unknown role tool"): encode_prompts(TOKENIZER, [[dict(role="tool", content="x")]])

def test_tokenizer_survives_saving(saved):
    again = load_tokenizer(saved)
    assert vocabulary_hash(again) == vocabulary_hash(TOKENIZER) and again.chat_template == TOKENIZER.chat_template
    assert [again.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert again.pad_token_id == again.eos_token_id == 0

def test_equal_sizes_are_not_equal_vocabularies():
    other = train_tokenizer(["zebra zoo zoom " * 9, *TEXTS], 300)
    assert len(other) == len(TOKENIZER)
    check_same_vocabulary(TOKENIZER, TOKENIZER)
    with pytest.raises(ValueError, match="for the teacher and .* for the student"): check_same_vocabulary(TOKENIZER, other)

# models

def test_sizes_of_teacher_and_student():
    tokenizer = train_tokenizer(["a"], 261)
    tokens = 4096 - len(tokenizer)
    assert (tiny_qwen3(tokenizer).num_parameters() + 512*tokens)/1e6 == pytest.approx(8.4, abs=.05)
    assert (small_student(tokenizer).num_parameters() + 256*tokens)/1e6 == pytest.approx(1.8, abs=.05)

def test_tied_table_is_stored_once(saved):
    from safetensors import safe_open
    model = load_model(saved)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    with safe_open(saved/"model.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == model.num_parameters()

def test_loaded_is_what_was_saved(saved):
    x = torch.randint(0, len(TOKENIZER), (2, 9))
    with torch.no_grad(): assert torch.equal(load_model(saved)(x).logits, small()(x).logits)
    assert load_model(saved, dtype="bfloat16").dtype == torch.bfloat16

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(attention):
    model = small(); model.set_attn_implementation(attention)
    documents = [torch.randint(0, len(TOKENIZER), (n,)).tolist() for n in (5, 9, 3, 12)]
    with torch.no_grad():
        packed = model(**collate(pack(documents, 32))).logits[0]
        start = 0
        for document in documents:
            torch.testing.assert_close(packed[start:start + len(document)], model(torch.tensor([document])).logits[0], atol=1e-5, rtol=1e-4)
            start += len(document)

def test_missing_models_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no model folder"): load_model(tmp_path/"nothing")
    with pytest.raises(FileNotFoundError, match="no config.json"): load_model(tmp_path)
    (tmp_path/"nbs").mkdir(); (tmp_path/"settings.ini").touch()
    monkeypatch.setenv("DISTILLBOOK_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'teacher'.*make_tiny_models"): model_place("teacher")

def test_a_hub_name_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="nobody/no-such-model"): load_model("nobody/no-such-model")

class Mark:
    "A pickle that makes a folder when it is read."
    def __init__(self, path): self.path = path
    def __reduce__(self): return (os.mkdir, (self.path,))

@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_unread(saved, tmp_path, name):
    (saved/"model.safetensors").unlink()
    (saved/name).write_bytes(pickle.dumps(Mark(str(tmp_path/"was read"))))
    with pytest.raises(ValueError, match=f"{name} is a pickle.*Refused"): load_model(saved)
    assert not (tmp_path/"was read").exists()

def test_missing_weights_and_cut_weights_are_told(saved):
    file = saved/"model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(Exception): load_model(saved)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="weights are missing"): load_model(saved)

def test_code_beside_a_model_is_not_run(saved, tmp_path):
    config = json.loads((saved/"config.json").read_text())
    config |= dict(model_type="homemade", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (saved/"config.json").write_text(json.dumps(config))
    (saved/"code.py").write_text(f"import os; os.mkdir({str(tmp_path/'was run')!r})")
    with pytest.raises(ValueError): load_model(saved)
    assert not (tmp_path/"was run").exists()

# generation

def test_a_batch_changes_no_reply():
    model = small()
    alone = generate(model, TOKENIZER, QUESTIONS, 8, batch_size=1, progress=False)
    assert generate(model, TOKENIZER, QUESTIONS, 8, batch_size=16, progress=False) == alone
    assert generate(model, TOKENIZER, QUESTIONS[::-1], 8, batch_size=2, progress=False) == alone[::-1]

def test_greedy_equals_the_loop_by_hand():
    model, prompt = small(), encode_prompts(TOKENIZER, ["def area"])[0]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(8): ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert generate(model, TOKENIZER, ["def area"], 8) == [TOKENIZER.decode(ids[len(prompt):], skip_special_tokens=True)]

def test_a_reply_ends_at_a_stop_token():
    model = small()
    end = stop_tokens(TOKENIZER, model)[-1]
    with torch.no_grad(): model.lm_head.weight[end] = 0
    with torch.no_grad(): model.model.norm.weight.zero_()      # all logits equal: greedy takes token 0, the end of the text
    assert generate(model, TOKENIZER, QUESTIONS[:2], 8) == ["", ""]

def test_sampling_repeats_and_leaves_the_callers_generator():
    model = small()
    torch.manual_seed(5); expected = torch.rand(1)
    torch.manual_seed(5); first = generate(model, TOKENIZER, QUESTIONS, 8, temperature=1., seed=2, progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert generate(model, TOKENIZER, QUESTIONS, 8, temperature=1., seed=2, progress=False) == first
    assert generate(model, TOKENIZER, QUESTIONS, 8, temperature=1., seed=3, progress=False) != first

def test_sampling_follows_the_softmax():
    model = small(); model.model.norm.weight.data.mul_(8)
    prompt = encode_prompts(TOKENIZER, [said("fox")])[0]
    with torch.no_grad(): expected = F.softmax(model(torch.tensor([prompt])).logits[0, -1]/1.5, -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.cat([model.generate(torch.tensor([prompt]*1000), attention_mask=torch.ones(1000, len(prompt), dtype=torch.long),
            max_new_tokens=1, do_sample=True, temperature=1.5, top_k=0, top_p=1.)[:, -1] for _ in range(4)])
    seen = torch.bincount(draws, minlength=len(expected))/len(draws)
    assert (seen - expected).abs().sum()/2 < 3*(expected*(1 - expected)/len(draws)).sqrt().sum()/2

def modes(model): return [part.training for part in model.modules()]

def test_generate_puts_back_what_it_changed_also_after_an_error(monkeypatch):
    model = small().train()
    model.model.layers[1].eval()      # frozen by its owner: the parts need not agree
    before, batches = modes(model), []
    generate(model, TOKENIZER, QUESTIONS, 4, progress=False)
    assert modes(model) == before
    def fails_later(**inputs):
        batches.append(modes(model))
        torch.rand(3)
        if len(batches) == 2: raise RuntimeError("out of memory")
        return original(**inputs)
    original = model.generate
    monkeypatch.setattr(model, "generate", fails_later, raising=False)
    torch.manual_seed(5); expected = torch.rand(1)
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="out of memory"): generate(model, TOKENIZER, QUESTIONS, 4, temperature=1., batch_size=2, progress=False)
    assert modes(model) == before and torch.equal(torch.rand(1), expected)
    assert not any(map(any, batches)), "it was not in evaluation mode at work"

def test_what_cannot_be_generated_is_told():
    with pytest.raises(ValueError, match="conversation 1 has .* exceeds the context of 2048"): generate(small(), TOKENIZER, [said("a"), said("a b" * 1500)], 8)
    with pytest.raises(ValueError, match="conversation 1 is empty"): generate(small(), TOKENIZER, ["a", ""], 8)
    assert generate(small(), TOKENIZER, [], 8) == []

# a model that nobody here made

REAL = os.environ.get("DISTILLBOOK_REALDATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="DISTILLBOOK_REALDATA is not set")

@needs_real_data
def test_stories260k_scores_as_published():
    "1.4845 nats a token: the file marks no ends of stories, so the published number is that of its first 900 characters."
    folder = Path(REAL)/"models"/"stories260K"/"hf"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    text = (Path(REAL)/"text"/"tinystories.txt").read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer(text[:900])["input_ids"]])
    with torch.no_grad(): assert model(ids, labels=ids).loss.item() == pytest.approx(1.4845, abs=5e-5)

@needs_real_data
def test_stories260k_writes_stories_in_batches():
    folder = Path(REAL)/"models"/"stories260K"/"hf"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompts = ["Once upon a time", "One day, a little girl named Lily found", "The dog"]
    alone = generate(model, tokenizer, prompts, 24, batch_size=1, progress=False)
    assert generate(model, tokenizer, prompts, 24, progress=False) == alone      # it has no padding token of its own
    assert "there was a little" in alone[0]

def test_a_models_own_settings_of_generation_stay_out_and_come_back():
    model = small()
    plain = generate(model, TOKENIZER, QUESTIONS, 8, progress=False)
    model.generation_config.repetition_penalty, model.generation_config.min_new_tokens = 50., 8
    assert generate(model, TOKENIZER, QUESTIONS, 8, progress=False) == plain
    assert model.generation_config.repetition_penalty == 50.
    with pytest.raises(ValueError, match="temperature -1"): generate(model, TOKENIZER, QUESTIONS, 8, temperature=-1)

def test_another_precision_leaves_far_positions_where_they_are(shipped_models):
    "A shipped adapter in bfloat16 against its model merged in float32 and rounded by hand: also two thousand tokens in."
    whole, rounded = load_model("actor"), load_model("actor", "bfloat16")
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16} and rounded.get_output_embeddings().weight is rounded.get_input_embeddings().weight
    assert torch.equal(rounded.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq) and rounded.model.rotary_emb.inv_freq.dtype == torch.float32
    for p in whole.parameters(): p.data = p.data.bfloat16().float()
    ids = torch.randint(4096, (1, 2000), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): a, b = (m(input_ids=ids).logits[0].float().log_softmax(-1) for m in (whole, to_dtype(rounded, torch.float32)))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad(): c = to_dtype(load_model("actor", "bfloat16").to(torch.bfloat16), torch.float32)(input_ids=ids).logits[0].float().log_softmax(-1)
    assert (c - a)[1500:].abs().max() > 10*(c - a)[:10].abs().max() and (c - a).abs().max() > 0.05       # what .to would have done
