"""Where a proxy and the truth part: best-of-n on one proxy, judged by the exact reward, as n grows."""

import math
from collections.abc import Mapping, Sequence
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
from steer.reward import load_reward, score

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH = 256
PROXIES = {
    "one member": "preference:scenes,member=0",
    "mean of 4": "preference:scenes",
    "worst of 4": "preference:scenes,aggregate=min",
    "mean − std of 4": "preference:scenes,aggregate=mean-std",
    "clip:scenes": "clip:scenes",
}
COLOURS = ("#832db6", "#e76300", "#3f90da", "#a96b59", "#94a4a2")


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


def curves(folder: Path, proxies: Mapping[str, str]) -> dict[str, Any]:
    """For every proxy and n: its own standardised score and the exact reward of the image that it picks, [mean, low,
    high] over prompts. The samples are files of `python -m steer.apps.scenes many`."""
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    gold = torch.tensor([row["gold"] for row in rows]).view(len(prompts), -1)
    found: dict[str, Any] = {"prompts": len(prompts), "images": gold.shape[1], "n": list(SIZES), "proxies": {}}
    found["kl"] = [round(kl_of_best_of_n(n), 3) for n in SIZES]
    for name, spec in {"gold": "", **proxies}.items():
        proxy = _scores(spec, rows).view_as(gold) if spec else gold
        standard = (proxy - proxy.mean()) / proxy.std()
        right = (gold == 1).float()
        found["proxies"][name] = {
            "reward": spec or "scene",
            "proxy": [interval(expected_best(proxy, standard, n).float()) for n in SIZES],
            "gold": [interval(expected_best(proxy, gold, n).float()) for n in SIZES],
            "right": [interval(expected_best(proxy, right, n).float()) for n in SIZES],
        }
    return found


@torch.no_grad()
def _scores(spec: str, rows: Sequence[dict[str, Any]]) -> Tensor:
    reward, scores = load_reward(spec), []
    for start in tqdm(range(0, len(rows), BATCH), desc=spec, leave=False, disable=None):
        some = rows[start : start + BATCH]
        images = torch.stack([read_image(row["image"]) for row in some])
        scores.append(score(reward, images, [row["prompt"] for row in some]))
    return torch.cat(scores)


def draw_curves(found: dict[str, Any], path: Path) -> None:
    """Left what each proxy says of the image that it picks, right what the exact reward says."""
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    titles = {"proxy": "what the proxy says (its own standard deviations)", "gold": "what is true (exact reward)"}
    for axes, (field, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        proxies = [name for name in found["proxies"] if not (field == "proxy" and name == "gold")]
        for name in proxies:
            colour = INK if name == "gold" else COLOURS[[p for p in found["proxies"] if p != "gold"].index(name)]
            mean, low, high = zip(*found["proxies"][name][field], strict=True)
            label = "picked by the exact reward" if name == "gold" else name
            axes.plot(
                found["n"],
                mean,
                color=colour,
                lw=1.6,
                ls=":" if name == "gold" else "-",
                marker="o",
                ms=3.5,
                label=label,
            )
            axes.fill_between(found["n"], low, high, color=colour, alpha=0.08, lw=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(found["n"], [str(n) for n in found["n"]])
        axes.set_xlabel("n of best-of-n", color=INK)
        axes.set_title(title, size=10, loc="left", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.grid(color=FAINT, alpha=0.3)
    figure.axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path)
