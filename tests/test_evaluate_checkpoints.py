"""`steer evaluate --checkpoints`: a run's checkpoints against its exported weights, their labels, and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer, cached_pipe
from finetune_runs import config_of, train
from rollouts import fresh_pipe
from torch import Tensor

from steer import InputError
from steer.apps.evaluation import run as evaluation_run
from steer.apps.evaluation.checkpoints import checkpoint_contenders
from steer.apps.evaluation.report import draw_kl
from steer.apps.models import find_adapter
from steer.training.overoptimization import best_of_n_kl

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"ema_decay": 0.0, "lora_alpha": 3.0},
    "average": {"use_dora": True, "use_rslora": True},
    "full": {"ema_decay": 0.0, "lora_rank": 0},
}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven updates that keeps the checkpoints of updates 3, 6 and 7."""
    folder = tmp_path_factory.mktemp(request.param) / "tiny"
    train("grpo", fresh_pipe("sd"), folder, config_of("grpo", save_total_limit=3, **KINDS[request.param]))
    return folder


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tiny"
    train("grpo", fresh_pipe("sd"), folder, config_of("grpo", save_total_limit=3, **KINDS["lora"]))
    return folder


def predicted(pipe: Any) -> Tensor:
    """The noise that the denoiser predicts."""
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    with torch.no_grad():
        return pipe.unet(x, torch.tensor([7, 30]), c[..., : pipe.unet.config.cross_attention_dim]).sample


@pytest.mark.few(1)
def test_the_last_checkpoint_is_what_diffusers_loads_from_final(run: Path) -> None:
    pipe = fresh_pipe("sd")
    base = predicted(pipe)
    with find_adapter(str(run / "checkpoints/step-00000007")).applied_to(pipe) as off:
        trained = predicted(pipe)
        with off():
            torch.testing.assert_close(predicted(pipe), base)
    torch.testing.assert_close(predicted(pipe), base)
    if (run / "final/unet").is_dir():
        pipe.unet = type(pipe.unet).from_pretrained(run / "final/unet")
    else:
        pipe.load_lora_weights(run / "final")
    torch.testing.assert_close(predicted(pipe), trained)
    assert (trained - base).abs().max() > 1e-4


@pytest.mark.few(2)
def test_every_distinct_checkpoint_is_a_contender(run: Path, tmp_path: Path) -> None:
    """best/ and final/ only where no checkpoint has their weights: moved ones are of another run."""
    places = sorted(path.name for path in (run / "checkpoints").iterdir())
    steps = [f"step {int(name[-8:])}" for name in places]
    assert {"step 6", "step 7"} <= {*steps}
    compared = checkpoint_contenders([str(run)], "m")
    assert [one.label for one in compared] == [f"tiny {step}" for step in steps]
    assert [one.lora for one in compared] == [str(run / "checkpoints" / name) for name in places]
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "checkpoints/step-00000007")
    both = checkpoint_contenders([str(other), str(run)], "m", ["base", "fk"])
    assert [one.label for one in both if one.method == "base"][-len(steps) - 1 :] == [
        "other final", *(f"tiny {step}" for step in steps)
    ]  # fmt: skip
    assert both[1].label == f"other {steps[0]} fk" and {one.model for one in both} == {"m"}


@pytest.mark.hard
def test_steps_sort_as_text(lora_run: Path, tmp_path: Path) -> None:
    place = lora_run / "checkpoints/step-00000006"
    for step in (8, 40):
        copy = shutil.copytree(place, tmp_path / f"run/checkpoints/step-{step:08d}")
        from steer.training.checkpoint import _manifest_bytes, read_manifest

        (copy / "manifest.json").write_bytes(_manifest_bytes(step, read_manifest(copy)[1]))
    assert [one.label for one in checkpoint_contenders([str(tmp_path / "run")], "m")] == ["run step 08", "run step 40"]


@pytest.mark.hard
def test_a_checkpoint_is_evaluated_as_the_weights_it_exports(steer: Steer, lora_run: Path, tmp_path: Path) -> None:
    """With the model that the run names; best-of-n joins at log 2 − 1/2."""
    cached_pipe("sd").save_pretrained(tmp_path / "model")
    run = shutil.copytree(lora_run, tmp_path / "a run")
    for place in (run / "checkpoints").iterdir():
        rewrite(place, tmp_path / "model")
    (tmp_path / "study.yaml").write_text(f"checkpoints: '{run}'\nrewards: [brightness, jpeg]\nsteps: 2\n")
    (tmp_path / "prompts.txt").write_text("a star\na circle\n")
    words = ["evaluate", "--settings", tmp_path / "study.yaml", "--prompts", tmp_path / "prompts.txt"]
    words += ["--lora", run / "final", "--kl-prompts", 2, "--out", tmp_path / "out"]
    code, _, err = steer(*words)
    assert code == 0, err
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    base, final, *checkpoints = report["contenders"]
    assert base["model"] == final["model"] == checkpoints[-1]["model"] == str(tmp_path / "model")
    assert checkpoints[-1]["name"] == "a run step 7" and len(checkpoints) >= 2
    assert [one["rewards"] for one in checkpoints[-1]["runs"]] == [one["rewards"] for one in final["runs"]]
    assert checkpoints[-1]["kl"]["by_prompt"] == pytest.approx(final["kl"]["by_prompt"]) and final["kl"]["nats"][0] > 0
    assert (tmp_path / "out/kl.png").is_file() and "(kl.png)" in (tmp_path / "out/evaluation.md").read_text()
    model = f"model: '{tmp_path / 'model'}'"
    given = ["--contender", f"{model}, method: best-of-n, particles: 2", "--contender", f"{model}, label: base"]
    code, _, err = steer(*words[:5], *given, "--kl-prompts", 1, "--out", tmp_path / "best")
    assert code == 0, err
    best, _, *others = json.loads((tmp_path / "best/evaluation.json").read_text())["contenders"]
    assert best["kl"]["nats"] == [pytest.approx(0.19314718)] * 3 and best_of_n_kl(2) == best["kl"]["nats"][0]
    assert [one["name"] for one in others] == [one["name"] for one in checkpoints]


def rewrite(place: Path, model: Path) -> None:
    """Let the checkpoint of a Python run name a model."""
    from steer.files import file_sha256
    from steer.training.checkpoint import _manifest_bytes, read_manifest

    config = json.loads((place / "config.json").read_text()) | {"model": str(model)}
    (place / "config.json").write_text(json.dumps(config))
    step, files = read_manifest(place)
    size = (place / "config.json").stat().st_size
    files["config.json"] = {"size": size, "sha256": file_sha256(place / "config.json")}
    (place / "manifest.json").write_bytes(_manifest_bytes(step, files))


def test_the_figure_has_the_runs_and_best_of_n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(method: str, lora: str | None, kl: Any, particles: int = 1) -> dict[str, Any]:
        values = {"picked": [2.0, 1.5, 2.5], "all": [1.0, 0.5, 1.5]}
        given = {"name": "x", "model": "m", "method": method, "lora": lora, "particles": particles}
        return given | {"rewards": {"r": values}} | ({} if kl is None else {"kl": {"nats": [kl] * 3}})

    steps = [one("base", f"a/checkpoints/step-0000000{step}", kl) for step, kl in ((0, 0.0), (4, 4.0), (8, 9.0))]
    several = [one("base", None, None), *steps, one("best-of-n", None, 0.25, 2), one("fk", "a/final", 9.0)]
    drawn: list[Any] = []
    monkeypatch.setattr("steer.apps.evaluation.report._save_panels", lambda figure, path: drawn.append(figure) or path)
    assert draw_kl({"contenders": several, "rewards": ["r"]}, tmp_path) == tmp_path / "kl.png"
    lines = {str(bars.get_label()): bars[0] for bars in drawn[0].axes[0].containers}
    assert {name: [*zip(*line.get_data(), strict=True)] for name, line in lines.items()} == {
        "m": [(0, 1)], "a": [(0, 1), (2, 1), (3, 1)], "best of n": [(0.5, 2)],
    }  # fmt: skip
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["", "0", "4", "8", "2"]
    assert draw_kl({"contenders": several[:1], "rewards": ["r"]}, tmp_path) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{tmp}/nothing"], "{tmp}/nothing: no finetuning run here; give the output folder of `steer finetune`"),
        (["{run}/final"], "{run}/final: no finetuning run here; did you mean {run}?"),
        (["{tmp}/empty"], "{tmp}/empty: this run has no checkpoints; compare its final/ by --lora"),
        (["{run}", "{run}/"], "{run} is repeated: give each run once"),
        (
            ["{tmp}/flipped"],
            "weights.safetensors is corrupt: checksum mismatch; delete {tmp}/flipped/checkpoints/step-",
        ),
        (["{tmp}/renamed"], "step-00000009 holds step 7; rename it or delete it"),
        (["{run}"], "{run}: its configuration names no model; give --model"),
        (["{run}", "--model", "scenes", "--model", "x"], "--checkpoints belong to one model, got 2 models"),
        (["{tmp}/final"], "{tmp}/final/final/pytorch_lora_weights.safetensors is corrupt: checksum mismatch"),
    ],
)
def test_refusals_are_one_line_before_a_model_is_loaded(
    steer: Steer, lora_run: Path, tmp_path: Path, given: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_run, "load_pipeline", None)
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    flipped, renamed, final = (shutil.copytree(lora_run, tmp_path / name) for name in ("flipped", "renamed", "final"))
    for file in (next(flipped.glob("checkpoints/*/weights.safetensors")), *final.glob("final/*.safetensors")):
        file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    (renamed / "checkpoints/step-00000007").rename(renamed / "checkpoints/step-00000009")
    folders = {"tmp": tmp_path, "run": lora_run}
    first, *others = [word.format(**folders) for word in given]
    more = others if others[:1] == ["--model"] else [word for run in others for word in ("--checkpoints", run)]
    words = ["--prompts", "scenes-tuning", "--reward", "jpeg", "--out", tmp_path / "out"]
    code, _, err = steer("evaluate", "--checkpoints", first, *more, *words)
    assert code == 2 and message.format(**folders) in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_weights_of_a_checkpoint_can_be_weighted_but_not_those_of_all_layers(lora_run: Path, tmp_path: Path) -> None:
    place = str(lora_run / "checkpoints/step-00000007")
    pipe = fresh_pipe("sd")
    with find_adapter(f"{place}:0.5 + {place}:0.5").applied_to(pipe):
        half = predicted(pipe)
    with find_adapter(place).applied_to(pipe):
        torch.testing.assert_close(predicted(pipe), half)
    full = tmp_path / "full"
    train("grpo", fresh_pipe("sd"), full, config_of("grpo", max_steps=1, eval_steps=9, **KINDS["full"]))
    with pytest.raises(InputError, match="holds all weights of a denoiser: give it alone"):
        find_adapter(f"{full / 'checkpoints/step-00000001'}:0.5")
