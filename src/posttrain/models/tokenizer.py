"""A tokenizer without transformers, where that is certain to give the same ids and texts.

transformers' plain fast tokenizer passes tokenizer.json to the library `tokenizers` and renders
chat templates with jinja2; both are done here the same way. Classes with behaviour of their own,
and settings that change what a tokenizer does, are left to transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from posttrain.errors import UserError

CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
# For these, transformers does not take the class that tokenizer_config.json names.
OWN_CLASS = ("mistral", "qwen2")
SPECIAL = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
INERT = {
    "tokenizer_class", "backend", "chat_template", "added_tokens_decoder", "is_local",
    "local_files_only", "model_max_length", "model_input_names", "padding_side",
}  # fmt: skip
# Files beside tokenizer.json from which transformers takes more.
MORE = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates", "tekken.json")


class PlainTokenizer:
    """The part of a transformers tokenizer that generation uses."""

    def __init__(self, raw: Any, special: Mapping[str, str], template: str | None) -> None:
        self._raw = raw
        self._special = dict(special)
        self.chat_template = template

    @classmethod
    def read(cls, path: Path, model_type: str) -> PlainTokenizer | None:
        """The tokenizer of a model directory, or None where transformers has to load it."""
        from tokenizers import Tokenizer

        files = [path / "tokenizer_config.json", path / "tokenizer.json"]
        if model_type in OWN_CLASS or not all(file.is_file() for file in files):
            return None
        if any((path / name).exists() for name in MORE):
            return None
        config = json.loads(files[0].read_text(encoding="utf-8"))
        special = {name: config[name] for name in SPECIAL if config.get(name) is not None}
        if config.get("tokenizer_class") not in CLASSES or set(config) - INERT - set(SPECIAL):
            return None
        raw = Tokenizer.from_file(str(files[1]))
        added = raw.get_added_tokens_decoder()
        known = {token.content for token in added.values() if token.special}
        same = _repeats(config.get("added_tokens_decoder"), added)
        template = _template(path, config)
        if not same or raw.truncation or raw.padding or not isinstance(template, str | None):
            return None
        # Any other would be added.
        return cls(raw, special, template) if _texts(special) <= known else None

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    def _id_of(self, role: str) -> int | None:
        token = self._special.get(role)
        return None if token is None else self.convert_tokens_to_ids(token)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._raw.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return str(self._raw.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def get_added_vocab(self) -> dict[str, int]:
        return {token.content: i for i, token in self._raw.get_added_tokens_decoder().items()}

    def convert_tokens_to_ids(self, token: str) -> int | None:
        found: int | None = self._raw.token_to_id(token)
        return found

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenize: bool = False,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of chat messages. Raises whatever the template raises."""
        if tokenize:
            raise UserError("apply_chat_template gives text here: pass tokenize=False")
        text: str = self._compiled.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special,
        )
        return text

    @cached_property
    def _compiled(self) -> Any:
        return environment().from_string(self.chat_template or "")


def _template(path: Path, config: Mapping[str, Any]) -> Any:
    file = path / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")


def _texts(special: Mapping[str, Any]) -> set[Any]:
    return {token if isinstance(token, str) else None for token in special.values()}


def _repeats(listed: Mapping[str, Any] | None, added: Mapping[int, Any]) -> bool:
    """Whether what tokenizer_config.json says of added tokens is what tokenizer.json says."""
    from tokenizers import AddedToken

    return listed is None or {int(i): repr(AddedToken(**token)) for i, token in listed.items()} == {
        i: repr(token) for i, token in added.items()
    }


def environment() -> Any:
    """jinja2 as transformers sets it up for chat templates."""
    from datetime import datetime

    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the model says, for training; here it is only content."""

        tags = {"generation"}  # noqa: RUF012 (how jinja2 wants it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made
