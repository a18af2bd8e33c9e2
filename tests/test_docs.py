"""The pages: the API page is current, links and names lead somewhere, examples run."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / name
        for name in (
            "README.md",
            "CHANGELOG.md",
            "CONTRIBUTING.md",
            "otfuse/kernels/README.md",
            "otfuse/kernels/tpc/README.md",
            "otfuse/kernels/tpc/model/README.md",
            "benchmarks/README.md",
        )
    ]
    + list((ROOT / "docs").glob("*.md"))
)
FENCE = re.compile(r"^(```+)(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
# A file, or a folder with a slash at its end, seen from the root or from the page.
PATH = re.compile(r"^[\w.-]+(/[\w.-]+)*(/|\.(py|md|toml|json|png|svg))$")
NAME = re.compile(r"otfuse(?:\.\w+)+")
MADE_LATER = {"alignment.png", "demo-out/alignment.png"}  # by the demo


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        base = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        anchor, count = base, 0
        while anchor in found:
            count += 1
            anchor = f"{base}-{count}"
        found.add(anchor)
    return found


def broken_links(path: Path) -> list[str]:
    targets = re.findall(r"\]\(<?([^)\s>]+)>?\)", prose(path))
    return [target for target in targets if not re.match(r"[a-z]+:", target) and not leads_somewhere(path, target)]


def leads_somewhere(path: Path, target: str) -> bool:
    place, _, anchor = target.partition("#")
    file = (path.parent / place).resolve() if place else path
    if not file.exists() or ROOT not in (file, *file.parents):
        return False
    return not anchor or file.suffix != ".md" or anchor in anchors(file)


def unknown_names(path: Path) -> list[str]:
    """Dotted names of ours, and paths, in code spans."""
    unknown = []
    for span in re.findall(r"`([^`\n]+)`", prose(path)):
        unknown += [name for name in NAME.findall(span) if not resolves(name)]
        if PATH.match(span) and span not in MADE_LATER and not is_there(path, span):
            unknown.append(span)
    return unknown


def is_there(path: Path, span: str) -> bool:
    """From the root, from the page, or anywhere in the package."""
    return (ROOT / span).exists() or (path.parent / span).exists() or any((ROOT / "otfuse").rglob(span))


def resolves(name: str) -> bool:
    """As an attribute of the package, or of a module of it."""
    rest = name.split(".")[1:]
    found: object = importlib.import_module("otfuse")
    for depth, word in enumerate(rest):
        if hasattr(found, word):
            found = getattr(found, word)
            continue
        try:
            found = importlib.import_module(".".join(["otfuse", *rest[: depth + 1]]))
        except ImportError:
            return False
    return True


def examples(path: Path) -> list[str]:
    return [code for _, language, code in FENCE.findall(path.read_text(encoding="utf-8")) if language == "python"]


# The example's page names a user's files too, which are not here; its links are.
@pytest.mark.parametrize("path", [*PAGES, ROOT / "examples/lavcap/README.md"], ids=page_id)
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_names_exist(path):
    assert unknown_names(path) == []


@pytest.mark.parametrize("path", [path for path in PAGES if examples(path)], ids=page_id)
def test_examples_run(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for code in examples(path):
        exec(compile(code, page_id(path), "exec"), {"__name__": "__main__"})


def test_there_are_examples():
    assert examples(ROOT / "README.md")


def test_fences_are_closed():
    for path in PAGES:
        assert "```" not in prose(path), page_id(path)


def test_pages_that_the_code_names_exist():
    for path in sorted((ROOT / "otfuse").rglob("*.py")):
        for name in re.findall(r"docs/[\w-]+\.md", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{path.name}: {name}"
    assert r"\tag{5}" in (ROOT / "docs/gradients.md").read_text(encoding="utf-8")


def test_the_api_page_is_current(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    make_api = importlib.import_module("make_api")
    monkeypatch.delitem(sys.modules, "make_api")
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.render(), "run: make docs"
    listed = {name for names in make_api.CONTENTS.values() for name in names}
    otfuse = importlib.import_module("otfuse")
    public = {f"otfuse.{name}" for name in otfuse.__all__ if name != "nn"}
    assert public <= listed


def test_that_these_tests_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "otfuse").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text(
        "# One, two\n\n[here](#one-two) [no](#one) [gone](gone.md) [out](../../x.md) [web](https://x.org)\n\n"
        "`otfuse.sinkhorn` `otfuse.sinkhon` `otfuse.nn.OTAttention` `otfuse.nn.Attention`\n\n"
        "`docs/page.md` `docs/none.md`\n\n"
        "```python\nassert False\n```\n"
    )
    assert broken_links(page) == ["#one", "gone.md", "../../x.md"]
    assert unknown_names(page) == ["otfuse.sinkhon", "otfuse.nn.Attention", "docs/none.md"]
    assert examples(page) == ["assert False\n"]


# House words, and the field's for them; in the public modules and on the pages that have been gone over.
RETIRED = {
    r"\brounds\b|\b(a|one|each|every|last|first) round\b": "iteration",
    r"(?<![.\w])items?\b(?!\()": "batch element, problem",
    r"\bbeyond the chip\b": "streaming",
    r"\bone piece\b": "scaling form",
    r"\b(the|are|is) owed\b": "not measured",
}
GONE_OVER = [
    *(f"otfuse/{name}.py" for name in ("functional", "varlen", "loss", "nn", "_problem", "_alignment", "_attention")),
    *(f"otfuse/_backends/{name}.py" for name in ("base", "select", "padded")),
    "otfuse/_ops.py", "README.md", "CONTRIBUTING.md",
]  # fmt: skip


@pytest.mark.parametrize("path", GONE_OVER)
def test_words_are_the_fields(path):
    lines = (ROOT / path).read_text().splitlines()
    found = [(line, better) for line in lines for word, better in RETIRED.items() if re.search(word, line)]
    assert not found


def test_that_a_retired_word_is_found():
    def found(line):
        return any(re.search(word, line) for word in RETIRED)

    assert all(map(found, ("after the last round", "all rounds", "an item of the batch", "solved beyond the chip")))
    assert not any(map(found, ("values.items()", "x.item()", "to round, a rounding", "one problem, two problems")))
