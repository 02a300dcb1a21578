"""The one kind of error that a caller can put right."""


class InputError(ValueError):
    """Something given to steer does not fit; the message is one line that names it and the remedy."""
