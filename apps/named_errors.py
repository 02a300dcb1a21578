"""Errors of a long job, said in a line that names what it was at."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from steer.apps.system_errors import refusal
from steer.errors import InputError


@contextmanager
def named(what: str) -> Iterator[None]:
    """An InputError inside begins with what it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


@contextmanager
def errors_named(named: str, kept: str, less: str) -> Iterator[None]:
    """What diffusers refuses, the disk or the memory end as an InputError that begins with `named`.

    kept  what is not lost; less: what needs less memory
    """
    try:
        yield
    except InputError:
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(f"{named}: the device's memory is full: {less} ({kept})") from error
    except OSError as error:
        raise InputError(f"{named}: {refusal(error)} ({kept})") from error
    except (ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{named}: {reason} ({kept})") from error
