"""What a checkpoint knows of the facts it was tutored in, and what that cost.

    python -m evaluation.facts --checkpoint runs/tutor --baseline runs/tutor/checkpoints/step-00000100
        [--data jsonl:FILE] [--replay embedded:stories] [--json FILE]

Four sets of questions, each put by the tokenizer's chat template and answered greedily:
    trained     the facts, in the wordings that were trained
    held_out    the same facts in other wordings: what tutoring is for
    neighbours  facts about other subjects of the same kind, which must not flip to what was taught of theirs
    controls    what has nothing to do with the facts
A reply is right if it names an accepted answer and none of the other values that such facts have; letter case, articles
and punctuation do not matter. Of a word problem, the line "#### N" decides. Each set has its share of right replies
with the 95% interval (questions about one fact count as one cluster), and the mean log-probability of a token of the
right answer. --replay adds the perplexity of held-out text. Against a baseline, the state before, an exact McNemar test
compares facts, each known if every question about it is answered rightly; the forgetting index is the mean relative
loss of accuracy over neighbours and controls (0: nothing lost, 1: everything).

Without --data, the questions are those of the embedded facts (data/embedded/facts.py), drawn from the run's data.seed.
A file of one's own has rows with `set`, `question`, `answer` (a text, or a list of accepted ones) and, where there are
any, `id` (of the fact), `others` (values that make a reply wrong), `taught` (of a neighbour: what it may not flip to).

Several processes share the work: `accelerate launch -m evaluation.facts ...`. Exit codes: 0 done, 1 a checkpoint or the
data cannot be used, 2 wrong arguments, 75 interrupted.
"""

if __name__ == "__main__":  # the imports below take their time
    from data.preparation import interruption
    from machine import process

    interruption.end_at_once("interrupted: nothing was written; the same command begins again")
    process.prepare()

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import conversations, embedded, sources
from data.embedded import facts
from data.preparation import clean, interruption
from data.preparation.words import spaced_words_of
from evaluation import chat, command, record
from evaluation.answers import gold_answer, is_correct
from evaluation.asking import Log, Processes, Progress, ask, device_of
from evaluation.gsm8k import Student
from evaluation.intervals import clustered_wilson
from evaluation.marking import compared
from evaluation.problems import VALID_FRACTION, valid_fraction_of
from machine import process
from storage import inputs

if TYPE_CHECKING:
    from tokenizer.conversations import ChatFormat

SETS = ("trained", "held_out", "neighbours", "controls")
KEPT = ("neighbours", "controls")  # what tutoring must leave as it is
SEED = 1234  # of the embedded facts, where a checkpoint does not say
_ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Question:
    """One question and what is right."""

    set: str  # of SETS
    id: str  # of the fact that it asks for
    text: str
    answers: tuple[str, ...]  # accepted ones; the first is the one whose probability is measured
    others: tuple[str, ...] = ()  # other values: a reply that names one of them is wrong
    taught: str | None = None  # of a neighbour: the answer that it must not flip to

    def is_answered_by(self, reply: str) -> bool:
        """Whether the reply is right."""
        if "####" in self.answers[0]:
            return is_correct(reply, self.answers[0])
        said = words(reply)
        return any(_says(said, answer) for answer in self.answers) and not any(_says(said, value) for value in
                                                                                self.others)  # fmt: skip

    def is_flipped_by(self, reply: str) -> bool:
        """Whether the reply gives the answer that was taught for another subject."""
        return self.taught is not None and _says(words(reply), self.taught)


@dataclass(frozen=True)
class Answered:
    """A checkpoint's reply to one question."""

    reply: str
    correct: bool
    flipped: bool
    log_probability: float  # of a token of the right answer and its end, on average, in nats


def words(text: str) -> list[str]:
    """The words of a text in small letters, without articles and punctuation."""
    return [word for word in spaced_words_of(clean.normalise(text).casefold()) if word not in _ARTICLES]


def _says(said: list[str], answer: str) -> bool:
    wanted = words(answer)
    return any(said[first : first + len(wanted)] == wanted for first in range(len(said) - len(wanted) + 1))


def of_corpus(seed: int, group: facts.Group = "missing") -> list[Question]:
    """The questions about the embedded facts of a group; of the missing ones, their neighbours and controls too."""
    found = []
    for fact in facts.facts(seed, group):
        found += [_of_fact("trained", fact, wording) for wording in fact.trained]
        found += [_of_fact("held_out", fact, wording) for wording in fact.held_out]
    if group == "missing":
        found += [_of_fact("neighbours", known, wording, fact.answer)
                  for fact, known in facts.neighbours(seed) for wording in known.held_out]  # fmt: skip
        found += [Question("controls", f"problem-{number}", problem.question, (problem.solution,))
                  for number, problem in enumerate(facts.controls(seed))]  # fmt: skip
    return found


def _of_fact(set_: str, fact: facts.Fact, wording: str, taught: str | None = None) -> Question:
    others = tuple(value for value in facts.KINDS[fact.kind].values if value != fact.answer)
    return Question(set_, fact.id, wording, (fact.answer,), others, taught)


def of_file(source: str) -> list[Question]:
    """The questions of a JSON lines file of one's own.

    Raises:
        sources.SourceError: it cannot be read, or a row is no question.
    """
    found = []
    for path in sources.files(source):
        try:
            with inputs.reading(path) as file:
                lines = file.read().decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise sources.SourceError(f"{source}: {path} cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                found.append(_of_line(line, f"{path}:{number}"))
    if not found:
        raise sources.SourceError(f"{source} has no questions")
    return found


def _of_line(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise sources.SourceError(f"{where}: no JSON: {error}") from error
    if not isinstance(row, dict) or row.get("set") not in SETS:
        raise sources.SourceError(f"{where}: a row is an object whose `set` is one of {', '.join(SETS)}")
    answers = row.get("answer")
    answers = [answers] if isinstance(answers, str) else answers
    texts = {"question": [row.get("question")], "answer": answers, "others": row.get("others", []),
             "id": [row.get("id", where)], "taught": [row.get("taught") or "-"]}  # fmt: skip
    for name, values in texts.items():
        if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
            raise sources.SourceError(f"{where}: `{name}` is {row.get(name)!r}: write a text that is not empty"
                                      + (", or a list of them" if name in ("answer", "others") else ""))  # fmt: skip
    if not answers:
        raise sources.SourceError(f"{where}: `answer` is empty: name at least one")
    if "####" in answers[0]:
        try:
            gold_answer(answers[0])
        except ValueError as error:
            raise sources.SourceError(f"{where}: {error}") from error
    elif not all(map(words, [*answers, *texts["others"]])):
        raise sources.SourceError(f"{where}: an answer needs a word that is no article")
    question = Question(row["set"], texts["id"][0], row["question"], tuple(answers), tuple(texts["others"]),
                        row.get("taught"))  # fmt: skip
    for accepted in answers:
        if not question.is_answered_by(accepted):
            raise sources.SourceError(f"{where}: {accepted!r} could never be right: a value of `others` stands in it")
    return question


def answer(student: Student, form: "ChatFormat", asked: Sequence[Question], **asking: Any) -> list[Answered]:
    """What the student says to each question, greedily; `asking` goes to `ask`.

    Raises:
        sources.SourceError: a question with its answer is longer than the context.
    """
    from tokenizer.conversations import begun

    talks = [conversations.of_row({"prompt": question.text, "completion": question.answers[0]}) for question in asked]
    encoded, left_out = chat.encoded(talks, form, student.start, student.model.config.context)
    if left_out:
        raise sources.SourceError(f"{sum(left_out.values())} of the questions cannot be asked of {student.path.name}: "
                                  f"{', '.join(left_out)}")  # fmt: skip
    losses = chat.losses(student.model, encoded, asking["group"])
    prompts = [begun(student.start, form.prompt(each.first_turns())) for each in encoded]
    stop_ids = sorted({*student.ends, *form.stop_ids})
    replies = ask(student.model, student.tokenizer, prompts, stop_ids=stop_ids, never=student.never, **asking)
    return [Answered(reply.text, question.is_answered_by(reply.text), question.is_flipped_by(reply.text), -nats / count)
            for question, reply, (nats, count) in zip(asked, replies, losses, strict=True)]  # fmt: skip


def perplexity(student: Student, texts: Iterable[str], group: Processes) -> dict[str, float]:
    """Loss in nats a token over held-out texts, each as far as it fits the context, and its perplexity."""
    context = student.model.config.context
    rows = []
    for text in texts:
        said = [*student.tokenizer.encode(text), student.tokenizer.end_of_text]
        ids = (student.start + said)[: context + 1]  # the last token is not fed
        mask = [0] * len(student.start) + [1] * (len(ids) - len(student.start))
        rows.append(chat.Conversation(text, ids, mask))
    found = chat.losses(student.model, rows, group)
    tokens = sum(count for _, count in found)
    loss = sum(nats for nats, _ in found) / tokens
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}


def held_out_texts(source: str, count: int, seed: int, valid_fraction: float) -> list[str]:
    """The first `count` documents of a source that training does not see.

    Raises:
        sources.SourceError: it cannot be read, or has none.
    """
    if source.startswith("embedded:"):
        return list(sources.documents(source, split="valid", count=count, seed=seed))
    found: list[str] = []
    for text in sources.documents(source):
        if isinstance(text, str) and text.strip():
            text = clean.normalise(text)
            found += [text] * (clean.split_of(text, valid_fraction) == "valid")
        if len(found) == count:
            return found
    if not found:
        raise sources.SourceError(f"{source} has no text that is held out at a valid fraction of {valid_fraction}")
    return found


def scores(asked: Sequence[Question], answered: Sequence[Answered]) -> dict[str, dict[str, Any]]:
    """By set: right replies, their share with its 95% interval, the mean log-probability, and flips of neighbours."""
    found = {}
    for name in SETS:
        rows = [(question, given) for question, given in zip(asked, answered, strict=True) if question.set == name]
        if not rows:
            continue
        correct = sum(given.correct for _, given in rows)
        clusters: dict[str, tuple[int, int]] = {}
        for question, given in rows:
            right, size = clusters.get(question.id, (0, 0))
            clusters[question.id] = right + given.correct, size + 1
        low, high = clustered_wilson(list(clusters.values()))
        found[name] = {
            "correct": correct, "total": len(rows), "accuracy": correct / len(rows), "low": low, "high": high,
            "facts": len(clusters), "log_probability": sum(given.log_probability for _, given in rows) / len(rows),
        }  # fmt: skip
        if name == "neighbours":
            found[name]["flips"] = sum(given.flipped for _, given in rows)
    return found


def known(asked: Sequence[Question], answered: Sequence[Answered], set_: str) -> dict[str, bool]:
    """By fact of a set: whether every question about it is answered rightly."""
    found: dict[str, bool] = {}
    for question, given in zip(asked, answered, strict=True):
        if question.set == set_:
            found[question.id] = found.get(question.id, True) and given.correct
    return found


def forgetting(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> float | None:
    """The mean over neighbours and controls of (accuracy before - after) / before; None where nothing was known."""
    lost = [(before[name]["accuracy"] - after[name]["accuracy"]) / before[name]["accuracy"]
            for name in KEPT if name in before and before[name]["accuracy"] > 0]  # fmt: skip
    return sum(lost) / len(lost) if lost else None


def evaluate(arguments: argparse.Namespace, group: Processes, log: Log) -> dict[str, Any]:
    """The whole result, as --json writes it; the same on every process."""
    from checkpoints import locate

    device = device_of(arguments.device, group)
    paths = [locate(given) for given in (arguments.checkpoint, arguments.baseline) if given]
    seed = _seed_of(paths[0]) if arguments.seed is None else arguments.seed
    asked = of_file(arguments.data) if arguments.data else of_corpus(seed, arguments.group)
    fraction = valid_fraction_of(paths[0])
    replay = {source: held_out_texts(source, arguments.replay_documents, seed, fraction or VALID_FRACTION)
              for source in arguments.replay}  # fmt: skip
    states = [_ask(path, device, asked, replay, arguments, group, log) for path in paths]
    (now, texts), before = states[0], states[1:]
    result: dict[str, Any] = {
        "evaluation": "facts", "checkpoint": {"given": arguments.checkpoint, "name": paths[0].name},
        "data": arguments.data or f"embedded, {arguments.group} facts", "seed": None if arguments.data else seed,
        "max_new_tokens": arguments.max_new_tokens, "sets": scores(asked, now), "replay": texts,
    }  # fmt: skip
    for was, texts_before in before:
        pairs = {name: [known(asked, state, name) for state in (now, was)] for name in result["sets"]}
        result["baseline"] = {
            "checkpoint": {"given": arguments.baseline, "name": paths[1].name}, "sets": scores(asked, was),
            "replay": texts_before,
            "compared": {name: compared(list(mine.values()), list(other.values())) for name, (mine, other)
                         in pairs.items()},
            "forgetting": forgetting(scores(asked, was), result["sets"]),
        }  # fmt: skip
    result["items"] = [_item(question, *(state[row] for state, _ in states)) for row, question in enumerate(asked)]
    return result


def _ask(
    path: Path, device: str, asked: Sequence[Question], replay: dict[str, list[str]], arguments: argparse.Namespace,
    group: Processes, log: Log,
) -> tuple[list[Answered], dict[str, dict[str, float]]]:  # fmt: skip
    from tokenizer.conversations import ChatFormat

    student = Student.load(path, device)
    answered = answer(student, ChatFormat(student.tokenizer), asked, max_new_tokens=arguments.max_new_tokens,
                      batch=arguments.batch, group=group, progress=Progress(path.name, group, log))  # fmt: skip
    return answered, {source: perplexity(student, texts, group) for source, texts in replay.items()}


def _seed_of(checkpoint: Path) -> int:
    """data.seed of the run that a checkpoint (as `checkpoints.locate` gives it) belongs to."""
    from checkpoints.checkpoint import RUN_CONFIG, read_run_config

    if not (checkpoint / RUN_CONFIG).exists():  # a stock folder
        return SEED
    data = read_run_config(checkpoint).get("data") or {}
    return int(data.get("seed", SEED)) if isinstance(data, dict) else SEED


def _item(question: Question, now: Answered, was: Answered | None = None) -> dict[str, Any]:
    item: dict[str, Any] = {
        "set": question.set, "id": question.id, "question": question.text, "answer": question.answers[0],
        "reply": now.reply, "correct": now.correct, "log_probability": now.log_probability,
    }  # fmt: skip
    if was is not None:
        item["baseline"] = {"reply": was.reply, "correct": was.correct, "log_probability": was.log_probability}
    return item


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    asked, baseline = result["checkpoint"], result.get("baseline")
    lines = [f"{asked['given']} ({asked['name']}): {result['data']}"]
    for name, score in result["sets"].items():
        line = f"  {name:11} {score['accuracy']:6.1%} ({score['low']:.1%} to {score['high']:.1%}) of {score['total']:,}"
        line += f" questions on {score['facts']:,} facts, log-probability {score['log_probability']:.3f}"
        line += f", {score['flips']} flipped" if "flips" in score else ""
        if baseline:
            was, pair = baseline["sets"][name], baseline["compared"][name]
            line += f"; before {was['accuracy']:.1%}, {was['log_probability']:.3f}; facts known only now "
            line += f"{pair['only_checkpoint']}, only before {pair['only_baseline']}, p = {pair['p']:.2g}"
        lines.append(line)
    for source, text in result["replay"].items():
        line = f"  {source}: perplexity {text['perplexity']:.3f} ({text['tokens']:,} tokens)"
        if baseline:
            before = baseline["replay"][source]["perplexity"]
            line += f"; before {before:.3f}, {text['perplexity'] / before - 1:+.1%}"
        lines.append(line)
    if baseline and baseline["forgetting"] is not None:
        lines.append(f"  forgetting index {baseline['forgetting']:.3f}")
    return "\n".join(lines)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.facts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run's folder, a checkpoint, or a Hugging Face folder")
    parser.add_argument("--baseline", help="the state before; it must know the chat template, or it scores 0")
    parser.add_argument("--data", help="jsonl: with questions of your own (default: the embedded facts)")
    parser.add_argument("--group", choices=facts.GROUPS, default="missing",
                        help="of the embedded facts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, help=f"of the embedded facts (default: the run's data.seed, else {SEED})")
    parser.add_argument("--replay", nargs="*", default=[], metavar="SOURCE", help="also the perplexity of these texts")
    parser.add_argument("--replay-documents", type=int, default=200, help="held out, of each (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=100, help="answers decoded together (default: %(default)s)")
    parser.add_argument("--device", help="default: a GPU for each process when there are, else cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there, question by question")
    parsed = parser.parse_args(arguments)
    if found := _faults(parsed):
        parser.error("; ".join(found))
    return parsed


def _faults(parsed: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments, and what would be right."""
    found = []
    for name in ("replay_documents", "max_new_tokens", "batch"):
        if getattr(parsed, name) < 1:
            found.append(f"--{name.replace('_', '-')} {getattr(parsed, name)}: use 1 or more")
    if remedy := record.fault(parsed.json):
        found.append(f"--json {parsed.json}: {remedy}")
    if parsed.data is not None and not parsed.data.startswith("jsonl:"):
        found.append(f"--data {parsed.data}: name jsonl: and a file of questions")
    elif parsed.data is not None and (remedy := sources.fault(parsed.data)):
        found.append(f"--data {parsed.data}: {remedy}")
    for source in parsed.replay:
        remedy = sources.fault(source)
        if remedy is None and source.partition(":")[2] in embedded.FACTS:
            remedy = "name text: facts are conversations"
        if remedy:
            found.append(f"--replay {source}: {remedy}")
    return found


def main(arguments: list[str] | None = None) -> int:
    return command.run(_parse(arguments), evaluate, report)


if __name__ == "__main__":
    process.end_with_launcher()
    process.outlive_readers()
    interruption.interrupt_once()
    sys.exit(main())
