"""Text in: corpora and files, and their cut into windows of tokens."""

from posttrain.data.text import Text, load_text, token_windows

__all__ = ["Text", "load_text", "token_windows"]
