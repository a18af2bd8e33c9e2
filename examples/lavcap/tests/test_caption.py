"""From media files to captions and pictures, and what is said of files that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lavcap.alignment import align, marginal_error, one_line
from lavcap.caption import FileCaptioner, peak_db
from lavcap.checkpoint import load_checkpoint
from lavcap.cli import main
from lavcap.config import AudioOnly, Concatenation, Config, KaldiFrontEnd, LossConfig, VisualOnly
from lavcap.config_file import save_config
from lavcap.data.dataset import PreparedDataset
from lavcap.evaluate import caption_clips
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from media import grey, tone, write_captions_file, write_clip
from PIL import Image
from small import small_config, write_checkpoint

import otfuse
from otfuse.viz import lift


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoint-1"
    return write_checkpoint(folder, small_config(folder))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two clips of other sounds, pictures and lengths."""
    folder = tmp_path_factory.mktemp("clips")
    coloured = [(250, 40, 40), (40, 40, 250), (40, 250, 40)]
    return [
        write_clip(
            folder / f"clip_{number}.mkv",
            2.0 + number,
            sound=lambda t, k=number: 0.4 * np.sin(2 * np.pi * (300 + 500 * k) * t * (1 + t)),
            picture=lambda time, k=number: np.full((48, 64, 3), coloured[(int(2 * time) + k) % 3], dtype=np.uint8),
        )
        for number in range(2)
    ]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["caption", *map(str, arguments), "--device", "cpu"])
    return status, *capsys.readouterr()


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    status, out, _ = run(capsys, *arguments, "--json", "-")
    return status, json.loads(out)


def test_captions_and_plans_are_those_of_a_prepared_set(
    checkpoint: Path, clips: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way through prepare and evaluate, and the way from the file, end in the same."""
    captions = write_captions_file(tmp_path / "c.csv", [("clip", number, "a dog") for number in range(2)])
    save_config(small_config(tmp_path), tmp_path / "config.yaml")
    where = ["--media", str(clips[0].parent), "--captions", str(captions), "--workers", "0"]
    assert (
        main(["prepare", str(tmp_path / "config.yaml"), *where, "--split", "test", "--set", f"data.folder={tmp_path}"])
        == 0
    )
    loaded = load_checkpoint(checkpoint)
    expected = list(caption_clips(loaded, PreparedDataset(tmp_path, "test"), loaded.config.generation))
    capsys.readouterr()
    status, out, _ = run(capsys, *clips, "--checkpoint", checkpoint)
    assert status == 0
    assert out.splitlines() == [f"{path}: {one_line(clip.caption)}" for path, clip in zip(clips, expected)]
    found = list(FileCaptioner(loaded).caption(clips))
    for result, clip in zip(found, expected):
        torch.testing.assert_close(result.plan, clip.plan)


def test_files_in_one_batch_and_alone(checkpoint: Path, clips: list[Path]) -> None:
    loaded = load_checkpoint(checkpoint)
    alone = replace(loaded.config.generation, batch_size=1)
    together = list(FileCaptioner(loaded).caption([*clips, clips[0].with_name("missing"), *clips]))
    one_by_one = list(FileCaptioner(loaded, alone).caption(clips))
    assert [r.caption for r in together] == [r.caption for r in one_by_one] + [None] + [r.caption for r in one_by_one]
    assert any(r.caption for r in one_by_one)


def test_the_picture_shows_the_captioners_plan(
    checkpoint: Path, clips: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cell by cell in the file's pixels: the plan that otfuse finds between the tokens of the encoders."""
    status, found = as_json(capsys, clips[1], "--checkpoint", checkpoint, "--out", tmp_path / "new" / "pictures")
    (clip,) = found["clips"]
    assert status == 0 and clip["picture"] == str(tmp_path / "new" / "pictures" / "clip_1.mkv.png")
    pixels = np.asarray(Image.open(clip["picture"]).convert("RGB")).astype(float) / 255  # [900, 1600, 3]

    result = next(iter(FileCaptioner(load_checkpoint(checkpoint)).caption([clips[1]])))
    plan, error = specified_plan(checkpoint, clips[1])
    torch.testing.assert_close(result.plan, plan, rtol=1e-4, atol=1e-7)
    assert clip["marginal_error"] == pytest.approx(error, abs=1e-6)
    assert result.alignment is not None and result.alignment.plan is not None
    seconds, shown = result.alignment.seconds, lift(plan)
    colours = colormaps["Blues"](LogNorm(1, 16)(shown.clip(1, 16)))[..., :3]
    assert shown.max() > 1.05  # there is something to see
    left, right = -0.25, 0.5 * plan.shape[1] - 0.25  # seconds at the edges of the heat map
    rows = (np.arange(len(plan)) + 0.5) * seconds / len(plan)
    y = 900 * (1 - 0.84 + 0.635 * rows / seconds)
    x = 1600 * (0.765 + 0.215 * (np.arange(plan.shape[1]) * 0.5 - left) / (right - left))
    drawn = pixels[np.round(y).astype(int)[:, None], np.round(x).astype(int)]
    off = np.abs(drawn - colours).max(-1)
    assert (off < 0.02).mean() > 0.85  # all but those under the dotted diagonal
    assert np.abs(pixels[160:320, 100:1100] - pixels[160:320, 100:1100].mean((0, 1))).mean() > 0.05  # a spectrogram


def specified_plan(checkpoint: Path, path: Path) -> tuple[torch.Tensor, float]:
    """From file and weights by hand: decoded sound and pictures through both encoders, then otfuse's solver."""
    loaded = load_checkpoint(checkpoint)
    captioner, solver = loaded.captioner, loaded.config.solver
    from lavcap.data.decode import DecodedClip, decode_clip
    from lavcap.visual import build_visual_encoder, preprocess

    clip = decode_clip(path, 224)
    assert isinstance(clip, DecodedClip) and captioner.audio is not None and captioner.visual_adapter is not None
    with torch.no_grad():
        pixels = preprocess(torch.from_numpy(clip.pictures))
        y = captioner.visual_adapter(build_visual_encoder(loaded.config.visual).encode(pixels))[None]
        x, _ = captioner.audio(torch.from_numpy(clip.waveform)[None], torch.tensor([len(clip.waveform)]))
        cost = -otfuse.similarity_matrix(x, y, solver.similarity.value)
        solved = otfuse.sinkhorn(cost, solver.epsilon, num_iters=solver.num_iters)
    return solved.plan[0], float(solved.marginal_error[0])


def _text(path: Path) -> Path:
    path.write_text("minutes of a meeting\n" * 50)
    return path


def _empty(path: Path) -> Path:
    path.touch()
    return path


def _cut_short(path: Path) -> Path:
    path.write_bytes(write_clip(path.with_name("whole.mp4")).read_bytes()[:3000])
    return path


def _playlist(path: Path) -> Path:
    """A list that names another file: that file is not captioned in its place."""
    other = write_clip(path.with_name("other.mp4"))
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n"
    path = path.with_suffix(".m3u8")
    path.write_text(f"{head}file://{other}\n#EXT-X-ENDLIST\n")
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _unnameable(path: Path) -> Path:
    """A name in no code that a terminal knows."""
    return _text(Path(os.fsdecode(os.fsencode(path.parent) + b"/caf\xe9.mp4")))


BAD: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "missing": (lambda path: path, "no_file", "does not exist: check the path"),
    "folder": (_folder, "unreadable", "is a folder: name the files in it"),
    "text": (_text, "unreadable", "cannot be read as sound and picture (Invalid data"),
    "empty": (_empty, "unreadable", "cannot be read as sound and picture (Invalid data"),
    "cut short": (_cut_short, "unreadable", "it is damaged, so fetch it again"),
    "playlist": (_playlist, "unreadable", "a list of files"),
    "unnameable": (_unnameable, "unreadable", "give a media file such as MP4"),
    "soundless": (lambda path: write_clip(path, sound=None), "no_sound", "fusion.kind visual_only"),
    "pictureless": (lambda path: write_clip(path, picture=None), "no_picture", "fusion.kind audio_only"),
    "too short": (lambda path: write_clip(path, 0.5), "too_short", "give a clip of 1 s at least"),
}


def test_files_that_cannot_be_captioned_say_why_and_end_nothing(
    checkpoint: Path, clips: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [make(tmp_path / f"{name}.mp4") for name, (make, _, _) in BAD.items()]
    mixed = [clips[0], *bad[:5], clips[1], *bad[5:]]
    report = tmp_path / "found.json"
    status, out, err = run(capsys, *mixed, "--checkpoint", checkpoint, "--json", report, "--out", tmp_path / "pictures")
    found = json.loads(report.read_text(encoding="utf-8"))["clips"]
    assert status == 1
    assert len(out.splitlines()) == 2 and all(line.startswith(str(clips[0].parent)) for line in out.splitlines())
    assert f"2 of {len(mixed)} files captioned" in err
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["clip_0.mkv.png", "clip_1.mkv.png"]
    captioned = [found.pop(6), found.pop(0)]
    assert all(clip["caption"] is not None and clip["error"] is None for clip in captioned)
    for clip, path, (_, reason, message) in zip(found, bad, BAD.values()):
        assert clip["caption"] is None and clip["picture"] is None and clip["marginal_error"] is None
        assert clip["reason"] == reason and message in clip["error"]
        named = os.fsencode(path).decode("utf-8", "replace")
        assert clip["clip"] == named and f"{named} {clip['error']}" in err


def test_a_long_clip_is_captioned_by_its_beginning(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rising(seconds: float) -> Path:
        def sound(t: np.ndarray) -> np.ndarray:
            return 0.3 * np.sin(2 * np.pi * (200 + 40 * t) * t)

        return write_clip(
            tmp_path / f"{seconds:g}.mkv", seconds, sound=sound, picture=lambda t: grey(int(20 * t) % 250)
        )

    long, short = rising(13.0), rising(10.0)
    status, found = as_json(capsys, long, short, "--checkpoint", checkpoint, "--out", tmp_path)
    first, second = found["clips"]
    assert status == 0 and first["caption"] == second["caption"] and first["seconds"] == second["seconds"] == 10.0
    assert second["notes"] == []
    (note,) = first["notes"]
    assert note.startswith("it is 13.0 s long, and the caption is of its first 10 s")


def test_silent_and_broken_off_clips_are_captioned_with_a_note(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = write_clip(tmp_path / "silent.mp4", sound=lambda t: 1e-6 * tone(t))
    cut = write_clip(tmp_path / "cut.mkv", 4.0, picture=lambda t: np.full((48, 64, 3), 90, np.uint8))
    content = bytearray(cut.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    cut.write_bytes(content)
    status, out, err = run(capsys, silent, cut, "--checkpoint", checkpoint)
    assert status == 0 and len(out.splitlines()) == 2
    assert f"{silent}: it is silent (peak below -70 dB of full scale): the caption is by the pictures alone" in err
    assert f"{cut}: of 4.0 s only " in err and "s have sound: the rest is missing or damaged" in err
    assert peak_db(np.array([0.5, -1.0], np.float32)) == 0 and peak_db(np.zeros(3, np.float32)) == -np.inf


def config_of(fusion: object, folder: Path) -> Config:
    return replace(small_config(folder), fusion=fusion, loss=LossConfig(ot_weight=0.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("fusion", [Concatenation(), AudioOnly(), VisualOnly()], ids=lambda kind: kind.kind)
def test_captioners_without_a_plan_say_so_and_take_what_they_need(
    fusion: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", config_of(fusion, tmp_path))
    both = write_clip(tmp_path / "both.mkv")
    mute, blind = write_clip(tmp_path / "mute.mkv", sound=None), write_clip(tmp_path / "blind.mkv", picture=None)
    report, pictures = tmp_path / "found.json", tmp_path / "pictures"
    status, _, err = run(capsys, both, mute, blind, "--checkpoint", folder, "--out", pictures, "--json", report)
    found = json.loads(report.read_text())
    reasons = {
        "concatenation": [None, "no_sound", "no_picture"],
        "audio_only": [None, "no_sound", None],
        "visual_only": [None, None, "no_picture"],
    }[found["fusion"]]
    assert status == 1 and [clip["reason"] for clip in found["clips"]] == reasons
    assert f"fusion {found['fusion']} has no transport plan: none is drawn" in err
    for clip, reason in zip(found["clips"], reasons):
        assert clip["marginal_error"] is None and (clip["picture"] is None) == (reason is not None)
        if clip["picture"] is not None:  # where the heat map would be there is spectrogram or nothing, in no blue
            heat = np.asarray(Image.open(clip["picture"]).convert("RGB"))[470:700, 1250:1550].astype(int)
            assert not ((heat[..., 2] - heat[..., 0]) > 60).any() or clip["clip"].endswith("both.mkv")


def test_tokens_of_one_moment_are_added_up() -> None:
    """Unpooled sound: four tokens a moment, all of the lowest band first; and each front end has its own times."""
    config = small_config(Path("unused"))
    unpooled = replace(config, audio=replace(config.audio, pool_frequency=False))
    plan = torch.rand(4 * 6, 2)
    waveform, frames = torch.randn(16000), np.zeros((2, 8, 8, 3), np.uint8)
    found = align(unpooled, waveform, frames, plan)
    assert found.plan is not None
    np.testing.assert_allclose(found.plan, plan[:6] + plan[6:12] + plan[12:18] + plan[18:])
    np.testing.assert_allclose(found.moment_times, 0.075 + 0.16 * np.arange(6))
    np.testing.assert_allclose(found.frame_times, [0.0, 0.5])
    assert found.seconds == 1.0 and found.spectrogram is not None and found.spectrogram.shape == (64, 100)
    kaldi = replace(config, audio=replace(config.audio, front_end=KaldiFrontEnd()))
    np.testing.assert_allclose(align(kaldi, waveform, frames, plan[:6]).moment_times[0], 0.0875)
    assert (np.diff(found.band_hertz) > 0).all() and 3900 < found.band_hertz[-15] < 5000
    assert marginal_error(torch.full((4, 3), 1 / 12)) == pytest.approx(0, abs=1e-6)
    assert marginal_error(torch.tensor([[0.5, 0.25], [0.0, 0.25]])) == pytest.approx(0.5)


def test_what_is_printed_has_one_line_and_steers_no_terminal() -> None:
    assert one_line("a dog\nbarks \x1b[31mred\x07 ünï 犬") == "a dog barks \ufffd[31mred\ufffd ünï 犬"


def test_what_is_refused(
    checkpoint: Path, clips: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, clips[0], "--checkpoint", tmp_path)
    assert status == 2 and "no checkpoint in" in err
    status, _, err = run(capsys, clips[0], "--checkpoint", checkpoint, "--set", "audio.size=base")
    assert status == 2 and "--set audio.size=base: a trained captioner is as it is" in err
    status, _, err = run(capsys, clips[0], "--checkpoint", checkpoint, "--out", clips[0])
    assert status == 2 and "no such folder can be made" in err
    status, _, err = run(capsys, clips[0], "--checkpoint", checkpoint, "--json", tmp_path)
    assert status == 2 and "a folder; name a file" in err


def test_pictures_are_named_after_their_files(
    checkpoint: Path, clips: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also two of one name, one in no code that can be printed, and one that is as long as a name may be."""
    odd, long = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mkv")), tmp_path / f"{'é' * 125}.mkv"
    for path in (odd, long):
        path.symlink_to(clips[0])
    out, report = tmp_path / "out", tmp_path / "found.json"
    files = [clips[0], clips[0], odd, long]
    assert run(capsys, *files, "--checkpoint", checkpoint, "--out", out, "--json", report)[0] == 0
    names = [Path(clip["picture"]).name for clip in json.loads(report.read_text(encoding="utf-8"))["clips"]]
    assert names == ["clip_0.mkv.png", "clip_0.mkv-2.png", "caf\ufffd.mkv.png", f"{'é' * 100}.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
