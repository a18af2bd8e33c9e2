"""The Penn Treebank tokeniser that captioning scores are defined with: CoreNLP's, from pycocoevalcap's jar.

Called here rather than through pycocoevalcap's class, which writes into its own installed folder, and which gives
captions to the wrong clips, without a word, when one of them holds a character that Java takes for the end of a line.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pycocoevalcap.tokenizer import ptbtokenizer

from lavcap.scoring.java import find_java, java_environment


def tokenise(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Each clip's captions in lower case, tokens parted by single spaces, punctuation taken out."""
    lines = [" ".join(caption.split()) for texts in captions.values() for caption in texts]
    tokenised = iter(_tokenise_lines(lines))
    return {clip_id: [next(tokenised) for _ in texts] for clip_id, texts in captions.items()}


def _tokenise_lines(lines: list[str]) -> list[str]:
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    text = "".join(f"{line}\n" for line in lines)
    command = [find_java(), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False, env=java_environment())
    tokenised = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(tokenised) != len(lines):
        raise RuntimeError(
            f"the tokeniser gave {len(tokenised)} lines for {len(lines)} captions (exit status {done.returncode}): "
            f"{done.stderr.decode(errors='replace').strip()[-500:]}"
        )
    return [" ".join(w for w in line.split() if w not in ptbtokenizer.PUNCTUATIONS) for line in tokenised]
