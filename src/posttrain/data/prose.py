"""The corpus `prose`: articles, web pages, stories and dialogues, written for this package.

Thirty-nine documents, about 16,000 words or 21,000 tokens. A solver that is shown technical
reference text alone fits a model's weights to that; with these beside it, 4-bit weights lose much
less on other text. All of it is for calibration.
"""

from importlib.resources import files

from posttrain.errors import UserError

FOLDER = files("posttrain") / "data" / "prose"
DIVIDER = "\n***\n"  # between the documents of a file


def prose(split: str) -> list[str]:
    """The documents, by file and in order. UserError for any split but "calibration"."""
    if split != "calibration":
        raise UserError(f"the corpus prose is for calibration only; it has no {split} part")
    texts = sorted(FOLDER.iterdir(), key=lambda path: path.name)
    parts = (part for path in texts for part in path.read_text("utf-8").split(DIVIDER))
    return [part.strip("\n") for part in parts]
