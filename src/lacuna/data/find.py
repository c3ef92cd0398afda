"""The files that a data set's name stands for. Nothing here imports torch."""

import glob
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from lacuna.data.formats import ENDINGS, SHOWN_PROBLEMS, ending_of, file_kind
from lacuna.errors import DataError
from lacuna.words import did_you_mean

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What files of a split are called. # ref: https://huggingface.co/docs/hub/datasets-file-names-and-splits"""


def find_files(dataset: str, kind: str = "auto", split: str = "train") -> list[Path] | None:
    """The files that a data set's name stands for, sorted; None where it is the name of a hub data set.

    kind: "auto" goes by the endings. split: of a folder whose files are named by split, such as train.jsonl.
    Raises DataError: nothing there, an unknown ending, no such split, or a folder with several kinds of files.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        file_kind(path, kind)
        return [path]
    if path.is_dir() and (saved := _saved_to_disk(path, split)) is not None:
        return saved
    if path.is_dir():
        files = _data_files(path, kind)
        if not files:
            endings = [ending for ending, its_kind in ENDINGS.items() if kind in ("auto", its_kind)]
            raise DataError(f"{dataset}: the folder holds no {', '.join(endings)} files")
        files = _of_split(files, path, split)
    elif any(character in dataset for character in "*?["):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise DataError(f"{dataset}: no file matches")
    elif (
        ending_of(path) in ENDINGS
        or dataset.startswith(("/", ".", "~"))
        or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", dataset)
    ):
        nearby = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = did_you_mean(str(path), nearby)
        if not path.suffix:
            hint += (
                f"; to download data into it: hf download OWNER/{path.name} --repo-type dataset --local-dir {dataset}"
            )
        raise DataError(f"{dataset}: no such file or folder{hint}")
    else:
        return None
    kinds = sorted({file_kind(file, kind) for file in files})
    if len(kinds) > 1:
        raise DataError(
            f"{dataset}: several kinds of files ({', '.join(kinds)}); choose one with a glob such as {path}/*.jsonl"
        )
    return files


def left_out(dataset: str, kind: str, split: str) -> list[Path]:
    """Data files of a folder that are not read: of another split, or beside those that are named for this one."""
    path = Path(dataset).expanduser()
    if not path.is_dir() or _saved_to_disk(path, split) is not None:
        return []
    read = set(find_files(dataset, kind, split) or ())
    return [file for file in _data_files(path, "auto") if file not in read]


def say_left_out(dataset: str, kind: str, split: str, report: Callable[[str], None]) -> None:
    unread = left_out(dataset, kind, split)
    if not unread:
        return
    shown = ", ".join(file.name for file in unread[:SHOWN_PROBLEMS])
    more = f" and {len(unread) - SHOWN_PROBLEMS} more" if len(unread) > SHOWN_PROBLEMS else ""
    report(f"{dataset}: of another split, or beside it, and not read: {shown}{more}")


def _data_files(folder: Path, kind: str) -> list[Path]:
    endings = [ending for ending, its_kind in ENDINGS.items() if kind in ("auto", its_kind)]
    found = (file for file in folder.rglob("*") if file.is_file() and ending_of(file) in endings)
    return sorted(file for file in found if _is_data(file, folder))


def _saved_to_disk(folder: Path, split: str) -> list[Path] | None:
    """The files of a folder that `save_to_disk` of Hugging Face's datasets wrote; None for any other folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        if split not in splits:
            raise DataError(
                f"{folder}: no split {split!r}; there are: {', '.join(splits)}{did_you_mean(split, splits)}"
            )
        folder = folder / split
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    state = json.loads((folder / "state.json").read_bytes())
    return [folder / Path(entry["filename"]).name for entry in state["_data_files"]]


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Those whose names say that they belong to the split; all where names say nothing of splits.

    They do where every file's name has a split's word in it, or where one's name has nothing else: `dev_docs` among
    other docs, or `strength_training` among other topics, is no split.
    """
    wanted = SPLIT_WORDS.get(split, (split,))
    known = {*map(str.lower, wanted), *(word for words in SPLIT_WORDS.values() for word in words)}
    parts = {file: _words(file.relative_to(folder)) for file in files}
    named = [file for file in files if not known.isdisjoint(parts[file])]
    if len(named) < len(files):
        named = [file for file in named if _is_nothing_else(file.relative_to(folder), known)]
    chosen = [file for file in named if any(word.lower() in parts[file] for word in wanted)]
    if not chosen and (named or split not in SPLIT_WORDS):
        shown = ", ".join(str(file.relative_to(folder)) for file in files[:SHOWN_PROBLEMS])
        raise DataError(f"{folder}: no file is named for the split {split!r}; there are: {shown}")
    return chosen or files


def _words(path: Path) -> list[str]:
    return re.split(r"[^a-z0-9]+", path.as_posix().lower())


def _is_nothing_else(path: Path, words: Iterable[str]) -> bool:
    """Whether a folder of the path is called by one of the words, or the file by them and numbers alone."""
    if any(parent.lower() in words for parent in path.parts[:-1]):
        return True
    own = _words(Path(path.name.removesuffix(ending_of(path))))
    rest = [word for word in own if not word.isdecimal() and word not in ("of", "data")]
    return bool(rest) and all(word in words for word in rest)


def _is_data(file: Path, folder: Path) -> bool:
    """Neither hidden nor the card of a data set that was downloaded."""
    return file.name != "README.md" and not any(part.startswith(".") for part in file.relative_to(folder).parts)
