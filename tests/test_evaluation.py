"""`steer.apps.evaluation`: results against plain diffusers calls and hand computations, resuming, refusals."""

import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Steer, cached_pipe, replaced
from diffusers import StableDiffusionPipeline
from PIL import Image
from rollouts import random_lora
from safetensors.torch import save_file
from torch import Generator, Tensor

from steer.apps.cli.evaluate import evaluate as command
from steer.apps.evaluation import report as evaluation_report
from steer.apps.evaluation.report import figures, format_interval
from steer.apps.evaluation.run import Contender, evaluate, trajectory_kl
from steer.apps.evaluation.spec import DEFAULTS, ContenderResults, EvaluationSpec, ResultStore, prepare_contenders
from steer.apps.models import find_adapter, load_pipeline
from steer.diffusion.seeds import derived_seed
from steer.errors import InputError
from steer.pipelines.training.method import rows_of
from steer.rewards.parser import load_reward
from steer.training.rollout import Sampler

PROMPTS = ["two blue stars", "a red circle", "a green cross above a black star"]
TAGS = ["counting", "colors", "counting"]
OPTIONS = {"steps": 4, "guidance": 3.0, "seed": 5}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    cached_pipe("sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An evaluation of the embedded model: bare, with a LoRA that does nothing, and steered."""
    folder = tmp_path_factory.mktemp("evaluation")
    zero = str(random_lora(load_pipeline("scenes"), folder / "zero", 0.0))
    steered = Contender("scenes", None, "fk", {"particles": 2, "lam": 20.0})
    contenders = [Contender("scenes"), Contender("scenes", zero), steered]
    rewards = ["brightness", "scene", "jpeg"]
    return folder, evaluate(contenders, PROMPTS, rewards, 2, folder / "out", OPTIONS, tags=TAGS, kl_prompts=2)


def test_the_plain_contender_is_the_plain_pipeline(done: tuple[Path, dict[str, Any]]) -> None:
    """Repeat every run by diffusers alone, with the seeds of the report."""
    pipe, stats = load_pipeline("scenes"), done[1]["contenders"][0]
    pipe.set_progress_bar_config(disable=True)
    rewards = {name: load_reward(name) for name in done[1]["rewards"]}
    images: dict[int, list[Tensor]] = {}
    assert [run["prompt"] for run in stats["runs"]] == [0, 0, 1, 1, 2, 2]
    assert len({run["seed"] for run in stats["runs"]}) == 6
    for run in stats["runs"]:
        generator = Generator().manual_seed(derived_seed(run["seed"], "image 0"))
        prompt = PROMPTS[run["prompt"]]
        image = pipe(prompt, num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="pt").images
        for name, reward in rewards.items():
            assert run["rewards"][name] == pytest.approx(reward(image, [prompt]).tolist(), abs=0.01)
        images.setdefault(run["prompt"], []).append(image[0])
    apart = [(one - other).square().mean().sqrt().item() for one, other in images.values()]
    assert stats["diversity"][0] == pytest.approx(sum(apart) / 3, rel=1e-3)
    spent = {"nfe": 4, "decodes": 1, "reward_calls": 1, "seconds": 0, "gradients": 0, "other_decodes": 0}
    assert stats["cost"] | {"seconds": 0} == spent


def test_a_lora_of_zeros_is_the_bare_model(done: tuple[Path, dict[str, Any]]) -> None:
    bare, zero = done[1]["contenders"][:2]
    assert [run["rewards"] for run in zero["runs"]] == [run["rewards"] for run in bare["runs"]]
    assert zero["kl"] == {"nats": [0, 0, 0], "by_prompt": [0, 0], "eta": 1.0} and "kl" not in bare
    for name in done[1]["rewards"]:
        stats = zero["rewards"][name]
        assert stats["wins"] == [0.5, 0.5, 0.5] and stats["difference"] == [0, 0, 0]
        assert stats["picked"] == stats["all"] == bare["rewards"][name]["picked"]
        assert "wins" not in bare["rewards"][name]


def test_a_steered_run_starts_from_the_plain_noise_and_picks_its_best(done: tuple[Path, dict[str, Any]]) -> None:
    bare, _, steered = done[1]["contenders"]
    assert steered["name"] == "scenes fk particles=2 lam=20.0" and steered["particles"] == 2
    assert steered["cost"]["nfe"] == 8 and steered["cost"]["decodes"] > 2
    for run, plain in zip(steered["runs"], bare["runs"], strict=True):
        assert run["seed"] == plain["seed"]
        assert len(run["rewards"]["jpeg"]) == 2 and run["rewards"]["brightness"][0] == max(run["rewards"]["brightness"])
    picked = [run["rewards"]["scene"][0] for run in steered["runs"]]
    everything = [value for run in steered["runs"] for value in run["rewards"]["scene"]]
    assert steered["rewards"]["scene"]["picked"][0] == pytest.approx(sum(picked) / 6)
    assert steered["rewards"]["scene"]["all"][0] == pytest.approx(sum(everything) / 12)
    signs = 0
    for run, plain in zip(steered["runs"], bare["runs"], strict=True):
        ours, theirs = run["rewards"]["brightness"][0], plain["rewards"]["brightness"][0]
        signs += (ours > theirs) - (ours < theirs)
    assert steered["rewards"]["brightness"]["wins"][0] == pytest.approx((1 + signs / 6) / 2)


def test_everything_is_in_the_folder(done: tuple[Path, dict[str, Any]]) -> None:
    out, report = done[0] / "out", done[1]
    assert json.loads((out / "evaluation.json").read_text()) == report
    assert {path.name for path in out.glob("*.png")} == {"rewards.png", "tasks.png", "costs.png", "kl.png", "grid.png"}
    assert all(Image.open(path).width > 400 for path in out.glob("*.png"))
    assert len(list(out.glob("images/*/*.png"))) == 9
    words = (out / "evaluation.md").read_text()
    for one in report["contenders"]:
        assert f"| `{one['name']}` |" in words and format_interval(one["rewards"]["jpeg"]["picked"]) in words
    assert "counting (2) | colors (1)" in words and "KL is the mean of 2 trajectories with η = 1." in words
    assert report["options"]["steps"] == 4 and report["options"]["lam"] is None and report["seeds"] == 2
    assert report["contenders"][0]["environments"][0]["torch"] == torch.__version__


def test_figures_by_hand() -> None:
    """Two prompts × two seeds: a bootstrap of two prompts has three means, its 95 % interval the outer two."""
    spec = EvaluationSpec(("p", "q"), ("x", "y"), {"r": load_reward("brightness")}, 2, {})
    scores = {"a": [[[1.0], [3.0]], [[0.0], [4.0]]], "b": [[[1.0, 0.0], [5.0, 1.0]], [[-1.0, -2.0], [3.0, 3.0]]]}
    stored = []
    for name, table in scores.items():
        one = ContenderResults({"name": name, "method": "base", "weights": None})
        for place, row in enumerate(table):
            runs = [{"rewards": {"r": v}, "cost": {"nfe": 3 + s}, "stopped": None} for s, v in enumerate(row)]
            one.runs[place], one.diversity[place] = runs, [0.2, 0.6][place]
        stored.append(one)
    first, second = figures(spec, [1, 2], stored, 0)["contenders"]
    assert first["rewards"]["r"] == {"picked": [2, 2, 2], "all": [2, 2, 2]}
    stats = second["rewards"]["r"]
    assert stats["picked"] == [2, 1, 3] and stats["all"] == [1.25, 0.75, 1.75]
    assert stats["difference"] == [0, -1, 1]  # by prompt (0 + 2)/2 and (−1 − 1)/2
    assert stats["wins"] == [0.375, 0, 0.75]  # (½ + 1)/2 and 0
    assert second["tasks"]["x"] == {"prompts": 1, "rewards": {"r": {"picked": [3, 3, 3], "all": [1.75, 1.75, 1.75]}}}
    assert second["diversity"] == pytest.approx([0.4, 0.2, 0.6]) and second["cost"]["nfe"] == 3.5


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_kl_against_a_hand_computation(tmp_path: Path, kind: str) -> None:
    """Σ ‖Δμ‖²/2τ² of DDIM's step with η = ½: Δμ from both denoisers' guided outputs at the same x_t, by hand."""
    pipe = load_pipeline("scenes")
    pipe.set_progress_bar_config(disable=True)
    other = load_pipeline("scenes")
    if kind == "lora":
        folder = random_lora(other, tmp_path / "lora", 0.02)
    else:
        other.unet.conv_out.weight.data *= 1.01
        other.unet.save_pretrained(tmp_path / "unet")
        folder = tmp_path
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
    rows = rows_of(PROMPTS[:2], 1, 0, "kl", shared_start=False)
    with find_adapter(str(folder)).applied_to(pipe) as off:
        kl = trajectory_kl(pipe, off, rows, call, 0.5, 2)
    stored, _ = Sampler(other, call, 0.5).rollout(rows)
    starts = [torch.randn(stored.latents.shape[2:], generator=Generator().manual_seed(seed)) for seed in rows.starts]
    places = torch.cat([torch.stack(starts)[:, None], stored.latents[:, :-1]], 1)
    assert kl.tolist() == pytest.approx(by_hand(pipe, other, places).tolist(), rel=1e-3) and kl.min() > 1e-3


@torch.no_grad()
def by_hand(pipe: Any, other: Any, places: Tensor) -> Tensor:
    text, empty = pipe.encode_prompt(PROMPTS[:2], "cpu", 1, True)
    scheduler, total = pipe.scheduler, torch.zeros(2)
    scheduler.set_timesteps(4)
    for t, x in zip(scheduler.timesteps, places.unbind(1), strict=True):
        before, after = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[max(int(t) - 250, 0)]
        tau = 0.5 * ((1 - after) / (1 - before) * (1 - before / after)).sqrt()
        means = []
        for one in (pipe, other):
            v0, v1 = one.unet(torch.cat([x, x]), t, torch.cat([empty, text])).sample.chunk(2)
            v = v0 + 3 * (v1 - v0)
            x0, noise = before.sqrt() * x - (1 - before).sqrt() * v, before.sqrt() * v + (1 - before).sqrt() * x
            means.append(after.sqrt() * x0 + (1 - after - tau**2).sqrt() * noise)
        total += (means[0] - means[1]).square().flatten(1).sum(1) / (2 * tau**2)
    return total


def test_without_noise_there_is_no_kl_and_the_report_names_why(tiny: Path, tmp_path: Path) -> None:
    weights = str(random_lora(StableDiffusionPipeline.from_pretrained(tiny), tmp_path / "lora", 0.1))
    report = evaluate([Contender(str(tiny), weights)], ["a"], ["brightness"], 1, tmp_path / "out", {"steps": 1})
    assert "no step of this run has noise" in report["contenders"][0]["kl"]["skipped"]
    assert "no KL, because no step of this run has noise" in (tmp_path / "out/evaluation.md").read_text()


@pytest.mark.hard
def test_an_image_depends_on_its_own_seed_alone(tiny: Path, tmp_path: Path) -> None:
    """Whatever is made in the same call, and however many particles: the K images of a run are the first of more."""
    best = [Contender(str(tiny), None, "best-of-n", {"particles": size}) for size in (1, 2, 4)]
    some: dict[str, Any] = {"prompts": PROMPTS, "rewards": ["brightness"], "seeds": 2, "options": {"steps": 3}}
    together = evaluate([Contender(str(tiny)), *best], out=tmp_path / "together", batch=8, **some)["contenders"]
    alone = evaluate([Contender(str(tiny)), best[2]], out=tmp_path / "alone", batch=1, **some)["contenders"]
    for one, other in ((together[0], alone[0]), (together[3], alone[1]), (together[0], together[1])):
        for run, again in zip(one["runs"], other["runs"], strict=True):
            assert run["rewards"]["brightness"] == pytest.approx(again["rewards"]["brightness"], abs=1e-5)
    for stats in together:  # the image in the grid is the one that was picked
        for place in range(3):
            path = ResultStore(tmp_path / "together").image(stats["name"], place)
            picked = stats["runs"][2 * place]["rewards"]["brightness"][0]
            luma = np.asarray(Image.open(path)).mean((0, 1)) @ [0.299, 0.587, 0.114] / 255
            assert luma == pytest.approx(picked, abs=2e-3)
    for two, four in zip(together[2]["runs"], together[3]["runs"], strict=True):
        for value in two["rewards"]["brightness"]:
            assert min(abs(value - other) for other in four["rewards"]["brightness"]) < 1e-5


def test_numbers_are_reported_with_three_digits_of_the_largest() -> None:
    assert format_interval([0.04166, -5e-9, 0.125]) == "0.042 [0.000, 0.125]"
    assert format_interval([-2.044, -2.23, -1.858]) == "−2.04 [−2.23, −1.86]"
    assert (
        format_interval([149.3, 123.1, 178.9]) == "149 [123, 179]" and format_interval([0, 0, 0]) == "0.00 [0.00, 0.00]"
    )
    assert format_interval([1, 1, 1]) == "1.00 [1.00, 1.00]" and not math.isnan(
        float(format_interval([1e-9, 0, 0]).split()[0])
    )


def test_every_setting_of_a_sample_can_be_given() -> None:
    assert set(DEFAULTS) <= {option.name for option in command.params}


@pytest.mark.parametrize(
    ("contenders", "given", "message"),
    [
        ([], {}, "there are no contenders"),
        ([Contender(), Contender()], {}, "contender 'scenes' is repeated"),
        ([Contender(options={"partcles": 2})], {}, "partcles=2': unknown option 'partcles': did you mean particles"),
        ([Contender(options={"seed": 2})], {}, "seeds are the same for all"),
        ([Contender()], {"rewards": []}, "no reward"),
        ([Contender()], {"prompts": []}, "no prompts"),
        ([Contender()], {"tags": ["x"]}, "one tag a prompt: got 1 for 3 prompts"),
        ([Contender()], {"seeds": 0}, "--seeds must be at least 1, got 0"),
        ([Contender()], {"rewards": ["jpeg", "jpeg"]}, "reward 'jpeg' is repeated"),
        ([Contender()], {"kl_prompts": -1}, "--kl-prompts"),
        ([Contender(method="reno")], {"rewards": ["jpeg"]}, "'jpeg' is not differentiable"),
    ],
)
def test_invalid_arguments_are_refused_before_a_model_is_loaded(
    contenders: list[Contender], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    usual: dict[str, Any] = {"prompts": PROMPTS, "rewards": ["brightness"], "seeds": 1, "out": tmp_path / "out"}
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        evaluate(contenders, **(usual | given))
    assert not (tmp_path / "out").exists()


def test_methods_that_are_not_compared_are_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    """Limits of other methods do not apply; an option that no compared method has is reported."""
    rewards = {"brightness": load_reward("brightness")}
    for method, options in (
        ("best-of-n", {"particles": 32}),
        ("fk", {"noise_candidates": 8}),
        ("race", {"lookahead": "auto"}),
    ):
        prepare_contenders([Contender(method=method)], EvaluationSpec(("a",), None, rewards, 1, options))
    assert not caplog.records
    spec = EvaluationSpec(("a",), None, rewards, 1, {"lam": 5.0, "branches": 2})
    prepare_contenders([Contender(), Contender(method="fk")], spec)
    (record,) = caplog.records
    assert record.getMessage() == "steer: --branches belongs to --method race: not used here"


# The command line.


REWARD = """
from pathlib import Path

LOG, STOP = (Path(__file__).with_name(name) for name in ("log", "stop"))

def brightness(images, prompts):
    before = LOG.read_text().splitlines() if LOG.exists() else []
    if STOP.exists() and len(before) == int(STOP.read_text()):
        raise KeyboardInterrupt
    LOG.write_text("".join(f"{line}\\n" for line in [*before, " ".join(prompts)]))
    return images.mean((1, 2, 3))
"""
PICTURES = ("draw_rewards", "draw_tasks", "draw_costs", "draw_kl", "draw_images")


@pytest.fixture
def words(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A command without methods, folder and figures, which are slow."""
    for name in PICTURES:
        monkeypatch.setattr(evaluation_report, name, lambda *given: None)
    (tmp_path / "counted.py").write_text(REWARD)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"tag": "ab"[n % 2], "prompt": f"p{n}"}) + "\n" for n in range(5))
    )
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    options = ["--steps", 2, "--particles", 2, "--seeds", 2, "--batch", 4, "--kl-prompts", 2, "--iterations", 2]
    rewards = ["--reward", "counted:brightness", "--reward", "jpeg"]
    return ["evaluate", "--model", model, "--prompts", tmp_path / "prompts.jsonl", *rewards, *options]


def of(model: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def timeless(out: Path) -> Any:
    report = json.loads((out / "evaluation.json").read_text())
    for one in report["contenders"]:
        for cost in (one["cost"], *(run["cost"] for run in one["runs"])):
            assert cost.pop("seconds") > 0
    return report


def calls(folder: Path) -> list[str]:
    """The prompts of each call of the counting reward."""
    return (folder / "log").read_text().splitlines()


def test_an_interrupted_evaluation_resumes_without_repeating_calls(
    steer: Steer, words: list[object], tmp_path: Path
) -> None:
    both = [*words, "--method", "base", "--method", "best-of-n"]
    assert steer(*both, "--out", tmp_path / "once")[0] == 0
    once = calls(tmp_path)
    # Two prompts × two seeds at a time, then one prompt × two seeds × two particles.
    assert once == ["p0 p0 p1 p1", "p2 p2 p3 p3", "p4 p4", *(" ".join([f"p{n}"] * 4) for n in range(5))]
    (tmp_path / "log").unlink()
    for stop in (1, 5):
        (tmp_path / "stop").write_text(str(stop))
        code, _, err = steer(*both, "--out", tmp_path / "twice")
        assert code == 130 and "interrupted; finished work is kept: run the command again to resume" in err
    (tmp_path / "stop").unlink()
    code, out, _ = steer(*both, "--out", tmp_path / "twice")
    assert code == 0 and calls(tmp_path) == once
    assert timeless(tmp_path / "twice") == timeless(tmp_path / "once")
    assert out.splitlines()[-1] == f"→ {tmp_path / 'twice' / 'evaluation.md'}" and "best-of-n" in out
    model = tmp_path / "model"
    model.rename(tmp_path / "gone")  # all is there: not even the model is needed
    assert steer(*both, "--out", tmp_path / "twice")[0] == 0
    model.symlink_to(tmp_path / "gone")
    (tmp_path / "log").unlink()
    assert steer(*words, "--method", "base", "--method", "noise-search", "--out", tmp_path / "twice")[0] == 0
    assert set(calls(tmp_path)) == {f"p{n} p{n}" for n in range(5)}  # the new contender's alone, one run a call
    report = timeless(tmp_path / "twice")
    assert [one["method"] for one in report["contenders"]] == ["base", "noise-search"]
    assert report["contenders"][0] == timeless(tmp_path / "once")["contenders"][0]
    assert not list((tmp_path / "twice").rglob("*.safetensors"))


@pytest.mark.hard
def test_weights_are_contenders_and_may_not_change(
    steer: Steer, words: list[object], tiny: Path, tmp_path: Path
) -> None:
    weights = random_lora(of(tiny), tmp_path / "lora", 0.5)
    command = [*words, "--num-prompts", 2, "--lora", weights, "--out", tmp_path / "out"]
    assert steer(*command)[0] == 0
    report = timeless(tmp_path / "out")
    assert [one["prompt"] for one in report["prompts"]] == ["p0", "p2"] and report["prompts"][1]["tag"] == "a"
    bare, other = report["contenders"]
    assert other["name"] == f"{bare['name']} + {weights}" and len(other["kl"]["by_prompt"]) == 2
    assert other["kl"]["nats"][0] > 0 and other["runs"] != bare["runs"]
    assert steer(*replaced(command, "--kl-prompts", 1))[0] == 0
    assert len(timeless(tmp_path / "out")["contenders"][1]["kl"]["by_prompt"]) == 1
    shutil.rmtree(weights)
    random_lora(of(tiny), weights, 0.7)
    code, _, err = steer(*command)
    assert code == 2 and "its weights differ; choose another --out" in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "scnes"], "unknown model 'scnes': use scenes"),
        (["--model", "scenes", "--lora", "x"], "--lora belongs to one model, got 2 models"),
        (["--method", "fkk"], "unknown method 'fkk': did you mean fk"),
        (["--model", "scenes-text"], "scenes-text generates texts; evaluations are of images"),
        (["--reward", "scen"], "unknown reward 'scen': did you mean scene"),
        (["--reward", "jpeg"], "reward 'jpeg' is repeated"),
        (["--prompts", "scenes-heldou"], "unknown prompts 'scenes-heldou': use scenes-heldout"),
        (["--prompts", "no.txt"], "no.txt: cannot read the prompt file"),
        (["--tag-column", "task"], 'text under "task"'),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--batch", "0"], "--batch at least 1"),
        (["--particles", "0"], "'--particles': 0 is not in the range"),
        (["--lora", "nothing"], "nothing: no such folder"),
        (["--lora", "{tmp}"], "{tmp}: no finetuned weights here; expected pytorch_lora_weights.safetensors"),
        (["--lora", "{tmp}/run"], "did you mean {tmp}/run/best or {tmp}/run/final?"),
        (["--lora", "{tmp}/wide"], "{tmp}/wide does not fit StableDiffusionPipeline"),
        (["--lora", "{tmp}/other"], "{tmp}/other: 2 of its 4 tensors have a place"),
        (["--lora", "{tmp}/model/vae"], "its tensors do not match the model's UNet2DConditionModel"),
        (["--out", "{tmp}/prompts.jsonl"], "--out {tmp}/prompts.jsonl: cannot write there"),
        (["--device", "warp"], "--device 'warp' cannot be used"),
        (["--steps", "2000"], "prompt 'p0': "),
        (["--contender", "method: fk"], "--model and contenders exclude each other: name the model in each contender"),
        (["--settings", "{tmp}/study.yaml"], "--contender must be a mapping such as 'method: fk, particles: 8', got 3"),
        (["--settings", "{tmp}/prompts.jsonl"], "prompts.jsonl, line 2: expected '<document start>'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    steer: Steer, words: list[object], tmp_path: Path, given: list[str], message: str
) -> None:
    for name in ("run/best", "run/final", "wide", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "study.yaml").write_text("contenders: [3]")
    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    for name, keys, width in (("wide", [place], 99), ("other", [place, "unet.elsewhere.to_q"], 8)):
        shapes = {"lora_A": (2, width), "lora_B": (width, 2)}
        factors = {f"{key}.{factor}.weight": torch.zeros(shape) for key in keys for factor, shape in shapes.items()}
        save_file(factors, tmp_path / name / "pytorch_lora_weights.safetensors")
    options = [word.format(tmp=tmp_path) for word in given]
    code, _, err = steer(*replaced([*words, "--out", tmp_path / "out"], *options))
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("steer: ") and message.format(tmp=tmp_path) in last
    assert "Traceback" not in err and not (tmp_path / "log").exists()


def test_every_option_of_the_command_is_one_of_an_evaluation() -> None:
    """An option that `--help` shows and every evaluation refuses is none."""
    own = {*inspect.signature(command.callback).parameters, "settings"}
    assert {one.name for one in command.params} - own <= {*DEFAULTS}


@pytest.mark.parametrize(
    ("contender", "message"),
    [
        ("fk", "contender 'scenes fk=None': unknown option 'fk': `steer evaluate --help` lists the options"),
        ("method: [", "--contender"),
        ("methd: fk", "contender 'scenes methd=fk': unknown option 'methd': did you mean method"),
        ("model: 3", "model of a contender must be text, got 3"),
        ("method: fkk", "unknown method 'fkk': did you mean fk"),
        ("particles: 0", "particles must be at least 1"),
    ],
)
def test_a_contender_that_does_not_fit_is_one_line(steer: Steer, tmp_path: Path, contender: str, message: str) -> None:
    words = ["--prompts", "scenes-tuning", "--reward", "jpeg", "--out", tmp_path / "out"]
    code, _, err = steer("evaluate", "--contender", contender, *words)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_contenders_of_the_command_line_have_settings_of_their_own(steer: Steer, tiny: Path, tmp_path: Path) -> None:
    fk = [f'model: "{tiny}", label: of {k}, method: fk, particles: {k}' for k in (2, 3)]
    words = [word for text in fk for word in ("--contender", text)]
    (tmp_path / "prompts.txt").write_text("a\n")
    words += ["--prompts", tmp_path / "prompts.txt", "--steps", 2, "--kl-prompts", 0]
    for reward in ("brightness + jpeg", "brightness", "min(brightness, jpeg)"):
        words += ["--reward", reward]
    assert steer("evaluate", *words, "--out", tmp_path / "out")[0] == 0
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [(one["name"], one["particles"]) for one in report["contenders"]] == [("of 2", 2), ("of 3", 3)]
    for run in (run for one in report["contenders"] for run in one["runs"]):
        assert run["components"].keys() == {"brightness + jpeg", "min(brightness, jpeg)"}
        for name, combine in (("brightness + jpeg", sum), ("min(brightness, jpeg)", min)):
            parts = run["components"][name]
            totals = [combine(pair) for pair in zip(parts["brightness"], parts["jpeg"], strict=True)]
            assert run["rewards"][name] == pytest.approx(totals, rel=1e-5)
    assert [len(one["runs"][0]["rewards"]["brightness"]) for one in report["contenders"]] == [2, 3]


def test_needs_prompts_and_rewards(steer: Steer) -> None:
    assert "Missing option '--prompts'" in steer("evaluate", "--reward", "jpeg")[2]
    assert "Missing option '--reward'" in steer("evaluate", "--prompts", "scenes-tuning")[2]


def test_a_folder_of_another_evaluation_is_left_alone(steer: Steer, words: list[object], tmp_path: Path) -> None:
    command = replaced(words, "--num-prompts", 1, "--seeds", 1, "--out", tmp_path / "out")
    assert steer(*command)[0] == 0
    for given, message in (
        (["--num-prompts", 2], "holds an evaluation of other prompts"),
        (["--reward", "brightness"], "with rewards ['counted:brightness', 'jpeg'], not "),
        (["--seeds", 4], "with seeds 1, not 4"),
        (["--steps", 3], "with steps 2, not 3"),
        (["--seed", 1], "with seed 0, not 1"),
    ):
        code, _, err = steer(*replaced(command, *given))
        assert code == 2 and message in err and err.rstrip().endswith("choose another --out")
    stored = next((tmp_path / "out" / "runs").glob("*.0.json"))
    stored.write_text(stored.read_text()[:-9])
    code, _, err = steer(*command)
    assert code == 2 and f"{stored} is not an evaluation of steer" in err and "Traceback" not in err
