"""The ``lavcap`` command: one module per sub-command, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys

# Each module has add_arguments(parser) and run(args) -> exit status, and imports what is heavy inside run.
COMMANDS = {
    "prepare": ("lavcap.commands.prepare", "media files and captions to a prepared set"),
    "train": ("lavcap.commands.train", "train a captioner on a prepared set"),
    "evaluate": ("lavcap.commands.evaluate", "caption a split by beam search and score it"),
    "score": ("lavcap.commands.score", "score anyone's captions"),
    "caption": ("lavcap.commands.caption", "caption media files and draw their alignment"),
    "report": ("lavcap.commands.report", "one HTML page of an evaluation, clip by clip"),
    "demo": ("lavcap.commands.demo", "a page in the browser: drop a video, see its caption"),
    "budget": ("lavcap.commands.budget", "parameters, memory, FLOP and cost at a config's sizes"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the sub-command that ``argv`` names; errors of the user's making end in one line and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="lavcap", description="Audio-visual captioning with otfuse")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = next((word for word in argv if word in COMMANDS), None)
    for name, (module, summary) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary)
        if name == named:  # only the one that runs is imported
            importlib.import_module(module).add_arguments(sub)
    args = parser.parse_args(argv)
    command = importlib.import_module(COMMANDS[args.command][0])
    try:
        return int(command.run(args))
    except (ValueError, FileNotFoundError) as error:
        print(f"lavcap {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
