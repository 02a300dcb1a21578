"""Rewards of whole videos: all frames and the frames per second, beside rewards of single frames."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from steer import AudioReward, GRPOTrainer, VideoReward, load_reward, score, score_components, with_timeout
from steer.pipelines.training.trainer import Trainer
from steer.reward import RewardError, mean_over_frames
from steer.reward import score_components as reward_components
from steer.rewards.compose import with_media_rates
from steer.video import frame_rate

VIDEOS = torch.rand(2, 12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b"]
SEEN: list[tuple[tuple[int, ...], float | None]] = []


def motion(videos: Tensor, prompts: Sequence[str], fps: float | None) -> Tensor:
    SEEN.append((tuple(videos.shape), fps))
    return (videos[:, 1:] - videos[:, :-1]).abs().mean((1, 2, 3, 4)) * (fps or 1)


def by_hand(fps: float) -> Tensor:
    return (VIDEOS[:, 1:] - VIDEOS[:, :-1]).abs().mean((1, 2, 3, 4)) * fps


def test_all_frames_and_the_rate_are_seen() -> None:
    SEEN.clear()
    reward = VideoReward(motion, fps=24)
    assert torch.allclose(score(VIDEOS, PROMPTS, reward), by_hand(24))
    assert SEEN == [((2, 12, 3, 8, 8), 24)]  # 12 frames: others are scored on 8
    assert torch.allclose(score(VIDEOS, PROMPTS, with_timeout(reward, 60)), by_hand(24))
    still = VideoReward(lambda videos, *_: videos.mean((1, 2, 3, 4)))
    assert torch.allclose(score(VIDEOS[:, 0], PROMPTS, still), VIDEOS[:, 0].mean((1, 2, 3)))  # a video of one frame


def test_in_a_sum_frames_of_the_other_reward_are_averaged() -> None:
    video = VideoReward(motion, name="motion", fps=2)
    total, components = score_components(VIDEOS, PROMPTS, {video: 3, "brightness": 1})
    single = torch.stack([load_reward("brightness")(VIDEOS[:, k], PROMPTS) for k in (0, 2, 3, 5, 6, 8, 9, 11)]).mean(0)
    assert torch.allclose(components["motion"], by_hand(2)) and torch.allclose(components["brightness"], single)
    assert torch.allclose(total, 3 * by_hand(2) + single)
    own = load_reward({video: 1, (lambda images, prompts: images[:, 0].mean((1, 2))): 1})  # a plain function
    assert torch.allclose(own(VIDEOS, PROMPTS), by_hand(2) + VIDEOS[:, [0, 2, 3, 5, 6, 8, 9, 11], 0].mean((1, 2, 3)))


def test_pipelines_and_trainers_give_whole_videos_and_gradients() -> None:
    reward, videos = VideoReward(motion, differentiable=True), VIDEOS.clone().requires_grad_()

    def scored(images: Tensor) -> Any:
        return reward_components(reward, images, PROMPTS)

    total, _ = mean_over_frames(videos, scored, reward)
    assert torch.allclose(total, by_hand(1))
    total.sum().backward()
    assert videos.grad is not None and (videos.grad != 0).any(-1).any(-1).any(-1).all()  # of every frame
    broken = VideoReward(lambda videos, *_: videos.mean((1, 2, 3)))
    with pytest.raises(RewardError, match=r"reward 'video' must return a tensor of shape \(2,\), got \(2, 8\)"):
        score(VIDEOS, PROMPTS, broken)


class WithRate:
    scheduler, vocoder = None, SimpleNamespace(sampling_rate=16_000)

    def __call__(self, prompt: str, frame_rate: float = 24.0) -> None: ...


@pytest.mark.parametrize("timeout", [None, 60])
def test_components_and_trained_rewards_get_the_rates_of_the_pipeline(
    timeout: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[int | None] = []
    audio = AudioReward(lambda waveforms, prompts, rate: rates.append(rate) or waveforms.mean(1))  # type: ignore[func-returns-value]
    video = VideoReward(motion, name="motion")
    own = {video: 2, VideoReward(motion, name="own", fps=8): 1, "brightness": 1}
    reward = with_timeout(load_reward(own), timeout)
    components = reward_components(with_media_rates(reward, WithRate(), {"frame_rate": 12}), VIDEOS, PROMPTS)[1]
    assert torch.allclose(components["motion"], by_hand(12)) and torch.allclose(components["own"], by_hand(8))
    assert torch.allclose(reward_components(reward, VIDEOS, PROMPTS)[1]["motion"], by_hand(1))  # it is not changed
    reward_components(with_media_rates(load_reward({audio: 1}), WithRate(), {}), torch.rand(2, 9), PROMPTS)
    assert rates == [16_000]
    for name in ("rollout_source", "evaluator"):
        monkeypatch.setattr(Trainer, name, lambda self: None)
    monkeypatch.setattr("steer.pipelines.training.trainer.FinetuningRun", lambda *_: SimpleNamespace(train=list))
    trainer = GRPOTrainer(
        WithRate(), reward, train_prompts=PROMPTS, eval_rewards=[VideoReward(motion, name="held-out")]
    )
    trainer.train()
    assert torch.allclose(reward_components(trainer.reward, VIDEOS, PROMPTS)[1]["motion"], by_hand(24))
    assert torch.allclose(reward_components(trainer.eval_rewards[0], VIDEOS, PROMPTS)[0], by_hand(24))


def test_the_frame_rate_is_that_of_the_call() -> None:
    class Without:
        def __call__(self, prompt: str) -> None: ...

    class Unset:
        def __call__(self, prompt: str, fps: int | None = None) -> None: ...

    assert frame_rate(WithRate(), {}) == 24 and frame_rate(WithRate(), {"frame_rate": 8}) == 8
    assert (
        frame_rate(Without(), {}) is None and frame_rate(Unset(), {}) is None and frame_rate(Unset(), {"fps": 7}) == 7
    )
