"""Trackers: off imports nothing, wandb works offline, a resumed run joins itself, and no failure reaches training."""

import sys

import pytest

from observe import trackers

RECORD = {"kind": "train", "step": 3, "phase": "a", "tokens": 30, "loss": 2.5, "mfu": None}
SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """No key and no login, whatever the machine has; and wandb writes nothing outside the test's folder."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))


def test_off_imports_nothing(run):
    code = (
        "import sys; from pathlib import Path; from observe.trackers import open_tracker\n"
        "tracker = open_tracker('off', Path('/nonexistent'), {}); tracker.log({'kind': 'train'}); tracker.close()\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('wandb', 'torch', 'matplotlib')])"
    )
    done = run(sys.executable, "-c", code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'online'.*auto, off"):
        trackers.open_tracker("online", tmp_path, {})


def test_offline_without_a_key_and_a_resumed_run_joins_itself(run, tmp_path):
    pytest.importorskip("wandb")
    run_folder = tmp_path / "runs" / "default"
    code = f"""
from pathlib import Path
from observe.trackers import open_tracker
tracker = open_tracker("auto", Path({str(run_folder)!r}), {{"phases": [{{"name": "config-value"}}]}})
tracker.log({RECORD!r})
tracker.log({{"kind": "sample", "step": 3, "phase": "a", "tokens": 30, "prompt": "<b>", "text": "sample-text"}})
tracker.close()
tracker.log({RECORD!r})  # after the end: ignored
"""
    for _ in range(2):
        done = run(sys.executable, "-c", code)
        assert done.returncode == 0 and done.stdout == ""
        assert done.stderr.startswith("wandb: offline") and done.stderr.count("\n") == 1
    known = (run_folder / "wandb_id").read_text().strip()
    written = list(run_folder.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in written] == [f"run-{known}.wandb"] * 2
    for path in written:
        content = path.read_bytes()
        assert all(word in content for word in (b"train/loss", b"sample-text", b"config-value", known.encode()))


def test_a_key_is_found_in_the_environment_or_in_netrc(monkeypatch, tmp_path):
    assert not trackers.has_key()
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password x\n")
    assert not trackers.has_key()
    (tmp_path / "netrc").write_text("this is not a netrc file\n")
    assert not trackers.has_key()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    assert trackers.has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.company.example")
    assert not trackers.has_key()
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert trackers.has_key()


class Settings:
    def __init__(self, **values):
        self.__dict__.update(values)


class FakeRun:
    url = "somewhere"

    def __init__(self, fail_after: int):
        self.left = fail_after
        self.logged = []

    def define_metric(self, *_, **__):
        pass

    def log(self, row):
        if not self.left:
            raise ConnectionError("the network\nis gone")
        self.left -= 1
        self.logged.append(row)

    def finish(self, **_):
        raise ConnectionError("still gone")


class FakeWandb:
    """wandb, as far as the tracker uses it; refuses to start in the modes in `refuses`."""

    Settings = Settings

    def __init__(self, refuses=(), fail_after=10**6):
        self.refuses, self.modes, self.run = refuses, [], FakeRun(fail_after)

    def init(self, mode, **arguments):
        self.modes.append(mode)
        self.arguments = arguments
        if mode in self.refuses:
            raise RuntimeError(f"no {mode}")
        return self.run


def open_with(fake, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    said = []
    tracker = trackers.open_tracker("auto", tmp_path / "run", {"run": {"name": "x"}}, say=said.append)
    return tracker, said


def test_online_with_a_key_which_goes_nowhere_but_to_wandb(monkeypatch, tmp_path):
    fake = FakeWandb()
    tracker, said = open_with(fake, monkeypatch, tmp_path)
    assert fake.modes == ["online"] and "online" in said[0]
    assert SECRET not in repr(fake.arguments) + repr(fake.arguments["settings"].__dict__) + "".join(said)
    assert fake.arguments["config"] == {"run": {"name": "x"}}
    assert fake.arguments["settings"].console == "off" and fake.arguments["settings"].disable_git


def test_offline_when_online_does_not_start_and_nothing_when_neither_does(monkeypatch, tmp_path):
    fake = FakeWandb(refuses=("online",))
    _, said = open_with(fake, monkeypatch, tmp_path)
    assert fake.modes == ["online", "offline"]
    assert said[0].startswith("WARNING") and "offline" in said[1]

    fake = FakeWandb(refuses=("online", "offline"))
    tracker, said = open_with(fake, monkeypatch, tmp_path)
    assert type(tracker) is trackers.Tracker and all(line.startswith("WARNING") for line in said)
    tracker.log(RECORD)


def test_wandb_that_is_not_installed_is_one_loud_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = []
    tracker = trackers.open_tracker("auto", tmp_path, {}, say=said.append)
    tracker.log(RECORD)
    assert len(said) == 1 and said[0].startswith("WARNING: wandb (offline) did not start")


def test_a_failure_during_the_run_is_one_loud_line_and_no_more(monkeypatch, tmp_path):
    tracker, said = open_with(FakeWandb(fail_after=2), monkeypatch, tmp_path)
    for _ in range(5):
        tracker.log(RECORD)
    tracker.close()
    warnings = [line for line in said if line.startswith("WARNING")]
    assert len(warnings) == 1 and "the network is gone" in warnings[0]


def test_rows_have_flat_names_and_leave_out_what_is_unknown():
    assert trackers.rows(RECORD) == {"step": 3, "tokens": 30, "train/phase": "a", "train/loss": 2.5}
    validation = {"kind": "validation", "step": 1, "val_loss": 2.0, "sources": {"s": {"val_loss": 3.0}}}
    assert trackers.rows(validation) == {"step": 1, "validation/val_loss": 2.0, "validation/s/val_loss": 3.0}
    probe = {"kind": "probe", "step": 1, "probe": "recall", "when": "end", "accuracy": 0.5}
    assert trackers.rows(probe) == {"step": 1, "probe/recall/end/accuracy": 0.5}
