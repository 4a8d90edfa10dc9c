"Chapter 37: a tokenizer with more words, and the rows that they begin with."
import json
import pytest, torch
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from distillbook.adapt.vocabulary import extend_model, extend_tokenizer, fertility, new_words
from distillbook.lab.models import load_model, load_tokenizer, train_tokenizer

TEXT = "The quick brown fox returns the sum of two arrays, 12 and 345: naïve, größer, 日本. "
TOKENIZER = train_tokenizer([TEXT*4], 300)
GENERAL = [TEXT + f"Number {i}." for i in range(12)]
DOMAIN = [f"The tibia of the patella is a fibula, case {i}. Größenwahn." for i in range(20)]

def small(seed=0, vocabulary=len(TOKENIZER), tied=True):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=tied)).eval()

WORDS = [" tibia", " patella", " fibula", " Größenwahn", " 日本語"]

def test_new_tokens_leave_the_old_ones_alone_and_the_text_whole():
    longer = extend_tokenizer(TOKENIZER, WORDS)
    both = longer.get_vocab()
    assert {t: both[t] for t in TOKENIZER.get_vocab()} == TOKENIZER.get_vocab() and len(longer) == len(TOKENIZER) + len(WORDS)
    for text in GENERAL: assert longer(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    for word in WORDS: assert longer(word)["input_ids"] == [len(TOKENIZER) + WORDS.index(word)] and longer.decode(longer(word)["input_ids"]) == word
    assert longer("a tibial")["input_ids"] == TOKENIZER("a tibial")["input_ids"]      # a word inside a longer one stays pieces
    assert len(TOKENIZER) == 300 or TOKENIZER.get_vocab() == train_tokenizer([TEXT*4], 300).get_vocab()

@given(st.text(max_size=60))
def test_any_text_comes_back(text):
    longer = extend_tokenizer(TOKENIZER, WORDS)
    assert longer.decode(longer(text + " tibia", split_special_tokens=True)["input_ids"]) == text + " tibia"

def test_no_old_token_is_cut_in_another_way_by_the_shipped_tokenizer():
    tokenizer = load_tokenizer("base")
    model = tokenizer.backend_tokenizer.model
    special = set(tokenizer.get_added_vocab())
    assert all([p.value for p in model.tokenize(t)] == [t] for t in tokenizer.get_vocab() if t not in special)

def test_saved_and_loaded_by_transformers(tmp_path):
    longer = extend_tokenizer(TOKENIZER, WORDS)
    model = extend_model(small(), TOKENIZER, longer)
    model.save_pretrained(tmp_path); longer.save_pretrained(tmp_path)
    again, words = load_model(tmp_path), load_tokenizer(tmp_path)
    ids = words(DOMAIN[0], return_tensors="pt")["input_ids"]
    assert ids.tolist() == [longer(DOMAIN[0])["input_ids"]] and words.chat_template == TOKENIZER.chat_template
    with torch.no_grad(): assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight

@pytest.mark.parametrize("words, said", [([" tibia", " tibia"], "twice"), ([" two words"], "2 parts"), (["<|end|>"], "parts|token already"), ([TOKENIZER.decode([299])], "token already"), ([""], "0 parts")])
def test_words_that_cannot_be_added(words, said):
    with pytest.raises(ValueError, match=said): extend_tokenizer(TOKENIZER, words)

def test_only_byte_level_bpe_is_extended():
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))
    for call in (lambda: extend_tokenizer(other, ["b"]), lambda: new_words(["b"], other, 1)):
        with pytest.raises(ValueError, match="no byte-level BPE"): call()

def test_new_words_are_those_that_save_most():
    words = new_words(DOMAIN, TOKENIZER, 6)
    saved = lambda w: "".join(DOMAIN).count(w)*(len(TOKENIZER(w)["input_ids"]) - 1)
    assert [saved(w) for w in words] == sorted((saved(w) for w in words), reverse=True) and {" tibia", " patella", " fibula"} <= set(words)
    assert new_words(DOMAIN, extend_tokenizer(TOKENIZER, words), 6) != words and new_words(["once"], TOKENIZER, 4) == []
    before, after = fertility(DOMAIN, TOKENIZER), fertility(DOMAIN, extend_tokenizer(TOKENIZER, words))
    lost = sum(saved(w) for w in words)/sum(len(t.split()) for t in DOMAIN)
    assert before - after == pytest.approx(lost)
    with pytest.raises(ValueError, match="no word"): fertility([" "], TOKENIZER)

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 3, 20])
def test_rows_of_new_tokens(tied, padding):
    longer, old = extend_tokenizer(TOKENIZER, WORDS), len(TOKENIZER)
    model, before = (small(1, old + padding, tied) for _ in range(2))
    extend_model(model, TOKENIZER, longer)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == max(old + len(WORDS), old + padding)
    for now, was in ((model.get_input_embeddings(), before.get_input_embeddings()), (model.get_output_embeddings(), before.get_output_embeddings())):
        assert torch.equal(now.weight[:old], was.weight[:old])
        for i, word in enumerate(WORDS): assert torch.allclose(now.weight[old+i], was.weight[TOKENIZER(word)["input_ids"]].mean(0))
        if padding == 20: assert torch.equal(now.weight[old+len(WORDS):], was.weight[old+len(WORDS):])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    ids = torch.tensor([TOKENIZER(GENERAL[0])["input_ids"]])
    with torch.no_grad(): assert torch.allclose(model(ids).logits[..., :old], before(ids).logits[..., :old], atol=1e-5)

def test_other_starts_of_rows():
    longer, old = extend_tokenizer(TOKENIZER, WORDS), len(TOKENIZER)
    mean = extend_model(small(), TOKENIZER, longer, "mean").get_input_embeddings().weight
    assert torch.allclose(mean[old:], mean[:old].mean(0).expand(len(WORDS), -1))
    drawn = [extend_model(small(), TOKENIZER, longer, "random", seed).get_input_embeddings().weight[old:] for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])

def test_models_and_tokenizers_that_do_not_fit():
    longer = extend_tokenizer(TOKENIZER, WORDS)
    with pytest.raises(ValueError, match="does not extend"): extend_model(small(), longer, TOKENIZER)
    with pytest.raises(ValueError, match="fewer than the old tokenizer"): extend_model(small(0, 100), TOKENIZER, longer)
    with pytest.raises(ValueError, match="'pieces', 'mean' or 'random'"): extend_model(small(), TOKENIZER, longer, "zeros")

def test_gaps_in_the_ids_are_told():
    state = json.loads(TOKENIZER.backend_tokenizer.to_str())
    token = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"][token] += 7
    with pytest.raises(ValueError, match="gaps"): extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state))), WORDS)
