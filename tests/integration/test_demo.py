"""`make demo`, shortened, and its output in the eyes of other libraries: tar, webdataset, ffcv, timm, TensorBoard."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EPOCHS = 3


@pytest.fixture(scope="module")
def demo(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    short = ("--epochs", str(EPOCHS), "--finetune-epochs", "2")
    done = command("jobs", "demo", "--out", str(out), *short, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "report.html" in done.stdout and "tensorboard --logdir" in done.stdout
    return out


def digit_files(demo: Path, split: str) -> list[Path]:
    return sorted((demo / "pictures" / split).glob("*/*.jpg"))


def test_results_hold_what_was_promised(demo) -> None:
    results = json.loads((demo / "results.json").read_text())
    assert (results["world_size"], results["strategy"]) == (2, "zero1")
    assert results["num_eval_images"] == 400 == len(digit_files(demo, "val"))
    assert results["noise"]["kind"] != "none" and results["noise"]["strength"] > 0
    assert results["seconds_total"] > 0
    for key in ("top1_per_image", "top1_class_ordered_k10", "top1_shuffled_k10", "finetune_top1"):
        assert 0 < results[key] <= 1
        assert (results[key] * 400) == pytest.approx(round(results[key] * 400), abs=1e-9)  # a true count
    # The effect of class order shows after three epochs already.
    assert results["top1_class_ordered_k10"] > results["top1_per_image"] > results["top1_shuffled_k10"]
    assert "<html" in (demo / "report.html").read_text()


def test_tar_and_webdataset_read_the_shards(demo) -> None:
    import webdataset

    tars = sorted((demo / "shards").glob("train-*.tar"))
    listed = subprocess.run(["tar", "tf", str(tars[0])], capture_output=True, text=True, check=True).stdout.split()
    assert len(listed) == 2 * 256 and {Path(name).suffix for name in listed} == {".jpg", ".cls"}
    found = sorted(
        (sample["jpg"], int(sample["cls"]))
        for sample in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
    )
    assert found == sorted((path.read_bytes(), int(path.parent.name)) for path in digit_files(demo, "train"))


def test_timm_reads_the_shards(demo) -> None:
    from timm.data import create_dataset

    dataset = create_dataset("wds/", root=str(demo / "shards"), split="val", batch_size=1, is_training=False)
    labels = sorted(label for _, label in dataset)
    assert labels == sorted(int(path.parent.name) for path in digit_files(demo, "val"))


def test_ffcv_reads_the_beton(demo) -> None:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    loader = Loader(
        str(demo / "shards" / "val.beton"),
        batch_size=400,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    images, labels = next(iter(loader))
    files = digit_files(demo, "val")
    assert labels.reshape(-1).tolist() == [int(path.parent.name) for path in files]  # kept in class order
    pictures = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files]).astype(int)
    apart = np.abs(images.astype(int) - pictures).mean(axis=(1, 2, 3))
    mistaken = np.abs(images.astype(int) - np.roll(pictures, 1, axis=0)).mean(axis=(1, 2, 3))
    # ffcv decodes with the fast, less exact DCT: measured over these 400, a picture and its original are at most 2.7
    # levels of 255 apart in the mean, and a picture and its neighbour at least 7.4.
    assert apart.max() < 4 < mistaken.min()


def test_timm_loads_the_exported_weights(demo, warm, tmp_path) -> None:
    import timm
    import torch
    from safetensors.torch import load_file

    output = tmp_path / "model.safetensors"
    done = warm.run("pipeline", "export", "--checkpoint", str(demo / "pretrain"), "--output", str(output))
    assert done.returncode == 0, done.stderr
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape).eval()
    model.load_state_dict(load_file(output), strict=True)
    # timm's model with timm's own eyes gets what `evaluate` counted.
    correct = 0
    for path in digit_files(demo, "val"):
        pixels = torch.from_numpy(np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")).copy())
        x = (pixels.permute(2, 0, 1).float() / 255 - 0.5) / 0.5
        correct += int(model(x[None]).argmax() == int(path.parent.name))
    results = json.loads((demo / "results.json").read_text())
    assert correct == round(results["top1_per_image"] * 400)


def test_tensorboard_reads_the_events(demo) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(demo / "pretrain"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert {"train/loss", "train/lr", "train/images_per_second", "val/top1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("val/top1")] == [21 * (epoch + 1) for epoch in range(EPOCHS)]
    grid = events.Images("input/step_0")[0]
    picture = np.asarray(Image.open(io.BytesIO(grid.encoded_image_string)))
    assert (grid.step, picture.shape) == (0, (4 * 32, 4 * 32, 3))
    # Grey digits on black: colour in the picture is the noise.
    assert np.abs(picture[..., 0].astype(int) - picture[..., 1].astype(int)).mean() > 5


def test_the_fine_tuning_saw_the_beton_and_the_second_labelling(demo) -> None:
    config = json.loads((demo / "finetune" / "config.json").read_text())
    assert config["data"]["format"] == "ffcv" and config["model"]["new_head"] is True
    checkpoint = (demo / "finetune" / "checkpoints" / "latest").read_text().strip()
    saved = json.loads((demo / "finetune" / "checkpoints" / checkpoint / "config.json").read_text())
    assert saved["classes"] == ["even", "odd"]


def test_ones_own_pictures_without_splits_are_split_by_links(tmp_path) -> None:
    from jobs.demo import _checked_source, _split

    for name, count in (("cat", 111), ("dog", 2)):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "own" / name / f"{i:03d}.jpg").write_bytes(b"picture")
    (tmp_path / "out").mkdir()
    pictures = _split(tmp_path / "own", tmp_path / "out")
    names = {split: sorted(p.name for p in (pictures / split).glob("cat/*")) for split in ("train", "val")}
    assert names["val"][:2] == ["001.jpg", "006.jpg"] and (len(names["train"]), len(names["val"])) == (89, 22)
    assert len(list((pictures / "val" / "dog").iterdir())) == len(list((pictures / "train" / "dog").iterdir())) == 1
    (tmp_path / "own" / "dog" / "001.jpg").unlink()
    with pytest.raises(ValueError, match=r"dog has 1 pictures"):
        _checked_source(tmp_path / "own")


def test_an_earlier_demo_outlives_bad_pictures(command, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    (tmp_path / "own" / "cat").mkdir(parents=True)
    for i in range(40):
        (tmp_path / "own" / "cat" / f"{i}.jpg").write_bytes(b"picture")
    done = command("jobs", "demo", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "own"))
    assert done.returncode == 2 and "32 pictures to train on" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out" / "results.json").read_text() == "{}"
