"""A pipeline that is called again and again for one call of the user's: it says nothing and encodes text once."""

import copy
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MARKS = ("safety_checker", "watermark")  # what is done to finished images only
# A fast tokenizer keeps the padding of the present call on itself: threads that share one would pad as others asked.
ENCODING = threading.RLock()


def quiet(pipe: Any) -> Any:
    """A copy of a pipeline for many runs of one call: text encoded once, no safety checker, watermark or bar.

    A safety checker would blacken images on the way, and none of these takes images with a graph.
    """
    quiet = text_once(pipe)
    vars(quiet).update(dict.fromkeys(MARKS) | {"_progress_bar_config": {"disable": True}})
    return quiet


def text_once(pipe: Any) -> Any:
    """A copy of a pipeline for one call of the user's and what it takes beside: it encodes a text once, without grad.

    Copies of the copy share what it has encoded.
    """
    once = copy.copy(pipe)
    if hasattr(pipe, "encode_prompt"):
        vars(once)["encode_prompt"] = _once_each(torch.no_grad()(pipe.encode_prompt))
    return once


def _once_each(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, called once for each of its arguments: some pipelines encode a negative prompt apart."""
    answers: dict[str, Any] = {}

    def remember(*args: Any, **kwargs: Any) -> Any:
        asked = json.dumps(plain_values([args, kwargs]))
        if asked not in answers:
            with ENCODING:
                answers[asked] = function(*args, **kwargs)
        return answers[asked]

    return remember


def plain_values(value: Any) -> Any:
    """An argument to be written down: pictures and tensors become a hash of what they hold."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain_values(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(one) for one in value]
    if isinstance(value, Tensor):
        value = value.detach().float().cpu()
    if not hasattr(value, "__array__") and not hasattr(value, "__array_interface__"):
        return type(value).__name__
    array = np.ascontiguousarray(value)
    return [list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
