"""What can be checked of any reward with a few images: that it keeps its contract, and how it behaves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from steer.contract import Reward, RewardError, score
from steer.errors import InputError
from steer.rewards.contrast import contrasts

BATCH_TOLERANCE = 1e-5  # of max(1, |score|): rounding differs between batch sizes, by less than this
TIMED_CALLS = 3
GRADED_IMAGES = 4  # whose gradients are checked: every one costs 34 evaluations
STEPS = (1e-4, 3e-4, 1e-3, 1e-2)  # of all pixels at once; fp32 rounding spoils small ones, kinks and curvature large
GRADIENT_TOLERANCE = 5e-2  # relative, of the median slope
FLAT = 3e-5  # of the largest |score|: slopes below this drown in the rounding of fp32 scores


@dataclass(frozen=True)
class Finding:
    """One check: whether it passed (None: does not apply, or is only reported), and the figure in one line."""

    name: str
    passed: bool | None
    detail: str


Outcome = tuple[bool | None, str]


def check_reward(reward: Reward, images: Tensor, prompts: Sequence[str]) -> list[Finding]:
    """Checks a reward on images (N, 3, H, W) in [0, 1] and their N prompts: one finding for each of CHECKS.

    A reward that raises or breaks the contract gives a failed finding with the message; where it cannot score the
    batch at all, the other checks do not apply. Raises InputError for images or prompts of another form.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or not len(images):
        raise InputError(f"images to check a reward are floats (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if len(prompts) != len(images):
        raise InputError(f"a reward is checked with one prompt an image, got {len(prompts)} for {len(images)} images")
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        if findings and not findings[0].passed:
            findings.append(Finding(name, None, "not tried: the contract does not hold"))
            continue
        try:
            findings.append(Finding(name, *check(reward, images, prompts)))
        except RewardError as error:
            findings.append(Finding(name, False, " ".join(str(error).split())))
    return findings


def _scores(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """(N,) without gradients. Copies go in and come out: a reward may write into what it is given or has returned."""
    with torch.no_grad():
        return score(reward, images.clone(), list(prompts)).clone()


def _contract(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    scores = _scores(reward, images, prompts)
    return True, f"{len(scores)} finite scores, {scores.min().item():.4g} to {scores.max().item():.4g}"


def _determinism(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    first, second = (_scores(reward, images, prompts) for _ in range(2))
    return torch.equal(first, second), f"two calls differ by at most {(first - second).abs().max().item():.2g}"


def _batch_invariance(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    """A score must not depend on the images beside it: max |r − r′| / max(1, |r|) stays within BATCH_TOLERANCE."""
    if len(images) < 2:
        return None, "needs two images"
    together = _scores(reward, images, prompts)
    one_by_one = torch.cat([_scores(reward, images[k : k + 1], prompts[k : k + 1]) for k in range(len(images))])
    reversed_order = _scores(reward, images.flip(0), prompts[::-1]).flip(0)
    alone, moved = (
        ((other - together).abs() / together.abs().clamp(min=1)).max().item() for other in (one_by_one, reversed_order)
    )
    detail = f"one by one differs by {alone:.2g}, reversed order by {moved:.2g} (at most {BATCH_TOLERANCE:g})"
    return max(alone, moved) <= BATCH_TOLERANCE, detail


def _prompt_sensitivity(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    """Each image once more with the next of the other prompts, or, where all are one, with a contrast of it."""
    known = list(dict.fromkeys(prompts))
    if len(known) == 1:
        known += [contrast.prompt for contrast in contrasts(known[0])[:1]]
    if len(known) == 1:
        return None, "needs two prompts, or one with a colour, a number or a relation"
    others = [known[(known.index(prompt) + 1) % len(known)] for prompt in prompts]
    change = (_scores(reward, images, others) - _scores(reward, images, prompts)).abs()
    share = (change > 0).float().mean().item()
    return None, f"another prompt changes {share:.0%} of the scores, by {change.mean().item():.3g} on average"


def _prompt_limit(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    """How much of a prompt is read, as far as the reward says so in `prompt_limit`."""
    limit = getattr(reward, "prompt_limit", None)
    if limit is None:
        return None, "no limit is known (a reward with one says it as prompt_limit)"
    return None, f"reads {limit} tokens of a prompt, its marks of beginning and end among them; more play no part"


def _gradient(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    """Slopes along fixed random directions v, by the gradient and by central differences:

        ⟨∇r(x), v⟩  against  (r(x + hv) − r(x − hv)) / 2h

    The error of a slope is |difference| / the larger of both, at the step h that suits it best. What passes or fails
    is the median over images and directions: rewards have kinks (ReLU, max), where single slopes mean nothing.
    """
    points, texts = _inner_points(images[:GRADED_IMAGES]), list(prompts[:GRADED_IMAGES])
    if not reward.differentiable:
        return _no_gradient(reward, points, texts)
    gradient = _gradient_of_sum(reward, points, texts)
    if gradient is None:
        return False, "says differentiable = True, but its scores carry no gradient to the images"
    if not gradient.isfinite().all():
        return False, "the gradient has nan or inf"
    flat = FLAT * _scores(reward, points, texts).abs().max()
    errors: list[Tensor] = []
    for direction in _directions(points):
        slopes = (gradient * direction).sum((1, 2, 3)).cpu()
        measured = torch.stack([_difference(reward, points, texts, direction, step) for step in STEPS])
        larger = torch.maximum(measured.abs(), slopes.abs())
        steep = (slopes.abs() > flat) | (measured[-1].abs() > flat)
        errors.append(((measured - slopes).abs() / larger.clamp(min=1e-30)).amin(0)[steep])
    found = torch.cat(errors)
    if not len(found):
        return True, "flat: no slope to compare with the gradient, which is 0 too"
    typical = found.median().item()
    detail = f"off central differences by {typical:.2%} in the median of {len(found)} slopes"
    return typical < GRADIENT_TOLERANCE, f"{detail} (below {GRADIENT_TOLERANCE:.0%})"


def _no_gradient(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    try:
        gradient = _gradient_of_sum(reward, images, prompts)
    except RewardError:  # like .numpy() of images that ask for gradients
        return True, "says that it has none, and refuses to give one"
    if gradient is None:
        return True, "says that it has none, and gives none"
    return False, "says differentiable = False, but its scores carry gradients: say True, or detach them"


def _inner_points(images: Tensor) -> Tensor:
    """The images in fp32, drawn in so that no step leaves [0, 1], and dithered: equal pixels sit on kinks of a max."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    return 0.03 + 0.9 * images.float() + 0.04 * noise


def _gradient_of_sum(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor | None:
    """The gradient of the sum of the scores, as each image's own; None where the scores carry none to the images."""
    pixels = images.clone().requires_grad_()
    with torch.enable_grad():
        # Times 1: a reward may write into its input, which autograd allows for no leaf.
        total = score(reward, pixels * 1, list(prompts)).sum()
    if not total.requires_grad:
        return None
    try:
        (gradient,) = torch.autograd.grad(total, pixels, allow_unused=True)
    except RuntimeError as error:
        raise RewardError(f"reward {reward.name!r} has no gradient: {error}") from error
    return gradient


def _directions(images: Tensor) -> list[Tensor]:
    """Two of single pixels and two of patches, ±1 each: what is fine must be right, and so must be what is coarse."""
    generator, (count, _, height, width) = torch.Generator().manual_seed(1), images.shape
    grids = [(height, width), (height, width), (4, 4), (4, 4)]
    signs = (torch.randint(0, 2, (count, 3, *grid), generator=generator).float() * 2 - 1 for grid in grids)
    return [F.interpolate(some, size=(height, width), mode="nearest").to(images.device) for some in signs]


def _difference(reward: Reward, images: Tensor, prompts: Sequence[str], direction: Tensor, step: float) -> Tensor:
    higher, lower = (_scores(reward, images + sign * step * direction, prompts) for sign in (1, -1))
    return (higher - lower) / (2 * step)


def _images_untouched(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    given = images.clone()
    with torch.no_grad():
        score(reward, given, list(prompts))
    return torch.equal(given, images), f"a pixel changes by at most {(given - images).abs().max().item():.2g}"


def _throughput(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    seconds = []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        _scores(reward, images, prompts)  # ends on the CPU, so that a GPU has finished
        seconds.append(time.perf_counter() - start)
    rate = len(images) / median(seconds)
    height, width = images.shape[2:]
    return True, f"{rate:,.4g} images/s of {width} × {height} in batches of {len(images)}"


CHECKS: dict[str, Callable[[Reward, Tensor, Sequence[str]], Outcome]] = {
    "contract": _contract,
    "determinism": _determinism,
    "batch invariance": _batch_invariance,
    "prompt sensitivity": _prompt_sensitivity,
    "prompt limit": _prompt_limit,
    "gradient": _gradient,
    "images untouched": _images_untouched,
    "throughput": _throughput,
}
