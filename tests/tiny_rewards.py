"""Tiny checkpoints and folders of real reward models, with random weights, in the layouts that are published."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from test_imagereward import WORDS, published
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from steer.apps.scenes.preferences import new_clip_folder
from steer.apps.scenes.training import LENGTH
from steer.rewards.clip import CONFIG, open_clip_folder
from steer.rewards.images import CLIP_MEAN, CLIP_STD
from steer.rewards.learned import PairHead, RewardCard, save_learned

State = dict[str, Tensor]
SIDE, PATCH, HEAD, SPACE = 32, 8, 16, 16  # pixels, pixels, width of an attention head, width of the common space
IMAGE_WIDTH, TEXT_WIDTH = 48, 32
WEIGHTS = "open_clip_model.safetensors"
LINEAR, RELU = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11)  # where the two published heads have their layers


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The same random numbers every time; those outside are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """Weights that make a difference: fresh norms and biases are ones and zeros, fresh attention looks everywhere."""
    for parameter in model.parameters():
        parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@seeded()
def tiny_open_clip(folder: Path, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Path:
    """A folder of open_clip: configuration, tokenizer, weights."""
    new_clip_folder(folder)
    config = json.loads((folder / CONFIG).read_text())
    vision = {"image_size": SIDE, "patch_size": PATCH, "width": IMAGE_WIDTH, "layers": 2, "head_width": HEAD}
    text = config["model_cfg"]["text_cfg"] | {"width": TEXT_WIDTH, "heads": TEXT_WIDTH // HEAD, "layers": 2}
    config["model_cfg"] = {"embed_dim": SPACE, "vision_cfg": vision, "text_cfg": text}
    config["preprocess_cfg"] |= {"mean": list(mean), "std": list(std)}
    (folder / CONFIG).write_text(json.dumps(config))
    model = open_clip_folder(folder, weights=False).model
    save_file(shaken(model).state_dict(), folder / WEIGHTS)
    return folder


@seeded()
def tiny_transformers(folder: Path, activation: str = "quick_gelu", old: bool = False) -> Path:
    """A folder as CLIPModel.save_pretrained writes it, with its tokenizer.

    old  as the published ones are: 2 for the end token, whichever it is, and tables that count from 0
    """
    new_clip_folder(folder)
    (folder / CONFIG).unlink()
    known = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    both = {"num_hidden_layers": 2, "hidden_act": activation}
    text = {"hidden_size": TEXT_WIDTH, "num_attention_heads": TEXT_WIDTH // HEAD, "intermediate_size": 80}
    text |= {"vocab_size": known, "max_position_embeddings": LENGTH, "eos_token_id": 2 if old else known - 1}
    text |= {"bos_token_id": known - 2, "pad_token_id": known - 1}
    vision = {"hidden_size": IMAGE_WIDTH, "num_attention_heads": IMAGE_WIDTH // HEAD, "intermediate_size": 96}
    vision |= {"image_size": SIDE, "patch_size": PATCH}
    config = CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=SPACE)
    model = shaken(CLIPModel(config))
    model.save_pretrained(folder)
    if old:
        positions = {"text": LENGTH, "vision": (SIDE // PATCH) ** 2 + 1}
        tables = {f"{k}_model.embeddings.position_ids": torch.arange(count)[None] for k, count in positions.items()}
        save_file(model.state_dict() | tables, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@seeded(1)
def tiny_hps(path: Path, folder: Path) -> Path:
    """A checkpoint as HPSv2's are published, of the architecture in an open_clip folder."""
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save({"epoch": 1, "state_dict": shaken(model).state_dict()}, path)
    return path


@seeded()
def aesthetic_head(places: Sequence[int] = LINEAR, width: int = SPACE) -> State:
    """A head of version 2, in one of its two layouts."""
    widths = (width, 24, 20, 12, 8, 1)
    state = {}
    for place, (before, after) in zip(places, pairwise(widths), strict=True):
        state[f"layers.{place}.weight"] = torch.randn(after, before) * (2 / before) ** 0.5
        state[f"layers.{place}.bias"] = 0.2 * torch.randn(after)
    return state


def tiny_imagereward(folder: Path) -> str:
    """The specification of an ImageReward."""
    folder.mkdir()
    torch.save(published(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return f"imagereward:path={folder / 'ImageReward.pt'},tokenizer={folder}"


@seeded()
def tiny_learned(folder: Path, clip: Path) -> Path:
    """A learned reward of one member with its own backbone."""
    card = RewardCard("pair", ".", SPACE, (0.1,), (0.5,), {})
    save_learned(folder, card, [shaken(PairHead(SPACE))], [open_clip_folder(clip)], clip)
    return folder


def tiny_specifications(folder: Path) -> dict[str, str]:
    """A specification that needs no network for every built-in reward that needs more than its name."""
    from tiny_vlm import tiny_hpsv3, tiny_llava, tiny_mps, tiny_owl  # which uses this module

    clip = tiny_open_clip(folder / "open_clip")
    for name, make in (("hpsv3", tiny_hpsv3), ("mps", tiny_mps)):
        (folder / name).mkdir()
        make(folder / name)
    torch.save(aesthetic_head(), folder / "head.pth")
    examples = folder / "examples"
    examples.mkdir()
    for k in range(8):
        Image.new("RGB", (SIDE, SIDE), (30 * k, 90, 200 - 20 * k)).save(examples / f"{k}.png")
    (folder / "red.py").write_text("def reward(images, prompts):\n    return luma(images).mean((1, 2))\n")
    hps = f"path={tiny_hps(folder / 'HPS.pt', clip)},model={clip}"
    return {
        "clip": f"clip:{clip}",
        "pickscore": f"pickscore:path={tiny_transformers(folder / 'transformers')}",
        "hpsv2": f"hpsv2:{hps}",
        "hpsv2.1": f"hpsv2.1:{hps}",
        "social": f"social:{hps}",  # read_checkpoint opens either layout
        "hpsv3": f"hpsv3:path={folder / 'hpsv3' / 'old.safetensors'},base={folder / 'hpsv3'}",
        "mps": f"mps:path={folder / 'mps' / 'MPS.pth'},base={folder / 'mps'}",
        "like": f"like:{examples},against={examples},model={clip}",
        "vqa": f"vqa:{tiny_llava(folder / 'llava')}",
        "imagereward": tiny_imagereward(folder / "imagereward"),
        "aesthetic": f"aesthetic:path={folder / 'head.pth'},backbone={clip}",
        "preference": f"preference:{tiny_learned(folder / 'preference', clip)}",
        "geneval": f"geneval:{tiny_owl(folder / 'owl')},clip={clip}",
        "sandbox": f"sandbox:{folder / 'red.py'}",
        "classifier": "classifier:goldfish",
        "colour": "colour:red",
    }


def copied(folder: Path, to: Path) -> Path:
    """A copy of a folder, to be corrupted."""
    return Path(shutil.copytree(folder, to))
