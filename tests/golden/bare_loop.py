"""Golden loss curves: the demo recipe in a bare DDP loop that shares no code with the trainer.

Order, crop, noise, schedule, parameter groups and the reading of shards are written here again from their
specifications, in the plainest way. Of the project only `pipeline.noise.reference` is used, which is the specification
of the random numbers. The learning rate is a quarter of the recipe's: there two layouts of this loop, which differ by
4e-7 in 20 steps, are 2e-3 apart after 50, for a rate that high makes of each last bit another training. The curves
beside this file were made by

    python -m data_prep digits --out digits
    python -m data_prep shard --source digits/train --out shards --split train --samples-per-shard 256
    torchrun --standalone --nproc-per-node 2 tests/golden/bare_loop.py shards tests/golden
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from pipeline.noise.reference import Purpose, gaussian_noise, random_words, stream_of, uniforms

SEED, STEPS, GLOBAL_BATCH, EPOCHS = 0, 50, 64, 30
SIDE, CLASSES = 32, 10
LR, WEIGHT_DECAY, BETAS, CLIP, WARMUP_EPOCHS = 5e-4, 0.05, (0.9, 0.999), 1.0, 1
SCALE, RATIO = (0.8, 1.0), (3 / 4, 4 / 3)
CURVES = {"clean": 0.0, "noisy": 0.2}  # standard deviation of the Gaussian noise on the normalised picture


def read_shards(folder: Path) -> list[tuple[Image.Image, int]]:
    """Picture and label of each sample, by sample id: shard after shard, in the order of the tars' members."""
    samples = []
    for path in sorted(folder.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        for name, data in files.items():
            if name.endswith(".jpg"):
                label = int(files[name.removesuffix(".jpg") + ".cls"])
                samples.append((Image.open(io.BytesIO(data)).convert("RGB"), label))
    return samples


def order_of(epoch: int, num_samples: int) -> np.ndarray:
    ids = np.arange(num_samples)
    np.random.RandomState([SEED, epoch]).shuffle(ids)
    return ids


def draws(ids: Tensor, epoch: int, purpose: Purpose, count: int) -> np.ndarray:
    """(B, count) in (0, 1]."""
    words = random_words(count, ids, SEED, torch.tensor(epoch), stream_of("image", purpose))
    return uniforms(words, torch.float64).numpy()


def crop(picture: Image.Image, attempts: np.ndarray) -> Image.Image:
    """RandomResizedCrop without a flip; attempts: (10, 4), area, ratio, left and top of each."""
    width, height = picture.size
    for area, ratio, left, top in attempts:
        area = width * height * (SCALE[0] + (SCALE[1] - SCALE[0]) * area)
        ratio = math.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = min(int(left * (width - w + 1)), width - w), min(int(top * (height - h + 1)), height - h)
            picture = picture.crop((x, y, x + w, y + h))
            break  # where none of ten fits, a square picture is taken whole
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def batch_of(samples: list, ids: np.ndarray, epoch: int, std: float) -> tuple[Tensor, Tensor]:
    """Normalised (B, 3, 32, 32) with its noise, and labels (B,)."""
    sample_ids = torch.from_numpy(ids)
    attempts = draws(sample_ids, epoch, Purpose.CROP, 40).reshape(len(ids), 10, 4)
    pictures = [np.asarray(crop(samples[i][0], own)) for i, own in zip(ids, attempts, strict=True)]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    x = (x / 255 - 0.5) / 0.5  # timm's mean and std of this model
    if std:
        stream = stream_of("image", Purpose.NOISE)
        x = gaussian_noise(x, std, sample_ids, SEED, torch.tensor(epoch), stream)
    return x, torch.tensor([samples[i][1] for i in ids])


def lr_of(step: int, steps_per_epoch: int) -> float:
    """Linear warm-up from one step's share, then a cosine to 0."""
    warmup, total = WARMUP_EPOCHS * steps_per_epoch, EPOCHS * steps_per_epoch
    if step < warmup:
        return LR / warmup + step * (LR - LR / warmup) / warmup
    return 0.5 * LR * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def start() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(SEED)
    size = {"img_size": SIDE, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **size)
    spared = {name for name, p in model.named_parameters() if p.ndim < 2} | {"pos_embed", "cls_token"}
    groups = [
        {"params": [p for name, p in model.named_parameters() if name in spared], "weight_decay": 0.0},
        {"params": [p for name, p in model.named_parameters() if name not in spared], "weight_decay": WEIGHT_DECAY},
    ]
    return model, torch.optim.AdamW(groups, lr=LR, betas=BETAS)


def train(samples: list, std: float, steps: int) -> list[float]:
    """The loss of each step, the mean over all ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, optimizer = start()
    parallel = DistributedDataParallel(model)
    steps_per_epoch, share = len(samples) // GLOBAL_BATCH, GLOBAL_BATCH // world_size
    losses = []
    for step in range(steps):
        epoch, place = divmod(step, steps_per_epoch)
        first = place * GLOBAL_BATCH + rank * share
        x, labels = batch_of(samples, order_of(epoch, len(samples))[first : first + share], epoch, std)
        for group in optimizer.param_groups:
            group["lr"] = lr_of(step, steps_per_epoch)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(parallel(x), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(mean.item() / world_size)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", type=Path, help="folder with train-*.tar of the digits")
    parser.add_argument("out", type=Path, help="folder for one .json a curve")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    samples = read_shards(options.shards)
    libraries = {name: version(name) for name in ("torch", "timm", "numpy", "pillow", "scikit-learn")}
    for name, std in CURVES.items():
        losses = train(samples, std, options.steps)
        if dist.get_rank() == 0:
            made = {"ranks": dist.get_world_size(), "machine": platform.machine(), "libraries": libraries}
            curve = {"noise_std": std, "global_batch": GLOBAL_BATCH, "made": made, "losses": losses}
            (options.out / f"{name}.json").write_text(json.dumps(curve, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
