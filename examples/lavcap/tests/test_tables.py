"""CSV files that people write by hand: all that they hold is read, or a line of them is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from lavcap.cli import main
from lavcap.data.captions import read_captions, read_ids
from lavcap.evaluation import read_evaluation
from lavcap.files import read_table
from lavcap.scoring.files import read_rows, write_captions

AUDIOCAPS = "audiocap_id,youtube_id,start_time,caption\n"
OURS = "clip_id,caption\n"


def file(folder: Path, text: str | bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        'clip_id,caption\na,"one, two"\nb,three\n',
        '\ufeffclip_id,caption\r\na,"one, two"\r\nb,three\r\n',
        'clip_id,caption\ra,"one, two"\rb,three',
        '\nclip_id,caption\n\na,"one, two"\n\n\nb,three\n\n',
        'clip_id,caption,,\na,"one, two",,\nb,three,,\n',
        'clip_id,caption\na,"one, two",,\nb,three,\n',
        'clip_id,caption,,\na,"one, two"\nb,three\n',
        'more,caption,clip_id\n,"one, two",a\n1,three,b\n',
    ],
    ids=["plain", "BOM, CRLF", "CR", "blank lines", "commas behind all", "behind rows", "behind the header", "order"],
)
def test_what_spreadsheets_and_editors_add_changes_nothing(tmp_path: Path, text: str) -> None:
    assert read_rows(file(tmp_path, text)) == [("a", "one, two"), ("b", "three")]


def test_quotes_commas_and_lines_inside_quotes_are_the_captions(tmp_path: Path) -> None:
    captions = [
        'a "fast" dog, barking',
        "rain falls\nand then it stops",
        "",
        'she says 5" ',
        "two\u2028lines, here, and, there",
    ]
    rows = "".join('c{},"{}"\n'.format(i, text.replace('"', '""')) for i, text in enumerate(captions))
    found = read_rows(file(tmp_path, OURS + rows))
    assert found == [(f"c{i}", text) for i, text in enumerate(captions)]
    assert read_rows(file(tmp_path, OURS + 'a,the "fast" dog\n')) == [("a", 'the "fast" dog')]


CASES = {
    "a comma": (
        OURS + "a,one\nb,a dog, then rain\n",
        "line 3: 3 fields where the header has 2 (clip_id,caption): quote",
    ),
    "commas in AudioCaps' columns": (
        AUDIOCAPS + "1,x,0,a dog, then, rain\n",
        "line 2: 6 fields where the header has 4",
    ),
    "a caption broken off": (AUDIOCAPS + "1,x,0,one\n2,y,0,a man\nspeaks\n", "line 4: 1 fields where the header has 4"),
    "a rest that looks like a row": (
        AUDIOCAPS + "1,x,0,a man speaks with\nspeech in the background, then, 3, bang\n",
        "line 3: audiocap_id 'speech in the background' must be a number, as",
    ),
    "a rest of one word": (AUDIOCAPS + "1,x,0,a man\nspeaks, then, 3, bang\n", "line 3: audiocap_id 'speaks' must be"),
    "a quote open to the end": (
        AUDIOCAPS + '1,x,0,one\n2,y,0,"open\n3,z,0,three\n4,w,0,four\n',
        "line 3: unexpected end of data: a field that begins with a quote",
    ),
    "a quote open to the next quote": (
        AUDIOCAPS + '1,x,0,"open\n2,y,0,"two, three"\n',
        "line 2: ',' expected after '\"'",
    ),
    "a quote that another line's end closes": (
        AUDIOCAPS + '1,x,0,"open\n2,y,0,the end"\n3,z,0,three\n',
        "line 2: a quote is open over the end of the line, and '2,y,0,the end' would be part",
    ),
    "the same with two columns": (OURS + 'a,"open\nb,rain"\nc,three\n', "line 2: a quote is open over the end"),
    "words behind a quote": (OURS + 'a,"one" dog\n', "line 2: ',' expected after '\"'"),
    "a blank before a quote": (OURS + 'a, "one, two"\n', "line 2: 3 fields where the header has 2"),
    "a column twice": ("clip_id,caption,caption\na,one,two\n", "line 1: the header names 'caption' twice"),
    "a column less": ("clip_id,caption,score\na,one\n", "line 2: 2 fields where the header has 3"),
    "Latin-1": ((OURS + "a,W\u00f6rter\n").encode("latin-1"), "is not in UTF-8 (invalid start byte at byte"),
    "UTF-16": ((OURS + "a,one\n").encode("utf-16"), "is not in UTF-8 (invalid start byte at byte 0): save it as UTF-8"),
    "a field without end": (OURS + f'a,"{"x" * 200_000}\n', "line 2: field larger than field limit"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_would_be_lost_is_an_error_that_names_the_line(tmp_path: Path, case: str) -> None:
    """By every reader: predictions, references and a split's captions."""
    text, message = CASES[case]
    path = file(tmp_path, text)
    for read in (read_rows, *([read_captions] if AUDIOCAPS in str(text) else [])):
        with pytest.raises(ValueError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}") and message in str(error.value)


def test_audiocap_ids_may_be_words_or_missing(tmp_path: Path) -> None:
    assert read_captions(file(tmp_path, AUDIOCAPS + "one,x,0,a dog\ntwo,y,0,rain\n")).keys() == {"x_0", "y_0"}
    assert read_captions(file(tmp_path, AUDIOCAPS + "1,x,0,a dog\n,y,0,rain\n")).keys() == {"x_0", "y_0"}
    with pytest.raises(ValueError, match="line 3: audiocap_id 'in the background' must be"):
        read_captions(file(tmp_path, AUDIOCAPS + "one,x,0,speech\nin the background, then, 3, bang\n"))


def test_the_commands_say_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = tmp_path / "bad.csv", tmp_path / "good.csv"
    good.write_text(OURS + 'a,"a dog barks, then a man speaks"\nb,rain falls\n')
    bad.write_text(OURS + "a,a dog barks, then a man speaks\nb,rain falls\n")
    for pair in ((bad, good), (good, bad)):
        assert main(["score", *map(str, pair)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"lavcap score: {bad}, line 2: 3 fields") and error.count("\n") == 1


def test_ids_of_a_windows_editor_are_read(tmp_path: Path) -> None:
    assert read_ids(file(tmp_path, "\ufefffirst\r\nsecond\r\n")) == {"first", "second"}


def test_what_evaluate_writes_is_a_table(tmp_path: Path) -> None:
    """Also where clips have different numbers of references."""
    references = {"a": ["one, two", "three"], "b": ['say "four"']}
    write_captions(tmp_path / "captions.csv", {"a": "x, y", "b": ""}, references)
    columns, rows = read_table(tmp_path / "captions.csv")
    assert columns == ["clip_id", "caption", "reference_1", "reference_2"]
    assert [list(row.fields.values()) for row in rows] == [
        ["a", "x, y", "one, two", "three"],
        ["b", "", 'say "four"', ""],
    ]
    assert [row.line for row in rows] == [2, 3]


@pytest.mark.parametrize("name", ["scores.json", "evaluation.json", "plans.safetensors"])
def test_a_damaged_evaluation_names_its_file(tmp_path: Path, name: str) -> None:
    write_captions(tmp_path / "captions.csv", {"a": "x"}, {"a": ["y"]})
    for other in ("scores.json", "evaluation.json"):
        (tmp_path / other).write_text('{"metrics": {}, "config": {}, "checkpoint": "", "data": "", "split": ""}')
    (tmp_path / "plans.safetensors").write_bytes(b"")
    (tmp_path / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*\): run 'lavcap evaluate' again"):
        read_evaluation(tmp_path)
