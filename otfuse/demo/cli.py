"""`python -m otfuse demo`: the command line, and what it says when something is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

EXTRAS = {"av": "PyAV", "matplotlib": "matplotlib", "ot": "POT"}  # import name: name in words


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns 0, 1 if our plan and POT's differ by more than rounding, 2 for bad input."""
    args = _parser().parse_args(argv)
    missing = [name for module, name in EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _refuse(f"{' and '.join(missing)} is not installed: pip install 'otfuse[demo]'")

    # Only now: these import what may be missing.
    from otfuse._backends.base import BackendError
    from otfuse.demo.decode import ClipError
    from otfuse.demo.pipeline import run

    try:
        return run(args.clip, args.out, args.backend, args.seconds)
    except (ClipError, BackendError) as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"cannot write into --out '{args.out}': {error.strerror or error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m otfuse demo",
        description="Align sound and picture of a clip by optimal transport: tokens, sinkhorn_attend, a "
        "check against POT, a time, and a picture.",
    )
    parser.add_argument("--clip", type=Path, metavar="FILE", help="a clip with sound and picture; none: one is made")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--backend", default="auto", metavar="B", help='a name from "python -m otfuse info", or auto')
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=30.0,
        metavar="S",
        help="use at most so much of it (default: %(default)g)",
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 1.0 <= value <= 3600.0:
        raise argparse.ArgumentTypeError(f"must lie between 1 and 3600 seconds; got {text}")
    return value


def _refuse(message: str) -> int:
    print(f"otfuse demo: {message}", file=sys.stderr)
    return 2
