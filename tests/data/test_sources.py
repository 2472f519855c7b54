"""Every kind of source gives the same stream of documents, bad rows in their places, and a wrong one is named."""

import gzip
import itertools
import json
import shutil
import sys

import pyarrow
import pyarrow.parquet
import pytest

import settings
from data import sources
from data.settings import DataSection
from data.sources import BadRow, SourceError

STORIES = ["One day, a dog ran.", "Zwei Äpfel,\r\nein Baum.\n", "😀 said the <|endoftext|> cat"]


def read(source, **options):
    """(documents, bad rows as (reason, where, count)) of a source."""
    rows = list(sources.documents(source, **options))
    bad = [(row.reason, row.where, row.count) for row in rows if isinstance(row, BadRow)]
    return [row for row in rows if isinstance(row, str)], bad


def write_jsonl(path, texts, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts), encoding="utf-8")


def write_parquet(path, column, **options):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(column)), "text": column}), path, **options)


def test_every_kind_gives_the_same_documents(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STORIES)
    write_parquet(tmp_path / "a.parquet", STORIES, row_group_size=2)
    write_jsonl(tmp_path / "hub" / "train.jsonl", STORIES)
    for number, story in enumerate(STORIES):
        (tmp_path / f"{number}.txt").write_bytes(story.encode())
    for source in (f"jsonl:{tmp_path}/a.jsonl", f"parquet:{tmp_path}/a.parquet", f"text:{tmp_path}/?.txt"):
        assert read(source) == (STORIES, [])
        assert read(source, count=2) == (STORIES[:2], [])
    assert read(f"hub:{tmp_path}/hub") == (STORIES, [])


def test_files_of_a_pattern_are_read_once_each_sorted_by_name(tmp_path):
    for name in ("b/1.jsonl", "a/2.jsonl", "a/10.jsonl"):
        write_jsonl(tmp_path / name, [name])
    assert read(f"jsonl:{tmp_path}/**/*.jsonl")[0] == ["a/10.jsonl", "a/2.jsonl", "b/1.jsonl"]


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    write_jsonl(tmp_path / "part[1].jsonl", ["hello"])
    assert read(f"jsonl:{tmp_path}/part[1].jsonl")[0] == ["hello"]


def test_malformed_json_lines_come_out_in_place_with_reason_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "first, behind a byte order mark"}',
        b'{"text": "cut sho',
        b"",
        b'{"title": "no text"}',
        b'{"text": null}',
        b'{"text": 17}',
        b'["text"]',
        b'{"text": "latin \xe9"}',
        b'{"text": "half a pair \\ud83d"}',
        b"[" * 100_000,
        b'{"text": ""}',
        b'{"text": "last, without a line end"}',
    ]
    path.write_bytes(b"\n".join(lines))
    documents, bad = read(f"jsonl:{path}")
    assert documents == ["first, behind a byte order mark", "", "last, without a line end"]
    reasons = ["bad_json", "missing_field", "missing_field", "not_text", "not_text", "bad_utf8", "bad_utf8", "bad_json"]
    assert bad == [(reason, f"{path}:{n}", 1) for reason, n in zip(reasons, [2, 4, 5, 6, 7, 8, 9, 10], strict=True)]
    details = [row.detail for row in sources.documents(f"jsonl:{path}") if isinstance(row, BadRow)]
    assert details[1:3] == ["no field 'text'; it has 'title'", "field 'text' is null"]


def test_count_counts_documents_not_bad_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('nonsense\n{"text": "a"}\nnonsense\n{"text": "b"}\n{"text": "c"}\n')
    documents, bad = read(f"jsonl:{tmp_path}/a.jsonl", count=2)
    assert documents == ["a", "b"]
    assert [row[0] for row in bad] == ["bad_json", "bad_json"]


def test_parquet_rows_that_are_no_text_do_not_cost_the_others(tmp_path):
    path = tmp_path / "a.parquet"
    rows = pyarrow.array([b"good", b"latin \xe9", None, "später".encode()])
    as_text = pyarrow.StringArray.from_buffers(4, rows.buffers()[1], rows.buffers()[2], rows.buffers()[0], 1)
    for column in (rows, as_text):
        write_parquet(path, column)
        assert read(f"parquet:{path}") == (
            ["good", "später"],
            [("bad_utf8", f"{path}:2", 1), ("missing_field", f"{path}:3", 1)],
        )


def undecodable(values, kind=None):
    """An array of strings, or of another type of text, of bytes of which some are no UTF-8."""
    rows = pyarrow.array(values, pyarrow.binary())
    strings = pyarrow.StringArray.from_buffers(len(rows), rows.buffers()[1], rows.buffers()[2], rows.buffers()[0], -1)
    if kind == "dictionary":
        return strings.dictionary_encode()
    if kind == "json":
        return pyarrow.ExtensionArray.from_storage(pyarrow.json_(), strings)
    return rows if kind == "binary" else rows.cast(kind) if kind else strings


@pytest.mark.parametrize(
    "kind", [None, "large_string", "string_view", "binary", "large_binary", "binary_view", "dictionary", "json"]
)
def test_newcomer_every_type_of_string_is_a_text_and_a_bad_row_is_named(tmp_path, kind):
    path = tmp_path / "a.parquet"
    if kind in ("large_string", "string_view"):  # no cast makes one of what is not UTF-8
        good = pyarrow.array(["good", None, "später"]).cast(kind)
        write_parquet(path, good)
        assert read(f"parquet:{path}") == (["good", "später"], [("missing_field", f"{path}:2", 1)])
        data = path.read_bytes()
        path.write_bytes(data.replace("ä".encode(), b"\xff\xe4"))
        assert read(f"parquet:{path}")[1][-1] == ("bad_utf8", f"{path}:3", 1)
        return
    write_parquet(path, undecodable([b"good", b"latin \xe9", None, "später".encode()], kind))
    bad = [("bad_utf8", f"{path}:2", 1), ("missing_field", f"{path}:3", 1)]
    assert read(f"parquet:{path}") == (["good", "später"], bad)


def test_newcomer_columns_that_nobody_reads_may_hold_anything(tmp_path):
    """Nor does a column of another type, that was named by mistake, cost more than its rows."""
    broken = undecodable([b"x", b"\xff", b"y"])
    others = {
        "string": broken, "json": undecodable([b"x", b"\xff", b"y"], "json"),
        "list": pyarrow.ListArray.from_arrays([0, 1, 2, 3], broken),
        "struct": pyarrow.StructArray.from_arrays([broken], ["text"]),
    }  # fmt: skip
    table = pyarrow.table({"text": STORIES, **others})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    for source in (f"parquet:{tmp_path}/train.parquet", f"hub:{tmp_path}"):
        assert read(source) == (STORIES, [])
    for field in ("list", "struct"):
        bad = [("not_text", f"{tmp_path}/train.parquet:{n}", 1) for n in (1, 2, 3)]
        assert read(f"parquet:{tmp_path}/train.parquet", field=field) == ([], bad)
    assert read(f"hub:{tmp_path}", field="string") == (["x", "y"], [("bad_utf8", f"hub:{tmp_path}:2", 1)])


def test_newcomer_the_case_of_a_list_that_is_no_utf8(real_data):
    path = real_data.parent / "cases" / "other_column_bad_utf8.parquet"
    if not path.exists():
        pytest.skip(f"no case at {path}")
    assert read(f"parquet:{path}") == ([], [("not_text", f"{path}:{n}", 1) for n in (1, 2, 3)])


def test_parquet_dictionary_and_other_columns(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, pyarrow.array(["a", "b", "a"]).dictionary_encode())
    assert read(f"parquet:{path}")[0] == ["a", "b", "a"]
    assert read(f"parquet:{path}", field="id") == ([], [("not_text", f"{path}:{n}", 1) for n in (1, 2, 3)])
    assert read(f"parquet:{path}", field="body") == ([], [("missing_field", f"{path}:1", 3)])


def test_two_parquet_columns_of_one_name_are_an_error_that_names_them(tmp_path):
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet has several columns 'text': rename all but one"):
        read(f"parquet:{tmp_path}/a.parquet")


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: pyarrow.compress(data, "zstd", asbytes=True)])
def test_newcomer_compressed_files_are_read_like_plain_ones(tmp_path, pack):
    lines = "".join(json.dumps({"text": story}) + "\n" for story in STORIES) + "{no\n"
    texts = "\ufeffone\n<|endoftext|>\r\ntwo <|endoftext|>\n<|endoftext|>\n\n<|endoftext|>\nthree"
    rows = json.dumps([{"text": story} for story in STORIES], indent=1)
    for kind, name, content in (("jsonl", "a.jsonl", lines), ("text", "b.txt", texts), ("jsonl", "c.json", rows)):
        (tmp_path / name).write_bytes(content.encode())
        (tmp_path / f"{name}.packed").write_bytes(pack(content.encode()))
        plain, packed = f"{kind}:{tmp_path}/{name}", f"{kind}:{tmp_path}/{name}.packed"
        documents, bad = read(packed)
        assert sources.fault(packed) is None and len(documents) == 3
        assert documents == read(plain)[0]
        assert bad == [(reason, where.replace(name, f"{name}.packed"), n) for reason, where, n in read(plain)[1]]
        assert read(packed, count=2)[0] == documents[:2]
        (piece,) = sources.pieces(packed, "train", None, 0)
        assert list(sources.read_piece(piece))[: len(documents)] == documents


def test_newcomer_a_compressed_file_that_is_cut_short_is_an_error_that_names_it(tmp_path):
    packed = gzip.compress("".join(json.dumps({"text": f"{n} {STORIES[0]}"}) + "\n" for n in range(30_000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(SourceError, match=r"a\.jsonl\.gz cannot be read: Truncated"):
        read(f"jsonl:{tmp_path}/a.jsonl.gz")


def test_newcomer_pointers_and_pages_are_named_before_anything_is_read(tmp_path, real_data):
    cases = real_data.parent / "cases"
    if not cases.is_dir():
        pytest.skip(f"no cases at {cases}")
    (tmp_path / "set").mkdir()
    shutil.copy(cases / "lfs_pointer.jsonl", tmp_path / "set" / "train.jsonl")
    (tmp_path / "page.jsonl").write_text("<!doctype html>\n<html>Sign in</html>")
    for source, says in (
        (f"text:{cases}/lfs_pointer.txt", "Git LFS pointer"), (f"jsonl:{cases}/lfs_*.jsonl", "git lfs pull"),
        (f"hub:{tmp_path}/set", "Git LFS pointer"), (f"jsonl:{tmp_path}/page.jsonl", "web page"),
    ):  # fmt: skip
        for raw in ({"from": source}, {"from": "hub:owner/name", "valid_from": source}):
            with pytest.raises(settings.ConfigError, match=says):
                settings.validate(DataSection, {"sources": {"x": raw}})
        with pytest.raises(SourceError, match=says):
            read(source)


def test_parquet_row_numbers_go_on_across_row_groups(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x"] * 5 + [None], row_group_size=2)
    assert read(f"parquet:{tmp_path}/a.parquet")[1] == [("missing_field", f"{tmp_path}/a.parquet:6", 1)]


def test_a_cut_or_false_parquet_file_is_an_error_that_names_it(tmp_path):
    write_parquet(tmp_path / "a.parquet", STORIES * 1000)
    whole = (tmp_path / "a.parquet").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b'{"text": "json"}'):
        (tmp_path / "cut.parquet").write_bytes(content)
        with pytest.raises(SourceError, match=r"cut\.parquet is not a whole parquet file"):
            read(f"parquet:{tmp_path}/cut.parquet")


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "write_page_checksum": True}])
def test_damaged_parquet_pages_are_an_error_that_names_the_file(tmp_path, options):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{number} {STORIES[0]}" for number in range(3000)]})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, **options)
    damaged = bytearray(path.read_bytes())
    damaged[200:264] = bytes(64)
    path.write_bytes(damaged)
    with pytest.raises(SourceError, match=r"a\.parquet"):
        read(f"parquet:{path}")


def test_text_files_are_cut_at_lines_that_are_exactly_the_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(
        b"<|endoftext|>\r\none\n\none\n<|endoftext|>\r\n \n<|endoftext|>\n"
        b"two <|endoftext|>\n <|endoftext|>\n<|endoftext|>\nthree"
    )
    (tmp_path / "b.txt").write_bytes("\ufefffour".encode())
    (tmp_path / "c.txt").write_bytes(b"")
    texts = ["one\n\none\n", "two <|endoftext|>\n <|endoftext|>\n", "three", "four"]
    assert read(f"text:{tmp_path}/*.txt") == (texts, [])


def test_a_text_document_that_is_not_utf8_is_counted_with_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n<|endoftext|>\nfine\nbad \xff\n<|endoftext|>\ngood\n")
    assert read(f"text:{path}") == (["good\n", "good\n"], [("bad_utf8", f"{path}:4", 1)])


def test_embedded_documents_depend_on_split_and_seed():
    for corpus in ("stories", "problems", "recall"):
        source = f"embedded:{corpus}"
        documents, _ = read(source, count=5, seed=1)
        assert len(documents) == 5
        assert documents == read(source, count=5, seed=1)[0]
        assert documents != read(source, count=5, seed=2)[0]
        assert not set(documents) & set(read(source, count=5, seed=1, split="valid")[0])
    endless = sources.documents("embedded:stories", count=None, seed=1)
    assert len(list(itertools.islice(endless, 30))) == 30


def test_a_hub_data_set_has_sides_fields_and_clear_errors(tmp_path):
    write_jsonl(tmp_path / "both" / "train.jsonl", STORIES)
    write_jsonl(tmp_path / "both" / "validation.jsonl", ["held out"])
    assert read(f"hub:{tmp_path}/both", split="valid") == (["held out"], [])
    with pytest.raises(SourceError, match="no field 'story'; its fields are id, text"):
        read(f"hub:{tmp_path}/both", field="story")
    write_jsonl(tmp_path / "one" / "train.jsonl", STORIES)
    write_jsonl(tmp_path / "one" / "test.jsonl", STORIES)
    with pytest.raises(SourceError, match="no split validation or .* it has train, test"):
        read(f"hub:{tmp_path}/one", split="valid")
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match="cannot be read"):
        read(f"hub:{tmp_path}/none")


def test_the_hub_without_network_is_an_error_that_says_what_to_do(run, tmp_path):
    code = "from data import sources\ntry: list(sources.documents('hub:nobody/nothing'))\n"
    code += "except sources.SourceError as error: print(error)"
    done = run(sys.executable, "-c", code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.stdout.startswith("hub:nobody/nothing cannot be reached"), done.stderr
    assert "name a local folder or file" in done.stdout


def test_reading_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="no such file"):
        read(f"jsonl:{tmp_path}/none.jsonl")
    with pytest.raises(ValueError, match="KIND:REST"):
        read("csv:a.csv")


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("stories.jsonl", "KIND:REST, where KIND is embedded, jsonl"),
        ("csv:stories.csv", "KIND:REST"),
        ("jsonl:", "name what to read"),
        ("jsonl:no/such/*.jsonl", "no such file"),
        ("text:data", "this is a folder"),
        ("hub:tinystories", "hub:OWNER/NAME"),
        ("hub:/no/such/folder", "hub:OWNER/NAME"),
        ("hub:a/b/c/d", "hub:OWNER/NAME"),
    ],
)
@pytest.mark.parametrize("key", ["from", "valid_from"])
def test_a_wrong_source_is_reported_before_anything_is_read(source, remedy, key):
    raw = {"sources": {"x": {"from": "hub:owner/name", key: source}}}
    with pytest.raises(settings.ConfigError) as caught:
        settings.validate(DataSection, raw)
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == (f"sources.x.{key}", source)
    assert remedy in problem.remedy


def test_right_sources_are_accepted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", STORIES)
    right = [f"jsonl:{tmp_path}/*.jsonl", "hub:owner/name", "hub:owner/name/config", f"hub:{tmp_path}"]
    data = settings.validate(DataSection, {"sources": {f"s{n}": {"from": source} for n, source in enumerate(right)}})
    assert [source.from_ for source in data.sources.values()] == right


def test_all_problems_of_the_data_section_come_together(tmp_path):
    (tmp_path / "file").write_text("")
    source = f"text:{tmp_path}/file"
    raw = {
        "shards": str(tmp_path / "file"),
        "valid_fraction": 0.7,
        "min_characters": 0,
        "sources": {
            "../up": {"from": source},
            "endless": {"from": "embedded:stories"},
            "novels": {"from": "embedded:novels", "documents": 5},
            "own": {"from": source, "valid_from": "embedded:stories"},
            "same": {"from": source, "valid_from": source, "documents": 0},
            "typo": {"from": source, "feild": "text"},
        },
    }
    with pytest.raises(settings.ConfigError) as caught:
        settings.validate(DataSection, raw)
    assert {problem.key for problem in caught.value.problems} == {
        "shards",
        "valid_fraction",
        "min_characters",
        "sources.../up",
        "sources.endless.documents",
        "sources.novels.from",
        "sources.own.valid_from",
        "sources.same.valid_from",
        "sources.same.documents",
        "sources.typo.feild",
    }
    with pytest.raises(settings.ConfigError, match="at least one source"):
        settings.validate(DataSection, {})
