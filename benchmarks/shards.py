"""What data_prep reaches beside the peers and the disk: passing pictures through, reducing them, indexing, planning."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shard_peers
from benchmarks.harness import Contestant, Row, check_output, circumstances_of, compare, finish, status_line, summarise
from benchmarks.plan_memory import planned_imagenet
from benchmarks.samples import Pictures, repeated_samples
from data_prep.beton import BetonOptions, write_beton
from data_prep.distribute import ShardOptions, shard
from data_prep.foreign import IndexOptions, index
from data_prep.images import PictureOptions
from data_prep.sources.image_folder import ImageFolder
from data_prep.workers import map_ordered

LONGEST_SIDE, QUALITY = 256, 90
IMAGENET = 1_281_167
# Levels of 0 to 255, the mean over a picture: FFCV encodes anew what is small enough, which changes photographs by 2
# to 3, and pure noise by 8; two different pictures are tens apart.
MAX_PICTURE_DIFFERENCE = 12.0
HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class ShardsOptions:
    """Shard writing, reduction, indexing and planning beside plain writes, webdataset, FFCV and tarfile."""

    source: Path | None = None
    """An ImageFolder. None: imagenet-sample.tar of the folder that NOISYNN_SAMPLES names, repeated."""
    work: Path | None = None
    """Folder on the disk to be measured, for temporary files; the system's temporary folder if None."""
    images: int = 10_000
    """Pictures of a round of passing through (the archive's repeated)."""
    images_reduced: int = 8000
    """Pictures of a round of reducing."""
    members: int = 100_000
    """Members of the tar whose headers are read."""
    processes: int = 2
    """Processes of each writer that can use more than one."""
    rounds: int = 5
    """Timed rounds of each contestant."""
    note: str = ""
    """Kept in each row, such as `2 CPU cores, shared`."""
    output: Path | None = None
    """JSON lines to add to; benchmarks/results/shards.jsonl if None."""

    def __post_init__(self) -> None:
        for name in ("images", "images_reduced", "members", "processes", "rounds"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")


def measure_shards(options: ShardsOptions, command: Sequence[str]) -> list[Row]:
    """Measures, writes and prints. Errors: ValueError, OSError naming the file or option and the mend."""
    path = check_output(options.output, "shards")
    circumstances = circumstances_of(command, options.note)
    rows: list[Row] = []
    with _pictures(options, options.images) as pictures, _scratch(options) as scratch, status_line() as on_turn:

        def measure(part: str, unit: str, contestants: list[Contestant], agree: Any = None) -> None:
            timings = compare(contestants, options.rounds, agree, on_turn)
            rows.extend(summarise("shards", part, unit, contestants, timings))

        measure("passing through", "images", _passing(pictures, scratch, options), same_members)
        measure("index, headers only", "members", _headers(scratch, options.members), same_count)
        measure("index --hash", "bytes", _hashing(pictures, scratch))
        measure("planning ImageNet", "samples", [_planning()])
        text = pictures.text
    with _pictures(options, options.images_reduced) as pictures, _scratch(options) as scratch, status_line() as on_turn:
        measure(f"reducing to {LONGEST_SIDE}", "images", _reducing(pictures, scratch, options), same_pictures)
    conditions = {
        "pictures": text,
        "processes": options.processes,
        "page_cache": "sources warm",
        "reduced": f"longest side {LONGEST_SIDE}, JPEG quality {QUALITY}",
        "plan_and_manifest_peak_megabytes": planned_imagenet(IMAGENET),
    }
    finish(rows, circumstances | {"conditions": conditions}, path)
    print(f"plan and manifest of {IMAGENET:,} samples: {conditions['plan_and_manifest_peak_megabytes']} MB at most")
    return rows


@contextlib.contextmanager
def _pictures(options: ShardsOptions, images: int) -> Iterator[Pictures]:
    if options.source is not None:
        count = len(ImageFolder(options.source).scan())
        yield Pictures(options.source, count, f"the user's {options.source.name}: {count} pictures")
        return
    with repeated_samples(images, "--source YOUR_IMAGE_FOLDER", options.work) as pictures:
        yield pictures


@contextlib.contextmanager
def _scratch(options: ShardsOptions) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="noisynn-benchmark-", dir=options.work) as name:
        yield Path(name)


def _writer(name: str, out: Path, write: Callable[[Path], int], settings: str, output: Any = None) -> Contestant:
    """A contestant that writes into an empty folder of its own; what it wrote goes outside the clock."""

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)

    def written() -> Any:
        write(out)
        found = output(out)
        clear()
        return found

    clear()
    return Contestant(name, partial(write, out), settings, None if output is None else written, clear)


# ---- passing through ----


def _passing(pictures: Pictures, scratch: Path, options: ShardsOptions) -> list[Contestant]:
    listing = ImageFolder(pictures.folder).scan()
    paths = [pictures.folder / path for path in listing.paths]
    labels, keys = listing.labels.tolist(), listing.keys
    contents = [path.read_bytes() for path in paths[: shard_peers.SAMPLES_PER_SHARD]]

    def ours(processes: int, out: Path) -> int:
        shard(ShardOptions(str(pictures.folder), str(out), processes=processes))
        return len(paths)

    def peer(processes: int, out: Path) -> int:
        jobs = shard_peers.webdataset_jobs(out, paths, keys, labels, processes)
        return sum(map_ordered(shard_peers.write_webdataset, jobs, processes))

    many = options.processes
    contestants = [
        _writer(
            "plain write",
            scratch / "plain",
            partial(shard_peers.write_plainly, contents, len(paths)),
            "the pictures' bytes, from memory, into a file for each 1,000, then fsync",
        ),
        _writer("read and write", scratch / "copy", partial(shard_peers.copy_plainly, paths), "the same, read first"),
    ]
    for processes in dict.fromkeys((1, many)):
        settings = f"`shard` with {processes} process(es): checked, hashed, indexed, fsync"
        out = scratch / f"ours{processes}"
        contestants.append(_writer(f"shard, {processes}", out, partial(ours, processes), settings, members_of))
        settings = f"webdataset ShardWriter, maxcount 1000, in {processes} process(es); no hash, no index, no fsync"
        out = scratch / f"peer{processes}"
        contestants.append(_writer(f"ShardWriter, {processes}", out, partial(peer, processes), settings, members_of))
    return contestants


def members_of(out: Path) -> dict[str, tuple[str, int]]:
    """key -> (sha256 of the picture, label), of all tars in a folder."""
    found: dict[str, tuple[str, int]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            data = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in data:
            key, _, suffix = name.partition(".")
            if suffix == "jpg":
                found[key] = hashlib.sha256(data[name]).hexdigest(), int(data[f"{key}.cls"])
    return found


def same_members(one: dict[str, tuple[str, int]], other: dict[str, tuple[str, int]]) -> str | None:
    """Same keys and labels; same bytes but for what this project repairs (grey pictures)."""
    if {key: label for key, (_, label) in one.items()} != {key: label for key, (_, label) in other.items()}:
        return f"{len(one)} and {len(other)} samples, or other keys or labels"
    different = sum(one[key] != other[key] for key in one)
    return f"{different} of {len(one)} pictures differ" if different > 0.05 * len(one) else None


# ---- reducing ----


def _reducing(pictures: Pictures, scratch: Path, options: ShardsOptions) -> list[Contestant]:
    listing = ImageFolder(pictures.folder).scan()
    paths = [str(pictures.folder / path) for path in listing.paths]
    many = options.processes

    def tars(out: Path) -> int:
        picture = PictureOptions(max_side=LONGEST_SIDE, jpeg_quality=QUALITY)
        shard(ShardOptions(str(pictures.folder), str(out), picture=picture, keep_order=True, processes=many))
        return len(paths)

    def beton(out: Path) -> int:
        write_beton(
            BetonOptions(
                source=str(pictures.folder),
                out=str(out),
                keep_order=True,
                max_resolution=LONGEST_SIDE,
                jpeg_quality=QUALITY,
                processes=many,
            )
        )
        return len(paths)

    def ffcv(out: Path) -> int:
        return shard_peers.write_ffcv(out / "train.beton", paths, listing.labels.tolist(), LONGEST_SIDE, QUALITY, many)

    return [
        _writer(
            "FFCV's writer",
            scratch / "ffcv",
            ffcv,
            f"ffcv DatasetWriter, jpg, max_resolution {LONGEST_SIDE}, {many} workers, pictures opened with Pillow",
            shard_peers.beton_pictures,
        ),
        _writer(
            "beton --source",
            scratch / "beton",
            beton,
            f"{many} processes; written, read back and hashed, indexed",
            shard_peers.beton_pictures,
        ),
        _writer("shard --max-side", scratch / "tars", tars, f"{many} processes", shard_peers.tar_pictures),
    ]


def same_pictures(one: list[np.ndarray], other: list[np.ndarray]) -> str | None:
    """The same sizes and, but for resampling and encoding, the same pixels."""
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        if a.shape != b.shape:
            return f"picture {number} is {a.shape} and {b.shape}"
        if (difference := np.abs(a.astype(np.int16) - b).mean()) > MAX_PICTURE_DIFFERENCE:
            return f"picture {number} differs by {difference:.1f} levels on the mean"
    return None


# ---- indexing ----


def _headers(scratch: Path, members: int) -> list[Contestant]:
    tar = scratch / "headers" / "train-000000.tar"
    count = shard_peers.write_many_members(tar, members)

    def ours() -> int:
        index(IndexOptions((str(tar),), processes=1))
        return count

    peer = partial(shard_peers.walk_with_tarfile, tar)
    return [
        Contestant("tarfile", peer, "`for member in tarfile.open(path)`", peer),
        Contestant("index", ours, "`index`: headers and labels read, index and manifest written", ours),
    ]


def same_count(one: int, other: int) -> str | None:
    return None if one == other else f"{one} and {other} members"


def _hashing(pictures: Pictures, scratch: Path) -> list[Contestant]:
    out = scratch / "hashing"
    shard(ShardOptions(str(pictures.folder), str(out)))
    tars = tuple(sorted(out.glob("*.tar")))
    for path in [*out.glob("*.idx"), *out.glob("*.json")]:
        path.unlink()
    shutil.rmtree(out / ".train.parts")
    size = sum(tar.stat().st_size for tar in tars)

    def alone() -> int:
        for tar in tars:
            digest = hashlib.sha256()
            with open(tar, "rb", buffering=0) as file:
                while block := file.read(HASH_BLOCK):
                    digest.update(block)
        return size

    def ours() -> int:
        index(IndexOptions(tuple(map(str, tars)), hash=True, processes=1))
        return size

    return [
        Contestant("read and sha256", alone, "each tar read in blocks of 1 MB and hashed, one process"),
        Contestant("index --hash", ours, "sha256 of each tar, CRC-32 of each picture, index, manifest; one process"),
    ]


# ---- planning ----


def _planning() -> Contestant:
    from data_prep.plan import plan_shards

    def plan() -> int:
        plan_shards(IMAGENET, 1000, seed=0)
        return IMAGENET

    return Contestant("plan_shards", plan, "shuffled, 1,000 samples a shard")
