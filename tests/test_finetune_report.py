"""Pictures and model card of a finetuning: what they show is what the records hold."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROMPT, cached_pipe, call_kwargs
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from PIL import Image
from rollouts import fresh_pipe, move
from torch import Generator, Tensor

import steer
from steer import D3POConfig, DPOConfig, GRPOConfig, NFTConfig, PRDPConfig, PRDPTrainer, TrainingConfig, TrainingResult
from steer.apps import finetune_report as grids
from steer.apps import finetune_report as report
from steer.apps import plots
from steer.apps.finetune_report import write_grid, write_report
from steer.apps.finetuning import METHODS
from steer.pipelines.training import model_card as cards
from steer.pipelines.training.evaluation import EvalResult
from steer.pipelines.training.trainer import Trainer
from steer.training.trainable import FullFinetuning, LoRA

AWKWARD = "a_b*c* | [d](e) `f` <g> $1 & $2"
ABOUT = {"model": "org/base", "method": "prdp", "reward": "r", "output_dir": "/home/me/x"}
CONFIG = PRDPConfig(beta=0.03, output_dir="/home/me/x")


def records(count: int) -> tuple[dict[str, Any], ...]:
    """As PRDP makes them; every other one without a pair, and images drawn for every other one."""
    collected = []
    for step in range(1, count + 1):
        one = {"step": step, "loss": 1 / step, "reward": step / 7, "accuracy": math.nan if step % 2 else 0.6}
        one |= {"kl": step * 0.123456, "kl_weight": 0.0, "grad_norm": 2.0, "seconds": 30.0}
        collected.append(one | ({"images_per_second": 3.0} if step % 2 else {}))
    return tuple(collected)


def evaluations(*steps: int, names: tuple[str, ...] = ("r", "s")) -> tuple[dict[str, Any], ...]:
    def described(step: int, place: int) -> list[float]:
        return [place + step / 37, place + step / 37 - 0.1234, place + step / 37 + 0.4321]

    return tuple(
        {"step": step, **{f"eval/{name}": described(step, i) for i, name in enumerate(names)}, "eval/diversity": 0.2}
        for step in steps
    )


def result_of(count: int = 12, *steps: int, best: int | None = None, **changed: Any) -> TrainingResult:
    collected = TrainingResult(count, None, None, best, records(count), evaluations(*steps))
    return replace(collected, **changed)


def evaluated(step: int, prompts: int, drawn: int, *shape: int) -> EvalResult:
    generator = Generator().manual_seed(step)
    texts = tuple(f"prompt {number}" for number in range(prompts))
    rewards = {name: torch.rand(prompts, drawn, generator=generator) for name in ("r", "s")}
    return EvalResult(step, texts, rewards, 0.2, torch.rand(prompts * drawn, *shape, generator=generator))


def pixels(image: Tensor) -> np.ndarray:
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def cell(path: Path, number: int) -> np.ndarray:
    described = grids.read_grid(path)
    assert described is not None
    return np.asarray(Image.open(path).convert("RGB").crop(tuple(described["boxes"][number])))


def card_of(
    out: Path,
    result: TrainingResult,
    about: dict[str, Any] | None = None,
    config: TrainingConfig = CONFIG,
    pipe: Any = None,
) -> str:
    """The card alone, without the pictures, which take seconds."""
    out.mkdir(exist_ok=True)
    card = cards.model_card(out, pipe or cached_pipe("sd"), config, result, ABOUT | (about or {}))
    (out / "README.md").write_text(card)
    return card


def report_of(out: Path, result: TrainingResult, **changed: Any) -> None:
    """The report of a run that had this result."""
    config = replace(CONFIG, output_dir=str(out), **changed)
    write_report(PRDPTrainer(cached_pipe("sd"), "brightness", config, run_config=ABOUT), result)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingResult]:
    """A report of a whole run."""
    out = tmp_path_factory.mktemp("run")
    for step in (0, 6, 12):
        write_grid(evaluated(step, 3, 2, 3, 16, 16), out, 2)
    result = result_of(12, 0, 6, 12, best=6, stopped="why | not", weights=out / "final" / "unet", weights_step=12)
    report_of(out, result, lora_rank=0, eta=1.0, kl_budget_nats=3.0)
    return out, result


# Grids.


def test_a_grid_shows_each_prompts_own_image_and_rewards(tmp_path: Path) -> None:
    collected = evaluated(20, 3, 2, 3, 64, 64)
    path = write_grid(collected, tmp_path, 2)
    assert path == tmp_path / "samples" / "step-000020.png"
    described = grids.read_grid(path)
    assert described is not None and described["step"] == 20 and described["rewards"] == ["r", "s"]
    assert [one["prompt"] for one in described["cells"]] == [f"prompt {number // 2}" for number in range(6)]
    for number in range(6):
        place, k = divmod(number, 2)
        assert described["cells"][number]["rewards"] == [
            collected.rewards[name][place, k].item() for name in ("r", "s")
        ]
        # The picture itself, enlarged by a whole factor, pixel for pixel.
        assert np.array_equal(cell(path, number), pixels(collected.images[number]).repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize(("prompts", "drawn", "samples", "shown"), [(60, 4, 1, 24), (10, 4, 4, 24), (5, 2, 9, 10)])
def test_few_enough_evenly_spaced_and_the_same_at_every_step(
    prompts: int, drawn: int, samples: int, shown: int, tmp_path: Path
) -> None:
    paths = [write_grid(evaluated(step, prompts, drawn, 3, 8, 8), tmp_path, samples) for step in (0, 20)]
    collected = [[one["prompt"] for one in (grids.read_grid(path) or {})["cells"]] for path in paths]
    assert collected[0] == collected[1] and len(collected[0]) == shown
    numbers = sorted({int(prompt.split()[1]) for prompt in collected[0]})
    gaps = np.diff(numbers)
    assert numbers[0] == 0 and numbers[-1] == prompts - 1 and gaps.max() - gaps.min() <= 1
    assert Image.open(paths[0]).width == 6 * 206 + 14


def test_large_pictures_are_scaled_down_and_of_videos_the_middle_is_shown(tmp_path: Path) -> None:
    large = torch.zeros(1, 3, 1024, 512)
    large[:, 0] = 1
    path = write_grid(replace(evaluated(0, 1, 1, 3, 8, 8), images=large), tmp_path, 1)
    assert np.array_equal(cell(path, 0), np.full((192, 96, 3), (255, 0, 0)))
    video = torch.arange(5).view(1, 5, 1, 1, 1).expand(1, 5, 3, 32, 64) / 5
    path = write_grid(replace(evaluated(1, 1, 1, 3, 8, 8), images=video), tmp_path, 1)
    assert np.array_equal(cell(path, 0), np.full((96, 192, 3), 102))  # 2/5 of 255


def test_captions_fit_and_dollars_are_no_mathematics() -> None:
    assert plots.wrap_caption("short") == ["short"]
    lines = plots.wrap_caption("word " * 40)
    assert len(lines) == 2 and max(map(len, lines)) <= 30 and lines[1].endswith("…")
    assert plots.format_rewards([-0.5, 1.23456]) == "−0.5 · 1.23"


@pytest.mark.few(1)
def test_before_and_after_hold_the_first_and_the_last_grid(described: tuple[Path, TrainingResult]) -> None:
    out, _ = described
    whole = np.asarray(Image.open(out / "plots" / "before-after.png").convert("RGB"))
    rows = []
    for step in (0, 12):
        image = cell(out / "samples" / f"step-{step:06d}.png", 0)
        here = [
            top
            for top in range(len(whole) - len(image) + 1)
            if np.array_equal(whole[top : top + len(image), 106 : 106 + image.shape[1]], image)
        ]
        assert len(here) == 1, step
        rows += here
    assert rows[0] < rows[1]
    middle = cell(out / "samples" / "step-000006.png", 0)
    assert not any(np.array_equal(whole[top : top + len(middle), 106 : 106 + middle.shape[1]], middle) for top in rows)


def test_grids_of_other_prompts_are_not_compared(tmp_path: Path) -> None:
    write_grid(evaluated(0, 3, 1, 3, 8, 8), tmp_path, 1)
    assert grids.draw_before_after(tmp_path) is None
    write_grid(evaluated(9, 4, 1, 3, 8, 8), tmp_path, 1)
    assert grids.draw_before_after(tmp_path) is None


# Plots.


def panels(listed: list[Callable[..., None]]) -> dict[str, Any]:
    """Axes by title, drawn as in a report."""
    collected = {}
    for panel in listed:
        axes = Figure().subplots()
        panel(axes)
        collected[axes.get_title(loc="left")] = axes
    return collected


def test_the_curves_are_the_records() -> None:
    result = result_of(12, 0, 6, 12, best=6)
    drawn = panels(report.rewards_panels(result))
    assert list(drawn) == ["reward that was trained: r", "held-out reward: s", "held out against trained, by updates"]
    lines = {line.get_label(): line.get_xydata() for line in drawn["reward that was trained: r"].lines}
    assert np.allclose(lines["training samples"], [(one["step"], one["reward"]) for one in result.records])
    assert np.allclose(lines["moving mean of 5"], [(step, step / 7) for step in range(3, 11)])  # of a straight line
    assert np.allclose(lines["held-out prompts"], [(one["step"], one["eval/r"][0]) for one in result.evaluations])
    assert np.allclose(lines["best: 6 updates"][:, 0], 6)
    held_out = drawn["held-out reward: s"]
    band = held_out.collections[0].get_paths()[0].vertices
    for one in result.evaluations:
        at = band[band[:, 0] == one["step"], 1]
        assert np.allclose((at.min(), at.max()), one["eval/s"][1:])
    path = drawn["held out against trained, by updates"]
    assert np.allclose(path.lines[0].get_xydata(), [(one["eval/r"][0], one["eval/s"][0]) for one in result.evaluations])
    assert [text.get_text() for text in path.texts] == ["0", "12", "6, best"]


def test_only_recorded_metrics_are_drawn() -> None:
    plain = result_of(3)
    assert list(panels(report.rewards_panels(plain))) == ["reward that was trained"]
    assert list(panels(report.divergence_panels(plain, {}))) == ["KL from the start, nats a trajectory"]
    assert [title.split(",")[0] for title in panels(report.training_panels(plain))] == [
        "loss",
        "pairs ordered rightly",
        "gradient norm",
        "images per second",
    ]
    no_pairs = result_of(1)  # its accuracy is NaN
    assert "pairs ordered rightly, share" not in panels(report.training_panels(no_pairs))
    single = replace(result_of(3), evaluations=tuple(one | {"eval/diversity": 0.0} for one in evaluations(0, 3)))
    assert list(panels(report.divergence_panels(single, {}))) == ["KL from the start, nats a trajectory"]
    priced = replace(result_of(3, 0, 3), records=tuple(one | {"kl_weight": 0.1} for one in records(3)))
    assert list(panels(report.divergence_panels(priced, {})))[1:] == [
        "price of KL, β",
        "diversity of a prompt's images, 0 to 1",
    ]


@pytest.mark.parametrize("options", [{}, {"eval_steps": 25}, {"kl_every": 100}, {"max_steps": 67}])
def test_every_evaluation_has_a_kl(options: dict[str, int], tmp_path: Path) -> None:
    """With the KL of the updates that log it: a point of the √KL panel for each evaluation, and no gap in the card."""
    config = GRPOConfig(**options)
    last = config.max_steps
    steps = sorted({*range(0, last, config.eval_steps), last})
    result = result_of(last, *steps, best=steps[-2])
    logged = [step for step in range(1, last + 1) if config.logs_divergence(step - 1)]
    assert len(logged) <= (last // config.kl_every) + len(steps)
    result = without_kl(result, *logged)
    kl, gains = report.reward_gains(result, "s")
    assert kl.tolist() == pytest.approx([0.123456 * step for step in steps[1:]]) and len(gains) == len(kl)
    (axes,) = panels(report.overoptimization_panels(result)).values()
    assert len(axes.lines[0].get_xdata()) == len(steps) - 1
    row = next(line for line in card_of(tmp_path, result, config=config).splitlines() if line.startswith("| KL"))
    assert "–" not in row


@pytest.mark.parametrize(("budget", "drawn"), [(1.0, "budget: 1 nats"), (1000.0, "budget: 1000 nats, above")])
def test_a_budget_does_not_flatten_the_curve(budget: float, drawn: str) -> None:
    (axes,) = panels(report.divergence_panels(result_of(12), {"kl_budget_nats": budget})).values()
    assert drawn in axes.get_legend_handles_labels()[1] and axes.get_ylim()[1] < 3


def test_nan_and_overflow_leave_gaps() -> None:
    described = [{"step": 1, "loss": math.inf}, {"step": 2, "loss": 3.0}, {"step": 3}, {"step": 4, "loss": math.nan}]
    steps, values = report._series(described, "loss")
    assert steps.tolist() == [2] and values.tolist() == [3]


@pytest.mark.parametrize(("count", "steps", "files"), [(0, (), 0), (1, (0, 1), 3)])
def test_one_update_and_none(count: int, steps: tuple[int, ...], files: int, tmp_path: Path) -> None:
    """Interrupted early, with and without evaluations; outdated figures are deleted."""
    (tmp_path / "plots").mkdir()
    for name in ("rewards", "divergence", "training"):
        (tmp_path / "plots" / f"{name}.png").touch()
    report_of(tmp_path, result_of(count, *steps, stopped="interrupted"))
    text = (tmp_path / "README.md").read_text()
    assert f"interrupted at update {count}" in text and "```python" not in text
    collected = sorted((tmp_path / "plots").iterdir())
    assert len(collected) == files == text.count("](plots/")
    assert all(Image.open(path).size[0] >= 500 for path in collected)


def test_without_evaluations_the_training_samples_are_reported(tmp_path: Path) -> None:
    text = card_of(tmp_path, result_of(7))
    assert "0.1429 in update 1, 1 in update 7" in text and "0.8642 nats" in text and "\n|" not in text


def without_kl(result: TrainingResult, *measured: int) -> TrainingResult:
    """A result whose records have a KL at the measured updates alone."""
    kept = [{k: v for k, v in one.items() if k != "kl" or one["step"] in measured} for one in result.records]
    return replace(result, records=tuple(kept))


@pytest.mark.parametrize("config", [GRPOConfig(), NFTConfig()])
def test_the_card_names_the_update_whose_kl_was_measured_last(config: TrainingConfig, tmp_path: Path) -> None:
    """Between two measurements (kl_every), or with a loss that has no KL, the last update has none."""
    text = card_of(tmp_path, without_kl(result_of(7), 1, 5), config=config)
    assert "KL in update 5: 0.6173 nats per trajectory." in text and "In update 5 the KL was 0.6173 nats" in text
    text = card_of(tmp_path, without_kl(result_of(7)), config=config)
    assert "1 in update 7; the two are of different prompts.\n" in text and "KL" not in text


def test_the_table_has_a_row_of_the_kl_where_it_was_measured(tmp_path: Path) -> None:
    result = without_kl(result_of(7, 0, 7))
    assert "KL" not in card_of(tmp_path, result, config=NFTConfig())
    sampled = replace(result, evaluations=tuple(one | {"eval/kl": 0.5 * one["step"]} for one in result.evaluations))
    text = card_of(tmp_path, sampled, config=NFTConfig(eval_kl=True))
    assert "\n| KL, nats per trajectory | 0 | 3.5 |\n" in text and "of trajectories of held-out prompts." in text
    spread = {"eval/correlation/s": 0.8, "eval/within/r": 0.5, "eval/within/s": 0.5, "eval/chi_square_ess": 4.0}
    guaranteed = replace(result, evaluations=tuple(one | spread for one in result.evaluations))
    text = card_of(tmp_path, guaranteed, config=NFTConfig(eval_kl=True))
    assert "\n\nGuaranteed gain of the held-out reward s (theorem 5.1 of arXiv 2403.03185): not estimated, " in text
    text = card_of(tmp_path, without_kl(result_of(7, 0, 7), 7), config=GRPOConfig())
    assert "| KL, nats per trajectory | 0 | 0.8642 |" in text and "of the training samples of that update." in text


# The card.


def test_the_hub_reads_the_card(described: tuple[Path, TrainingResult]) -> None:
    card = ModelCard.load(described[0] / "README.md")
    results = [(one.metric_name, one.metric_value) for one in card.data.eval_results or []]
    last = described[1].evaluations[-1]
    assert results == [("r", last["eval/r"][0]), ("s", last["eval/s"][0])]
    data = card.data.to_dict()
    assert data.pop("model-index")[0]["name"] == "org/base-prdp"
    assert data == {
        "base_model": "org/base",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "full-finetuning", "steer", "prdp"],
    }
    assert card.text.startswith("\n# org/base, finetuned by PRDP")


@pytest.mark.parametrize("model", ["a: b # c", "no\n---\nyes", "/home/me/model", "", None])
def test_only_names_on_the_hub_are_base_models(model: str | None, tmp_path: Path) -> None:
    card_of(tmp_path, result_of(2, 0, 2), {"model": model})
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model is None and "lora" in (data.tags or [])


def test_a_folder_is_no_base_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its path may look like one."""
    (tmp_path / "my" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in card_of(tmp_path / "out", result_of(2), {"model": "my/model"})


def test_the_table_is_what_was_recorded(described: tuple[Path, TrainingResult]) -> None:
    out, result = described
    table = [line for line in (out / "README.md").read_text().splitlines() if line.startswith("|")]
    rows = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in table}
    assert table[0] == "|  | 0 updates (first) | 6 updates (best) | 12 updates (last) |"
    for name, row in (("r", rows["r (trained)"]), ("s", rows["s (held out)"])):
        for one, cell_text in zip(result.evaluations, row, strict=True):
            assert [float(number) for number in re.findall(r"[-\d.]+", cell_text)] == [
                float(f"{value:.4g}") for value in one[f"eval/{name}"]
            ]
    assert rows["diversity"] == ["0.2"] * 3
    assert rows["KL, nats per trajectory"] == ["0", "0.7407", "1.481"]  # 6 and 12 × 0.123456


def test_links_lead_to_files(described: tuple[Path, TrainingResult]) -> None:
    text = (described[0] / "README.md").read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(links) == 5 and all((described[0] / link).is_file() for link in links)
    assert links[-1] == "samples/step-000012.png"


def test_settings_that_differ_are_listed_and_nobodys_folder(described: tuple[Path, TrainingResult]) -> None:
    text = (described[0] / "README.md").read_text()
    assert "- beta: 0.03" in text and "- lora\\_rank: 0" in text and "- kl\\_budget\\_nats: 3" in text
    assert "- eta" not in text  # the default one
    assert "/home/me" not in text
    assert f"steer-diffusion {steer.__version__}, torch {torch.__version__.split('+')[0]}" in text
    assert "time in updates, without evaluations: 6 minutes" in text
    assert "ended before max_steps: why \\| not" in text and "1.481 nats per trajectory" in text


def test_a_configuration_with_all_its_defaults_lists_none_of_them(tmp_path: Path) -> None:
    text = card_of(tmp_path, result_of(2), config=D3POConfig(call={"height": 8}))
    listed = text.split("## Training")[1].split("## Limits")[0]
    assert re.findall(r"^- (\S+):", listed, re.MULTILINE) == ["model", "method", "reward", "call", "versions"]


def test_awkward_names_stay_text(tmp_path: Path) -> None:
    collected = result_of(2, stopped=AWKWARD, evaluations=evaluations(0, 2, names=("r", AWKWARD)))
    text = card_of(tmp_path, collected, {"reward": AWKWARD, "prompts": [AWKWARD]})
    plain = re.sub(r"\\([\\`*_\[\]<>|~$&#!])", "", text.split("---\n", 2)[2])  # without what is escaped
    for mark in ("a_b", "*c*", "](e)", "<g>", "`f`", "$1", "& $2"):
        assert mark not in plain
    row = next(line for line in text.splitlines() if "(held out)" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 4  # cells are as many as before
    ModelCard.load(tmp_path / "README.md")
    assert cards.escaped("a\n\n# b") == r"a \# b"


@pytest.mark.parametrize("trainer", METHODS.values(), ids=METHODS)
def test_every_method_cites_the_paper_of_its_code(trainer: type[Trainer[Any]]) -> None:
    number = trainer.config_class.paper[1]
    assert number in (inspect.getsource(inspect.getmodule(trainer)) or "").replace(f'"{number}"', "")


@pytest.mark.parametrize("config", [GRPOConfig(), NFTConfig(), DPOConfig(), NFTConfig(eval_kl=True, eta=0.5)])
def test_eta_is_reported_where_it_was_used_for_sampling(config: TrainingConfig, tmp_path: Path) -> None:
    """Methods of the forward process sample by the pipeline's own solver, and η is the noise of their eval_kl alone."""
    text = card_of(tmp_path, result_of(2, weights=tmp_path / "final" / "unet"), config=config)
    used = isinstance(config, GRPOConfig)
    code = text.split("```python")[1].split("```")[0]
    assert ("own scheduler at η = 1, 20 steps" in text, ", eta=1.0)" in code) == (used, used)
    window = GRPOConfig(dynamics="cps", window="first")
    windowed = card_of(tmp_path, result_of(2, weights=tmp_path / "w"), config=window)
    assert "of the law cps at level 0.8 in 3 solver steps" in windowed and "- eta: 0.8" in windowed
    assert used or ("own scheduler, 20 steps and guidance 1." in text and "η" not in text and "eta=" not in code)


def test_weights_that_a_guard_kept_are_named(tmp_path: Path) -> None:
    kept = result_of(9, 0, 3, 9, best=3, weights=tmp_path / "final" / "unet", stopped="fooled", weights_step=3)
    assert "They are those of update 3" in card_of(tmp_path, kept)
    assert "They are those" not in card_of(tmp_path, replace(kept, weights_step=9))


@pytest.mark.parametrize(("family", "rank"), [("sd", 2), ("sd", 0), ("pixart", 2)])
def test_the_code_of_the_card_gives_the_trained_model(
    family: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe: Any = fresh_pipe(family)
    pipe.save_pretrained(tmp_path / "base")
    trained = LoRA(pipe, rank, alpha=3 * rank) if rank else FullFinetuning(pipe)
    move(trained, 0.2 if rank else 0.1)
    out = tmp_path / "run"
    weights = trained.write(trained.state(), out / "final")
    call = {name: value for name, value in call_kwargs(family, 1).items() if isinstance(value, int | float)}
    steps, guidance = call.pop("num_inference_steps"), call.pop("guidance_scale", 3.0)
    call.pop("num_images_per_prompt", None)
    sampling = {"num_inference_steps": steps, "guidance_scale": guidance, "lora_rank": rank}
    config = PRDPConfig(**sampling, call=call | {"output_type": "pt"})
    text = card_of(out, result_of(1, weights=weights), {"model": str(tmp_path / "base")}, config, pipe)
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0].replace('"…"', repr(PROMPT))
    monkeypatch.chdir(out)
    # Loading draws random numbers here and there: the noise gets some of its own.
    code = code.replace("pipe(prompt, ", "pipe(prompt, generator=Generator().manual_seed(0), ")
    scope: dict[str, Any] = {"Generator": Generator}
    exec(compile(code, "card", "exec"), scope)
    arguments = call | {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt", "eta": 1.0}
    base: Any = DiffusionPipeline.from_pretrained(tmp_path / "base")
    expected, before = (one(PROMPT, generator=Generator().manual_seed(0), **arguments).images for one in (pipe, base))
    assert (scope["output"].images - expected).abs().max() < 1e-4
    assert (before - expected).abs().max() > 0.01
