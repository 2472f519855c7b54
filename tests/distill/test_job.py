"""The plan and the identity of a job, who takes which chunk, and what is wrong with a config."""

import dataclasses
import threading

import filelock
import pytest

import settings
from distill import tally, traces
from distill.job import Job, part_of, seed_of, spread
from distill.problems import ProblemSet, WordProblem, id_of
from distill.settings import DistillConfig
from storage import folder
from tests.conftest import ROOT

TEACHER = {"engine": "local", "digest": "d"}


def _problems(count=50):
    questions = [f"{'Long ago, ' * (number % 9)}what is {number} + 1?" for number in range(count)]
    solutions = [f"x = {number} + 1\nx = {number + 1}\n#### {number + 1}" for number in range(count)]
    found = [WordProblem(id_of(question), question, str(number + 1), solutions[number])
             for number, question in enumerate(questions)]  # fmt: skip
    return ProblemSet(sorted(found, key=lambda problem: problem.id), {})


def _config(tmp_path, **sections):
    raw = {"job": {"folder": str(tmp_path / "traces"), "samples": 3, "chunk": 7},
           "problems": {"from": f"jsonl:{ROOT / 'pyproject.toml'}"}, "teacher": {"model": "m"}}  # fmt: skip
    for section, changes in sections.items():
        raw[section] = {**raw.get(section, {}), **changes}
    return settings.validate(DistillConfig, raw)


def _job(tmp_path, asked=None, about=TEACHER, **sections):
    return Job(_config(tmp_path, **sections), asked or _problems(), about)


def test_the_plan_has_every_key_once_from_short_to_long(tmp_path):
    job = _job(tmp_path)
    keys = [key for chunk in job.chunks for key in chunk]
    assert {(key.problem.id, key.sample) for key in keys} == {
        (problem.id, sample) for problem in _problems().problems for sample in range(3)
    }
    assert len(keys) == 150 and [len(chunk) for chunk in job.chunks] == [7] * 21 + [3]
    order = [(len(key.problem.question), key.problem.id, key.sample) for key in keys]
    assert order == sorted(order)
    assert all(key.seed == seed_of(1234, key.problem.id, key.sample) for key in keys)
    assert len({key.seed for key in keys}) == 150 and all(0 <= key.seed < 2**63 for key in keys)
    assert [request.seed for request in job.requests(4)] == [key.seed for key in job.chunks[4]]


def test_a_seed_is_its_keys_alone():
    """Known ones: another version of the code has to give the same."""
    assert seed_of(1234, "ab", 0) == 6186616782782887186
    assert len({seed_of(job, key, sample) for job in (1, 2) for key in ("a", "b") for sample in (0, 1)}) == 8


CHANGES = {
    "seed": {"job": {"seed": 2}}, "samples": {"job": {"samples": 2}}, "chunk": {"job": {"chunk": 8}},
    "task": {"prompt": {"task": "write"}}, "system": {"prompt": {"system": "Be brief."}},
    "examples": {"prompt": {"examples": 1}}, "temperature": {"sampling": {"temperature": 0.5}},
    "top_k": {"sampling": {"top_k": 5}}, "top_p": {"sampling": {"top_p": 0.5}}, "min_p": {"sampling": {"min_p": 0.5}},
    "repetition_penalty": {"sampling": {"repetition_penalty": 1.5}},
    "max_new_tokens": {"sampling": {"max_new_tokens": 5}}, "evaluation_only": {"problems": {"evaluation_only": True}},
}  # fmt: skip


def test_all_that_decides_the_content_is_in_the_fingerprint(tmp_path):
    fingerprints = {name: _job(tmp_path, **sections).fingerprint for name, sections in CHANGES.items()}
    fingerprints["nothing"] = _job(tmp_path).fingerprint
    fingerprints["teacher"] = _job(tmp_path, about={**TEACHER, "digest": "e"}).fingerprint
    fingerprints["fewer problems"] = _job(tmp_path, _problems(49)).fingerprint
    one = dataclasses.replace(_problems().problems[0], answer="5")
    fingerprints["answer"] = _job(tmp_path, ProblemSet([one, *_problems().problems[1:]], {})).fingerprint
    longer = dataclasses.replace(_problems().problems[0], solution="y = 4 + 1\ny = 5\n#### 5")
    other = ProblemSet([longer, *_problems().problems[1:]], {})
    fingerprints["example's solution"] = _job(tmp_path, other, **CHANGES["examples"]).fingerprint
    assert len(set(fingerprints.values())) == len(fingerprints)


def test_what_does_not_decide_the_content_is_not(tmp_path):
    same = {"job": {"name": "other", "usd_per_hour": 3.0, "folder": str(tmp_path / "elsewhere")},
            "teacher": {"model": "m", "concurrency": 5, "tries": 3, "timeout_seconds": 9}}  # fmt: skip
    assert _job(tmp_path, **same).fingerprint == _job(tmp_path).fingerprint


def test_parts_and_previews():
    parts = [part_of(range(20), (which, 3)) for which in (1, 2, 3)]
    assert sorted(number for part in parts for number in part) == list(range(20))
    assert parts[1] == [1, 4, 7, 10, 13, 16, 19]
    assert spread(list(range(100))) == [10, 50, 90] and spread([4]) == [4] and spread([]) == []


def _make(job, made):
    def make(number):
        made.append(number)
        rows = [{"id": key.problem.id, "sample": key.sample, "seed": key.seed, "question": key.problem.question,
                 "answer": key.problem.answer, "text": f"#### {key.seed}", "finish": "stop", "prompt_tokens": 1,
                 "tokens": 2} for key in job.chunks[number]]  # fmt: skip
        traces.write_chunk(job.chunk(number), rows, {}, job.metadata)

    return make


def test_several_workers_make_each_chunk_once(tmp_path):
    made, jobs = [], [_job(tmp_path) for _ in range(4)]
    numbers = list(range(len(jobs[0].chunks)))
    threads = [threading.Thread(target=job.complete, args=(numbers, 5 * rank, _make(job, made), print))
               for rank, job in enumerate(jobs)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == numbers
    jobs[0].open(print)
    assert len(list(traces.read(jobs[0].path))) == 150 and not traces.missing(jobs[0].path)


def test_what_somebody_holds_is_left_to_them_and_taken_when_they_are_gone(tmp_path):
    job, made, said = _job(tmp_path), [], []
    job.chunk(3).parent.mkdir(parents=True)
    held = filelock.FileLock(job.chunk(3).with_name(".lock-00003"), thread_local=False)
    held.acquire()
    worker = threading.Thread(target=job.complete, args=([2, 3, 4], 0, _make(job, made), said.append))
    worker.start()
    while not said:
        worker.join(0.01)
    assert made == [2, 4] and "1 chunks" in said[0]
    held.release()
    worker.join(10)
    assert made == [2, 4, 3]


def test_a_broken_chunk_is_set_aside_and_a_whole_one_never_written_again(tmp_path):
    job, made, said = _job(tmp_path), [], []
    job.complete([0, 1, 2], 0, _make(job, made), said.append)
    before = (job.chunk(0) / traces.TRACES).stat()
    (job.chunk(1) / traces.TRACES).write_bytes(b"torn")
    again = _job(tmp_path)
    again.complete([0, 1, 2], 1, _make(again, made), said.append)
    assert made == [0, 1, 2, 1] and "00001" in said[0] and ".broken-1" in said[0]
    assert (job.chunk(0) / traces.TRACES).stat() == before
    assert not folder.verify(job.chunk(1)) and (job.chunk(1).with_name(".00001.broken-1")).is_dir()


def test_a_copied_chunk_of_another_job_is_refused(tmp_path):
    one, other = _job(tmp_path), _job(tmp_path, job={"seed": 2})
    for job in (one, other):
        job.open(print)
    _make(one, [])(0)
    other.chunk(0).parent.mkdir(parents=True)
    one.chunk(0).rename(other.chunk(0))
    with pytest.raises(traces.TraceError, match=one.fingerprint):
        list(traces.read(other.path))


def test_what_is_left_is_estimated_from_the_chunks_that_were_measured():
    estimate = tally.Estimate.of([10.0, 20.0, 30.0], left=360, processes=2, usd_per_hour=4.0)
    assert estimate.hours == pytest.approx(1.0) and str(estimate).startswith("1.00 ± 0.58 hours, $4.00 ± ")
    row = {"id": "x", "sample": 0, "seed": 0, "question": "q", "answer": "3", "text": "#### 3", "finish": "stop",
           "prompt_tokens": 5, "tokens": 7}  # fmt: skip
    rows = [row, {**row, "text": "#### 4"}, {**row, "finish": "length"}, {**row, "answer": None}]
    counted = tally.counts(rows)
    assert counted == {"keys": 4, "tokens": 28, "prompt_tokens": 20, "refused": 0, "stopped": 3, "known": 3,
                       "correct": 1}  # fmt: skip
    total = tally.Tally.of([{**counted, "usd": 0.5}, {**counted, "usd": 0.25}])
    line = tally.line("gsm8k", total, 8, 1234.0, 61)
    assert line == "gsm8k: 2/8 chunks  8 traces  1.23k tok/s  33% of 6 right  eta 1m 01s  $0.75 so far"


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [("job.name=a/b", "job.name", "letters"), ("job.chunk=0", "job.chunk", "greater"),
     ("job.sample=3", "job.sample", "samples"), ("problems.split=test", "problems.split", "evaluation_only"),
     ("problems.from=embedded:stories", "problems.from", "no rows"),
     ("problems.from=jsonl:gone", "problems.from", "file"),
     ("problems.from=traces:gone prompt.examples=0", "problems.from", "job.json"),
     ("sampling.top_p=2", "sampling.top_p", "at most 1"),
     ("sampling.max_new_tokens=4000", "sampling.max_new_tokens", "teacher.context"),
     ("problems.answer=null", "prompt.examples", "use 0"), ("prompt.task=write", "prompt.examples", "use 0"),
     ("teacher.engine=endpoint", "teacher.url", "http"), ("teacher.url=http://x", "teacher.url", "endpoint"),
     ("teacher.options=[--x]", "teacher.options", "vllm"), ("teacher.engine=magic", "teacher.engine", "local")],
)  # fmt: skip
def test_what_is_wrong_with_a_config_is_told_with_its_key(override, key, remedy):
    with pytest.raises(settings.ConfigError) as caught:
        settings.load(DistillConfig, ROOT / "configs/distill/gsm8k.yaml", override.split(" "))
    (problem,) = caught.value.problems
    assert problem.key == key and remedy in problem.remedy


def test_all_of_it_is_told_at_once():
    overrides = ["job.name=a/b", "problems.split=test", "sampling.temperature=-1", "teacher.engine=endpoint"]
    with pytest.raises(settings.ConfigError) as caught:
        settings.load(DistillConfig, ROOT / "configs/distill/gsm8k.yaml", overrides)
    assert len(caught.value.problems) == 4
