"""Files of a data set of the hub, by its split."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from steer.errors import InputError

CONVERTED = "refs/convert/parquet"  # where the hub keeps CONFIG/SPLIT/0000.parquet of nearly every data set
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"}
SHARD = r"(.+)-\d+-of-(\d+)(-[0-9a-f]+)?"  # of the names that data sets are uploaded under
NO_DATA = {"readme", "license", "requirements"}  # text files that are about a data set
SHOWN = 8  # names in a message
SAID = 160  # characters of another library's message


def data_files(data_set: str, split: str, formats: Sequence[str]) -> list[Path]:
    """The files of a split in the first format that there is, downloaded where they are not in the hub's cache.

    They are the data set's own or, where it has none like that, the parquet files that the hub made of it.

    split    a name, or FOLDER/NAME where several folders (configurations) have such a split
    formats  suffixes, best first
    Raises InputError. With HF_HUB_OFFLINE=1 the cache is all there is.
    """
    import huggingface_hub

    seen: list[str] = []
    for revision in (None, CONVERTED):
        listed = _listed(data_set, revision)
        seen += listed
        if names := _one_folder(data_set, split, _of_split(listed, split, formats)):
            _check_whole(data_set, names)
            with _hub_errors(data_set):
                return [
                    Path(huggingface_hub.hf_hub_download(data_set, name, repo_type="dataset", revision=revision))
                    for name in names
                ]
    told = f"only {some(seen)}" if seen else "it is empty, or (HF_HUB_OFFLINE=1) not in the hub's cache"
    raise InputError(f"data set {data_set!r}: no {', '.join(formats)} files of split {split!r}: {told}")


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def in_a_line(error: Exception) -> str:
    """What an error of another library says, on one line of bounded length."""
    return " ".join(str(error).split())[:SAID] or type(error).__name__


def _listed(data_set: str, revision: str | None) -> list[str]:
    """Its files at a revision; none where there is no such revision or, offline, nothing of it in the cache."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    with _hub_errors(data_set):
        try:
            if not constants.HF_HUB_OFFLINE:
                # list_repo_files would try again for half a minute where there is no network.
                files = huggingface_hub.HfApi().dataset_info(data_set, revision=revision).siblings
                return [file.rfilename for file in files or ()]
            folder = huggingface_hub.snapshot_download(
                data_set, repo_type="dataset", revision=revision, local_files_only=True
            )
        except (errors.RevisionNotFoundError, errors.LocalEntryNotFoundError):
            return []
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def _of_split(names: Iterable[str], split: str, formats: Sequence[str]) -> list[str]:
    """Where no name speaks of a split, all are of train."""
    paths = ((name, Path(name.lower())) for name in names)
    known = [name for name, path in paths if path.suffix in formats and path.stem not in NO_DATA]
    wanted = set(split.lower().split("/"))
    if not any(_words(name) & SPLITS for name in known):
        wanted -= {"train"}
    fitting = sorted(name for name in known if wanted <= _words(name))
    by_format = ([name for name in fitting if name.lower().endswith(suffix)] for suffix in formats)
    return next(filter(None, by_format), [])


def _words(name: str) -> set[str]:
    """What a file's name says: its folders, and train of train-00000-of-00003.parquet or my_train2.jsonl."""
    *folders, stem = Path(name.lower()).with_suffix("").parts
    shard = re.fullmatch(SHARD, stem)
    return {*folders, shard[1]} if shard else {*folders, stem, *re.split("[^a-z]+", stem)}


def _one_folder(data_set: str, split: str, names: list[str]) -> list[str]:
    """The names in one folder: the only one, else the topmost or the default configuration's. Raises InputError."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    plain = [folder for folder in folders if not folder or "default" in folder.split("/")] or folders
    if len(plain) > 1:
        options = [folder if split in folder.split("/") else f"{folder}/{split}" for folder in folders if folder]
        raise InputError(f"data set {data_set!r} has {some(options)}: name one, like {data_set}:{options[0]}")
    return [name for name in names if name.rpartition("/")[0] in plain]


def _check_whole(data_set: str, names: Sequence[str]) -> None:
    """Raises InputError where the cache, all there is offline, holds some shards and not the others."""
    from huggingface_hub import constants

    shard = re.fullmatch(SHARD, Path(names[0]).stem)
    if constants.HF_HUB_OFFLINE and shard and len(names) < int(shard[2]):
        raise InputError(
            f"data set {data_set!r}: {len(names)} of {int(shard[2])} files are in the hub's cache: "
            "unset HF_HUB_OFFLINE (no --offline) once to download the others"
        )


@contextmanager
def _hub_errors(data_set: str) -> Iterator[None]:
    """Turns what the hub's library raises into one line."""
    from huggingface_hub import errors

    # OSError and the error of whichever HTTP library this version of the hub's is built on.
    network = cast(tuple[type[Exception], ...], (*errors.HfHubHTTPError.__bases__, ValueError, RuntimeError))
    try:
        yield
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/datasets/{data_set}"
        raise InputError(f"data set {data_set!r} is gated: accept its terms at {page}, then: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"prompts {data_set!r}: no such file, no such data set on the hub (if it is private: hf auth login)"
        ) from error
    except network as error:
        raise InputError(
            f"prompts {data_set!r}: no such file, and as a data set of the hub it cannot be read: {in_a_line(error)}; "
            "without a network set HF_HUB_OFFLINE=1 once it is in the cache, or name a file"
        ) from error
