"""Result files for people: a page with pictures, a summary for a screen, what became slower.

``python benchmarks/report.py FILE… --page PAGE.md`` writes a Markdown page, the latest file first, and its pictures
into ``images/`` beside it, ``--html PAGE.html`` the same as one file that opens anywhere, ``--speed PICTURE.svg`` the
picture of the README, from the latest file. ``--compare OLD NEW`` says what became slower beyond the noise, and exits
with 1 if anything did. ``--summary`` prints a line for each case timed on a GPU, and the limits set for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gpu_summary
import regressions
from blocks import Heading, html_page, markdown, write_images
from rows import Result, condition_line, read
from sections import page, speed, table

TITLE = "Measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--page", type=Path, help="Markdown page to write")
    parser.add_argument("--html", type=Path, help="HTML page to write, all in one file")
    parser.add_argument("--speed", type=Path, help="picture (SVG) to write of the main cases")
    parser.add_argument("--summary", action="store_true", help="a line for each case timed on a GPU")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="what became slower")
    parser.add_argument("--all", action="store_true", help="with --compare: what stayed the same too")
    options = parser.parse_args()
    if options.compare:
        text, code = regressions.report(*map(read, options.compare), everything=options.all)
        print(text)
        sys.exit(code)
    if not options.files:
        parser.error("no result files given")
    results = sorted((read(file) for file in options.files), key=lambda one: (one.conditions["date"], one.name))
    write(results, options)


def write(results: list[Result], options: argparse.Namespace) -> None:
    for path in (options.page, options.html, options.speed):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.page or options.html:
        blocks = page(results[::-1], TITLE)
        if options.page:
            write_images(blocks, options.page.parent / "images")
            options.page.write_text(markdown(blocks, "images"), encoding="utf-8")
        if options.html:
            options.html.write_text(html_page(blocks, TITLE), encoding="utf-8")
    if options.speed:
        attended = [result for result in results if result.suite("attend")]
        options.speed.write_text(speed((attended or results)[-1]), encoding="utf-8")
    if options.summary:
        print("\n\n".join(gpu_summary.summary(result) for result in results))
    if not (options.page or options.html or options.speed or options.summary):
        for result in results:
            rows = [row for row in result.rows if "times_ours" in row]
            print(markdown([Heading(result.name, 3), table(rows)], ""), condition_line(result.conditions), sep="\n")


if __name__ == "__main__":
    main()
