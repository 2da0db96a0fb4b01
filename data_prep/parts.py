"""One planned shard, as a job that any process of any machine can do, and the record that it leaves."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_prep.images import PictureError, PictureOptions, prepare_picture
from data_prep.manifest import Manifest, Note, ShardRecord, record_of
from data_prep.restart_markers import with_restart_markers
from data_prep.sources import Sample, Source
from data_prep.storage import Folder
from data_prep.tar_shards import is_intact, write_tar

# Changes when the same pictures and options no longer give the same shards; older finished shards are then done again.
LAYOUT_VERSION = 3


@dataclass(frozen=True)
class ShardJob:
    """All that a process needs to write one shard."""

    source: Source
    folder: Folder
    split: str
    name: str
    samples: tuple[Sample, ...]
    picture: PictureOptions
    on_error: str  # "fail" or "skip"
    restart_markers: bool = False

    def digest(self) -> str:
        """Of all that the shard's bytes depend on; a picture's bytes stand in it by its file's size and time."""
        # Nothing is said of an option that is off: shards from before there was one are good still.
        form = " restart markers" if self.restart_markers else ""
        digest = hashlib.sha256(f"{LAYOUT_VERSION} {self.picture}{form}\n".encode())
        for sample in self.samples:
            line = f"{sample.key}\0{sample.path}\0{sample.label}\0{self.source.stamp(sample)}\n"
            digest.update(line.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """A finished shard's record, kept in a file of its own so that an interrupted run goes on after it."""

    digest: str
    shard: ShardRecord
    labels: dict[str, int]  # label -> pictures; JSON wants text for keys
    repaired: tuple[Note, ...] = field(default=())
    skipped: tuple[Note, ...] = field(default=())
    restart_markers: dict[str, int] = field(default_factory=dict)  # pictures by outcome, as restart_markers.py names it


def parts_folder(split: str) -> str:
    return f".{split}.parts"


def part_name(split: str, shard: str) -> str:
    return f"{parts_folder(split)}/{shard}.json"


def read_part(folder: Folder, split: str, shard: str) -> Part | None:
    """The shard's record; None where there is none, or a damaged one."""
    try:
        body = json.loads(folder.read(part_name(split, shard)).decode())
        notes = {name: tuple(record_of(Note, note) for note in body[name]) for name in ("repaired", "skipped")}
        part = record_of(Part, body | notes | {"shard": record_of(ShardRecord, body["shard"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        return None  # the shard is simply written again
    return part if part.shard.name == shard else None


def restart_marker_outcomes(folder: Folder, manifest: Manifest) -> dict[str, int]:
    """How many pictures were rewritten or kept, by outcome; empty where `shard` was not asked to."""
    outcomes: Counter[str] = Counter()
    for shard in manifest.shards if manifest.options.get("restart_markers") else ():
        part = read_part(folder, manifest.split, shard.name)
        assert part is not None, "finalize_split has just read it"
        outcomes.update(part.restart_markers)
    return dict(outcomes.most_common())


def finished_part(job: ShardJob) -> Part | None:
    """The record of the job's shard where it is done already, of these very pictures, and its bytes are intact."""
    part = read_part(job.folder, job.split, job.name)
    if part is None or (part.skipped and job.on_error == "fail"):
        return None
    return part if part.digest == job.digest() and is_intact(job.folder, part.shard) else None


def write_part(job: ShardJob) -> Part:
    """Writes the job's shard, index and record. Errors: ValueError or OSError naming the picture or file."""
    digest = job.digest()  # before reading, so that a picture changed meanwhile does not pass as the old one
    notes = _Notes()
    try:
        record = write_tar(job.folder, job.name, _pictures(job, notes))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        needed = _bytes_needed(job)
        raise OSError(errno.ENOSPC, f"{error.strerror}; this shard needs {needed:,} bytes", error.filename) from error
    part = Part(
        digest,
        record,
        dict(notes.labels),
        tuple(notes.repaired),
        tuple(notes.skipped),
        dict(sorted(notes.outcomes.items())),
    )
    with job.folder.file(part_name(job.split, job.name)) as file:
        file.write(json.dumps(dataclasses.asdict(part), ensure_ascii=False).encode())
    return part


@dataclass
class _Notes:
    repaired: list[Note] = field(default_factory=list)
    skipped: list[Note] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)


def _pictures(job: ShardJob, notes: _Notes) -> Iterator[tuple[Sample, bytes]]:
    for sample, data in zip(job.samples, job.source.read(job.samples), strict=True):
        try:
            prepared = prepare_picture(data, job.picture)
        except PictureError as error:
            if job.on_error == "fail":
                raise ValueError(
                    f"{job.source.where(sample.path)}: {error}; mend or remove it, or leave out all such pictures "
                    "with --on-error skip"
                ) from error
            notes.skipped.append(Note(sample.key, sample.path, str(error)))
            continue
        if prepared.reason is not None:
            notes.repaired.append(Note(sample.key, sample.path, prepared.reason))
        notes.labels[str(sample.label)] += 1
        if not job.restart_markers:
            yield sample, prepared.data
            continue
        rewritten = with_restart_markers(prepared.data)
        notes.outcomes[rewritten.outcome] += 1
        yield sample, rewritten.data


def _bytes_needed(job: ShardJob) -> int:
    """Size of the job's tar, found by making it without writing it."""
    blocks = 2
    for _, data in _pictures(job, _Notes()):
        blocks += 3 + -(-len(data) // tarfile.BLOCKSIZE)  # two headers, the label, the picture
    return -(-blocks * tarfile.BLOCKSIZE // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
