"""Coercion of arguments: equivalent numbers and texts are accepted, anything else is one line."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from pairwise import hard_but

import steer
from steer import (
    BestOfNPipeline,
    DraftsPipeline,
    FKSteeringPipeline,
    MapElitesPipeline,
    NoiseSearchPipeline,
    RacingPipeline,
    RenoisePipeline,
    ReNOPipeline,
    SelectionPipeline,
)
from steer.arguments import coerce_value
from steer.assets import MODELS
from steer.errors import InputError

TEXTS = str | Sequence[str] | None


@pytest.mark.parametrize(
    ("hint", "value", "meant"),
    [
        (int, 2.0, 2),
        (int | None, np.int64(3), 3),
        (int, np.float32(4), 4),
        (int, torch.tensor(3), 3),
        (float, np.float32(0.5), 0.5),
        (float | None, None, None),
        (bool, np.bool_(True), True),
        (TEXTS, np.array(["a", "b"]), ["a", "b"]),
        (TEXTS, ("a", "b"), ["a", "b"]),
        (TEXTS, np.str_("a"), "a"),
        (Iterable[int] | None, np.arange(3), [0, 1, 2]),
        (Mapping[int, int] | None, {2.0: np.int32(1)}, {2: 1}),
        (Any, "anything", "anything"),
    ],
)
def test_what_plainly_means_a_value_becomes_one(hint: Any, value: Any, meant: Any) -> None:
    coerced = coerce_value("x", hint, value)
    assert coerced == meant and type(coerced) is type(meant)
    if isinstance(coerced, list):
        assert [type(one) for one in coerced] == [type(one) for one in meant]


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, 2.5),
        (int, "2"),
        (int, True),
        (int, None),
        (int, float("nan")),
        (int, np.array([1, 2])),
        (float, "x"),
        (bool, "yes"),
        (TEXTS, 3),
        (TEXTS, ["a", 3]),
        (TEXTS, b"a"),
        (TEXTS, []),
        (TEXTS, {"a": "b"}),
        (Iterable[int] | None, 3),
        (Iterable[int] | None, [0.5]),
        (Mapping[int, int] | None, [1]),
    ],
)
def test_anything_else_is_one_line_that_names_the_argument(hint: Any, value: Any) -> None:
    with pytest.raises(InputError, match=r"^the_argument") as raised:
        coerce_value("the_argument", hint, value)
    assert len(str(raised.value).splitlines()) == 1


METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "fk": (FKSteeringPipeline, {"num_inference_steps": 5}),
    "selection": (SelectionPipeline, {"num_inference_steps": 5}),
    "best-of-n": (BestOfNPipeline, {"num_inference_steps": 2}),
    "race": (RacingPipeline, {"num_inference_steps": 4}),
    "drafts": (DraftsPipeline, {"num_inference_steps": 3, "drafts": 3, "draft_steps": 2}),
    "renoise": (RenoisePipeline, {"num_inference_steps": 3, "drafts": 3, "draft_steps": 2}),
    "reno": (ReNOPipeline, {"iterations": 1, "gradient": "zero-order"}),
    "noise-search": (NoiseSearchPipeline, {"iterations": 1, "num_inference_steps": 2}),
    "map-elites": (MapElitesPipeline, {"iterations": 1, "num_inference_steps": 2, "first_batches": 1}),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = StableDiffusionPipeline.from_pretrained(MODELS["scenes"])
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name", hard_but(METHODS, "fk", "best-of-n"))
def test_every_method_takes_numbers_of_numpy_and_arrays_of_prompts(name: str, pipe: Any) -> None:
    kind, given = METHODS[name]
    method = kind(pipe, "brightness")
    of_numpy = {key: np.int64(value) if type(value) is int else value for key, value in given.items()}
    plain, other = (
        method(prompts, num_particles=count, generator=torch.Generator().manual_seed(0), output_type="pt", **arguments)
        for prompts, count, arguments in (
            (["a star", "a circle"], 2, given),
            (
                np.array(["a star", "a circle"]),
                2.0,
                of_numpy,
            ),
        )
    )
    assert torch.equal(plain.images, other.images) and torch.equal(plain.rewards, other.rewards)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_particles": 2.5}, "num_particles must be a whole number, got 2.5 of type float"),
        ({"num_particles": "2"}, "num_particles must be a whole number"),
        ({"prompt": ["a", 3]}, "prompt must be a text or a list of texts, got 3 of type int at place 1"),
        ({"prompt": 7}, "prompt must be a text"),
        ({"num_inference_steps": "many"}, "num_inference_steps must be a whole number"),
        ({"guidance_scale": "4"}, "guidance_scale must be a number"),
        ({"chunk_size": None}, "chunk_size must be a whole number"),
    ],
)
def test_every_method_refuses_other_types_by_name(name: str, wrong: dict[str, Any], named: str, pipe: Any) -> None:
    with pytest.raises(InputError) as raised:
        METHODS[name][0](pipe, "brightness")(**{"prompt": "a star"} | wrong)
    assert str(raised.value).startswith(named) and len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("config", [steer.D3POConfig, steer.PRDPConfig, steer.GRPOConfig, steer.DDPOConfig])
def test_every_argument_of_a_training_has_its_help(config: type[steer.TrainingConfig]) -> None:
    assert set(config.help()) == {one.name for one in fields(config)} and all(config.help().values())
