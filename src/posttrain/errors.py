"""The one exception that means "the user can fix this"."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message names the file or field, what was found and what to do.

    The command line prints it in one line without a traceback; library callers catch it.
    """


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A hint to end an error message with: the nearest option, or all of them if few."""
    options = sorted(options)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(options)}" if 0 < len(options) <= 20 else ""
