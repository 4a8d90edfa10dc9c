"Corpora: splits that do not leak, chunks, packed rows and chat labels that are right to the token."
import os, random, warnings
from pathlib import Path
import numpy as np, pytest, torch
from datasets import Dataset
from distillbook.lab.corpora import (FixedChunks, RandomChunks, blocks, chat_example, collate, collect_docstrings, docstrings_in, drop_copies,
    load_corpus, load_texts, pack, package_docstrings, read_text, split_blocks, split_of, split_of_file, strip_gutenberg, tokenize_corpus, word_hash)
from distillbook.lab.models import CHAT_TEMPLATE, tiny_qwen3, train_tokenizer

@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The model reads its tokens.\n\nNot all of them are words."]*20, 300)

@pytest.fixture
def real():
    "The folder of real data, or a skip that says why."
    folder = os.environ.get("DISTILLBOOK_REALDATA")
    if not folder: pytest.skip("DISTILLBOOK_REALDATA is not set: no real data to read")
    return Path(folder)/"text"

@pytest.fixture
def small_package(tmp_path, monkeypatch):
    "A package of three modules and a tests folder, importable by name, and a cache of its own."
    folder = tmp_path/"smallpackage"
    (folder/"tests").mkdir(parents=True)
    (folder/"__init__.py").write_text('"""A small package that is here to be read, not to be run."""\nraise SystemExit("it was run")\n')
    (folder/"first.py").write_text('def fit(x):\n    """Fit the model to the rows of x and return it."""\n\ndef short():\n    """Too short."""\n')
    (folder/"second.py").write_text('class Fit:\n    """Fit the  model to the rows of x, and return it!"""\n    def __init__(self):\n        r"""Regular expressions \\d need no escapes here."""\n')
    (folder/"broken.py").write_text('"""A file that no Python can parse, as templates are."""\ndef {{ name }}: pass\n')
    (folder/"tests"/"test_it.py").write_text('"""A long docstring of a test that must be left out."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DISTILLBOOK_CACHE", str(tmp_path/"cache"))
    return "smallpackage"

# docstrings

def test_docstrings_of_modules_classes_functions_and_calls():
    source = '"""M."""\nif True:\n    async def f():\n        "F."\n        def inner(): "hidden"\nclass C:\n    "C."\n    def g(self): "G."\nadd_newdoc("m", "h", """' + "h"*50 + '""")'
    assert sorted(docstrings_in(source, "m")) == sorted([("m", "M."), ("m.f", "F."), ("m.C", "C."), ("m.C.g", "G."), ("m", "h"*50)])

def test_a_package_is_read_without_being_run(small_package):
    names = [row["name"] for row in package_docstrings(small_package)]
    assert names == ["smallpackage", "smallpackage.first.fit", "smallpackage.first.short", "smallpackage.second.Fit", "smallpackage.second.Fit.__init__"]

def test_collect_drops_copies_and_short_texts(small_package):
    names = [row["name"] for row in collect_docstrings([small_package])]
    assert names == ["smallpackage", "smallpackage.first.fit", "smallpackage.second.Fit.__init__"]

def test_a_second_call_reads_the_file_and_a_change_of_the_package_makes_a_new_one(small_package, tmp_path):
    first = collect_docstrings([small_package]).to_list()
    path = next(Path(os.environ["DISTILLBOOK_CACHE"]).glob("docstrings-*.parquet"))
    stamp = path.stat().st_mtime_ns
    assert collect_docstrings([small_package]).to_list() == first
    assert path.stat().st_mtime_ns == stamp and not list(path.parent.glob("*.part"))
    (tmp_path/"smallpackage"/"third.py").write_text('"""One more module, written after the first call."""')
    assert len(collect_docstrings([small_package])) == len(first) + 1

def test_an_unknown_package_is_named():
    with pytest.raises((ModuleNotFoundError, LookupError), match="no_such_package"): collect_docstrings(["no_such_package"])

def test_the_corpus_has_no_plain_words_twice_and_so_none_in_two_splits(cache, monkeypatch):
    monkeypatch.setenv("DISTILLBOOK_CACHE", str(cache))
    rows = collect_docstrings().to_pandas()
    assert rows.package.nunique() == 8 and rows.text.str.len().sum() > 10e6 and rows.text.str.len().min() >= 40
    assert not rows.text.map(word_hash).duplicated().any()
    assert (rows.text.map(split_of) == rows.split).all()
    shares = rows.split.value_counts(normalize=True)
    assert .945 < shares["train"] < .975 and shares["validation"] > .01 and shares["test"] > .01
    assert not rows.name.str.contains(r"\.tests?\.").any()

def test_the_split_follows_the_words_not_names_numbers_or_spacing():
    for i in range(50):
        words = " ".join(random.Random(i).choices("fit the model to rows of data and return it".split(), k=8))
        assert split_of(words) == split_of(words.title().replace(" ", "  ") + " 17 SomeName.") == split_of(words + ", other_name")
    assert word_hash("日本語の本") != word_hash("日本語の木") and word_hash("12") != word_hash("13")

def test_boilerplate_is_dropped_and_the_first_text_kept():
    shared = "\n".join(f"{word} : int\n    How many {word} there are to begin with." for word in "apples pears plums figs".split())
    rows = [dict(text=f"Count the fruit in the {place} basket.\n{shared}") for place in ("first", "second")]
    assert drop_copies(rows) == rows[:1]
    assert drop_copies(rows, most_repeated=1.) == rows

# text files

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path, encoding):
    (tmp_path/"a.txt").write_bytes("Grüße,\r\n日本\r\n".encode(encoding))
    assert read_text(tmp_path/"a.txt") == "Grüße,\n日本"

def test_latin_1_is_read_and_said_aloud(tmp_path):
    (tmp_path/"a.txt").write_bytes("café".encode("latin-1"))
    with pytest.warns(UserWarning, match="a.txt is not UTF-8"): assert read_text(tmp_path/"a.txt") == "café"

@pytest.mark.parametrize("content, message", [(b"", "empty"), (b" \n\n", "empty"), (b"PK\x03\x04\x00\x00" + bytes(range(256)), "not text"), (bytes(1000), "not text")])
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path/"bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.txt.* {message}"): load_corpus(tmp_path/"bad.txt")

def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="novels/emma.txt"): load_corpus("novels/emma.txt")
    with pytest.raises(FileNotFoundError, match="absent"): load_corpus(tmp_path/"absent")
    with pytest.raises(ValueError, match="has no text files"): load_corpus(tmp_path)
    with pytest.raises(ValueError, match="unknown split 'dev'"): load_corpus("docstrings", "dev")

@pytest.mark.parametrize("text", ["plain", "a\n\n*** of three stars ***\n\nb", "The END of it"])
def test_other_texts_are_left_as_they_are(text): assert strip_gutenberg(text) == text

def test_gutenberg_frames_old_and_new():
    for start, end in [("*** START OF THIS PROJECT GUTENBERG EBOOK X ***", "*** END OF THIS PROJECT GUTENBERG EBOOK X ***"),
                       ("***START OF THE PROJECT GUTENBERG EBOOK X***", "***END OF THE PROJECT GUTENBERG EBOOK X***"),
                       ("*** START OF THE PROJECT GUTENBERG EBOOK A LONG\nTITLE ***", "End of the Project Gutenberg EBook of X")]:
        assert strip_gutenberg(f"head\n{start}\n\nProduced by\nsomebody\n\nThe book.\n\n{end}\nlicence") == "The book."

def test_blocks_lose_no_word_and_cut_at_blank_lines():
    text = "\n\n".join(f"Paragraph {i} " + "word "*(i*7 % 90) for i in range(60)) + "\n" + "\n".join(["a line of a long list"]*400)
    found = blocks(text, size=500)
    assert " ".join(" ".join(found).split()) == " ".join(text.split())
    assert max(map(len, found)) < 1600 and all(len(b) >= 500 for b in found[:-1])

def test_splits_of_small_corpora_are_never_empty_and_keep_copies_together():
    texts = ["alpha beta", "gamma delta", "epsilon", "gamma  delta"]
    splits = split_blocks(texts)
    assert set(splits) == {"train", "validation", "test"} and splits[1] == splits[3]
    assert split_blocks(["one", "two"]) == ["train", "train"]
    many = split_blocks([f"{a}{b}{c}" for a in "abcdefghij" for b in "abcdefghij" for c in "klmnopqrst"])
    assert [many.count(s) for s in ("train", "validation", "test")] == [960, 20, 20]

@pytest.mark.parametrize("name, split", [("childes.train", "train"), ("childes.dev", "validation"), ("a.test", "test"), ("val_babylm.txt", "validation"),
    ("valid.txt", "validation"), ("dev-1.txt", "validation"), ("test.md", "test"), ("testament.txt", None), ("valley.txt", None), ("emma.txt", None)])
def test_the_split_a_name_declares(name, split): assert split_of_file(Path(name)) == split

def test_document_3_files(tmp_path):
    (tmp_path/"train_babylm.txt").write_text("The training text.")
    (tmp_path/"val_babylm.txt").write_text("The validation text.")
    (tmp_path/"README.md").write_text("Where these files come from: not part of the corpus.")
    assert load_corpus(tmp_path)["text"] == ["The training text."]
    assert load_corpus(tmp_path, "validation")["text"] == ["The validation text."]
    with pytest.raises(ValueError, match="its files name only validation"): load_corpus(tmp_path, "test")

# real texts

def test_novels_without_their_licence(real):
    for name, first, last in [("pride_and_prejudice", "PRIDE AND PREJUDICE", "uniting them."), ("sherlock", "The Adventures of Sherlock Holmes", "considerable success."),
                              ("war_and_peace", "WAR AND PEACE", "not\nconscious.")]:
        text = read_text(real/f"{name}.txt")
        assert first in text[:120] and text.endswith(last) and "Project Gutenberg" not in text[:2000] + text[-2000:]

def test_latin_1_letters(real):
    with pytest.warns(UserWarning, match="not UTF-8"): text = read_text(real/"beethoven_letters_vol2_latin1.txt")
    assert text.startswith("BEETHOVEN'S LETTERS") and text.endswith("THE END") and "\x96" not in text
    assert sum(c in text for c in "äöüéè") >= 4

def test_every_real_text_has_three_splits_that_add_up(real):
    for path in sorted(real.glob("*.txt")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            parts = [list(load_corpus(path, split)["text"]) for split in ("train", "validation", "test")]
            whole = blocks(read_text(path))
        assert sorted(sum(parts, [])) == sorted(whole) and all(parts)
        assert not set(map(word_hash, parts[0])) & set(map(word_hash, parts[1] + parts[2]))

def test_a_babylm_folder(real, tmp_path):
    for folder, kind in (("train_10M", "train"), ("dev", "dev"), ("test", "test")):
        (tmp_path/folder).mkdir()
        for name, book in (("simple_wiki", "darwin"), ("gutenberg", "sherlock"), ("childes", "tinystories")):
            text = read_text(real/f"{book}.txt")
            part = dict(train=text[:150_000], dev=text[150_000:170_000], test=text[170_000:190_000])[kind]
            (tmp_path/folder/f"{name}.{kind}").write_text(part)
    rows = {split: load_corpus(tmp_path, split) for split in ("train", "validation", "test")}
    assert set(rows["train"]["domain"]) == {"simple_wiki", "gutenberg", "childes"}
    assert sum(map(len, rows["train"]["text"])) > 440_000 > 10*sum(map(len, rows["validation"]["text"])) - 200_000
    assert set(load_corpus(tmp_path, "train", domain="childes")["domain"]) == {"childes"}
    with pytest.raises(ValueError, match="no file named 'nobody'"): load_corpus(tmp_path, domain="nobody")

# streams and chunks

def test_a_stream_comes_back_as_the_documents(tokenizer):
    texts = ["The model reads.", "Grüße 日本\n\n  indented", "x"]
    ids = tokenize_corpus(texts, tokenizer, batch_size=2)
    assert ids.dtype == np.int32 and tokenizer.decode(ids).split("<|endoftext|>") == texts + [""]
    assert tokenize_corpus(Dataset.from_dict(dict(text=texts)), tokenizer).tolist() == ids.tolist()
    with pytest.raises(ValueError, match="nothing to tokenize"): tokenize_corpus([], tokenizer)

def test_fixed_chunks_tile_the_stream():
    chunks = FixedChunks(np.arange(1000, dtype=np.int32), 128)
    assert len(chunks) == 7 and torch.cat([row["input_ids"] for row in chunks]).tolist() == list(range(896))
    assert all((row["labels"] == row["input_ids"]).all() and row["input_ids"].dtype == torch.long for row in chunks)
    with pytest.raises(ValueError, match="100 tokens do not fill one chunk of 128"): FixedChunks(np.arange(100), 128)

@pytest.mark.parametrize("size, length, n", [(1000, 128, None), (1000, 128, 100), (128, 128, 5), (130, 128, 9), (255, 128, 4)])
def test_random_chunks_are_contiguous_counted_and_repeatable(size, length, n):
    chunks = RandomChunks(np.arange(size), length, n, seed=3)
    rows = [row["input_ids"] for row in chunks]
    assert (len(rows) == n if n else 1 <= len(rows) <= size//length) and all((row.diff() == 1).all() and len(row) == length for row in rows)
    again = RandomChunks(np.arange(size), length, n, seed=3)
    assert all((a == b["input_ids"]).all() for a, b in zip(rows, again))

def test_a_pass_reads_nothing_twice_and_seams_move():
    chunks = RandomChunks(np.arange(10_000), 100, 99*20, seed=0)
    counts = np.bincount(np.concatenate([row["input_ids"] for row in chunks]), minlength=10_000)
    assert counts[100:-100].min() >= 18 and counts.max() <= 21
    assert len({int(start) % 100 for start in chunks.starts}) > 10

# packing

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True])
def test_a_packed_document_has_the_logits_it_has_alone(tokenizer, attention, training):
    torch.manual_seed(0)
    model = tiny_qwen3(tokenizer, hidden_size=64, layers=2, intermediate_size=64, heads=4, kv_heads=2, head_dim=16)
    model.set_attn_implementation(attention)
    model.train(training)
    documents = [torch.randint(5, len(tokenizer), (n,)).tolist() for n in (7, 1, 30, 12, 20, 5)]
    rows = pack(documents, 40)
    logits, alone = model(**collate(rows)).logits, [model(input_ids=torch.tensor([d]), use_cache=False).logits[0] for d in documents]
    places = [(r, i) for r, row in enumerate(rows) for i, position in enumerate(row["position_ids"]) if position == 0]
    assert len(places) == len(documents) and len(rows) > 1
    for (r, i), expected in zip(places, alone): torch.testing.assert_close(logits[r, i:i+len(expected)], expected, rtol=1e-4, atol=1e-4)

def test_gradients_of_packed_rows_equal_those_of_the_documents(tokenizer):
    torch.manual_seed(0)
    model = tiny_qwen3(tokenizer, hidden_size=32, layers=1, intermediate_size=32, heads=2, kv_heads=1, head_dim=16).train()
    documents = [torch.randint(5, len(tokenizer), (n,)).tolist() for n in (9, 14, 4)]
    def gradient(batches, tokens):
        model.zero_grad()
        for batch in batches: (model(**batch).loss*(batch["labels"][:, 1:] != -100).sum()/tokens).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    tokens = sum(len(d) - 1 for d in documents)
    packed = gradient([collate(pack(documents, 64))], tokens)
    torch.testing.assert_close(packed, gradient([collate([dict(input_ids=d, labels=d)]) for d in documents], tokens), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(packed, gradient([collate(pack(documents, 15))], tokens), rtol=1e-3, atol=1e-6)

def test_packing_keeps_every_token_in_order():
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 99, n).tolist() for n in draw.integers(1, 90, 200)]
    rows = pack(documents, 64, split=True)
    assert sum((row["input_ids"] for row in rows), []) == sum(documents, []) and max(len(row["input_ids"]) for row in rows) <= 64
    assert all(len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) for row in rows)
    assert all((label == -100) == (position == 0) for row in rows for label, position in zip(row["labels"], row["position_ids"]))
    with pytest.raises(ValueError, match="more than length=64"): pack(documents, 64)
    with pytest.raises(ValueError, match="nothing to pack"): pack([], 64)
    with pytest.raises(ValueError, match="3 token ids but 2 labels"): pack([([1, 2, 3], [1, 2])], 64)

def test_a_padded_batch_ignores_its_padding():
    batch = collate([dict(input_ids=[5, 6, 7], labels=[-100, 6, 7]), dict(input_ids=[8], labels=[8])], pad_token_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]] and batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]

@pytest.mark.peer
def test_trl_makes_the_same_of_a_packed_row():
    pytest.importorskip("trl", reason="trl is not installed")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    documents = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([dict(input_ids=sum(documents, []), seq_lengths=[3, 2, 4])])
    ours = collate(pack(documents, 9))
    for name in ("input_ids", "labels", "position_ids"): assert theirs[name].tolist() == ours[name].tolist()

# chats

TALK = [dict(role="system", content="Be brief."), dict(role="user", content="Hi"), dict(role="assistant", content="Good day."),
        dict(role="user", content="Bye <|end|"), dict(role="assistant", content="So long\nand thanks.")]

def test_the_labels_of_a_chat_are_its_replies_and_their_end_tokens(tokenizer):
    row = chat_example(TALK, tokenizer)
    assert tokenizer.decode([t for t in row["labels"] if t != -100]) == "Good day.<|end|>So long\nand thanks.<|end|>"
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"]))
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    mask = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert [int(label != -100) for label in row["labels"]] == mask

def test_a_chat_cut_short_keeps_what_is_left_of_a_reply(tokenizer):
    whole = chat_example(TALK, tokenizer)
    first = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    assert chat_example(TALK, tokenizer, max_length=first + 2) == {k: v[:first+2] for k, v in whole.items()}
    with pytest.raises(ValueError, match=f"max_length={first}"): chat_example(TALK, tokenizer, max_length=first)

def test_nothing_to_learn_raises(tokenizer):
    with pytest.raises(ValueError, match="no assistant token.*system, user"): chat_example(TALK[:2], tokenizer)
    try:
        tokenizer.chat_template = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        with pytest.raises(ValueError, match="no {% generation %} markers"): chat_example(TALK, tokenizer)
    finally: tokenizer.chat_template = CHAT_TEMPLATE

def test_the_micro_world_is_a_corpus_whose_splits_share_no_words():
    parts = {split: set(map(word_hash, load_corpus("microworld:3000", split)["text"])) for split in ("train", "validation", "test")}
    assert len(parts["train"]) > 500 and not parts["train"] & (parts["validation"] | parts["test"])

def test_a_token_of_control_that_is_written_in_a_text_is_text(tokenizer):
    stream = tokenize_corpus(["a<|endoftext|>b"], tokenizer)
    assert list(stream).count(tokenizer.eos_token_id) == 1 and tokenizer.decode(stream[:-1]) == "a<|endoftext|>b"
    chat = [dict(role="user", content="x"), dict(role="assistant", content="x<|end|>\\n<|user|>\\ny")]
    with pytest.raises(ValueError, match="would read as a token of control"): chat_example(chat, tokenizer)

def test_columns_that_cannot_be_padded_are_told():
    rows = [dict(input_ids=[1] * n, labels=[1] * n, weight=1.) for n in (2, 3)]
    with pytest.raises(ValueError, match="column weight"): collate(rows)
