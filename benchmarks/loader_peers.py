"""The loaders that people use today, each as its documentation sets it up for throughput.

All crop and resize at random, antialiased where the library can, flip, and give uint8 batches: floats are the device's
work. A library may decode with Pillow or with torchvision's native decoder; where both are usual, both are here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.loader_contestants import SEED, Batches, Delivered, Entrant, Work, delivered, encodes_anew
from benchmarks.loader_formats import Sample, write_folder, write_litdata, write_mds
from data_prep.manifest import read_manifest

_INSTALLED = Path(__file__).resolve().parent.parent / ".peers"

_SHUFFLE_SHARDS, _SHUFFLE_SAMPLES = 100, 1000  # the webdataset library's README
_WEBDATASET = (
    f"shardshuffle={_SHUFFLE_SHARDS}, shuffle({_SHUFFLE_SAMPLES}), batched in the workers (its README), persistent"
)
_IO = "torchvision.io and transforms v2 on tensors (torchvision's documentation, Performance considerations)"
_PIL = "Pillow and torchvision's transforms"


class Peer(NamedTuple):
    module: str  # that has to be there
    distribution: str  # that it is of, for its version
    needs: str  # of its formats: "tars", "folder", "mds", "litdata" or "beton"
    entrant: Callable[[Work], Entrant]


def find_peers(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(those that can be imported, a line for each that cannot)."""
    if str(_INSTALLED) not in sys.path:
        sys.path.append(str(_INSTALLED))  # last: what the project itself has installed comes first
    found = [name for name in names if importlib.util.find_spec(PEERS[name].module) is not None]
    return found, [
        f"not measured: {name}: {PEERS[name].module} is not installed: `make peers` does that"
        for name in names
        if name not in found
    ]


def versions_of(names: Sequence[str]) -> dict[str, str]:
    """Of what these peers are."""
    return {of: importlib.metadata.version(of) for of in dict.fromkeys(PEERS[name].distribution for name in names)}


def write_formats(work: Work, names: Sequence[str], processes: int) -> None:
    """What these peers read beside the tars and the .beton. Errors: OSError where the disk is full."""
    needed = {PEERS[name].needs for name in names}
    if needed <= {"tars", "beton"}:
        return
    samples = write_folder(work.tars, work.scratch / "folder")
    if "mds" in needed:
        write_mds(samples, work.scratch / "mds")
    if "litdata" in needed:
        write_litdata(samples, work.scratch / "litdata", processes)


def peer_entrants(work: Work, names: Sequence[str]) -> dict[str, Entrant]:
    """Their loaders; FFCV's only where there is a .beton."""
    beton = read_manifest(work.manifest).beton
    return {name: PEERS[name].entrant(work) for name in names if PEERS[name].needs != "beton" or beton is not None}


# ---- pictures ----


def _pil_transform(work: Work) -> Callable[[Any], Tensor]:
    """Pillow image -> uint8 (3, size, size)."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(work.image_size, interpolation=InterpolationMode(work.interpolation)),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def _io_transform(work: Work) -> Callable[[Tensor], Tensor]:
    """Uint8 (3, H, W) -> (3, size, size)."""
    from torchvision.transforms import InterpolationMode, v2

    # torchvision announces that decoding will move elsewhere, in every process.
    warnings.filterwarnings("ignore", message=".*(decod|deprecat)", module="torchvision")
    crop = v2.RandomResizedCrop(work.image_size, interpolation=InterpolationMode(work.interpolation), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])


def _decoded(data: bytes) -> Tensor:
    """Uint8 (3, H, W)."""
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def _from_file(path: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image, read_file

    return decode_image(read_file(path), ImageReadMode.RGB)


def _data_loader(work: Work, dataset: Any, **options: Any) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(dataset, work.batch, num_workers=work.workers, persistent_workers=work.workers > 0, **options)


def _channels_first(work: Work, loader: Batches) -> Delivered:
    return delivered(loader, channels_last=False)


# ---- webdataset ----


def _webdataset(decoder: str, work: Work) -> Entrant:
    workers = min(work.workers, len(work.tars))
    fewer = "" if workers == work.workers else f" of {work.workers} (it needs a shard for each)"
    settings = f"webdataset library: {_WEBDATASET}, {workers} processes{fewer}; {decoder}"
    return Entrant(partial(_open_webdataset, decoder, workers, work), settings, partial(_channels_first, work))


def _open_webdataset(decoder: str, workers: int, work: Work) -> Batches:
    import webdataset as wds

    suffixes = "jpg;jpeg;png;webp"
    dataset = wds.WebDataset([str(tar) for tar in work.tars], shardshuffle=_SHUFFLE_SHARDS).shuffle(_SHUFFLE_SAMPLES)
    if decoder == _PIL:
        # By default it would run pickled members.
        dataset = dataset.decode("pil", only=(*suffixes.split(";"), "cls"))
        picture = _pil_transform(work)
    else:
        transform = _io_transform(work)
        picture = lambda data: transform(_decoded(data))  # noqa: E731 - workers are forked
    dataset = dataset.to_tuple(suffixes, "cls").map_tuple(picture, int)
    dataset = dataset.batched(work.batch, partial=True)  # each worker would drop a part of its own
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


# ---- folders ----


def _image_folder(decoder: str, work: Work) -> Entrant:
    settings = f"torchvision ImageFolder, torch DataLoader, {work.workers} persistent workers; {decoder}"
    return Entrant(partial(_open_image_folder, decoder, work), settings, partial(_delivered_by_folder, work))


def _open_image_folder(decoder: str, work: Work) -> Batches:
    from torchvision.datasets import ImageFolder

    folder = str(work.scratch / "folder")
    if decoder == _PIL:
        dataset = ImageFolder(folder, _pil_transform(work))
    else:
        dataset = ImageFolder(folder, _io_transform(work), loader=_from_file)
    return _data_loader(work, dataset, shuffle=True)


def _delivered_by_folder(work: Work, loader: Batches, dropped: int = 0) -> Delivered:
    """Folders of classes are counted as they are found: the label is the folder's name."""
    labels = np.array(sorted(int(path.name) for path in (work.scratch / "folder").iterdir()))
    return delivered(loader, dropped, labels, channels_last=False)


def _timm(work: Work) -> Entrant:
    settings = (
        f"timm create_dataset on an ImageFolder, create_loader(is_training=True, color_jitter=None), {work.workers} "
        "persistent workers, as its train.py; the uint8 batches that its prefetcher would send to the device"
    )
    return Entrant(partial(_open_timm, work), settings, partial(_delivered_by_folder, work, dropped=work.dropped))


def _open_timm(work: Work) -> Batches:
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(work.scratch / "folder"), is_training=True),
        input_size=(3, work.image_size, work.image_size),
        batch_size=work.batch,
        is_training=True,
        color_jitter=None,  # type: ignore[arg-type] # what its train.py gives for none
        interpolation=work.interpolation,
        num_workers=work.workers,
        persistent_workers=work.workers > 0,
        device=torch.device("cpu"),
    )
    return loader.loader


# ---- FFCV ----


def _ffcv(work: Work) -> Entrant:
    beton = read_manifest(work.manifest).beton
    assert beton is not None
    settings = (
        f"FFCV's Loader on the same .beton ({'encoded anew' if encodes_anew(beton) else 'original bytes'}): "
        f"OrderOption.RANDOM, os_cache=True (its Tuning Guide, small data sets), {max(1, work.workers)} threads, "
        "RandomResizedCropRGBImageDecoder (INTER_AREA, the only one it has), RandomHorizontalFlip"
    )
    return Entrant(partial(_open_ffcv, work), settings, delivered)


def _open_ffcv(work: Work) -> Batches:
    # TBB's threads, numba's first choice, make a process that forks later hang at its exit.
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor

    manifest = read_manifest(work.manifest)
    assert manifest.beton is not None
    size = (work.image_size, work.image_size)
    return Loader(
        str(manifest.folder / manifest.beton.name),
        batch_size=work.batch,
        num_workers=max(1, work.workers),
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.arange(work.samples),
        drop_last=False,
        pipelines={
            "image": [RandomResizedCropRGBImageDecoder(size), RandomHorizontalFlip(), ToTensor()],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )


# ---- MosaicML Streaming ----


def _streaming(work: Work) -> Entrant:
    settings = (
        f"MosaicML Streaming: MDS of the original bytes, shuffle=True and its defaults (its Performance Tuning), "
        f"StreamingDataLoader, {work.workers} persistent workers; {_IO}"
    )
    return Entrant(partial(_open_streaming, work), settings, partial(_channels_first, work), _close_streaming)


def _open_streaming(work: Work) -> Batches:
    from streaming import StreamingDataLoader, StreamingDataset

    class Pictures(StreamingDataset):
        def __init__(self) -> None:
            super().__init__(local=str(work.scratch / "mds"), shuffle=True, shuffle_seed=SEED, batch_size=work.batch)
            self.transform = _io_transform(work)

        def __getitem__(self, at: Any) -> tuple[Tensor, int]:
            sample = super().__getitem__(at)
            return self.transform(_decoded(sample["image"])), sample["label"]

    return StreamingDataLoader(
        Pictures(), batch_size=work.batch, num_workers=work.workers, persistent_workers=work.workers > 0
    )


def _close_streaming(loader: Any) -> None:
    """Its shared memory would refuse the next that reads the same folder."""
    from streaming.base.util import clean_stale_shared_memory

    loader.dataset.__del__()
    clean_stale_shared_memory()


# ---- LitData ----


def _litdata(work: Work) -> Entrant:
    settings = (
        f"LitData: optimize() of the original bytes in chunks of 64 MB, StreamingDataset(shuffle=True), "
        f"StreamingDataLoader (its README), {work.workers} persistent workers; decoded by its serializer with "
        f"torchvision.io, transforms v2"
    )
    return Entrant(partial(_open_litdata, work), settings, partial(_channels_first, work))


def _open_litdata(work: Work) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # of its own serializer
    transform = _io_transform(work)

    def picture(sample: dict[str, Any]) -> tuple[Tensor, int]:
        return transform(sample["image"]), sample["label"]

    dataset = StreamingDataset(str(work.scratch / "litdata"), shuffle=True, seed=SEED, transform=picture)
    return StreamingDataLoader(
        dataset, batch_size=work.batch, num_workers=work.workers, persistent_workers=work.workers > 0
    )


# ---- SPDL ----


def _spdl(work: Work) -> Entrant:
    settings = (
        f"SPDL: spdl.pipeline, the stage that makes a batch in {max(1, work.workers)} processes (its documentation, "
        f"Multi-processing; with threads it was slower), files of an ImageFolder; {_IO} (its own decoder goes through "
        "FFmpeg, and takes twice as long for a JPEG)"
    )
    return Entrant(partial(_SpdlLoader, work), settings, partial(_channels_first, work), _SpdlLoader.close)


class _SpdlLoader:
    """A pipeline for each epoch, on processes that stay."""

    def __init__(self, work: Work) -> None:
        self._work = work
        files = sorted((work.scratch / "folder").glob("*/*"))
        self._samples = [Sample(str(path), int(path.parent.name)) for path in files]
        self._random = random.Random(SEED)
        self._processes = ProcessPoolExecutor(max(1, work.workers))
        self._batch = _SpdlBatch(_io_transform(work))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        from spdl.pipeline import PipelineBuilder

        self._random.shuffle(self._samples)
        # Two batches a process at once, and three that wait: what torch's DataLoader and spdl's have by default.
        pipeline = (
            PipelineBuilder()
            .add_source(self._samples)
            .aggregate(self._work.batch)
            .pipe(self._batch, executor=self._processes, concurrency=2 * max(1, self._work.workers))
            .add_sink(3)
            .build(num_threads=1)
        )
        with pipeline.auto_stop():
            yield from pipeline

    def close(self) -> None:
        self._processes.shutdown()


class _SpdlBatch:
    """Files -> (images, labels), in a worker process."""

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self._transform = transform

    def __call__(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        images = [self._transform(_from_file(sample.path)) for sample in samples]
        return torch.stack(images), torch.tensor([sample.label for sample in samples])


PEERS = {
    "webdataset": Peer("webdataset", "webdataset", "tars", partial(_webdataset, _PIL)),
    "webdataset_io": Peer("webdataset", "webdataset", "tars", partial(_webdataset, _IO)),
    "image_folder": Peer("torchvision", "torchvision", "folder", partial(_image_folder, _PIL)),
    "image_folder_io": Peer("torchvision", "torchvision", "folder", partial(_image_folder, _IO)),
    "timm": Peer("timm", "timm", "folder", _timm),
    "ffcv": Peer("ffcv", "ffcv", "beton", _ffcv),
    "streaming": Peer("streaming", "mosaicml-streaming", "mds", _streaming),
    "litdata": Peer("litdata", "litdata", "litdata", _litdata),
    "spdl": Peer("spdl", "spdl-core", "folder", _spdl),
}
