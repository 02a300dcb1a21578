"""The model card of a finetuning: a README.md as the Hugging Face hub reads it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from steer.assets import MODELS
from steer.pipelines.training.config import TrainingConfig
from steer.pipelines.training.method import TrainingResult

LORA, ADAPTER = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"  # for diffusers, and for peft


def usage(out: Path, model: Any, settings: Mapping[str, Any], result: TrainingResult) -> str:
    """Python code that loads the weights and samples as the training did."""
    if result.weights is None:
        best = f" `best/` holds those after update {result.best_step}." if result.best_step is not None else ""
        return (
            f"The training was interrupted at update {result.step}, and final weights are not written yet: resume it "
            f"from `checkpoints/`.{best}"
        )
    kept = result.weights_step not in (None, result.step)
    text_or_values = f" They are those of update {result.best_step}, the best by the held-out reward." if kept else ""
    code = "\n".join([*_loading(out, model, result.weights), *_call(model, settings)])
    where = f"The weights are in `{_relative_path(out, result.weights)}`.{text_or_values}"
    return f"{where}\n\n```python\n{code}\n```\n\n{_sampler(model, settings)}"


def _loading(out: Path, model: Any, weights: Path) -> list[str]:
    """The lines up to a pipeline with the weights in it."""
    where = _relative_path(out, weights.parent)
    run = 'run = "."  # this folder, or its name on the hub'
    load = f"DiffusionPipeline.from_pretrained({_source(model)}"
    assets = ["from steer.assets import MODELS"] if model in MODELS else []
    if weights.name == LORA:
        imports = ["from diffusers import DiffusionPipeline", *assets]
        load_lora = [f"pipe.load_lora_weights(run, subfolder={str(where)!r}, weight_name={LORA!r})"]
        return [*imports, "", run, f"pipe = {load})", *load_lora]
    if weights.name == ADAPTER:  # the pipeline loads no LoRAs; written without PeftModel's prefix of every name
        name = "unet" if "transformer" not in _index(model) else "transformer"
        peft = "from peft import PeftConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict"
        return [
            "from diffusers import DiffusionPipeline",
            peft,
            *assets,
            "",
            run,
            f"pipe = {load})",
            f"inject_adapter_in_model(PeftConfig.from_pretrained(run, subfolder={str(where)!r}), pipe.{name})",
            f"set_peft_model_state_dict(pipe.{name}, load_peft_weights(run, subfolder={str(where)!r}))",
        ]
    name = weights.name
    return [
        "from diffusers import AutoModel, DiffusionPipeline",
        *assets,
        "",
        run,
        f"{name} = AutoModel.from_pretrained(run, subfolder={str(where / name)!r})",
        f"pipe = {load}, {name}={name})",
    ]


def _call(model: Any, settings: Mapping[str, Any]) -> list[str]:
    """The lines that sample. η is given where both the pipeline and its solver take one, as in training."""
    given = dict(settings["call"]) | {"num_inference_steps": settings["num_inference_steps"]}
    if settings["guidance_scale"] is not None:
        given["guidance_scale"] = settings["guidance_scale"]
    if takes_eta(model):
        given["eta"] = settings["eta"]
    plain = {name: value for name, value in given.items() if isinstance(value, str | int | float)}
    arguments = ", ".join(f"{name}={value!r}" for name, value in plain.items())
    return ['prompt = "…"', f"output = pipe(prompt, {arguments})"]


def _sampler(model: Any, settings: Mapping[str, Any]) -> str:
    guidance = settings["guidance_scale"]
    text_or_values = "the pipeline's default guidance" if guidance is None else f"guidance {guidance:g}"
    text = (
        f"It was trained and evaluated with the base model's own scheduler at η = {settings['eta']:g}, "
        f"T = {settings['num_inference_steps']} steps and {text_or_values}. Other numbers were not tried in this run."
    )
    if takes_eta(model):
        return text
    return text + (
        " Where this call takes no η, the scheduler makes its own steps, which may be without noise: images then "
        "differ from those of the evaluation, which were made by steer's stochastic steps."
    )


def _relative_path(out: Path, path: Path) -> Path:
    """A path as it is from the card's folder."""
    return path.resolve().relative_to(out.resolve()) if path.resolve().is_relative_to(out.resolve()) else path


def _source(model: Any) -> str:
    """The base model, as an expression of Python."""
    return f"MODELS[{str(model)!r}]" if model in MODELS else repr(str(model))


def _index(model: Any) -> dict[str, Any]:
    """model_index.json of a model that is embedded, a folder or in the hub's cache; empty where it is none of these."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path: Any = Path(MODELS.get(model, str(model))) / "model_index.json"
    if not path.exists():
        try:
            path = try_to_load_from_cache(str(model), "model_index.json")
        except HFValidationError:
            return {}
    return json.loads(Path(path).read_text()) if isinstance(path, str | Path) else {}


def pipeline_class(model: Any) -> str:
    """The name of a model's pipeline; empty where it is not known."""
    return str(_index(model).get("_class_name", ""))


def takes_eta(model: Any) -> bool:
    """Whether a model's pipeline and scheduler both take η, as `steer.pipelines.base.route_eta` asks."""
    import inspect

    import diffusers

    index = _index(model)
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    solver = getattr(diffusers, str((index.get("scheduler") or [None, None])[1]), None)
    if pipeline is None or solver is None:
        return False
    return all("eta" in inspect.signature(function).parameters for function in (pipeline.__call__, solver.step))


# By the start of a method's name: what it is called, its paper, and the arXiv number of that.
METHODS = {
    "d3po": ("D3PO", "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model", "2311.13231"),
    "prdp": (
        "PRDP",
        "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models",
        "2402.08714",
    ),
    "ddpo": ("DDPO", "Training Diffusion Models with Reinforcement Learning", "2305.13301"),
    "grpo": ("GRPO", "Flow-GRPO: Training Flow Matching Models via Online RL", "2505.05470"),
    "filtered": (
        "Reward-filtered finetuning",
        "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment",
        "2304.06767",
    ),
    "rewardbackprop": (
        "Reward backpropagation (DRaFT-K)",
        "Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
        "2309.17400",
    ),
}
PACKAGES = ("steer-diffusion", "torch", "diffusers", "peft")
PRIVATE = ("output_dir",)  # a place on somebody's disk
PICTURES = {
    "before-after.png": "The same held-out prompts and seeds, before and after",
    "rewards.png": "Rewards: the trained one, and those held out from the training",
    "divergence.png": "How far the model went from where it began",
    "training.png": "The training itself",
}


@dataclass(frozen=True)
class FlatConfig:
    """A run's configuration: what are fields of TrainingConfig, wherever they stand in it, and the rest."""

    settings: Mapping[str, Any]
    rest: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "FlatConfig":
        """Mappings in it are gone through; where a setting stands twice, the inner one counts."""
        names = {field.name for field in fields(TrainingConfig)}
        settings: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for name, value in config.items():
            if name in names:
                settings[name] = value
            elif isinstance(value, Mapping):
                inner = cls.of(value)
                settings |= inner.settings
                rest |= {f"{name}.{key}": one for key, one in inner.rest.items()}
            else:
                rest[name] = value
        return cls(settings, rest)

    def changed(self) -> dict[str, Any]:
        """The settings that are not the default ones."""
        default = {name: _plain(value) for name, value in vars(TrainingConfig()).items()}
        return {name: value for name, value in self.settings.items() if _plain(value) != default[name]}

    def complete(self) -> dict[str, Any]:
        """All settings, the default ones where none were given."""
        return vars(TrainingConfig()) | dict(self.settings)


def model_card(out: Path, config: Mapping[str, Any], result: TrainingResult, grids: Sequence[Path] = ()) -> str:
    """The text of out/README.md; see `steer.apps.finetune_report.write_report` for `config`."""
    flat = FlatConfig.of(config)
    name = str(config.get("method", "finetuning"))
    title, paper, number = _method(name)
    model, reward = config.get("model"), config.get("reward")
    what = "LoRA" if flat.complete()["lora_rank"] else "full finetuning"
    source = f", after [{paper}](https://arxiv.org/abs/{number}) (arXiv {number})" if number else ""
    components = [
        f"# {escaped(model or 'A diffusion model')}, finetuned by {escaped(title)}",
        f"A {what} of {escaped(model or 'a diffusion model')}, trained to score higher by the reward "
        f"{escaped(reward or 'of its configuration')} with {escaped(title)}{source}, by steer "
        f"{_versions().get('steer-diffusion', '')}. It made {result.step} {_plural(result.step, 'update')}.",
        "## Results",
        results(result),
        *[f"![{text}](plots/{file})" for file, text in PICTURES.items() if (out / "plots" / file).exists()],
        *[f"![Held-out images at the end of the records](samples/{path.name})" for path in grids[-1:]],
        "## How to use it",
        usage(out, model, flat.complete(), result),
        "## Training",
        _training(flat, result),
        "## Limits",
        limits(result),
    ]
    return f"---\n{_front(model, name, what)}\n---\n\n" + "\n\n".join(components) + "\n"


def _front(model: Any, method: str, what: str) -> str:
    """The metadata. Only names are told: a path on somebody's disk is nothing that the hub could link to."""
    from huggingface_hub import ModelCardData

    task = "text-to-video" if re.search("Video|Wan|LTX|Mochi", pipeline_class(model)) else "text-to-image"
    kind = "full-finetuning" if what != "LoRA" else "lora"
    data: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task}
    data["tags"] = [task, kind, "steer", _key(method)]
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(model or "")) and not Path(str(model)).exists():
        data["base_model"] = str(model)
    return ModelCardData(**data).to_yaml().strip()


def _key(method: str) -> str:
    """A method's name without what differs between classes and the command line."""
    return re.sub(r"[^a-z0-9]+", "-", method.lower().removesuffix("pipeline")).strip("-")


def _method(name: str) -> tuple[str, str, str]:
    key = _key(name).replace("-", "")
    return next((text_or_values for start, text_or_values in METHODS.items() if key.startswith(start)), (name, "", ""))


def escaped(value: Any) -> str:
    """A value as text in one line that Markdown and HTML leave as it is, in a table too."""
    return re.sub(r"([\\`*_\[\]<>|~$&#!])", r"\\\1", " ".join(str(value).split()))


def held_out_names(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rewards of the evaluations, the trained one first."""
    first = evaluations[0] if evaluations else {}
    return [name.removeprefix("eval/") for name, value in first.items() if isinstance(value, list)]


def results(result: TrainingResult) -> str:
    """A table from the first to the last evaluation, or of the training samples where nothing was evaluated."""
    if not result.evaluations:
        return _unevaluated(result)
    shown = {one["step"]: one for one in result.evaluations}
    ends = (min(shown), max(shown))
    chosen = sorted({*ends, result.best_step} & set(shown))
    marks: dict[int, list[str]] = {step: [] for step in chosen}
    for step, mark in ((ends[0], "first"), (ends[1], "last"), (result.best_step, "best")):
        if step in marks:
            marks[step].append(mark)
    rows = [["", *[f"{step} {_plural(step, 'update')} ({', '.join(marks[step])})" for step in chosen]]]
    names = held_out_names(result.evaluations)
    for place, name in enumerate(names):
        kind = "trained" if place == 0 else "held out"
        rows.append([f"{escaped(name)} ({kind})", *[_interval(shown[step].get(f"eval/{name}")) for step in chosen]])
    if any(shown[step].get("eval/diversity") for step in chosen):
        rows.append(["diversity", *[_number(shown[step].get("eval/diversity")) for step in chosen]])
    kl = {record["step"]: record.get("kl") for record in result.records}
    # Before the first update the model is the one that it is held against.
    rows.append(["KL, nats a trajectory", *["0" if step == 0 else _number(kl.get(step)) for step in chosen]])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    table = "\n".join([lines[0], "|---" * (len(chosen) + 1) + "|", *lines[1:]])
    return (
        f"{table}\n\nRewards: the mean over held-out prompts at fixed seeds, with its 95 % bootstrap interval over the "
        "prompts. Diversity: the mean distance between two images of a prompt (root mean square of the pixels' "
        "differences, 0 to 1). KL: of that update's training samples, from the model that training began with."
    )


def _unevaluated(result: TrainingResult) -> str:
    text_or_values = [record for record in result.records if record.get("reward") is not None]
    if not text_or_values:
        return "Nothing was evaluated, and no update made."
    first, last = text_or_values[0], text_or_values[-1]
    return (
        "Nothing was evaluated on held-out prompts. Mean reward of the training samples: "
        f"{_number(first['reward'])} in update {first['step']}, {_number(last['reward'])} in update {last['step']}; "
        f"the two are of different prompts. KL in the last: {_number(last.get('kl'))} nats a trajectory."
    )


def _interval(text_or_values: Any) -> str:
    return (
        "–"
        if text_or_values is None
        else f"{_number(text_or_values[0])} [{_number(text_or_values[1])}, {_number(text_or_values[2])}]"
    )


def _number(value: Any) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"


def _training(flat: FlatConfig, result: TrainingResult) -> str:
    """All that was given, and all settings that are not the default ones."""
    rest = {name: value for name, value in flat.rest.items() if name not in PRIVATE and value not in (None, [], ())}
    lines = [f"- {escaped(name)}: {_format_value(value)}" for name, value in rest.items()]
    lines += [f"- {escaped(name)}: {_format_value(value)}" for name, value in flat.changed().items()]
    if seconds := sum(record.get("seconds", 0.0) for record in result.records):
        lines.append(f"- time in updates, without evaluations: {seconds / 60:.3g} minutes")
    lines.append(f"- versions: {', '.join(f'{name} {number}' for name, number in _versions().items())}")
    return "All other settings are the default ones of steer's TrainingConfig.\n\n" + "\n".join(lines)


def _format_value(value: Any) -> str:
    """A value; of a long list only how long it is."""
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"{len(value)} entries"
    return escaped(", ".join(map(str, value)) if isinstance(value, list | tuple) else value)


def _plain(value: Any) -> Any:
    """YAML has lists where the settings have tuples."""
    return list(value) if isinstance(value, tuple) else value


def _versions() -> dict[str, str]:
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def limits(result: TrainingResult) -> str:
    """What the numbers do not say."""
    kl = next((record["kl"] for record in reversed(result.records) if record.get("kl") is not None), None)
    away = f" In the last update it was {_number(kl)} nats a trajectory from it (KL)." if kl is not None else ""
    lines = [
        "A reward is not quality: the model learnt what raises this number, its faults included.",
        f"It was led away from the base model on purpose, and may do worse at what the reward does not see.{away}",
        "Held-out rewards are numbers of models or programs too: they are not human judgement.",
        "The intervals are over prompts, of one training: another seed may end elsewhere.",
        "The licence and the limits of the base model hold for this one too.",
    ]
    if result.stopped:
        lines.append(f"The training ended before its time: {escaped(result.stopped)}.")
    return "\n".join(f"- {line}" for line in lines)
