"""The model card of a training: a README.md for the Hugging Face hub, by huggingface_hub's ModelCard."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from steer import __version__
from steer.assets import MODELS, TEXT_MODELS
from steer.diffusion.token_hooks import is_token_scheduler
from steer.pipelines.base import takes_eta
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.method import TrainingResult
from steer.training.overoptimization import find_hacking, guaranteed_gain
from steer.training.trainable import EMBEDDINGS, LORA_FILES, SECOND_DENOISER, TOKEN, get_denoiser, token_encoders

LORA, PEFT = LORA_FILES
PACKAGES = ("torch", "diffusers", "peft")
KL_ROW = "KL, nats per trajectory"
PICTURES = {
    "before-after.png": "The same held-out prompts and seeds, before and after",
    "rewards.png": "The trained reward and the held-out ones",
    "overoptimization.png": "Rewards over the square root of the KL, as gains in deviations of the base model",
    "divergence.png": "Divergence from the base model",
    "training.png": "Metrics of the updates",
}
TEMPLATE = """---
{{ card_data }}
---

# {{ model }}, finetuned by {{ config.title }}

A {{ kind }} of {{ model }}, trained to score higher by the reward {{ reward }} with {{ config.title }}\
{% if config.paper[1] %}, after [{{ config.paper[0] }}](https://arxiv.org/abs/{{ config.paper[1] }}) \
(arXiv {{ config.paper[1] }}){% endif %}, by steer {{ steer }}. \
It made {{ result.step }} update{{ "" if result.step == 1 else "s" }}.

## Results

{% if table %}{% for row in table %}| {{ row | join(" | ") }} |
{% if loop.first %}{{ "|---" * row | length }}|
{% endif %}{% endfor %}
Rewards: mean over held-out prompts at fixed seeds, with its 95 % bootstrap interval over the prompts. Diversity: mean \
distance between two {{ noun }} of a prompt ({{ distance }}, 0 to 1).\
{% if table[-1][0] == kl_row %} KL: from the base model, of {{ kl_samples }}.{% endif %}
{% if hacking %}
**{{ hacking }}**
{% endif %}{% if guarantee %}
{{ guarantee }}
{% endif %}{% elif scored %}Nothing was evaluated on held-out prompts. Mean reward of the training samples: \
{{ number(scored[0].reward) }} in update {{ scored[0].step }}, {{ number(scored[-1].reward) }} in update \
{{ scored[-1].step }}; the two are of different prompts.\
{% if measured is not none %} KL in update {{ measured.step }}: {{ number(measured.kl) }} nats per \
trajectory.{% endif %}
{% else %}Nothing was evaluated.
{% endif %}{% for text, file in pictures %}
![{{ text }}]({{ file }})
{% endfor %}
## How to use it

{% if weights is none %}The training was interrupted at update {{ result.step }} and has no final weights yet: resume \
it from `checkpoints/`.{% if result.best_step is not none %} `best/` holds those after update \
{{ result.best_step }}.{% endif %}
{% else %}The weights are in `{{ weights }}`.{% if kept is not none %} They are those of update {{ kept }}, the best \
by the held-out reward.{% endif %}

```python
{{ code }}
```

{% if config.evaluates_by_ode %}It was trained with noise of the law {{ config.dynamics }} at level \
{{ "%g" % config.noise_level }}{% if window %} in {{ window }} solver steps{% endif %}, and evaluated without noise, \
by the base model's own scheduler,{% else %}It was trained and evaluated with the base model's own scheduler\
{% if eta is not none %} at η = {{ "%g" % eta }}{% endif %},{% endif %} {{ config.num_inference_steps }} steps and \
{% if noun == "texts" %}no guidance{% elif config.guidance_scale is none %}\
the default guidance of the pipeline{% else %}guidance {{ "%g" % config.guidance_scale }}{% endif %}.\
{% if eta is not none and not takes_eta %} This call takes no η, so the scheduler makes \
its own steps, which may be without noise: {{ noun }} then differ from those of the evaluation, which were made by \
steer's stochastic steps.{% endif %}
{% endif %}
## Training

All other arguments are the defaults of steer's {{ config_class }}.

{% for name, value in arguments %}- {{ name }}: {{ value }}
{% endfor %}{% if minutes %}- time in updates, without evaluations: {{ minutes }} minutes
{% endif %}- versions: {{ versions }}

## Limits

- A reward is not quality: the model has learned to raise this number, including by its faults.
- The model was moved away from the base model on purpose, and may be worse at what the reward does not measure.\
{% if measured is not none %} In update {{ measured.step }} the KL was {{ number(measured.kl) }} nats per trajectory.\
{% endif %}
- Held-out rewards are numbers of models or programs too: they are not human judgement.
- The intervals are over prompts, of one training: another seed may give other results.
- The licence and the limits of the base model hold for this one too.
{% if stopped %}- The training ended before max_steps: {{ stopped }}.
{% endif %}"""


def model_card(
    folder: Path,
    pipe: Any,
    config: TrainingConfig,
    result: TrainingResult,
    about: Mapping[str, Any],
    grids: Sequence[Path] = (),
) -> str:
    """Return the text of folder/README.md.

    about  `model` and `reward` by name, and other plain values that the card lists
    grids  pictures of evaluations in folder/samples; the last one is shown
    """
    model, kind = escaped(about.get("model") or "a diffusion model"), config.trained_part
    pictures = [(text, f"plots/{file}") for file, text in PICTURES.items() if (folder / "plots" / file).exists()]
    pictures += [("Held-out images of the last evaluation", f"samples/{path.name}") for path in grids[-1:]]
    seconds = sum(record.get("seconds", 0.0) for record in result.records)
    tokens = is_token_scheduler(pipe.scheduler)
    hacking = find_hacking(result.evaluations, result.weights_step)
    guarantee = guaranteed_gain(result.evaluations, result.weights_step)
    versions = _versions()
    card = ModelCard.from_template(
        _card_data(pipe, config, result, about),
        template_str=TEMPLATE,
        model=model,
        kind=kind,
        reward=escaped(about.get("reward") or "of its configuration"),
        config=config,
        result=result,
        steer=__version__,
        number=_number,
        table=_evaluations(result) if result.evaluations else None,
        hacking=None if hacking is None else escaped(hacking),
        guarantee=None if guarantee is None else escaped(guarantee),
        scored=[record for record in result.records if record.get("reward") is not None],
        pictures=pictures,
        weights=None if result.weights is None else _relative(folder, result.weights),
        kept=None if result.weights_step == result.step else result.weights_step,
        code="" if result.weights is None else _code(folder, pipe, about.get("model"), config, result.weights),
        window=None if (noisy := config.step_window(0)) is None else noisy.size,
        eta=_eta(pipe, config),
        takes_eta=takes_eta(pipe),
        noun="texts" if tokens else "images",
        distance="share of tokens that differ" if tokens else "root mean square of the pixels' differences",
        config_class=type(config).__name__,
        arguments=_arguments(config, about),
        minutes=f"{seconds / 60:.3g}" if seconds else None,
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        **_kl(result),
        stopped=None if result.stopped is None else escaped(result.stopped),
    )
    return str(card)


def _kl(result: TrainingResult) -> dict[str, Any]:
    """The values of the template about the KL, which kl_every measures in some updates, and some losses in none."""
    sampled = any("eval/kl" in one for one in result.evaluations)
    return {
        "measured": next((record for record in reversed(result.records) if record.get("kl") is not None), None),
        "kl_row": KL_ROW,
        "kl_samples": "trajectories of held-out prompts" if sampled else "the training samples of that update",
    }


def _card_data(pipe: Any, config: TrainingConfig, result: TrainingResult, about: Mapping[str, Any]) -> ModelCardData:
    """The metadata, with the rewards of the exported weights as evaluation results."""
    task = "text-to-video" if re.search("Video|Wan|LTX|Mochi", type(pipe).__name__) else "text-to-image"
    task = "text-generation" if is_token_scheduler(pipe.scheduler) else task
    kind, method = config.trained_part.lower().replace(" ", "-"), type(config).__name__.removesuffix("Config")
    model = str(about.get("model") or "")
    # A path is private, and the hub could not link to it.
    public = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model) and not Path(model).exists()
    last = {one["step"]: one for one in result.evaluations}.get(result.weights_step, {})
    rewards = {name: last[f"eval/{name}"][0] for name in held_out_names([last])}
    return ModelCardData(
        base_model=model if public else None,
        library_name="diffusers",
        pipeline_tag=task,
        tags=[task, kind, "steer", method.lower()],
        model_name=f"{model if public else 'model'}-{method.lower()}" if rewards else None,
        eval_results=[
            EvalResult(task, "prompts", "held-out prompts", "reward", value, metric_name=name)
            for name, value in rewards.items()
            if math.isfinite(value)
        ]
        or None,
    )


def _code(folder: Path, pipe: Any, model: Any, config: TrainingConfig, weights: Path) -> str:
    """Python code that loads the weights into the pipeline and samples as the training did."""
    where, name = _relative(folder, weights.parent), get_denoiser(pipe)[0]
    if is_token_scheduler(pipe.scheduler):
        return _text_code(where / name, model, config)
    place = "run" if where == Path() else f"run, subfolder={str(where)!r}"
    source, imports, more = f"MODELS[{model!r}]" if model in MODELS else repr(str(model)), "DiffusionPipeline", ""
    before: list[str] = []
    after: list[str] = []
    if weights.name == LORA:
        after = _lora_code(weights.parent, where, place)
    elif weights.name == EMBEDDINGS:
        imports, after = f"{imports}\nfrom safetensors.torch import load_file", _token_code(pipe, where)
    elif weights.name == PEFT:  # the pipeline loads no LoRAs; names lack PeftModel's prefix
        peft = "PeftConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict"
        imports += f"\nfrom peft import {peft}"
        after = [
            f"inject_adapter_in_model(PeftConfig.from_pretrained({place}), pipe.{name})",
            f"set_peft_model_state_dict(pipe.{name}, load_peft_weights({place}))",
        ]
    else:
        imports, more = "AutoModel, DiffusionPipeline", f", {name}={name}"
        before = [f"{name} = AutoModel.from_pretrained(run, subfolder={str(where / name)!r})"]
    eta = _eta(pipe, config)
    given = config.call_kwargs | ({} if eta is None or not takes_eta(pipe) else {"eta": eta})
    arguments = ", ".join(f"{key}={value!r}" for key, value in given.items() if isinstance(value, str | int | float))
    lines = [
        f"from diffusers import {imports}",
        *(["from steer import MODELS"] if model in MODELS else []),
        "",
        'run = "."  # this folder, or its name on the hub',
        *before,
        f"pipe = DiffusionPipeline.from_pretrained({source}{more})",
        *after,
        f'prompt = "{config.prompt_prefix}…"',
        f"output = pipe(prompt, {arguments})",
    ]
    return "\n".join(lines)


def _lora_code(weights: Path, where: Path, place: str) -> list[str]:
    """Lines that load the LoRA in a folder, and a second denoiser's LoRA in the folder of its name."""
    second, into = where / SECOND_DENOISER, ", load_into_transformer_2=True"
    only = into if weights.name == SECOND_DENOISER else ""
    lines = [f"pipe.load_lora_weights({place}, weight_name={LORA!r}{only})"]
    if (weights / SECOND_DENOISER / LORA).is_file():
        lines.append(f"pipe.load_lora_weights(run, subfolder={second.as_posix()!r}, weight_name={LORA!r}{into})")
    return lines


def _token_code(pipe: Any, where: Path) -> list[str]:
    """Lines that load the token, into each text encoder by name: diffusers reads files of one encoder alone."""
    lines = [f'learned = load_file(f"{{run}}/{(where / EMBEDDINGS).as_posix()}")']
    for key, name in token_encoders(pipe).items():
        place = f"text_encoder=pipe.{name}, tokenizer=pipe.{name.replace('text_encoder', 'tokenizer')}"
        lines.append(f"pipe.load_textual_inversion(learned[{key!r}], token={TOKEN!r}, {place})")
        if name == "text_encoder_2":
            lines.append("# Else SDXL's pooled output is taken at the token.")
            lines.append("pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id")
    return lines


def _text_code(weights: Path, model: Any, config: TrainingConfig) -> str:
    """Python code that loads the denoiser of a text model and samples as the training did."""
    source = f"TEXT_MODELS[{model!r}]" if model in TEXT_MODELS else repr(str(model))
    lines = [
        "from steer import MaskedDiffusionPipeline" + (", TEXT_MODELS" if model in TEXT_MODELS else ""),
        "",
        'run = "."  # this folder',
        f"pipe = MaskedDiffusionPipeline.from_pretrained({source})",
        f'pipe.denoiser = type(pipe.denoiser).from_pretrained(f"{{run}}/{weights.as_posix()}")',
        f'output = pipe("a", num_inference_steps={config.num_inference_steps})',
    ]
    return "\n".join(lines)


def _eta(pipe: Any, config: TrainingConfig) -> float | None:
    """The η of the samples in training and evaluation; None where they have none, or only those of the training."""
    drawn = config.samples_with_eta and not config.evaluates_by_ode and not is_token_scheduler(pipe.scheduler)
    return config.noise_level if drawn else None


def _relative(folder: Path, path: Path) -> Path:
    """A path as seen from the folder of the card."""
    return path.resolve().relative_to(folder.resolve()) if path.resolve().is_relative_to(folder.resolve()) else path


def base_model(pipe: Any) -> str:
    """The name of an embedded model, else the place a pipeline was loaded from; empty if unknown."""
    source = str(getattr(pipe.config, "_name_or_path", ""))
    return next((name for name, folder in (MODELS | TEXT_MODELS).items() if str(folder) == source), source)


def held_out_names(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rewards of the evaluations, the trained one first."""
    first = evaluations[0] if evaluations else {}
    return [name.removeprefix("eval/") for name, value in first.items() if isinstance(value, list)]


def _evaluations(result: TrainingResult) -> list[list[str]]:
    """The rows of a table of the first, the best and the last evaluation."""
    shown = {one["step"]: one for one in result.evaluations}
    marks: dict[int, list[str]] = {}
    for step, mark in ((min(shown), "first"), (max(shown), "last"), (result.best_step, "best")):
        if step is not None and step in shown:
            marks.setdefault(step, []).append(mark)
    chosen = {step: shown[step] for step in sorted(marks)}
    rows = [["", *[f"{step} update{'' if step == 1 else 's'} ({', '.join(marks[step])})" for step in chosen]]]
    for place, name in enumerate(held_out_names(result.evaluations)):
        kind = "held out" if place else "trained"
        rows.append([f"{escaped(name)} ({kind})", *[_interval(one.get(f"eval/{name}")) for one in chosen.values()]])
    if any(one.get("eval/diversity") for one in chosen.values()):
        rows.append(["diversity", *[_number(one.get("eval/diversity")) for one in chosen.values()]])
    kl = {0: 0.0} | {record["step"]: record.get("kl") for record in result.records}
    nats = {step: one.get("eval/kl", kl.get(step)) for step, one in chosen.items()}
    if all(value is None for step, value in nats.items() if step):  # a loss without log-probabilities
        return rows
    return [*rows, [KL_ROW, *map(_number, nats.values())]]


def _arguments(config: TrainingConfig, about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Further arguments, and the fields of the configuration that differ from their defaults."""
    default = type(config)()
    own = [one.name for one in fields(config)]
    given = {name: value for name, value in about.items() if name not in own and value not in (None, [], ())}
    given |= {name: value for name in own if (value := getattr(config, name)) != getattr(default, name)}
    given.pop("output_dir", None)  # a place on somebody's disk
    return [(escaped(name), _text(value)) for name, value in given.items()]


def _text(value: Any) -> str:
    """A value as text; for a long list, its length."""
    if isinstance(value, list | tuple):
        return f"{len(value)} entries" if len(value) > 8 else escaped(", ".join(map(str, value)))
    return escaped(value)


def _interval(value: Any) -> str:
    return "–" if value is None else f"{_number(value[0])} [{_number(value[1])}, {_number(value[2])}]"


def _number(value: Any) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def escaped(value: Any) -> str:
    """A value as one line of text that Markdown and HTML leave unchanged, also in a table."""
    return re.sub(r"([\\`*_\[\]<>|~$&#!])", r"\\\1", " ".join(str(value).split()))


def _versions() -> dict[str, str]:
    installed = {"steer-diffusion": __version__}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed
