"""The nodes: score an IMAGE batch, rank it to pick the best, load an adapter. Imported by ComfyUI."""

from typing import Any

import comfy.lora
import comfy.sd
import folder_paths
from comfy_api.latest import ComfyExtension, io

from steer.apps.comfyui.batches import check_reward_text, pick, score_batch
from steer.errors import InputError
from steer.training.lora_layouts import DOWN, read_as_kohya

CATEGORY = "steer"
REWARD_HELP = "NAME[:ARGUMENT], or a sum such as hpsv2.1:5 + imagereward:1; `steer rewards` lists names"


def shared_inputs() -> list[Any]:
    """Return the inputs of all nodes."""
    return [
        io.Image.Input("images", tooltip="A batch of images of one prompt."),
        io.String.Input("prompt", multiline=True, default="", tooltip="The prompt that the reward reads."),
        io.String.Input("reward", default="pickscore", tooltip=REWARD_HELP),
    ]


class RewardNode(io.ComfyNode):  # type: ignore[misc]
    """A node with a reward; the reward is checked before the workflow runs."""

    @classmethod
    def validate_inputs(cls, reward: str | None = None) -> bool | str:
        """Return True, or the problem of the reward in one line; None comes from a link, which is checked later."""
        try:
            if reward is not None:
                check_reward_text(reward)
        except InputError as error:
            return str(error)
        return True


class ScoreImages(RewardNode):
    """Score every image of a batch by a reward."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the inputs and outputs of the node."""
        return io.Schema(
            node_id="SteerScoreImages",
            display_name="Score images (steer)",
            category=CATEGORY,
            description="Score every image of a batch by a reward; higher is better.",
            inputs=shared_inputs(),
            outputs=[
                io.Float.Output(
                    "scores", is_output_list=True, tooltip="One for each image, in the order of the batch."
                ),
                io.Float.Output("mean"),
                io.String.Output("table", tooltip="Rewards and their components, best first."),
            ],
        )

    @classmethod
    def execute(cls, images: Any, prompt: str, reward: str) -> Any:
        """Score the batch. Raises InputError, which ComfyUI shows at the node."""
        scores = score_batch(images, prompt, reward)
        return io.NodeOutput(scores.totals.tolist(), scores.totals.mean().item(), scores.table())


class RankImages(RewardNode):
    """Sort a batch by a reward, and keep the best images."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the inputs and outputs of the node."""
        keep = io.Int.Input("keep", default=1, min=0, max=4096, tooltip="Number of images to keep; 0: all, ranked.")
        return io.Schema(
            node_id="SteerRankImages",
            display_name="Pick the best images (steer)",
            category=CATEGORY,
            description="Sort a batch by a reward, best first, and keep the best.",
            inputs=[*shared_inputs(), keep],
            outputs=[
                io.Image.Output("best"),
                io.Float.Output("scores", is_output_list=True, tooltip="Of the kept images, best first."),
                io.Int.Output("numbers", is_output_list=True, tooltip="Of the kept images in the batch, from 0."),
                io.String.Output("table"),
            ],
        )

    @classmethod
    def execute(cls, images: Any, prompt: str, reward: str, keep: int = 1) -> Any:
        """Rank the batch. Raises InputError, which ComfyUI shows at the node."""
        scores = score_batch(images, prompt, reward)
        best, numbers = pick(images, scores, keep)
        return io.NodeOutput(best, [scores.totals[number].item() for number in numbers], numbers, scores.table())


class LoadAdapter(io.ComfyNode):  # type: ignore[misc]
    """Apply a LoRA to a model: in diffusers' layout, as `steer finetune` writes it, or in kohya's."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the inputs and outputs of the node."""
        files = folder_paths.get_filename_list("loras")
        return io.Schema(
            node_id="SteerLoadAdapter",
            display_name="Load a LoRA of diffusers (steer)",
            category=CATEGORY,
            description="Apply a LoRA that steer or diffusers wrote, converted to the names that ComfyUI reads.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("adapter", options=files, tooltip="In models/loras: a copy of RUN/final."),
                io.Float.Input("strength", default=1.0, min=-100.0, max=100.0, step=0.01),
            ],
            outputs=[io.Model.Output("adapted")],
        )

    @classmethod
    def execute(cls, model: Any, adapter: str, strength: float = 1.0) -> Any:
        """Apply the adapter. Raises InputError if the model has no place for one of the adapter's layers."""
        tensors = read_as_kohya(folder_paths.get_full_path_or_raise("loras", adapter))
        places = comfy.lora.model_lora_keys_unet(model.model, {})
        layers = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
        if missing := [layer for layer in layers if layer not in places]:
            raise InputError(
                f"{adapter}: {len(missing)} of its {len(layers)} layers have no place in this model, such as "
                f"{missing[0]}: load the model that it was trained on"
            )
        adapted, _ = comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0)
        return io.NodeOutput(adapted)


class SteerExtension(ComfyExtension):  # type: ignore[misc]
    """The extension that lists the nodes."""

    async def get_node_list(self) -> list[type[Any]]:
        """Return all nodes."""
        return [ScoreImages, RankImages, LoadAdapter]
