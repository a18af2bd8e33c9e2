"""The Penn Treebank tokeniser that captioning scores are defined with: CoreNLP's, from pycocoevalcap's jar.

Called here rather than through pycocoevalcap's class, which writes into its own installed folder, and which gives
captions to the wrong clips, without a word, when one of them holds a character that Java takes for the end of a line.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

JAVA_MISSING = (
    "the tokeniser and METEOR need Java, and no 'java' is on the PATH: install one, for instance with "
    "'apt-get install default-jre-headless' (Debian, Ubuntu) or 'conda install openjdk'"
)


def find_java() -> str:
    """Path of ``java``; ``ValueError`` that says what to install where there is none."""
    java = shutil.which("java")
    if java is None:
        raise ValueError(JAVA_MISSING)
    return java


def tokenise(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Each clip's captions in lower case, tokens parted by single spaces, punctuation taken out."""
    lines = [" ".join(caption.split()) for texts in captions.values() for caption in texts]
    tokenised = iter(_tokenise_lines(lines))
    return {clip_id: [next(tokenised) for _ in texts] for clip_id, texts in captions.items()}


def _tokenise_lines(lines: list[str]) -> list[str]:
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [find_java(), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    tokenised = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(tokenised) != len(lines):
        raise RuntimeError(
            f"the tokeniser gave {len(tokenised)} lines for {len(lines)} captions (exit status {done.returncode}): "
            f"{done.stderr.decode(errors='replace').strip()[-500:]}"
        )
    return [" ".join(w for w in line.split() if w not in ptbtokenizer.PUNCTUATIONS) for line in tokenised]
