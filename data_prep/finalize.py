"""Joins the records of finished shards into the manifest; refuses gaps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.manifest import MANIFEST_SUFFIX, BetonRecord, Manifest, ShardRecord, parse_manifest, record_of
from data_prep.parts import Part, parts_folder, read_part
from data_prep.plan import shard_name
from data_prep.storage import Folder, LocalFolder, open_folder
from data_prep.tar_shards import INFO_NAME, update_info

PLAN_NAME = "plan.json"
RETIRED_NAME = "manifest-before.json"
MAX_GAPS_NAMED = 5


@dataclass(frozen=True)
class FinalizeOptions:
    """Join what the tasks of a distributed `shard` wrote: the manifest appears once every shard is there."""

    out: str
    """The folder or URL that the tasks wrote into."""
    split: str = "train"
    """Name of the split."""


@dataclass(frozen=True)
class Plan:
    """What a split will be, whoever writes it; every task finds the same."""

    split: str
    shards: int
    source: dict[str, Any]
    options: dict[str, Any]
    classes: tuple[str, ...]
    class_names: tuple[str, ...]

    def refuse_other(self, source: dict[str, Any], options: dict[str, Any], where: str) -> None:
        """Errors: ValueError where these are not the plan's own source and options."""
        for what, old, new in (("another source", source, self.source), ("other options", options, self.options)):
            if old != new:
                differing = (key for key in old | new if old.get(key) != new.get(key))
                changed = ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in differing)
                raise ValueError(
                    f"{where} describes this split with {what} ({changed}): name another --out, or remove that file"
                )


def read_plan(folder: Folder, split: str) -> Plan | None:
    """None where no plan was written, or a damaged one (then it is written again)."""
    try:
        body = json.loads(folder.read(f"{parts_folder(split)}/{PLAN_NAME}").decode())
        return record_of(Plan, body | {name: tuple(body[name]) for name in ("classes", "class_names")})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        return None


def finalize(options: FinalizeOptions) -> Manifest:
    """As finalize_split, of what the options name."""
    return finalize_split(open_folder(options.out), options.split)


def finalize_split(folder: Folder, split: str) -> Manifest:
    """Writes the split's manifest, and timm's `_info.json`, from the records of its shards.

    Errors: ValueError naming the shards that are missing or not whole; or where skipping left a class without pictures.
    """
    plan = read_plan(folder, split)
    if plan is None:
        raise ValueError(f"{folder.where(parts_folder(split))} holds no plan of {split!r}: run `shard` first")
    names = [shard_name(split, number) for number in range(plan.shards)]
    parts = [read_part(folder, split, name) for name in names]
    gaps = [name for name, part in zip(names, parts, strict=True) if part is None or not _is_whole(folder, part.shard)]
    if gaps:
        named = ", ".join(gaps[:MAX_GAPS_NAMED]) + (", ..." if len(gaps) > MAX_GAPS_NAMED else "")
        raise ValueError(
            f"{folder.where()}: {len(gaps)} of {plan.shards} shards of {split!r} are missing or not whole ({named}): "
            "run the tasks again that were to write them; what is done is kept"
        )
    manifest = _join(plan, [part for part in parts if part is not None], folder)
    manifest = dataclasses.replace(manifest, beton=_beton_before(folder, manifest))
    write_manifest_to(folder, manifest)
    update_info(folder, split, manifest)
    folder.remove(f"{parts_folder(split)}/{RETIRED_NAME}")
    for pattern in (f"{split}-[0-9]*", f"{split}{MANIFEST_SUFFIX}", INFO_NAME, f"{parts_folder(split)}/*"):
        folder.remove_orphans(pattern)
    return manifest


def _is_whole(folder: Folder, record: ShardRecord) -> bool:
    """Whether tar and index are there with their sizes, and the index with its bytes; `verify` reads the tars too."""
    if folder.size(record.name) != record.bytes or folder.size(record.index_name) is None:
        return False
    return hashlib.sha256(folder.read(record.index_name)).hexdigest() == record.index_sha256


def _join(plan: Plan, parts: list[Part], folder: Folder) -> Manifest:
    counts = [sum(part.labels.get(str(label), 0) for part in parts) for label in range(len(plan.classes))]
    if not all(counts):
        name = plan.classes[counts.index(0)]
        raise ValueError(f"class {name!r} has no picture that can be read: mend its pictures or remove the folder")
    return Manifest(
        split=plan.split,
        classes=plan.classes,
        class_counts=tuple(counts),
        shards=tuple(part.shard for part in parts),
        source=plan.source,
        options=plan.options,
        repaired=tuple(note for part in parts for note in part.repaired),
        skipped=tuple(note for part in parts for note in part.skipped),
        class_names=plan.class_names,
        folder=folder.path if isinstance(folder, LocalFolder) else Path(),
    )


def write_manifest_to(folder: Folder, manifest: Manifest) -> None:
    with folder.file(f"{manifest.split}{MANIFEST_SUFFIX}") as file:
        file.write(manifest.to_json().encode())


def retire_manifest(folder: Folder, split: str) -> None:
    """Takes the manifest away while shards are replaced; what it says of a .beton is kept for the next."""
    name = f"{split}{MANIFEST_SUFFIX}"
    if folder.size(name) is not None:
        with folder.file(f"{parts_folder(split)}/{RETIRED_NAME}") as file:
            file.write(folder.read(name))
        folder.remove(name)
    update_info(folder, split, None)


def _beton_before(folder: Folder, manifest: Manifest) -> BetonRecord | None:
    """The .beton of an earlier manifest, where it holds the same samples."""
    for name in (f"{manifest.split}{MANIFEST_SUFFIX}", f"{parts_folder(manifest.split)}/{RETIRED_NAME}"):
        if folder.size(name) is not None:
            before = parse_manifest(folder.read(name), folder.where(name), Path())
            # Written from the source alone it has no shards to compare; source, options and counts tell as much.
            same = (before.source, before.options, before.class_counts) == (
                manifest.source,
                manifest.options,
                manifest.class_counts,
            )
            if same and before.shards in ((), manifest.shards):
                return before.beton
    return None
