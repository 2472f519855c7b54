"""`python -m tokenizer.train`: what it writes, what it reports, what it drops and what it refuses."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from storage import folder
from tokenizer import Tokenizer
from tokenizer.train import Corpus, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stories(tmp_path) -> Path:
    generator = random.Random(3)
    words = ["".join(generator.choices("aeioubdgklmnrst", k=generator.randint(2, 7))) for _ in range(500)]
    path = tmp_path / "stories.jsonl"
    rows = [{"text": " ".join(generator.choices(words, k=80)), "story": "short"} for _ in range(200)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_command_writes_a_verified_folder_and_reports(stories, tmp_path):
    out = tmp_path / "made" / "tokenizer"
    command = [sys.executable, "-m", "tokenizer.train", "--from", f"jsonl:{stories}", "--vocab-size", "1100",
               "--out", str(out)]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert folder.verify(out) == []
    trained = Tokenizer.load(out)
    assert trained.vocab_size == 1_100
    texts = [json.loads(line)["text"] for line in stories.read_text().splitlines()]
    held_out = texts[9::10]
    training = [text for number, text in enumerate(texts) if number % 10 != 9]
    assert trained.fingerprint == Tokenizer.train(training, 1_100).fingerprint
    for name, part in ("training", training), ("held out", held_out):
        rate = sum(len(text.encode()) for text in part) / sum(map(len, trained.encode_batch(part)))
        line = next(line for line in run.stdout.splitlines() if line.startswith(name))
        assert f"{rate:.3f} bytes per token ({len(part)} documents" in line
    assert trained.fingerprint in run.stdout


def test_it_says_what_was_reached_and_what_was_dropped(tmp_path, capsys):
    rows = [b'{"text": "good enough, good enough"}', b"{torn", b'{"other": 1}', b'{"text": 5}', b'{"text": ""}', b"",
            b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"[1]"]  # fmt: skip
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    assert main(["--from", f"jsonl:{tmp_path}/*.jsonl", "--vocab-size", "1024", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for line in "1 rows: not JSON", "3 rows: no text in field 'text'", "2 rows: not UTF-8", "1 rows: empty":
        assert line in printed
    reached = Tokenizer.load(tmp_path / "out").vocab_size
    assert reached < 1_024 and f"{reached} of 1,024 asked for" in printed
    assert "held out     no documents" in printed


def test_text_files_are_cut_at_line_ends_and_lose_nothing(tmp_path):
    text = "".join(f"line {number} of it{'' if number % 3 else ' '}\r\n" for number in range(3_000)) + "the end"
    (tmp_path / "book.txt").write_bytes(text.encode())
    corpus = Corpus([f"text:{tmp_path}/**/*.txt"])
    pieces = list(corpus)
    assert "".join(pieces) == text
    assert len(pieces) > 5 and all(piece.endswith("\n") for piece in pieces[:-1])
    assert sorted([*corpus.training(), *corpus.held_out()]) == sorted(pieces)
    assert list(Corpus([f"text:{tmp_path}/book.txt"], limit=2)) == pieces[:2]


def test_fields_and_several_sources(stories, tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    documents = list(Corpus([f"jsonl:{stories}", f"text:{tmp_path}/a.txt"], field="story"))
    assert documents == ["short"] * 200 + ["plain"]


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_wrong_arguments_exit_with_2_and_write_nothing(stories, tmp_path, capsys):
    out, good = str(tmp_path / "out"), f"jsonl:{stories}"
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    assert "jsonl:PATH_OR_GLOB or text:" in refused(capsys, "--from", "csv:x", "--out", out)
    assert "jsonl:PATH_OR_GLOB or text:" in refused(capsys, "--from", str(stories), "--out", out)
    assert "no such file" in refused(capsys, "--from", f"text:{tmp_path}/no*", "--out", out)
    assert "1,024 to 50,257" in refused(capsys, "--from", good, "--vocab-size", "90000", "--out", out)
    assert "positive" in refused(capsys, "--from", good, "--documents", "0", "--out", out)
    assert "exists already" in refused(capsys, "--from", good, "--out", str(tmp_path))
    assert "latin.txt is not UTF-8" in refused(
        capsys, "--from", good, "--from", f"text:{tmp_path}/latin.txt", "--out", out
    )
    assert "no documents" in refused(capsys, "--from", good, "--field", "title", "--out", out)
    assert "1 empty" in refused(capsys, "--from", f"jsonl:{tmp_path}/blank.jsonl", "--out", out)
    assert not Path(out).exists()


def test_help_loads_nothing_heavy():
    code = (
        "import sys, contextlib\nfrom tokenizer.train import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "print([name for name in ('tokenizers', 'huggingface_hub', 'torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--vocab-size" in run.stdout
    assert run.stdout.endswith("[]\n"), run.stdout + run.stderr
