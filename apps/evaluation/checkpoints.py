"""The kept checkpoints of finetuning runs as contenders of an evaluation."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from steer.apps.evaluation.spec import BASE_METHOD, Contender
from steer.apps.models import find_weights, hash_tensor
from steer.errors import InputError
from steer.files import verify_checksums
from steer.pipelines.training.state import LOG_FILES
from steer.training.checkpoint import Checkpoint, Checkpoints

EXPORTS = ("best", "final")  # folders of exported weights in a run


def checkpoint_contenders(
    runs: Sequence[str], model: str | None = None, methods: Sequence[str] = (BASE_METHOD,)
) -> list[Contender]:
    """Return one contender per kept checkpoint of each run and per method, by step, as if given as finetuned weights.

    best/ and final/ follow where no checkpoint has their weights. Labels are such as "RUN step 040".

    runs   output folders of `steer finetune` or of a trainer
    model  model of all of them; by default the one that each run names
    All checksums are verified. Raises InputError for a folder without checkpoints, a corrupt one, and repeated runs.
    """
    names = [Path(run).resolve().name for run in runs]
    contenders = []
    for run, name in zip(runs, names, strict=True):
        if [Path(one).resolve() for one in runs].count(Path(run).resolve()) > 1:
            raise InputError(f"--checkpoints {run} is repeated: give each run once")
        saved = _open_checkpoints(Path(run), run)
        weights = _named_weights(Path(run), saved)
        own, title = model or _model_of(run, saved[-1]), name if names.count(name) == 1 else run
        for place, step in weights.items():
            for method in methods:
                label = " ".join([title, step, *([] if method == BASE_METHOD else [method])])
                contenders.append(Contender(own, place, method, label=label))
    return contenders


def _open_checkpoints(folder: Path, run: str) -> list[Checkpoint]:
    """Open and verify all checkpoints of a run, by step. Raises InputError."""
    places = Checkpoints(folder / "checkpoints").places()
    if not places:
        if any((folder / name).exists() for name in ("checkpoints", *EXPORTS, *LOG_FILES.values())):
            raise InputError(f"--checkpoints {run}: this run has no checkpoints; compare its final/ by --lora")
        above = next((one for one in folder.resolve().parents if (one / "checkpoints").is_dir()), None)
        hint = f"did you mean {above}?" if above else "give the output folder of `steer finetune`"
        raise InputError(f"--checkpoints {run}: no finetuning run here; {hint}")
    saved = []
    for step, place in places.items():
        try:
            saved.append(Checkpoint.open(place))
        except InputError as error:
            reason = str(error).rpartition("; ")[0] or str(error)
            raise InputError(f"--checkpoints {run}: {reason}; delete {place} to leave it out") from error
        if saved[-1].step != step:
            raise InputError(f"--checkpoints {run}: {place} holds step {saved[-1].step}; rename it or delete it")
    return saved


def _named_weights(folder: Path, saved: Sequence[Checkpoint]) -> dict[str, str]:
    """Return a title for each folder of weights; best/ and final/ only where their tensors are of no checkpoint."""
    digits = len(str(saved[-1].step))
    weights = {str(one.path): f"step {one.step:0{digits}}" for one in saved}
    known = [_hashes(str(one.path)) for one in saved]
    for name in EXPORTS:
        if (folder / name).is_dir():
            own = _hashes(str(folder / name))
            if not any(one <= own for one in known):  # an export of all weights also has buffers
                weights[str(folder / name)] = name
                known.append(own)
    return weights


def _hashes(path: str) -> frozenset[bytes]:
    """Hash the tensors of finetuned weights, without their names, which differ by format. Raises InputError."""
    files = [file for file in find_weights(path).files if file.suffix == ".safetensors"]
    try:
        verify_checksums(*files)
        return frozenset(hash_tensor(value) for file in files for value in load_file(file).values())
    except (OSError, SafetensorError) as error:
        raise InputError(f"--checkpoints: {path} cannot be read ({error}); restore it or delete it") from error


def _model_of(run: str, saved: Checkpoint) -> str:
    """Return the model that a run names in its configuration. Raises InputError where it names none."""
    model = saved.json("config").get("model")
    if not isinstance(model, str) or not model:
        raise InputError(f"--checkpoints {run}: its configuration names no model; give --model")
    return model
