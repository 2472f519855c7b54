"""How many word problems a checkpoint solves.

    python -m evaluation.gsm8k --checkpoint runs/x --data hub:openai/gsm8k/main --split test [--baseline runs/y]
        [--samples 8] [--json FILE]

Greedy answers are counted by four rules (evaluation/answers.py), each with its 95% interval; --samples adds mean@n,
unbiased pass@k and maj@k. Questions are put by the tokenizer's chat template where it has one, else, or after --shots
examples, as "Question: ..\\nAnswer:". A baseline, the state before tuning, is asked in both ways and compared by the
better of the two: a model that never saw a chat would else be worth nothing by construction. --split dev takes the rows
of the training data that the run held out, for choosing; test is for one look at the end, and whoever looks again is
told so.

Several processes share the work: `accelerate launch -m evaluation.gsm8k ...`; the figures do not depend on how many.
Exit codes: 0 done, 1 a checkpoint or the data cannot be used, 2 wrong arguments, 75 interrupted.
"""

if __name__ == "__main__":  # the imports below take their time
    from data.preparation import interruption
    from machine import process

    interruption.end_at_once("interrupted: nothing was written; the same command begins again")
    process.prepare()

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import sources
from data.preparation import interruption
from evaluation import command, marking, problems, record
from evaluation.answers import RULES
from evaluation.asking import GREEDY, Log, Processes, Progress, ask, device_of, seed_of
from evaluation.marking import Marked
from evaluation.problems import Problem
from machine import process
from models.inference.sampling import Sampling

if TYPE_CHECKING:
    from torch import nn

    from models.inference.ready import Weights
    from tokenizer import Tokenizer

BASELINE_SHOTS = 5  # as lm-evaluation-harness's gsm8k
_STOP = "Question:"  # where a model that continues a text goes on to the next problem


@dataclass(frozen=True)
class Prompts:
    """One prompt a problem, and where replies to them end."""

    name: str  # "zero-shot chat", "zero-shot", "5-shot"
    ids: list[list[int]]
    stop_ids: list[int]
    stop_text: str | None


@dataclass(frozen=True)
class Student:
    """A checkpoint that is asked."""

    path: Path  # as checkpoints.locate gives it
    model: "nn.Module"
    tokenizer: "Tokenizer"
    start: list[int]  # of every text
    ends: list[int]  # tokens, whatever the form
    never: list[int]  # tokens that are not drawn

    @classmethod
    def load(cls, path: Path, device: str = "cpu", weights: "Weights" = "fp32") -> "Student":
        """The model at `path`, ready to decode. Raises CheckpointError."""
        import torch

        from checkpoints import load_model, never_drawn, stop_ids, text_start
        from models.inference.ready import for_decoding

        dtype = torch.bfloat16 if weights == "bf16" else None
        model, tokenizer, _ = load_model(path, device, dtype=dtype, located=True)
        model = for_decoding(model, weights)
        return cls(path, model, tokenizer, text_start(path, tokenizer), stop_ids(path, tokenizer),
                   never_drawn(path, tokenizer))  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """What a checkpoint answered, problem by problem: greedily in each of its forms, and in samples of the first."""

    greedy: dict[str, list[Marked]]  # by Prompts.name
    samples: list[list[Marked]] | None = None  # [problems][n]


def chat_prompts(asked: Sequence[Problem], student: Student) -> Prompts | None:
    """Each question as a user's turn; None where the tokenizer has no template that can be used."""
    from tokenizer import TokenizerError
    from tokenizer.conversations import ChatFormat, begun

    try:
        chat = ChatFormat(student.tokenizer)
        ids = [begun(student.start, chat.prompt([{"role": "user", "content": problem.question}])) for problem in asked]
    except (TokenizerError, ValueError):
        return None
    return Prompts("zero-shot chat", ids, sorted({*student.ends, *chat.stop_ids}), None)


def plain_prompts(asked: Sequence[Problem], student: Student, examples: Sequence[Problem] = ()) -> Prompts:
    """Each question as text to be continued, after the examples with their solutions."""
    from tokenizer import TokenizerError
    from tokenizer.conversations import ChatFormat

    shown = "".join(f"{_plain(example)} {problems.solution(example)}\n\n" for example in examples)
    ids = [student.start + student.tokenizer.encode(shown + _plain(problem)) for problem in asked]
    try:
        stop_ids = {*student.ends, *ChatFormat(student.tokenizer).stop_ids}
    except TokenizerError:
        stop_ids = set(student.ends)
    return Prompts(f"{len(examples)}-shot" if examples else "zero-shot", ids, sorted(stop_ids), _STOP)


def _plain(problem: Problem) -> str:
    return f"Question: {problem.question}\nAnswer:"


def fitting_prompts(
    asked: Sequence[Problem], student: Student, examples: Sequence[Problem], max_new_tokens: int
) -> Prompts:
    """`plain_prompts` with as many of the examples as leave room for every question and its answer."""
    for shots in range(len(examples), -1, -1):
        prompts = plain_prompts(asked, student, examples[:shots])
        if max(map(len, prompts.ids)) + max_new_tokens <= student.model.config.context:
            break
    return prompts


def solve(
    student: Student,
    asked: Sequence[Problem],
    prompts: Prompts,
    *,
    samples: int | None = None,
    sampling: Sampling = GREEDY,
    **asking: Any,
) -> list[list[Marked]]:
    """The marked replies to each problem: one, or `samples` of them, each from a seed of its own.

    Args:
        sampling: with the seed of the whole evaluation. asking: to `ask`: max_new_tokens, batch, group, progress.
    """
    keys = [(row, sample) for row in range(len(asked)) for sample in range(samples or 1)]
    seeds = [seed_of(sampling.seed, asked[row].id, sample) for row, sample in keys] if samples else None
    ids = [prompts.ids[row] for row, _ in keys]
    replies = ask(student.model, student.tokenizer, ids, stop_ids=prompts.stop_ids, stop_text=prompts.stop_text,
                  never=student.never, sampling=sampling, seeds=seeds, **asking)  # fmt: skip
    found: list[list[Marked]] = [[] for _ in asked]
    for (row, _), reply in zip(keys, replies, strict=True):
        found[row].append(marking.mark(asked[row], reply))
    return found


class Evaluation:
    """One run of the command, on each of its processes."""

    def __init__(self, arguments: argparse.Namespace, group: Processes, log: Log):
        from checkpoints import locate

        self.device = device_of(arguments.device, group)
        self.arguments, self.group, self.log = arguments, group, log
        self.checkpoint = locate(arguments.checkpoint)
        self.baseline = locate(arguments.baseline) if arguments.baseline else None
        given = arguments.valid_fraction
        self.valid_fraction = problems.valid_fraction_of(self.checkpoint) if given is None else given
        self.problems, self.examples = self._read()
        self.digest = problems.digest(self.problems)

    def run(self) -> dict[str, Any]:
        """Ask, and return the whole result, as --json writes it."""
        for path in (self.checkpoint, self.baseline):
            if path is not None and self.arguments.split == "test":
                self._tell_of_earlier(path)
        answers = self._ask(self.checkpoint, self._form, self.arguments.samples)
        before = self._ask(self.baseline, self._both_forms, None) if self.baseline is not None else None
        return self._result(answers, before)

    def remember(self, result: dict[str, Any]) -> None:
        """Record that these checkpoints were asked."""
        asked = {"evaluation": "gsm8k", "data": self.arguments.data, "split": self.arguments.split,
                 "digest": self.digest}  # fmt: skip
        told = [(self.checkpoint, result["greedy"])]
        told += [(self.baseline, result["baseline"]["greedy"])] if self.baseline is not None else []
        for path, greedy in told:
            accuracy = {name: {rule: score["accuracy"] for rule, score in state["scores"].items()}
                        for name, state in greedy.items()}  # fmt: skip
            try:
                record.add(path, {**asked, "accuracy": accuracy})
            except OSError as error:
                self.log(f"{record.file_of(path)} cannot be written ({error.strerror}): nobody will know that "
                         "this checkpoint was asked")  # fmt: skip

    def _read(self) -> tuple[list[Problem], list[Problem]]:
        """The problems to be asked, and the examples to be shown."""
        arguments = self.arguments
        found = problems.read(arguments.data, "test" if arguments.split == "test" else "train")
        shots = arguments.shots or (BASELINE_SHOTS if arguments.baseline else 0)
        shown: list[Problem] = []
        if shots and arguments.examples is None and arguments.split == "dev":
            shown = found
        elif shots:
            shown = problems.read(arguments.data if arguments.examples is None else arguments.examples)
        shown = problems.on_side(shown, "train", self.valid_fraction)[:shots]
        if len(shown) < shots:
            raise sources.SourceError(f"{arguments.examples or arguments.data} has {len(shown)} training problems, "
                                      f"{shots} are to be shown: use fewer --shots, or other --examples")  # fmt: skip
        if arguments.split == "dev":
            found = problems.on_side(found, "valid", self.valid_fraction)
        if not found:
            raise sources.SourceError(f"{arguments.data} has no problem on the validation side at a valid fraction of "
                                      f"{self.valid_fraction}: name another by --valid-fraction")  # fmt: skip
        return found[: arguments.limit], shown

    def _tell_of_earlier(self, path: Path) -> None:
        before = record.earlier(path, {"evaluation": "gsm8k", "digest": self.digest})
        if before:
            times = f"{len(before)} times, last" if len(before) > 1 else "once,"
            self.log(f"{path.name} was asked these test problems before ({times} {before[-1]['date']}): a test set "
                     "that is looked at again is a validation set; choose by --split dev")  # fmt: skip

    def _form(self, student: Student) -> list[Prompts]:
        """The one way in which the checkpoint is asked."""
        if self.arguments.shots or self.arguments.form == "plain":
            return [self._few_shot(student, self.arguments.shots)]
        return [self._zero_shot(student)]

    def _both_forms(self, student: Student) -> list[Prompts]:
        """The two ways in which a baseline is asked."""
        zero, few = self._zero_shot(student), self._few_shot(student, len(self.examples))
        return [zero] if few.name == zero.name else [zero, few]

    def _zero_shot(self, student: Student) -> Prompts:
        chat = chat_prompts(self.problems, student)
        if chat is None:
            self.log(f"{student.path.name}: its tokenizer has no chat template that can be used: questions are put "
                     'as "Question: ..\\nAnswer:"')  # fmt: skip
        return chat or plain_prompts(self.problems, student)

    def _few_shot(self, student: Student, shots: int) -> Prompts:
        prompts = fitting_prompts(self.problems, student, self.examples[:shots], self.arguments.max_new_tokens)
        if shots and not prompts.name.startswith(f"{shots}-"):
            context, new = student.model.config.context, self.arguments.max_new_tokens
            self.log(f"{student.path.name}: {shots} examples, the longest question and {new} new tokens do not fit its "
                     f"context of {context}: asked {prompts.name}")  # fmt: skip
        return prompts

    def _ask(self, path: Path, forms: Callable[[Student], list[Prompts]], samples: int | None) -> Answers:
        arguments = self.arguments
        student = Student.load(path, self.device, arguments.weights)
        asked = forms(student)

        def solved(form: Prompts, **how: Any) -> list[list[Marked]]:
            told = f"{path.name}, {form.name}{', samples' if how else ''}"
            return solve(student, self.problems, form, max_new_tokens=arguments.max_new_tokens, batch=arguments.batch,
                         group=self.group, progress=Progress(told, self.group, self.log), **how)  # fmt: skip

        greedy = {form.name: [marked for (marked,) in solved(form)] for form in asked}
        drawn = solved(asked[0], samples=samples, sampling=arguments.sampling) if samples else None
        return Answers(greedy, drawn)

    def _result(self, answers: Answers, before: Answers | None) -> dict[str, Any]:
        from machine.hardware import environment

        arguments = self.arguments
        (form, greedy), *_ = answers.greedy.items()
        result: dict[str, Any] = {
            "evaluation": "gsm8k", "checkpoint": _named(self.checkpoint, arguments.checkpoint), "data": arguments.data,
            "split": arguments.split, "valid_fraction": self.valid_fraction, "digest": self.digest,
            "problems": len(self.problems), "asked": form, "max_new_tokens": arguments.max_new_tokens,
            "batch": arguments.batch, "weights": arguments.weights, "greedy": _states(answers),
        }  # fmt: skip
        if answers.samples is not None:
            how = arguments.sampling
            drawn = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p, "seed": how.seed}
            scores = marking.sample_scores(self.problems, answers.samples)
            result["samples"] = {"n": arguments.samples, **drawn, "scores": scores}
        if before is not None:
            compared = {}
            for rule in RULES:
                state = marking.better(before.greedy, rule)
                pair = ([each.correct[rule] for each in side] for side in (greedy, before.greedy[state]))
                compared[rule] = {"state": state, **marking.compared(*pair)}
            result["baseline"] = {"checkpoint": _named(self.baseline, arguments.baseline), "greedy": _states(before),
                                  "compared": compared}  # fmt: skip
        result["environment"] = environment(self.device)
        result["items"] = [self._item(row, answers, before) for row in range(len(self.problems))]
        return result

    def _item(self, row: int, answers: Answers, before: Answers | None) -> dict[str, Any]:
        (marked,) = [states[row] for states in answers.greedy.values()]
        item = {"id": self.problems[row].id, "correct": marked.correct, "finish": marked.reply.finish,
                "tokens": marked.reply.tokens, "text": marked.reply.text}  # fmt: skip
        if answers.samples is not None:
            item["samples"] = [sample.correct for sample in answers.samples[row]]
        if before is not None:
            item["baseline"] = {state: replies[row].correct for state, replies in before.greedy.items()}
        return item


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    asked = result["checkpoint"]
    told = f"{result['problems']:,} problems of {result['data']}, {result['split']}"
    lines = [f"{asked['given']} ({asked['name']}): {told}"]
    lines += _told("greedy", result["greedy"])
    if drawn := result.get("samples"):
        lines.append(f"{drawn['n']} samples at temperature {drawn['temperature']}, seed {drawn['seed']}")
        for rule, scores in drawn["scores"].items():
            figures = ", ".join(f"{name} {value:.1%}" for name, value in scores.items() if "@" in name)
            lines.append(f"  {rule:17} {figures} (mean: {scores['low']:.1%} to {scores['high']:.1%})")
    if baseline := result.get("baseline"):
        lines += _told(f"baseline {baseline['checkpoint']['given']}", baseline["greedy"])
        lines.append("against the baseline by the better of the ways in which it was asked (exact McNemar)")
        for rule, pair in baseline["compared"].items():
            was = baseline["greedy"][pair["state"]]["scores"][rule]["accuracy"]
            now = result["greedy"][result["asked"]]["scores"][rule]["accuracy"]
            lines.append(f"  {rule:17} {was:.1%} ({pair['state']}) to {now:.1%}: right only now "
                         f"{pair['only_checkpoint']}, only before {pair['only_baseline']}, p = {pair['p']:.2g}")
    return "\n".join(lines)


def _told(who: str, states: dict[str, Any]) -> list[str]:
    lines = []
    for name, state in states.items():
        room = f", {state['no_room']:.1%} have no room in the context" if state["no_room"] else ""
        lines.append(f"{who}, {name} ({state['truncated']:.1%} cut at the most tokens{room})")
        lines += [f"  {rule:17} {score['correct']:5,} right, {score['accuracy']:.1%} ({score['low']:.1%} to "
                  f"{score['high']:.1%}), {score['no_answer']:.1%} without an answer"
                  for rule, score in state["scores"].items()]  # fmt: skip
    return lines


def _states(answers: Answers) -> dict[str, Any]:
    return {name: {"scores": marking.scores(marked), **marking.finishes(marked)}
            for name, marked in answers.greedy.items()}  # fmt: skip


def _named(path: Path, given: str) -> dict[str, str]:
    return {"given": given, "name": path.name, "weights": record.identity(path)}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.gsm8k", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a run's folder, a checkpoint, or a Hugging Face folder")
    parser.add_argument("--baseline", help="the state before: asked in two ways, compared by the better")
    parser.add_argument("--data", required=True, help="jsonl:, parquet: or hub: with `question` and `answer`")
    parser.add_argument("--split", choices=("test", "dev"), default="dev",
                        help="dev: what was held out of the training data (default: %(default)s)")  # fmt: skip
    parser.add_argument("--valid-fraction", type=float, help="share held out (default: the run's, else 0.05)")
    parser.add_argument("--form", choices=("chat", "plain"), default="chat", help="of questions without examples")
    parser.add_argument("--shots", type=int, default=0, help="show so many solved problems first, as plain text (0)")
    parser.add_argument("--examples", help="training problems to show (default: of --data, where it has them)")
    parser.add_argument("--samples", type=int, help="also draw so many answers a problem")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the samples (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="of the samples")
    parser.add_argument("--top-p", type=float, help="of the samples")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--max-new-tokens", type=int, default=400, help="of an answer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="answers decoded together (default: %(default)s)")
    parser.add_argument("--weights", choices=("fp32", "bf16", "int8"), default="fp32", help="smaller reads faster")
    parser.add_argument("--device", help="default: a GPU for each process when there are, else cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there, problem by problem")
    parsed = parser.parse_args(arguments)
    parsed.sampling = Sampling(parsed.temperature, parsed.top_k, parsed.top_p, seed=parsed.seed)
    if found := _faults(parsed):
        parser.error("; ".join(found))
    return parsed


def _faults(parsed: argparse.Namespace) -> list[str]:
    """What is wrong with the arguments, and what would be right."""
    found = [f"--{name.replace('_', '-')} {value}: {remedy}" for name, value, remedy in parsed.sampling.problems()]
    if parsed.samples and parsed.temperature == 0:
        found.append("--temperature 0: samples would all be the same; use one above 0")
    for name, least in (("shots", 0), ("samples", 1), ("limit", 1), ("max_new_tokens", 1), ("batch", 1)):
        value = getattr(parsed, name)
        if value is not None and value < least:
            found.append(f"--{name.replace('_', '-')} {value}: use {least} or more")
    if parsed.valid_fraction is not None and not 0 < parsed.valid_fraction <= 1:
        found.append(f"--valid-fraction {parsed.valid_fraction}: use a number above 0 and at most 1")
    if remedy := record.fault(parsed.json):
        found.append(f"--json {parsed.json}: {remedy}")
    for name in ("data", "examples"):
        source = getattr(parsed, name)
        if source is not None and (remedy := sources.fault(source)):
            found.append(f"--{name} {source}: {remedy}")
    of_files = not parsed.data.startswith("hub:") or Path(parsed.data.removeprefix("hub:")).expanduser().is_dir()
    if parsed.split == "test" and of_files and parsed.examples is None and (parsed.shots or parsed.baseline):
        found.append("--examples is needed: name the training problems of which --shots or --baseline shows some")
    return found


def evaluate(arguments: argparse.Namespace, group: Processes, log: Log) -> dict[str, Any]:
    """The whole result, as --json writes it; the same on every process. That the checkpoint was asked is remembered."""
    evaluation = Evaluation(arguments, group, log)
    result = evaluation.run()
    if group.is_main:
        evaluation.remember(result)
    return result


def main(arguments: list[str] | None = None) -> int:
    return command.run(_parse(arguments), evaluate, report)


if __name__ == "__main__":
    process.end_with_launcher()
    process.outlive_readers()
    interruption.interrupt_once()
    sys.exit(main())
