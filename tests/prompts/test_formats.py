"""Files are what their content says, however they are called; what is no file of prompts is refused with the fix."""

import codecs
import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepfold.errors import UserError
from stepfold.prompts import jsons
from stepfold.prompts.reading import open_prompts
from stepfold.prompts.tables import read_texts

WRITTEN = '"H E L L O" sprayed on a wall'


def prompts_of(path: Path) -> list[str]:
    opened = open_prompts(path)
    found = [opened.prompt(i) for i in range(len(opened))]
    assert found == [" ".join(text.split()) for text in read_texts(path) if text.strip()]
    return found


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("list.json", json.dumps(["a fox", "a red door, night"], indent=2), ["a fox", "a red door, night"]),
        ("list.txt", '["a fox", "a red door"]', ["a fox", "a red door"]),
        ("lists.jsonl", '["a fox"]\n["a red door", "a cat"]\n', ["a fox", "a red door", "a cat"]),
        ("objects.json", json.dumps([{"prompt": "a fox", "n": 1}, {"prompt": "a cat"}], indent=1), ["a fox", "a cat"]),
        ("lines.json", lines({"prompt": "a fox", "id": 0}, {"prompt": "a red door"}), ["a fox", "a red door"]),
        ("lines.txt", lines({"prompt": "a fox"}, {"prompt": "a red door"}), ["a fox", "a red door"]),
        ("strings.jsonl", lines("a fox", "a red door"), ["a fox", "a red door"]),
        ("one.json", json.dumps({"prompts": ["a fox", "a cat"]}, indent=2), ["a fox", "a cat"]),
        ("captions.jsonl", lines({"caption": ["a fox", "it is orange"]}, {"caption": ["a door"]}),
         ["a fox", "it is orange", "a door"]),
        ("nothing.jsonl", lines({"caption": None}, {"caption": []}, {"caption": "a fox"}), ["a fox"]),
        ("quoted.tsv", f'Prompt\tCategory\na fox\tAnimals\n{WRITTEN}\tWriting\na "red" door\tScenes\n',
         ["a fox", WRITTEN, 'a "red" door']),
        ("whole.tsv", 'Prompt\tn\n"a fox"\t1\n"a ""red"" door"\t2\n', ["a fox", 'a "red" door']),
        ("literal.tsv", f'Prompt\n"a fox"\n{WRITTEN}\n', ['"a fox"', WRITTEN]),
        ("tabs.csv", "prompt\tn\na fox, sitting\t1\n", ["a fox, sitting"]),
        ("commas.tsv", "n,prompt\n1,a fox\n", ["a fox"]),
        ("one_column.csv", "prompt\na fox, sitting\na door\n\na cat, \n", ["a fox, sitting", "a door", "a cat"]),
        ("literal.csv", 'prompt\na "red" fox, sitting\n"a cat, here"\n', ['a "red" fox, sitting', "a cat, here"]),
        ("empty_cells.csv", "prompt,n\na fox,1,,\na cat\n", ["a fox", "a cat"]),
        ("semicolon.csv", "prompt;category\na fox, sitting;Animals\n", ["a fox, sitting"]),
        ("pipes.csv", "id|caption\n1|a fox, sitting\n", ["a fox, sitting"]),
        ("excel.csv", "sep=;\nn;prompt\n1;a fox\n", ["a fox"]),
        ("plural.csv", 'Prompts,Kind\nA car.,Hue\n"A fox, and a door.",Counting\n', ["A car.", "A fox, and a door."]),
        ("table.txt", "prompt\tcategory\na fox\tAnimals\n", ["a fox"]),
        ("table_too.txt", "id,prompt\n1,a fox\n", ["a fox"]),
        ("no_table.txt", "text, logo\na fox, a cat\n", ["text, logo", "a fox, a cat"]),
        ("brackets.txt", "[masterpiece] a fox\n{red|green} door\n[[snow]]\n",
         ["[masterpiece] a fox", "{red|green} door", "[[snow]]"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_what_people_bring(tmp_path: Path, name: str, content: str, wanted: list[str], packed: bool) -> None:
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)  # by its content, without a .gz
    assert prompts_of(tmp_path / name) == wanted


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_encodings_with_a_mark(tmp_path: Path, name: str, encoding: str) -> None:
    content = {"a.txt": "a fox\r\na café\r\n", "a.csv": "prompt\r\na fox\r\na café\r\n"}
    (tmp_path / name).write_bytes(content.get(name, lines("a fox", "a café")).encode(encoding))
    assert prompts_of(tmp_path / name) == ["a fox", "a café"]


def test_big_endian(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_BE + "a fox\n".encode("utf-16-be"))
    assert prompts_of(tmp_path / "a.txt") == ["a fox"]


def tar() -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        info = tarfile.TarInfo("0001.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"a fox"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tar", tar(), "a tar archive; unpack it .tar -xf. into a folder"),
        ("a.tar.gz", gzip.compress(tar()), "a tar archive; unpack it"),
        ("a.txt", tar(), "a tar archive; unpack it"),
        ("a.xlsx", b"PK\x03\x04\x14\0", "a zip archive or an Excel workbook; unpack it, or save the sheet as csv"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "packed by zstd; unpack it"),
        ("a.csv", b"<!DOCTYPE html>\n<p>404</p>", "a web page; download the file itself"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.yaml", b"- a fox\n", "a .yaml file is not read"),
        ("a.txt", b"{\\rtf1 a fox}", "rich text; save it as plain text"),
        ("cp1252.csv", "prompt\na fox\na café\n".encode("cp1252"), "line 3: not UTF-8; .* iconv -f CP1252 -t"),
        ("cp1252.txt", "a café\n".encode("cp1252"), "line 1: not UTF-8.*iconv"),
        ("cp1252.jsonl", '{"prompt": "a café"}\n'.encode("cp1252"), "line 1: not UTF-8"),
        ("cut.txt", "a fox".encode("utf-16")[:-1], "not the text that it says it is"),
        ("headless.csv", b"a fox in snow\na red door\n", "it has a fox in snow; if these are prompts and no names"),
        ("headless_too.csv", b"1,a fox\n2,a door\n", "it has 1, a fox; if these are prompts and no names"),
        ("names.json", b'{"fox": "a fox", "door": "a door"}', "which column holds the prompts. .* it has fox, door"),
        ("coco.json", b'{"captions": [{"id": 1, "caption": "a fox"}]}', "holds an object of id, caption, which is"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_prompts(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (open_prompts, lambda path: list(read_texts(path))):
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(values=st.lists(JSON, max_size=8), indent=st.sampled_from([None, 1]), piece=st.sampled_from([1, 3, 2**16]))
def test_a_list_is_read_in_pieces_as_it_is_read_whole(values: list[object], indent: int | None, piece: int) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsons, "PIECE", piece)
        found = list(jsons._elements(Path("a.json"), io.StringIO(text + "\n" + text)))
    assert [value for _, value in found] == values * 2
    if indent and values:
        assert [line for line, _ in found][: len(values)] == sorted(line for line, _ in found)[: len(values)]
        assert found[0][0] == 2


def test_a_long_list_does_not_fill_the_memory(tmp_path: Path) -> None:
    import tracemalloc

    with (tmp_path / "a.json").open("w") as file:
        file.write('["a fox"' + "".join(f', "prompt {i} {"x" * 300}"' for i in range(30_000)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_texts(tmp_path / "a.json")) == 30_001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (tmp_path / "a.json").stat().st_size / 5


class TestFolders:
    """Several files are one."""

    def test_captions_beside_pictures(self, tmp_path: Path) -> None:
        for name, caption in {"0002": "a red door", "0001": "a fox\nin snow\n"}.items():
            (tmp_path / f"{name}.txt").write_text(caption)
            (tmp_path / f"{name}.PNG").write_bytes(b"")
        assert prompts_of(tmp_path) == prompts_of(tmp_path / "*.txt") == ["a fox in snow", "a red door"]
        assert open_prompts(tmp_path).source == tmp_path
        (tmp_path / "notes.txt").write_text("how these were made")
        with pytest.raises(UserError, match=r"0001.txt is the caption of a picture, but notes.txt has none beside it"):
            open_prompts(tmp_path)

    def test_captions_alone_and_deeper(self, tmp_path: Path) -> None:
        (tmp_path / "10_fox").mkdir()
        (tmp_path / "10_fox" / "a.txt").write_text("a fox\n")
        (tmp_path / "10_fox" / "b.txt").write_text("a cat\na dog\n")
        assert prompts_of(tmp_path / "10_fox") == prompts_of(tmp_path / "**" / "*.txt") == ["a fox", "a cat", "a dog"]
        with pytest.raises(UserError, match=r"is a folder without files of prompts .*\*\*/\*\.txt"):
            open_prompts(tmp_path)

    def test_shards(self, tmp_path: Path) -> None:
        for i, prompt in enumerate(("a fox", "a cat", "a fox")):
            (tmp_path / f"part-{i}.jsonl").write_text(lines({"prompt": prompt}))
        (tmp_path / ".part-3.jsonl").write_text("half written")
        opened = open_prompts(tmp_path)
        assert [opened.prompt(i) for i in range(len(opened))] == ["a fox", "a cat"] and opened.num_duplicate == 1
        assert list(read_texts(tmp_path / "part-[12].jsonl")) == ["a cat", "a fox"]
        (tmp_path / "info.json").write_text("{}")
        with pytest.raises(UserError, match=r"holds \.json and \.jsonl files; which are the prompts\? Give a pattern"):
            open_prompts(tmp_path)
        with pytest.raises(UserError, match="no file is called like that"):
            open_prompts(tmp_path / "*.csv")
        (tmp_path / "part-2.jsonl").write_text('{"prompt": 3}')
        with pytest.raises(UserError, match=r"part-2\.jsonl, line 1: 'prompt' is 3"):
            open_prompts(tmp_path / "*.jsonl")

    def test_a_name_with_brackets_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a[1].txt").write_text("a fox\n")
        assert prompts_of(tmp_path / "a[1].txt") == ["a fox"]
