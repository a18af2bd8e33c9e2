"""``python -m otfuse info`` and ``python -m otfuse demo``."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m otfuse", description=(__doc__ or "").replace("``", ""))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and which backends run here or why not", add_help=False)
    commands.add_parser("demo", help="align the sound and picture of a clip, checked against POT", add_help=False)
    command = parser.parse_args(argv[:1]).command
    if command == "info":
        from otfuse import info

        return info.main(argv[1:])
    from otfuse import demo

    return demo.main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
