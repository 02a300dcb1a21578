"""The file of a noise optimisation: a killed run resumes from it, another run does not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from soft_rewards import Soft, Sum, likeness, redness, seeded
from test_reno_run import run, same_traces

from steer import Iteration, SteeringOutput
from steer.errors import InputError
from steer.pipelines.reno import ZeroOrder


def same(left: SteeringOutput, right: SteeringOutput) -> bool:
    assert left.start is not None and right.start is not None and left.start.seeds == right.start.seeds
    pairs = [(getattr(left, name), getattr(right, name)) for name in ("images", "rewards", "latents", "order")]
    pairs += [(left.start.noise, right.start.noise)]
    return all(torch.equal(a, b) for a, b in pairs) and same_traces(left.trace, right.trace)


class Enough(Exception):
    pass


def killed_at(number: int) -> Callable[[Iteration], None]:
    def observer(iteration: Iteration) -> None:
        if iteration.number == number:
            raise Enough

    return observer


RULES = {
    "sgd": {"restarts": 0},
    "adam": {"optimiser": "adam"},
    "restarts": {"patience": 1, "restarts": 3, "optimiser": "adam", "lr": 1.0},
    "zero-order": {"gradient": ZeroOrder(directions=2)},
}


@pytest.mark.few(1)
@pytest.mark.parametrize("rule", RULES)
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, rule: str) -> None:
    reward, options = Sum(like=likeness, red=lambda i, p: torch.sin(20 * redness(i, p))), RULES[rule]
    whole = run(reward, **options)
    file = tmp_path / "folder" / "state"
    for number in (1, 3):
        with pytest.raises(Enough):
            run(reward, state_file=file, on_iteration=killed_at(number), **options)
    observed: list[int] = []
    assert same(run(reward, state_file=file, on_iteration=lambda one: observed.append(one.number), **options), whole)
    assert observed == [4] and [path.name for path in file.parent.iterdir()] == ["state"]
    again = run(reward, state_file=file, on_iteration=lambda one: observed.append(one.number), **options)
    assert same(again, whole) and observed == [4]
    longer = run(reward, state_file=file, iterations=7, **options)
    assert same(longer, run(reward, iterations=7, **options))


def test_a_control_image_is_known_again_whatever_holds_it(tmp_path: Path) -> None:
    picture, other = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    options = {"name": "controlnet", "state_file": tmp_path / "state", "iterations": 1}
    first = run(image=[picture], **options)
    assert same(run(image=[picture.copy()], **options), first)
    with pytest.raises(InputError, match="belongs to another run"):
        run(image=[other], **options)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "a blue star"},
        {"lr": 1.0},
        {"optimiser": "adam"},
        {"regularisation": 0.1},
        {"patience": 2},
        {"gradient": "zero-order"},
        {"reward": Soft(likeness, "another")},
        {"name": "flux"},
        {"generator": seeded(2)},
        {"num_inference_steps": 2},
        {"guidance_scale": 5.0},
        {"num_particles": 3},
        {"latents": torch.ones(2, 4, 4, 4)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_file_of_another_run_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    run(state_file=tmp_path / "state", iterations=1)
    with pytest.raises(InputError, match="state belongs to another run; delete it, or call with its settings"):
        run(state_file=tmp_path / "state", **options)


def test_other_metadata_of_the_reward_is_another_run(tmp_path: Path) -> None:
    run(state_file=tmp_path / "state", iterations=1, metadata={"target": "red"})
    with pytest.raises(InputError, match="belongs to another run"):
        run(state_file=tmp_path / "state", metadata={"target": "blue"})
    assert len(run(state_file=tmp_path / "state", metadata={"target": "red"}).trace) == 5


def test_other_seeds_of_the_solver_are_another_run_too(tmp_path: Path) -> None:
    options = {"state_file": tmp_path / "state", "latents": torch.randn(2, 4, 4, 4, generator=seeded(5))}
    run(iterations=1, **options)
    with pytest.raises(InputError, match="belongs to another run"):
        run(generator=seeded(8), **options)


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state"
    run(state_file=file, iterations=1)
    whole = file.read_bytes()
    for content in (b"", b"nothing", whole[:-10], whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as a saved search"):
            run(state_file=file)
    save_file({"rewards": torch.ones(1, 2)}, file)
    with pytest.raises(InputError, match="belongs to another run"):
        run(state_file=file)


def test_the_file_holds_tensors_and_words_alone(tmp_path: Path) -> None:
    run(state_file=tmp_path / "state", iterations=2, optimiser="adam")
    content = (tmp_path / "state").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # the whole format: a header and bytes
    assert b"pickle" not in content and not content.startswith((b"\x80", b"PK"))
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + end
    with safe_open(tmp_path / "state", "pt") as saved:
        assert saved.metadata()["steer"] == "noise search"
    assert load_file(tmp_path / "state")["rewards"].shape == (2, 1, 2)
