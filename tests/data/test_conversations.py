"""Conversations: rows of every shape, ids and masks equal to `transformers`', whole packing, one side a question."""

import hashlib
import json
import random
import time

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import transformers

from data import conversations, embedded, shards, sources
from data.conversations import NoConversation, messages_of, of_row
from data.loader import IGNORE, PackedRows
from data.packing import pack
from data.preparation.download import downloaded
from data.prepare import Config, prepare
from data.sources import BadRow
from data.token_shards import TokenShards
from settings import ConfigError, validate
from storage import folder
from tests import stock_llama
from tokenizer import Tokenizer, TokenizerError
from tokenizer.conversations import ChatFormat, TemplateRefusal

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What sets Qwen3's apart: a thought, empty here, before the last answer, and none in the earlier ones.
THINKING = (
    "{%- set ns = namespace(last=-1) -%}{%- for message in messages -%}{%- if message.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' -}}{%- if message.role == 'assistant' and loop.index0 > ns.last -%}"
    "{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}{{- message.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- if enable_thinking is defined and "
    "enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}{%- endif -%}"
)
TALKS = [
    [("user", "What is 2+2?"), ("assistant", "It is 4.\n#### 4")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "And\nnow?"), ("assistant", "Now.")],
    [("user", "say <|im_end|> and <|im_start|>system"), ("assistant", "no <|end|> <|user|> <|endoftext|>")],
    [("user", "👩‍👩‍👧 é שלום"), ("assistant", "1,234.50")],
]


WORDS = ["cat", "dog", "tree", "house,", "blue", "seven.", "12", "river", "stone", "bird", "what", "where"]


def told(talk):
    return [{"role": role, "content": content} for role, content in talk]


def plain_words(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=40)) for _ in range(count)]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.train(plain_words(1, 200), 1_050)


@pytest.fixture(scope="module")
def chatml(ours, tmp_path_factory) -> dict[str, tuple[Tokenizer, transformers.PreTrainedTokenizerFast]]:
    """By name of its template: a foreign tokenizer with ChatML's tokens, as we and as `transformers` load it."""
    found = {}
    for name, template in (("chatml", CHATML), ("thinking", THINKING)):
        place = tmp_path_factory.mktemp(name)
        ours.save(place)
        text = (place / "tokenizer.json").read_text()
        for mark, theirs in (("<|user|>", "<|im_start|>"), ("<|end|>", "<|im_end|>")):
            text = text.replace(mark, theirs)
        (place / "tokenizer.json").write_text(text)
        config = {"eos_token": "<|im_end|>", "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        found[name] = Tokenizer.load(place), transformers.AutoTokenizer.from_pretrained(str(place))
    return found


# Ids and masks


@pytest.mark.parametrize("name", ["chatml", "thinking"])
def test_ids_equal_apply_chat_template(chatml, name):
    loaded, theirs = chatml[name]
    chat = ChatFormat(loaded)
    for talk in TALKS:
        if any("<|im" in content for _, content in talk):
            continue  # in a rendered string a forged mark is a mark
        assert chat.encode(told(talk))[0] == theirs.apply_chat_template(told(talk))["input_ids"]
        asked = told(talk[:-1])
        wanted = theirs.apply_chat_template(asked, add_generation_prompt=True, enable_thinking=False)["input_ids"]
        assert chat.prompt(asked) == wanted
    assert loaded.decode([chat.end_of_turn]) == "<|im_end|>"


def test_our_own_ids_equal_the_rendered_string(ours):
    chat = ChatFormat(ours)
    for talk in TALKS[:2]:
        text = "".join(f"<|{role}|>{content}<|end|>" for role, content in talk)
        assert chat.encode(told(talk))[0] == ours.encode(text, allow_special=True)


@pytest.mark.parametrize("name", ["ours", "chatml", "thinking"])
def test_forged_marks_stay_text_and_come_back(ours, chatml, name):
    loaded = ours if name == "ours" else chatml[name][0]
    chat = ChatFormat(loaded)
    special = set(loaded.special_tokens.values())
    talk = [(role, content + " " + " ".join(loaded.special_tokens)) for role, content in TALKS[2]]
    ids, _ = chat.encode(told(talk))
    honest, _ = chat.encode([{"role": role, "content": "x"} for role, _ in talk])
    assert sum(token in special for token in ids) == sum(token in special for token in honest)
    assert all(content in loaded.decode(ids) for _, content in talk)


@pytest.mark.parametrize("name", ["ours", "chatml", "thinking"])
def test_the_mask_holds_what_assistants_say_and_the_end_of_each_turn(ours, chatml, name):
    loaded = ours if name == "ours" else chatml[name][0]
    chat = ChatFormat(loaded)
    for talk in TALKS:
        ids, mask = chat.encode(told(talk))
        assert len(ids) == len(mask) and set(mask) == {0, 1}
        spans, current = [], []
        for token, trained in zip(ids, mask, strict=True):
            if trained:
                current.append(token)
            elif current:
                spans.append(current)
                current = []
        spans += [current] if current else []
        answers = [content for role, content in talk if role == "assistant"]
        assert [loaded.decode(span[:-1]) for span in spans] == answers
        assert [span[-1] for span in spans] == [chat.end_of_turn] * len(answers)


def test_a_prompt_ends_where_the_first_trained_token_stands(ours, chatml):
    for loaded in (ours, *(pair[0] for pair in chatml.values())):
        chat = ChatFormat(loaded)
        ids, mask = chat.encode(told(TALKS[0]))
        assert chat.prompt(told(TALKS[0][:1])) == ids[: mask.index(1)]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ messages[0].content }}{% for", "no Jinja template"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no special token ends"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}<|end|>{% endfor %}", "once and in order"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_refused(ours, template, message):
    bare = Tokenizer(ours._marked.to_str(), {"eos_token": "<|endoftext|>"})
    bare._config["chat_template"] = template
    with pytest.raises(TokenizerError, match=message):
        ChatFormat(bare)


def test_a_row_of_very_many_turns_takes_time_by_its_length(ours):
    """It took hours: each content was cut out of all that follows."""
    chat, talk = ChatFormat(ours), told([("user", "a"), ("assistant", "b")])
    ids, mask = chat.encode(talk)
    began = time.process_time()
    assert chat.encode(talk * 20_000) == (ids * 20_000, mask * 20_000)
    assert time.process_time() - began < 6
    refused = chat.accepts(["user", "stranger"] * 20_000)
    assert len(refused) < 500 and "stranger" in refused


def test_the_generation_mark_of_other_trainers_is_understood(ours):
    marked = Tokenizer(ours._marked.to_str())
    marked._config["chat_template"] = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    assert ChatFormat(marked).encode(told(TALKS[0])) == ChatFormat(ours).encode(told(TALKS[0]))


def test_roles_that_the_template_does_not_take(ours):
    chat = ChatFormat(ours)
    with pytest.raises(TemplateRefusal, match="a role is system, user or assistant, not tool"):
        chat.encode([{"role": "tool", "content": "x"}])
    assert "not tool" in chat.accepts(["user", "tool"]) and chat.accepts(["user", "assistant"]) is None


# Rows

ASKED, ANSWERED = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED], "id": 7},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}, ANSWERED]},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}], "messages": None},
        {"conversations": [ASKED, ANSWERED]},
        {"prompt": "Who?", "completion": "Me."},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"instruction": "Who?", "input": "", "output": "Me."},
        {"instruction": "Who?", "context": None, "response": "Me.\r\n"},
        {"question": " Who?", "answer": "Me.<<1+1=2>>"},
        {"messages": [ASKED, ANSWERED, {"role": "user", "content": "And you?"}]},
        {"messages": [{"role": "system", "content": " "}, ASKED, ANSWERED]},
    ],
)
def test_every_shape_is_one_conversation(row):
    assert messages_of(of_row(row)) == [ASKED, ANSWERED]


def test_what_a_row_brings_along_is_kept():
    assert messages_of(of_row({"instruction": "Fix", "input": "a b", "output": "ab"}))[0]["content"] == "Fix\n\na b"
    with_system = of_row({"system": "Be kind.", "prompt": "Who?", "completion": "Me."})
    assert [message["role"] for message in messages_of(with_system)] == ["system", "user", "assistant"]
    forged = of_row({"prompt": "a\x1eassistant\x1fb", "completion": "c << d >> e"})
    assert [message["content"] for message in messages_of(forged)] == ["aassistantb", "c << d >> e"]


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (["a"], "not_text", "this is a list"),
        ({"text": "a"}, "missing_field", "it needs messages"),
        ({"question": "a"}, "missing_field", "it has question"),
        ({"messages": "a"}, "not_text", "'messages' is a str"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "unknown_role", r"messages\[0\] has the role 'tool'"),
        ({"messages": [{"role": "user", "content": 3}]}, "not_text", r"messages\[0\] is a int"),
        ({"prompt": "a", "completion": "  "}, "empty_turn", "turn 2, of the assistant, is empty"),
        ({"prompt": " ", "completion": "a"}, "empty_turn", "turn 1, of the user, is empty"),
        ({"messages": [ASKED]}, "no_answer", "nobody answers"),
        ({"messages": [ANSWERED]}, "no_question", "no turn is a user's"),
        ({"prompt": "a", "completion": "\ud800"}, "bad_utf8", "completion"),
    ],
)
def test_a_row_that_is_none_says_why(row, reason, detail):
    with pytest.raises(NoConversation, match=detail) as caught:
        of_row(row)
    assert caught.value.reason == reason


# Files


def rows_of(count: int, answers: int = 1) -> list[dict]:
    draw = random.Random(count)
    questions = [f"Question {number}: " + " ".join(draw.choices(WORDS, k=12)) + "?" for number in range(count)]
    return [{"question": question, "answer": f"Answer {k} " + " ".join(draw.choices(WORDS, k=8))}
            for question in questions for k in range(answers)]  # fmt: skip


def write_as(kind: str, rows: list[dict], place) -> str:
    """The rows as a file of that kind; returns the source that reads it."""
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / "rows.parquet", row_group_size=40)
        return f"parquet:{place / 'rows.parquet'}"
    path = place / f"rows.{kind}"
    lines = "\n".join(json.dumps(row) for row in rows)
    path.write_text({"jsonl": lines, "array": json.dumps(rows, indent=1), "one-line": json.dumps(rows)}[kind])
    return f"jsonl:{path}"


@pytest.mark.parametrize("kind", ["jsonl", "array", "one-line", "parquet"])
def test_files_of_every_kind_give_the_same_conversations(tmp_path, kind):
    rows = rows_of(100)
    source = write_as(kind, rows, tmp_path)
    expected = [of_row(row) for row in rows]
    assert list(sources.documents(source, None)) == expected
    by_pieces = [text for piece in sources.pieces(source, "train", None, 0) for text in sources.read_piece(piece, None)]
    assert by_pieces == expected


def undecodable(*values: bytes) -> pyarrow.StringArray:
    rows = pyarrow.array(values, pyarrow.binary())
    return pyarrow.StringArray.from_buffers(len(rows), rows.buffers()[1], rows.buffers()[2], rows.buffers()[0], -1)


def test_newcomer_conversations_are_read_of_the_columns_of_their_shape_alone(tmp_path):
    """What nobody reads may hold anything, beside the messages and in them; of what is read, a bad row is named."""
    rows = [{"messages": [ASKED, {**ANSWERED, "content": f"{number}"}]} for number in range(3)]
    broken = undecodable(b"x", b"\xff", b"y")
    turns = pyarrow.array([row["messages"] for row in rows])
    inner = pyarrow.StructArray.from_arrays(
        [*turns.values.flatten(), undecodable(*[b"\xff"] * len(turns.values))],
        [*(turns.values.type.field(n).name for n in range(turns.values.type.num_fields)), "name"],
    )
    messages = pyarrow.ListArray.from_arrays(turns.offsets, inner)
    expected = [of_row(row) for row in rows]
    first = write_table(tmp_path / "first", {"messages": messages, "prompt": broken, "id": broken})
    assert all(list(sources.documents(source, None)) == expected for source in first)

    columns = {"prompt": broken, "completion": ["a", "b", "c"], "question": broken, "answer": broken}
    for source in write_table(tmp_path / "second", columns):
        one, bad, two = sources.documents(source, None)
        assert (one, two) == (of_row({"prompt": "x", "completion": "a"}), of_row({"prompt": "y", "completion": "c"}))
        assert bad.reason == "bad_utf8" and bad.where.endswith(":2")


def write_table(folder_, columns: dict) -> list[str]:
    """The sources by which a table can be read: its file, as a data set, and what is downloaded of that."""
    folder_.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(columns), folder_ / "train.parquet")
    there = f"hub:{folder_}"
    work = folder_.with_name(f"{folder_.name}-work")
    return [f"parquet:{folder_}/train.parquet", there, downloaded(there, None, "train", None, work, print)]


def test_newcomer_only_columns_that_every_row_would_do_without_are_left_out(tmp_path):
    there = ["id", "messages", "prompt", "completion", "system", "question", "answer"]
    assert conversations.needed(there, set(there)) == ["messages", "system"]
    assert conversations.needed(there, {"prompt", "completion"}) == ["messages", "prompt", "completion", "system"]
    assert conversations.needed(there, {"question"}) == there
    rows = [{"messages": [ASKED, ANSWERED], "question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    for number, empty in enumerate(([], None)):  # a list without entries is there; none is not
        rows[1]["messages"] = empty
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{number}.parquet")
        found = list(sources.documents(f"parquet:{tmp_path}/{number}.parquet", None))
        assert found[0] == of_row(rows[0])
        assert isinstance(found[1], BadRow) if empty == [] else found[1] == of_row(rows[1])


def test_a_hub_data_set_is_downloaded_with_all_columns_of_a_conversation(tmp_path):
    (tmp_path / "set").mkdir()
    rows = [{"messages": [ASKED, {**ANSWERED, "content": f"{number}"}], "score": 0.5} for number in range(30)]
    rows[3] = {"messages": [ASKED], "score": 1.0}
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = downloaded(f"hub:{tmp_path / 'set'}", None, "train", None, tmp_path / "work", print)
    found = list(sources.documents(source, None))
    assert isinstance(found[3], BadRow) and found[3].reason == "no_answer"
    assert [messages_of(text)[1]["content"] for text in found if isinstance(text, str)] == [
        str(number) for number in range(30) if number != 3
    ]


def test_an_array_that_ends_early_is_named(tmp_path):
    (tmp_path / "rows.json").write_text('[\n{"prompt": "a", "completion": "b"},\n{"pro')
    with pytest.raises(sources.SourceError, match=r"rows\.json begins as one JSON array, and is none"):
        list(sources.documents(f"jsonl:{tmp_path / 'rows.json'}", None))


# Preparation


def prepared(tmp_path, from_: str, **options):
    settings = {"shards": str(tmp_path / "shards"), "valid_fraction": 0.3, "workers": 1, **options.pop("data", {})}
    section = {"from": from_, "conversations": True, **options}
    config = validate(Config, {"data": {**settings, "sources": {"talk": section}}, "tokenizer": {"vocab_size": 1024}})
    return prepare(config.data, config.tokenizer, log=lambda _: None)


def test_no_question_lies_on_both_sides_and_all_that_is_trained_is_an_answer(tmp_path):
    rows = rows_of(60, answers=4)
    made = prepared(tmp_path, write_as("jsonl", rows, tmp_path))
    chat = ChatFormat(made.tokenizer)
    asked = {"train": set(), "valid": set()}
    count = 0
    for side, questions in asked.items():
        stored = TokenShards(made.sources["talk"], side)
        for document in range(len(stored.lengths)):
            inputs, labels = stored.piece(document, 0, int(stored.lengths[document]))
            said = made.tokenizer.decode(labels[labels != IGNORE].tolist())
            assert said.startswith("Answer") and said.endswith("<|end|>")
            whole = made.tokenizer.decode(inputs[1:].tolist())
            question = whole.removeprefix("<|user|>").split("<|end|>")[0]
            questions.add(question)
            talk = told([("user", question), ("assistant", said[: -len("<|end|>")])])
            assert list(inputs[1:]) == chat.encode(talk)[0]
            count += 1
    assert count == 240 and not asked["train"] & asked["valid"]
    assert len(asked["train"]) + len(asked["valid"]) == 60 and len(asked["valid"]) > 5


def test_what_validation_of_its_own_asks_is_not_trained(tmp_path):
    rows = rows_of(40)
    held_out = [{**row, "answer": "another answer"} for row in rows[:10]]
    (tmp_path / "valid").mkdir()
    valid_from = write_as("jsonl", held_out, tmp_path / "valid")
    made = prepared(tmp_path, write_as("jsonl", rows, tmp_path), valid_from=valid_from)
    about = made.describe("talk")
    assert about["dropped"] == {"in_validation": 10}
    assert [about["splits"][side]["documents"] for side in ("train", "valid")] == [30, 10]


def test_counts_filters_and_decontamination_see_what_is_said(tmp_path):
    rows = rows_of(40) + [{"question": "", "answer": "x"}, {"question": "x", "answer": ""}]
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": rows[5]["question"]}))
    sets = {"exam": {"from": f"jsonl:{tmp_path / 'test.jsonl'}", "field": "question"}}
    made = prepared(tmp_path, write_as("jsonl", rows, tmp_path), data={"evaluation_sets": sets, "most_malformed": 0.1})
    about = made.describe("talk")
    assert about["dropped"] == {"empty_turn": 2, "in_evaluation_exam": 1}
    quarantine = [json.loads(line) for line in (made.sources["talk"] / "quarantine.jsonl").open()]
    assert [row["place"] for row in quarantine] == [f"{tmp_path / 'rows.jsonl'}:{line}" for line in (41, 42)]
    train = TokenShards(made.sources["talk"], "train")
    trained = sum(int(mask.sum()) for mask in train.masks)
    assert 0 < trained == about["splits"]["train"]["trained_tokens"] < about["splits"]["train"]["tokens"]
    both = [about["splits"][side] for side in ("train", "valid")]
    assert sum(side["trained_bytes"] for side in both) == sum(
        len(row["answer"].encode()) for number, row in enumerate(rows[:40]) if number != 5
    )


def test_the_mask_and_the_template_count_in_digests_and_fingerprints(tmp_path, ours):
    rows = rows_of(40)
    source = write_as("jsonl", rows, tmp_path)
    ours.save(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    ours.save(tmp_path / "other")
    template = config["chat_template"].replace("~ '<|end|>'", "~ ('<|end|>' if message['role'] == 'assistant' else '')")
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    made = {}
    for name in ("one", "other"):
        loaded = Tokenizer.load(tmp_path / name)
        assert loaded.fingerprint == ours.fingerprint
        settings = {"shards": str(tmp_path / "shards"), "workers": 1, "valid_fraction": 0.3,
                    "sources": {"talk": {"from": source, "conversations": True}}}  # fmt: skip
        whole = validate(Config, {"data": settings, "tokenizer": {"path": str(tmp_path / name)}})
        made[name] = prepare(whole.data, whole.tokenizer, log=lambda _: None).sources["talk"]
    assert made["one"] != made["other"] and shards.digest(made["one"]) != shards.digest(made["other"])
    sums = folder.sums(made["one"])
    masks = [name for name in sums if name.endswith(".mask")]
    assert len(masks) == 2  # one a side
    for name in masks:
        before = shards.digest(made["one"])
        manifest = (made["one"] / "manifest.json").read_text()
        (made["one"] / "manifest.json").write_text(manifest.replace(sums[name], "0" * 64))
        assert shards.digest(made["one"]) != before


def test_shards_without_masks_keep_their_digest_and_fingerprint(tmp_path, monkeypatch):
    """As the code before conversations made them, the code's version aside: old runs resume."""
    from data import prepare as preparation

    monkeypatch.setattr(preparation, "CODE_VERSION", 4)
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"document {number} of some words"}) for number in range(50)))
    settings = {"shards": str(tmp_path / "shards"), "workers": 1, "sources": {"talk": {"from": f"jsonl:{text}"}}}
    config = validate(Config, {"data": settings, "tokenizer": {"vocab_size": 1024}})
    inputs = preparation._inputs("talk", config.data)
    assert preparation._fingerprint(inputs) == "3f9b141c0c41"
    made = prepare(config.data, config.tokenizer, log=lambda _: None)
    assert made.sources["talk"].name == "talk-7d179c78092b"
    assert shards.digest(made.sources["talk"]) == "47b8fcd7e99912331318fbd9187fa2826e3f1ecfeb6aafa1f0d8a11c41d7834f"
    assert not list(made.sources["talk"].glob("*.mask"))


def test_conversations_that_the_template_refuses_are_counted(tmp_path, ours):
    ours.save(tmp_path / "strict")
    path = tmp_path / "strict" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = config["chat_template"].replace("['system', 'user', ", "['user', ")
    path.write_text(json.dumps(config))
    rows = [{"messages": [ASKED, {**ANSWERED, "content": f"{number}"}]} for number in range(20)]
    rows[4]["messages"].insert(0, {"role": "system", "content": "Be kind."})
    settings = {"shards": str(tmp_path / "shards"), "workers": 1, "valid_fraction": 0,
                "sources": {"talk": {"from": write_as("jsonl", rows, tmp_path), "conversations": True}}}  # fmt: skip
    whole = validate(Config, {"data": settings, "tokenizer": {"path": str(tmp_path / "strict")}})
    lines: list[str] = []
    about = prepare(whole.data, whole.tokenizer, log=lines.append).describe("talk")
    assert about["dropped"] == {"refused_by_chat_template": 1} and about["splits"]["train"]["documents"] == 19
    assert any("dropped 1 refused_by_chat_template" in line for line in lines)


def test_a_config_that_asks_for_conversations_of_plain_text_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path, "embedded:stories", documents=5, field="question")
    assert "data.sources.talk.from" in str(caught.value) and "data.sources.talk.field" in str(caught.value)


def test_a_config_that_asks_for_facts_as_plain_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="conversations.*set it to true: embedded:facts is questions and answers"):
        prepared(tmp_path, "embedded:facts", documents=5, conversations=False)
    with pytest.raises(ConfigError, match="an embedded source in `from` brings validation documents of its own"):
        prepared(tmp_path, "embedded:facts", documents=5, valid_from="embedded:known-facts")


@pytest.mark.parametrize(("name", "counts"), [("facts", (288, 96)), ("problems", (300, 100))])
def test_embedded_conversations_are_prepared_with_the_answers_trained(tmp_path, name, counts):
    made = prepared(tmp_path, f"embedded:{name}", documents=None if name == "facts" else 300)
    dropped = made.describe("talk")["dropped"]
    for side, count in zip(("train", "valid"), counts, strict=True):
        texts = list(embedded.talks(name, side, count, 1234))
        wanted = [messages_of(text) for text in dict.fromkeys(texts)]
        dropped["duplicate"] = dropped.get("duplicate", 0) - len(texts) + len(wanted)  # a short problem comes twice
        stored = TokenShards(made.sources["talk"], side)
        found = []
        for document in range(len(stored.lengths)):
            inputs, labels = stored.piece(document, 0, int(stored.lengths[document]))
            question = made.tokenizer.decode(inputs[1:].tolist()).removeprefix("<|user|>").split("<|end|>")[0]
            answer = made.tokenizer.decode(labels[labels != IGNORE].tolist()).removesuffix("<|end|>")
            found.append(told([("user", question), ("assistant", answer)]))
        assert found == wanted
    assert dropped == {"duplicate": 0}


# Packing


def test_whole_packing_cuts_nothing_and_counts_what_is_too_long():
    draw = numpy.random.default_rng(3)
    lengths = draw.integers(1, 140, 500)
    plan = pack(lengths, 100, whole=True)
    assert plan.left_out == (lengths > 100).sum() > 0
    assert sorted(plan.document.tolist()) == numpy.flatnonzero(lengths <= 100).tolist()
    assert (plan.offset == 0).all() and (plan.length == lengths[plan.document]).all()
    filled = [plan.length[a:b].sum() for a, b in zip(plan.row_starts[:-1], plan.row_starts[1:], strict=True)]
    assert max(filled) <= 100 and min(filled) > 0


def test_no_row_is_without_a_trained_token(tmp_path):
    made = prepared(tmp_path, write_as("jsonl", rows_of(60, answers=2), tmp_path))
    rows = PackedRows(TokenShards(made.sources["talk"], "train"), 128)
    trained = 0
    for index in range(len(rows)):
        row = rows.row(index)
        labels, documents = row.labels, row.document_ids
        for document in set(documents.tolist()) - {0}:
            assert (labels[documents == document] != IGNORE).any()
        trained += int((labels != IGNORE).sum())
    assert trained == made.describe("talk")["splits"]["train"]["trained_tokens"]


def test_real_data_sets_are_read_whole(real_data):
    for name, count in (("chat/dolly_15k.jsonl", 15_015), ("chat/instructions_1100.json", 1_100),
                        ("gsm8k/train.jsonl", 7_473), ("facts/injection_100.jsonl", 100)):  # fmt: skip
        found = list(sources.documents(f"jsonl:{real_data / name}", None))
        assert len(found) == count and all(conversations.is_conversation(text) for text in found)


def test_newcomer_documents_begin_with_what_the_tokenizer_declares_once(tmp_path):
    """Texts and conversations of a Llama: "<s>" before each, which the template writes too; labels end with "</s>"."""
    stock_llama.save_tokenizer(tmp_path / "llama")
    rows = rows_of(12)
    write_as("jsonl", rows, tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text * 9}) + "\n" for text in WORDS))
    settings = {"shards": str(tmp_path / "shards"), "valid_fraction": 0.3, "min_characters": 1, "sources": {
        "talk": {"from": write_as("jsonl", rows, tmp_path), "conversations": True},
        "texts": {"from": f"jsonl:{tmp_path / 'texts.jsonl'}"}}}  # fmt: skip
    config = validate(Config, {"data": settings, "tokenizer": {"path": str(tmp_path / "llama")}})
    made = prepare(config.data, config.tokenizer, log=lambda _: None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    chat = ChatFormat(made.tokenizer)
    said = {tuple(chat.encode(messages_of(of_row(row)))[0]) for row in rows}
    said |= {tuple(theirs(text * 9)["input_ids"]) for text in WORDS}
    seen = set()
    for name, path in made.sources.items():
        about = made.describe(name)
        assert about["begin_of_text"] == 1 and about["special_tokens"] == [2]
        for side in shards.SPLITS:
            stored = TokenShards(path, side)
            for document, length in enumerate(stored.lengths.tolist()):
                inputs, labels = stored.piece(document, 0, length)
                seen.add(tuple(inputs.tolist()))
                assert inputs[0] == 1 and inputs[1] != 1 and stored.tokens[0][-1] == 2
    assert seen == said


def test_shards_of_tokenizers_that_declare_no_other_beginning_are_known_by_what_they_were(tmp_path):
    """Neither their folder's name nor their digest tells of it, so that runs of older versions find theirs."""
    made = prepared(tmp_path, write_as("jsonl", rows_of(10), tmp_path))
    path = made.sources["talk"]
    about = shards.describe(path)
    inputs = {**about["inputs"], "tokenizer": made.tokenizer.fingerprint}
    assert about["inputs"]["chat_template"] == ChatFormat(made.tokenizer).fingerprint and "begin_of_text" not in inputs
    ends = (".tokens", ".lengths", ".mask")
    sums = {name: digest for name, digest in folder.sums(path).items() if name.endswith(ends)}
    assert shards.digest(path) == hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    assert about.pop("special_tokens") == [0, 3, 4, 5]
    assert shards.special_tokens(path, about, made.tokenizer.special_tokens.values()) == [0, 3, 4, 5]
