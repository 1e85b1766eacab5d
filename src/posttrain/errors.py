"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Bad input: the message names the file or field, what was found and what to do.

    The command line prints it in one line without a traceback; library callers catch it.
    """
