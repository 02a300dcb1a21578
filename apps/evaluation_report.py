"""What an evaluation leaves to be read: evaluation.json, evaluation.md, and its pictures."""

import json
import math
from collections.abc import Sequence

from steer.apps.evaluation_grid import draw_images
from steer.apps.evaluation_plots import draw_costs, draw_rewards, draw_tasks, labels
from steer.apps.evaluation_store import Json, Store
from steer.staged import write_text

MOST = 6  # decimals: beyond, fp32 has none to tell
LETTERS = 48  # of a name in a terminal


def write_report(report: Json, store: Store, shown: Sequence[int]) -> None:
    """Writes evaluation.json, evaluation.md and the pictures. Raises OSError.

    shown  places of the prompts in the grid of images
    """
    out = store.out
    write_text(out / "evaluation.json", json.dumps(report, ensure_ascii=False) + "\n")
    pictures = {
        "Rewards": draw_rewards(report, out),
        "By task": draw_tasks(report, out),
        "Rewards and costs": draw_costs(report, out),
        "Images": draw_images(report, store, shown),
    }
    drawn = [f"![{title}]({path.name})" for title, path in pictures.items() if path is not None]
    write_text(out / "evaluation.md", "\n\n".join([*markdown(report), *drawn]) + "\n")


def markdown(report: Json) -> list[str]:
    """The tables: rewards, against the first contender, by task, the rest."""
    prompts, seeds, rewards = report["prompts"], report["seeds"], report["rewards"]
    about = (
        f"{_count(len(prompts), 'prompt')}, {_count(seeds, 'seed')} each; {rewards[0]} steers and picks. In brackets: "
        "95 % bootstrap intervals over prompts."
    )
    sections = ["# Evaluation", about, _means(report)]
    if len(report["contenders"]) > 1:
        sections += [f"## Against {_code(report['contenders'][0]['name'])}", _against(report)]
    if report["contenders"][0]["tasks"] is not None:
        sections += [f"## By task: {rewards[0]} of the picked image", _tasks(report)]
    return [*sections, "## Diversity, KL, cost of a run", _rest(report), *_remarks(report)]


def summary(report: Json) -> str:
    """The most important columns, for a terminal."""
    name = report["rewards"][0]
    rows = [["", f"{name}, picked image", "wins", "evaluations", "seconds"]]
    for called, one in zip(labels(report["contenders"]), report["contenders"], strict=True):
        told, cost = one["rewards"][name], one["cost"]
        won = span(told["wins"]) if "wins" in told else ""
        short = called if len(called) <= LETTERS else f"…{called[1 - LETTERS :]}"
        rows.append([short, span(told["picked"]), won, f"{cost['nfe']:.4g}", f"{cost['seconds']:.3g}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def span(values: Sequence[float]) -> str:
    """[mean, low, high] as "0.300 [0.200, 0.400]": three digits of the largest."""
    largest = max(map(abs, values))
    decimals = min(max(2 - math.floor(math.log10(largest)), 0), MOST) if largest else 2
    mean, low, high = (f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−") for value in values)
    return f"{mean} [{low}, {high}]"


def _means(report: Json) -> str:
    several = any(one["particles"] > 1 for one in report["contenders"])
    columns = [f"{name}{part}" for name in report["rewards"] for part in ((", picked", ", all") if several else ("",))]
    rows = []
    for one in report["contenders"]:
        told = [one["rewards"][name] for name in report["rewards"]]
        cells = [span(values[part]) for values in told for part in (("picked", "all") if several else ("picked",))]
        rows.append([_code(one["name"]), str(one["particles"]), *cells])
    return _table(["", "images", *columns], rows)


def _against(report: Json) -> str:
    columns = [f"{name}, {part}" for name in report["rewards"] for part in ("difference", "wins")]
    rows = []
    for one in report["contenders"][1:]:
        told = [one["rewards"][name] for name in report["rewards"]]
        rows.append([_code(one["name"]), *(span(values[part]) for values in told for part in ("difference", "wins"))])
    return _table(["picked image", *columns], rows)


def _tasks(report: Json) -> str:
    name, contenders = report["rewards"][0], report["contenders"]
    header = [f"{tag} ({told['prompts']})" for tag, told in contenders[0]["tasks"].items()]
    rows = []
    for one in contenders:
        rows.append([_code(one["name"]), *(span(told["rewards"][name]["picked"]) for told in one["tasks"].values())])
    return _table(["", *header], rows)


def _rest(report: Json) -> str:
    rows = []
    for one in report["contenders"]:
        kl, cost = one.get("kl") or {}, one["cost"]
        diverse = span(one["diversity"]) if one["diversity"] else "–"
        spent = [f"{cost[what]:.3g}" for what in ("decodes", "reward_calls", "gradients", "seconds")]
        far = span(kl["nats"]) if "nats" in kl else "–"
        rows.append([_code(one["name"]), diverse, far, f"{cost['nfe']:.6g}", *spent])
    header = ["", "diversity", "KL, nats", "evaluations", "decodes", "images scored", "gradients", "seconds"]
    return _table(header, rows)


def _remarks(report: Json) -> list[str]:
    """What a reader must know beside the numbers."""
    found: dict[str, list[str]] = {}
    for one in report["contenders"]:
        name, kl = _code(one["name"]), one.get("kl") or {}
        if "skipped" in kl:
            found.setdefault(f"no KL, because {kl['skipped']}", []).append(name)
        elif "eta" in kl:
            about = f"KL is that of {_count(len(kl['by_prompt']), 'trajectory')} with η = {kl['eta']:g}"
            found.setdefault(about, []).append(name)
        if one["stopped"]:
            about = f"{_count(one['stopped'], 'run')} ended before the last iteration, with the best so far"
            found.setdefault(about, []).append(name)
    lines = [f"- {', '.join(names)}: {about.rstrip('.')}." for about, names in found.items()]
    if len(report["prompts"]) == 1:
        lines.append("- One prompt has no interval.")
    return ["\n".join(lines)] if lines else []


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _code(name: str) -> str:
    return f"`{name}`"


def _count(count: int, thing: str) -> str:
    plural = f"{thing[:-1]}ies" if thing.endswith("y") else f"{thing}s"
    return f"{count} {thing if count == 1 else plural}"
