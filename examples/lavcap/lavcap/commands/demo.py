"""``lavcap demo``: a page in the browser where a video is dropped and captioned."""

from __future__ import annotations

import argparse

from lavcap.commands.caption import add_checkpoint_arguments, load_file_captioner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0: every network (%(default)s)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")


def run(args: argparse.Namespace) -> int:
    from lavcap.demo import build_page, load_gradio, serve

    load_gradio()  # before a captioner is loaded for nothing
    captioner = load_file_captioner(args)
    return serve(build_page(captioner, str(args.checkpoint)), args.host, args.port)
