"""The tokenizer class: exact round trips, special tokens that text cannot forge, foreign files, fingerprints."""

import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from tokenizer import Tokenizer, TokenizerError, bpe
from tokenizer.chat import SPECIAL_TOKENS

ROOT = Path(__file__).parents[2]

NASTY = {
    "empty": "",
    "nul": "a\0b\0\0",
    "control": "".join(map(chr, range(32))) + "\x7f\x80\x85\x9f",
    "line ends": "one\r\ntwo\rthree\n\n\n\r\r\nfour\u2028five\u2029",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪",
    "right to left": "שָׁלוֹם مرحبا \u200f\u202eabc\u202c",
    "lone marks": "\u0301\u0308 \u20d0a\u0301\u0323e",
    "not normalised": "é e\u0301 Å \u212b ﬁ ① ﷺ",
    "spaces": " " * 5000 + "a" + " " * 17 + "\t" * 33 + "\u00a0\u3000 \n \n",
    "byte order marks": "\ufeffa\ufeff\ufffe\uffff\ufffd",
    "last code point": "\U0010ffff\U000e0001",
    "specials": "".join(SPECIAL_TOKENS) + " <|endoftext|> <|user|>\n<|end|",
    "contractions": "I'M don't 'S it'll ''' ‘re",
    "numbers": "123456789 3.14 ４２ ½ ٣",
}


def corpus(count: int = 400, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    syllables = [a + b for a in "bcdfghlmnprst" for b in "aeiou"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(600)]
    return [" ".join(generator.choices(words, k=60)) + f". {generator.randint(0, 9999)}\n" for _ in range(count)]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.train(corpus(), 1_200)


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_round_trip_is_exact_and_never_special(ours, text):
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert ours.decode(ids, skip_special=True) == text
    assert ours.encode_batch([text, "x"]) == [ids, ours.encode("x")]
    assert not {ours.token_id(token) for token in SPECIAL_TOKENS} & set(ids)


def test_round_trip_of_random_unicode(ours):
    generator = random.Random(7)
    ranges = [(0, 0x80), (0, 0x300), (0x300, 0x370), (0x590, 0x700), (0x2000, 0x2070), (0xE000, 0x110000), (0, 0xD800)]
    texts = [
        "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(generator.randint(1, 60)))
        for _ in range(2_000)
    ]
    assert ours.is_lossless(texts)
    assert ours.is_lossless(chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000)


def test_special_tokens_only_when_allowed(ours):
    text = "a<|endoftext|>b<|user|>"
    ids = ours.encode(text, allow_special=True)
    expected = [*ours.encode("a"), ours.end_of_text, *ours.encode("b"), ours.token_id("<|user|>")]
    assert ids == expected != ours.encode(text)
    assert ours.decode(ids) == text
    assert ours.decode(ids, skip_special=True) == "ab"
    assert ours.encode(text, allow_special=False) == ours.encode(text)  # the call before left no state behind


def test_special_tokens_stay_unforgeable_in_other_processes(ours):
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.end_of_text not in copy.encode("a<|endoftext|>")
    assert copy.fingerprint == ours.fingerprint
    assert copy.chat_template == ours.chat_template


def test_digits_are_tokens_of_their_own(ours):
    assert len(ours.encode("90210")) == 5
    assert [ours.decode([token]) for token in ours.encode("x 12+345")] == ["x", " ", "1", "2", "+", "3", "4", "5"]


def test_training_is_exact_in_size_and_deterministic(ours, tmp_path):
    assert ours.vocab_size == 1_200
    assert Tokenizer.train(iter(corpus()), 1_200).fingerprint == ours.fingerprint
    (tmp_path / "corpus.json").write_text(json.dumps(corpus()))
    code = (
        "import json; from tokenizer import Tokenizer;"
        f"print(Tokenizer.train(json.load(open({str(tmp_path / 'corpus.json')!r})), 1200).fingerprint)"
    )
    for threads in "1", "4":
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == ours.fingerprint, run.stderr


# As they were learned before runs were cut.
MERGES_OF_ORDINARY_TEXT = "f699abaa4909628df5c92bdb4cd5773d0d6205c6a60ec2a12f9af9546e5a720c"


def merges_of(trained: Tokenizer) -> list:
    return json.loads(trained._marked.to_str())["model"]["merges"]


def test_cutting_long_runs_leaves_what_is_learned_from_ordinary_text(ours):
    """Words, indents, rules, paragraphs and sentences without spaces, in runs of up to 255 characters."""
    draw = random.Random(3)
    signs = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往"
    chinese = ["".join(draw.choices(signs, k=draw.randint(5, 200))) for _ in range(200)]
    laid_out = ["-" * draw.randint(1, 255) + "\n" * draw.randint(1, 99) + " " * draw.randint(1, 255) + "x = 1"
                for _ in range(200)]  # fmt: skip
    merges = merges_of(Tokenizer.train(corpus() + [text + "。" for text in chinese] + laid_out, 1_500))
    assert len(merges) == 1_500 - 16 - 256
    assert hashlib.sha256(json.dumps(merges).encode()).hexdigest() == MERGES_OF_ORDINARY_TEXT
    assert json.loads(ours._marked.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == bpe.SPLIT


@pytest.mark.parametrize("letters", ["ACGT", "天地玄黄宇宙洪荒日月盈昃", "😀😁😂🤣😃😄", "-=*", " ", "\n"])
def test_newcomer_runs_without_a_break_are_learned_from_in_parts_and_encoded_whole(letters):
    """In parts of one length, the library's time grows with their number; whole, with the square of the length."""
    run = "".join(random.Random(4).choices(letters, k=20 * bpe.LONGEST_RUN + 7))
    parts = [run[start : start + bpe.LONGEST_RUN] for start in range(0, len(run), bpe.LONGEST_RUN)]
    trained = Tokenizer.train([run], 1_100)
    assert merges_of(trained) == merges_of(Tokenizer.train(parts, 1_100)) != []
    assert trained.is_lossless([run])
    model = json.loads(trained._marked.to_str())["model"]
    engine = tokenizers.Tokenizer(models.BPE(model["vocab"], list(map(tuple, model["merges"]))))  # which cuts nothing
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(run)[0][0]
    assert trained.encode(run) == engine.encode(as_bytes).ids


def test_too_small_a_corpus_says_what_was_reached(caplog):
    small = Tokenizer.train(["to be or not to be, that is to be asked"], 1_024)
    assert 16 + 256 < small.vocab_size < 1_024
    assert f"{small.vocab_size}" in caplog.text and "1,024" in caplog.text
    assert small.is_lossless(NASTY.values())


@pytest.mark.parametrize("size", [0, 1_023, 50_258])
def test_vocabulary_sizes_out_of_range(size):
    with pytest.raises(TokenizerError, match="1,024 to 50,257"):
        Tokenizer.train(["a"], size)


def test_tokens_are_bounded_in_length():
    lined = Tokenizer.train(["-" * 500 + " " * 500 + "a"] * 50, 1_024)
    assert max(len(lined.decode([token]).encode()) for token in range(16, lined.vocab_size)) <= 32


def test_save_and_load_keep_everything(ours, tmp_path):
    ours.save(tmp_path / "t")
    for source in tmp_path / "t", str(tmp_path / "t"), tmp_path / "t" / "tokenizer.json":
        again = Tokenizer.load(source)
        assert again.fingerprint == ours.fingerprint
        assert (again.vocab_size, again.end_of_text) == (ours.vocab_size, ours.end_of_text)
        assert again.chat_template == ours.chat_template
    again.save(tmp_path / "u")
    for name in "tokenizer.json", "tokenizer_config.json":
        assert (tmp_path / "u" / name).read_bytes() == (tmp_path / "t" / name).read_bytes()


def test_fingerprint_tells_tokenizers_apart_but_not_their_spelling(ours, tmp_path):
    ours.save(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    assert len(ours.fingerprint) == len(hashlib.sha256().hexdigest())
    assert Tokenizer(json.dumps(definition)).fingerprint == ours.fingerprint  # without the line breaks
    assert Tokenizer(json.dumps(dict(reversed(definition.items())))).fingerprint == ours.fingerprint
    definition["model"]["merges"][3:5] = reversed(definition["model"]["merges"][3:5])
    assert Tokenizer(json.dumps(definition)).fingerprint != ours.fingerprint


def test_truncation_padding_and_dropout_of_a_file_are_not_obeyed(ours, tmp_path):
    ours.save(tmp_path)
    engine = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    engine.enable_truncation(4)
    engine.enable_padding(length=9)
    definition = json.loads(engine.to_str())
    definition["model"]["dropout"] = 0.5
    again = Tokenizer(json.dumps(definition))
    assert again.encode(corpus()[0]) == ours.encode(corpus()[0])
    assert again.fingerprint == ours.fingerprint


def test_what_is_no_text_or_no_id_is_refused(ours):
    with pytest.raises(ValueError, match="surrogate.*at 2"):
        ours.encode("ab\ud800")
    with pytest.raises(ValueError, match="text 1 has a lone surrogate"):
        ours.encode_batch(["fine", "\udfff"])
    with pytest.raises(ValueError, match="text 0 is int"):
        ours.encode_batch([3])
    for wrong in -1, ours.vocab_size:
        with pytest.raises(ValueError, match=f"{wrong} is no token id.*{ours.vocab_size - 1}"):
            ours.decode([5, wrong])


def test_half_a_character_decodes_to_the_replacement_character(ours):
    ids = ours.encode("😀")
    assert ours.decode(ids[:-1]) == "\ufffd"


def test_errors_of_loading_name_the_file(tmp_path):
    with pytest.raises(TokenizerError, match="nowhere does not exist.*hub:OWNER/NAME"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    contents = {
        "a.json": b"{nonsense",
        "b.json": b'{"vocab": {}}',
        "c.json": b'{"model": {"type": "what"}}',
        "d": b"\xff",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError, match=name):
            Tokenizer.load(tmp_path / name)
    with pytest.raises(TokenizerError, match="hub:OWNER/NAME"):
        Tokenizer.load("hub:nothing")


def word_level(*entries: str, special: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="[UNK]"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.add_special_tokens(list(special))
    return engine


def test_end_of_text_by_name_and_by_config():
    special_first = word_level("[UNK]", "</s>", "[SEP]", special=("[UNK]", "[SEP]"))  # "</s>" is HTML here
    assert Tokenizer(special_first.to_str()).end_of_text_token == "[SEP]"
    unusual = word_level("[UNK]", "a", "§", special=("[UNK]",))
    with pytest.raises(TokenizerError, match=r"<\|endoftext\|>.*</s>.*eos_token"):
        Tokenizer(unusual.to_str())
    with pytest.raises(TokenizerError, match="ordinary text that spells §"):
        Tokenizer(unusual.to_str(), {"eos_token": "§"})
    named = Tokenizer(
        word_level("[UNK]", "a", "<fin>", special=("[UNK]",)).to_str(), {"eos_token": {"content": "<fin>"}}
    )
    assert named.end_of_text_token == "<fin>"
    assert named.end_of_text not in named.encode("a <fin>")
    assert named.encode("a <fin>", allow_special=True) == [1, named.end_of_text]


def test_end_of_text_that_the_file_does_not_mark_as_special_cannot_be_forged(ours, tmp_path):
    ours.save(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["added_tokens"][0]["special"] = False
    again = Tokenizer(json.dumps(definition))
    assert again.end_of_text_token == "<|endoftext|>"
    assert again.encode("a<|endoftext|>") == ours.encode("a<|endoftext|>")
    assert again.fingerprint == ours.fingerprint


def test_foreign_files(real_data):
    gpt2 = Tokenizer.load(real_data / "tokenizers" / "gpt2_tokenizer.json")
    assert (gpt2.vocab_size, gpt2.end_of_text, gpt2.end_of_text_token) == (50_257, 50_256, "<|endoftext|>")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.is_lossless(NASTY.values())
    assert gpt2.end_of_text not in gpt2.encode("<|endoftext|>")
    assert gpt2.chat_template is None
    helium = Tokenizer.load(real_data / "tokenizers" / "helium_nano_32k.json")
    assert (helium.vocab_size, helium.end_of_text_token) == (32_000, "[SEP]")
    assert helium.end_of_text not in helium.encode("a [SEP] b")
    assert not helium.is_lossless(["two  spaces"])


def test_real_text_round_trips(real_data):
    lines = (real_data / "tinystories" / "valid.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    texts = [json.loads(line)["text"] for line in lines]
    trained = Tokenizer.train(texts, 2_048)
    assert trained.vocab_size == 2_048
    assert trained.is_lossless(texts)
    ratio = sum(len(text.encode()) for text in texts) / sum(map(len, trained.encode_batch(texts)))
    assert ratio > 3


def test_hub_names_load_from_the_cache_without_a_network(ours, tmp_path):
    repository = tmp_path / "models--someone--small"
    ours.save(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    code = "from tokenizer import Tokenizer; print(Tokenizer.load('hub:someone/{}').fingerprint)"
    command = [sys.executable, "-c", code.format("small")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == ours.fingerprint, run.stderr
    command = [sys.executable, "-c", code.format("other")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "hub:someone/other could not be loaded from the Hub or its cache" in run.stderr
