"""Learning from the choices of the Label tab: one button for a reward, another for finetuned weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import gradio as gr

from steer.apps.demo.image_labels import TABLE
from steer.apps.demo.labels import label_folder
from steer.apps.demo.progress import Progress
from steer.apps.demo.steering import Loading
from steer.apps.demo.studio import PRIVATE, RUNS, Change, JobTab, Studio, Ticket, guarded, line, write_zip
from steer.apps.errors import wrap_errors
from steer.apps.learning import run_reward_training, summary
from steer.apps.models import default_device
from steer.errors import InputError
from steer.pipelines.training.preference_files import PREFERENCES
from steer.rewards.folders import name_reward
from steer.rewards.training_config import RewardTrainingConfig

CLIP = "scenes"
CONFIG = RewardTrainingConfig(CLIP, steps=300, batch_size=32, members=2)
REPORTED_STEPS = 20  # training steps between two events
NUMBERS = count(1)  # numbers in the names of this process's rewards
READY = "Learns from all choices so far: a reward to steer by, or the model itself, in the Finetune tab."


@dataclass(frozen=True)
class LearningStep:
    """Progress: a step of the training, from 1, of `total`."""

    step: int
    total: int

    def __str__(self) -> str:
        return f"Learning from the choices: step {self.step} of {self.total}"


@dataclass(frozen=True)
class NewReward:
    """An event: the end of the training. `spec` loads the reward by name, `archive` is its folder as a zip."""

    spec: str
    summary: str
    archive: Path


def reward_training(studio: Studio) -> Callable[[Ticket], None]:
    """Make a job that trains a reward on the choices so far, and gives the reward a name in this process.

    The reward is a small head on the CLIP of scenes. Sends Loading, LearningStep and NewReward events. Raises
    InputError if nothing is labelled.
    """
    choices, number = label_folder(studio), next(NUMBERS)
    table = choices / (PREFERENCES if studio.label_images is None else TABLE)
    if not table.exists():
        raise InputError("nothing has been labelled yet: choose between some images first")
    name = f"labels-{number}"
    folder = studio.home / "rewards" / name

    def work(ticket: Ticket) -> None:
        def on_step(step: int, total: int) -> None:
            ticket.check()
            if step % REPORTED_STEPS == 0:
                ticket.say(LearningStep(step, total))

        ticket.say(Loading(f"clip:{CLIP}"))
        with wrap_errors("the training of the reward", "the choices are kept", "labels of fewer images need less"):
            report = run_reward_training(
                table, CONFIG, folder, folder.with_suffix(".work"), default_device(studio.device), on_step=on_step
            )
        archive = write_zip(folder.with_suffix(".zip"), folder, sorted(folder.iterdir()), name)
        ticket.say(NewReward(name_reward(name, folder), summary(report), archive))

    return work


class LabelLearning(JobTab):
    """The buttons and the status; create it inside the Label tab. All visitors of the app can use the reward."""

    def __init__(self, studio: Studio) -> None:
        self.studio, self.spec = studio, gr.State("")
        gr.HTML("<h2>Learn from the choices</h2>")
        self._job_buttons("Train a reward", "label-reward")
        self.finetune = gr.Button("Finetune the model on them", elem_id="label-finetune")
        self.status = gr.HTML(line(READY), elem_id="label-reward-status")
        with gr.Row(visible=False, elem_id="label-reward-results") as self.results:
            self.use = gr.Button("Use in Steer", variant="primary", elem_id="label-reward-use")
            self.archive = gr.DownloadButton("Download (zip)", elem_id="label-reward-archive")
        live = [self.status, self.results, self.archive, self.spec, self.start, self.stop]
        self._connect_job(self.start.click(self.begin, None, live, **RUNS))

    @guarded
    def begin(self, request: gr.Request) -> Iterator[Change]:
        """Train a reward, and show its progress."""
        ticket = self.studio.begin(request, reward_training(self.studio))
        reward, progress = None, Progress()
        yield {self.results: gr.update(visible=False)}
        for event in ticket.events():
            if isinstance(event, NewReward):
                reward = event
                continue
            if isinstance(event, LearningStep):
                progress.update(event.step / event.total)
            yield {self.status: progress.status(str(event))}
        if reward is None:
            yield {self.status: line("Stopped: no reward was trained.")}
            return
        yield {
            self.status: line(f"{reward.spec}: {reward.summary}."),
            self.results: gr.update(visible=True),
            self.archive: gr.update(value=str(reward.archive)),
            self.spec: reward.spec,
        }

    def loaded(self, reward: gr.Dropdown, tabs: gr.Tabs) -> None:
        """Connect the button that writes the reward's name into the Steer tab, and opens the tab."""
        opened = gr.update(selected="steer")
        self.use.click(lambda spec: (spec, opened), self.spec, [reward, tabs], **PRIVATE)
