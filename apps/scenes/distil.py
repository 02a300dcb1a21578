"""Distillation of scenes to few steps (DMD2, arXiv 2405.14867; a LoRA adapter), and of its decoder to a tiny one."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from steer.apps.scenes.preferences import trained_prompts
from steer.apps.scenes.training import CALL, CHANNELS, encode, image_loss, to_model, token_ids, training_scenes
from steer.diffusion.step_hooks import SolverStep, hook_steps
from steer.files import atomic_write
from steer.training.supervised import TrainingRun, batch_at

PROMPTS = 20_000
BATCH = 32
GUIDANCE = 4.0  # of the teacher, chosen for its accuracy; built into the student
STARTS = (999, 759, 499, 259)  # timesteps that LCMScheduler visits in 1, 2 and 4 steps
SINGLE_STEP = (0.7, 0.1, 0.1, 0.1)  # shares of STARTS in a batch: a single step is the hardest
SEVERAL_STEPS = (0.4, 0.2, 0.2, 0.2)  # shares from step LATER on
LATER = 6_000
FAKE_STEPS = 1  # steps of the fake score for one of the student
EARLIEST, LATEST = 20, 980  # timesteps at which distributions are compared
GUIDANCE_WIDTH = 32  # of an embedding of the guidance scale without effect: guidance is built in


def noised(scheduler: Any, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = α_t x0 + σ_t ε, channels last."""
    mixed: Tensor = scheduler.add_noise(x0, noise, t)
    return mixed.contiguous(memory_format=torch.channels_last)


def denoised(unet: UNet2DConditionModel, scheduler: Any, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """x̂0 = α_t x_t − σ_t v̂."""
    square = scheduler.alphas_cumprod.to(x_t)[t].view(-1, 1, 1, 1)
    v = unet(x_t, t, text, return_dict=False)[0]
    return square.sqrt() * x_t - (1 - square).sqrt() * v


@dataclass
class Distillation:
    """A student G, its teacher, and the learned score of its own images.

    texts  (P, L, C) features of the prompts; nothing  (1, L, C) those of no prompt
    """

    teacher: UNet2DConditionModel
    student: UNet2DConditionModel
    fake: UNet2DConditionModel
    scheduler: Any
    texts: Tensor
    nothing: Tensor

    def loss_at(self, step: int) -> Tensor:
        """Compute the loss of the student, or of the fake score in the FAKE_STEPS after it, by the step's number."""
        rng = Generator().manual_seed(step)
        text = self.texts[torch.randint(len(self.texts), (BATCH,), generator=rng)]
        if step % (1 + FAKE_STEPS) == 0:
            return self.matching_loss(self.images(text, step, rng), text, rng)
        with torch.no_grad():
            x0 = self.images(text, step, rng)
        return self.denoising_loss(x0, text, rng)

    def images(self, text: Tensor, step: int, rng: Generator) -> Tensor:
        """Generate x0 (N, …) by the student, in one step from noise or from its own noised images."""
        x_t, again = self._noise(rng), self._noise(rng)
        shares = torch.tensor(SINGLE_STEP if step < LATER else SEVERAL_STEPS)
        t = torch.tensor(STARTS)[torch.multinomial(shares, BATCH, replacement=True, generator=rng)]
        later = (t != STARTS[0]).nonzero().flatten()  # rows that begin with an image of their own
        if len(later):
            with torch.no_grad():
                start = torch.full_like(later, STARTS[0])
                first = denoised(self.student, self.scheduler, x_t[later], start, text[later])
                x_t[later] = noised(self.scheduler, first, again[later], t[later])
        return denoised(self.student, self.scheduler, x_t, t, text)

    def matching_loss(self, x0: Tensor, text: Tensor, rng: Generator) -> Tensor:
        """A loss whose gradient at x0 is (x̂0_fake − x̂0_real) / mean|x0 − x̂0_real|: that of KL(G ‖ teacher) (eq. 3)."""
        t = torch.randint(EARLIEST, LATEST, (BATCH,), generator=rng)
        with torch.no_grad():
            x_t = noised(self.scheduler, x0, self._noise(rng), t)
            fake = denoised(self.fake, self.scheduler, x_t, t, text)
            blind = denoised(self.teacher, self.scheduler, x_t, t, self.nothing.expand_as(text))
            real = blind + GUIDANCE * (denoised(self.teacher, self.scheduler, x_t, t, text) - blind)
            scale = (x0 - real).abs().mean((1, 2, 3), keepdim=True)
            target = x0 - (fake - real) / scale
        return 0.5 * F.mse_loss(x0, target)

    def denoising_loss(self, x0: Tensor, text: Tensor, rng: Generator) -> Tensor:
        """‖v − v̂_fake‖² on the student's images: the fake score learns theirs."""
        t, noise = torch.randint(0, 1000, (BATCH,), generator=rng), self._noise(rng)
        predicted = self.fake(noised(self.scheduler, x0, noise, t), t, text, return_dict=False)[0]
        return F.mse_loss(predicted, self.scheduler.get_velocity(x0, noise, t))

    def _noise(self, rng: Generator) -> Tensor:
        size, channels = self.student.config.sample_size, self.student.config.in_channels
        noise = torch.randn(BATCH, channels, size, size, generator=rng)
        return noise.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def text_features(pipe: StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    """Encode each prompt once: (P, L, C)."""
    return torch.cat(
        [pipe.text_encoder(token_ids(pipe.tokenizer, prompts[n : n + 500]))[0] for n in range(0, len(prompts), 500)]
    )


def with_adapter(unet: UNet2DConditionModel, adapter: Path | None) -> UNet2DConditionModel:
    """A copy of a denoiser, with the LoRA adapter of a folder added to its weights."""
    merged = copy.deepcopy(unet)
    if adapter is not None:
        merged.load_lora_adapter(adapter, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        merged.fuse_lora()
        merged.unload_lora()
    return merged


def distil(folder: Path, model: str | Path, steps: int, learning_rate: float = 2e-4, start: Path | None = None) -> None:
    """Distil `model` to folder/pipeline, with averaged weights and an LCMScheduler.

    start  a LoRA adapter of few steps (`distil_lora`) that the student begins with; None: the teacher's weights
    """
    pipe = StableDiffusionPipeline.from_pretrained(model)
    teacher = pipe.unet.to(memory_format=torch.channels_last).requires_grad_(False)
    student, fake = (one.requires_grad_(True) for one in (with_adapter(teacher, start), copy.deepcopy(teacher)))
    texts = text_features(pipe, list(dict.fromkeys(trained_prompts(PROMPTS))))
    nothing = text_features(pipe, [""])
    distillation = Distillation(teacher, student, fake, pipe.scheduler, texts, nothing)
    modules = torch.nn.ModuleList([student, fake])
    TrainingRun(folder, steps, learning_rate, average=0.999).train([modules], distillation.loss_at)
    assemble_turbo(pipe, student).save_pretrained(folder / "pipeline")


def assemble_turbo(pipe: StableDiffusionPipeline, student: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The teacher's pipeline with the student and LCMScheduler in it.

    The student takes an embedding of the guidance scale, as LCMs do, that is multiplied by zero: diffusers then
    runs it without classifier-free guidance whatever the scale.
    """
    unet = UNet2DConditionModel.from_config({**student.config, "time_cond_proj_dim": GUIDANCE_WIDTH})
    zero_projection = {"time_embedding.cond_proj.weight": torch.zeros_like(unet.time_embedding.cond_proj.weight)}
    unet.load_state_dict(student.state_dict() | zero_projection)
    turbo = StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    turbo.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return turbo


PATHS = 5000  # sampling runs of the teacher
RANK = 32
LORA_BATCH = 64
LORA_MODULES = (
    r".*(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2"
    r"|conv1|conv2|conv_shortcut|conv|conv_in|conv_out|time_emb_proj|linear_1|linear_2)"
)


@torch.no_grad()
def teacher_paths(folder: Path, pipe: StableDiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    """Sampling runs of the teacher, stored in the folder: x (P, T, …), its timesteps (T,), and the end x0 (P, …)."""
    path = folder / "paths.safetensors"
    if not path.exists():
        view = copy.copy(pipe)
        view.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        runs: list[Tensor] = []
        for start in tqdm(range(0, len(prompts), IMAGES_PER_CALL), "paths", disable=None):
            some, x_t = prompts[start : start + IMAGES_PER_CALL], list[Tensor]()

            def keep(step: SolverStep, x_t: list[Tensor] = x_t) -> None:
                x_t.append(step.x.half())

            with hook_steps(view, keep, rows=len(some)) as hooked:
                generator = Generator().manual_seed(start)
                x0 = hooked(some, generator=generator, output_type="latent", **CALL).images
            runs.append(torch.stack([*x_t, x0.half()], 1))
        x = torch.cat(runs)
        view.scheduler.set_timesteps(CALL["num_inference_steps"])  # the view stepped a copy
        paths = {"x": x[:, :-1], "x0": x[:, -1], "timesteps": view.scheduler.timesteps}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as new:
            save_file({name: data.contiguous() for name, data in paths.items()}, new)
    return load_file(path)


def distil_lora(folder: Path, model: str | Path, steps: int, learning_rate: float = 1e-3) -> None:
    """Distil `model` to a LoRA adapter of few steps, folder/lora, that keeps the teacher's trajectory.

    L = huber(x̂0_lora(x_t, t, prompt) − x0)    over x_t of the teacher's runs (guidance 4) that end at x0

    A consistency function (arXiv 2303.01469, eq. 1) learned from the solver's own ends instead of its own next step:
    they cost one run of each prompt and nothing afterwards. x̂0 is without guidance: it is built in.
    """
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    prompts = trained_prompts(PATHS)
    paths, texts = teacher_paths(folder, pipe, prompts), text_features(pipe, prompts)
    unet = pipe.unet.to(memory_format=torch.channels_last).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LORA_MODULES))

    def loss_at(step: int) -> Tensor:
        rng = Generator().manual_seed(step)
        rows = torch.randint(len(prompts), (LORA_BATCH,), generator=rng)
        places = torch.randint(len(paths["timesteps"]), (LORA_BATCH,), generator=rng)
        x_t = paths["x"][rows, places].float().contiguous(memory_format=torch.channels_last)
        x0 = denoised(unet, pipe.scheduler, x_t, paths["timesteps"][places], texts[rows])
        return F.smooth_l1_loss(x0, paths["x0"][rows].float(), beta=0.1)

    TrainingRun(folder, steps, learning_rate, decay=0.5, average=0.999).train([unet], loss_at)
    layers = {name: value.half() for name, value in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=layers)


WIDTH = 16
DECODER_BATCH = 32
CLEAN_ROWS = 8  # of a batch: latents of drawn scenes; the other rows are x̂0 of sampling runs
SCENES = 4096
DECODER_PROMPTS = 1024
READ = range(4, 20, 2)  # solver steps of 20 whose x̂0 is learned from: blurry ones too, as previews are
IMAGES_PER_CALL = 32  # images of one call


def new_tiny_vae() -> AutoencoderTiny:
    """diffusers' TAESD with 16 channels, and most of its blocks at low resolution."""
    return AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(3, 2, 1, 0),
    )


@torch.no_grad()
def path_latents(pipe: StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    """x̂0 (steps · P, 8, 8, 8) of one sampling run for each prompt, at the steps of READ."""
    x0s: list[Tensor] = []

    def on_step(solver_step: SolverStep) -> None:
        if solver_step.k in READ:
            x0s.append(solver_step.x0())

    for start in range(0, len(prompts), IMAGES_PER_CALL):
        some = prompts[start : start + IMAGES_PER_CALL]
        with hook_steps(pipe, on_step, rows=len(some)) as view:
            view(some, generator=Generator().manual_seed(start), output_type="latent", **CALL)
    return torch.cat(x0s)


@torch.no_grad()
def full_images(vae: Any, latents: Tensor) -> Tensor:
    """Decode latents by the full decoder: uint8 (N, 3, 64, 64)."""
    decoded = torch.cat([vae.decode(z / vae.config.scaling_factor).sample for z in latents.split(IMAGES_PER_CALL)])
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def pairs(folder: Path, pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Latents of drawn scenes and of sampling runs with their images by the full decoder, stored in the folder."""
    path = folder / "pairs.safetensors"
    if not path.exists():
        latents = {
            "clean": encode(pipe.vae, training_scenes(SCENES)[0]),
            "path": path_latents(pipe, trained_prompts(DECODER_PROMPTS)),
        }
        images = {f"{name}_images": full_images(pipe.vae, z) for name, z in latents.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as new:
            save_file({name: data.contiguous() for name, data in (latents | images).items()}, new)
    return load_file(path)


def train_tiny_decoder(folder: Path, model: str | Path, steps: int, learning_rate: float = 2e-3) -> AutoencoderTiny:
    """Train on the latents of `model` and saves to folder/vae, with averaged weights in half precision.

    L = image_loss(D(z), D_full(z)) over all z  +  ‖E(D_full(z)) − z‖² over those of drawn scenes
    """
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    data = pairs(folder, pipe)
    vae = new_tiny_vae().to(memory_format=torch.channels_last)

    def loss_at(step: int) -> Tensor:
        clean = batch_at(step, CLEAN_ROWS, len(data["clean"]))
        path = batch_at(step, DECODER_BATCH - CLEAN_ROWS, len(data["path"]))
        z = torch.cat([data["clean"][clean], data["path"][path]])
        images = to_model(torch.cat([data["clean_images"][clean], data["path_images"][path]]))
        decoded = vae.decode(z.contiguous(memory_format=torch.channels_last)).sample
        encoded = vae.encode(images[: len(clean)]).latents
        return image_loss(decoded, images) + F.mse_loss(encoded, z[: len(clean)])

    TrainingRun(folder, steps, learning_rate, average=0.999).train([vae], loss_at)
    vae.half().save_pretrained(folder / "vae")
    config = folder / "vae/config.json"
    vae_config = json.loads(config.read_text())
    del vae_config["block_out_channels"]  # diffusers derives it, and warns where a file has it
    config.write_text(json.dumps(vae_config, indent=2) + "\n")
    return vae.float()
