"""The one kind of error that a caller can put right."""

import re

MAX_LENGTH = 1000  # characters of a message
# Line breaks of every kind, control characters, which a terminal obeys, and halves of characters, which none can show.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class InputError(ValueError):
    """Something given to steer does not fit; the message is one line that names it and the remedy.

    It is one line whatever it quotes: what cannot be shown in one is told as Python writes it (\\n, \\x1b), and of what
    is longer than 1,000 characters the middle is left out, because the remedy stands at the end.
    """

    def __init__(self, message: str) -> None:
        line = UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], message)
        super().__init__(
            line if len(line) <= MAX_LENGTH else f"{line[: MAX_LENGTH // 2]} … {line[3 - MAX_LENGTH // 2 :]}"
        )
