"""Racing: costs by hand, best-of-N and beam search where it is one of them, survivors by their intermediate rewards."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Steer, call_kwargs
from soft_rewards import redness, seeded
from torch import Tensor
from zoo.build import cached, call_of

from steer import BestOfNPipeline, InputError, RacingPipeline, SelectionPipeline
from steer.diffusion.views import ModuleProxy, denoising_modules, with_modules
from steer.pipelines.particle_batch import IMAGES_PER_PROMPT
from steer.pipelines.racing import default_rungs, plan_race, race_cost

STEPS = 6
LATENTS = ("sample", "hidden_states", "x")  # names of a denoiser's first argument


def own_kwargs(name: str, steps: int = STEPS) -> dict[str, Any]:
    return {key: value for key, value in call_kwargs(name, 1, steps).items() if key not in IMAGES_PER_PROMPT}


def race(pipe: Any, name: str = "sd", seed: int = 1, **options: Any) -> Any:
    call = own_kwargs(name) | {"generator": seeded(seed), "output_type": "pt", "lookahead": 1} | options
    return RacingPipeline(pipe, redness)(**call)


def counted(pipe: Any) -> tuple[Any, list[int]]:
    """A pipeline whose denoiser's rows are counted, and their numbers by call."""
    rows: list[int] = []

    def watch(module: Any) -> ModuleProxy:
        def call(*args: Any, **kwargs: Any) -> Any:
            rows.append(len(args[0] if args else next(kwargs[one] for one in LATENTS if one in kwargs)))
            return module(*args, **kwargs)

        return ModuleProxy(module, call)

    return with_modules(pipe, {name: watch(module) for name, module in denoising_modules(pipe).items()}), rows


def test_the_cost_of_a_race_by_hand() -> None:
    # 16 for steps 0 to 5, 4 for steps 6 to 10, 2 for steps 11 to 19; look-aheads of 3 steps at two rungs.
    assert race_cost(16, {5: 4, 10: 2}, 20) == 16 * 6 + 4 * 5 + 2 * 9 == 134
    assert race_cost(16, {5: 4, 10: 2}, 20, lookahead=3) == 134 + 2 * (16 + 4)
    assert race_cost(8, {}, 20) == 160
    assert race_cost(4, {19: 1}, 20, lookahead=3) == 80  # nothing is left to look ahead to
    assert race_cost(8, {5: 8, 8: 8, 12: 8}, 20, lookahead=3) == 160 + 3 * 16  # beam search with look-ahead


def test_a_budget_becomes_the_largest_race_within_it() -> None:
    # K₀ = 18: 18·6 + 5·5 + 3·9 = 160. With m = 3, K₀ = 14: 14·8 + 4·7 + 2·9 = 158, and 15 would cost 166.
    plain, ahead = plan_race(160, 20), plan_race(160, 20, lookahead=3)
    assert (plain.starts, plain.rungs) == (18, {5: 5, 10: 3})
    assert (ahead.starts, ahead.rungs) == (14, {5: 4, 10: 2})
    assert race_cost(15, {5: 4, 10: 2}, 20, 3) == 166
    branched = plan_race(160, 20, branches=4)
    assert (branched.starts, branched.rungs) == (8, {5: 8, 8: 8, 12: 8})  # beam search: 160 evaluations, no look-ahead
    assert default_rungs(11, 20, 4) == {5: 8, 8: 8, 12: 8} and default_rungs(3, 20, 4) == default_rungs(4, 1, 2) == {}
    assert default_rungs(8, 3, 4) == {1: 8}  # the last step has no noise after it
    # A look-ahead of six steps is a draft at the first step: 17·6 + 3·19 = 159, and 18 starts would cost 165.
    drafted = plan_race(160, 20, lookahead=6)
    assert (drafted.starts, drafted.rungs) == (17, {0: 3}) and race_cost(18, {0: 3}, 20, 6) == 165
    assert default_rungs(1, 20, lookahead=6) == default_rungs(8, 1, lookahead=6) == {}
    with pytest.raises(InputError, match="budget: 20 evaluations are too few for a race over 20 steps: give at least"):
        plan_race(20, 20)
    for budget in range(40, 400, 7):
        one = plan_race(budget, 20, lookahead=3)
        assert one.rungs is not None and race_cost(one.starts, one.rungs, 20, 3) <= budget


def test_a_budget_chooses_the_look_ahead() -> None:
    """m ≤ 30 % of the run; with 20 steps K₀ starts cost K₀ m + 19 ⌈K₀/6⌉, for m of at least 4."""
    usual = plan_race(160, 20, lookahead=None)
    assert (usual.starts, usual.rungs, usual.lookahead) == (17, {0: 3}, 6)  # as before this rule
    plans = {
        (55, 20): (6, 6),  # 6·6 + 19
        (54, 20): (6, 5),  # 6·5 + 19 = 49
        (48, 20): (6, 4),  # 6·4 + 19 = 43
        (42, 20): (5, 4),  # 5·4 + 19 = 39; of no look-ahead only four starts, 4·6 + 14 = 38
        (26, 20): (2, 1),  # 2·6 + 14
        (80, 10): (11, 3),  # rungs {2: 3, 5: 2}: 11·5 + 3·5 + 2·4 = 78
        (40, 6): (8, 2),  # rungs {2: 2, 3: 1}: 8·4 + 2·2 + 2 = 38
        (400, 50): (25, 6),  # 25·6 + 49·5
    }
    for (budget, steps), (starts, m) in plans.items():
        plan = plan_race(budget, steps, lookahead=None)
        assert (plan.starts, plan.lookahead) == (starts, m), (budget, steps)


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_the_chosen_race_is_that_of_a_search(branches: int) -> None:
    for steps, budget in itertools.product((3, 6, 10, 20, 50), range(30, 500, 23)):
        most = max(1, min(6, round(0.3 * steps)))
        affordable = {
            (m, starts)
            for m in range(1, most + 1)
            for starts in range(2, budget)
            if race_cost(starts, default_rungs(starts, steps, branches, m), steps, m) <= budget
        }
        if not affordable:
            with pytest.raises(InputError, match="are too few for a race"):
                plan_race(budget, steps, branches, None)
            continue
        six = [one for one in affordable if one[1] >= 6]
        m, starts = max(six) if six else max(affordable, key=lambda one: (one[1], one[0]))
        plan = plan_race(budget, steps, branches, None)
        assert (plan.lookahead, plan.starts) == (m, starts), (steps, budget)
        assert plan.rungs == default_rungs(starts, steps, branches, m)


def test_a_race_looks_ahead_as_its_plan_says(pipe_of: Callable[[str], Any]) -> None:
    """At most four solver steps of 12 for look-ahead; a given number is kept, and a learned value needs none."""
    call = {"budget": 60, "num_inference_steps": 12}
    for lookahead, m in (("auto", 4), (2, 2)):
        plan = plan_race(60, 12, lookahead=m)
        made = race(pipe_of("sd"), lookahead=lookahead, **call)
        assert made.history[0].rewards.shape[1] == plan.starts and plan.rungs is not None
        assert made.cost.nfe == race_cost(plan.starts, plan.rungs, 12, m)
    valued = race(pipe_of("sd"), lookahead="auto", value=lambda step, prompts: step.x.flatten(1)[:, 0], **call)
    assert valued.history[0].rewards.shape[1] == plan_race(60, 12).starts
    without_budget = race(pipe_of("sd"), lookahead="auto", num_particles=6, num_inference_steps=12)
    assert without_budget.cost.nfe == race_cost(6, {0: 1}, 12, 6)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
def test_without_rungs_it_is_best_of_n_byte_for_byte(pipe_of: Callable[[str], Any], name: str) -> None:
    made = race(pipe_of(name), name, num_particles=3, rungs={})
    call = own_kwargs(name) | {"generator": seeded(1), "output_type": "pt", "num_particles": 3}
    best = BestOfNPipeline(pipe_of(name), redness)(**call)
    assert torch.equal(made.images, best.images) and torch.equal(made.rewards, best.rewards)
    assert made.cost.nfe == best.cost.nfe == 3 * STEPS and torch.equal(made.log_weights, torch.zeros(1, 3))


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_rung_at_the_last_step_leaves_the_best_of_n(pipe_of: Callable[[str], Any], name: str) -> None:
    """x̂0 of the last step is the image: the rung ranks the finished images of the same latents."""
    call = {"num_particles": 4, "chunk_size": 4}
    made = race(pipe_of(name), name, rungs={STEPS - 1: 1}, **call)
    best = BestOfNPipeline(pipe_of(name), redness)(
        **own_kwargs(name) | {"generator": seeded(1), "output_type": "pt"} | call
    )
    assert torch.equal(made.latents, best.latents[:1])
    torch.testing.assert_close(made.rewards[0, 0], best.rewards[0, 0])
    assert made.cost.nfe == 4 * STEPS and len(made.images) == 1


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
def test_survivors_are_the_best_and_dead_rows_cost_nothing(pipe_of: Callable[[str], Any], name: str) -> None:
    pipe, rows = counted(pipe_of(name))
    prompts = ["a red circle", "a blue star"]
    rungs = {1: 3, 3: 2}
    made = race(pipe, name, prompt=prompts, num_particles=6, rungs=rungs, chunk_size=12)
    assert made.cost.nfe == len(prompts) * race_cost(6, rungs, STEPS) == len(prompts) * (6 * 2 + 3 * 2 + 2 * 2)
    alive, calls = (6, 6, 3, 3, 2, 2), len(rows) // STEPS  # guidance doubles the batch, or the calls
    assert rows == [rows[0] // 6 * count for count in alive for _ in range(calls)]
    assert sum(rows) in (made.cost.nfe, 2 * made.cost.nfe)
    whole = BestOfNPipeline(pipe_of(name), redness)(
        **own_kwargs(name) | {"prompt": prompts, "generator": seeded(1), "output_type": "pt", "num_particles": 6}
    ).in_slot_order()
    images = whole.images.view(2, 6, *whole.images.shape[1:])
    for b in range(2):
        left = list(range(6))
        for evaluation, count in zip(made.history, rungs.values(), strict=True):
            rewards = evaluation.rewards[b].tolist()
            best = sorted(sorted(range(len(left)), key=lambda slot: -rewards[slot])[:count])
            assert evaluation.ancestors[b].tolist() == best
            left = [left[slot] for slot in best]
        for rank, slot in enumerate(made.order[b].tolist()):  # a survivor's run is that of its start
            torch.testing.assert_close(
                made.images[b * 2 + rank].float(), images[b, left[slot]].float(), rtol=1e-3, atol=1e-3
            )
    assert made.cost.decodes == 2 * (6 + 3 + 2) and (made.rewards.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("name", ["ZImage", "ZImageImg2Img"])
def test_latents_in_a_list_race_as_in_one_tensor(name: str) -> None:
    """Z-Image's denoiser takes and returns a list with a tensor for each row; texts are lists of other lengths."""
    pipe, rows = counted(cached(name))
    prompts = ["a red circle", "a blue star left of two green triangles"] if name == "ZImage" else ["a red circle"]
    call = call_of(name) | {"prompt": prompts, "generator": seeded(1), "output_type": "pt", "num_particles": 4}
    call |= {"negative_prompt": None}
    made = RacingPipeline(pipe, redness)(rungs={1: 3, 2: 1}, lookahead=1, **call)
    whole = BestOfNPipeline(cached(name), redness)(**call | {"generator": seeded(1)}).in_slot_order()
    steps = whole.cost.nfe // (4 * len(prompts))
    assert made.cost.nfe == len(prompts) * race_cost(4, {1: 3, 2: 1}, steps)
    assert rows == [2 * len(prompts) * alive for alive in (4, 4, 3, *[1] * (steps - 3))]  # guidance doubles them
    images = whole.images.view(len(prompts), 4, *whole.images.shape[1:])
    for b in range(len(prompts)):
        first, second = (evaluation.ancestors[b] for evaluation in made.history)
        start = int(first[second[0]])
        assert first.tolist() == sorted(made.history[0].rewards[b].topk(3).indices.tolist())
        torch.testing.assert_close(made.images[b], images[b, start], rtol=0, atol=1e-5)
        others = [(made.images[b] - images[b, slot]).abs().max() for slot in range(4) if slot != start]
        assert min(others) > 1e-2


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "starts", "own"),
    [
        ("AnimateDiff", 3, {"decode_chunk_size": 3}),  # the autoencoder gets as many frames as there are starts
        ("AnimateDiffControlNet", 2, {}),
        ("AnimateDiffSparseControlNet", 3, {}),
    ],
)
def test_videos_with_texts_of_every_frame_race(name: str, starts: int, own: dict[str, Any]) -> None:
    """AnimateDiff repeats texts and controls for each frame, and decodes chunks of frames."""
    call = call_of(name) | {"generator": seeded(1), "output_type": "pt", "num_particles": starts} | own
    made = RacingPipeline(cached(name), redness)(rungs={1: starts - 1}, lookahead=1, **call)
    whole = BestOfNPipeline(cached(name), redness)(**call | {"generator": seeded(1)}).in_slot_order()
    assert made.cost.nfe == race_cost(starts, {1: starts - 1}, whole.cost.nfe // starts)
    (rung,) = made.history
    assert rung.ancestors[0].tolist() == sorted(rung.rewards[0].topk(starts - 1).indices.tolist())
    for rank, slot in enumerate(made.order[0].tolist()):
        gaps = [(made.images[rank] - image).abs().max() for image in whole.images]
        start = int(rung.ancestors[0, slot])
        assert gaps.pop(start) < 1e-4 and min(gaps) > 1e-2


def test_a_second_modality_follows_its_starts() -> None:
    """LTX-2 denoises audio beside the video: it has no look-ahead, and races by x̂0."""
    call = call_of("LTX2") | {"generator": seeded(1), "output_type": "pt", "num_particles": 3}
    made = RacingPipeline(cached("LTX2"), redness)(rungs={1: 1}, lookahead=1, **call)
    whole = BestOfNPipeline(cached("LTX2"), redness)(**call | {"generator": seeded(1)}).in_slot_order()
    gaps = [(made.images[0] - video).abs().max() for video in whole.images]
    assert gaps.pop(int(made.history[0].rewards[0].argmax())) < 1e-4 and min(gaps) > 1e-2
    assert made.cost.nfe == race_cost(3, {1: 1}, whole.cost.nfe // 3)
    with pytest.raises(InputError, match="a second modality beside the latents: use lookahead=1"):
        RacingPipeline(cached("LTX2"), redness)(**call)


@pytest.mark.parametrize(("name", "starts"), [("DiT", 2), ("AnimateDiffControlNet", 3)])
def test_a_pipeline_with_one_call_for_each_particle_does_not_race(name: str, starts: int) -> None:
    """DiT makes one image a call, of two rows with guidance: as many as there are starts, but both are of one."""
    call = call_of(name) | {"generator": seeded(1), "num_particles": starts, "lookahead": 1}
    with pytest.raises(InputError, match="makes one image a call, which cannot end early: use best-of-N, or FK"):
        RacingPipeline(cached(name), redness)(rungs={1: 1}, **call)


def test_a_budget_plans_a_race_of_latents_in_a_list() -> None:
    call = call_of("ZImage") | {"generator": seeded(1), "output_type": "pt", "budget": 20, "lookahead": 1}
    plan = plan_race(20, 4)
    made = RacingPipeline(cached("ZImage"), redness)(**call)
    assert plan.rungs is not None and made.cost.nfe == race_cost(plan.starts, plan.rungs, 4) <= 20
    assert made.history[0].rewards.shape[1] == plan.starts


@pytest.mark.parametrize("eta", [None, 1.0])
def test_with_as_many_children_as_were_dropped_it_is_beam_search(pipe_of: Callable[[str], Any], eta: Any) -> None:
    call = {"num_particles": 4, "eta": eta}
    made = race(pipe_of("sd"), rungs={1: 4, 3: 4}, branches=2, **call)
    beam = SelectionPipeline(pipe_of("sd"), redness)(
        beams=2, select_steps=[1, 3], **own_kwargs("sd") | {"generator": seeded(1), "output_type": "pt"} | call
    )
    assert torch.equal(made.images, beam.images) and made.cost.nfe == beam.cost.nfe


def test_children_of_few_survivors_diverge(pipe_of: Callable[[str], Any]) -> None:
    made = race(pipe_of("sd"), num_particles=6, rungs={1: 4}, branches=2)
    (evaluation,) = made.history
    parents = sorted(evaluation.rewards[0].topk(2).indices.tolist())
    assert evaluation.ancestors[0].tolist() == [parents[0], parents[0], parents[1], parents[1]]
    assert len(made.images) == 4 and made.cost.nfe == 6 * 2 + 4 * 4
    assert all(not torch.equal(made.images[i], made.images[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_look_ahead_ranks_the_starts_and_is_counted(pipe_of: Callable[[str], Any], name: str) -> None:
    """With as many coarse steps as are left it is the solver itself: the rung ranks the finished images."""
    pipe, rows = counted(pipe_of(name))
    rungs = {1: 2, 3: 1}
    made = race(pipe, name, num_particles=5, rungs=rungs, lookahead=3, chunk_size=5)
    assert made.cost.nfe == race_cost(5, rungs, STEPS, 3) == 5 * 2 + 2 * 2 + 2 + 2 * (5 + 2)
    assert sum(rows) == made.cost.nfe * (2 if name == "sd" else 1)
    whole = race(pipe_of(name), name, num_particles=5, rungs={1: 1}, lookahead=STEPS, chunk_size=5)
    best = BestOfNPipeline(pipe_of(name), redness)(
        **own_kwargs(name) | {"generator": seeded(1), "output_type": "pt", "num_particles": 5}
    )
    torch.testing.assert_close(whole.rewards[0, 0], best.rewards[0, 0], rtol=1e-3, atol=1e-3)
    ranked = whole.history[0].rewards[0].sort(descending=True).values
    torch.testing.assert_close(ranked, best.rewards[0], rtol=1e-3, atol=1e-3)


def test_a_budget_is_kept_and_leaves_the_generator_to_the_run(pipe_of: Callable[[str], Any]) -> None:
    by_budget = race(pipe_of("sd"), budget=40)
    plan = plan_race(40, STEPS)
    by_hand = race(pipe_of("sd"), num_particles=plan.starts, rungs=plan.rungs)
    assert torch.equal(by_budget.images, by_hand.images)
    assert 40 - STEPS < by_budget.cost.nfe <= 40


def test_generators_of_the_images_start_the_first_of_a_larger_race(pipe_of: Callable[[str], Any]) -> None:
    own = [seeded(5), seeded(6)]
    several: Tensor = race(pipe_of("sd"), budget=30, generator=own).history[0].rewards
    two = race(pipe_of("sd"), rungs={}, num_particles=2, generator=[seeded(5), seeded(6)], output_type="pt")
    first = race(pipe_of("sd"), rungs={round(STEPS / 4): 1}, num_particles=2, generator=[seeded(5), seeded(6)])
    assert two.cost.nfe == 2 * STEPS and several.shape[1] > 2
    torch.testing.assert_close(several[:, :2], first.history[0].rewards)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_particles": 4, "rungs": {1: 4}},
            "rungs: 4 particles from step 1 on, of 4: they must be fewer",
        ),
        ({"num_particles": 4, "rungs": {1: 0}}, "rungs: 0 particles from step 1 on"),
        ({"num_particles": 4, "rungs": {6: 1}}, "rungs: 6 is not from 0 to 5, in a run of 6 steps"),
        ({"num_particles": 4, "rungs": {5: 2}, "branches": 2}, "rungs: 5 is not from 0 to 4"),
        (
            {"num_particles": 4, "rungs": {1: 3}, "branches": 2},
            "branches must divide the particles of each rung",
        ),
        ({"budget": 40, "rungs": {1: 1}}, "budget and rungs exclude each other"),
        ({"budget": 40, "num_particles": 9}, "budget and num_particles exclude each other: starts follow"),
        (
            {"kernel": "glass"},
            "branches=1 without eta: no step has noise for kernel='glass' to draw, use more branches",
        ),
        ({"kernel": "glass", "eta": 0.0}, "branches=1 without eta"),
        ({"budget": 3}, "budget: 3 evaluations are too few for a race over 6 steps"),
        ({"budget": 40, "latents": torch.zeros(1, 4, 8, 8)}, "budget and latents exclude each other"),
        ({"branches": 0}, "branches must be at least 1"),
        ({"rungs": "2:1,2:1"}, "rungs: a step is there twice"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    pipe_of: Callable[[str], Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        race(pipe_of("sd"), **options)


def test_the_command_races_and_resumes(steer: Steer, tmp_path: Path) -> None:
    words = ["sample", "a red circle", "--steps", "6", "--no-compare", "--method", "race", "--lookahead", "1"]
    plan = plan_race(40, 6)
    assert (plan.starts, plan.rungs) == (11, {2: 3, 3: 2})  # 11·3 + 3 + 2·2 = 40
    for options, starts, left in ((["--budget", "40"], 11, 2), (["--particles", "6", "--rungs", "1:3,3:2"], 6, 2)):
        out = tmp_path / options[0]
        assert steer(*words, *options, "--out", out)[0] == 0
        report = json.loads((out / "report.json").read_text())
        (entry,) = report["prompts"]
        assert len(entry["images"]) == left and len(entry["step_rewards"][0]) == starts
        image = out / entry["images"][0]
        before = image.stat().st_mtime_ns
        assert steer(*words, *options, "--out", out)[0] == 0 and image.stat().st_mtime_ns == before
        assert steer("sample", "--replay", image, "--out", tmp_path / "again" / options[0])[0] == 0
    automatic, out = [word for word in words if word not in ("--lookahead", "1")], tmp_path / "auto"
    assert steer(*automatic, "--budget", "40", "--out", out)[0] == 0
    assert json.loads((out / "report.json").read_text())["cost"]["nfe"] == 38  # of two steps: 8·4 + 2·2 + 2
    image = next(out.glob("*/00.png"))
    assert steer("sample", "--replay", image, "--out", tmp_path / "again")[0] == 0  # no file to be trusted
    code, _, err = steer(*automatic, "--budget", "40", "--particles", "9", "--out", out)
    assert code == 2 and "--budget and --particles exclude each other" in err
    code, _, err = steer(*words, "--rungs", "1:12", "--out", tmp_path / "o")
    assert code == 2 and "--rungs: 12 particles from step 1 on, of 12" in err
