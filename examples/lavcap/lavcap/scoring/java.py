"""Java as the scorers need it: one that runs, the same locale everywhere, and jars under a name that they can bear.

METEOR reads its own counts in Java's default locale, and reads nothing where that writes decimal commas. It also looks
for its data beside its jar by an address in which it does not undo what stands for blanks, '#', '%' and other letters.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

JAVA_MISSING = (
    "the tokeniser and METEOR need Java, and {}: install one, for instance with "
    "'apt-get install default-jre-headless' (Debian, Ubuntu) or 'conda install openjdk'"
)
_LOCALE = "-Duser.language=en -Duser.country=US"
_OPTIONS = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS")  # the first is every Java's; what is in HotSpot's second comes last
_PLAIN = re.compile(r"[A-Za-z0-9_./+-]+")


def find_java() -> str:
    """Path of ``java``; ``ValueError`` that says what to install where there is none."""
    java = shutil.which("java")
    if java is None:
        raise ValueError(JAVA_MISSING.format("no 'java' is on the PATH"))
    return java


def check_java() -> None:
    """Raise ``ValueError`` where there is no ``java``, or one that does not run, such as the stub of a bare macOS."""
    done = subprocess.run([find_java(), "-version"], capture_output=True, check=False, env=java_environment())
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise ValueError(JAVA_MISSING.format(f"{find_java()} does not run ({said or f'status {done.returncode}'})"))


def java_version() -> int | None:
    """The feature release of ``java`` (8, 11, 17, ...), None where there is none."""
    java = shutil.which("java")
    if java is None:
        return None
    done = subprocess.run([java, "-version"], capture_output=True, text=True, check=False, env=java_environment())
    found = re.search(r'version "(?:1\.)?(\d+)', done.stderr)
    return int(found.group(1)) if found else None


def java_environment() -> dict[str, str]:
    """This process's, with the user's own options for Java, and behind them a locale with decimal points."""
    return os.environ | {name: f"{os.environ.get(name, '')} {_LOCALE}".lstrip() for name in _OPTIONS}


@contextmanager
def java_locale() -> Iterator[None]:
    """:func:`java_environment` as this process's own, for a library that starts Java itself."""
    before = {name: os.environ.get(name) for name in _OPTIONS}
    os.environ.update({name: value for name, value in java_environment().items() if name in _OPTIONS})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def plain_path(jar: Path) -> Iterator[Path]:
    """The jar by a path of plain letters: its own, or that of a copy beside links to what it has beside it.

    Java looks behind a link to a jar, so the jar itself is copied; what it opens by address it opens through links.
    """
    if _PLAIN.fullmatch(os.path.realpath(jar)):
        yield jar
        return
    place = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(prefix="lavcap-", dir=place if _PLAIN.fullmatch(place) else "/tmp") as temporary:
        for beside in jar.parent.iterdir():
            if beside != jar:
                (Path(temporary) / beside.name).symlink_to(beside.resolve())
        yield Path(shutil.copy(jar, temporary))
