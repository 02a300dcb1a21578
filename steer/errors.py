"""Errors that a caller can correct."""

import re

MAX_LENGTH = 1000  # characters of a message
# Line breaks of every kind, control characters (a terminal executes them) and lone surrogates (none can be printed).
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class InputError(ValueError):
    """An invalid argument, file or setting; the message is one line with the value given and the remedy.

    Line breaks and control characters in quoted values are escaped as Python writes them (\\n, \\x1b). Messages over
    1,000 characters lose their middle, because the remedy is at the end.

    fields  names of settings in the message; the command line replaces the first mention of each by its flag
    """

    def __init__(self, message: str, *fields: str) -> None:
        self.fields = fields
        line = UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], message)
        super().__init__(
            line if len(line) <= MAX_LENGTH else f"{line[: MAX_LENGTH // 2]} … {line[3 - MAX_LENGTH // 2 :]}"
        )


class UnsupportedPipelineError(InputError):
    """A pipeline, as called, whose solver steps cannot be hooked."""
