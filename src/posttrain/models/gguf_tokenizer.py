"""The tokenizer that the metadata of a GGUF file describes.

transformers builds it. Two things are added here as llama.cpp (llama-vocab.cpp) has them: how a text
is split into words before merges, for names in `tokenizer.ggml.pre` that transformers does not know,
and whether texts begin with BOS in a file that does not say so.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from posttrain.errors import UserError
from posttrain.models.base import one_line

SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # values of tokenizer.ggml.model
# These take a word that is in the vocabulary as it is, whatever the merges make of it.
WHOLE_WORDS = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano", "tekken",
)  # fmt: skip
BEGIN_WITH_BOS = (*WHOLE_WORDS, "chameleon")
# These are split as for GPT-2, which is what transformers does with a name it does not know.
AS_GPT2 = (
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling", "gigachat",
    "a.x-4.0", "mellum",
)  # fmt: skip


def _digits_apart() -> Any:
    """Every digit is a word; the rest is split as for GPT-2. SmolLM2's tokenizer.json has this."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _deepseek_coder() -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    patterns = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
    cuts = [Split(Regex(pattern), "isolated") for pattern in patterns]
    to_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
    return Sequence([*cuts, Digits(individual_digits=True), to_bytes])


SPLITS: Mapping[str, Callable[[], Any]] = {
    "smollm": _digits_apart,
    "starcoder": _digits_apart,
    "refact": _digits_apart,
    "command-r": _digits_apart,
    "codeshell": _digits_apart,
    "exaone": _digits_apart,
    "minerva-7b": _digits_apart,
    "deepseek-coder": _deepseek_coder,
}


@dataclass(frozen=True)
class GgufTokenizer:
    """What a file says of its tokenizer.

    kind: `tokenizer.ggml.model`. split: `tokenizer.ggml.pre`, None where it is left open.
    begin: whether texts begin with BOS. special: role ("bos_token") -> token.
    """

    kind: str | None
    split: str | None
    begin: bool
    special: Mapping[str, str]

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "GgufTokenizer":
        kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
        split = split if kind == BYTE_LEVEL and split != "default" else None
        usual = kind == SENTENCEPIECE or split in BEGIN_WITH_BOS
        begin = bool(metadata.get("tokenizer.ggml.add_bos_token", usual))
        return cls(kind, split, begin, _special_tokens(metadata))

    @property
    def notes(self) -> list[str]:
        """A sentence where texts may get other tokens than the model was trained with."""
        if self.kind != BYTE_LEVEL or self.split in AS_GPT2 or self.split in SPLITS:
            return []
        if self.split in _known_to_transformers():
            return []
        name = "the file names no split" if self.split is None else f"{self.split!r} is unknown"
        why = f"text is split into words as for GPT-2, because {name} (tokenizer.ggml.pre)"
        return [f"{why}: some texts may get other tokens than the model was trained with"]

    def build(self, file: Path, name: str) -> Any:
        """The transformers tokenizer of `file`, called `name`. UserError where there is none."""
        try:
            tokenizer = _from_transformers(file)
        except Exception as error:  # the tokenizer libraries raise bare Exception for bad files
            raise UserError(f"{file}: cannot build its tokenizer: {one_line(error)}") from error
        tokenizer.name_or_path = name
        for role, token in self.special.items():
            setattr(tokenizer, role, token)
        cut = SPLITS.get(self.split or "")
        if cut is not None:
            tokenizer.backend_tokenizer.pre_tokenizer = cut()
        if self.split in WHOLE_WORDS:
            tokenizer.backend_tokenizer.model.ignore_merges = True
        if "bos_token" in self.special and tokenizer.add_bos_token != self.begin:
            tokenizer.add_bos_token = self.begin
        return tokenizer


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Role -> token as the file says it; transformers versions differ in what they take over."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids = {role: metadata.get(f"tokenizer.ggml.{key}") for role, key in SPECIAL_TOKENS.items()}
    return {role: tokens[i] for role, i in ids.items() if i is not None and i < len(tokens)}


def _from_transformers(file: Path) -> Any:
    """Built in a folder of its own: a tokenizer.json beside the file would win over the file."""
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as folder:
        alone = Path(folder) / "model.gguf"
        _link(file.resolve(), alone)
        return PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=alone.name)


def _link(file: Path, alone: Path) -> None:
    for link in (os.symlink, os.link):
        try:
            return link(file, alone)
        except OSError:  # Windows asks for a privilege, some file systems have no links
            continue
    shutil.copyfile(file, alone)


def _known_to_transformers() -> Mapping[str, Any]:
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:  # older versions have no such table
        return {}
    return getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {})
