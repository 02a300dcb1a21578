"""A token of the prompt, trained in place of a LoRA: its gradient, runs of Diffusion-DPO, exported files, refusals."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT
from diffusers import StableDiffusionPipeline
from rollouts import TWO_PROMPTS, call_of, fresh_pipe
from safetensors.torch import load_file
from soft_rewards import images_of, models_of, seeded
from test_forward import COLOURS, square
from torch import Tensor

from steer import MODELS, DPOConfig, DPOTrainer
from steer.apps.models import adapter_applied, find_adapter
from steer.errors import InputError
from steer.pipelines.training.distributed import AccelerateContext
from steer.training.forward import forward_gradient
from steer.training.gradient import Batch
from steer.training.losses.forward import DiffusionDPO
from steer.training.rollout import Sampler
from steer.training.trainable import EMBEDDINGS, TOKEN, ContextToken, load_token

PREFIX = f"{TOKEN} "
KEYS = {"sd": [TOKEN], "sdxl": ["clip_l", "clip_g"]}
PREFERRED = torch.tensor([[1.0, 0.0], [0.3, 0.7]])


def pipe_of(name: str) -> Any:
    """A tiny pipeline with tokenizers of its own, and 2 as the end token of SDXL's second encoder, as published."""
    pipe = fresh_pipe(name)
    if name == "sdxl":  # the pooled output would be taken at the highest number, which is the token's
        pipe.text_encoder_2.text_model.eos_token_id = pipe.text_encoder_2.config.eos_token_id = 2
    for part in ("tokenizer", "tokenizer_2"):
        if hasattr(pipe, part):
            setattr(pipe, part, copy.deepcopy(getattr(pipe, part)))
    return pipe


def image(pipe: Any, name: str = "sd", prefix: str = PREFIX) -> Tensor:
    return images_of(pipe, prompt=prefix + PROMPT, **call_of(name, steps=2), generator=seeded())


def moved(pipe: Any, far: float = 3.0) -> ContextToken:
    """A token that has moved far: tiny random encoders hardly tell words apart."""
    trained = ContextToken(pipe)
    with torch.no_grad():
        for number, parameter in enumerate(trained.parameters.values()):
            parameter += far * torch.randn(parameter.shape, generator=seeded(number))
    return trained


@pytest.mark.parametrize("name", KEYS)
def test_a_token_begins_at_the_reference_and_all_else_is_frozen(name: str) -> None:
    base, comma = (image(pipe_of(name), name, prefix) for prefix in ("", ", "))
    pipe = pipe_of(name)
    before = {key: copy.deepcopy(model.state_dict()) for key, model in models_of(pipe).items()}
    expected = torch.rand(3, generator=seeded())
    torch.manual_seed(0)
    trained = moved(pipe)
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers are unchanged"
    assert list(trained.parameters) == KEYS[name]
    there = image(pipe, name)
    with trained.reference():
        assert torch.equal(image(pipe, name), comma)
    assert torch.equal(image(pipe, name), there) and (there - comma).abs().max() > 1e-4
    assert torch.equal(image(pipe, name, ""), base), "prompts without the token"
    for key, model in models_of(pipe).items():
        assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
        for part, value in before[key].items():
            assert torch.equal(model.state_dict()[part][: len(value)] if value.dim() else value, value)
    trained.state()
    for hooked in (pipe.text_encoder, getattr(pipe, "text_encoder_2", pipe.text_encoder)):
        hooked.get_input_embeddings()._forward_hooks.clear()
    assert torch.equal(image(pipe, name), there), "the table of embeddings holds the token's"


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", KEYS)
def test_the_gradient_is_that_of_finite_differences(name: str, scale: float) -> None:
    """Along the gradient itself, of two levels and two chunks; with guidance, the negative prompt has no token."""
    trained = moved(pipe_of(name))
    call = call_of(name, steps=3) | {"guidance_scale": scale}
    sampler = Sampler(trained.pipe, call, prompt_prefix=PREFIX)
    stored, _ = sampler.sample(TWO_PROMPTS)
    steps = range(len(stored.stochastic))
    batch, loss = Batch([stored.at([0, 1]), stored.at([2, 3])], [], steps, PREFERRED), DiffusionDPO(beta=300.0)

    def value() -> float:
        for parameter in trained.parameters.values():
            parameter.grad = None
        return forward_gradient(sampler, batch, loss, reference=trained.reference)[0]

    assert abs(value() - math.log(2)) > 1e-3
    gradients = [parameter.grad.clone() for parameter in trained.parameters.values() if parameter.grad is not None]
    assert len(gradients) == len(KEYS[name]) and all(one.any() for one in gradients)
    for parameter, gradient in zip(trained.parameters.values(), gradients, strict=True):
        values, there = [], parameter.detach().clone()
        step = 0.05 * gradient / gradient.norm()
        for sign in (1, -1):
            parameter.data = there + sign * step
            values.append(value())
        parameter.data = there
        assert (values[0] - values[1]) / 2 == pytest.approx((gradient * step).sum().item(), rel=0.02)


@pytest.mark.parametrize("name", KEYS)
def test_an_exported_token_loads_in_a_fresh_pipeline(name: str, tmp_path: Path) -> None:
    pipe = pipe_of(name)
    trained = moved(pipe)
    file = trained.write(trained.state(), tmp_path)
    assert file == tmp_path / EMBEDDINGS and sorted(load_file(file)) == sorted(KEYS[name])
    fresh = pipe_of(name)
    if name == "sd":
        fresh.load_textual_inversion(tmp_path)
    else:
        learned = load_file(file)
        for key, part in (("clip_l", ""), ("clip_g", "_2")):
            place = {one: getattr(fresh, f"{one}{part}") for one in ("text_encoder", "tokenizer")}
            fresh.load_textual_inversion(learned[key], token=TOKEN, **place)
        fresh.text_encoder_2.text_model.eos_token_id = fresh.tokenizer_2.eos_token_id
    assert torch.equal(image(fresh, name), image(pipe, name))
    loaded = pipe_of(name)
    base = image(loaded, name, "")
    for _ in range(2):  # what is unloaded can be loaded again
        with adapter_applied(loaded, str(tmp_path)) as off:
            assert torch.equal(image(loaded, name, ""), image(pipe, name)), "every prompt has the token"
            with off():
                assert torch.equal(image(loaded, name, ""), base)
            assert torch.equal(image(loaded, name, ""), image(pipe, name))
        assert torch.equal(image(loaded, name, ""), base) and "encode_prompt" not in vars(loaded)


def test_a_token_in_half_precision_learns_in_fp32() -> None:
    pipe = pipe_of("sd").to(torch.bfloat16)
    comma = image(pipe, prefix=", ")
    trained = ContextToken(pipe)
    assert torch.equal(image(pipe), comma)
    assert all(one.dtype == torch.float32 for one in trained.parameters.values())
    sampler = Sampler(pipe, call_of("sd", steps=2), precision="model", prompt_prefix=PREFIX)
    stored, _ = sampler.sample(TWO_PROMPTS)
    forward_gradient(sampler, Batch([stored], [], (0,), PREFERRED), DiffusionDPO(), reference=trained.reference)
    assert all(one.grad is not None and one.grad.isfinite().all() for one in trained.parameters.values())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pairs, red preferred to blue."""
    folder, rows = tmp_path_factory.mktemp("pairs"), []
    for number in range(4):
        for colour in COLOURS:
            square(colour, 4 + 8 * number).save(folder / f"{colour}{number}.png")
        rows.append(
            {"image_a": f"red{number}.png", "image_b": f"blue{number}.png", "prompt": "a square", "choice": "a"}
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def dpo(pairs: Path, out: Path, **options: Any) -> DPOTrainer:
    config = {"max_steps": 2, "train_batch_size": 2, "micro_batch": 4, "num_inference_steps": 2, "beta": 300.0}
    config |= {"eval_steps": 2, "learning_rate": 0.05} | options
    made = DPOConfig(output_dir=str(out), context=True, **config)
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    held_out: dict[str, Any] = {"eval_prompts": ["a red square"], "eval_rewards": ["colour:red"]}
    return DPOTrainer(pipe, preferences=pairs, config=made, **held_out)


def test_a_run_trains_the_token_alone_and_exports_it(pairs: Path, tmp_path: Path) -> None:
    trainer = dpo(pairs, tmp_path)
    pipe = trainer.pipe
    before = {key: copy.deepcopy(model.state_dict()) for key, model in models_of(pipe).items()}
    result = trainer.train()
    assert result.records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and result.records[0]["accuracy"] == 0.5
    assert result.records[1]["loss"] != pytest.approx(math.log(2), abs=1e-5), "the text is encoded again"
    assert result.evaluations[0]["eval/colour:red"] != result.evaluations[1]["eval/colour:red"], "in evaluations too"
    for key, model in models_of(pipe).items():
        after = model.state_dict()
        assert after.keys() == before[key].keys()
        assert all(torch.equal(after[part][: len(value)], value) for part, value in before[key].items() if value.dim())
    assert result.weights == tmp_path / "final" / EMBEDDINGS and (tmp_path / "best" / EMBEDDINGS).is_file()
    call = {"num_inference_steps": 2, "guidance_scale": 1.0}
    truth = images_of(pipe, prompt="<context> a star", generator=seeded(), **call)
    card = (trainer.save_pretrained(tmp_path / "saved") / "README.md").read_text()
    assert "A textual inversion of scenes" in card and "- textual-inversion" in card
    code = re.findall(r"```python\n(.*?)```", card, re.S)[0]
    names: dict[str, Any] = {}
    exec(code.replace('run = "."', f"run = {str(tmp_path / 'saved')!r}").replace("…", "a star"), names)
    assert names["prompt"] == "<context> a star"
    assert torch.equal(images_of(names["pipe"], prompt=names["prompt"], generator=seeded(), **call), truth)
    plain = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    for place in (tmp_path / "final", tmp_path / "checkpoints" / "step-00000002"):
        with adapter_applied(plain, str(place)):
            assert torch.equal(images_of(plain, prompt="a star", generator=seeded(), **call), truth)
    with pytest.raises(InputError, match="holds a token: give it alone, without a weight"):
        find_adapter(f"{tmp_path / 'final'}:0.5")
    with pytest.raises(
        InputError, match=r"StableDiffusionXLPipeline needs the embeddings clip_l, clip_g, got <context>"
    ):
        load_token(pipe_of("sdxl"), load_file(result.weights))


@pytest.mark.parametrize("decay", [0.0, pytest.param(0.5, marks=pytest.mark.hard)])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(decay: float, pairs: Path, tmp_path: Path) -> None:
    weights = []
    for name, parts in (("whole", [3]), ("parted", [2, 3])):
        for steps in parts:
            options = {"max_steps": steps, "save_steps": 1, "eval_steps": 9, "ema_decay": decay}
            result = dpo(pairs, tmp_path / name, **options).train(resume_from_checkpoint=True)
        assert result.weights is not None
        weights.append(load_file(result.weights)[TOKEN])
    assert torch.equal(*weights)


@pytest.mark.hard
def test_a_token_learns_to_rank_as_labelled(pairs: Path, tmp_path: Path) -> None:
    learned = dpo(pairs, tmp_path, max_steps=30, train_batch_size=4, micro_batch=8, eval_steps=30).train()
    last = learned.records[-5:]
    assert sum(record["loss"] for record in last) / 5 < 0.6 and sum(record["accuracy"] for record in last) / 5 > 0.8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flux", "FluxPipeline has the text encoder T5EncoderModel"),
        ("sd3", "StableDiffusion3Pipeline has the text encoder T5EncoderModel"),
        ("pixart", "PixArtSigmaPipeline has the text encoder T5EncoderModel"),
    ],
)
def test_other_text_encoders_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"{message}: leave context out to train a LoRA"):
        DPOTrainer(fresh_pipe(name), preferences="pairs.jsonl", config=DPOConfig(context=True))


@pytest.mark.parametrize(
    "options", [{"lora_rank": 4}, {"lora_rank": 0}, {"lora_alpha": 2.0}, {"use_dora": True}, {"init_adapter": "a"}]
)
def test_options_of_a_lora_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(
        InputError, match=f"^{name} is for weights of the denoiser, got .* context trains a token: leave"
    ):
        DPOConfig(context=True, **options)
    assert DPOConfig(context=True, reference_weight=0.1, gradient_checkpointing=True).prompt_prefix == PREFIX


def test_several_processes_and_a_second_token_are_refused() -> None:
    class TwoProcesses:
        process_index, num_processes = 0, 2

    with pytest.raises(InputError, match="context trains in one process, got 2: use one, or leave context out"):
        AccelerateContext(TwoProcesses()).check(DPOConfig(context=True))  # type: ignore[arg-type]
    pipe = pipe_of("sd")
    ContextToken(pipe)
    with pytest.raises(InputError, match="text_encoder already has a token '<context>': reload the pipeline"):
        ContextToken(pipe)
