"""`transformers` loads what we save: the same ids, the same special tokens, the same conversations."""

import json
import random

import pytest
import transformers

from tokenizer import Tokenizer
from tokenizer.chat import END_OF_TURN, ROLES

TEXTS = [
    "Once  upon a time,\r\n 12345 Llama's\n\n",
    " a , b . do n't ' \0 ",
    "👩‍👩‍👧 e\u0301 שלום\t\t",
    "<|user|>a<|endoftext|> b",
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    generator = random.Random(1)
    words = ["".join(generator.choices("aeioubdgklmnrst", k=generator.randint(2, 7))) for _ in range(500)]
    return Tokenizer.train([" ".join(generator.choices(words, k=80)) for _ in range(200)], 1_100)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    ours.save(folder)
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def test_ids_and_text_are_equal(ours, theirs):
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text, allow_special=True)
        assert theirs(text)["input_ids"] == [ours.end_of_text, *ids]
        assert theirs.decode(ids) == ours.decode(ids) == text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special=True)


def test_special_tokens(ours, theirs):
    assert theirs.eos_token_id == ours.end_of_text
    assert theirs.eos_token == "<|endoftext|>"
    assert theirs.pad_token_id == ours.token_id("<|pad|>") != ours.end_of_text


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_a_model_config_beside_it_changes_nothing(ours, tmp_path, model_type):
    """Checkpoints hold a config.json, by which `transformers` may choose a class that rebuilds the tokenizer."""
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    expected = [[ours.end_of_text, *ours.encode(text, allow_special=True)] for text in TEXTS]
    assert [theirs(text)["input_ids"] for text in TEXTS] == expected


def test_chat_template_equals_the_pieces(ours, theirs):
    messages = [
        {"role": "system", "content": "\n Be brief. "},
        {"role": "user", "content": "2+2?\n"},
        {"role": "assistant", "content": "\n\n4"},
        {"role": "user", "content": ""},
    ]
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert text == "<|system|>\n Be brief. <|end|><|user|>2+2?\n<|end|><|assistant|>\n\n4<|end|><|user|><|end|>"
    pieces = []
    for message in messages:
        role, end = ours.token_id(ROLES[message["role"]]), ours.token_id(END_OF_TURN)
        pieces += [role, *ours.encode(message["content"]), end]
    assert theirs.apply_chat_template(messages)["input_ids"] == pieces
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt == [*pieces, ours.token_id("<|assistant|>")]


def test_chat_template_refuses_other_roles(theirs):
    with pytest.raises(Exception, match="a role is system, user or assistant, not tool"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_a_foreign_folder_keeps_its_config(ours, tmp_path):
    ours.save(tmp_path / "theirs")
    config = {"eos_token": "<|end|>", "model_max_length": 512, "tokenizer_class": "Qwen2Tokenizer",
              "auto_map": {"AutoTokenizer": ["evil.Code", None]}}  # fmt: skip
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "theirs" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    loaded = Tokenizer.load(tmp_path / "theirs")
    loaded.save(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert "auto_map" not in saved
    again = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "again"))
    assert again.eos_token == "<|end|>" and again.model_max_length == 512
    assert loaded.end_of_text_token == "<|endoftext|>"  # between documents; "<|end|>" ends a turn
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert Tokenizer.load(tmp_path / "again").chat_template == loaded.chat_template


def test_foreign_files_load_with_equal_ids(real_data, tmp_path):
    for name in "gpt2_tokenizer", "helium_nano_32k":
        foreign = Tokenizer.load(real_data / "tokenizers" / f"{name}.json")
        foreign.save(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / name))
        assert theirs.eos_token_id == foreign.end_of_text
        for text in TEXTS:
            assert theirs(text)["input_ids"] == foreign.encode(text, allow_special=True)
