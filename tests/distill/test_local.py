"""The `local` engine: one text a key in whatever batch, what ended an answer, and marks that a model wrote."""

import random

import pytest
import torch

import checkpoints
from distill.teachers import Request, TeacherError
from distill.teachers.local import Local
from models.inference.decoding import generate
from models.inference.sampling import Sampling
from tokenizer.conversations import ChatFormat

SAMPLING = Sampling(temperature=1.0, top_k=50, top_p=0.95)


@pytest.fixture(scope="module")
def precise(teacher):
    """In float64, where rounding turns no draw."""
    return Local(str(teacher), dtype="fp64", device="cpu")


@pytest.fixture(scope="module")
def requests(rows):
    return [Request([{"role": "user", "content": row["question"]}], seed=2**62 + 7 * number)
            for number, row in enumerate([*rows[::2], *rows[:4]])]  # fmt: skip


def test_chunk_size_padding_and_order_of_rows_leave_every_key_its_text(precise, requests):
    def by_seed(batches):
        return {request.seed: answer for batch in batches
                for request, answer in zip(batch, precise.answer(batch, SAMPLING, 8), strict=True)}  # fmt: skip

    shuffled = random.Random(0).sample(requests, len(requests))
    alone = by_seed([request] for request in requests)
    assert by_seed(requests[start : start + 7] for start in range(0, len(requests), 7)) == alone
    assert by_seed([requests]) == alone
    assert by_seed([shuffled]) == alone  # beside other neighbours, with other padding
    assert len({answer.text for answer in alone.values()}) > 25  # each draws by its own seed


def test_it_asks_as_the_model_was_taught(precise, teacher, requests):
    """The texts are those of `generate` on the tokenizer's own prompt, after the end of a text."""
    model, tokenizer, _ = checkpoints.load_model(teacher, dtype=torch.float64)
    chat = ChatFormat(tokenizer)
    prompts = [[tokenizer.end_of_text, *chat.prompt(request.messages)] for request in requests[:5]]
    seeds = [request.seed for request in requests[:5]]
    never = [token for token in tokenizer.special_tokens.values() if token not in chat.stop_ids]
    outputs = generate(model.double(), prompts, 8, chat.stop_ids, SAMPLING, entries=tokenizer.vocab_size, seeds=seeds,
                       never=never)  # fmt: skip
    answers = precise.answer(requests[:5], SAMPLING, 8)
    assert [answer.text for answer in answers] == [tokenizer.decode(ids) for ids in outputs]
    assert [answer.prompt_tokens for answer in answers] == [len(prompt) for prompt in prompts]


def test_why_an_answer_ended(precise, requests, monkeypatch):
    """A stop token is counted and not told; what reaches the limit is cut; what does not fit is refused."""
    long = Request([{"role": "user", "content": "word " * 2000}], 1)
    strange = Request([{"role": "tool", "content": "word"}], 1)
    refused, fine, no_form = precise.answer([long, requests[0], strange], SAMPLING, 8)
    assert (refused.finish, refused.text, refused.tokens) == ("refused", "", 0) and refused.prompt_tokens > 1024
    assert no_form.finish == "refused"
    assert [fine] == precise.answer(requests[:1], SAMPLING, 8)
    word = precise._tokenizer.encode("apples")[0]
    outputs = [[word] * 8, [word] * 7, []]
    monkeypatch.setattr("models.inference.decoding.generate", lambda *_, **__: outputs)
    ended = precise.answer(requests[:3], SAMPLING, 8)
    assert [(answer.finish, answer.tokens) for answer in ended] == [("length", 8), ("stop", 8), ("stop", 1)]


def test_an_answer_ends_with_the_context(teacher, requests, monkeypatch):
    short = Local(str(teacher), context=64, device="cpu")
    monkeypatch.setattr(short, "_stops", [])  # which a model that knows nothing comes upon now and then
    prompts = [answer.prompt_tokens for answer in short.answer(requests, SAMPLING, 1)]
    answers = short.answer(requests, SAMPLING, 40)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert (answer.finish, answer.tokens) == ("length", min(40, 64 - prompt)) if prompt < 64 else (
            answer.finish == "refused")  # fmt: skip
    assert len({answer.tokens for answer in answers}) > 3


def test_marks_that_the_model_wrote_are_seen(precise, requests, monkeypatch):
    """A filter could not throw away what is not in the text."""
    mark = precise._tokenizer.token_id("<|user|>")
    marks_only = lambda model, prompts, *_, **__: [[mark, mark] for _ in prompts]  # noqa: E731
    monkeypatch.setattr("models.inference.decoding.generate", marks_only)
    assert precise.answer(requests[:1], SAMPLING, 8)[0].text == "<|user|><|user|>"


def test_who_it_is_depends_on_the_weights_alone(teacher, tmp_path):
    import shutil

    from storage import folder

    about = Local(str(teacher)).about()
    copy = tmp_path / "another-name"
    shutil.copytree(teacher, copy)
    assert Local(str(copy)).about() == about
    (checkpoint,) = (copy / "checkpoints").iterdir()
    changed = bytearray((checkpoint / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    with folder.write(tmp_path / "changed") as temporary:
        for file in checkpoint.rglob("*"):
            if file.is_file() and file.name != folder.MANIFEST:
                (temporary / file.relative_to(checkpoint)).parent.mkdir(exist_ok=True)
                shutil.copy(file, temporary / file.relative_to(checkpoint))
        (temporary / "model.safetensors").write_bytes(changed)
    assert Local(str(tmp_path / "changed")).about()["digest"] != about["digest"]


def test_a_teacher_that_is_none_is_refused_by_name(tmp_path):
    with pytest.raises(TeacherError, match="nowhere"):
        Local(str(tmp_path / "nowhere"))
