"""The first lines of a TRL user, written without the documentation: they run."""

import copy
import inspect
import json
import pickle
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.integrations import TensorBoardCallback, WandbCallback

from steer import (
    MODELS,
    D3POConfig,
    D3POTrainer,
    GRPOConfig,
    GRPOTrainer,
    InputError,
    PRDPConfig,
    PRDPTrainer,
    TrainingConfig,
)
from steer.pipelines.training.methods import METHODS

SMALL: dict[str, Any] = {
    "max_steps": 2,
    "train_batch_size": 1,
    "num_generations": 2,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "lora_rank": 2,
    "learning_rate": 1e-2,
    "eval_steps": 2,
}


def scenes() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Listener(TrainerCallback):
    """Keeps the events; stops the training after update `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, Any]] = []
        self.stop_at = stop_at

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("on_train_begin")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.events.append(f"on_step_end {state.global_step} of {state.max_steps}")
        control.should_training_stop = state.global_step == self.stop_at
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.events.append(f"on_evaluate {metrics['step']}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("on_save")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("on_train_end")


def test_a_grpo_trainer_trains_calls_back_and_saves_a_lora_that_diffusers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    trainer = GRPOTrainer(
        scenes(),
        "brightness",
        config=GRPOConfig(output_dir=str(tmp_path / "run"), clip=1e-3, **SMALL),
        train_prompts=["a red circle", "a blue star"],
        eval_prompts=["a green square"],
        eval_rewards=["colour:red"],
        callbacks=[listener],
    )
    with pytest.raises(InputError, match="nothing is trained yet: call train"):
        trainer.save_pretrained(tmp_path / "lora")
    result = trainer.train()
    assert result.step == 2 and [logs["step"] for logs in listener.logs] == [1, 2]
    assert listener.events[0] == "on_train_begin" and listener.events[-1] == "on_train_end"
    assert {"on_step_end 2 of 2", "on_evaluate 0", "on_evaluate 2", "on_save"} <= set(listener.events)

    trainer.save_pretrained(tmp_path / "lora")
    pipe, call = scenes(), {"num_inference_steps": 2, "output_type": "pt"}
    images = [one("a star", generator=torch.manual_seed(0), **call).images for one in (pipe, trainer.pipe)]
    pipe.load_lora_weights(tmp_path / "lora")
    loaded = pipe("a star", generator=torch.manual_seed(0), **call).images
    assert (loaded - images[1]).abs().max() < 1e-5 < (loaded - images[0]).abs().max()
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert card.data.base_model == "scenes" and "grpo" in (card.data.tags or [])
    assert {one.metric_name for one in card.data.eval_results or []} == {"brightness", "colour:red"}
    assert "- clip: 0.001" in card.text and "load_lora_weights(run, weight_name=" in card.text

    uploaded: dict[str, list[str]] = {}

    def upload(self: Any, repo_id: str, folder_path: str, **given: Any) -> None:
        uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **given: f"hub/{repo_id}")
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert trainer.push_to_hub("me/bright") == "hub/me/bright"
    assert uploaded == {"me/bright": ["README.md", "pytorch_lora_weights.safetensors"]}


@pytest.mark.parametrize(
    ("kind", "given", "hint"),
    [
        (GRPOConfig, "learning_rat", "did you mean learning_rate?"),
        (GRPOConfig, "beta", "did you mean kl_weight?"),
        (GRPOConfig, "epsilon", "did you mean clip?"),
        (GRPOConfig, "per_device_train_batch_size", "did you mean train_batch_size?"),
        (D3POConfig, "bata", "did you mean beta?"),
        (PRDPConfig, "zzzqq", "help(PRDPConfig) lists the arguments"),
        (GRPOTrainer, "args", "did you mean config?"),
        (GRPOTrainer, "train_dataset", "did you mean train_prompts?"),
        (D3POTrainer, "reward_funcs", "did you mean reward?"),
        (D3POTrainer, "callback", "did you mean callbacks?"),
    ],
)
def test_an_unknown_argument_is_one_line_with_the_nearest_name(kind: Any, given: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        kind(**{given: 1})
    assert str(error.value) == f"{kind.__name__} takes no argument {given!r}: {hint}"


def test_every_name_of_another_library_leads_to_an_argument() -> None:
    fields_of_any = {one.name for method in METHODS.values() for one in fields(method.config_class)}
    assert fields_of_any >= {*TrainingConfig.other_names.values()}
    assert {*inspect.signature(GRPOTrainer).parameters} >= {*GRPOTrainer.other_names.values()}


def test_signatures_are_those_of_init() -> None:
    """Editors and `inspect` show the fields, although `__new__` takes any keyword; copies and pickles need none."""
    assert [*inspect.signature(GRPOConfig).parameters] == [one.name for one in fields(GRPOConfig)]
    assert [*inspect.signature(GRPOTrainer).parameters][:4] == ["pipe", "reward", "config", "preferences"]
    config = GRPOConfig(clip=0.5)
    assert copy.copy(config) == pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(InputError, match="takes no argument 'clp': did you mean clip"):
        replace(config, clp=1)


def test_a_config_is_a_dict_and_json() -> None:
    config = GRPOConfig(clip=0.5, call={"height": 64}, log_with=("tensorboard",))
    assert json.loads(config.to_json_string()) == config.to_dict()
    assert config.to_dict()["clip"] == 0.5 and config.to_dict()["call"] == {"height": 64}
    assert config.to_dict()["log_with"] == ["tensorboard"]
    assert [*config.to_dict()] == [one.name for one in fields(config)]


def test_callbacks_of_transformers_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, event_files = GRPOConfig(output_dir=str(tmp_path), **SMALL), tmp_path / "runs"
    callbacks = [PrinterCallback, ProgressCallback(), TensorBoardCallback]
    data: dict[str, Any] = {"train_prompts": ["a red circle"], "eval_prompts": ["a blue star"]}
    result = GRPOTrainer(scenes(), "brightness", config, **data, callbacks=callbacks).train()
    printed = capsys.readouterr().out  # by the printer, and the progress bar
    assert result.step == 2 and printed.count("{'step': 1, ") == printed.count("{'step': 2, ") == 2
    events = EventAccumulator(str(next(event_files.iterdir()))).Reload()
    assert [one.step for one in events.Scalars("train/reward")] == [1, 2]
    [text] = events.Tensors("args/text_summary")
    assert json.loads(text.tensor_proto.string_val[0]) == config.to_dict()


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([EarlyStoppingCallback()], "EarlyStoppingCallback is for transformers' Trainer: set early_stopping_patience"),
        ([EarlyStoppingCallback], "EarlyStoppingCallback is for transformers' Trainer: set early_stopping_patience"),
        ([DefaultFlowCallback], "DefaultFlowCallback is for transformers' Trainer: set eval_steps and save_steps"),
        ([WandbCallback], r"WandbCallback is for transformers' Trainer: set log_with=\('wandb',\)"),
        (["wandb"], "callbacks: 'wandb' has none of the methods on_train_begin, on_step_end"),
        (Listener(), "callbacks must be a list, got <test_first"),
        ("wandb", "callbacks must be a list, got 'wandb'"),
    ],
)
def test_a_callback_that_cannot_work_is_refused(callbacks: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GRPOTrainer(None, "brightness", callbacks=callbacks, train_prompts=["a red circle"])


def test_a_class_of_ones_own_may_have_the_name_of_a_refused_one() -> None:
    own = type("EarlyStoppingCallback", (Listener,), {})
    assert isinstance(GRPOTrainer(None, "brightness", callbacks=[own]).callbacks[0], own)


def test_a_trainer_takes_a_plain_training_config_and_a_function_as_reward(tmp_path: Path) -> None:
    def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images[:, 0].mean((1, 2))

    config = TrainingConfig(output_dir=str(tmp_path), **SMALL | {"max_steps": 5})
    trainer = PRDPTrainer(scenes(), redness, config, train_prompts=["a red circle"], callbacks=[Listener(stop_at=1)])
    assert trainer.config.beta == 0.1, "the option of the method is at its default"
    result = trainer.train()
    assert result.step == 1 and result.stopped == "a callback asked for it"
    again = PRDPTrainer(scenes(), redness, config, train_prompts=["a red circle"])
    assert again.train(resume_from_checkpoint=True).step == 5


def test_the_config_of_another_method_is_refused() -> None:
    with pytest.raises(InputError, match="config must be a D3POConfig or a TrainingConfig, got GRPOConfig"):
        D3POTrainer(None, "brightness", GRPOConfig())
    with pytest.raises(InputError, match="num_generations must be at least 2, got 1: D3PO compares the samples"):
        D3POConfig(num_generations=1)
