"""Models on the Hugging Face hub, through huggingface_hub and its local cache."""

import re
from pathlib import Path

from posttrain.errors import UserError
from posttrain.models.base import one_line

# A repository name, with or without its owner; each part as the hub allows it.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
# Weights in other layouts beside the transformers ones.
UNWANTED = ("*/*", "consolidated*")


def looks_like_hub_id(text: str) -> bool:
    """Whether a text that is no local path can name a repository on the hub."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith((".gguf", ".safetensors"))


def fetch(repo: str, hint: str = "") -> Path:
    """The local directory of a hub model: from the cache, or downloaded now.

    hint: what to add to the message when nothing is found (a near local path).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(
            snapshot_download(repo, allow_patterns=[*WANTED], ignore_patterns=[*UNWANTED])
        )
    except GatedRepoError as error:
        raise UserError(
            f"{repo}: the hub gives this model only to those who accepted its terms: open "
            f"https://huggingface.co/{repo}, accept them, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repo}: no such directory here, and no such public model on the hub{hint} "
            "(a private one needs `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{repo}: no such directory here, the model is not in the local hub cache, and the "
            f"hub cannot be reached{hint}; connect, or pass a local directory or .gguf file"
        ) from error
    except Exception as error:  # each network library underneath raises its own kind
        raise UserError(f"{repo}: the hub did not deliver it: {one_line(error)}{hint}") from error
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{repo}: this hub repository has no config.json; if it holds GGUF files, download one "
            "and pass its path"
        )
    return folder
