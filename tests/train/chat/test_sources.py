"""Every kind of source from small files, and its settings."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from chat_for_tests import answers, asked, data_of, picture, steps_of, write_lines
from torch.utils.data import DataLoader

from llama_multimodal.errors import ConfigError, DataError, MissingExtraError, UserError
from llama_multimodal.train.chat.config import ChatData, FileSource, SourceConfig, read_data, source_at
from llama_multimodal.train.chat.sources import Rows, find_files, open_source

ROWS = [asked(answer=f"a {i}") for i in range(5)]


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    picture(seed=seed).save(file, "PNG")
    return file.getvalue()


def tables(rows: Rows) -> list[Any]:
    return [rows.read(i).table for i in range(rows.size or 0)]


def opened(source: SourceConfig | str) -> Rows:
    return open_source(source_at(source) if isinstance(source, str) else source)


def learnt(source: Any, **more: Any) -> list[str]:
    """What an epoch of a source teaches, sorted."""
    steps = steps_of(source, rows=1, **more)
    return sorted(text for step in range(steps.num_steps or 0) for text in answers(steps, step))


# --- JSON and tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_list_and_lines_hold_the_same_rows(tmp_path: Path, indent: int | None, bom: bytes) -> None:
    rows = [
        *ROWS,
        {"question": "Grüße 🦙, ]}\u2028\x85", "answer": 'a "[" \\ \n'},
        {"question": "x", "answer": "y", "n": [[1], {}]},
    ]
    listed, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    listed.write_bytes(bom + json.dumps(rows, indent=indent, ensure_ascii=False).encode())
    lines.write_bytes(bom + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    assert tables(opened(str(listed))) == tables(opened(str(lines))) == rows
    assert opened(str(listed)).where(2) == f"{listed}, row 3" and opened(str(lines)).where(2) == f"{lines}:3"


def test_blank_lines_and_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(asked())
    path.write_bytes(f"\n{good}\r\n  \n{{broken\n\n{good}".encode() + b"\n\xff\xfe\n")
    steps = steps_of(str(path), rows=4)
    found = steps[0]
    assert sorted(e.where for e in found.examples) == [f"{path}:2", f"{path}:6"]
    assert sorted((skip.where, skip.kind) for skip in found.skipped) == [
        (f"{path}:4", "not JSON"), (f"{path}:7", "not JSON"),
    ]  # fmt: skip


def test_lines_in_a_json_file(tmp_path: Path) -> None:
    assert tables(opened(write_lines(tmp_path / "a.json", ROWS))) == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "question": 1\n}', "neither a list of rows nor one row a line"),
        ('[{"a": 1} {"a": 2}]', "a comma is missing: line 1 column 11"),
        ('[{"a": 1},\n {"a": ]', "is not valid JSON: Expecting value: line 2"),
        ('[{"a": 1}', "a comma is missing"),
        ("[", "is not valid JSON"),
        ("[]", "has no rows"),
        ("", "has no rows"),
        ("[" * 100_000, "lists within lists"),
    ],
)
def test_damaged_lists(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        opened(str(tmp_path / "a.json"))


def test_several_files_and_a_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "p.png")
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl", [{"image": "p.png", **asked(answer=f"a {number}")}])
    source = FileSource(file=str(tmp_path / "*.jsonl"), images=str(tmp_path / "images"))
    assert [opened(source).where(i) for i in range(3)] == [f"{tmp_path / str(i)}.jsonl:1" for i in range(3)]
    table = {"file": source.file, "images": source.images}
    assert learnt(table) == ["a 0", "a 1", "a 2"]
    with pytest.raises(DataError, match=r'no folder .*imagez of images; did you mean "images"\?'):
        opened(FileSource(file=source.file, images=str(tmp_path / "imagez")))


def test_csv_and_tsv(tmp_path: Path) -> None:
    picture().save(tmp_path / "p.png")
    for end, sep in (("csv", ","), ("tsv", "\t")):
        path = tmp_path / f"a.{end}"
        path.write_text(f'image{sep}question{sep}answer\np.png{sep}"what\nis this?"{sep}a cat\np.png{sep}x\n')
        steps = steps_of(str(path), rows=2)
        assert answers(steps, 0) == ["a cat"] and steps[0].examples[0].shape == "question+answer"
        assert [(skip.where, skip.kind) for skip in steps[0].skipped] == [(f"{path}:4", "shape")]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    write_lines(tmp_path / "chats.jsonl", ROWS)
    with pytest.raises(DataError, match=r'no file .*chat.jsonl; did you mean "chats.jsonl"\?'):
        opened(str(tmp_path / "chat.jsonl"))
    with pytest.raises(DataError, match="is a folder; give a file"):
        find_files(str(tmp_path))
    with pytest.raises(DataError, match="is not a file of conversations"):
        source_at(str(tmp_path / "a.docx"))


def test_counted_names(tmp_path: Path) -> None:
    for number in range(8, 12):
        write_lines(tmp_path / f"{number:03}.jsonl", ROWS[:1])
    assert [file.name for file in find_files(str(tmp_path / "{009..011}.jsonl"))] == [
        "009.jsonl",
        "010.jsonl",
        "011.jsonl",
    ]
    with pytest.raises(DataError, match=r"012\.jsonl"):
        find_files(str(tmp_path / "{009..012}.jsonl"))


# --- samples of several files ----------------------------------------------------------------------------------------


def write_tar(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_tars(tmp_path: Path) -> None:
    part = {"type": "image", "image": "b.png"}
    chat = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a b"}]}
    write_tar(tmp_path / "0.tar", {
        "a.png": png(1), "a.txt": b"a cat\n", "x/b.json": json.dumps(chat).encode(), "x/b.png": png(2),
        "c.left.png": png(3), "c.right.png": png(4), "c.json": json.dumps(asked(answer="a c")).encode(),
    })  # fmt: skip
    # As img2dataset writes it: a caption, and a table with an address and more.
    more = {"caption": "a d", "url": "http://x.org/d.jpg", "key": "d", "image": "elsewhere.jpg"}
    write_tar(tmp_path / "1.tar", {
        "d.jpg": png(5), "d.json": json.dumps(more).encode(), "d.txt": b"a d", "e.png": png(6),
        "f.json": b"{", "g.cls": b"3",
    })  # fmt: skip
    steps = steps_of(str(tmp_path), rows=7)  # a folder of shards
    by_name = {e.where.rpartition(":")[2]: e for e in steps[0].examples}
    assert sorted(by_name) == ["a", "c", "d", "x/b"] and sorted(answers(steps, 0)) == ["a b", "a c", "a cat", "a d"]
    assert [len(by_name[name].images) for name in ("a", "c", "d", "x/b")] == [1, 2, 1, 1]
    expected = steps.processor.encode_for_training([{"role": "user", "content": [{"type": "image", "image": png(4)}]}])
    assert (by_name["c"].tiles[1] == expected.tiles[0]).all()
    assert sorted((s.where.rpartition(":")[2], s.kind) for s in steps[0].skipped) == [
        ("e", "no text"), ("f", "not JSON"), ("g", "no text"),
    ]  # fmt: skip


def test_damaged_tars(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="cannot be read as a tar"):
        opened(str(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match=r"unpack it to a plain \.tar"):
        open_source(data_of({"tar": str(tmp_path / "b.tar.gz")}).sources[0])


def test_a_folder_of_captions(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.jpg", "deep/b.v2.png", "c.png", "d.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "deep/b.v2.txt").write_text("a b")
    (tmp_path / "c.json").write_text(json.dumps(asked(answer="a c")))
    steps = steps_of(str(tmp_path), rows=4)
    assert sorted(answers(steps, 0)) == ["a b", "a c", "a cat"]
    assert all(len(e.images) == 1 for e in steps[0].examples)
    assert [(s.where, s.kind) for s in steps[0].skipped] == [(str(tmp_path / "d.png"), "no text")]


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl", "metadata.csv"])
def test_a_folder_with_a_table(tmp_path: Path, name: str) -> None:
    picture().save(tmp_path / "p.png")
    text = "file_name,text\np.png,a cat\n" if name.endswith("csv") else '{"file_name": "p.png", "text": "a cat"}\n'
    (tmp_path / name).write_text(text)
    assert learnt(str(tmp_path)) == ["a cat"]
    (tmp_path / "captions.csv").write_text(text)
    with pytest.raises(DataError, match="name one of them with file:"):
        opened(str(tmp_path))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no rows"):
        opened(str(tmp_path))


# --- the datasets library --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same 7 rows as a data set, a dictionary of data sets, Parquet and Arrow."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("datasets")
    rows = {
        "images": [[picture(seed=i)] for i in range(7)],
        "question": ["what is this?"] * 7, "answer": [f"a {i}" for i in range(7)],
    }  # fmt: skip
    kinds = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    made = datasets.Dataset.from_dict(rows, features=kinds)
    made.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": made, "test": made.select(range(2))}).save_to_disk(folder / "two")
    made.to_parquet(folder / "rows.parquet")
    next((folder / "one").glob("*.arrow")).rename(folder / "rows.arrow")
    made.save_to_disk(folder / "one")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library keeps goes into the test's folder."""
    config = sys.modules.get("datasets.config")
    if config is not None:
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", ["one", "two", "rows.parquet", "rows.arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_datasets(saved: Path, name: str, streaming: bool) -> None:
    steps = steps_of({"dataset": str(saved / name), "streaming": streaming, "buffer": 3}, rows=7)
    assert sorted(answers(steps, 0)) == [f"a {i}" for i in range(7)]
    assert steps.num_steps == (None if streaming else 1)
    example = min(steps[0].examples, key=lambda e: e.where)
    assert example.where == f"{saved / name} [train], row 1"
    expected = steps.processor.encode_for_training(
        [{"role": "user", "content": [{"type": "image", "image": picture()}]}]
    )
    assert (example.tiles == expected.tiles).all()


def test_splits(saved: Path) -> None:
    assert learnt({"dataset": str(saved / "two"), "split": "test"}) == ["a 0", "a 1"]
    with pytest.raises(DataError, match=r'has no split "tests"; did you mean "test"\?; it has train, test'):
        opened(data_of({"dataset": str(saved / "two"), "split": "tests"}).sources[0])


def test_a_stream_is_shuffled_and_found_again(saved: Path) -> None:
    source = {"dataset": str(saved / "one"), "streaming": True, "buffer": 4}

    def order(steps: Any, first: int, end: int) -> list[str]:
        return [text for step in range(first, end) for text in answers(steps, step)]

    whole = order(steps_of(source, rows=2), 0, 14)  # four epochs
    epochs = [whole[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == [f"a {i}" for i in range(7)] for epoch in epochs)
    assert epochs[0] != sorted(epochs[0]) and epochs[0] != epochs[1]
    again = steps_of(source, rows=2)
    assert order(again, 9, 14) == whole[18:] and order(again, 3, 5) == whole[6:10]  # skipping, and starting anew
    assert order(steps_of(source, rows=2, seed=1), 0, 4) != whole[:8]


def test_workers_read_a_stream_as_one_process_does(saved: Path) -> None:
    steps = steps_of({"dataset": str(saved / "one"), "streaming": True, "buffer": 4}, rows=2)
    loader: DataLoader[Any] = DataLoader(steps, batch_size=None, sampler=range(6), num_workers=2)
    assert [[e.where for e in found.examples] for found in loader] == [
        [e.where for e in steps[step].examples] for step in range(6)
    ]


def test_a_hub_that_cannot_be_reached() -> None:
    datasets = pytest.importorskip("datasets")
    with (
        mock.patch.object(datasets, "load_dataset", side_effect=ConnectionError("Couldn't reach 'a/b' on the Hub")),
        pytest.raises(DataError, match=r"a/b cannot be loaded: Couldn't reach .* give the folder"),
    ):
        opened(data_of({"dataset": "a/b"}).sources[0])


def test_without_the_library() -> None:
    with mock.patch.dict(sys.modules, {"datasets": None}), pytest.raises(MissingExtraError, match=r"\[data\]"):
        opened(data_of({"dataset": "a/b"}).sources[0])


# --- settings --------------------------------------------------------------------------------------------------------

FILE = {"file": "a.jsonl"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, '"sources" is missing'),
        ({"sources": []}, "sources is empty"),
        ({"sources": [3]}, r"sources\[0\] must be a table"),
        ({"sources": [{"fil": "a"}]}, r'exactly one of file, dataset, tar, folder, .* did you mean "file"\?'),
        ({"sources": [{"file": "a", "tar": "b"}]}, "has file and tar"),
        ({"sources": [{**FILE, "weigth": 1}]}, r'unknown key "weigth"; did you mean "weight"\?'),
        ({"sources": [{**FILE, "weight": 0}]}, "weight must be above 0"),
        ({"sources": [{**FILE, "weight": "x"}]}, "sources"),
        ({"sources": [{"file": 3}]}, "file must be a text"),
        ({"sources": [{**FILE, "columns": ["a"]}]}, "columns must be a table"),
        ({"sources": [{**FILE, "weight": 1}, FILE]}, "every source a weight, or none"),
        ({"sources": [FILE], "holdout": 1.5}, "holdout must be a share"),
        ({"sources": [FILE], "holdout": 0.1, "evaluation": [FILE]}, "either holdout or evaluation"),
        ({"sources": [FILE], "too_long": "cut"}, "too_long"),
        ({"sources": [FILE], "max_length": "x"}, "data"),
        ({"sources": [{"dataset": "a", "streaming": True}], "holdout": 0.1}, "a stream keeps no rows back"),
        ({"sources": [{"dataset": "a", "streaming": True}, FILE]}, "a stream has no known size"),
        ({"sources": [FILE], "shuffel": 1}, 'unknown key "shuffel"'),
    ],
)
def test_mistakes_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data_of(*raw.pop("sources", []), **raw) if "sources" in raw else _empty(raw)


def _empty(raw: dict[str, Any]) -> ChatData:
    from llama_multimodal.train.chat.config import chat_data_from_dict

    return chat_data_from_dict(raw, "data")


def test_a_recipes_section(tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        "model: tiny\ndata:\n  sources:\n  - file: a.jsonl\n    weight: 2\n    columns: {answer: label}\n"
    )
    data, model = read_data(recipe)
    assert model == "tiny" and data.sources == (FileSource(file="a.jsonl", weight=2, columns={"answer": "label"}),)
    for text, message in (
        ("model: tiny", "no data: section"),
        ("a: [1", "not valid YAML"),
        ("3", "must be a table of settings"),
    ):
        recipe.write_text(text)
        with pytest.raises(UserError, match=message):
            read_data(recipe)
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        read_data(tmp_path / "none.yaml")
