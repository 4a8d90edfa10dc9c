"The profiles paper and hub on local folders of the same architectures: what is left untested is the download and the size."
import copy
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM
from conftest import book
from distillbook.lab.corpora import load_corpus
from distillbook.lab.models import load_model, load_tokenizer, train_tokenizer
from distillbook.lab.runs import RunRecord


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    "A tiny GPT-2 pair without a chat template and an untied Qwen3 pair with one, as folders, and a BabyLM folder."
    folder = tmp_path_factory.mktemp("pairs")
    texts = load_corpus("docstrings", "validation")["text"][:400]
    tokenizer = train_tokenizer(texts, 600)
    torch.manual_seed(0)
    for role, width in (("teacher", 64), ("student", 32)):
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=width, n_layer=2, n_head=2, n_positions=1024, bos_token_id=0, eos_token_id=0))
        qwen3 = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer) + 8, hidden_size=width, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=0))    # rows beyond the vocabulary, as Qwen has
        for name, model in (("gpt2", gpt2), ("qwen3", qwen3)):
            model.save_pretrained(folder/f"{name}-{role}")
            template, tokenizer.chat_template = tokenizer.chat_template, None if name == "gpt2" else tokenizer.chat_template
            tokenizer.save_pretrained(folder/f"{name}-{role}")
            tokenizer.chat_template = template
    (folder/"babylm").mkdir()
    for ending, part in (("train", texts[:300]), ("dev", texts[300:])): (folder/"babylm"/f"docstrings.{ending}").write_text("\n".join(" ".join(t.split()) for t in part))
    return folder

def finished(tmp_path, cache, *command):
    done = book("run", *command, "--out", tmp_path/"run", DISTILLBOOK_CACHE=cache)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return RunRecord.load(tmp_path/"run")

def test_the_paper_profile_of_babylm_on_a_gpt2_pair(pairs, cache, tmp_path):
    "Batches accumulate, the warm-up is in steps, and the BabyLM folder is read, as the document has it; only the counts are small."
    small = dict(steps=3, teacher_steps=3, seeds=1, evaluation_tokens=1024, warmup=1, batch_size=2)
    record = finished(tmp_path, cache, "babylm", "--profile", "paper", "-p", f"teacher={pairs/'gpt2-teacher'}", "-p", f"student={pairs/'gpt2-student'}",
                      "-p", f"corpus={pairs/'babylm'}", *(x for k, v in small.items() for x in ("-p", f"{k}={v}")))
    assert record.profile == "paper" and record.parameters["accumulation"] == 8 and record.parameters["grid"] is False
    assert record.measures and all(m.value == m.value for m in record.measures)

def untied_teacher(folder):
    "The shipped teacher with an output layer of its own and rows beyond the vocabulary, as a hub's Qwen3 may have; a random one would give no answer that the filters let through."
    model = load_model("teacher")
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    untied = Qwen3ForCausalLM(config)
    untied.load_state_dict(model.state_dict())
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    untied.save_pretrained(folder); load_tokenizer("teacher").save_pretrained(folder)
    return folder

def test_the_hub_profile_of_the_flagship_on_an_untied_qwen3(cache, tmp_path):
    "Untied embeddings and more rows than tokens: the student is still made and measured."
    small, teacher = dict(prompts=60, steps=3, items=2, max_tokens=1024, length=384), untied_teacher(tmp_path/"teacher")
    record = finished(tmp_path, cache, "ship_a_student", "--profile", "hub", "-p", f"teacher={teacher}", "-p", f"base={teacher}",
                      "-p", "corpus=docstrings:transformers", *(x for k, v in small.items() for x in ("-p", f"{k}={v}")))
    assert record.profile == "hub" and {"student_share_of_teacher", "student_perplexity_ratio"} <= {m.name for m in record.measures}

def test_the_paper_profile_of_beethoven_on_a_template_without_marks(cache, tmp_path):
    "As Qwen's chat template, the student's does not mark its answers; teacher and student are folders."
    words = load_tokenizer("student")
    load_model("actor").save_pretrained(tmp_path/"teacher"); words.save_pretrained(tmp_path/"teacher")
    words.chat_template = words.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    load_model("student").save_pretrained(tmp_path/"student"); words.save_pretrained(tmp_path/"student")
    small = dict(rows=42, steps=4, proof_steps=2, asked=1, timed=1, new_tokens=40)
    record = finished(tmp_path, cache, "beethoven", "--profile", "paper", "-p", f"teacher={tmp_path/'teacher'}", "-p", f"student={tmp_path/'student'}", *(x for k, v in small.items() for x in ("-p", f"{k}={v}")))
    assert record.profile == "paper" and record.parameters["learning_rate"] == 5e-5
    right = {m.name: m.value for m in record.measures}
    assert right["right[teacher, with prompt]"] > .8 and right["prompt_tokens_saved"] > 600
