"""Finetuning by the forward process: the gradient against one graph by hand, runs, resumption, and pairs of images."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from pairwise import hard_but
from PIL import Image
from rollouts import TWO_PROMPTS, call_of, counted, fresh_pipe, move
from safetensors.torch import load_file
from soft_rewards import Soft
from torch import Tensor

from steer import (
    MODELS,
    AWMConfig,
    AWMTrainer,
    D3POTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    NFTConfig,
    NFTTrainer,
    RAMConfig,
    RAMTrainer,
    combine,
)
from steer.apps.finetune_report import write_report
from steer.diffusion.seeds import seeded_normal
from steer.diffusion.step_hooks import SolverStep
from steer.errors import InputError
from steer.files import file_sha256
from steer.pipelines.training.image_pairs import encode
from steer.pipelines.training.method import Scored
from steer.training.distributed import SINGLE_PROCESS
from steer.training.forward import forward_gradient, predictions_of
from steer.training.gradient import Batch
from steer.training.losses.forward import NFT, RAM, NoisyPredictions, mean_square
from steer.training.rollout import Rows, Sampler, Trajectories
from steer.training.trainable import LoRA, get_denoiser

FAMILIES = ["sd", "v", "sd3", "flux"]
SIGNAL = torch.tensor([[1.0, -1.0], [-0.5, 0.5]])


def pipe_of(family: str) -> Any:
    pipe = fresh_pipe("sd" if family == "v" else family)
    if family == "v":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def call(family: str, steps: int = 3) -> dict[str, Any]:
    return call_of("sd" if family == "v" else family, steps) | {"guidance_scale": 1.0}


def case(family: str) -> tuple[LoRA, Sampler, Trajectories]:
    """Samples of the base model, and a LoRA that has moved."""
    pipe = pipe_of(family)
    trained = LoRA(pipe, 2)
    sampler = Sampler(pipe, call(family))
    stored, images = sampler.sample(TWO_PROMPTS)
    assert len(images) == 4 and stored.latents.shape[1] == 1
    move(trained, 0.05)
    return trained, sampler, stored


def collected(sampler: Sampler, stored: Trajectories, grad: bool = False) -> dict[int, NoisyPredictions]:
    kept: dict[int, NoisyPredictions] = {}

    def keep(t: int, solver_step: SolverStep, x0: Tensor) -> None:
        kept[t] = predictions_of(solver_step, x0)

    sampler.noised(stored, keep, grad=grad)
    return kept


@pytest.mark.parametrize("family", FAMILIES)
def test_noisy_latents_and_targets_are_those_of_the_forward_process(family: str) -> None:
    """x_t = α x0 + σ ε with the seeded ε after the first step; the target is ε, α ε − σ x0, or ε − x0."""
    _, sampler, stored = case(family)
    x0 = stored.latents[:, -1]
    assert stored.stochastic == ((0, 1, 2) if family in ("sd3", "flux") else (1, 2)), "the first is not pure noise"
    for t, one in collected(sampler, stored).items():
        if stored.stochastic[t] == 0:  # the pipeline's own noise
            continue
        epsilon = seeded_normal(TWO_PROMPTS.noises, x0, [f"forward {stored.stochastic[t]}"] * 4)
        if family in ("sd3", "flux"):
            alpha, sigma, target = 1 - one.noise, one.noise, epsilon - x0
        else:
            alpha = 1 / math.hypot(1, one.noise / (1 - one.noise))
            sigma = math.sqrt(1 - alpha**2)
            target = epsilon if family == "sd" else alpha * epsilon - sigma * x0
        torch.testing.assert_close(one.x_t, alpha * x0 + sigma * epsilon, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.target, target, atol=2e-3, rtol=1e-3)


def test_the_output_is_the_denoisers_own_on_these_latents() -> None:
    _, sampler, stored = case("sd")
    pipe, steps = sampler._pipe, collected(sampler, stored)
    pipe.scheduler.set_timesteps(3)
    texts = pipe.encode_prompt(list(TWO_PROMPTS.prompts), "cpu", 1, False)[0]
    for t, one in steps.items():
        at = pipe.scheduler.timesteps[stored.stochastic[t]]
        with torch.no_grad():
            truth = pipe.unet(one.x_t, at, encoder_hidden_states=texts).sample
        torch.testing.assert_close(one.new, truth, atol=1e-5, rtol=1e-5)


def gradients(trained: LoRA) -> dict[str, Tensor]:
    return {name: one.grad.clone() for name, one in trained.parameters.items() if one.grad is not None}


@pytest.mark.few(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_one_graph_over_all_levels(family: str) -> None:
    """NFT with a penalty of the reference, in two chunks, against the sum of all levels with one backward."""
    trained, sampler, stored = case(family)
    chunks = [stored.at([0, 1]), stored.at([2, 3])]
    steps = range(len(stored.stochastic))
    loss, weight = NFT(beta=0.5), 0.3
    value, metrics = forward_gradient(
        sampler,
        Batch(chunks, [], steps, SIGNAL),
        loss,
        old=trained.reference,  # the base model drew them
        reference=trained.reference,
        reference_weight=weight,
    )
    actual = gradients(trained)
    for parameter in trained.parameters.values():
        parameter.grad = None
    with trained.reference():
        base = {t: one.new for t, one in collected(sampler, stored).items()}
    terms, distances = [], []
    for t, one in collected(sampler, stored, grad=True).items():
        terms.append(loss(replace(one, old=base[t]), SIGNAL.flatten())[0].mean())
        distances.append(mean_square(one.new - base[t]).mean())
    truth, distance = torch.stack(terms).mean(), torch.stack(distances).mean()
    (truth + weight * distance).backward()
    assert value == pytest.approx(truth.item(), rel=1e-5)
    assert metrics["reference_distance"] == pytest.approx(distance.item(), rel=1e-4) and distance > 0
    for name, whole in gradients(trained).items():
        assert (actual[name] - whole).norm() <= 1e-4 * whole.norm() and whole.norm() > 0


def test_no_more_calls_than_the_policies_that_a_loss_needs() -> None:
    """4 rows at 2 levels, in one chunk: of the trained weights with a graph, of each other policy once more."""
    trained, sampler, stored = case("sd")
    batch, steps = Batch([stored], [], (0, 1), SIGNAL), 2
    for options, policies in (({}, 1), ({"old": trained.reference}, 2), ({"reference": trained.reference}, 2)):
        with counted(trained.denoiser) as calls:
            forward_gradient(sampler, batch, NFT(), **options)
        assert calls == [4] * steps * policies
    with pytest.raises(InputError, match="compares with the reference"):
        forward_gradient(sampler, batch, RAM())


SMALL: dict[str, Any] = {
    "seed": 5,
    "max_steps": 5,
    "train_batch_size": 2,
    "num_generations": 2,
    "steps_per_generation": 2,
    "micro_batch": 2,
    "num_inference_steps": 3,
    "call": {"height": 8, "width": 8},
    "lora_rank": 2,
    "learning_rate": 0.01,
    "eval_steps": 5,
    "save_steps": 3,
}
DATA: dict[str, Any] = {"train_prompts": ("a red circle", "a blue star"), "eval_prompts": ("two stars",)}
METHODS: Mapping[str, tuple[Any, Any]] = {
    "nft": (NFTTrainer, partial(NFTConfig, old_decay_rate=0.3)),
    "awm": (AWMTrainer, AWMConfig),
    "ram": (RAMTrainer, RAMConfig),
}


@pytest.mark.hard
@pytest.mark.parametrize("method", hard_but(METHODS, "nft"))
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(method: str, tmp_path: Path) -> None:
    """Inside a rollout, after the average of the weights has left both the base and the trained ones."""
    trainer, config = METHODS[method]
    results = []
    for name, parts in (("whole", [5]), ("parted", [3, 5])):
        for steps in parts:
            made = config(**SMALL | {"max_steps": steps, "output_dir": str(tmp_path / name)})
            result = trainer(fresh_pipe("sd"), "brightness", made, **DATA).train(resume_from_checkpoint=True)
        results.append(result)
    one, other = (load_file(result.weights) for result in results)
    assert results[1].step == 5 and all(torch.equal(value, other[name]) for name, value in one.items())
    assert all(record["grad_norm"] > 0 for record in results[0].records)
    measured = [record["step"] for record in results[0].records if "reference_distance" in record]
    assert measured == ([1, 2, 3, 4, 5] if method != "awm" else [1, 5])  # the first, and the last before an evaluation


@pytest.mark.parametrize("options", [{"dynamics": "flow-sde"}, {"eta": 0.5}])
@pytest.mark.parametrize("config", [NFTConfig, AWMConfig, RAMConfig, DPOConfig])
def test_noise_that_would_not_be_used_is_refused(config: Any, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"^{name} is the noise of eval_kl alone .*true, or leave {name}"):
        config(**options)
    assert not config(**options, eval_kl=True).evaluates_by_ode, "images come from the pipeline's own solver"
    assert config(eta=1.0, dynamics="ddim") == config()


@pytest.mark.hard
def test_dynamics_are_the_law_of_eval_kl_alone(tmp_path: Path) -> None:
    """The same weights and images by any law; another KL."""
    results = {}
    for law in ("ddim", "cps"):
        options = SMALL | {"max_steps": 2, "eval_steps": 2, "eval_kl": True, "output_dir": str(tmp_path / law)}
        trainer = NFTTrainer(fresh_pipe("sd3"), "brightness", NFTConfig(**options, dynamics=law), **DATA)
        results[law] = trainer.train()
    one, other = (load_file(result.weights) for result in results.values())
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    last = [result.evaluations[-1] for result in results.values()]
    assert last[0]["eval/brightness"] == last[1]["eval/brightness"]
    assert last[0]["eval/kl"] > 0 < last[1]["eval/kl"] != last[0]["eval/kl"]


@pytest.mark.few(1)
@pytest.mark.parametrize(("trainer", "config"), [(NFTTrainer, NFTConfig), (GRPOTrainer, GRPOConfig)])
def test_a_run_without_evaluations_has_a_model_card(trainer: Any, config: Any, tmp_path: Path) -> None:
    """The last update has no KL: never with a loss of the forward process, rarely where only the log needs it."""
    options = SMALL | {"max_steps": 2, "kl_every": 0, "output_dir": str(tmp_path / "run")}
    trained = trainer(fresh_pipe("sd"), "brightness", config(**options), train_prompts=DATA["train_prompts"])
    result = trained.train()
    assert not any("kl" in record for record in result.records)
    text = (trained.save_pretrained(tmp_path / "lora") / "README.md").read_text()
    write_report(trained, result)
    for card in (text, (tmp_path / "run" / "README.md").read_text()):
        assert "Nothing was evaluated on held-out prompts. Mean reward" in card and "KL" not in card


def test_the_averaged_weights_draw_the_samples(tmp_path: Path) -> None:
    """After rollout n: old ← d_n old + (1 − d_n) θ with d_n = min(.25 n, .5); no average where the decay is 0."""
    options = SMALL | {"steps_per_generation": 1, "max_steps": 3, "output_dir": str(tmp_path)}
    config = NFTConfig(old_decay_rate=0.25, **options)
    trainer = NFTTrainer(fresh_pipe("sd"), "brightness", config, **DATA)
    trained: list[list[Tensor]] = []

    class Watch:
        def on_step_end(self, args: Any, state: Any, control: Any, **details: Any) -> None:
            trained.append([one.detach().clone() for one in trainer.state.parameters])

    trainer.callbacks = (Watch(),)
    trainer.train()
    old = [one.detach() for one in LoRA(fresh_pipe("sd"), 2, seed=SMALL["seed"]).parameters.values()]
    for number, weights in enumerate(trained, 1):
        decay = min(0.25 * number, 0.5)
        old = [decay * before + (1 - decay) * now for before, now in zip(old, weights, strict=True)]
    for average, truth in zip(trainer.state.old.shadow_params, old, strict=True):
        torch.testing.assert_close(average, truth, atol=1e-6, rtol=1e-5)


RED = Soft(lambda images, prompts: images[:, 0].mean((1, 2)), "red")
RAMP = Soft(lambda images, prompts: torch.arange(len(images)) % 2 * 4.0, "ramp")  # 0, 4, 0, 4 …: mean 2, deviation 2


@pytest.mark.few(1)
@pytest.mark.parametrize("method", METHODS)
def test_multipliers_move_and_are_resumed(method: str, tmp_path: Path) -> None:
    """θ − mean = 8 − 2 is three deviations, so that μ rises by 3 rates in each update."""
    trainer, config = METHODS[method]
    options = SMALL | {"save_steps": 1, "eval_steps": 9, "constraints": {"ramp": ">= 8"}, "dual_rate": 0.1}
    for steps in (2, 3):
        made = config(**options | {"max_steps": steps, "output_dir": str(tmp_path)})
        result = trainer(fresh_pipe("sd"), combine({RED: 1.0, RAMP: 1.0}), made, **DATA).train(steps == 3)
    assert [record["multiplier/ramp"] for record in result.records] == pytest.approx([0.3, 0.6, 0.9])


def test_advantages_are_those_of_the_mixed_reward() -> None:
    """r = (0, 2), s_0 = 1; c = (4, 0) ≥ 6, s_c = 2, so that μ = ½·4/2 = 1 and r + μ s_0/s_c c = (2, 2); then (4, 2)."""
    config = NFTConfig(constraints={"ramp": ">= 6"}, dual_rate=0.5)
    trainer = NFTTrainer(None, combine({RED: 1.0, RAMP: 1.0}), config, train_prompts=["a"])
    scored = Scored(("a",), (), torch.tensor([[0.0, 2.0]]), {"ramp": torch.tensor([[4.0, 0.0]])})
    assert trainer.signal(scored).tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(trainer.signal(scored), torch.tensor([[1.0, -1.0]]), rtol=1e-4, atol=1e-4)
    assert trainer.metrics() == {"multiplier/ramp": 2.0}


def test_components_are_normalised_before_their_sum() -> None:
    """2 z(0, 1, 2) + z(1000 · (2, 1, 0)) = z(0, 1, 2); the raw sum would be the second alone."""
    red, blue = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2000.0, 1000.0, 0.0]])
    scored = Scored(("a",), (), 2 * red + blue, {"red": red, "ramp": blue})
    config = AWMConfig(normalize_components=True)
    trainer = AWMTrainer(None, combine({RED: 2.0, RAMP: 1.0}), config, train_prompts=["a"])
    torch.testing.assert_close(
        trainer.signal(scored), torch.tensor([[-1.0, 0.0, 1.0]]) * 1.5**0.5, rtol=1e-4, atol=1e-4
    )


def test_a_filtered_loss_is_that_of_the_kept_samples_by_the_advantages_of_all() -> None:
    """Rewards (0, 1, 5) and (3, 1, 2): best-worst keeps the samples 0, 2 of the first prompt and 0, 1 of the other."""
    pipe = pipe_of("sd")
    trained, sampler = LoRA(pipe, 2), Sampler(pipe, call("sd"))
    stored, _ = sampler.sample(Rows(("a star",) * 3 + ("two circles",) * 3, (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6)))
    move(trained, 0.05)
    rewards = torch.tensor([[0.0, 1.0, 5.0], [3.0, 1.0, 2.0]])
    config = NFTConfig(num_generations=3, sample_filter="best-worst", filter_keep=2, micro_batch=4)
    trainer = NFTTrainer(pipe, RED, config, train_prompts=["a star"])
    scored = Scored(("a star", "two circles"), (stored,), rewards, {})
    chunks, signal = trainer.select(scored, trainer.signal(scored), "update 0", SINGLE_PROCESS)
    assert [chunk.rows.noises for chunk in chunks] == [(1, 3, 4, 5)]
    spread = (14 / 3) ** 0.5, (2 / 3) ** 0.5  # standard deviations of the three rewards
    by_hand = torch.tensor([[-2 / spread[0], 3 / spread[0]], [1 / spread[1], -1 / spread[1]]])
    torch.testing.assert_close(signal, by_hand, rtol=1e-5, atol=1e-5)
    kept = stored.at([0, 2, 3, 4])
    terms = [config.loss()(one, by_hand.flatten())[0].mean() for one in collected(sampler, kept).values()]
    with counted(trained.denoiser) as calls:
        value, _ = forward_gradient(sampler, Batch(chunks, [], (0, 1), signal), config.loss())
    assert calls == [4, 4], "the samples that are left out cost no call"
    assert value == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("method", METHODS)
def test_the_samples_that_a_filter_leaves_out_cost_no_call(method: str, tmp_path: Path) -> None:
    trainer, config = METHODS[method]
    options = SMALL | {"num_generations": 4, "micro_batch": 4, "steps_per_generation": 1, "max_steps": 1, "kl_every": 0}
    rows = {}
    for kind in ("none", "best-worst"):
        pipe = fresh_pipe("sd")
        made = config(**options, sample_filter=kind, output_dir=str(tmp_path / kind))
        with counted(get_denoiser(pipe)[1]) as calls:
            result = trainer(pipe, "brightness", made, train_prompts=DATA["train_prompts"]).train()
        rows[kind] = sum(calls)
        assert result.records[0]["grad_norm"] > 0
    # Two prompts × 4 samples: 3 steps of the rollout, then 2 noise levels by the trained weights and, for NFT and RAM,
    # by the reference; with a filter half as many rows of these.
    policies = 1 if method == "awm" else 2
    assert rows == {"none": 8 * (3 + 2 * policies), "best-worst": 8 * 3 + 4 * 2 * policies}


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    for options, message in (
        ({"kl_weight": 0.1}, r"kl_weight is for methods with log-probabilities, got 0\.1: give DiffusionNFT a ref"),
        ({"kl_budget_nats": 3.0}, "kl_budget_nats is for methods with log-probabilities"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"old_decay_max": 1.0}, "old_decay_max must be"),
        ({"constraints": {"red": "low"}}, "constraints: red must be like"),
        ({"sample_filter": "best", "filter_keep": 1}, "filter_keep must be from 2 to num_generations = 4, got 1"),
    ):
        with pytest.raises(InputError, match=message):
            NFTConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="micro_batch must be even"):
        DPOConfig(micro_batch=3)
    with pytest.raises(InputError, match="asynchronous_rewards score samples of train_prompts, not preferences"):
        DPOTrainer(None, config=DPOConfig(asynchronous_rewards=True), preferences="pairs.jsonl")
    with pytest.raises(InputError, match="learns from pairs of images: give preferences"):
        DPOTrainer(fresh_pipe("sd"), "brightness", train_prompts=("a star",))


@pytest.mark.hard
@pytest.mark.parametrize("method", METHODS)
def test_a_reward_without_gradients_rises_on_the_embedded_scenes(method: str, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    trainer, config = METHODS[method]
    sizes = {"train_batch_size": 4, "num_generations": 8, "micro_batch": 32, "num_inference_steps": 8}
    rest = {"max_steps": 12, "learning_rate": 1e-3, "eval_steps": 12, "num_generations_eval": 8}
    made = config(output_dir=str(tmp_path), **sizes, **rest)
    prompts = ("a red circle", "a blue star", "two green squares", "a yellow cross")
    result = trainer(pipe, "jpeg", made, train_prompts=prompts, eval_prompts=("a red star", "a blue square")).train()
    first, last = (one["eval/jpeg"] for one in result.evaluations)
    assert last[0] > first[2], "above the interval of the base model"


BACKGROUND, COLOURS = 0.9, {"red": (0.85, 0.1, 0.1), "blue": (0.1, 0.2, 0.85)}


def square(colour: str, left: int) -> Image.Image:
    """A scene as the embedded VAE knows them: a square on light grey."""
    image = Image.new("RGB", (64, 64), (round(255 * BACKGROUND),) * 3)
    image.paste(tuple(round(255 * value) for value in COLOURS[colour]), (left, 16, left + 24, 40))
    return image


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs, red preferred to blue, and a tie, as `steer rewards train` reads them."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(5):
        for colour in COLOURS:
            square(colour, 4 + 8 * number).save(folder / f"{colour}{number}.png")
        files = {"image_a": f"red{number}.png", "image_b": f"blue{number}.png"}
        rows.append(files | {"prompt": f"a square {number}", "choice": "tie" if number == 4 else "a"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def colourful(table: Path) -> Path:
    """The same table, of images of a dark blue."""
    folder = table.parent / "dark"
    folder.mkdir(exist_ok=True)
    for number in range(5):
        for colour in COLOURS:
            image = Image.new("RGB", (64, 64), (10, 10, 60))
            image.paste((60, 50, 0), (0, 8 * number, 64, 8 * number + 4))
            image.save(folder / f"{colour}{number}.png")
    return Path(shutil.copy(table, folder))


def dpo(table: Path, out: Path, **options: Any) -> DPOTrainer:
    config = {"max_steps": 2, "train_batch_size": 2, "micro_batch": 4, "num_inference_steps": 2, "lora_rank": 2}
    made = DPOConfig(output_dir=str(out), learning_rate=1e-2, **config | options)
    return DPOTrainer(StableDiffusionPipeline.from_pretrained(MODELS["scenes"]), preferences=table, config=made)


def test_dpo_learns_from_a_table_of_pairs(table: Path, tmp_path: Path) -> None:
    """log 2 at the start, where the policy is the reference; latents are encoded once, and verified when used again."""
    trainer = dpo(table, tmp_path)
    result = trainer.train()
    assert result.records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and result.records[0]["accuracy"] == 0.5
    assert result.records[0]["turn"] == 0.0 and result.records[1]["turn"] == 0.5, "four pairs: the tie is left out"
    assert result.records[1]["loss"] != pytest.approx(math.log(2), abs=1e-6)
    (cached,) = tmp_path.glob("image-pairs/*/latents.safetensors")
    latents = load_file(cached)["latents"]
    vae = trainer.pipe.vae
    image = torch.from_numpy(np.array(square("red", 4))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        truth = vae.encode(2 * image - 1).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(latents[0, :1], truth, atol=1e-4, rtol=1e-4)
    before = file_sha256(cached)
    with pytest.raises(InputError, match="does not decode its encoded images to themselves"):
        dpo(colourful(table), tmp_path / "other").train()  # which this VAE has never seen
    damaged = bytearray(cached.read_bytes())
    damaged[-1] ^= 1
    cached.write_bytes(damaged)
    assert file_sha256(cached) != before
    with pytest.raises(InputError, match=r"latents\.safetensors"):
        dpo(table, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.hard
def test_latents_are_encoded_again_by_another_autoencoder(table: Path, tmp_path: Path) -> None:
    first = dpo(table, tmp_path)
    latents = [first.preference_source(table).latents]
    again = dpo(table, tmp_path)
    again.pipe.vae.encode = None  # the same autoencoder: nothing is encoded
    assert torch.equal(again.preference_source(table).latents, latents[0])
    for change in ("weights", "scale"):
        other = dpo(table, tmp_path)
        with torch.no_grad():
            if change == "weights":
                next(other.pipe.vae.encoder.parameters()).flatten()[-1] += 1e-3
            else:
                other.pipe.vae.register_to_config(scaling_factor=1.01 * other.pipe.vae.config.scaling_factor)
        latents.append(other.preference_source(table).latents)
    assert len(list(tmp_path.glob("image-pairs/*/latents.safetensors"))) == 3
    torch.testing.assert_close(latents[2], 1.01 * latents[0])
    assert not torch.equal(latents[1], latents[0])


def test_an_autoencoder_that_overflows_in_half_precision_encodes_in_float32() -> None:
    """As SDXL's, whose config says force_upcast: the weights are those of float16, the arithmetic is not."""
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    image = torch.from_numpy(np.array(square("red", 4))).permute(2, 0, 1)[None] / 255
    vae = pipe.vae.to(torch.float16)
    shape = (vae.config.latent_channels, 64 // pipe.vae_scale_factor, 64 // pipe.vae_scale_factor)
    vae.register_to_config(force_upcast=True)
    latents = encode(pipe, image, shape)
    assert vae.dtype == torch.float16 and latents.dtype == torch.float32
    with torch.no_grad():
        truth = vae.to(torch.float32).encode(2 * image - 1).latent_dist.mode() * vae.config.scaling_factor
    assert torch.equal(latents, truth)


def test_latents_that_are_not_finite_are_refused_by_pair(table: Path, tmp_path: Path) -> None:
    trainer = dpo(table, tmp_path)
    encoder, rows = trainer.pipe.vae.encode, list[int]()

    def broken(images: Tensor) -> Any:
        rows.extend(range(len(images)))
        images[1 if len(rows) > 4 else 4 :] = math.nan  # from the sixth image on, of the third pair
        return encoder(images)

    trainer.pipe.vae.encode = broken
    with pytest.raises(InputError, match=r"an image of pair 3 \('a square 2'\) to latents that are not finite: load"):
        trainer.preference_source(table)


@pytest.mark.hard
def test_dpo_learns_to_rank_as_labelled(table: Path, tmp_path: Path) -> None:
    learned = dpo(table, tmp_path / "own", max_steps=20, train_batch_size=4, micro_batch=8).train()
    assert learned.records[-1]["accuracy"] == 1.0 and learned.records[-1]["loss"] < 0.6


def test_tables_without_a_preference_and_other_trainers_refuse_in_one_line(table: Path, tmp_path: Path) -> None:
    row = json.loads(table.read_text().splitlines()[0]) | {"choice": 0.5}
    (table.parent / "ties.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="all 1 pairs are ties"):
        DPOTrainer.check_preferences(table.parent / "ties.jsonl", {})
    with pytest.raises(
        InputError, match="preferences are for methods that learn from them, such as D3PO, not DiffusionNFT"
    ):
        NFTTrainer(fresh_pipe("sd"), preferences=table)
    with pytest.raises((InputError, OSError)):
        D3POTrainer(fresh_pipe("sd"), preferences=table)
