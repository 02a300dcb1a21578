"""Where a proxy and the truth part: best-of-n on one proxy, judged by the exact reward, as n grows."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from steer.apps.pictures import FAINT, INK
from steer.apps.scenes.evaluate import interval
from steer.images import read_image
from steer.reward import load_reward, score_parts
from steer.rewards.aggregate import mean, mean_minus_std, worst

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH = 256
OTHERS = ("preference:scenes", "clip:scenes")
COLOURS = ("#832db6", "#e76300", "#3f90da", "#a96b59", "#bd1f01", "#94a4a2")


def kl_of_best_of_n(n: int) -> float:
    """An upper bound of the KL from the base model, nats: log n − (n − 1)/n (arXiv 2204.05862, 2401.01879)."""
    return math.log(n) - (n - 1) / n


def expected_best(proxy: Tensor, value: Tensor, n: int) -> Tensor:
    """E[value of the image that the proxy likes best among n], for each prompt (P,), over all n-subsets of M images.

    The k-th of M images, worst first, is the best of a random n-subset with probability C(k−1, n−1) / C(M, n): an
    unbiased estimate from one sample of M (arXiv 2112.09332, appendix I). proxy, value: (P, M).
    """
    total = proxy.shape[1]
    order = proxy.argsort(dim=1, stable=True)
    ranks = torch.arange(1, total + 1, dtype=torch.float64)
    log_chance = _log_choose(ranks - 1, n - 1) - _log_choose(torch.tensor(float(total)), n)
    chance = torch.where(ranks >= n, log_chance.exp(), 0.0)
    return (value.double().gather(1, order) * chance).sum(1)


def _log_choose(n: Tensor, k: int) -> Tensor:
    """log C(n, k), fp64; where n < k a number that nobody reads."""
    n = n.double().clamp(min=k)
    return torch.lgamma(n + 1) - math.lgamma(k + 1) - torch.lgamma(n - k + 1)


def curves(folder: Path, ensemble: str, others: Sequence[str] = OTHERS) -> dict[str, Any]:
    """For every proxy and n: its own standardised score and the exact reward of the image that it picks, [mean, low,
    high] over prompts. "one member" is the mean over the members of what each would pick alone.

    folder    files of `python -m steer.apps.scenes many`
    ensemble  a learned reward of several members
    """
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    gold = torch.tensor([row["gold"] for row in rows]).view(len(prompts), -1)
    members = torch.stack([*_scores(ensemble, rows)[1].values()])
    proxies = {
        "picked by the exact reward": [gold],
        "one member": [*members],
        f"mean of {len(members)}": [mean(members)],
        f"worst of {len(members)}": [worst(members)],
        f"mean − std of {len(members)}": [mean_minus_std(members)],
        **{spec: [_scores(spec, rows)[0]] for spec in others},
    }
    return {
        "prompts": len(prompts),
        "images": gold.shape[1],
        "ensemble": ensemble,
        "n": list(SIZES),
        "kl": [round(kl_of_best_of_n(n), 3) for n in SIZES],
        "proxies": {name: _curve([proxy.view_as(gold) for proxy in some], gold) for name, some in proxies.items()},
        "against_one_member": {
            name: [interval((_picked(some, gold, n) - _picked(proxies["one member"], gold, n)).float()) for n in SIZES]
            for name, some in proxies.items()
        },
        "members": _disagreement(members.view(-1, *gold.shape)),
    }


def _picked(proxies: Sequence[Tensor], gold: Tensor, n: int) -> Tensor:
    """The exact reward (P,) of what proxies of one kind pick, on average."""
    return torch.stack([expected_best(proxy.view_as(gold), gold, n) for proxy in proxies]).mean(0)


def _disagreement(members: Tensor) -> dict[str, float]:
    """Of members' scores (K, P, M): by how much they differ about a prompt, and about an image beside that."""
    prompts = members.mean(2, keepdim=True)
    return {
        "std_of_prompt_means": round(prompts.std(0).mean().item(), 3),
        "std_within_prompts": round((members - prompts).std(0).mean().item(), 3),
    }


def _curve(proxies: Sequence[Tensor], gold: Tensor) -> dict[str, list[list[float]]]:
    """What proxies (P, M) of one kind, on average, say of their picks, and what is true of them."""
    own = [(proxy - proxy.mean()) / proxy.std() for proxy in proxies]
    values = {"proxy": own, "gold": [gold] * len(own), "right": [(gold == 1).float()] * len(own)}
    return {
        field: [
            interval(torch.stack([expected_best(p, v, n) for p, v in zip(proxies, some, strict=True)]).mean(0).float())
            for n in SIZES
        ]
        for field, some in values.items()
    }


@torch.no_grad()
def _scores(spec: str, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a reward and of its parts, (N,) each."""
    reward, scored = load_reward(spec), []
    for start in tqdm(range(0, len(rows), BATCH), desc=spec, leave=False, disable=None):
        some = rows[start : start + BATCH]
        images = torch.stack([read_image(row["image"]) for row in some])
        scored.append(score_parts(reward, images, [row["prompt"] for row in some]))
    totals, parts = zip(*scored, strict=True)
    return torch.cat(totals), {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def draw_curves(found: dict[str, Any], path: Path) -> None:
    """Left what each proxy says of the image that it picks, right what the exact reward says."""
    figure = Figure(figsize=(10.5, 4.3), dpi=120, layout="constrained")
    oracle, *proxies = found["proxies"]
    titles = {"proxy": "what the proxy says (its own standard deviations)", "gold": "what is true (exact reward)"}
    for axes, (field, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, colour in zip(proxies, COLOURS, strict=True):
            mean_, low, high = zip(*found["proxies"][name][field], strict=True)
            axes.plot(found["n"], mean_, color=colour, lw=1.7, marker="o", ms=3.5, label=name)
            axes.fill_between(found["n"], low, high, color=colour, alpha=0.07, lw=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(found["n"], [str(n) for n in found["n"]])
        axes.set_xlabel("n of best-of-n", color=INK)
        axes.set_title(title, size=10, loc="left", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.grid(color=FAINT, alpha=0.3)
    best = [value for value, _, _ in found["proxies"][oracle]["gold"]]
    figure.axes[1].plot(found["n"], best, color=INK, lw=1.2, ls=":", label=oracle)
    figure.axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)
