"""The probes count what they say, on stand-in models that answer as told."""

import pytest
import torch

from data import embedded
from data.embedded.long_documents import FACTS
from evaluation import probes
from models import ModelConfig, build_model
from tokenizer import Tokenizer

SEED = 5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train((text for kind in embedded.KINDS for text in embedded.documents(kind, "train", 60, 1)), 2048)


class Oracle(torch.nn.Module):
    """Predicts the token that really comes next in those documents it was given."""

    def __init__(self, tokenizer: Tokenizer, documents: list[list[int]], context: int = 2048):
        super().__init__()
        self.config = ModelConfig(vocab_size=tokenizer.vocab_size, context=context)
        self.place = torch.nn.Parameter(torch.zeros(1))
        self.documents = {tuple(ids[:40]): ids for ids in documents}
        self.modes: list[bool] = []

    def forward(self, input_ids, document_ids=None):
        assert document_ids is None
        self.modes.append(self.training)
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            truth = self.documents[tuple(ids[1:41])]
            for position, token in enumerate(truth):
                logits[row, position, token] = 1.0
        return logits


def test_recall_counts_questions_whose_whole_answer_is_right(tokenizer):
    asked = [embedded.recall(index, "valid", SEED) for index in range(4)]
    documents = [tokenizer.encode(document.text) for document in asked]
    model = Oracle(tokenizer, documents)
    total = sum(len(document.answers) for document in asked)
    result = probes.recall(model, tokenizer, seed=SEED, count=4, batch=3)
    assert (result.correct, result.total, result.accuracy) == (total, total, 1.0)
    assert result.low < 1 and result.high == 1
    assert model.modes == [False, False] and model.training

    # one token of two answers and one token outside all answers mispredicted: two questions fewer
    spans = probes.token_spans(tokenizer, documents[0], asked[0].answers)
    for position in (spans[0][1] - 1, spans[2][0], spans[4][0] - 1):
        documents[0][position] = (documents[0][position] + 1) % tokenizer.vocab_size
    result = probes.recall(Wrong(model, documents), tokenizer, seed=SEED, count=4, batch=2)
    assert (result.correct, result.total) == (total - 2, total)


class Wrong(Oracle):
    """An oracle whose predictions, not its inputs, come from changed documents."""

    def __init__(self, oracle: Oracle, changed: list[list[int]]):
        torch.nn.Module.__init__(self)
        self.config, self.place, self.modes = oracle.config, oracle.place, []
        self.documents = dict(zip(oracle.documents, changed, strict=True))


def test_answer_spans_are_the_answers(tokenizer):
    document = embedded.recall(1, "valid", SEED)
    ids = tokenizer.encode(document.text)
    for (start, end), (first, stop) in zip(
        probes.token_spans(tokenizer, ids, document.answers), document.answers, strict=True
    ):
        assert tokenizer.decode(ids[start:end]).strip() == document.text[first:stop]


def test_recall_passes_over_documents_that_do_not_fit(tokenizer):
    lengths = [len(tokenizer.encode(embedded.recall(index, "valid", SEED).text)) for index in range(12)]
    context = sorted(lengths)[5]
    fitting = [index for index, length in enumerate(lengths) if length <= context]
    documents = [tokenizer.encode(embedded.recall(index, "valid", SEED).text) for index in fitting]
    model = Oracle(tokenizer, documents, context=context)
    assert probes.recall(model, tokenizer, seed=SEED, count=3).accuracy == 1
    with pytest.raises(ValueError, match=r"fit a context of 256 tokens \(the shortest has \d+\)"):
        probes.recall(Oracle(tokenizer, documents, context=256), tokenizer, seed=SEED, count=3)


def test_word_problems_are_solved_by_greedy_decoding_of_held_out_problems(tokenizer, monkeypatch):
    import models.inference.decoding

    solutions = {task.question + "\n": task.solution for task in map(held_out, range(60))}
    wrong = None
    seen, asked = [], []

    def generate(model, prompts, max_new_tokens, stop_ids, sampling, on_token, entries, never):
        assert entries == tokenizer.vocab_size and never == [5]
        assert stop_ids == [tokenizer.end_of_text] and sampling.temperature == 0
        seen.append(len(prompts))
        answers = []
        for prompt in prompts:
            assert prompt[0] == tokenizer.end_of_text
            question = tokenizer.decode(prompt[1:])
            asked.append(question)
            answers.append(tokenizer.encode("#### 999" if question == wrong else solutions[question])[:max_new_tokens])
        return answers

    monkeypatch.setattr(models.inference.decoding, "generate", generate)
    result = probes.word_problems(None, tokenizer, seed=SEED, count=7, batch=4, never=[5])
    assert (result.correct, result.total, seen) == (7, 7, [4, 3])
    chains = {task.question + "\n": task.chain for task in map(held_out, range(60))}
    assert len({chains[question] for question in asked}) == 7, "no arithmetic is asked twice"
    wrong = asked[2]
    result = probes.word_problems(None, tokenizer, seed=SEED, count=7, batch=7, never=[5])
    assert (result.correct, result.total) == (6, 7)
    assert result.low < 6 / 7 < result.high


def held_out(index: int) -> embedded.Problem:
    return embedded.problem(index, "valid", SEED)


def test_too_few_different_problems_are_an_error(tokenizer, monkeypatch):
    same = held_out(0)
    monkeypatch.setattr(probes.embedded, "problem", lambda index, split, seed: same)
    with pytest.raises(ValueError, match="3 different held-out problems were asked for, and 1 were found"):
        probes.word_problems(None, tokenizer, seed=SEED, count=3)


def test_an_untrained_model_fails_both(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, window=8
    )
    model = build_model(config)
    assert probes.word_problems(model, tokenizer, seed=SEED, count=8, max_new_tokens=8).correct == 0
    result = probes.recall(model, tokenizer, seed=SEED, count=2)
    assert result.accuracy < 0.5 and result.total == 2 * len(FACTS)
