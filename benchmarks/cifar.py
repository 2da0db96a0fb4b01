"""A real training on one GPU: CIFAR-10 by a small ViT with noise, and by its clean twin; then what each one answers.

The twins of a seed share initial weights, order, crops and flips; noise alone is between them. Each (seed, twin) is a
cell that is kept when it is done. All pictures lie on the device: there is no loader.

Why 40 epochs of this model. A forward pass of one picture is 1.42 GFLOP (65 tokens, width 384, 6 blocks:
2 x 6 x (12 x 384^2 x 65 + 2 x 65^2 x 384), and the patches), a training step three times that, an epoch of 50,000
213 TFLOP, six cells of 40 epochs 51 PFLOP. One H200 takes 50,000 pictures a second (results/cifar.jsonl), 213 TFLOP/s,
so that is 240 s. With 12 s for imports and decoding, 30 s for compiling the first of each twin and 10 s for the others,
and 3 s for each audit it should be 370 s of the 540 that there are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.cells import Cell, check_minutes, run_cells
from benchmarks.cifar_audit import audit, places
from benchmarks.cifar_data import Pictures, read_pictures
from benchmarks.cifar_summary import CLEAN, NOISY, print_summary, tell_cell
from benchmarks.cifar_training import OnDevice, Trained, Training, conditions_of, moved, train
from benchmarks.harness import OnTurn, check_output, circumstances_of, spread, status_line
from benchmarks.training_step import chosen_device
from pipeline.models import ModelConfig
from pipeline.noise.config import NoiseConfig
from pipeline.optim import OptimConfig

GROUP = 8  # of a linear noise in training
HEAD_WIDTH = 64
WARMUP_SHARE = 0.1  # of the training

NoiseName = Literal["optimal_q", "circular_shift", "gaussian", "salt_and_pepper"]
_STRENGTHS: dict[NoiseName, float | None] = {
    "optimal_q": None,
    "circular_shift": 0.3,
    "gaussian": 0.2,
    "salt_and_pepper": 0.05,
}


@dataclass(frozen=True)
class CifarOptions:
    """Accuracy on CIFAR-10 from scratch, NoisyViT and its clean twin: per image, and by the published protocol."""

    data: Path | None = None
    """A folder or an archive with train/<class>/*.jpg and test/<class>/*.jpg. None: cifar10-jpeg.tar.xz of the folder
    that NOISYNN_SAMPLES names."""
    noise: NoiseName = "optimal_q"
    """Of the noisy twin in training, at the input of the last block's attention (the official place): optimal Q or
    circular shift (0.3) over groups of 8, Gaussian (0.2) or salt-and-pepper (0.05)."""
    seeds: int = 3
    """Seeds 0, 1, ...; two trainings each."""
    epochs: int = 40
    """Six trainings of so many should take some 6 of the 9 minutes on one H200."""
    batch: int = 512
    """A multiple of 8."""
    lr: float = 1e-3
    """Peak of AdamW's rate, after a warm-up over a tenth of the training."""
    weight_decay: float = 0.05
    width: int = 384
    """Of the ViT; heads are 64 wide."""
    depth: int = 6
    """Blocks of the ViT."""
    patch: int = 4
    """Side of a patch, in pixels."""
    train_images: int | None = None
    """So many, the first of each class; None: all."""
    test_images: int | None = None
    """So many, the first of each class; None: all."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of autocast in training."""
    compile: bool = True
    """By torch.compile."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    minutes: float = 8.5
    """No further training is begun that should not end by then; half a minute of nine is left for the imports."""
    note: str = ""
    """Kept in each row, such as `no other load`."""
    output: Path | None = None
    """JSON lines to add to; benchmarks/results/cifar.jsonl if None."""

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "width", "depth", "patch"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name} {value}: at least 1")
        if self.batch < 1 or self.batch % GROUP:
            raise ValueError(f"--batch {self.batch}: a multiple of {GROUP}, the group of a linear noise")
        if self.width > HEAD_WIDTH and self.width % HEAD_WIDTH:
            raise ValueError(f"--width {self.width}: at most {HEAD_WIDTH}, or a multiple of it")
        self.optim  # noqa: B018  (refuses a wrong rate or decay)
        check_minutes(self.minutes)

    @property
    def optim(self) -> OptimConfig:
        warmup = WARMUP_SHARE * self.epochs
        return OptimConfig(lr=self.lr, weight_decay=self.weight_decay, warmup_epochs=warmup)

    @property
    def model(self) -> ModelConfig:
        heads = max(1, self.width // HEAD_WIDTH)
        options = {"patch_size": self.patch, "embed_dim": self.width, "depth": self.depth, "num_heads": heads}
        return ModelConfig("vit_small_patch16_224", dict(options))

    def noise_of(self, twin: str) -> NoiseConfig:
        if twin == CLEAN:
            return NoiseConfig()
        site = f"blocks.{self.depth - 1}.attn"
        return NoiseConfig(self.noise, _STRENGTHS[self.noise], site, during="train", group_size=GROUP)


def measure_cifar(options: CifarOptions, command: Sequence[str]) -> list[dict[str, Any]]:
    """Trains, evaluates, writes and prints. Errors: ValueError, OSError naming the option or file and the mend."""
    start = time.monotonic()
    path = check_output(options.output, "cifar")
    circumstances = circumstances_of(command, options.note)
    device = chosen_device(options.device)
    with status_line() as on_turn:
        on_turn("decoding the pictures")
        pictures = read_pictures(options.data, options.train_images, options.test_images)
        _check(options, pictures)
        on_device = moved(pictures, device)
        shared = _conditions(options, pictures, device)
        cells = [
            Cell(
                f"seed {seed}, {twin}",
                shared | {"seed": seed, "noise": options.noise_of(twin).describe()},
                weight=1,
                measure=partial(_measure_cell, options, on_device, seed, twin, on_turn),
            )
            for seed in range(options.seeds)
            for twin in (CLEAN, NOISY)
        ]
        rows = run_cells("cifar", cells, path, circumstances, options.minutes, on_turn, start)
    measured = [row for of_cell in rows.values() for row in of_cell]
    if measured:
        print_summary(measured)
        print(f"rows with versions, commit and command in {path}")
    return measured


def _conditions(options: CifarOptions, pictures: Pictures, device: torch.device) -> dict[str, Any]:
    names = ("epochs", "batch", "lr", "weight_decay", "width", "depth", "patch", "dtype", "compile")
    own = {"model": options.model.name, "noisy_twin": options.noise_of(NOISY).describe()}
    return {name: getattr(options, name) for name in names} | own | conditions_of(pictures, device)


def _check(options: CifarOptions, pictures: Pictures) -> None:
    """Errors: ValueError for what does not fit the pictures, before anything is trained."""
    if pictures.side % options.patch:
        raise ValueError(f"--patch {options.patch}: does not divide the pictures' side of {pictures.side}")
    if options.batch > len(pictures.train.labels):
        raise ValueError(f"--batch {options.batch} is more than the {len(pictures.train.labels)} pictures: lower it")


def _measure_cell(
    options: CifarOptions, data: OnDevice, seed: int, twin: str, on_turn: OnTurn, kept: dict[str, Any]
) -> list[str]:
    if options.compile:
        torch.compiler.reset()  # the other twin's graph
    trained = train_twin(options, data, seed, twin, on_turn)
    on_turn(f"seed {seed}, {twin}: evaluating")
    found = audit(trained.model, data.tested, options.depth, shuffle_seed=seed)
    samples = len(data.labels) // options.batch * options.batch
    warm = trained.epoch_seconds[1:]  # the first compiles
    row = {
        "question": "cifar",
        "part": f"seed {seed}",
        "contestant": twin,
        "seed": seed,
        "places": {noise.site: place for place, noise in places(options.depth).items()},
        "audit": [row.to_json() for row in found],
        "last_epoch_loss": trained.last_loss,
        "first_epoch_seconds": trained.epoch_seconds[0],
        "images_per_second": spread([samples / seconds for seconds in warm])._asdict() if warm else None,
        "parameters": sum(p.numel() for p in trained.model.parameters()),
    }
    tell_cell(row)
    return [json.dumps(row | kept, ensure_ascii=False)]


def train_twin(options: CifarOptions, data: OnDevice, seed: int, twin: str, on_turn: OnTurn) -> Trained:
    """Errors: ValueError where the loss is not finite."""
    training = Training(
        model=options.model,
        noise=options.noise_of(twin),
        seed=seed,
        epochs=options.epochs,
        batch=options.batch,
        optim=options.optim,
        dtype=options.dtype,
        compile=options.compile,
    )
    return train(training, data, lambda epoch: on_turn(f"seed {seed}, {twin}: epoch {epoch + 1} of {options.epochs}"))
