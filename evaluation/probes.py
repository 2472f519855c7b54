"""Two held-out probes of the embedded corpus: word problems and recall over a long document.

Both ask documents of the validation split, which never occur in training (data/embedded/draw.py), and give an
accuracy with its 95% interval.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data import embedded
from evaluation.answers import is_correct
from evaluation.intervals import clustered_wilson, wilson

if TYPE_CHECKING:
    from torch import nn

    from tokenizer import Tokenizer


@dataclass(frozen=True)
class ProbeResult:
    """How many were right, and the 95% interval [low, high] of the accuracy."""

    correct: int
    total: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


def _nothing(*_: object) -> None:
    pass


def word_problems(
    model: "nn.Module",
    tokenizer: "Tokenizer",
    *,
    seed: int,
    count: int = 200,
    batch: int = 100,
    max_new_tokens: int = 96,
    never: Sequence[int] = (),
    between: Callable[..., None] = _nothing,
) -> ProbeResult:
    """Solves `count` held-out word problems by greedy cached decoding; right is the exact number after "####".

    No two problems have the same arithmetic: a short chain that comes up again under other names would be one question
    counted several times, and the interval would be too narrow. `never` are tokens that are not drawn; `between` is
    called at each token, and may raise.

    Raises:
        ValueError: there are fewer than `count` different problems.
    """
    from models.inference.decoding import Sampling, generate

    tasks = _different_problems(seed, count)
    correct = 0
    for first in range(0, count, batch):
        part = tasks[first : first + batch]
        prompts = [[tokenizer.begin_of_text, *tokenizer.encode(task.question + "\n")] for task in part]
        solutions = generate(model, prompts, max_new_tokens, [tokenizer.end_of_text], Sampling(temperature=0.0),
                             between, tokenizer.vocab_size, never=never)  # fmt: skip
        correct += sum(
            is_correct(tokenizer.decode(solution), task.answer) for task, solution in zip(part, solutions, strict=True)
        )
    return ProbeResult(correct, count, *wilson(correct, count))


def recall(
    model: "nn.Module",
    tokenizer: "Tokenizer",
    *,
    seed: int,
    count: int = 25,
    batch: int = 1,
    between: Callable[..., None] = _nothing,
) -> ProbeResult:
    """Asks `count` long held-out documents for the facts that stand at their beginning alone, all at once.

    An answer counts as right when each of its tokens is the likeliest given the true document before it. That is what
    greedy decoding would answer, had the questions before it been answered truly; no answer helps with another. The
    interval allows for answers of one document being right or wrong together. Documents that do not fit the model's
    context are passed over, never cut. `between` is called before each batch of them, and may raise.

    Raises:
        ValueError: too few documents fit the model's context.
    """
    import torch

    from models.inference.decoding import evaluating

    clusters: list[tuple[int, int]] = []
    device = next(model.parameters()).device
    asked = list(_fitting(tokenizer, seed, count, model.config.context))
    for first in range(0, count, batch):
        between()
        part = asked[first : first + batch]
        longest = max(len(ids) for ids, _ in part)
        rows = [[tokenizer.begin_of_text, *ids] + [tokenizer.end_of_text] * (longest - len(ids)) for ids, _ in part]
        with evaluating(model), torch.inference_mode():
            likeliest = model(torch.tensor(rows, device=device)[:, :-1], None).argmax(dim=-1).tolist()
        for (ids, spans), row in zip(part, likeliest, strict=True):
            right = sum(row[start:end] == ids[start:end] for start, end in spans)
            clusters.append((right, len(spans)))
    correct, total = sum(right for right, _ in clusters), sum(size for _, size in clusters)
    return ProbeResult(correct, total, *clustered_wilson(clusters))


def _different_problems(seed: int, count: int) -> list[embedded.Problem]:
    """The first `count` held-out problems, leaving out those whose chain came before."""
    found: dict[object, embedded.Problem] = {}
    for index in range(50 * count):
        task = embedded.problem(index, "valid", seed)
        found.setdefault(task.chain, task)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{count} different held-out problems were asked for, and {len(found)} were found")


def _fitting(tokenizer: "Tokenizer", seed: int, count: int, context: int) -> Iterator[tuple[list[int], list]]:
    """(token ids, answers' token spans) of the first `count` recall documents that fit `context`."""
    found, shortest = 0, None
    for index in range(4 * count):
        document = embedded.recall(index, "valid", seed)
        ids = tokenizer.encode(document.text)
        shortest = min(len(ids), shortest or len(ids))
        if len(ids) <= context:
            yield ids, token_spans(tokenizer, ids, document.answers)
            found += 1
        if found == count:
            return
    raise ValueError(
        f"{found} of {4 * count} recall documents fit a context of {context} tokens (the shortest has {shortest}): "
        "the probe needs a longer context or a tokenizer with more entries"
    )


def check_recall(tokenizer: "Tokenizer", *, seed: int, context: int, count: int = 20) -> None:
    """Raises ValueError if too few of the first recall documents fit `context`."""
    for _ in _fitting(tokenizer, seed, count, context):
        pass


def token_spans(tokenizer: "Tokenizer", ids: list[int], characters: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The token span [start, end) that covers each character span, for text of one byte a character."""
    ends, position = [], 0
    for token in ids:
        position += len(tokenizer.decode([token]))
        ends.append(position)
    spans = []
    for first, stop in characters:
        start = next(index for index, end in enumerate(ends) if end > first)
        end = next(index for index, end in enumerate(ends) if end >= stop) + 1
        spans.append((start, end))
    return spans
