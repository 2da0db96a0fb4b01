"""Where a run's checkpoints lie: in its folder, in another one that it leads to, or on a store."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint.config import CheckpointConfig
from pipeline.checkpoint.generations import checkpoints_folder, clean
from pipeline.checkpoint.store import clean_store, note_store, store_of
from pipeline.data.remote import is_url


def url_of(run: Path, config: CheckpointConfig) -> str | None:
    """The store's URL, as the option says, or the run's folder where the option is left out."""
    if config.folder is None:
        return store_of(run)
    return config.folder if is_url(config.folder) else None


def place_of(run: Path, config: CheckpointConfig) -> str | None:
    """Makes the place, and a lead to it in the run's folder. Returns the URL where it is a store.

    Errors: ValueError where RUN/checkpoints is something else already, or nothing can be written to the URL.
    """
    run.mkdir(parents=True, exist_ok=True)
    url = url_of(run, config)
    if url is not None:
        note_store(run, url)
        return url
    place, folder = checkpoints_folder(run), config.folder
    if folder is not None and not (place.exists() and Path(folder).exists() and place.samefile(folder)):
        if place.is_symlink() or place.exists():
            raise ValueError(f"checkpoint.folder is {folder}, but {place} is there: move it, or leave the option out")
        Path(folder).mkdir(parents=True, exist_ok=True)
        place.symlink_to(Path(folder).absolute(), target_is_directory=True)
    place.mkdir(exist_ok=True)
    return None


def clean_place(run: Path, url: str | None) -> None:
    """Removes what killed saves have left. By one process alone, while nobody saves."""
    if url is None:
        clean(run)
    else:
        clean_store(url)
