"""The configuration of `steer finetune`: one strict schema, derived from the dataclasses."""

import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import cached_pipe

from steer import GRPOConfig, NFTConfig, PRDPConfig, TrainingConfig
from steer.apps.cli.finetune import parse_overrides
from steer.apps.finetuning import METHODS, FinetuneJob, describe_keys, read_config, schema_of
from steer.apps.prompts import load_prompts
from steer.assets import CONFIGS
from steer.errors import InputError
from steer.pipelines.training.d3po_prdp import PRDPTrainer
from steer.pipelines.training.method import sampler_of
from steer.reward import with_timeout
from steer.rewards.compose import RewardStatistics, StandardisedReward
from steer.rewards.names import reward_names
from steer.rewards.parser import load_reward
from steer.yaml_text import read_yaml

LEAST = "method: prdp\nreward: brightness\nprompts: p.txt\noutput_dir: out\n"


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_embedded_configurations_are_whole(name: str) -> None:
    config = read_config(name)
    job = config.job
    assert config.training.output_dir == f"out/{name}" and name.startswith(f"{job.method}-")
    assert f"steer finetune {name}" in CONFIGS[name].read_text()
    assert job.eval_rewards and {atom.split(":")[0] for atom in job.eval_rewards} <= set(reward_names())
    differentiable = job.method == "reward-backprop"
    config.trainer(None, reward=load_reward("brightness" if differentiable else "brightness + jpeg"))
    if name.endswith("-scenes") and job.method != "dpo":  # which learns from a table of the user's
        assert job.prompts and job.eval_prompts
        assert not set(load_prompts(job.prompts)) & set(load_prompts(job.eval_prompts))


def test_names_in_other_tools_are_translated_to_fields() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs/finetuning-reference.md").read_text()
    table = page.split("### Names in other tools")[1].split("###")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("| ")][1:]
    names = {name for *_, ours in rows for name in re.findall(r"`([a-z_]+)(?::[^`]*)?`", ours)}
    known = {one.name for config in (GRPOConfig, NFTConfig) for one in fields(config)}
    assert len(rows) > 15 and names - {"cps"} <= known, names - known


def test_grpo_of_sd3_has_the_noise_of_its_paper_in_two_of_ten_steps() -> None:
    """As Flow-GRPO-Fast: in the first half, at random. β = 0.01 of means is per nat divided by their counts."""
    config = read_config("grpo-sd3").training
    windows = [config.step_window(update) for update in range(40)]
    steps = {tuple(one.steps(config.num_inference_steps)) for one in windows if one is not None}
    assert steps == {(first, first + 1) for first in range(4)} and None not in windows
    assert (config.dynamics, config.noise_level, config.num_generations) == ("flow-sde", 0.7, 24)
    assert config.kl_weight * 2 * 16 * 64 * 64 == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("name", ["awm", "ram"])
def test_forward_methods_of_scenes_differ_in_their_loss_alone(name: str) -> None:
    one, other = (read_config(f"{method}-scenes").plain() for method in (name, "nft"))
    differ = {key for key in one.keys() & other.keys() if one[key] != other[key]}
    assert differ == {"method", "output_dir", "reference_weight"}


def test_one_embedded_configuration_explains_every_key() -> None:
    config_values = yaml.safe_load(CONFIGS["prdp-sd15"].read_text())
    assert set(config_values) == set(schema_of("prdp").model_fields)
    keys = [line for line in CONFIGS["prdp-sd15"].read_text().splitlines() if line and not line.startswith(("#", " "))]
    assert [line.split(":")[0] for line in keys] == list(config_values)


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_of_the_classes(method: str, tmp_path: Path) -> None:
    config = read_config(written(tmp_path, LEAST.replace("prdp", method)))
    assert config.training == METHODS[method].config_class(log_with=("tensorboard",), output_dir="out")
    assert config.job == FinetuneJob(method, "brightness", prompts="p.txt")


@pytest.mark.parametrize(("law", "level"), [("ddim", 1.0), ("flow-sde", 0.7), ("dance", 0.3), ("cps", 0.8)])
def test_the_noise_is_by_default_the_published_one_of_its_law(law: Any, level: float, tmp_path: Path) -> None:
    """And config.yaml, the identity of checkpoints and the samples have this number; a given one stays."""
    config = read_config(written(tmp_path, LEAST), {"dynamics": law})
    assert config.plain()["eta"] == level == asdict(config.training)["eta"]
    assert read_config(written(tmp_path, yaml.safe_dump(config.plain()))).training == config.training
    assert read_config(written(tmp_path, LEAST + "eta: null\n"), {"dynamics": law}).training.eta == level
    given = read_config(written(tmp_path, LEAST + "eta: 0.6\n"), {"dynamics": law})
    assert given.plain()["eta"] == 0.6
    assert [sampler_of(cached_pipe("sd3"), one.training).eta for one in (config, given)] == [level, 0.6]


def test_a_run_from_before_the_default_of_its_law_has_the_same_identity() -> None:
    """Its checkpoints hold the number 1.0, which was the default of every law."""
    assert PRDPConfig() == PRDPConfig(eta=1.0) and asdict(PRDPConfig())["eta"] == 1.0
    assert TrainingConfig(eta=1.0, dynamics="cps").eta == 1.0


def test_a_resolved_configuration_is_one_again(tmp_path: Path) -> None:
    changes = {"call.height": "64", "mixed_precision": "no", "learning_rate": "1e-5", "output_dir": "2024-01-01"}
    first = read_config("prdp-scenes", changes)
    again = read_config(written(tmp_path, yaml.safe_dump(first.plain(), allow_unicode=True)))
    assert again.plain() == first.plain() and (again.job, again.training) == (first.job, first.training)
    assert first.plain()["call"] == {"height": 64} and first.plain()["lora_target_modules"] == list(
        first.training.lora_target_modules
    )


def test_scalars_are_what_people_mean() -> None:
    text = "[1e-5, -2E3, 1.5, .5, 7, 010, 1:30, no, yes, on, true, null, ~, 2024-01-01, '1', 1_000]"
    floats = [1e-5, -2000.0, 1.5, 0.5]
    texts = ["010", "1:30", "no", "yes", "on", True, None, None, "2024-01-01", "1", "1_000"]
    assert read_yaml(text, "x") == [*floats, 7, *texts]
    assert read_yaml("a: \nb: {c: [1]}", "x") == {"a": None, "b": {"c": [1]}}


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, LEAST + "max_steps: 5\nseed: 3\nbeta: 2\nclip: 3\ncall: {height: 8}\n")
    words = "--max-steps 7 --beta=1e-3 --call.max-sequence-length 9 --gradient-checkpointing --eval-prompts e"
    words += " --reward clip:scenes:2 --eval-rewards"
    config = read_config(path, parse_overrides([*words.split(), "[scene, jpeg]"]))
    assert (config.training.max_steps, config.training.seed, config.training.gradient_checkpointing) == (7, 3, True)
    assert (config.training.beta, config.training.clip) == (1e-3, 3)
    assert config.training.call == {"height": 8, "max_sequence_length": 9}
    assert (config.job.reward, config.job.eval_rewards) == ("clip:scenes:2", ("scene", "jpeg"))


def test_text_stands_as_it_is_on_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, LEAST)
    config = read_config(path, {"output_dir": "2024", "reward": "min(scene, jpeg)", "device": "null"})
    assert (config.training.output_dir, config.job.reward, config.job.device) == ("2024", "min(scene, jpeg)", None)
    assert read_config(path, {"method": "ddpo"}).training.history == 16


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--a-b", "1", "--c=2=3", "--d"], {"a_b": "1", "c": "2=3", "d": "true"}),
        (["--a", "-1", "--b", "--c", "x y"], {"a": "-1", "b": "true", "c": "x y"}),
        (["--a", "2", "--e="], {"a": "2", "e": ""}),
        (["--call.x", "[1, 2]"], {"call.x": "[1, 2]"}),
    ],
)
def test_words_are_keys_and_values(words: list[str], expected: dict[str, str]) -> None:
    assert parse_overrides(words) == expected


@pytest.mark.parametrize("words", [["x"], ["--a", "1", "2"], ["-a", "1"], ["--a=1", "2"]])
def test_a_word_that_belongs_to_no_key_is_refused(words: list[str]) -> None:
    with pytest.raises(InputError, match="expected --KEY VALUE"):
        parse_overrides(words)


BAD = [
    ("promts: p.txt\n", "c.yaml: promts: unknown key, did you mean prompts"),
    ("bata: 1\n", "c.yaml: bata: unknown key, did you mean beta"),
    ("history: 1\n", "c.yaml: history: prdp has no such option, it is one of ddpo"),
    ("call: 3\n", "c.yaml: call must be a mapping of keys to values, got 3"),
    ("max_steps: 1.0\n", "c.yaml: max_steps must be a whole number, got 1.0"),
    ("max_steps: '3'\n", 'max_steps must be a whole number, got "3"'),
    ("max_steps: true\n", "max_steps must be a whole number, got true"),
    ("max_steps: [1]\n", "max_steps must be a whole number, got [1]"),
    ("max_steps: 0\n", "c.yaml: max_steps must be at least 1, got 0"),
    ("learning_rate: fast\n", 'learning_rate must be a number, got "fast"'),
    ("learning_rate: false\n", "learning_rate must be a number, got false"),
    ("learning_rate: -1e-3\n", "c.yaml: learning_rate must be above 0 and finite, got -0.001"),
    ("kl_weight: .nan\n", "kl_weight must be a finite number"),
    ("clip: .inf\n", "clip must be a finite number (1e9 does for no limit)"),
    ("gradient_checkpointing: yes\n", 'gradient_checkpointing must be true or false, got "yes"'),
    ("mixed_precision: bf8\n", "mixed_precision must be 'no', 'fp16' or 'bf16', got \"bf8\""),
    ("model: 3\n", "model must be text (a number in quotes is one), got 3"),
    ("eval_rewards: scene\n", 'eval_rewards must be a list, like [a, b], got "scene"'),
    ("eval_rewards: [1]\n", "eval_rewards.0 must be text"),
    ("call: [1]\n", "call must be a mapping of keys to values, got [1]"),
    ("eval_prompts: e.txt\neval_prompts_count: 0\n", "eval_prompts_count must be at least 1, got 0"),
    ("eval_rewards: [jpeg]\n", "eval_rewards need eval_prompts"),
    ("preferences: folder\n", "prompts or preferences: give one of the two"),
    ("seed: 1\nseed: 2\n", "c.yaml, line 6: 'seed' is repeated"),
    ("seed: 1\n  x: 2\n", "c.yaml, line 6: mapping values are not allowed here"),
    ("seed: [1\n", "c.yaml, line 6: "),
    ("1: 2\n", "c.yaml, line 5: a key must be text"),
    ("call: &a {x: 1}\nmodel: *a\n", "c.yaml, line 6: aliases (*name) are not supported"),
    ("call: !!python/object:os.system {}\n", "c.yaml, line 5: could not determine a constructor"),
    ("call: " + "[" * 5000 + "\n", "c.yaml: not YAML"),
    ("\x07\n", "c.yaml: not YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text.strip()[:30] for text, _ in BAD])
def test_what_is_wrong_in_a_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_config(written(tmp_path, LEAST + text))
    assert message in str(error.value) and "\n" not in str(error.value) and "c.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_step": "3"}, "--max-step: unknown key, did you mean max_steps"),
        ({"max_steps": "x"}, '--max-steps must be a whole number, got "x"'),
        ({"max_steps": ""}, "--max-steps must be a whole number, got null"),
        ({"max_steps": "0"}, "--max-steps must be at least 1, got 0"),
        ({"max_steps.x": "0"}, "--max-steps.x: unknown key, did you mean max_steps"),
        ({"bata": "0"}, "--bata: unknown key, did you mean beta"),
        ({"beta": "x"}, '--beta must be a number, got "x"'),
        ({"clip": "0"}, "--clip must be above 0, got 0.0"),
        ({"call": "[1"}, "--call: "),
        ({"method": "prpd"}, "--method: unknown method 'prpd': did you mean prdp"),
        ({"reward": "null"}, "--reward is missing: say what to train on"),
        ({"eval_prompts": "e", "eval_prompts_count": "0"}, "--eval-prompts-count must be at least 1"),
        ({"preferences": "nowhere", "prompts": "null"}, "--preferences: nowhere"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_named_as_it_was_written(
    changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        read_config(written(tmp_path, LEAST), changes)
    assert str(error.value).startswith(message)


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"a: \xff\n")
    for name, message in {
        "prdp-scene": "unknown configuration 'prdp-scene': use prdp-scenes",
        str(tmp_path): "cannot read the configuration",
        str(binary): "not UTF-8 text (byte 3)",
        written(tmp_path, "- 1\n"): "expected lines of `key: value`",
    }.items():
        with pytest.raises(InputError) as error:
            read_config(name)
        assert message in str(error.value)
    with pytest.raises(InputError, match="method must be one of d3po, prdp"):
        read_config(written(tmp_path, "reward: scene\n"))
    with pytest.raises(InputError, match="output_dir is missing: give it there, or with --output-dir"):
        read_config(written(tmp_path, LEAST.replace("output_dir: out\n", "")))


@pytest.mark.parametrize(
    ("reward", "held_out"),
    [
        ("brightness", "brightness"),
        ("jpeg:2 + brightness", "jpeg:2"),
        ("brightness + jpeg", "brightness"),
        ("min(jpeg, brightness)", "brightness + colour:red"),
        ("product(brightness > 0.3, jpeg > -9)", "brightness"),
        (StandardisedReward(load_reward("brightness"), RewardStatistics(0.5, 0.1, 9, {})), "brightness"),
        (with_timeout(load_reward({"brightness": 2}), 9), "brightness"),
    ],
)
def test_a_component_of_the_trained_reward_is_no_hold_out(reward: Any, held_out: str) -> None:
    with pytest.raises(InputError, match=r"eval_rewards hold '.*', which is trained on") as error:
        PRDPTrainer(None, reward, eval_rewards=["colour:blue", held_out])
    assert load_reward(held_out).name in str(error.value)
    assert PRDPTrainer(None, reward, eval_rewards=["colour:blue"]).eval_rewards


@pytest.mark.parametrize("method", METHODS)
def test_job_and_training_share_no_key(method: str) -> None:
    names = [{one.name for one in fields(cls)} for cls in (FinetuneJob, METHODS[method].config_class)]
    assert not names[0] & names[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_lists_every_key(method: str) -> None:
    """A row of a table or a sentence of the page names the key as code."""
    page = (Path(__file__).parent.parent / "docs" / "finetuning-reference.md").read_text(encoding="utf-8")
    named = {*re.findall(r"`(\w+)[`:]", page)}
    assert sorted(schema_of(method).model_fields.keys() - named) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_described_with_its_value(name: str) -> None:
    config, rows = read_config(name), dict(describe_keys(name))
    keys = {key: f"--{key.replace('_', '-')}" for key in schema_of(config.job.method).model_fields}
    assert [*rows] == [keys[key] for key in config.plain()] and len(rows) == len(keys)
    assert all(text.partition(" [")[0] for text in rows.values())
    assert rows["--method"].endswith(f' ["{config.job.method}"]')
    assert rows["--max-steps"] == f"number of updates [{config.training.max_steps}]"
    assert rows["--eval-prompt-column"].startswith("columns of the prompts in a table")
