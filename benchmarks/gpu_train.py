"""Images a second of a whole training step on one GPU: timm's model, this project's, and this project's with noise.

A step is: uint8 pictures on the device -> normalised -> forward under autocast -> label-smoothed cross entropy ->
backward -> fused AdamW. The pictures are synthetic and stay on the device, so no loader is measured. Model and loss are
one graph of torch.compile for every contestant. timm's pictures are normalised by the expression of its PrefetchLoader,
compiled too, for that loader would hide an eager one behind the step on a stream of its own. Its model is as timm
builds it. This project's starts from the same weights but projects its patches by one matrix product, where timm's has
a convolution for which cuDNN has slow kernels only: so `clean` can be the faster (pipeline/patches.py has figures).

Aims, set before a GPU was at hand, for one H200 in bfloat16 at 224 pixels, images/s: ViT-T 26,000, S 12,000,
B 4,200, L 1,340; and never below timm's. The floating point operations of a step (three times the forward pass's, which
are counted) make these 20, 33, 45 and 50 % of the card's peak: a wider model spends more of its time in multiplication.

Where a step's time goes, as torch's profiler saw it once on that card: of 56 ms of ViT-S at a batch of 512 with timm's
patch embedding, products 35 % (at 0.65 PFLOP/s), attention 16 % (cuDNN's, forward at 174 TFLOP/s, backward at 129: 197
tokens are few), GELU and its sums 14 %, LayerNorm with the residual sums 11 %, patch embedding 9 %, packing and casting
around attention 7 %. All but products and attention is bound by memory. With the patches as a product and no GELU at
all it would still be 11,500 images/s: the aim asks for more in one pass than the compiler makes of it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cells import Cell, check_minutes, run_cells
from benchmarks.harness import (
    Contestant,
    OnTurn,
    Spread,
    check_output,
    circumstances_of,
    compare,
    print_table,
    status_line,
    summarise,
)
from benchmarks.training_step import DTYPES, chosen_device, loss_function, wait_for
from pipeline.flops import mfu, peak_flops, training_flops
from pipeline.models import ModelConfig, Preprocess, create_model, timm_model, timm_settings
from pipeline.noise import native
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector

CLASSES, SEED, LR = 1000, 0, 1e-4
NOISE = NoiseConfig(kind="gaussian", strength=0.1, site="blocks.*.attn")

# By 36 bytes of activations for each token, channel and block, the backward pass needs 17 GB of T, S and B, 22 of L.
BATCHES = {
    "vit_tiny_patch16_224": 1024,
    "vit_small_patch16_224": 512,
    "vit_base_patch16_224": 256,
    "vit_large_patch16_224": 128,
}
_OTHER_BATCH = 64
AIMS = {  # images/s of one H200 at 224 pixels
    "vit_tiny_patch16_224": 26_000,
    "vit_small_patch16_224": 12_000,
    "vit_base_patch16_224": 4_200,
    "vit_large_patch16_224": 1_340,
}
# Of a loss of about 7 at the start. The two sides round their pictures and, compiled, their sums in another order.
_SAME_LOSS = 0.02


@dataclass(frozen=True)
class TrainOptions:
    """images/s and MFU of training steps on synthetic pictures: timm's model, this project's clean and noisy."""

    models: tuple[str, ...] = (
        "vit_small_patch16_224",
        "vit_base_patch16_224",
        "vit_large_patch16_224",
        "vit_tiny_patch16_224",
    )
    """timm's names, each a cell of its own: the same command goes on where a run ended."""
    batch: int | None = None
    """Of every model. None: 1024, 512, 256 and 128 for ViT-T, S, B and L, which suit 80 GB. Halved where it does not
    fit."""
    image_size: int = 224
    """Side of the pictures."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of autocast; parameters are float32."""
    compile: bool = True
    """By torch.compile, in its default mode."""
    steps: int = 10
    """Steps of a round."""
    rounds: int = 5
    """Timed rounds of each contestant."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    minutes: float = 8.5
    """No further model is begun that should not end by then; half a minute of nine is left for the imports."""
    note: str = ""
    """Kept in each row, such as `no other load`."""
    output: Path | None = None
    """JSON lines to add to; benchmarks/results/train.jsonl if None."""

    def __post_init__(self) -> None:
        for name in ("batch", "image_size", "steps", "rounds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"--models {' '.join(self.models)}: name at least one model, and each once")
        check_minutes(self.minutes)


class Pictures(NamedTuple):
    """One batch, on the device for as long as a model is measured."""

    images: Tensor  # uint8 (B, H, W, 3)
    labels: Tensor  # int64 (B,)
    sample_ids: Tensor  # int64 (B,)


class FirstLoss(NamedTuple):
    """The loss before any step, by which contestants are compared."""

    value: float
    noisy: bool


def measure_training(options: TrainOptions, command: Sequence[str]) -> list[dict[str, Any]]:
    """Measures, writes and prints. Errors: ValueError, OSError naming the option and the mend."""
    start = time.monotonic()
    path = check_output(options.output, "train")
    circumstances = circumstances_of(command, options.note)
    device = chosen_device(options.device)
    names = ("batch", "image_size", "dtype", "compile", "steps", "rounds")
    conditions = {name: getattr(options, name) for name in names} | {
        "device": device.type,
        "classes": CLASSES,
        "optimizer": "torch.optim.AdamW, fused",
        "noise": NOISE.describe(),
    }
    with status_line() as on_turn:
        cells = [
            Cell(
                name,
                conditions,
                weight=_parameter_tensors(name, options.image_size),
                measure=partial(_measure_model, name, options, device, on_turn),
            )
            for name in options.models
        ]
        rows = run_cells("train", cells, path, circumstances, options.minutes, on_turn, start)
    for of_model in rows.values():
        _print_model(of_model)
    measured = [row for of_model in rows.values() for row in of_model]
    if measured:
        _print_circumstances(measured, device, path)
    return measured


def _parameter_tensors(name: str, image_size: int) -> int:
    """What compiling grows with. Errors: ValueError for a model that timm does not know, before anything is timed."""
    with torch.device("meta"):
        return len(list(create_model(ModelConfig(name), CLASSES, image_size).parameters()))


def peak_of(device: torch.device) -> float | None:
    """The card's dense bfloat16 peak, whatever is measured; None for one that has no place in pipeline.flops."""
    return peak_flops(torch.cuda.get_device_name(device), "bf16") if device.type == "cuda" else None


def _measure_model(
    name: str, options: TrainOptions, device: torch.device, on_turn: OnTurn, kept: dict[str, Any]
) -> list[str]:
    """The rows of one model's three contestants; halves the batch until it fits."""
    batch = options.batch or BATCHES.get(name, _OTHER_BATCH)
    while True:
        try:
            return _rows(name, batch, options, device, on_turn, kept)
        except torch.OutOfMemoryError as error:
            if batch == 1:
                raise ValueError(
                    f"--models {name}: one picture is too much for the GPU's memory; leave it out"
                ) from error
        finally:  # by now the exception has let go of what it interrupted
            _forget(options.compile)
        print(f"{name}: out of memory at a batch of {batch}; going on with {batch // 2}")
        batch //= 2


def _forget(compiled: bool) -> None:
    """Frees what a model took, and what the compiler knows of it."""
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _rows(
    name: str, batch: int, options: TrainOptions, device: torch.device, on_turn: OnTurn, kept: dict[str, Any]
) -> list[str]:
    pictures = _synthetic(batch, options.image_size, device)
    trainees = []
    for contestant in ("timm", "clean", "noisy"):
        on_turn(f"{name}: compiling {contestant}" if options.compile else f"{name}: building {contestant}")
        trainees.append(Trainee(contestant, name, options, pictures))
    contestants = [trainee.contestant(options.steps) for trainee in trainees]
    timings = compare(contestants, options.rounds, same_start, lambda text: on_turn(f"{name}: {text}"))
    flops, peak = training_flops(ModelConfig(name), CLASSES, options.image_size), peak_of(device)
    lines = []
    for row, trainee in zip(summarise("train", name, "images", contestants, timings), trainees, strict=True):
        used = [mfu(rate, flops, peak) for rate in row.items_per_second]
        own = {
            "batch": batch,
            "flops_per_image": flops,
            "peak_flops": peak,
            "mfu": None if peak is None else dict(zip(Spread._fields, used, strict=True)),
            "peak_memory_bytes": trainee.peak_memory_bytes,
            "compile_seconds": trainee.first_step_seconds if options.compile else None,
            "first_loss": trainee.first_loss,
            "last_loss": trainee.loss.item(),
            "aim_images_per_second": AIMS.get(name) if options.image_size == 224 else None,
        }
        lines.append(row.to_json(kept | own))
    return lines


def _synthetic(batch: int, image_size: int, device: torch.device) -> Pictures:
    """Random levels: a card draws less power, and runs faster, on pictures of zeros."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (batch, image_size, image_size, 3)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator)
    return Pictures(images.to(device), labels.to(device), torch.arange(batch, device=device))


def starting_model(contestant: str, name: str, image_size: int, device: torch.device) -> nn.Module:
    """All contestants' have the same weights; timm's has nothing of this project's."""
    build = timm_model if contestant == "timm" else create_model
    torch.manual_seed(SEED)
    with device:  # initialised there: ViT-L takes seconds on the CPU
        return build(ModelConfig(name), CLASSES, image_size)


class Trainee:
    """A contestant: model, optimiser and pictures. Building it takes the first step, which compiles."""

    def __init__(self, name: str, model_name: str, options: TrainOptions, pictures: Pictures) -> None:
        self.name, self.compiled = name, options.compile
        self.device = pictures.images.device
        held = _memory_in_use(self.device)
        model = starting_model(name, model_name, options.image_size, self.device)
        self.injector = NoiseInjector(model, NOISE if name == "noisy" else NoiseConfig(), options.image_size, SEED)
        self.images, self.labels, self.sample_ids = pictures
        self.preprocess: Callable[[Tensor], Tensor]
        if name == "timm":
            self.images = self.images.permute(0, 3, 1, 2).contiguous()  # as timm collates them
            self.preprocess = _normalisation_of_timm(model, self.device, options.compile)
        else:
            self.preprocess = Preprocess(model, self.device, self.injector)
        self.loss_of = loss_function(model, DTYPES[options.dtype], options.compile)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
        self.steps_done = 0
        start = time.perf_counter()
        self.loss = self.step()
        self.first_loss = self.loss.item()
        self.first_step_seconds = time.perf_counter() - start
        self.peak_memory_bytes = self._peak_memory(held)

    def step(self) -> Tensor:
        """Returns the loss before the step, detached, without waiting for it."""
        if self.injector.sites:
            self.injector.set_batch(self.sample_ids, epoch=self.steps_done)
        loss = self.loss_of(self.preprocess(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        return loss.detach()

    def round(self, steps: int) -> int:
        for _ in range(steps):
            self.loss = self.step()
        wait_for(self.device)
        return steps * len(self.labels)

    def contestant(self, steps: int) -> Contestant:
        settings = {
            "timm": "timm's model as timm builds it; its PrefetchLoader's normalisation",
            "clean": "pipeline.models: create_model (patches by a product on a GPU) and Preprocess; no noise",
            "noisy": f"the same with {NOISE.describe()}; "
            f"{'kernels' if native.is_loaded(self.device.type) else 'NO KERNELS: the reference'}",
        }[self.name]
        how = "torch.compile of model and loss in one graph" if self.compiled else "eager"
        return Contestant(
            name=self.name,
            round=partial(self.round, steps),
            settings=f"{settings}; {how}; fused AdamW",
            output=lambda: FirstLoss(self.first_loss, bool(self.injector.sites)),
        )

    def _peak_memory(self, held: int) -> int | None:
        """Of one step, what was in use before this contestant was built left out. None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self.loss = self.step()
        wait_for(self.device)
        return torch.cuda.max_memory_allocated(self.device) - held


def _memory_in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _normalisation_of_timm(model: nn.Module, device: torch.device, compiled: bool) -> Callable[[Tensor], Tensor]:
    """uint8 (B, 3, H, W) -> float32, as timm's PrefetchLoader does it."""
    settings = timm_settings(model)
    mean, std = (torch.tensor(settings[name], device=device).view(3, 1, 1) * 255 for name in ("mean", "std"))

    def normalise(images: Tensor) -> Tensor:
        return (images.float() - mean) / std

    return torch.compile(normalise, fullgraph=True, dynamic=False) if compiled else normalise


def same_start(one: FirstLoss, other: FirstLoss) -> str | None:
    """All start from the same weights on the same pictures: without noise at the same loss, with it at another."""
    if one.noisy != other.noisy:
        return f"noise changes nothing: both start at a loss of {one.value}" if one.value == other.value else None
    if not abs(one.value - other.value) <= _SAME_LOSS:  # not: NaN
        return f"they start at losses of {one.value:.4f} and {other.value:.4f}"
    return None


def _print_model(rows: Sequence[dict[str, Any]]) -> None:
    print_table(*model_table(rows))


def model_table(rows: Sequence[dict[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """(title, header, a line for each contestant) of one model."""
    first = rows[0]
    header = ["contestant", "images/s", "over timm's", "MFU", "peak GB", "compile s", "aim"]
    lines = [
        [
            row["contestant"],
            _spread(row["items_per_second"], ",.0f" if row["items_per_second"]["median"] >= 100 else ".3g"),
            _spread(row["ratio"], ".3f"),
            "" if row["mfu"] is None else f"{100 * row['mfu']['median']:.1f} %",
            "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.1f}",
            "" if row["compile_seconds"] is None else f"{row['compile_seconds']:.0f}",
            "" if row["aim_images_per_second"] is None else f"{row['aim_images_per_second']:,}",
        ]
        for row in rows
    ]
    flops = first["flops_per_image"] / 1e9
    title = f"train: {first['part']}, batch {first['batch']}, {flops:.1f} GFLOP an image and step"
    return title, header, lines


def _spread(of: dict[str, float], form: str) -> str:
    return f"{of['median']:{form}} ({of['min']:{form}} to {of['max']:{form}})"


def _print_circumstances(rows: Sequence[dict[str, Any]], device: torch.device, path: Path) -> None:
    environment, conditions = rows[0]["environment"], rows[0]["conditions"]
    print(
        f"\nn = {conditions['rounds']} rounds of {conditions['steps']} steps in turn after a warm-up; "
        "median (lowest to highest); ratio of rates, turn by turn"
    )
    print(f"{environment['device']}, torch {environment['torch']}, timm {environment['timm']}; {conditions['dtype']}")
    if peak_of(device) is None:
        print(f"no MFU: the bfloat16 peak of {environment['device']} is not in the table of pipeline/flops.py")
    print("aim: of one NVIDIA H200; compile s: of the first step, in which nothing is compiled a second time")
    print(f"rows with versions, commit and command in {path}")
