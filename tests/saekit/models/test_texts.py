"""Documents: every kind of file gives the same ones in the same order, and a broken one is named to the line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from saekit.config import Config
from saekit.errors import DataError, MissingDependencyError, ResourceError
from saekit.models import FileTextConfig, HubTextConfig, TextConfig, iter_documents, text_fingerprint

TEXTS = ["The river runs.", "", "Naïve café, 東京 🎻", 'Two\nlines and a "quote"', "Last."]


def _jsonl(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"title": f"t{i}", column: text}) + "\n" for i, text in enumerate(texts)).encode()


def _write(path: Path, texts: list[str]) -> Path:
    """Writes texts in the form that the file's name says."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        titles = [f"t{i}" for i in range(len(texts))]
        pq.write_table(pa.table({"text": texts, "title": titles}), path, row_group_size=2)
        return path
    data = _jsonl(texts)
    if ".json" in path.suffixes:
        data = json.dumps([json.loads(line) for line in data.splitlines()], indent=1).encode()
    if path.suffix == ".zst":
        # Two frames, as parallel writers leave them, without the size in the header.
        middle = len(data) // 2
        pack = zstandard.ZstdCompressor(write_content_size=False).compress
        data = pack(data[:middle]) + pack(data[middle:])
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    path.write_bytes(data)
    return path


def _texts(*paths: Path | str, **fields: object) -> list[str]:
    config = FileTextConfig.parse({"paths": [str(path) for path in paths], **fields})
    return [document.text for document in iter_documents(config)]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "a.b.JSONL"], ids=str
)
@pytest.mark.parametrize("seed", [None, 3], ids=["in-order", "shuffled"])
def test_iter_documents_reads_every_kind_of_file(tmp_path: Path, name: str, seed: int | None) -> None:
    path = _write(tmp_path / name, TEXTS)
    found = list(iter_documents(FileTextConfig(paths=(str(path),), shuffle_seed=seed)))
    assert [document.index for document in found] == list(range(5))
    in_order = found if seed is None else sorted(found, key=lambda document: document.title)
    assert [(document.text, document.title) for document in in_order] == [(t, f"t{i}") for i, t in enumerate(TEXTS)]
    assert all(document.source.startswith(str(path)) for document in found)
    assert len({document.source for document in found}) == 5
    plain = {document.source for document in iter_documents(FileTextConfig(paths=(str(path),)))}
    assert {document.source for document in found} == plain


@pytest.mark.parametrize("ending", [".txt", ".txt.zst", ".txt.gz"])
def test_a_plain_text_file_is_one_document(tmp_path: Path, ending: str) -> None:
    text = "First line.\r\n\r\nÜber alles: 2nd.\n"
    data = text.encode()
    packed = {".txt": data, ".txt.zst": zstandard.compress(data), ".txt.gz": gzip.compress(data, mtime=0)}[ending]
    (tmp_path / f"book{ending}").write_bytes(packed)
    (document,) = iter_documents(FileTextConfig(paths=(str(tmp_path),)))
    assert (document.text, document.title) == (text, "book")


def test_folders_and_globs_are_read_in_sorted_order_and_each_file_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(_jsonl([name]))
    (tmp_path / "notes.md").write_text("no document")
    everything = ["a.jsonl", "b.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"]
    assert _texts(tmp_path) == everything
    assert _texts(tmp_path / "*.jsonl") == everything[:2]
    assert _texts(tmp_path / "**/*.jsonl") == everything
    assert _texts(tmp_path / "b.jsonl", tmp_path) == ["b.jsonl", "a.jsonl", *everything[2:]]


def test_relative_paths_are_read_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl(["here"]))
    monkeypatch.chdir(tmp_path)
    assert _texts("a.jsonl") == _texts("*.jsonl") == _texts(".") == ["here"]


def test_shuffling_is_a_permutation_that_the_seed_fixes(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(200)]
    _write(tmp_path / "a.jsonl", texts[:90])
    _write(tmp_path / "b.parquet", texts[90:])
    one, again, other = (_texts(tmp_path, shuffle_seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert sorted(one) == sorted(other) == sorted(texts)
    assert sum(a == b for a, b in zip(one, texts, strict=True)) < 10
    # Documents of both files, mixed through the whole of the order.
    assert 20 < sum(int(text.split()[1]) < 90 for text in one[:100]) < 70


def test_the_index_follows_the_order_of_reading(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", [str(i) for i in range(50)])
    found = list(iter_documents(FileTextConfig(paths=(str(path),), shuffle_seed=0)))
    assert [document.index for document in found] == list(range(50))


def test_blank_lines_are_no_records_and_null_is_an_empty_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\n   \n{"text": null}\n{"text": "b"}', encoding="utf-8")
    assert _texts(path) == _texts(path, shuffle_seed=None) == ["a", "", "b"]
    assert sorted(_texts(path, shuffle_seed=5)) == ["", "a", "b"]


def _bad_parquet(path: Path, **columns: list[object]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not valid JSON \(Expecting value at column"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\xff"}\n', r"a\.jsonl:2: invalid UTF-8 at byte 11"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', r"a\.jsonl:1: no column 'text'; its columns: 'body', 'id'"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1: column 'text' holds int, needs text"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: found list, needs a record"),
        ("a.jsonl", b'{"text": "x\\ud800"}\n', r"a\.jsonl:1: half a surrogate pair at character 1"),
        ("a.json", b'{"text": "a"}', r"a\.json: found a JSON dict, needs a list"),
        ("a.json", b'[\n{"text": "a"},\n{]', r"a\.json:3: not valid JSON"),
        ("a.txt", b"fine\nfine\nbr\xe9ve\n", r"a\.txt: invalid UTF-8 at byte 12 \(line 3\)"),
        ("a.txt.gz", b"no gzip at all", r"a\.txt\.gz'?: cannot be read"),
        ("a.txt.gz", gzip.compress(b"hello" * 100, mtime=0)[:-12], r"a\.txt\.gz'?: cannot be read"),
        ("a.jsonl.zst", b"no zstd at all", r"a\.jsonl\.zst'?: cannot be read"),
        ("a.parquet", b"PAR1 nonsense", r"a\.parquet'?: not a readable parquet file"),
        ("a.csv", b"text\na\n", r"a\.csv'?: unknown kind, needs \.txt, \.jsonl"),
        ("a.zst", b"", r"a\.zst'?: unknown kind"),
    ],
)
def test_iter_documents_names_what_is_broken_and_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for seed in (None, 0):
        with pytest.raises(DataError, match=message) as caught:
            _texts(path, shuffle_seed=seed)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".zst", ".gz"])
@pytest.mark.parametrize("cut", [1, 40, 3000])
def test_a_truncated_stream_is_no_silent_end(tmp_path: Path, ending: str, cut: int) -> None:
    path = _write(tmp_path / f"a.jsonl{ending}", [str(i) * 50 for i in range(2000)])
    path.rename(whole := tmp_path / f"a.txt{ending}")
    assert len(_texts(whole)[0].splitlines()) == 2000
    whole.write_bytes(whole.read_bytes()[:-cut])
    with pytest.raises(DataError, match="cannot be read: Truncated compressed stream"):
        _texts(whole)


def test_parquet_names_missing_and_foreign_columns(tmp_path: Path) -> None:
    path = _bad_parquet(tmp_path / "a.parquet", body=["x"], n=[1])
    with pytest.raises(DataError, match=r"no column 'text'; its columns: 'body', 'n'"):
        _texts(path)
    with pytest.raises(DataError, match=r"a\.parquet:0: column 'n' holds int, needs text"):
        _texts(path, column="n")


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["nothing.jsonl"], "no such file or folder"),
        (["no-*.jsonl"], "no file matches"),
        (["empty"], "no file matches"),
    ],
)
def test_iter_documents_refuses_paths_without_files(tmp_path: Path, paths: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        _texts(*(tmp_path / path for path in paths))
    with pytest.raises(DataError, match=message):
        text_fingerprint(FileTextConfig(paths=tuple(str(tmp_path / path) for path in paths)))


def test_fingerprint_follows_content_order_column_and_seed_but_not_the_place(tmp_path: Path) -> None:
    def of(*paths: Path, **fields: object) -> str:
        return text_fingerprint(FileTextConfig.parse({"paths": [str(path) for path in paths], **fields}))

    one, two = _write(tmp_path / "one.jsonl", TEXTS), _write(tmp_path / "two.jsonl", TEXTS[:2])
    (tmp_path / "moved").mkdir()
    moved = _write(tmp_path / "moved" / "other.jsonl", TEXTS)
    assert of(one) == of(moved)
    different = [of(one), of(two), of(one, two), of(two, one), of(one, column="body"), of(one, shuffle_seed=1)]
    assert len(set(different)) == len(different)
    one.write_bytes(one.read_bytes().replace(b"river", b"rivet"))
    assert of(one) != of(moved)


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A dataset in the hub's layout."""
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    _write(folder / "data" / "train-00000-of-00002.parquet", TEXTS[:3])
    _write(folder / "data" / "train-00001-of-00002.parquet", TEXTS[3:])
    return folder


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "downloaded"])
def test_a_datasets_reference_is_read(
    hub_folder: Path, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = HubTextConfig(name=str(hub_folder), streaming=streaming)
    found = list(iter_documents(config))
    assert [document.text for document in found] == TEXTS
    assert [document.source for document in found] == [f"{hub_folder}[train]:{i}" for i in range(5)]
    assert text_fingerprint(config) == text_fingerprint(config.model_copy(update={"streaming": not streaming}))


def test_a_datasets_fingerprint_follows_reference_and_content(hub_folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    before = text_fingerprint(HubTextConfig(name=str(hub_folder)))
    hub_folder.rename(moved)
    assert text_fingerprint(HubTextConfig(name=str(moved))) == before
    _write(moved / "data" / "train-00001-of-00002.parquet", ["changed"])
    assert text_fingerprint(HubTextConfig(name=str(moved))) != before
    hub = {
        text_fingerprint(HubTextConfig(name="a/b", **fields))
        for fields in ({}, {"revision": "x"}, {"split": "test"}, {"column": "body"}, {"config_name": "en"})
    }
    assert len(hub) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"column": "body"}, r"no column 'body'; its columns: 'text', 'title'"),
        ({"split": "test"}, "cannot be loaded: Bad split: test"),
        ({"config_name": "klingon"}, "cannot be loaded: BuilderConfig 'klingon' not found"),
        ({"name": "nobody/no-such-dataset"}, "cannot be loaded"),
    ],
)
def test_a_datasets_reference_that_does_not_work(hub_folder: Path, fields: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(iter_documents(HubTextConfig.parse({"name": str(hub_folder), **fields})))
    assert "\n" not in str(caught.value)


def test_a_datasets_reference_with_a_file_that_breaks_on_the_way(hub_folder: Path) -> None:
    second = hub_folder / "data" / "train-00001-of-00002.parquet"
    second.write_bytes(second.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be loaded"):
        list(iter_documents(HubTextConfig(name=str(hub_folder))))


def test_a_missing_datasets_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'saekit\[datasets\]'"):
        list(iter_documents(HubTextConfig(name="a/b")))


def test_text_config_is_told_by_its_kind(documents_file: Path, documents: list[str]) -> None:
    class Recipe(Config):
        text: TextConfig

    recipe = Recipe.parse({"text": {"kind": "files", "paths": [str(documents_file)]}})
    assert [document.text for document in iter_documents(recipe.text)] == documents
    assert isinstance(Recipe.parse({"text": {"kind": "huggingface", "name": "a/b"}}).text, HubTextConfig)


def test_shuffling_says_when_its_temporary_copy_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.parquet", TEXTS)
    # Linux's own full disk.
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: open("/dev/full", "wb"))  # noqa: SIM115, PTH123
    text = FileTextConfig(paths=(str(path),), shuffle_seed=0)
    monkeypatch.setattr("json.dumps", lambda _: "x" * 1_000_000)
    with pytest.raises(ResourceError, match=r"no room for a plain copy of .*No space left"):
        list(iter_documents(text))


def test_large_files_are_not_held_in_memory(tmp_path: Path, tiny_model_dir: Callable[[str], Path]) -> None:
    """The first documents come before the rest is read: a broken end is met only at the end."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(_jsonl(TEXTS) + b"{broken\n")
    documents = iter_documents(FileTextConfig(paths=(str(path),)))
    assert [next(documents).text for _ in TEXTS] == TEXTS
    with pytest.raises(DataError, match=r":6: not valid JSON"):
        next(documents)
