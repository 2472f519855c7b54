"""Teachers behind HTTP, against a real server with faults and bad habits, and against a stand-in `vllm`."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.teachers import Answer, Request, TeacherError
from distill.teachers.endpoint import Endpoint
from distill.teachers.vllm import Vllm, _own_gpus
from models.inference.sampling import Sampling
from tests.conftest import ROOT
from tests.distill.chat_server import FAULTS, ChatServer, words

KEY = "sk-very-secret-5f2a"
SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20, min_p=0.0)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def teacher():
    """teacher(server, **settings): an Endpoint that waits little; what it says is in `teacher.said`."""
    with contextlib.ExitStack() as stack:

        def teacher(server: ChatServer, *, model: str = "tiny", **settings) -> Endpoint:
            settings = {"backoff_seconds": 0.01, "say": teacher.said.append, **settings}
            return stack.enter_context(contextlib.closing(Endpoint(server.url, model, **settings)))

        teacher.said = []
        yield teacher


def requests(count: int, length: int = 20) -> list[Request]:
    questions = [[{"role": "user", "content": f"question {number // 3} {length}"}] for number in range(count)]
    return [Request(messages, 10**15 + number) for number, messages in enumerate(questions)]


def expected(request: Request, sampling: Sampling, limit: int) -> Answer:
    drawn = words({"messages": request.messages, "seed": request.seed, "temperature": sampling.temperature,
                   "top_k": sampling.top_k})  # fmt: skip
    said = drawn[:limit]
    return Answer(" ".join(said), "length" if len(said) < len(drawn) else "stop", 1, len(said))


def test_600_requests_through_faults_are_answered_once_each_and_in_order(teacher):
    wanted = requests(600)
    with ChatServer(faults=FAULTS, seconds=0.03) as server:
        one = teacher(server, concurrency=16)
        answers = one.answer(wanted, SAMPLING, 100)
        assert answers == [expected(request, SAMPLING, 100) for request in wanted]
        assert len({answer.text for answer in answers}) > 590
        assert {server.served[request.seed] for request in wanted} == {1}
        assert set(server.faulted) == set(FAULTS) and sum(server.faulted.values()) > 100
        assert server.most <= 16
    assert any("trying again" in line for line in teacher.said) and len(teacher.said) < 5


def test_the_requests_in_flight_are_as_many_as_may_be_and_no_more(teacher):
    with ChatServer(seconds=0.25) as server:
        assert len(teacher(server, concurrency=4).answer(requests(16), GREEDY, 5)) == 16
        assert server.most == 4


def test_what_is_sent(teacher):
    with ChatServer() as server:
        one = teacher(server)
        assert one.answer([], SAMPLING, 5) == [] and server.bodies == []
        one.answer(requests(1), SAMPLING, 5)
        sent = {"model": "tiny", "messages": requests(1)[0].messages, "seed": 10**15, "temperature": 0.7, "top_p": 0.8,
                "top_k": 20, "min_p": 0.0, "max_tokens": 5}  # fmt: skip
        assert server.bodies[-1] == sent
        probed = len(server.bodies)
        one.answer(requests(1), Sampling(temperature=0.3, repetition_penalty=1.1), 6)
        assert len(server.bodies) == probed + 1  # it was tried out already
        plain = {name: value for name, value in sent.items() if name not in ("top_k", "min_p")}
        changed = {"temperature": 0.3, "top_p": 1.0, "max_tokens": 6, "repetition_penalty": 1.1}
        assert server.bodies[-1] == plain | changed


def test_cut_and_ended_answers_are_told_apart(teacher):
    wanted = [*requests(1, length=4), *requests(1, length=5), *requests(1, length=6)]
    with ChatServer() as server:
        answers = teacher(server).answer(wanted, SAMPLING, 5)
    assert [(answer.finish, answer.tokens) for answer in answers] == [("stop", 4), ("stop", 5), ("length", 5)]


@pytest.mark.parametrize(
    ("habit", "word", "told"),
    [
        ("ignores seed", "seed", "equal seeds gave different texts"),
        ("shares seed", "seed", "equal seeds gave different texts"),
        ("one text", "seed", "4 different seeds gave only 1 different texts"),
        ("rejects seed", "seed", "rejects it (HTTP 422: seed is not known)"),
        ("ignores top_k", "top_k", "with top_k 1 it still draws other words"),
        ("rejects top_k", "top_k", "rejects it (HTTP 422: top_k is not known)"),
        ("ignores min_p", "min_p", "with min_p 1.0 it still draws other words"),
        ("no usage", "usage", "its replies have no usage"),
        ("no finish_reason", "finish_reason", "its replies have no finish_reason"),
        ("always stops", "finish_reason", 'it says "stop" of answers that were cut'),
    ],
)
def test_a_server_with_a_bad_habit_is_refused_by_name_unless_allowed(teacher, habit, word, told):
    sampling = Sampling(temperature=0.7, top_k=20, min_p=0.1)
    with ChatServer(habits=(habit,), seconds=0.01 if habit == "shares seed" else 0) as server:
        refused = teacher(server)
        for _ in range(2):  # a refusal stays one
            with pytest.raises(TeacherError) as error:
                refused.answer(requests(4), sampling, 5)
            message = str(error.value)
            assert f"{word}: " in message and told in message and f"`allow: [{word}]`" in message
            assert "\n" not in message
        assert server.served[10**15] == 0
        allowed = teacher(server, allow=[word])
        answers = allowed.answer(requests(4, length=20), sampling, 5)
        assert allowed.about()["allow"] == [word] and refused.about()["allow"] == []
        assert len(answers) == 4 and all(len(answer.text.split()) == 5 for answer in answers)
        assert any(word in line and told in line for line in teacher.said)
        assert {answer.finish for answer in answers} == {"stop" if habit == "always stops" else "length"}
        assert {answer.tokens for answer in answers} == {0 if habit == "no usage" else 5}


def test_all_bad_habits_are_named_at_once_and_only_those_that_matter(teacher):
    with ChatServer(habits=("ignores seed", "ignores top_k", "no usage")) as server:
        with pytest.raises(TeacherError, match=r"allow: \[usage, seed, top_k\]"):
            teacher(server).answer(requests(1), SAMPLING, 5)
        assert teacher(server, allow=["usage"]).answer(requests(1), GREEDY, 5)[0].tokens == 0
    with pytest.raises(TeacherError, match="allow: sead cannot be allowed, only seed, top_k"):
        Endpoint("http://127.0.0.1:1", "tiny", allow=["sead"])


def test_draws_that_move_a_little_with_the_batch_are_no_ignored_seed(teacher):
    with ChatServer(habits=("moves",)) as server:
        assert len(teacher(server).answer(requests(4), SAMPLING, 5)) == 4


def test_401_stops_at_once_and_the_key_is_nowhere(teacher, capfd):
    with ChatServer(script=((401, {}, "echo the key"),) * 9) as server:
        one = teacher(server, concurrency=1)
        with pytest.raises(TeacherError) as error:
            one.answer(requests(600), SAMPLING, 5)
        assert len(server.bodies) <= 4  # the probe's first questions, which are asked at once
        said = [str(error.value), repr(error.value.__context__), repr(vars(one)), json.dumps(one.about())]
        said += [json.dumps(one.versions()), *teacher.said, *capfd.readouterr()]
    assert "HTTP 401: wrong key: Bearer [key]" in said[0] and "OPENAI_API_KEY" in said[0] and "\n" not in said[0]
    assert not any(KEY in text for text in said)


@pytest.mark.parametrize(("variable", "told"), [(None, "set api_key_env"), ("NO_SUCH_KEY", "NO_SUCH_KEY is not set")])
def test_a_key_that_is_missing_is_asked_for(teacher, variable, told):
    with ChatServer(script=((403, {}, {"error": "no"}),) * 9) as server, pytest.raises(TeacherError, match=told):
        teacher(server, api_key_env=variable).answer(requests(1), SAMPLING, 5)


def test_an_unknown_model_is_told_with_those_that_are_there(teacher):
    with (
        ChatServer(script=((404, {}, {"error": {"message": "no such"}}),) * 9) as server,
        pytest.raises(TeacherError, match="'huge' is not there .HTTP 404: no such.; the server lists tiny, other$"),
    ):
        teacher(server, model="huge").answer(requests(3), SAMPLING, 5)


def probed(teacher, server: ChatServer, **settings) -> Endpoint:
    """A teacher whose server was found good, and which has not been asked for anything since."""
    one = teacher(server, **settings)
    one.answer(requests(1), SAMPLING, 5)
    server.bodies.clear()
    server.arrivals.clear()
    return one


def test_another_4xx_stops_the_rest(teacher):
    with ChatServer(seconds=0.02) as server:
        one = probed(teacher, server, concurrency=4)
        server.script[:] = [(200, {}, None)] * 5 + [(400, {}, {"error": {"message": "the prompt is too long"}})]
        with pytest.raises(TeacherError, match=r"does not take a request \(HTTP 400: the prompt is too long\)$"):
            one.answer(requests(300), SAMPLING, 5)
        assert len(server.bodies) < 20


@pytest.mark.parametrize(("asked", "least"), [("1", 1.0), ("date", 0.7), ("nonsense", 0.0)])
def test_retry_after_is_honoured(teacher, asked, least):
    with ChatServer() as server:
        one = probed(teacher, server)
        if asked == "date":
            until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
            asked = until.strftime("%a, %d %b %Y %H:%M:%S GMT")  # whole seconds
        server.script[:] = [(429, {"Retry-After": asked}, {"error": "slow down"})]
        one.answer(requests(1), SAMPLING, 5)
        (first, _), (second, _) = server.arrivals
    assert least <= second - first <= least + 4


def test_a_wait_that_is_too_long_is_told(teacher):
    with ChatServer() as server:
        one = probed(teacher, server)
        server.script[:] = [(429, {"Retry-After": "86400"}, {"error": "quota"})]
        with pytest.raises(TeacherError, match="HTTP 429: quota; the server asks to come back in 86,400 seconds"):
            one.answer(requests(1), SAMPLING, 5)


def test_waits_double_and_are_bounded_by_the_tries(teacher):
    with ChatServer() as server:
        one = probed(teacher, server, tries=5, backoff_seconds=0.04)
        server.script[:] = [(503, {}, "busy")] * 5
        with pytest.raises(TeacherError, match="1 of 1 requests are not answered: .* the last time by HTTP 503: busy"):
            one.answer(requests(1), SAMPLING, 5)
        times = [moment for moment, _ in server.arrivals]
    waits = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert len(waits) == 4
    assert all(0.02 * 2**number <= wait < 0.04 * 2**number + 1 for number, wait in enumerate(waits))


def test_one_request_that_fails_for_good_fails_the_batch_and_counts(teacher):
    with ChatServer() as server:
        one = probed(teacher, server, concurrency=2, tries=1)
        server.script[:] = [(200, {}, None)] * 6 + [(500, {}, "out of memory")]
        with pytest.raises(TeacherError, match=r"of 40 requests are not answered: .*HTTP 500: out of memory$") as error:
            one.answer(requests(40), SAMPLING, 5)
        assert 30 <= int(str(error.value).split()[0]) <= 35
        assert len(one.answer(requests(40), SAMPLING, 5)) == 40  # and the next call starts anew


def a_reply(**changes) -> dict:
    message = {"role": "assistant", "content": "x", **changes.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": "stop", **changes.pop("choice", {})}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}, **changes}


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (a_reply(), Answer("x", "stop", 7, 2)),
        (a_reply(message={"content": None}), Answer("", "stop", 7, 2)),
        (a_reply(message={"content": "half \ud83d of one"}), Answer("half \ufffd of one", "stop", 7, 2)),
        (a_reply(choice={"message": {"role": "assistant"}}), Answer("", "stop", 7, 2)),
        (a_reply(choice={"finish_reason": "length"}), Answer("x", "length", 7, 2)),
        (a_reply(choice={"finish_reason": "content_filter"}), Answer("x", "refused", 7, 2)),
        (a_reply(message={"content": None, "refusal": "I cannot"}), Answer("", "refused", 7, 2)),
    ],
)
def test_replies_are_read(teacher, reply, answer):
    with ChatServer() as server:
        one = probed(teacher, server)
        server.script[:] = [(200, {}, reply)]
        assert one.answer(requests(1), SAMPLING, 5) == [answer] and len(server.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ("[" * 100_000, "an unexpected reply"),
        ("<html>", "an unexpected reply"),
        ([], "an unexpected reply"),
        ({"choices": []}, "an unexpected reply"),
        ({"error": {"message": "upstream is gone"}}, "an unexpected reply: upstream is gone"),
        (a_reply(message={"content": ["x"]}), "the content is no text"),
        (a_reply(choice={"finish_reason": "abort"}), "finish_reason 'abort'"),
        (a_reply(choice={"finish_reason": None}), "no finish_reason"),
        (a_reply(usage=None), "no usage"),
    ],
)
def test_unexpected_replies_are_failed_tries(teacher, reply, told):
    with ChatServer() as server:
        one = probed(teacher, server, tries=2)
        server.script[:] = [(200, {}, reply)]
        assert one.answer(requests(1), SAMPLING, 20) == [expected(requests(1)[0], SAMPLING, 20)]
        assert told in teacher.said[-1]
        server.script[:] = [(200, {}, reply)] * 2
        with pytest.raises(TeacherError, match="1 of 1 requests are not answered"):
            one.answer(requests(1), SAMPLING, 20)


def test_a_reply_that_does_not_come_is_a_failed_try(teacher):
    with ChatServer() as server:
        one = probed(teacher, server, timeout_seconds=1.0, tries=2)
        server.seconds = 1.6
        with pytest.raises(TeacherError, match="no reply within 1 seconds"):
            one.answer(requests(1), SAMPLING, 5)
    with pytest.raises(TeacherError, match="does not answer: ConnectError"):
        teacher(server, tries=2).answer(requests(1), SAMPLING, 5)


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://host/v1", "http://", "http://[", "http://host:port", "http://me:secret@host/v1",
     "http://host/v1?key=secret"],
)  # fmt: skip
def test_an_address_that_is_none_or_holds_a_secret_is_refused(url):
    with pytest.raises(TeacherError, match="url: ") as error:
        Endpoint(url, "tiny")
    assert "secret" not in str(error.value)


def test_a_key_that_cannot_be_one_is_refused_and_a_plain_way_is_told(monkeypatch):
    said = []
    Endpoint("http://teacher.example/v1", "tiny", say=said.append).close()
    assert len(said) == 1 and "not encrypted" in said[0] and KEY not in said[0]
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Forged: 1")
    with pytest.raises(TeacherError, match="OPENAI_API_KEY holds characters") as error:
        Endpoint("http://127.0.0.1:1", "tiny")
    assert KEY not in str(error.value)


def test_about_and_versions_tell_the_model_and_no_address(teacher):
    with ChatServer() as server:
        one = teacher(server, allow=["usage", "seed"], concurrency=7)
        about = {"engine": "endpoint", "model": "tiny", "allow": ["seed", "usage"], "template": None}
        assert one.about() == about == teacher(server, allow=["seed", "usage"], concurrency=9).about()
        one.answer(requests(1), SAMPLING, 5)
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        assert one.versions() == {"engine": "endpoint", "version": "0.0.1", "models": [{"id": "tiny"}], "asked": today,
                                  "system_fingerprints": ["fp-1"]}  # fmt: skip
        one.close()
        one.close()
        with pytest.raises(TeacherError, match="closed"):
            one.answer(requests(1), SAMPLING, 5)


def test_several_servers_share_the_requests():
    with ChatServer() as first, ChatServer() as second:
        with contextlib.closing(Endpoint([first.url, second.url], "tiny")) as one:
            answers = one.answer(requests(40), SAMPLING, 20)
        assert answers == [expected(request, SAMPLING, 20) for request in requests(40)]
        seeds = {request.seed for request in requests(40)}
        assert len(seeds & set(first.served)) == len(seeds & set(second.served)) == 20


INTERRUPTED = """
import sys
from data.preparation import interruption
from distill.teachers import Request
from distill.teachers.endpoint import Endpoint
from models.inference.sampling import Sampling
interruption.interrupt_once()
teacher = Endpoint(sys.argv[1], "tiny", api_key_env=None)
try:
    print("asking", flush=True)
    teacher.answer([Request([{"role": "user", "content": "x"}], seed) for seed in range(64)], Sampling(), 5)
except KeyboardInterrupt:
    teacher.close()
    sys.exit(interruption.INTERRUPTED)
"""


def test_a_request_to_stop_is_heard_between_two_replies():
    with ChatServer(seconds=30) as server:
        process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, server.url], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        wait_for(lambda: server.bodies)
        process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate(timeout=20)
    assert (process.returncode, complaints) == (75, "")


# The servers that are started for a job.


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


@pytest.fixture
def vllm(tmp_path) -> Path:
    """A stand-in for vLLM's executable."""
    path = tmp_path / "bin" / "vllm"
    path.parent.mkdir()
    script = ROOT / "tests" / "distill" / "chat_server.py"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def told(logs: Path) -> list[dict]:
    """What the stand-ins in `logs` say of how they were started, by GPU."""
    found = [log.read_text(encoding="utf-8").splitlines() for log in logs.glob("*.log")]
    servers = [json.loads(lines[0]) for lines in found if lines]
    return sorted(servers, key=lambda server: server["environment"]["CUDA_VISIBLE_DEVICES"])


def alive(process: int) -> bool:
    """Whether it runs; a zombie does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    with contextlib.suppress(OSError):
        os.kill(process, 0)
        return not Path("/proc").is_dir()
    return False


def test_servers_are_started_awaited_asked_and_ended(vllm, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    said: list[str] = []
    options = ["--quantization", "fp8"]
    one = Vllm("tiny/teacher", revision="abc", context=512, executable=vllm, gpus=[0, 3], options=options,
               log_folder=tmp_path / "logs", say=said.append)  # fmt: skip
    assert not (tmp_path / "logs").exists()  # nothing is started before it is needed
    answers = one.answer(requests(40), SAMPLING, 20)
    assert answers == [expected(request, SAMPLING, 20) for request in requests(40)]
    started = told(tmp_path / "logs")
    assert [server["environment"] for server in started] == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "03"]
    line = " ".join(started[0]["others"])
    for option in ("--max-model-len 512", "--generation-config vllm", "--dtype bfloat16", "--quantization fp8",
                   "--host 127.0.0.1", "--revision abc", "--tokenizer-revision abc",
                   "--served-model-name tiny/teacher"):  # fmt: skip
        assert option in line
    assert one.about() == {"engine": "vllm", "model": "tiny/teacher", "revision": "abc", "dtype": "bfloat16",
                           "options": options, "allow": [], "template": "the model's own"}  # fmt: skip
    assert one.versions()["version"] == "0.0.1" and one.versions()["engine"] == "vllm"
    processes = [server[name] for server in started for name in ("pid", "child")]
    assert all(alive(process) for process in processes)
    one.close()
    one.close()
    assert not any(alive(process) for process in processes)
    assert said[0].startswith("starting 2 of") and said[1].startswith("ready after")


def test_a_server_that_dies_at_its_start_is_told_with_its_log(vllm, tmp_path):
    one = Vllm("tiny/broken", revision="abc", executable=vllm, gpus=[0, 1], log_folder=tmp_path / "logs", say=print)
    with pytest.raises(TeacherError, match=r"(?s)vllm on GPU \d has ended \(exit code 3\).*no kernel for this card"):
        one.answer(requests(1), SAMPLING, 5)
    started = told(tmp_path / "logs")
    assert started and not any(alive(server[name]) for server in started for name in ("pid", "child"))
    slow = Vllm("tiny/teacher", revision="abc", executable=vllm, gpus=[0], start_seconds=0,
                log_folder=tmp_path / "slow")  # fmt: skip
    with pytest.raises(TeacherError, match=r"is not ready in time \(start_seconds\)"):
        slow.answer(requests(1), SAMPLING, 5)


def test_a_server_that_dies_later_is_told_too(vllm, tmp_path):
    one = Vllm("tiny/teacher", revision="abc", executable=vllm, gpus=[0], log_folder=tmp_path / "logs", say=print)
    with contextlib.closing(one):
        assert len(one.answer(requests(1), SAMPLING, 5)) == 1
        (server,) = told(tmp_path / "logs")
        os.kill(server["pid"], signal.SIGKILL)
        wait_for(lambda: not alive(server["child"]))  # nobody else would end it
        with pytest.raises(TeacherError, match=r"vllm on GPU 0 has ended \(exit code 137\)"):
            one.answer(requests(1), SAMPLING, 5)


JOB = """
import sys, threading, time
from distill.teachers import Request
from distill.teachers.vllm import Vllm
from models.inference.sampling import Sampling
def work():
    teacher = Vllm("tiny/teacher", revision="abc", executable=sys.argv[1], gpus=[0], log_folder=sys.argv[2])
    teacher.answer([Request([{"role": "user", "content": "x"}], 1)], Sampling(), 5)
    print("answered", flush=True)
thread = threading.Thread(target=work)  # whose end must not end the server
thread.start()
thread.join()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_servers_end_with_a_job_that_is_killed(vllm, tmp_path, number):
    process = subprocess.Popen([sys.executable, "-c", JOB, str(vllm), str(tmp_path / "logs")], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE)  # fmt: skip
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[-1] == "answered\n"
    (server,) = told(tmp_path / "logs")
    time.sleep(0.5)
    assert alive(server["pid"]) and alive(server["child"])
    process.send_signal(number)
    process.wait()
    wait_for(lambda: not alive(server["pid"]) and not alive(server["child"]), seconds=10)


def test_each_process_of_a_launcher_takes_its_share_of_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert _own_gpus(None) == ["4", "5", "6"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shares = []
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        shares += _own_gpus(None)
    assert sorted(shares) == ["4", "5", "6"]
    with pytest.raises(TeacherError, match="1 GPUs for 2 processes"):
        _own_gpus([0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _own_gpus(None) == [None]


def test_a_model_is_known_by_its_content_or_its_revision(vllm, tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(TeacherError, match="holds no weights"):
        Vllm(folder, executable=vllm)
    (folder / "model.safetensors").write_bytes(b"weights")
    before = Vllm(folder, executable=vllm).about()
    copy = tmp_path / "elsewhere" / "teacher"
    copy.parent.mkdir()
    os.rename(folder, copy)
    assert Vllm(copy, executable=vllm).about() == before
    (copy / "model.safetensors").write_bytes(b"others")
    assert Vllm(copy, executable=vllm).about() != before
    with pytest.raises(TeacherError, match="no folder: name one, or OWNER/NAME"):
        Vllm(folder, executable=vllm)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("distill.teachers.vllm.ENVIRONMENT", tmp_path / "none")
    with pytest.raises(TeacherError, match="make teacher"):
        Vllm("tiny/teacher", revision="abc")
    monkeypatch.setattr("distill.teachers.vllm.ENVIRONMENT", vllm.parents[1])
    assert Vllm("tiny/teacher", revision="abc").about()["revision"] == "abc"
