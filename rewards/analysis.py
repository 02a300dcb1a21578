"""Analysis of rewards: agreement of two, accuracy on preferences, consistency with prompts, checks of one reward."""

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from steer.errors import InputError
from steer.reward import Judge, Reward, RewardError, score
from steer.reward import compare as compare_pairs
from steer.rewards.inputs import rows_by_prompt
from steer.rewards.objectives import PreferenceLabels

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

Scores = Tensor | Sequence[float] | np.ndarray
ROUNDING = 1e-12  # relative to a score: smaller differences from a prompt's mean are rounding errors


@dataclass(frozen=True)
class Agreement:
    """Agreement of two rewards on `n` images: rank correlations −1..1, pairwise agreement and STARC distance 0..1.

    Correlations are over all images, the other measures within prompts. Undefined values are nan: correlations of a
    constant reward, and the other measures if no prompt has two images.
    """

    n: int
    spearman: float
    kendall: float
    pairwise_agreement: float
    starc: float


def compare(a: Scores, b: Scores, groups: Sequence[str]) -> Agreement:
    """Compute all measures at once from scores a and b (N,) of images with the N prompts `groups`.

    Raises InputError if their numbers differ or are below two, or if scores are not finite.
    """
    first, second = _validated(a, b, groups)
    comparable = max(map(len, rows_by_prompt(groups).values())) > 1
    return Agreement(
        n=len(first),
        spearman=spearman(first, second),
        kendall=kendall(first, second),
        pairwise_agreement=pairwise_agreement(first, second, groups),
        starc=starc_distance(first, second, groups) if comparable else float("nan"),
    )


def spearman(a: Scores, b: Scores) -> float:
    """Compute Spearman's ρ of scores (N,), −1..1: the linear correlation of ranks. nan if one reward is constant."""
    return _correlation(stats.spearmanr, a, b)


def kendall(a: Scores, b: Scores) -> float:
    """Compute Kendall's τ_b of scores (N,), −1..1, corrected for ties. nan if one reward is constant."""
    return _correlation(stats.kendalltau, a, b)


def _correlation(measure: Callable[..., Any], a: Scores, b: Scores) -> float:
    first, second = _validated(a, b)
    constant = 0 in (np.ptp(first), np.ptp(second))  # scipy warns, and returns nan
    return float("nan") if constant else float(measure(first, second).statistic)


def pairwise_agreement(a: Scores, b: Scores, groups: Sequence[str]) -> float:
    """Return the share 0..1 of pairs of images of one prompt that both rewards rank alike; a tie counts 1/2.

        mean over i < j of one prompt of (1 + sign(aᵢ − aⱼ) · sign(bᵢ − bⱼ)) / 2

    Only images of the same prompt are compared, because steering and best-of-n choose among them. nan if no prompt has
    two images.
    """
    first, second = _validated(a, b, groups)
    pairs = [pair for rows in rows_by_prompt(groups).values() for pair in combinations(rows, 2)]
    if not pairs:
        return float("nan")
    i, j = np.array(pairs).T
    return float(np.mean(1 + np.sign(first[i] - first[j]) * np.sign(second[i] - second[j])) / 2)


def starc_distance(a: Scores, b: Scores, groups: Sequence[str]) -> float:
    """Compute a STARC distance between rewards over images, 0..1, of scores (N,) and the N prompts `groups`.

        c(r)ᵢ = rᵢ − mean of r over the images of i's prompt,   s(r) = c(r) / ‖c(r)‖₂,   d = ‖s(a) − s(b)‖₂ / 2

    Source: STARC (arXiv 2309.15257): canonicalise, normalise, measure. There the canonical form removes potential
    shaping; here it removes one shift per prompt, which does not change any ranking of a prompt's images either. d = 0
    for rewards that are equal up to such shifts and a positive scale, 1 for opposite rewards. d = √((1 − ρ) / 2) with
    ρ the correlation within prompts. A reward that is constant within each prompt has ‖c(r)‖ = 0 and keeps s(r) = 0:
    its distance is 1/2 from every other reward, 0 from another constant.
    """
    first, second = _validated(a, b, groups)
    return float(np.linalg.norm(_standardised(first, groups) - _standardised(second, groups)) / 2)


def _standardised(scores: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    canonical = scores.copy()
    for rows in rows_by_prompt(groups).values():
        canonical[rows] -= scores[rows].mean()
    norm = np.linalg.norm(canonical)
    if norm <= ROUNDING * np.linalg.norm(scores):
        return np.zeros_like(scores)
    return canonical / norm


def _validated(a: Scores, b: Scores, groups: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Convert both scores to (N,) fp64. Raises InputError if they cannot be compared."""
    first, second = (np.asarray(scores, dtype=np.float64) for scores in (a, b))
    sizes = [first.shape, second.shape, *([] if groups is None else [(len(groups),)])]
    if first.ndim != 1 or len(set(sizes)) > 1:
        raise InputError(f"two rewards are compared on scores of the same images, one number each, got shapes {sizes}")
    if len(first) < 2:
        raise InputError(f"two rewards are compared on at least 2 images, got {len(first)}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("two rewards are compared on finite scores: leave out the images with nan or inf")
    return first, second


BINS = 10


@dataclass(frozen=True)
class PreferenceMetrics:
    """Metrics of a reward on held-out pairs.

    accuracy  share of decided pairs (no ties) in which the preferred image has the higher reward; equal rewards: 1/2
    log_loss  mean −log of the predicted probability of the label, nats; ln 2 = .693 at chance
    ece       expected calibration error: mean over pairs of |predicted − observed| share, in bins of 0.1
    bins      (predicted, observed, pairs) of each bin of the probability σ(Δ) that a is chosen
    """

    accuracy: float
    log_loss: float
    ece: float
    bins: tuple[tuple[float, float, int], ...]

    @property
    def summary(self) -> str:
        """Return accuracy, log loss and calibration error in one line."""
        return f"accuracy {self.accuracy:.3f}, log loss {self.log_loss:.3f}, calibration error {self.ece:.3f}"


def preference_metrics(raw: Sequence[Tensor], labels: PreferenceLabels) -> PreferenceMetrics:
    """Compute the metrics from raw rewards (N,) of the images a and of the images b, in nats."""
    difference, chosen = raw[0] - raw[1], labels.choice
    decided = chosen != 0.5
    right = torch.where(difference == 0, 0.5, ((difference > 0) == (chosen > 0.5)).float())
    loss = F.binary_cross_entropy_with_logits(difference, chosen)
    predicted = torch.sigmoid(difference)
    index = (predicted * BINS).long().clamp(max=BINS - 1)
    rows = [index == k for k in index.unique(sorted=True)]
    bins = tuple((predicted[r].mean().item(), chosen[r].mean().item(), int(r.sum())) for r in rows)
    ece = sum(count * abs(share - observed) for share, observed, count in bins) / max(len(chosen), 1)
    accuracy = right[decided].mean().item() if decided.any() else 0.5
    return PreferenceMetrics(accuracy, loss.item(), ece, bins)


KINDS = ("colour", "binding", "count", "relation")
# A colour is replaced by the next colour in this ring that the prompt does not contain. Neighbours differ clearly, and
# the scene grammar has all six.
RING = ("blue", "yellow", "purple", "green", "black", "red")
# Colour words with their hue, so that "crimson" is not contrasted with "red". Words that mostly name a thing (rose,
# olive, navy, lime) are left out.
HUES = {hue: hue for hue in (*RING, "orange", "pink", "brown", "white", "grey")} | {
    "gray": "grey",
    "silver": "grey",
    "crimson": "red",
    "scarlet": "red",
    "maroon": "red",
    "gold": "yellow",
    "golden": "yellow",
    "violet": "purple",
    "magenta": "purple",
    "turquoise": "blue",
    "cyan": "blue",
    "teal": "green",
}
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OPPOSITES = {
    "left of": "right of",
    "right of": "left of",
    "left side of": "right side of",
    "right side of": "left side of",
    "above": "below",
    "below": "above",
    "in front of": "behind",
    "behind": "in front of",
    "on top of": "under",
    "under": "on top of",
    "underneath": "on top of",
    "beneath": "on top of",
}


def _any_of(phrases: Sequence[str]) -> re.Pattern[str]:
    """Compile a pattern of the phrases as whole words, in any case, with any white space between them."""
    spaced = (r"\s+".join(phrase.split()) for phrase in sorted(phrases, key=len, reverse=True))
    return re.compile(rf"\b(?:{'|'.join(spaced)})\b", re.IGNORECASE)


_COLOUR, _NUMBER, _RELATION = _any_of(list(HUES)), _any_of(NUMBERS), _any_of(list(OPPOSITES))
# Orange is a colour only before a noun: "an orange car", not "an orange on a plate".
_BEFORE_A_THING = re.compile(r"[\s-]+(?!(?:and|or|with|on|in|at|of|to|next|near|by|is|left|right|above|below)\b)\w")
_JOINED = re.compile(r"[\s,/&-]*(?:(?:and|or)[\s-]*)?", re.IGNORECASE)  # "black-and-white", "red, blue"
_ARTICLE = re.compile(r"\ban?(?=\s+$)", re.IGNORECASE)


@dataclass(frozen=True)
class Contrast:
    """A changed prompt and the kind of change: "colour", "binding" (two colours exchanged), "count" or "relation"."""

    kind: str
    prompt: str


@dataclass(frozen=True)
class Consistency:
    """Share 0..1 of `pairs` (image, contrast) in which the prompt scores higher (ties: 1/2), and the mean margin."""

    share: float
    pairs: int
    margin: float


def contrasts(prompt: str) -> list[Contrast]:
    """Change one fact of a prompt at a time, by deterministic plain-English word rules.

    Each colour word becomes a colour that the prompt does not contain; colours of two different objects are exchanged;
    each number from two to ten becomes the next lower one, but two becomes three; each relation becomes its opposite.
    The list is empty if the prompt has none of these. Rules see words, not meaning: "Red Square" becomes "Blue Square".
    """
    rules = (_other_colours, _exchanged_colours, _other_counts, _opposite_relations)
    return [Contrast(kind, text) for kind, rule in zip(KINDS, rules, strict=True) for text in rule(prompt)]


def contrast_pairs(prompts: Sequence[str]) -> list[tuple[int, Contrast]]:
    """Return every contrast of every prompt, with the row of its prompt."""
    return [(row, contrast) for row, prompt in enumerate(prompts) for contrast in contrasts(prompt)]


def consistency(reward: Reward, images: Tensor, prompts: Sequence[str]) -> dict[str, Consistency]:
    """Measure how often a reward prefers the prompt to its contrasts, for images (N, 3, H, W) of the prompts.

        share = mean over (image, contrast) of [r(x, prompt) > r(x, contrast)], a tie counts 1/2

    1 is perfect, 1/2 is chance. The result has an entry for each kind of contrast that occurs, and for "all". Hard
    negatives as in arXiv 2204.03162 and 2210.01936. Raises RewardError if the reward fails.
    """
    pairs = contrast_pairs(prompts)
    if not pairs:
        return {}
    with torch.no_grad():
        right, wrong = score(reward, images, prompts), []
        for start in range(0, len(pairs), len(images)):  # the caller's batch size is the limit
            some = pairs[start : start + len(images)]
            wrong.append(score(reward, images[[row for row, _ in some]], [contrast.prompt for _, contrast in some]))
    margins = right[[row for row, _ in pairs]] - torch.cat(wrong)
    return consistency_by_kind([contrast.kind for _, contrast in pairs], margins)


def consistency_by_kind(kinds: Sequence[str], margins: Tensor) -> dict[str, Consistency]:
    """Average margins (P,), each the score of a prompt minus the score of its contrast, by kind and for "all"."""
    results: dict[str, Consistency] = {}
    for kind in [kind for kind in KINDS if kind in kinds] + (["all"] if kinds else []):
        of_kind = margins[[k for k, name in enumerate(kinds) if kind in (name, "all")]].double()
        share = ((of_kind.sign() + 1) / 2).mean().item()
        results[kind] = Consistency(share, len(of_kind), of_kind.mean().item())
    return results


def _colour_words(prompt: str) -> list[re.Match[str]]:
    results = _COLOUR.finditer(prompt)
    return [word for word in results if word[0].lower() != "orange" or _BEFORE_A_THING.match(prompt, word.end())]


def _hue(word: re.Match[str]) -> str:
    return HUES[word[0].lower()]


def _other_colours(prompt: str) -> Iterator[str]:
    words = _colour_words(prompt)
    free = [hue for hue in RING if hue not in map(_hue, words)]
    for word in words:
        start = RING.index(_hue(word)) if _hue(word) in RING else 0
        ordered = (hue for hue in (*RING[start:], *RING[:start]) if hue in free)
        if (other := next(ordered, None)) is not None:
            yield _with_colour(prompt, word, other)


def _exchanged_colours(prompt: str) -> Iterator[str]:
    """Exchange neighbouring colours if that changes the meaning.

    The meaning stays for one object of both colours ("a black and white photo") and for two objects of a kind ("a red
    and a blue ball").
    """
    for first, second in pairwise(_colour_words(prompt)):
        between = re.sub(r"\b(?:an?|the)\s+$", "", prompt[first.end() : second.start()], flags=re.IGNORECASE)
        things = [re.match(r"[\s-]*(\w*)", prompt[word.end() :], re.IGNORECASE) for word in (first, second)]
        one_kind = len({thing[1].lower() for thing in things if thing}) == 1
        if _hue(first) != _hue(second) and not one_kind and not _JOINED.fullmatch(between):
            # From the right, so that positions on the left stay valid.
            yield _with_colour(_with_colour(prompt, second, first[0]), first, second[0])


def _other_counts(prompt: str) -> Iterator[str]:
    for word in _NUMBER.finditer(prompt):
        # The next lower number, except that two becomes three: "one" would need a singular.
        index = NUMBERS.index(word[0].lower())
        yield _replaced(prompt, word, NUMBERS[index - 1] if index else NUMBERS[1])


def _opposite_relations(prompt: str) -> Iterator[str]:
    for words in _RELATION.finditer(prompt):
        yield _replaced(prompt, words, OPPOSITES[" ".join(words[0].lower().split())])


def _with_colour(prompt: str, word: re.Match[str], colour: str) -> str:
    """Replace the colour `word` of a prompt, and fix the "a" or "an" before it."""
    changed = _replaced(prompt, word, colour.lower())
    article = "an" if colour[0].lower() in "aeiou" else "a"
    before = _ARTICLE.sub(lambda old: _cased(article, old[0]), changed[: word.start()])
    return before + changed[word.start() :]


def _replaced(prompt: str, old: re.Match[str], new: str) -> str:
    return prompt[: old.start()] + _cased(new, old[0]) + prompt[old.end() :]


def _cased(new: str, old: str) -> str:
    """Write `new` in the case of `old`: upper case, with a capital first letter, or lower case."""
    if old.isupper() and len(old) > 1:
        return new.upper()
    return new[0].upper() + new[1:] if old[0].isupper() else new


PAIR_TOLERANCE = 1e-5  # deviation of P(a ≻ b) + P(b ≻ a) from 1
BATCH_TOLERANCE = 1e-5  # relative to max(1, |score|): bound on rounding differences between batch sizes
TIMED_CALLS = 3
MAX_WORDS = 512  # length of the prompts that measure the prompt limit
GRADED_IMAGES = 4  # images whose gradients are checked: each costs 34 evaluations
# Steps of all pixels at once; small steps suffer from fp32 rounding, large steps from kinks and curvature.
STEP_SIZES = (1e-4, 3e-4, 1e-3, 1e-2)
GRADIENT_TOLERANCE = 5e-2  # relative error of the median slope
FLAT_SLOPE = 3e-5  # relative to the largest |score|: slopes below this are within the rounding of fp32 scores


@dataclass(frozen=True)
class CheckResult:
    """Result of one check: whether it passed (None: not applicable, or only reported), and the figure in one line."""

    name: str
    passed: bool | None
    detail: str


Outcome = tuple[bool | None, str]


def check_reward(
    reward: Reward, images: Tensor, prompts: Sequence[str], names: Sequence[str] | None = None
) -> list[CheckResult]:
    """Check a reward on images (N, 3, H, W) in [0, 1] and their N prompts: one result for each of CHECKS.

    names  checks to run, including the contract; None: all

    A reward that raises or breaks the contract fails the check with that message; if it cannot score the batch at all,
    the other checks are skipped. For a reward that is also a judge, the result of `check_judge` follows. Raises
    InputError for images or prompts of another form.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or not len(images):
        raise InputError(f"images to check a reward are floats (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if len(prompts) != len(images):
        raise InputError(f"a reward is checked with one prompt an image, got {len(prompts)} for {len(images)} images")
    results: list[CheckResult] = []
    for name, check in CHECKS.items():
        if names is not None and name not in names:
            continue
        outcome: Outcome = None, "skipped: the contract does not hold"
        if not results or results[0].passed:
            try:
                outcome = check(reward, images, prompts)
            except RewardError as error:
                outcome = False, " ".join(str(error).split())
        results.append(CheckResult(name, *outcome))
    if names is None and isinstance(reward, Judge):
        results.append(check_judge(reward, images, prompts))
    if names is None and (separation := getattr(reward, "separation", None)) is not None:  # from example images
        detail = f"leave-one-out AUC {separation:.2f}, the examples against the others (below 0.8: too alike)"
        results.append(CheckResult("examples", None, detail))
    return results


def check_judge(judge: Judge, images: Tensor, prompts: Sequence[str]) -> CheckResult:
    """Check P(a ≻ b) + P(b ≻ a) = 1, within PAIR_TOLERANCE, for each image a and the image b before it."""
    others = images.roll(1, 0)
    try:
        sums = compare_pairs(judge, images, others, prompts) + compare_pairs(judge, others, images, prompts)
    except RewardError as error:
        return CheckResult("both orders", False, " ".join(str(error).split()))
    difference = (sums - 1).abs().max().item()
    detail = f"P(a ≻ b) + P(b ≻ a) of {len(sums)} pairs differs from 1 by {difference:.2g} (at most {PAIR_TOLERANCE:g})"
    return CheckResult("both orders", difference <= PAIR_TOLERANCE, detail)


def _scores(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compute scores (N,) without gradients, on copies: a reward may write into its input or its returned tensor."""
    with torch.no_grad():
        return score(reward, images.clone(), list(prompts)).clone()


def _contract(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    scores = _scores(reward, images, prompts)
    return True, f"{len(scores)} finite scores, {scores.min().item():.4g} to {scores.max().item():.4g}"


def _determinism(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    first, second = (_scores(reward, images, prompts) for _ in range(2))
    return torch.equal(first, second), f"two calls differ by at most {(first - second).abs().max().item():.2g}"


def _batch_invariance(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    """Check that scores do not depend on the batch: max |r − r′| / max(1, |r|) within BATCH_TOLERANCE."""
    if len(images) < 2:
        return None, "needs two images"
    batched = _scores(reward, images, prompts)
    one_by_one = torch.cat([_scores(reward, images[k : k + 1], prompts[k : k + 1]) for k in range(len(images))])
    reversed_order = _scores(reward, images.flip(0), prompts[::-1]).flip(0)
    single, flipped = (
        ((other - batched).abs() / batched.abs().clamp(min=1)).max().item() for other in (one_by_one, reversed_order)
    )
    detail = f"one by one differs by {single:.2g}, reversed order by {flipped:.2g} (at most {BATCH_TOLERANCE:g})"
    return max(single, flipped) <= BATCH_TOLERANCE, detail


def _prompt_sensitivity(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    """Score each image with the next different prompt, or with a contrast if all prompts are equal."""
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
    """Report the declared `prompt_limit`, and measure after how many words the prompt no longer changes the score."""
    limit = getattr(reward, "prompt_limit", None)
    declared = f"reads {limit} tokens of a prompt, start and end included" if limit else "no limit is known"
    try:
        words = _readable_words(reward, images[:1])
    except RewardError:  # the reward only takes prompts of its own grammar
        return None, f"{declared}; not measured: it does not take the test's prompts"
    if words is None:
        return None, f"{declared}; the last of {MAX_WORDS} words still changes a score"
    return None, f"{declared}; measured: words behind the first {words} change no score" if words else declared


def _readable_words(reward: Reward, image: Tensor) -> int | None:
    """Return, by bisection, the number of words after which another word changes no score; None beyond MAX_WORDS."""

    def reads(count: int) -> bool:
        filler = " ".join(["picture"] * count)
        one, other = (_scores(reward, image, [f"{filler} {word}".strip()]) for word in ("red", "blue"))
        return not torch.equal(one, other)

    if not reads(0):
        return 0
    if reads(MAX_WORDS):
        return None
    low, high = 0, MAX_WORDS  # reads(low) holds, reads(high) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reads(middle) else (low, middle)
    return high


def _gradient(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    """Compare slopes along fixed random directions v, by the gradient and by central differences:

        ⟨∇r(x), v⟩  against  (r(x + hv) − r(x − hv)) / 2h

    The error of a slope is |difference| / the larger of the two slopes, at the best step h. The median over images and
    directions decides, because single slopes at kinks (ReLU, max) mean nothing.
    """
    points, texts = _inner_points(images[:GRADED_IMAGES]), list(prompts[:GRADED_IMAGES])
    if not reward.differentiable:
        return _no_gradient(reward, points, texts)
    gradient = _gradient_of_sum(reward, points, texts)
    if gradient is None:
        return False, "declares differentiable = True, but no gradient reaches the images"
    if not gradient.isfinite().all():
        return False, "the gradient has nan or inf"
    flat = FLAT_SLOPE * _scores(reward, points, texts).abs().max()
    errors: list[Tensor] = []
    for direction in _directions(points):
        slopes = (gradient * direction).sum((1, 2, 3)).cpu()
        measured = torch.stack([_difference(reward, points, texts, direction, step) for step in STEP_SIZES])
        larger = torch.maximum(measured.abs(), slopes.abs())
        steep = (slopes.abs() > flat) | (measured[-1].abs() > flat)
        errors.append(((measured - slopes).abs() / larger.clamp(min=1e-30)).amin(0)[steep])
    results = torch.cat(errors)
    if not len(results):
        return True, "flat: no slope to compare with the gradient, which is 0 too"
    typical = results.median().item()
    detail = f"off central differences by {typical:.2%} in the median of {len(results)} slopes"
    return typical < GRADIENT_TOLERANCE, f"{detail} (below {GRADIENT_TOLERANCE:.0%})"


def _no_gradient(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    try:
        if _gradient_of_sum(reward, images, prompts) is None:
            return True, "declared as not differentiable, and gives no gradient"
    except RewardError:  # such as .numpy() on images that require gradients
        return True, "declared as not differentiable, and raises for gradients"
    return False, "declares differentiable = False, but its scores carry gradients: declare True, or detach them"


def _inner_points(images: Tensor) -> Tensor:
    """Shrink fp32 images into (0, 1), so that steps stay inside, and dither: equal pixels lie on kinks of a max."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    return 0.03 + 0.9 * images.float() + 0.04 * noise


def _gradient_of_sum(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor | None:
    """Differentiate the sum of the scores by the images; None if no gradient reaches them."""
    pixels = images.clone().requires_grad_()
    with torch.enable_grad():
        # Times 1: a reward may write into its input, and autograd does not allow this for leaf tensors.
        total = score(reward, pixels * 1, list(prompts)).sum()
    if not total.requires_grad:
        return None
    try:
        (gradient,) = torch.autograd.grad(total, pixels, allow_unused=True)
    except RuntimeError as error:
        raise RewardError(f"reward {reward.name!r} has no gradient: {error}") from error
    return gradient


def _directions(images: Tensor) -> list[Tensor]:
    """Draw two directions of single pixels and two of patches, ±1 each, to test fine and coarse gradients."""
    generator, (count, _, height, width) = torch.Generator().manual_seed(1), images.shape
    grids = [(height, width), (height, width), (4, 4), (4, 4)]
    signs = (torch.randint(0, 2, (count, 3, *grid), generator=generator).float() * 2 - 1 for grid in grids)
    return [F.interpolate(some, size=(height, width), mode="nearest").to(images.device) for some in signs]


def _difference(reward: Reward, images: Tensor, prompts: Sequence[str], direction: Tensor, step: float) -> Tensor:
    higher, lower = (_scores(reward, images + sign * step * direction, prompts) for sign in (1, -1))
    return (higher - lower) / (2 * step)


def _images_unmodified(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    given = images.clone()
    with torch.no_grad():
        score(reward, given, list(prompts))
    return torch.equal(given, images), f"a pixel changes by at most {(given - images).abs().max().item():.2g}"


def _throughput(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    seconds = []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        _scores(reward, images, prompts)  # returns on the CPU, so the GPU has finished
        seconds.append(time.perf_counter() - start)
    rate = len(images) / median(seconds)
    height, width = images.shape[2:]
    return True, f"{rate:,.4g} images/s of {width} × {height} in batches of {len(images)}"


def _memory(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Outcome:
    """Report the peak memory of one call: the GPU's peak, or on the CPU the growth of the process's peak."""
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        _scores(reward, images, prompts)
        peak = torch.cuda.max_memory_allocated(images.device) - before
        return None, f"one call on {len(images)} images takes {peak / 2**20:,.0f} MiB more of the GPU"
    if resource is None:
        return None, "not measured on this system"
    unit = 2**20 if sys.platform == "darwin" else 2**10
    before, _, after = _peak(), _scores(reward, images, prompts), _peak()
    return None, f"peak of this process {after / unit:,.0f} MiB, {(after - before) / unit:,.0f} more by the last call"


def _peak() -> int:
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


CHECKS: dict[str, Callable[[Reward, Tensor, Sequence[str]], Outcome]] = {
    "contract": _contract,
    "determinism": _determinism,
    "batch invariance": _batch_invariance,
    "prompt sensitivity": _prompt_sensitivity,
    "prompt limit": _prompt_limit,
    "gradient": _gradient,
    "images unmodified": _images_unmodified,
    "throughput": _throughput,
    "memory": _memory,
}
