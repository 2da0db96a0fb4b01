"""250 original ImageNet pictures through shards and .beton, and into a ViT at 224 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.beton import BetonOptions, write_beton
from data_prep.distribute import ShardOptions, shard
from data_prep.manifest import Manifest
from data_prep.verify import VerifyOptions, verify
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig, open_split


@pytest.fixture(scope="module")
def manifest(imagenet_sample, tmp_path_factory) -> Manifest:
    out = tmp_path_factory.mktemp("shards")
    written = shard(ShardOptions(imagenet_sample, out, split="train", samples_per_shard=100))
    return write_beton(BetonOptions(written.path))


def test_originals_pass_through_to_the_byte(manifest, imagenet_sample) -> None:
    import webdataset

    tars = [str(manifest.folder / record.name) for record in manifest.shards]
    found = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        found[sample["jpg"]] = manifest.classes[int(sample["cls"])]
    expected = {path.read_bytes(): path.parent.name for path in imagenet_sample.glob("*/*.JPEG")}
    assert len(expected) == 250 and found == expected
    assert manifest.repaired == manifest.skipped == ()
    assert verify(VerifyOptions(manifest.path)) == []


def test_both_readers_give_the_same_pictures(manifest) -> None:
    """The same crop of the same id; apart by ffcv's fast DCT, and by its resampler (INTER_AREA against antialiased)."""
    augment = AugmentConfig(interpolation="bilinear")
    ids = np.arange(0, 250, 10)
    batches = [
        open_split(manifest.path, DataConfig(format=kind, workers=1), augment, seed=0).batch(ids, epoch=3)
        for kind in ("wds", "ffcv")
    ]
    assert batches[0].labels.tolist() == batches[1].labels.tolist()
    assert batches[0].sample_ids.tolist() == batches[1].sample_ids.tolist() == ids.tolist()
    apart = (batches[0].images.int() - batches[1].images.int()).abs().float().mean(dim=(1, 2, 3))
    shifted = (batches[0].images.int() - batches[1].images.roll(1, 0).int()).abs().float().mean(dim=(1, 2, 3))
    assert apart.max() < 12 < shifted.min(), "levels of 255: one picture twice, against two different ones"


def test_the_evaluation_transform_is_timm_s_own(manifest) -> None:
    from timm.data import create_transform

    reader = open_split(manifest.path, DataConfig(workers=0), AugmentConfig(), seed=0)
    batch = reader.batch(np.array([0, 99, 249]), epoch=None)
    timms = create_transform(224, is_training=False, interpolation="bicubic", crop_pct=0.9, use_prefetcher=True)
    for sample_id, image in zip((0, 99, 249), batch.images, strict=True):
        picture = Image.open(_as_file(reader, sample_id)).convert("RGB")
        assert np.array_equal(np.asarray(timms(picture)).transpose(1, 2, 0), image.numpy())


def _as_file(reader, sample_id: int):
    import io

    return io.BytesIO(reader.read(sample_id))


def test_a_real_picture_reaches_the_network_as_it_is(manifest, tmp_path: Path) -> None:
    """Preprocessing can be undone to the picture that went in."""
    import torch

    from pipeline.models import ModelConfig, Preprocess, create_model

    model = create_model(ModelConfig("vit_tiny_patch16_224", options={"depth": 1}), 250, 224)
    preprocess = Preprocess(model, torch.device("cpu"))
    images = open_split(manifest.path, DataConfig(workers=0), AugmentConfig(), seed=0).batch(np.arange(4), 0).images
    assert torch.equal(preprocess.undo(preprocess(images)), images)
