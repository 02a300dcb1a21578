"""The Reward protocol, the contract check of every call, and scoring of images and videos."""

import functools
import inspect
import logging
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from steer.errors import InputError

T = TypeVar("T")


class Submit(Protocol):
    """Submit work; the returned function waits for the result and raises the exceptions of the work."""

    def __call__(self, work: Callable[[], T], /) -> Callable[[], T]: ...


class ThreadContext:
    """The PyTorch state of the current thread: gradients, inference mode, autocast and CUDA stream.

    A new thread starts with PyTorch's defaults instead.
    """

    def __init__(self, device: torch.device) -> None:
        self.gradients, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        kind = device.type
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Apply the captured state to the current thread within the block."""
        with (
            torch.inference_mode(self.inference),
            torch.set_grad_enabled(self.gradients),
            torch.autocast(*self.autocast),
            torch.cuda.stream(self.stream),
        ):
            yield


@contextmanager
def run_in_background(device: torch.device, threads: int = 1) -> Iterator[Submit]:
    """Yield a function that submits work to background threads, in order; by default to one thread.

    On CUDA the work runs on its own stream, after everything queued on the caller's stream before. Waiting for a
    result makes the caller's stream wait for the work. At the end of the block all work is done.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with ThreadPoolExecutor(threads, "steer-background") as thread:

        def begin(work: Callable[[], T]) -> Callable[[], T]:
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                thread_context = ThreadContext(device)

            def run_work() -> T:
                with thread_context():
                    return work()

            future = thread.submit(run_work)

            def result() -> T:
                output = future.result()
                if stream is not None:
                    caller = torch.cuda.current_stream(device)
                    caller.wait_stream(stream)
                    for leaf in tree_leaves(output):  # their memory is not reused before the caller is done
                        if isinstance(leaf, Tensor) and leaf.is_cuda:
                            leaf.record_stream(caller)
                return output

            return result

        yield begin


Metadata = Sequence[Mapping[str, Any]]  # one row per image: the metadata of its prompt
METADATA_PARAMETERS = ("metadata", "prompt_metadata")  # names of the parameter that receives the metadata
IMAGE_FORMS = ("pt", "np", "pil")  # forms of images, as diffusers' output_type
TEXT_FORMS = ("text", "ids")  # forms of token sequences
PIL_ONLY_ERRORS = (AttributeError, TypeError, ValueError)  # from code that expects PIL images

CPU = torch.device("cpu")  # the device of scores


class RewardError(InputError):
    """A reward that is missing, fails or violates its contract."""


@runtime_checkable
class Reward(Protocol):
    """Scores images; higher is better.

    `__call__(images, prompts)` takes images (N, 3, H, W) in [0, 1] and one prompt per image and returns
    (N,) fp32. `differentiable` states whether gradients flow back to the images. Optional:

    images    "pt" (the default), "np" ((N, H, W, 3) in [0, 1]) or "pil" (a list): the form of the images; a reward of
              texts has "text" (a list of str) or "ids" (N, L)
    metadata  a parameter of `__call__` with this name receives one Mapping per image: the metadata of its prompt
    """

    @property
    def name(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...


class Texts(list[str]):
    """The texts of a batch, with the token ids (N, L) that they were decoded from, if known."""

    def __init__(self, texts: Sequence[str], ids: Tensor | None = None) -> None:
        super().__init__(texts)
        self.ids = ids
        self.device = CPU if ids is None else ids.device

    def to(self, device: Any) -> "Texts":
        """Return the texts with their ids on a device."""
        return Texts(self, None if self.ids is None else self.ids.to(device))


@runtime_checkable
class SequenceReward(Protocol):
    """Scores token sequences; higher is better.

    `__call__(ids, prompts)` takes ids (N, L) int64 and one prompt per sequence and returns (N,) fp32. Where
    `differentiable`, `relaxed(p, prompts)` takes token probabilities p (N, L, V) and returns (N,) with a graph, equal
    to `__call__` where p is one-hot. The attribute `images = "ids"` makes it usable like any other reward.
    """

    @property
    def name(self) -> str: ...

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, ids: Tensor, prompts: Sequence[str]) -> Tensor: ...

    def relaxed(self, p: Tensor, prompts: Sequence[str]) -> Tensor: ...


def as_texts(samples: Any) -> Texts | None:
    """Return a list of texts as `Texts`; None for images."""
    if isinstance(samples, Texts):
        return samples
    texts = isinstance(samples, list | tuple) and bool(samples) and all(isinstance(one, str) for one in samples)
    return Texts(samples) if texts else None


@runtime_checkable
class Composite(Reward, Protocol):
    """A reward composed of others: `components` returns their scores (N,) by name, `total` the composed score."""

    def components(self, images: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]: ...

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor: ...


@runtime_checkable
class Judge(Protocol):
    """Compares two images of one prompt; preferences need not be transitive.

    `compare(images_a, images_b, prompts)` takes images (N, 3, H, W) in [0, 1] and one prompt per pair and returns
    P(a ≻ b) (N,), in [0, 1], with P(a ≻ b) + P(b ≻ a) = 1.
    """

    @property
    def name(self) -> str: ...

    def compare(self, images_a: Tensor, images_b: Tensor, prompts: Sequence[str]) -> Tensor: ...


def compare(judge: Judge, images_a: Tensor, images_b: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compare images by a judge and validate the result: P(a ≻ b) (N,), fp32 on the CPU.

    Raises RewardError with the judge's name if the judge fails or returns anything but probabilities.
    """
    for images in (images_a, images_b):
        _check_lengths(images, prompts, None)
    with torch.no_grad():
        output = _call_reward(judge.name, lambda: judge.compare(images_a, images_b, prompts))
    probabilities = _validated_scores(judge.name, prompts, output)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        outside = probabilities[(probabilities < 0) | (probabilities > 1)][0].item()
        raise RewardError(f"judge {judge.name!r} returned {outside:g}: it must return probabilities, from 0 to 1")
    return probabilities


def compares_images(reward: Any) -> bool:
    """Return whether a reward's scores depend on the other images of the call (its `compares_images`)."""
    return bool(attribute(reward, "compares_images", False))


def takes_videos(reward: Any) -> bool:
    """Return whether a reward scores whole videos (N, F, 3, H, W) (its `takes_videos`), as a VideoReward does."""
    return bool(attribute(reward, "takes_videos", False))


def score(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
    """Score images with a reward and validate the result: (N,) finite fp32 on the CPU, gradients kept.

    Raises RewardError with the reward's name if the reward fails or violates the contract.
    """
    if torch.is_tensor(images) and images.dim() == 5 and not takes_videos(reward):
        return mean_over_frames(images, lambda frames: (score(reward, frames, prompts, metadata), {}))[0]
    _check_lengths(images, prompts, metadata)
    output = _call_reward(reward.name, lambda: evaluate(reward, images, prompts, metadata))
    return _validated_scores(reward.name, prompts, output)


def score_components(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Score images as `score` does and return the scores of the components by name; {} for a plain reward."""
    if not isinstance(reward, Composite):
        return score(reward, images, prompts, metadata), {}
    _check_lengths(images, prompts, metadata)
    given = keywords(reward.components, len(prompts), metadata)
    output = _call_reward(reward.name, lambda: dict(reward.components(images, prompts, **given)))
    components = {name: _validated_scores(f"{reward.name}/{name}", prompts, scores) for name, scores in output.items()}
    total = _call_reward(reward.name, lambda: reward.total(components, prompts))
    return _validated_scores(reward.name, prompts, total), components


def evaluate(
    reward: Callable[..., Any], images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
) -> Any:
    """Call a reward with images in its own form, and with metadata where its signature accepts it.

    The form is the reward's `images`, else the annotation of its first parameter. With neither, if the first call with
    a tensor raises an error typical of code for PIL images, that call is repeated once with PIL images.
    """
    given = keywords(reward, len(prompts), metadata)
    form = _form(reward)
    if form is not None:
        return reward(_as_form(images, form), prompts, **given)
    if isinstance(images, Texts):
        return reward(images, prompts, **given)
    try:
        output = reward(images, prompts, **given)
    except InputError:
        raise
    except PIL_ONLY_ERRORS as error:
        if attribute(reward, "differentiable", False):
            raise
        try:
            output = reward(_as_form(images, "pil"), prompts, **given)
        except Exception:  # noqa: BLE001 - foreign code: the first failure is the one to report
            raise error from None
        _cache_form(reward, "pil")
        return output
    _cache_form(reward, "pt")
    return output


def attribute(reward: Any, name: str, default: Any) -> Any:
    """Return an attribute of a reward; for a functools.partial, an attribute of its function."""
    while isinstance(reward, partial) and name not in vars(reward):
        reward = reward.func
    return getattr(reward, name, default)


def parameters_of(call: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a function, or of a module's `forward`; None for C code without a signature."""
    try:
        return inspect.signature(call.forward if isinstance(call, nn.Module) else call).parameters
    except (TypeError, ValueError):
        return None


def keywords(call: Callable[..., Any], count: int, metadata: Metadata | None) -> dict[str, Any]:
    """Return the metadata as a keyword argument if the call accepts it; empty rows if required but missing."""
    parameters = parameters_of(call) or {}
    name = next((name for name in METADATA_PARAMETERS if name in parameters), None)
    if name is None:
        rest = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        return {"metadata": list(metadata)} if rest and metadata is not None else {}
    if metadata is None:
        return {name: [{} for _ in range(count)]} if parameters[name].default is inspect.Parameter.empty else {}
    return {name: list(metadata)}


_known_forms: dict[int, tuple[weakref.ref[Any], str]] = {}


def _cache_form(reward: Any, form: str) -> None:
    key = id(reward)
    try:
        _known_forms[key] = weakref.ref(reward, lambda _: _known_forms.pop(key, None)), form
    except TypeError:  # a class with __slots__ takes no weak reference: its form is determined in every call
        return


def _form(reward: Any) -> str | None:
    """Return the form in which a reward takes images, declared or annotated; None where it is unknown."""
    declared = attribute(reward, "images", None)
    if isinstance(declared, str):
        if declared not in (forms := (*IMAGE_FORMS, *TEXT_FORMS)):
            name = attribute(reward, "__name__", type(reward).__name__)
            raise RewardError(f"reward {name!r}: images must be one of {', '.join(forms)}, got {declared!r:.40}")
        return declared
    known = _known_forms.get(id(reward))
    if known is not None and known[0]() is reward:
        return known[1]
    parameters = parameters_of(reward) or {}
    annotation = next((one.annotation for one in parameters.values()), None)
    text = annotation if isinstance(annotation, str) else str(annotation)
    patterns = {"pt": "Tensor", "pil": r"PIL|Image\b", "text": r"\bstr\b", "np": "ndarray"}
    form = next((form for form, pattern in patterns.items() if re.search(pattern, text)), None)
    if form is not None:
        _cache_form(reward, form)
    return form


def _as_form(images: Any, form: str) -> Any:
    if form in TEXT_FORMS:
        if not isinstance(images, Texts) or (form == "ids" and images.ids is None):
            given = "texts" if form == "ids" else "images"
            raise RewardError(f"a reward of {form} was given {given}: use it with a text model")
        return images.ids if form == "ids" else images
    if form == "pt":
        return images
    if isinstance(images, Texts):
        raise RewardError("a reward of images was given texts: use a reward of texts, such as says:WORD")
    arrays = VaeImageProcessor.pt_to_numpy(images.detach().float().clamp(0, 1))
    return arrays if form == "np" else VaeImageProcessor.numpy_to_pil(arrays)


def _check_lengths(images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> None:
    if isinstance(prompts, str):
        raise RewardError(f"a reward takes a list of prompts, one per image, got one string: {prompts[:40]!r}")
    if len(images) != len(prompts):
        raise RewardError(f"a reward takes one prompt per image, got {len(prompts)} prompts and {len(images)} images")
    if metadata is not None and len(metadata) != len(prompts):
        raise RewardError(f"metadata needs one row per image, got {len(metadata)} rows and {len(prompts)} images")


def _call_reward(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RewardError:
        raise
    except Exception as error:  # foreign code: whatever it raises is reported as the reward's failure
        raise RewardError(f"reward {name!r} failed: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _as_tensor(scores: Any) -> Any:
    """Convert the results that rewards return to a tensor: (scores, info), arrays, lists of numbers."""
    if isinstance(scores, tuple) and len(scores) == 2 and (scores[1] is None or isinstance(scores[1], Mapping)):
        scores = scores[0]
    if isinstance(scores, np.ndarray | np.generic):
        return torch.tensor(scores) if scores.dtype.kind in "biuf" else scores
    if isinstance(scores, list | tuple):
        rows = [torch.tensor(row) if isinstance(row, int | float) else _as_tensor(row) for row in scores]
        if rows and all(torch.is_tensor(row) and row.numel() == 1 for row in rows):
            return torch.stack([row.reshape(()) for row in rows])
    return scores


def _validated_scores(name: str, prompts: Sequence[str], scores: Any) -> Tensor:
    count = len(prompts)
    scores = _as_tensor([scores] if count == 1 and isinstance(scores, int | float) else scores)
    if torch.is_tensor(scores) and (scores.shape == (count, 1) or scores.numel() == count == 1):
        scores = scores.reshape(count)
    if not torch.is_tensor(scores) or tuple(scores.shape) != (count,):
        got = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
        raise RewardError(f"reward {name!r} must return a tensor of shape ({count},), got {got}")
    if scores.is_complex() or scores.dtype == torch.bool:
        raise RewardError(f"reward {name!r} must return floats, got {scores.dtype}")
    if scores.layout != torch.strided or scores.is_meta:
        raise RewardError(
            f"reward {name!r} must return a dense tensor with values, got {scores.layout}, {scores.device}"
        )
    single = scores.float()  # a large fp64 number becomes infinite
    if not single.isfinite().all():
        row = int((~single.isfinite()).nonzero()[0])
        raise RewardError(
            f"reward {name!r} returned {scores[row].item()} for image {row}, prompt {prompts[row]!r}: "
            "rewards must be finite in fp32"
        )
    return single.cpu()


class TimedThread(threading.Thread):
    """The thread of one call with a timeout."""


def has_abandoned_calls() -> bool:
    """Return whether a call that timed out is still running in this process.

    If so, the interpreter must not be shut down: Python before 3.14 ends such a thread inside PyTorch's C++, which
    aborts the process. Exit by `os._exit`, as the command line does.
    """
    return any(isinstance(thread, TimedThread) for thread in threading.enumerate())


class RewardProxy:
    """Proxy of another reward: attributes that it does not define are the other reward's."""

    images = "pt"  # `evaluate` converts images to the form that the other reward takes

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def __getattr__(self, name: str) -> Any:
        # `reward` is missing in a copy that has no attributes yet.
        if name == "reward" or name.startswith("__") or (value := attribute(self.reward, name, self)) is self:
            raise AttributeError(name)
        return value


class WrappedReward(RewardProxy):
    """A reward with a timeout on every call, with the metadata of each prompt from a table, or with a lock.

    With a timeout, each call runs in its own thread. Python cannot end a thread: a hanging thread is abandoned and ends
    with the process, see `has_abandoned_calls`. Raises RewardError with the reward's name on a timeout.

    seconds   the timeout; None: no limit
    metadata  a row for each prompt, in place of the caller's rows; None: the caller's
    lock      held during every call
    """

    def __init__(
        self,
        reward: Any,
        seconds: float | None = None,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        super().__init__(reward)
        self.name, self.differentiable = reward.name, reward.differentiable
        self.metadata, self._seconds, self._lock = metadata, seconds, lock or nullcontext()

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        rows = self._rows(prompts, metadata)
        return self._with_timeout(lambda: evaluate(self.reward, images, prompts, rows), images.device)

    def _rows(self, prompts: Sequence[str], given: Metadata | None) -> Metadata | None:
        return given if self.metadata is None else [self.metadata.get(prompt, {}) for prompt in prompts]

    def _with_timeout(self, call: Callable[[], Any], device: torch.device) -> Any:
        if self._seconds is None:
            with self._lock:
                return call()
        outcome: dict[str, Any] = {}
        thread_context = ThreadContext(device)

        def run() -> None:
            try:
                with thread_context():
                    outcome["value"] = call()
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                outcome["error"] = error

        thread = TimedThread(target=run, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(min(self._seconds, threading.TIMEOUT_MAX))
        if thread.is_alive():
            raise RewardError(
                f"reward {self.name!r} timed out after {self._seconds:g} s: raise its timeout, or fix the reward"
            )
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]


class WrappedComposite(WrappedReward):
    """A composed reward with a timeout, metadata or a lock; its components are still reported."""

    def components(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Mapping[str, Tensor]:
        given = keywords(self.reward.components, len(prompts), self._rows(prompts, metadata))
        return self._with_timeout(lambda: self.reward.components(images, prompts, **given), images.device)

    def total(self, components: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        return self._with_timeout(lambda: self.reward.total(components, prompts), CPU)


def with_timeout(reward: Reward, seconds: float | None) -> Reward:
    """Limit every call of a reward to `seconds`; None: no limit. Raises RewardError for a limit that is not above 0."""
    if seconds is None:
        return reward
    if not seconds > 0:
        raise RewardError(f"the timeout of reward {reward.name!r} must be above 0 seconds, got {seconds}")
    return (WrappedComposite if isinstance(reward, Composite) else WrappedReward)(reward, seconds=seconds)


def with_lock(reward: Reward, lock: AbstractContextManager[Any]) -> Reward:
    """Hold a lock during every call of a reward."""
    return (WrappedComposite if isinstance(reward, Composite) else WrappedReward)(reward, lock=lock)


def with_metadata(reward: Reward, rows: Mapping[str, Mapping[str, Any]] | None) -> Reward:
    """Attach metadata by prompt to a reward, replacing earlier metadata; None: detach it."""
    attached = isinstance(reward, WrappedReward) and reward.metadata is not None
    plain: Reward = reward.reward if attached else reward  # type: ignore[attr-defined]
    if rows is None:
        return plain
    return (WrappedComposite if isinstance(plain, Composite) else WrappedReward)(plain, metadata=rows)


VIDEO_FRAMES = 8  # scored frames of a video, evenly spaced
Scores = tuple[Tensor, dict[str, Tensor]]


def mean_over_frames(images: Tensor, score: Callable[[Tensor], Scores], reward: Any = None) -> Scores:
    """Score images (N, 3, H, W), waveforms or texts; videos (N, F, 3, H, W) by the mean over evenly spaced frames.

    reward  a reward that takes whole videos scores them with all frames
    """
    if isinstance(images, Texts) or images.dim() <= 4 or takes_videos(reward):
        return score(images)
    frames = torch.linspace(0, images.shape[1] - 1, min(VIDEO_FRAMES, images.shape[1])).round().long()
    rewards, components = zip(*(score(images[:, frame]) for frame in frames), strict=True)
    return torch.stack(rewards).mean(0), {
        name: torch.stack([p[name] for p in components]).mean(0) for name in components[0]
    }


logger = logging.getLogger(__name__)
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")
MAX_TOKENS = 1_000_000  # a tokenizer without a limit reports a far larger number
# A fast tokenizer stores the padding of the current call: threads that share a tokenizer would mix up their paddings.
ENCODING_LOCK = threading.RLock()


@functools.lru_cache(maxsize=65_536)
def warn_if_truncated(reader: str, prompt: str, tokens: int, limit: int) -> None:
    """Warn once per prompt if a reader truncates it to the first `limit` tokens."""
    if tokens > limit:
        message = f"{reader} truncates prompts to {limit} tokens, and this one has {tokens}: {prompt!r:.200}"
        logger.warning("steer: %s", InputError(message))


def warn_if_pipeline_truncates(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
    """Warn about prompts that a tokenizer of a diffusers pipeline truncates.

    CLIP's tokenizers have a limit of their own; for others the limit is the call's max_sequence_length.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    given = call.get("max_sequence_length")
    if given is None and "max_sequence_length" in parameters:
        given = parameters["max_sequence_length"].default
    for name in TOKENIZERS:
        tokenizer = getattr(pipe, name, None)
        own = getattr(tokenizer, "model_max_length", None)
        if not isinstance(own, int) or not callable(tokenizer):
            continue
        limit = own if "CLIP" in type(tokenizer).__name__ or not isinstance(given, int) else given
        for prompt in dict.fromkeys(prompts):
            if limit < MAX_TOKENS and len(prompt) + 2 > limit:  # tokens but begin and end have at least one character
                warn_if_truncated(f"{name} of {type(pipe).__name__}", prompt, token_count(tokenizer, prompt), limit)


def token_count(tokenizer: Any, prompt: str) -> int:
    """Count the tokens of a prompt, begin and end tokens included."""
    with ENCODING_LOCK:
        return len(tokenizer(prompt, truncation=False, verbose=False).input_ids)


def with_truncation_warning(
    reader: str, encode: Callable[[list[str]], Tensor], count: Callable[[str], int], limit: int
) -> Callable[[list[str]], Tensor]:
    """Wrap an encoder of prompts so that it warns about truncated prompts."""

    def encoding(prompts: list[str]) -> Tensor:
        with ENCODING_LOCK:
            for prompt in prompts:
                warn_if_truncated(reader, prompt, count(prompt), limit)
            return encode(prompts)

    return encoding
