"""The page itself. Every text of a clip or a file is escaped; the one script that may run is named by its hash."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lavcap.alignment import Alignment, describe_plan, one_line
from lavcap.data.decode import FRAMES_PER_SECOND
from lavcap.evaluation import Evaluation
from lavcap.page import pictures
from lavcap.page.clips import ShownClip


def page(evaluation: Evaluation, clips: Sequence[ShownClip]) -> str:
    """The whole file."""
    assets = files("lavcap.page")
    style, script = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    name = escape(evaluation.report["name"])
    metrics = list(evaluation.report["metrics"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{name}: captions clip by clip</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#clips">Skip to the clips</a>
<header>
<h1>{name}</h1>
{_origin(evaluation, len(clips))}
{_overall(evaluation.report)}
</header>
<main>
<section aria-labelledby="all">
<h2 id="all">All clips</h2>
<form class="controls" role="search" hidden>
<label for="filter">Filter by name, caption or reference</label>
<input id="filter" type="search" autocomplete="off" spellcheck="false">
</form>
<p id="status" role="status"></p>
{_table(clips, metrics)}
</section>
<section id="clips" aria-label="Clip by clip" tabindex="-1">
{"".join(_card(number, clip, evaluation) for number, clip in enumerate(clips))}
</section>
</main>
<script>{script}</script>
</body>
</html>
"""


def _origin(evaluation: Evaluation, count: int) -> str:
    origin = evaluation.origin
    checkpoint, data = (escape(_end(path)) for path in (origin.checkpoint, f"{origin.data}/{origin.split}"))
    return (
        f"<p>{count} clip{'' if count == 1 else 's'} of <code>{data}</code>, captioned by <code>{checkpoint}</code>, "
        f"fusion <code>{escape(origin.config.fusion.kind)}</code>.</p>"
    )


def _end(path: str) -> str:
    """Enough to tell one from another; the page may go where nobody need know how its author's folders are called."""
    return one_line("/".join(path.rstrip("/").split("/")[-2:]))


def _overall(report: dict[str, Any]) -> str:
    """All clips together, with intervals."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in report["metrics"])
    scores = "".join(f"<td>{percent(figure['score'])}</td>" for figure in report["metrics"].values())
    bounds = "".join(
        f"<td>{percent(figure['low'])} to {percent(figure['high'])}</td>" for figure in report["metrics"].values()
    )
    bootstrap = report["bootstrap"]
    missing = "".join(f"<p>{escape(name)} is missing: {escape(why)}.</p>" for name, why in report["missing"].items())
    return f"""<div class="wide" role="region" aria-label="Scores of all clips together" tabindex="0">
<table class="overall">
<caption>All clips together, in percent</caption>
<thead><tr><td></td>{names}</tr></thead>
<tbody><tr><th scope="row">score</th>{scores}</tr>
<tr><th scope="row">{bootstrap["confidence"]:.0%} interval</th>{bounds}</tr></tbody>
</table></div>
<details><summary>What these are</summary><p>Intervals by {bootstrap["resamples"]} resamples of the clips. A set's
BLEU and METEOR are no means of its clips' scores. CIDEr-D is 1000 at most, not 100.</p>{missing}</details>"""


def percent(score: float) -> str:
    return f"{100 * score:.1f}"


def _table(clips: Sequence[ShownClip], metrics: Sequence[str]) -> str:
    heads = "".join(
        _head(name, kind) for name, kind in (("clip", "text"), ("caption", "text"), *((m, "number") for m in metrics))
    )
    rows = "".join(_row(number, clip, metrics) for number, clip in enumerate(clips))
    return f"""<div class="wide" role="region" aria-labelledby="all" tabindex="0">
<table id="table">
<caption>Scores of each clip, in percent. The heads of the columns sort.</caption>
<thead><tr>{heads}</tr></thead>
<tbody>{rows}</tbody>
</table></div>"""


def _head(name: str, kind: str) -> str:
    return (
        f'<th scope="col" data-kind="{kind}" class="{kind}"><button type="button">{escape(name)}'
        '<span class="arrow" aria-hidden="true"></span></button></th>'
    )


def _row(number: int, shown: ShownClip, metrics: Sequence[str]) -> str:
    clip = shown.clip
    scores = "".join(
        f'<td class="number" data-value="{clip.scores[name]}">{percent(clip.scores[name])}</td>' for name in metrics
    )
    sought = escape(" ".join([clip.clip_id, clip.caption, *clip.references]).lower())
    return (
        f'<tr data-clip="{number}" data-text="{sought}">'
        f'<th scope="row" data-value="{escape(clip.clip_id)}"><a href="#clip-{number}">{escape(clip.clip_id)}</a></th>'
        f'<td data-value="{escape(clip.caption)}">{_caption(clip.caption)}</td>{scores}</tr>\n'
    )


def _caption(text: str) -> str:
    return escape(text) if text else "<em>an empty caption</em>"


def _card(number: int, shown: ShownClip, evaluation: Evaluation) -> str:
    clip = shown.clip
    scores = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{percent(value)}</dd></div>" for name, value in clip.scores.items()
    )
    references = "".join(f"<li>{escape(text)}</li>" for text in clip.references)
    missing = f'<p class="missing">{escape(shown.missing)}</p>' if shown.missing else ""
    alignment = ""
    if shown.alignment is not None:
        explained = escape(describe_plan(evaluation.origin.config, shown.plan))
        alignment = _timeline(shown.alignment, explained) + _heat_map(shown.alignment)
    return f"""<article id="clip-{number}" aria-labelledby="name-{number}">
<h3 id="name-{number}">{escape(clip.clip_id)}</h3>
<p class="caption">{_caption(clip.caption)}</p>
<dl class="scores">{scores}</dl>
{missing}
<div class="alignment">{alignment}</div>
<h4>References</h4>
<ol class="references">{references}</ol>
<p class="back"><a href="#all">Back to the table</a></p>
</article>
"""


def _timeline(alignment: Alignment, explained: str) -> str:
    """Spectrogram, lines and pictures over one axis of time."""
    parts = []
    if alignment.spectrogram is not None:
        alt = f"Spectrogram of {alignment.seconds:.1f} seconds, {len(alignment.spectrogram)} mel bands up to 8 kHz"
        parts.append(f'<img class="sound" alt="{alt}" decoding="async" src="{pictures.spectrogram(alignment)}">')
    if alignment.plan is not None:
        box = f"0 0 {pictures.LINES_WIDE} {pictures.LINES_HIGH}"
        parts.append(
            f'<svg viewBox="{box}" preserveAspectRatio="none" role="img" aria-label="{_pairs(alignment)}">'
            f"{pictures.lines(alignment)}</svg>"
        )
    if len(alignment.frames):
        width = 100 * len(alignment.frames) / FRAMES_PER_SECOND / alignment.seconds
        alt = f"{len(alignment.frames)} pictures of the clip, {FRAMES_PER_SECOND} a second"
        parts.append(
            f'<img class="film" style="width:{width:.2f}%" alt="{alt}" decoding="async" '
            f'src="{pictures.filmstrip(alignment)}">'
        )
    times = range(0, int(alignment.seconds) + 1, 2)
    ticks = "".join(f'<span style="left:{100 * time / alignment.seconds:.2f}%">{time} s</span>' for time in times)
    return f"""<figure class="timeline">
<div class="wide" role="region" aria-label="Sound and pictures over time" tabindex="0">
<div class="strip"><div class="ticks" aria-hidden="true">{ticks}</div>{"".join(parts)}</div></div>
<figcaption>{explained}</figcaption></figure>"""


def _heat_map(alignment: Alignment) -> str:
    if alignment.plan is None:
        return ""
    rows, columns = alignment.plan.shape
    alt = f"Transport plan of {rows} moments of sound by {columns} pictures. {_pairs(alignment)}"
    return f"""<figure class="plan"><div class="axes"><span class="y">sound, 0 to {alignment.seconds:.1f} s</span>
<img class="heat" alt="{alt}" decoding="async" src="{pictures.heat_map(alignment.plan)}">
<span class="x">picture, 0 to {columns / FRAMES_PER_SECOND:.1f} s</span></div>
<figcaption>The plan. Blank: a picture gets its share of a moment's mass or less; full colour: 16 times that or
more.</figcaption></figure>"""


def _pairs(alignment: Alignment) -> str:
    """For those who hear the page."""
    told = [
        f"sound at {heard:.1f} s with picture at {seen:.1f} s, {more:.1f} times its share"
        for heard, seen, more in pictures.strongest(alignment)
    ]
    return f"Strongest pairs: {'; '.join(told)}." if told else "No pair is preferred to any other."
