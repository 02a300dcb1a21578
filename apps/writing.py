"""`steer rewards write`: a grid of the candidates' preferred images, ranking in the terminal, distillation."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import Tensor

from steer.apps.learning import run_reward_training
from steer.apps.learning import summary as training_summary
from steer.apps.plots import save_figure
from steer.apps.scoring import images_with_prompts, load_batch, score_all
from steer.errors import InputError
from steer.files import make_folder, write_text
from steer.rewards.parser import load_judge
from steer.rewards.sandbox import SandboxReward
from steer.rewards.training_config import RewardTrainingConfig
from steer.rewards.vlm import endpoint
from steer.rewards.writing import (
    Candidate,
    Rank,
    WritingSettings,
    as_record,
    rank_by_judge,
    summary,
    write_rewards,
)

SHOWN = 4  # best and worst images shown for a candidate
MAX_IMAGES = 64


def draw_candidates(candidates: Sequence[Candidate], images: Tensor, path: Path) -> Path:
    """Draw a PNG with a row for each candidate: the images that it scores highest and lowest."""
    from matplotlib.figure import Figure

    shown = min(SHOWN, len(images) // 2)
    figure = Figure(figsize=(1.2 * (2 * shown + 1), 1.3 * len(candidates) + 0.4), dpi=110)
    axes = figure.subplots(len(candidates), 2 * shown + 1, squeeze=False)
    for k, (row, one) in enumerate(zip(axes, candidates, strict=True), 1):
        order = one.order()
        row[0].text(0.5, 0.5, f"{k}", size=22, ha="center", va="center")
        for axis, image in zip(row[1:], [*order[:shown], *order[-shown:]], strict=True):
            axis.imshow(images[image].permute(1, 2, 0).clamp(0, 1).cpu().numpy())
        for axis in row:
            axis.axis("off")
    axes[0][1].set_title("highest scores", loc="left", size=10)
    axes[0][1 + shown].set_title("lowest scores", loc="left", size=10)
    return save_figure(figure, path)


def rank_in_terminal(images: Tensor, folder: Path) -> Rank:
    """Return a ranking that a person types after viewing the grid of each iteration."""
    iterations = iter(range(1, 10_000))

    def rank(candidates: Sequence[Candidate]) -> list[int]:
        click.echo(f"look at {draw_candidates(candidates, images, folder / f'iteration-{next(iterations)}.png')}")
        while True:
            text = click.prompt(f"order of the rows 1 to {len(candidates)}, best first", default="1")
            given = [int(number) - 1 for number in re.findall(r"\d+", text)]
            if len(set(given)) == len(given) and set(given) <= set(range(len(candidates))):
                return given + [k for k in range(len(candidates)) if k not in given]
            click.echo("name each row once, such as: 3 1 2; rows that are left out come last")

    return rank


def run_writing(
    goal: str,
    chat: str,
    chat_model: str,
    images: Path,
    prompt: str | None,
    judge: str | None,
    settings: WritingSettings,
    out: Path,
    work: Path,
) -> None:
    """Run all iterations, and write the best reward to `out` after each. Raises InputError, RewardError.

    Replies are cached by the client: the same command resumes without new requests.
    """
    if out.suffix != ".py":
        raise InputError(f"--out {out}: the reward is a Python file, such as my_reward.py")
    client = endpoint(chat, model=chat_model)
    batch, texts = load_batch(*images_with_prompts(images, prompt), MAX_IMAGES)
    make_folder(work)
    rank = rank_by_judge(load_judge(judge), goal, batch) if judge else rank_in_terminal(batch, work)
    with torch.no_grad():
        for one in write_rewards(goal, client, batch, texts, rank, settings):
            write_text(work / f"iteration-{one.number}.json", json.dumps(as_record(one), indent=1) + "\n")
            write_text(out, one.candidates[0].code)
            click.echo(summary(one))
    click.echo(f"{client.cost}\n→ {out}; use it as --reward sandbox:{out}")


def distil(code: Path, images: Path, prompt: str | None, backbone: str, out: Path, work: Path, device: str) -> None:
    """Train a head on a CLIP to predict the scores of a written reward on all images of a folder.

    The result in `out` is differentiable and needs no child process; a run in `work` resumes.
    """
    paths, prompts = images_with_prompts(images, prompt)
    scores = score_all(SandboxReward(str(code)), paths, prompts)
    make_folder(work)
    table = work / "scores.jsonl"
    rows = [
        json.dumps({"image": str(path.resolve()), "prompt": text, "rating": value})
        for path, text, value in zip(paths, prompts, scores.tolist(), strict=True)
    ]
    write_text(table, "\n".join(rows) + "\n")
    config = RewardTrainingConfig(backbone, objective="rating")
    report = run_reward_training(table, config, out, work / "training", device)
    click.echo(f"{training_summary(report)}\n→ {out}; use it as --reward {out}")
