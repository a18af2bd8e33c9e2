"""From media and captions to a prepared split: what is kept, what is dropped and why, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lavcap.cli import main
from lavcap.data.captions import is_selected, read_captions, read_ids, youtube_id
from lavcap.data.dataset import PreparedDataset
from lavcap.data.decode import DecodedClip, decode_clip
from lavcap.data.prepare import Job, PictureFeatures, check_disjoint, prepare, summarise
from lavcap.data.shards import MANIFEST, open_split, read_manifest
from media import MEAN_COLOURS, REAL_DATA, mean_colours, write_captions_file, write_clip


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    write_clip(folder / "with_under_score_30.mp4", 2.0)
    write_clip(folder / "deeper" / "second_0.mkv", 1.5)
    write_clip(folder / "dumb_10.mp4", 1.0, sound=None)
    write_clip(folder / "wordless_5.mp4", 1.0)
    write_clip(folder / "stranger_7.mp4", 1.0)
    (folder / "broken_1.mp4").write_bytes(b"not media")
    (folder / "captions.json").write_text("{}")
    return folder


ROWS = [
    ("with_under_score", 30, 'Rain, "falling"'),
    ("absent", 20, "never there"),
    ("second", 0, "a tone"),
    ("dumb", 10, "nothing"),
    ("with_under_score", "30.0", "rain\u2028falls\r\nand falls "),
    ("broken", 1, "noise"),
    ("wordless", 5, "  "),
]


def job(media: Path, folder: Path, split: str = "train", **changes) -> Job:
    captions = write_captions_file(folder.with_name(f"{folder.name}-{split}.csv"), changes.pop("rows", ROWS))
    return Job(media, captions, folder, split, **changes)


def test_every_clip_is_in_the_manifest_kept_or_with_its_reason(media: Path, tmp_path: Path) -> None:
    prepare(job(media, tmp_path / "set"), MEAN_COLOURS, workers=0)
    lines = read_manifest(tmp_path / "set" / "train")
    assert [(line.clip_id, line.status, line.reason) for line in lines] == [
        ("with_under_score_30", "kept", ""),
        ("absent_20", "dropped", "no_file"),
        ("second_0", "kept", ""),
        ("dumb_10", "dropped", "no_sound"),
        ("broken_1", "dropped", "unreadable"),
        ("wordless_5", "dropped", "no_caption"),
        ("stranger_7", "dropped", "no_caption"),
    ]
    assert summarise(lines) == "2 clips kept of 7; dropped: no_caption 2, no_file 1, no_sound 1, unreadable 1"
    assert "video mpeg4" in lines[3].detail


def test_what_is_kept_is_what_was_decoded(media: Path, tmp_path: Path) -> None:
    prepare(job(media, tmp_path / "set"), MEAN_COLOURS, workers=0)
    clips = PreparedDataset(tmp_path / "set", "train")
    assert clips.clip_ids == ["with_under_score_30", "second_0"]
    for clip, file in zip((clips[0], clips[1]), ("with_under_score_30.mp4", "deeper/second_0.mkv")):
        decoded = decode_clip(media / file, MEAN_COLOURS.image_size)
        assert isinstance(decoded, DecodedClip)
        assert torch.equal(clip.waveform, torch.from_numpy(decoded.waveform))
        assert torch.equal(clip.visual, mean_colours(torch.from_numpy(decoded.pictures)).float())
    assert clips[0].captions == ('Rain, "falling"', "rain falls and falls")


def test_decoding_processes_change_nothing(media: Path, tmp_path: Path) -> None:
    for folder, workers in (("one", 0), ("two", 1)):
        (tmp_path / folder).mkdir()
        prepare(job(media, tmp_path / folder / "set"), MEAN_COLOURS, workers=workers)
    for path in sorted((tmp_path / "one" / "set" / "train").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "set" / "train" / path.name).read_bytes(), path.name


def test_a_list_of_ids_chooses_clips(media: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("second\nwith_under_score_30\nunheard\n")  # by video, by clip, and one that does not exist
    lines = prepare(job(media, tmp_path / "set", ids=ids), MEAN_COLOURS, workers=0)
    reasons = {line.clip_id: line.reason for line in lines}
    assert [clip_id for clip_id, reason in reasons.items() if not reason] == ["with_under_score_30", "second_0"]
    assert reasons["dumb_10"] == "not_selected" and reasons["unheard"] == "no_caption"


def test_splits_must_be_of_different_videos(media: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    prepare(job(media, folder), MEAN_COLOURS, workers=0)
    with pytest.raises(ValueError, match=r"1 videos of split 'val' .* second_0 \(in train\)"):
        prepare(job(media, folder, "val", rows=[("second", 0, "again")]), MEAN_COLOURS, workers=0)
    assert not (folder / "val").exists()
    prepare(job(media, folder, "val", rows=[("stranger", 7, "new")]), MEAN_COLOURS, workers=0)

    manifest = folder / "val" / MANIFEST  # as if both had been prepared at the same time
    manifest.write_text(manifest.read_text().replace("stranger_7", "second_9"))
    with pytest.raises(ValueError, match=r"split 'train' .* second_0 \(in val\)"):
        prepare(job(media, folder), MEAN_COLOURS, workers=0)
    check_disjoint({"train": ["a_1", "a_2"], "val": ["a_b_1"]})
    with pytest.raises(ValueError, match=r"split 'val' .* a_9 \(in train\)"):
        check_disjoint({"train": ["a_1", "a_2"], "val": ["b_1", "a_9"]})


def test_audiocaps_own_splits_are_of_different_videos() -> None:
    folder = REAL_DATA / "audiocaps"
    if not folder.is_dir():
        pytest.skip("AudioCaps' captions (../shared/data) are not here")
    captions = {name: read_captions(folder / f"{name}.csv") for name in ("train", "val", "test")}
    assert [len(clips) for clips in captions.values()] == [49838, 495, 975]
    videos = [{youtube_id(clip) for clip in clips} for clips in captions.values()]
    assert len(set.union(*videos)) == sum(map(len, videos))
    ids = read_ids(folder / "test_944_ids.txt")
    assert sum(is_selected(clip_id, ids) for clip_id in captions["test"]) == len(ids) == 944


def test_files_that_came_meanwhile_do_not_stop_it(tmp_path: Path) -> None:
    """A folder of media may be filling up with the clips of other splits."""
    write_clip(tmp_path / "media" / "second_0.mkv", 1.0)
    prepare(job(tmp_path / "media", tmp_path / "set"), MEAN_COLOURS, workers=0)
    write_clip(tmp_path / "media" / "new_1.mkv", 1.0)
    lines = prepare(job(tmp_path / "media", tmp_path / "set"), MEAN_COLOURS, workers=0)
    assert [line.clip_id for line in lines][-2:] == ["wordless_5", "new_1"]
    assert PreparedDataset(tmp_path / "set", "train").clip_ids == ["second_0"]


def test_going_on_with_other_settings_is_refused(media: Path, tmp_path: Path) -> None:
    prepare(job(media, tmp_path / "set"), MEAN_COLOURS, workers=0)
    other = PictureFeatures(32, mean_colours, "another encoder")
    with pytest.raises(ValueError, match="visual was 'mean colours', is 'another encoder'"):
        prepare(job(media, tmp_path / "set"), other, workers=0)
    with pytest.raises(ValueError, match="captions_sha256 was"):
        prepare(job(media, tmp_path / "set", rows=ROWS[:3]), MEAN_COLOURS, workers=0)


def test_one_process_at_a_time(media: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, pathlib, lavcap.data.shards as s; s.open_split(pathlib.Path(sys.argv[1]), {})"
    with open_split(tmp_path / "train", {"clips_per_shard": 2}):
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "train"], capture_output=True, text=True)
    assert done.returncode == 1 and "another 'lavcap prepare' is at work in" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("youtube_id,caption\nx,y\n", "no column start_time"),
        ("youtube_id,start_time,caption\na/b,1,x\n", "line 2: youtube_id 'a/b' must consist of"),
        ("youtube_id,start_time,caption\na,1,x\nb,soon,x\n", "line 3: start_time 'soon' must be a whole number"),
    ],
)
def test_caption_files_that_cannot_be_read(media: Path, tmp_path: Path, text: str, message: str) -> None:
    captions = tmp_path / "bad.csv"
    captions.write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare(Job(media, captions, tmp_path / "set", "train"), MEAN_COLOURS, workers=0)


def test_folders_that_are_not_there(media: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder of media files"):
        prepare(job(tmp_path / "nowhere", tmp_path / "set"), MEAN_COLOURS, workers=0)
    with pytest.raises(FileNotFoundError, match="no caption file"):
        prepare(Job(media, tmp_path / "no.csv", tmp_path / "set", "train"), MEAN_COLOURS, workers=0)


def test_two_files_of_one_clip_are_refused(tmp_path: Path) -> None:
    write_clip(tmp_path / "media" / "a_1.mp4", 1.0)
    write_clip(tmp_path / "media" / "a_1.mkv", 1.0)
    with pytest.raises(ValueError, match="two files are clip a_1"):
        prepare(job(tmp_path / "media", tmp_path / "set"), MEAN_COLOURS, workers=0)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., int]:
    config = tmp_path / "config.yaml"
    visual = {"kind": "random", "width": 16, "depth": 1, "heads": 1, "projection": 8, "precision": "bfloat16"}
    config.write_text(json.dumps({"visual": visual, "data": {"folder": str(tmp_path / "set")}}))  # JSON is YAML

    def run(*arguments: object) -> int:
        return main(["prepare", str(config), "--workers", "0", "--device", "cpu", *map(str, arguments)])

    return run


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real clips (../shared/data) are not here")
def test_the_command_on_real_clips(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lavcap.config import Precision, RandomCLIP
    from lavcap.visual import build_visual_encoder, preprocess, visual_fingerprint

    captions = tmp_path / "two.csv"
    rows = (REAL_DATA / "audiocaps" / "test.csv").read_text().splitlines()
    captions.write_text("\n".join([rows[0], *(r for r in rows if "6BJ455B1aAs" in r or "FDwK7T1JO_0" in r)]))
    assert command("--media", REAL_DATA / "clips", "--captions", captions, "--split", "test") == 0
    assert "2 clips kept of 6; dropped: no_caption 4" in capsys.readouterr().out

    clips = PreparedDataset(tmp_path / "set", "test")
    clip = dict(zip(clips.clip_ids, clips))["FDwK7T1JO_0_160"]
    visual = RandomCLIP(width=16, depth=1, heads=1, projection=8, precision=Precision.BFLOAT16)
    clips.check_visual(visual_fingerprint(visual))
    decoded = decode_clip(REAL_DATA / "clips" / "FDwK7T1JO_0_160.mp4", 224)
    assert isinstance(decoded, DecodedClip)
    expected = build_visual_encoder(visual).encode(preprocess(decoded.pictures))
    assert torch.equal(clip.visual, expected) and clip.visual.shape == (20, 8)
    assert len(clip.captions) == 5 and len(clip.waveform) == 159968


def test_the_command_says_what_is_wrong_in_a_line(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--media", tmp_path, "--captions", tmp_path / "no.csv", "--split", "test") == 2
    assert "lavcap prepare: no caption file" in capsys.readouterr().err
    bucket = ("--set", "data.folder=s3://bucket/prepared")
    assert command("--media", tmp_path, "--captions", tmp_path / "no.csv", "--split", "test", *bucket) == 2
    assert "data.folder is s3://bucket/prepared: prepare on a disk" in capsys.readouterr().err
