"""The table of built-in rewards: name → (module:attribute, one line about it)."""

REWARDS: dict[str, tuple[str, str]] = {
    "scene": ("steer.rewards.scene:SceneReward", "share of the prompt's requirements that a scene meets, exact, 0..1"),
    "scene-soft": (
        "steer.rewards.scene:SceneSoftReward",
        "the same requirements by template matching: graded, differentiable",
    ),
    "clip": ("steer.rewards.clip:clip", "clip:MODEL, cosine of image and prompt by any CLIP; clip:scenes is embedded"),
    "pickscore": ("steer.rewards.clip:pickscore", "PickScore v1: human choice, logit-scaled, about 15..25"),
    "hpsv2": ("steer.rewards.clip:hpsv2", "Human Preference Score v2, cosine, about 0.2..0.35"),
    "hpsv2.1": ("steer.rewards.clip:hpsv21", "Human Preference Score v2.1, cosine, about 0.2..0.35"),
    "social": (
        "steer.rewards.clip:social",
        "social:path=FILE, Social Reward by CLIP ViT-L/14, cosine; no weights are public, 1.7 GB, differentiable",
    ),
    "hpsv3": (
        "steer.rewards.hpsv3:HPSv3",
        "Human Preference Score v3 by Qwen2-VL-7B: the mean μ of [μ, σ]; hub, 16 GB, MIT",
    ),
    "mps": (
        "steer.rewards.mps:MPS",
        "mps:path=FILE, Multi-dimensional Preference Score by CLIP-H, logit-scaled; a converted checkpoint, 4 GB",
    ),
    "imagereward": ("steer.rewards.imagereward:ImageReward", "ImageReward v1.0: human preference, standardised"),
    "aesthetic": (
        "steer.rewards.aesthetic:aesthetic",
        "LAION's aesthetic v2, about 1..10; aesthetic:v1 and others, aesthetic:scenes is embedded",
    ),
    "preference": (
        "steer.rewards.folders:preference",
        "preference:scenes or :FOLDER, learned by `steer rewards train`, standardised; of users: user=NAME, like=FILE",
    ),
    "classifier": (
        "steer.rewards.text:classifier",
        "classifier:LABEL, log-probability of an ImageNet class, nats; of texts classifier:MODEL,label=LABEL",
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
        "like:FOLDER,against=FOLDER, likeness to a few example images by a CLIP, log-likelihood ratio, differentiable",
    ),
    "ocr": ("steer.rewards.ocr:Ocr", "agreement of the text in the image with the prompt's quoted words, 0..1"),
    "jpeg": (
        "steer.rewards.jpeg:JpegCompressibility",
        "minus the size as a JPEG of quality 95, in kB: prefers plain images",
    ),
    "jpeg-incompressible": (
        "steer.rewards.jpeg:JpegIncompressibility",
        "the size as a JPEG in kB: prefers busy images",
    ),
    "colour": (
        "steer.rewards.colour:ColourMatch",
        "colour:NAME or colour:#RRGGBB, mean closeness, 0..1, differentiable",
    ),
    "brightness": (
        "steer.rewards.colour:Brightness",
        "mean luma 0..1, or closeness to brightness:TARGET, differentiable",
    ),
}
