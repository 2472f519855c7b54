"""Learning a teacher's probabilities: the loss is its definition, batches without scores are what they were, a phase
finds and keeps its scores, and a round of the student's own answers brings it nearer to its teacher."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import checkpoints
from data import embedded
from data.loader import Batch, PhaseLoader
from data.prepare import prepare
from distill import filter as filtering
from distill import generate, score
from models import ModelConfig, build_model
from models.kernels.ignored import IGNORE, UNSCORED
from models.kernels.losses import Lesson, linear_cross_entropy, linear_distillation
from observe.metrics import MetricsLog
from settings import ConfigError, read, validate
from tests.conftest import ROOT
from tests.distill.conftest import save_teacher
from tests.models.conftest import Recorder
from training.objectives import NextToken
from training.resume import RunMismatch
from training.settings import RunConfig
from training.start import start
from training.trainer import Outcome

WIDTH, VOCABULARY, ENTRIES = 24, 150, 140  # the last 10 rows of the head belong to no token

# --- the loss


def draw(count: int, k: int, entries: int = ENTRIES, scored: float = 0.6, ignored: float = 0.3):
    """hidden [N, d], weight [V, d], labels [N], and a lesson of which a share of the positions is scored."""
    generator = torch.Generator().manual_seed(k)
    hidden = torch.randn(count, WIDTH, generator=generator).requires_grad_()
    weight = (0.3 * torch.randn(VOCABULARY, WIDTH, generator=generator)).requires_grad_()
    labels = torch.randint(entries, (count,), generator=generator)
    labels = labels.masked_fill(torch.rand(count, generator=generator) < ignored, IGNORE)
    logprobs, ids = (3 * torch.randn(count, entries, generator=generator)).log_softmax(-1).topk(k)
    unscored = (torch.rand(count, generator=generator) >= scored) | (labels == IGNORE)
    ids, logprobs = ids.int().masked_fill(unscored[:, None], UNSCORED), logprobs.masked_fill(unscored[:, None], 0)
    return hidden, weight, labels, ids, logprobs


def definition(hidden, weight, labels, ids, logprobs, alpha: float):
    """(loss, cross-entropy, divergence) as sums, in float64, by softmax and autograd, a position at a time."""
    loss = ce_sum = kl_sum = torch.zeros((), dtype=torch.float64)
    for h, label, top, teacher in zip(hidden.double(), labels, ids.long(), logprobs.double(), strict=True):
        if label == IGNORE:
            continue
        student = (weight.double() @ h).log_softmax(-1)
        ce, kl = -student[label], torch.zeros((), dtype=torch.float64)
        is_scored = bool(top[0] != UNSCORED)
        if is_scored:
            shares = teacher.exp()
            kl = (shares * (teacher - student[top])).sum()
            beside = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, top, False)
            tail = 1 - shares.sum()
            if beside.any() and tail > 0:
                kl = kl + tail * (tail.log() - student[beside].logsumexp(0))
        loss = loss + (alpha * ce + (1 - alpha) * kl if is_scored else ce)
        ce_sum, kl_sum = ce_sum + ce, kl_sum + kl
    return loss, ce_sum, kl_sum


def assert_is_definition(drawn, alpha: float, chunk: int = 16) -> None:
    hidden, weight, labels, ids, logprobs = drawn
    sums = linear_distillation(hidden, weight, labels, Lesson(ids, logprobs, alpha), chunk)
    expected = definition(*drawn, alpha)
    for found, wanted in zip(sums[:3], expected, strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)
    assert sums.scored == (ids[:, 0] != UNSCORED).sum()
    found = torch.autograd.grad(0.37 * sums.loss, (hidden, weight))
    for gradient, wanted in zip(found, torch.autograd.grad(0.37 * expected[0], (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 16, ENTRIES - 1])
def test_distillation_is_its_definition_among_unscored_and_untrained_positions(k, alpha):
    assert_is_definition(draw(50, k), alpha)


def test_with_all_entries_it_is_the_whole_divergence_and_its_gradient():
    hidden, weight, labels, ids, logprobs = drawn = draw(40, VOCABULARY, VOCABULARY, scored=1, ignored=0)
    loss = linear_distillation(hidden, weight, labels, Lesson(ids, logprobs, 0.0), 16).loss
    teacher = torch.zeros(40, VOCABULARY).scatter_(1, ids.long(), logprobs).double()
    student = (hidden.double() @ weight.double().T).log_softmax(-1)
    expected = F.kl_div(student, teacher, log_target=True, reduction="sum")
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(loss, (hidden, weight))
    for gradient, wanted in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
    assert_is_definition(drawn, 0.5)


def test_entries_of_no_token_count_as_the_rest():
    """The head's rows beyond the tokenizer's entries, of which a teacher says nothing, are learned away."""
    hidden, weight, labels, ids, logprobs = draw(30, ENTRIES, scored=1, ignored=0)
    exact = logprobs - logprobs.double().logsumexp(-1, keepdim=True).float()
    loss = linear_distillation(hidden, weight, labels, Lesson(ids, exact, 0.0)).loss
    student = (hidden @ weight.T).log_softmax(-1)
    torch.testing.assert_close(loss, (exact.exp() * (exact - student.gather(1, ids.long()))).sum(), rtol=1e-4, atol=0)
    gradient = torch.autograd.grad(loss, weight)[0][ENTRIES:]
    torch.testing.assert_close(gradient, (student.exp().T @ hidden)[ENTRIES:], rtol=1e-3, atol=1e-4)


def test_without_scores_it_is_cross_entropy():
    hidden, weight, labels, ids, logprobs = draw(50, 8, scored=0)
    sums = linear_distillation(hidden, weight, labels, Lesson(ids, logprobs, 0.2), 16)
    plain = linear_cross_entropy(hidden, weight, labels, 16)
    torch.testing.assert_close(sums.loss, plain)
    assert sums.divergence == 0 and sums.scored == 0 and torch.equal(sums.loss, sums.cross_entropy)
    one, other = (torch.autograd.grad(loss, (hidden, weight)) for loss in (sums.loss, plain))
    assert all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("sharpness", [0.0, 300.0])
def test_rounded_probabilities_and_sharp_logits_stay_finite(sharpness):
    """Of float16 more than 1 may be the sum; a sure student may have nothing beside the k."""
    hidden, weight, labels, ids, logprobs = draw(50, 16)
    logprobs[:, 0], logprobs[:, 1:] = 4e-4, -65504.0
    with torch.no_grad():
        hidden.mul_(sharpness)
    loss = linear_distillation(hidden, weight, labels, Lesson(ids, logprobs.half(), 0.0)).loss
    found = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in found)


def test_a_student_that_is_the_teacher_learns_nothing():
    hidden, weight, labels, ids, _ = draw(50, 12, scored=1, ignored=0)
    ids = (hidden @ weight.T).topk(12).indices.int()
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(1, ids.long()).detach()
    sums = linear_distillation(hidden, weight, labels, Lesson(ids, logprobs, 0.0), 16)
    assert abs(sums.loss) < 1e-4
    assert max(gradient.abs().max() for gradient in torch.autograd.grad(sums.loss, (hidden, weight))) < 1e-5


def test_all_logits_never_exist():
    hidden, weight, labels, ids, logprobs = draw(4096, 8)
    with Recorder() as recorder:
        linear_distillation(hidden, weight, labels, Lesson(ids, logprobs, 0.5), 64).loss.backward()
    assert recorder.largest <= 4096 * WIDTH < 4096 * VOCABULARY / 4


# --- the objective


def scored_batch(config: ModelConfig, k: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (4, 33), generator=generator)
    logprobs, top = torch.randn(4, 32, config.vocab_size, generator=generator).log_softmax(-1).topk(k)
    labels, top = ids[:, 1:].clone(), top.int()
    labels[0, :9], top[0, :9], top[2] = IGNORE, UNSCORED, UNSCORED
    return Batch(ids[:, :-1], labels, torch.ones(4, 32, dtype=torch.long), torch.arange(4), None, top, logprobs.half())


@pytest.mark.parametrize("change", [{}, {"gradient_checkpointing": True}, {"tied_head": False}], ids=str)
def test_the_objective_mixes_both_losses_in_training_and_tells_both_in_evaluation(change):
    config = ModelConfig(vocab_size=80, context=32, n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_ff=32, **change)
    objective, batch = NextToken(build_model(config, seed=2)), scored_batch(config)
    objective.alpha = 0.25
    logits = objective.model(batch.input_ids, batch.document_ids).flatten(0, 1)
    ce, scored = F.cross_entropy(logits, batch.labels.flatten(), reduction="none"), (batch.teacher_ids[..., 0] >= 0)
    teacher, top = batch.teacher_logprobs.flatten(0, 1).float(), batch.teacher_ids.flatten(0, 1).long().clamp(min=0)
    student, shares = logits.log_softmax(-1), teacher.exp()
    tail, rest = 1 - shares.sum(-1), 1 - student.gather(1, top).exp().sum(-1)
    kl = ((shares * (teacher - student.gather(1, top))).sum(-1) + tail * (tail / rest).log())[scored.flatten()].sum()
    mixed = ce[~scored.flatten()].sum() + 0.25 * ce[scored.flatten()].sum() + 0.75 * kl
    loss, trained, metrics = objective.train()(batch)
    loss.backward()
    torch.testing.assert_close(loss, mixed, rtol=1e-4, atol=1e-4)
    assert trained == (batch.labels != IGNORE).sum() and metrics["scored"] == scored.sum()
    assert all(parameter.grad.isfinite().all() for parameter in objective.parameters())
    with torch.no_grad():
        loss, _, metrics = objective.eval()(batch)
    torch.testing.assert_close(loss, ce.sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(metrics["divergence"], kl, rtol=1e-4, atol=1e-4)


# --- phases

QUICK = ["watch.sample_prompts=[]", "evaluation.every_steps=null", "evaluation.bigram_floor=false"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Nobody reads the reports of these runs, and drawing one takes as long as training."""
    monkeypatch.setattr("observe.report.write_report", lambda _folder: None)


@pytest.fixture(scope="module")
def school(tmp_path_factory) -> Path:
    """A folder with questions and answers, two teachers of one tokenizer and a student, none of which knows anything,
    prepared shards, and the first teacher's scores of the answers."""
    root = tmp_path_factory.mktemp("school")
    found = [embedded.problem(index, "train", 5) for index in range(150)]
    rows = [{"question": task.question, "answer": task.solution} for task in found]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [text for task in found for text in (task.question, task.solution)]
    for name, seed, sharpness in (("teacher", 1, 4.0), ("other", 2, 4.0), ("student", 3, 1.0)):
        save_teacher(root / name, texts, seed=seed, sharpness=sharpness)
    config = lesson(root, root / "runs", "prepared")
    folder = prepare(config.data, config.tokenizer, lambda _: None).sources["talks"]
    assert score.main([str(folder), "--teacher", str(root / "teacher"), "--k", "12"]) == 0
    return root


def lesson(root: Path, runs: Path, name: str, *overrides: str) -> RunConfig:
    """A run of one phase: answers, with stories as replay."""
    tokenizer = next((root / "student" / "checkpoints").glob("step-*")) / "tokenizer"
    phase = ("{name: taught, context: 128, data: {talks: 0.8, stories: 0.2}, tokens: 8192, batch_tokens: 2048, "
             "micro_batch: 16, learning_rate: {warmup: 0.2}, distill: {alpha: 0.3}}")  # fmt: skip
    return validate(RunConfig, read(ROOT / "tests" / "tiny.yaml", [
        f"run={{name: {name}, folder: {runs}}}", f"data.shards={root / 'shards'}", f"tokenizer.path={tokenizer}",
        f'data.sources.talks={{from: "jsonl:{root / "rows.jsonl"}", conversations: true}}', f"phases=[{phase}]",
        "data.valid_fraction=0.2", *QUICK, *overrides,
    ]))  # fmt: skip


def copied(school: Path, to: Path) -> Path:
    """The same folder, to add scores to, or to take them away."""
    shutil.copytree(school / "shards", to / "shards")
    for name in ("rows.jsonl", "teacher", "other", "student"):
        (to / name).symlink_to(school / name)
    return to


def shards_of(root: Path, name: str) -> Path:
    return next((root / "shards").glob(f"{name}-*"))


def records(config: RunConfig, kind: str) -> list[dict]:
    return [record for record in MetricsLog.read(config.run.path / "metrics.jsonl") if record["kind"] == kind]


def losses(config: RunConfig) -> list[float]:
    return [record["loss"] for record in records(config, "train")]


def test_distillation_among_replay_does_not_depend_on_accumulation(school, tmp_path, capfd):
    whole, parts = (lesson(school, tmp_path, f"a{rows}", f"phases.0.micro_batch={rows}") for rows in (16, 4))
    plain = lesson(school, tmp_path, "plain", "phases.0.distill=null", "run.stop_after_steps=1")
    assert [start(config) for config in (whole, parts, plain)] == [Outcome.FINISHED, Outcome.FINISHED, Outcome.STOPPED]
    assert len(losses(whole)) == 4
    assert max(abs(one - other) for one, other in zip(losses(whole), losses(parts), strict=True)) < 1e-5
    assert abs(losses(whole)[0] - losses(plain)[0]) > 0.01
    said = "".join(capfd.readouterr())
    assert "learns talks from the probabilities in" in said and "learns stories by cross-entropy alone" in said
    told = records(whole, "validation")[-1]["sources"]
    assert told["talks"]["divergence"] > 0 and "divergence" not in told["stories"]


def test_what_is_learned_at_a_position_is_what_the_teacher_says_there(school):
    """Through packing and the loader: of trained tokens of scored sources, and of no other."""
    sources = {name: shards_of(school, name) for name in ("talks", "stories")}
    loader = PhaseLoader(sources, {"talks": 0.5, "stories": 0.5}, context=128, seed=1, phase=0, batch_rows=8,
                         micro_rows=8, scores={"talks": shards_of(school, "scores-talks")})  # fmt: skip
    model = checkpoints.load_model(school / "teacher")[0]
    seen = set()
    for first in range(0, 24, 8):
        (batch,) = loader.step(first)
        with torch.no_grad():
            logits = model(batch.input_ids, batch.document_ids)
        expected = logits.log_softmax(-1)
        for row in range(8):
            is_scored = batch.teacher_ids[row, :, 0] != UNSCORED
            trained = batch.labels[row] != IGNORE
            seen.add(bool(is_scored.any()))
            assert torch.equal(is_scored, trained if is_scored.any() else torch.zeros_like(trained))
            ids, found = batch.teacher_ids[row][is_scored].long(), batch.teacher_logprobs[row][is_scored].float()
            torch.testing.assert_close(found, expected[row][is_scored].gather(1, ids), rtol=2e-3, atol=2e-3)
            assert (found.diff(dim=1) <= 0).all()
    loader.close()
    assert seen == {True, False}


def test_a_distilling_phase_stopped_anywhere_resumes_bit_equal(school, tmp_path):
    whole = lesson(school, tmp_path, "whole")
    assert start(whole) is Outcome.FINISHED
    for stop in (1, 3):
        assert start(lesson(school, tmp_path, "broken", f"run.stop_after_steps={stop}")) is Outcome.STOPPED
    broken = lesson(school, tmp_path, "broken")
    assert start(broken) is Outcome.FINISHED
    assert losses(whole) == losses(broken)


def test_another_teacher_in_the_middle_of_a_phase_is_refused(school, tmp_path):
    root = copied(school, tmp_path)
    assert start(lesson(root, tmp_path / "runs", "run", "run.stop_after_steps=2")) is Outcome.STOPPED
    with pytest.raises(RunMismatch, match=r"distill.*run\.allow=\[data\]"):
        start(lesson(root, tmp_path / "runs", "run", "phases.0.distill.alpha=0.4"))
    shutil.rmtree(shards_of(root, "scores-talks"))
    assert score.main([str(shards_of(root, "talks")), "--teacher", str(root / "other"), "--k", "12"]) == 0
    with pytest.raises(RunMismatch, match=r"scores of talks in phase taught.*run\.allow=\[data\]"):
        start(lesson(root, tmp_path / "runs", "run"))
    assert start(lesson(root, tmp_path / "runs", "run", "run.allow=[data]")) is Outcome.FINISHED


def test_scores_that_are_not_there_or_of_several_teachers_are_named_before_training(school, tmp_path):
    root = copied(school, tmp_path)
    talks, scored = shards_of(root, "talks"), shards_of(root, "scores-talks")
    assert score.main([str(talks), "--teacher", str(root / "other"), "--k", "12"]) == 0
    other = next(path for path in (root / "shards").glob("scores-talks-*") if path != scored)
    digests = [json.loads((path / "scores.json").read_text())["teacher"]["digest"] for path in (scored, other)]

    def fault(*overrides: str) -> str:
        with pytest.raises(ConfigError) as error:
            start(lesson(root, tmp_path / "runs", "none", *overrides))
        assert not (tmp_path / "runs" / "none" / "checkpoints").exists()
        return str(error.value)

    several = fault()
    assert "phases.0.distill.teacher" in several and all(digest in several for digest in digests)
    assert f"python -m distill.score {talks} --teacher hub:a/b" in fault("phases.0.distill.teacher=hub:a/b")
    chosen = lesson(root, tmp_path / "runs", "one", f"phases.0.distill.teacher={digests[1][:9]}",
                    "run.stop_after_steps=1")  # fmt: skip
    assert start(chosen) is Outcome.STOPPED
    (other / "train-00000.top_ids").write_bytes(b"torn")
    assert "train-00000.top_ids" in fault(f"phases.0.distill.teacher={digests[1]}")
    for path in (scored, other):
        shutil.rmtree(path)
    assert f"python -m distill.score {talks} --teacher TEACHER" in fault()


# Of tests/tiny.yaml before there were scores: sha256 of each phase's first batches, and losses of two phases.
BATCHES = "c49ba2035db852a19f7ef8be9c0ea36da3cea56271450474f9d7f83be49b07eb"
LOSSES = {1: 6.9671662036468565, 4: 6.812510552247053, 8: 6.729438624816357, 9: 6.8816928040747545}


def test_a_run_that_does_not_distill_is_what_it_was(tmp_path):
    folders = [f"run.folder={tmp_path / 'runs'}", f"data.shards={tmp_path / 'shards'}"]
    config = validate(RunConfig, read(ROOT / "tests" / "tiny.yaml", [*folders, *QUICK, "run.stop_after_steps=9"]))
    assert start(config) is Outcome.STOPPED
    found = dict(enumerate(losses(config), start=1))
    assert {step: found[step] for step in LOSSES} == pytest.approx(LOSSES, rel=1e-5)
    sources = prepare(config.data, config.tokenizer, lambda _: None).sources
    sum_ = hashlib.sha256()
    for number, phase in enumerate(config.phases):
        loader = PhaseLoader(sources, phase.data, context=phase.context, seed=config.run.seed, phase=number,
                             batch_rows=phase.batch_rows, micro_rows=phase.micro_batch)  # fmt: skip
        for batch in (batch for step in range(4) for batch in loader.step(step * phase.batch_rows)):
            assert batch.teacher_ids is None and batch.teacher_logprobs is None
            for part in (batch.input_ids, batch.labels, batch.document_ids, batch.sample_ids, batch.dropout_seeds):
                sum_.update(part.numpy().tobytes())
        loader.close()
    assert sum_.hexdigest() == BATCHES


# --- a round


def test_an_on_policy_round_brings_the_student_nearer_to_its_teacher(school, tmp_path):
    """The student answers, right or wrong; its answers are prepared and scored by the teacher; it trains on these
    scores alone, never on the text."""
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps({
        "job": {"name": "round", "folder": str(tmp_path / "traces"), "chunk": 50},
        "problems": {"from": f"jsonl:{school / 'rows.jsonl'}", "valid_fraction": 0},
        "sampling": {"max_new_tokens": 16, "temperature": 1.0},
        "teacher": {"model": str(school / "student"), "device": "cpu", "context": 512},
    }))  # fmt: skip
    assert generate.main(["--config", str(job)]) == 0
    (traces,) = (tmp_path / "traces").iterdir()
    assert filtering.main([str(traces), "--out", "round", "--folder", str(tmp_path / "made"), "--any-answer"]) == 0
    (made,) = (tmp_path / "made").glob("round-*/")
    shape = checkpoints.load_model(school / "student")[2]
    config = lesson(
        school, tmp_path / "runs", "round", f"data.shards={tmp_path / 'shards'}", f"run.init_from={school / 'student'}",
        f'data.sources.talks={{from: "parquet:{made}/data/*.parquet", conversations: true}}',
        "phases.0.data={talks: 1}", "phases.0.distill.alpha=0", "phases.0.tokens=24576", "phases.0.batch_tokens=1024",
        "evaluation.every_steps=1",
        f"model={json.dumps(dataclasses.asdict(shape) | {'vocab_size': None})}",
    )  # fmt: skip
    folder = prepare(config.data, config.tokenizer, lambda _: None).sources["talks"]
    assert score.main([str(folder), "--teacher", str(school / "teacher"), "--k", "16"]) == 0
    assert start(config) is Outcome.FINISHED
    distances = [record["sources"]["talks"]["divergence"] for record in records(config, "validation")]
    assert distances[-1] < 0.8 * distances[0], distances
