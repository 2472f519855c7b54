"""What begins a text: as a folder's tokenizer declares it, to `transformers` and to us; what ours state."""

import json
import pickle

import pytest
import transformers
from tokenizers import processors

from tests.stock_llama import TEXTS, begins_with, save_tokenizer
from tokenizer import Tokenizer
from tokenizer.conversations import ChatFormat, begun

BYTES = processors.ByteLevel(trim_offsets=False)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.train(TEXTS, 1_024)


@pytest.mark.parametrize(
    ("post_processor", "begin"),
    [(begins_with("<s>", 1), 1), (processors.Sequence([BYTES, begins_with("<s>", 1)]), 1),
     (begins_with("</s>", 2), 2), (BYTES, None), (None, None)],
)  # fmt: skip
def test_newcomer_the_beginning_that_a_folder_declares_is_the_one_that_transformers_puts(
    tmp_path, post_processor, begin
):
    save_tokenizer(tmp_path, post_processor)
    tokenizer, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = tokenizer.encode("One day")
    assert theirs("One day")["input_ids"] == ([] if begin is None else [begin]) + plain
    assert tokenizer.declares_begin == (begin is not None)
    assert tokenizer.begin_of_text == (tokenizer.end_of_text if begin is None else begin)
    again = tmp_path / "again"  # as it stands beside the shards that it makes
    tokenizer.save(again)
    for copy in (Tokenizer.load(again), pickle.loads(pickle.dumps(tokenizer))):
        assert (copy.begin_of_text, copy.declares_begin) == (tokenizer.begin_of_text, tokenizer.declares_begin)
        assert copy.fingerprint == tokenizer.fingerprint and copy.encode("One day") == plain


def test_a_config_may_ask_for_the_beginning(tmp_path):
    """As older versions of `transformers` read it, where tokenizer.json says nothing."""
    save_tokenizer(tmp_path / "asks", None, add_bos_token=True)
    save_tokenizer(tmp_path / "does-not", None, add_bos_token=False)
    found = [Tokenizer.load(tmp_path / name) for name in ("asks", "does-not")]
    assert [(each.begin_of_text, each.declares_begin) for each in found] == [(1, True), (2, False)]


def test_newcomer_our_tokenizers_tell_foreign_clients_what_begins_a_text(ours, tmp_path):
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:3]:
        assert theirs(text)["input_ids"] == [ours.end_of_text, *ours.encode(text)]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs.bos_token == ours.end_of_text_token and ours.declares_begin
    talk = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(talk)["input_ids"] == ChatFormat(ours).encode(talk)[0]


def test_what_an_older_version_saved_is_the_same_tokenizer(ours, tmp_path):
    """Its runs go on: the statement is no part of the fingerprint, nor of what `encode` gives."""
    ours.save(tmp_path)
    for name, key in (("tokenizer.json", "post_processor"), ("tokenizer_config.json", "bos_token")):
        saved = json.loads((tmp_path / name).read_text())
        assert saved[key]
        saved[key] = None
        (tmp_path / name).write_text(json.dumps(saved))
    old = Tokenizer.load(tmp_path)
    assert old.fingerprint == ours.fingerprint and old.encode(TEXTS[0]) == ours.encode(TEXTS[0])
    assert old.begin_of_text == ours.begin_of_text and not old.declares_begin


@pytest.mark.parametrize("post_processor", [None, BYTES, processors.Sequence([BYTES, BYTES])])
def test_a_foreign_tokenizer_states_the_beginning_beside_a_model_of_ours_and_stays_the_same(tmp_path, post_processor):
    save_tokenizer(tmp_path / "theirs", post_processor, bos_token=None, add_bos_token=False, chat_template=None)
    foreign = Tokenizer.load(tmp_path / "theirs")
    foreign.save(tmp_path / "beside", begins=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "beside")
    assert theirs("One day")["input_ids"] == [foreign.end_of_text, *foreign.encode("One day")]
    beside = Tokenizer.load(tmp_path / "beside")
    assert beside.fingerprint == foreign.fingerprint and beside.begin_of_text == foreign.end_of_text
    beside.save(tmp_path / "again", begins=True)
    names = ("tokenizer.json", "tokenizer_config.json")
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes() for name in names)


def test_a_template_that_would_write_the_stated_beginning_is_not_given_one(tmp_path):
    save_tokenizer(tmp_path / "theirs", None, bos_token=None)
    foreign = Tokenizer.load(tmp_path / "theirs")
    foreign.save(tmp_path / "beside", begins=True)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert ChatFormat(Tokenizer.load(tmp_path / "beside")).encode(talk) == ChatFormat(foreign).encode(talk)


def test_newcomer_a_continuation_keeps_the_space_before_its_first_word(ours, tmp_path):
    save_tokenizer(tmp_path)
    for tokenizer in (ours, Tokenizer.load(tmp_path)):
        whole = tokenizer.encode("One day at noon")
        before = [tokenizer.begin_of_text, *tokenizer.encode("One day")]
        assert before[1:] == whole[: len(before) - 1]
        assert tokenizer.continuation(before, whole[len(before) - 1 :]) == " at noon"
        assert tokenizer.continuation(before, []) == ""
        assert tokenizer.continuation([tokenizer.begin_of_text], whole) == "One day at noon"
    euro = "€ 1".encode()  # bytes of half a character, as they come one by one
    parts = [ours.encode("€ 1")[:number] for number in range(1, len(euro) + 1)]
    assert [ours.continuation(ours.encode("a"), part) for part in parts][2:] == ["€", "€ ", "€ 1"]


def test_a_conversation_has_one_beginning_whoever_writes_it(ours, tmp_path):
    save_tokenizer(tmp_path)
    llama, talk = Tokenizer.load(tmp_path), [{"role": "user", "content": "One day"}]
    chat = ChatFormat(llama)
    assert chat.writes_begin and begun([1], chat.prompt(talk)) == chat.prompt(talk)
    assert begun([], chat.prompt(talk)) == chat.prompt(talk) and chat.prompt(talk)[:2].count(1) == 1
    chat = ChatFormat(ours)
    assert not chat.writes_begin and begun([0], chat.prompt(talk)) == [0, *chat.prompt(talk)]
