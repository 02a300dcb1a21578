"""How a model card says that a finetuned model is to be used: code, and the sampler that it was trained with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer.assets import MODELS
from steer.pipelines import FinetuneResult

LORA, ADAPTER = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"  # for diffusers, and for peft


def usage(out: Path, model: Any, settings: Mapping[str, Any], result: FinetuneResult) -> str:
    """Python code that loads the weights and samples as the training did."""
    if result.weights is None:
        best = f" `best/` holds those after update {result.best_step}." if result.best_step is not None else ""
        return (
            f"The training was interrupted at update {result.step}, and final weights are not written yet: resume it "
            f"from `checkpoints/`.{best}"
        )
    kept = result.weights_step not in (None, result.step)
    told = f" They are those of update {result.best_step}, the best by the held-out reward." if kept else ""
    code = "\n".join([*_loading(out, model, result.weights), *_call(model, settings)])
    where = f"The weights are in `{_below(out, result.weights)}`.{told}"
    return f"{where}\n\n```python\n{code}\n```\n\n{_sampler(model, settings)}"


def _loading(out: Path, model: Any, weights: Path) -> list[str]:
    """The lines up to a pipeline with the weights in it."""
    where = _below(out, weights.parent)
    run = 'run = "."  # this folder, or its name on the hub'
    load = f"DiffusionPipeline.from_pretrained({_source(model)}"
    assets = ["from steer.assets import MODELS"] if model in MODELS else []
    if weights.name == LORA:
        imports = ["from diffusers import DiffusionPipeline", *assets]
        weigh = [f"pipe.load_lora_weights(run, subfolder={str(where)!r}, weight_name={LORA!r})"]
        return [*imports, "", run, f"pipe = {load})", *weigh]
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
    told = "the pipeline's default guidance" if guidance is None else f"guidance {guidance:g}"
    text = (
        f"It was trained and evaluated with the base model's own scheduler at η = {settings['eta']:g}, "
        f"T = {settings['num_inference_steps']} steps and {told}. Other numbers were not tried in this run."
    )
    if takes_eta(model):
        return text
    return text + (
        " Where this call takes no η, the scheduler makes its own steps, which may be without noise: images then "
        "differ from those of the evaluation, which were made by steer's stochastic steps."
    )


def _below(out: Path, path: Path) -> Path:
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
    """Whether a model's pipeline and scheduler both take η, as `steer.pipelines.method.route_eta` asks."""
    import inspect

    import diffusers

    index = _index(model)
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    solver = getattr(diffusers, str((index.get("scheduler") or [None, None])[1]), None)
    if pipeline is None or solver is None:
        return False
    return all("eta" in inspect.signature(function).parameters for function in (pipeline.__call__, solver.step))
