"Chapter 38: rows for instruction tuning, and questions made from raw text."
import pytest
from distillbook.adapt.instruction import ending_items, instruction_rows
from distillbook.lab.microworld import as_conversation, examples
from distillbook.lab.models import load_tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["The quick brown fox returns the sum of two arrays. "*4], 300)

def test_instruction_rows_count_the_answer_alone():
    item = examples("medical", 1, "train", world_seed=1)[0]
    tokenizer = load_tokenizer("base")
    row, = instruction_rows([as_conversation(item)], tokenizer)
    assert tokenizer.decode([t for t in row["labels"] if t != -100]) == item["answer"] + "<|end|>"

@pytest.mark.parametrize("conversations, said", [([], "no conversations"), ([[dict(role="user", content="?")]], "conversation 0 does not end"), ([[]], "conversation 0")])
def test_conversations_without_an_answer(conversations, said):
    with pytest.raises(ValueError, match=said): instruction_rows(conversations, TOKENIZER)
    with pytest.raises(ValueError, match="more than 3"): instruction_rows([[dict(role="user", content="?"), dict(role="assistant", content="A long answer.")]], TOKENIZER, 3)

def test_ending_items_have_one_right_ending():
    texts = [" ".join(f"w{i}x{k}" for k in range(40)) for i in range(6)] + ["too short"]
    items = ending_items(texts, 1)
    assert len(items) == 6 and all(e["choices"].count(e["answer"]) == 1 and len(set(e["choices"])) == 4 for e in items)
    assert all(e["answer"].split()[0].split("x")[0] in e["messages"][0]["content"] for e in items)
    assert len({e["choices"].index(e["answer"]) for e in ending_items(texts, 3) + items}) > 1
    with pytest.raises(ValueError, match="four are needed"): ending_items(texts[:3])
