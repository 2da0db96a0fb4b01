"""dS of a noise by the paper's definition, beside the information that a checkpoint's features are measured to hold.

By definition the entropy change of a linear noise depends on its matrix alone, so that it says nothing of a model. What
a model's features say of the labels is measured: I(Y;Z) with the noise off and I(Y;Z+e) with it on, of one sample's
label and the same sample's features. Where definition and measurement disagree, the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.accuracy import Order
from pipeline.checkpoint import WEIGHTS_NAME, recorded_sha256, write_json
from pipeline.data.batch import Reader
from pipeline.data.cache import CacheConfig
from pipeline.data.loader import EvaluationLoader, load_manifest, open_split
from pipeline.data.order import class_mate_share, class_order, shuffled_order
from pipeline.models import Preprocess
from pipeline.noise import entropy
from pipeline.noise.config import IMAGE_SITE, LINEAR_KINDS, NoiseConfig
from pipeline.noise.entropy import Interval
from pipeline.noise.inject import NoiseInjector
from pipeline.parallel import Ranks, join_ranks, snapshot_environment
from pipeline.result_file import SAMPLES_KEY, result_file
from pipeline.sections import to_json
from pipeline.trained import Checkpoint, load_model, open_checkpoint, require_classes, run_folder

_IMAGE_GRID = 4  # pictures are averaged over 4 x 4 fields: their mean colour alone would say too little

CAVEATS = (
    "dS of a linear noise depends on Q alone, not on the model or the data: halving the features of a group of {k} "
    "would be 'positive' too (dS = {halving:.4g} nats a feature), and an invertible I+Q leaves I(Y;Z) of the whole "
    "group unchanged. One sample's own I(Y;Z) can rise only by what its group's other samples say of its label.",
    "Measured information is of the principal axes of pooled features, and so at most that of the features.",
)


@dataclass(frozen=True)
class EntropyConfig:
    """Measures what a noise does to the information in a checkpoint's features, beside dS by the paper's definition."""

    checkpoint: Path
    """A run folder (its latest checkpoint) or one checkpoint in it."""
    data: str
    """The manifest of the split whose pictures are measured."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """The noise, whatever its `during`. Without one, the checkpoint's own."""
    levels: tuple[float, ...] = ()
    """Strengths to measure in place of `noise.strength`."""
    group_sizes: tuple[int, ...] = ()
    """Group sizes k to measure in place of `noise.group_size`."""
    orders: tuple[Literal["class", "shuffled"], ...] = ("class", "shuffled")
    """Orders in which a noise that mixes samples is measured."""
    shuffle_seed: int = 0
    axes: int = 32
    """The most principal axes of the pooled features to measure; fewer where there are too few pictures of a class."""
    format: Literal["wds", "ffcv"] = "wds"
    batch: int = 250
    workers: int = 2
    output: Path | None = None
    """The JSON file of the result; by default in the run folder, named after step, split and noise."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """For data in a store, on this machine; the checkpoint's was the training machine's."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("workers", 0), ("axes", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}: at least {least}")
        if not self.orders:
            raise ValueError("orders is empty: name class, shuffled, or both")


@dataclass(frozen=True)
class InformationRow:
    """One noise at one level, k and order. Informations in nats of one sample; `entropy_change_nats` as `per` says."""

    kind: str
    level: float | None
    k: int
    order: Order
    class_mate_share: float | None
    transductive: bool
    num_images: int
    axes: int
    entropy_change_nats: float
    per: str
    positive: bool
    label_entropy_nats: float
    clean: Interval
    noisy: Interval
    change: Interval
    clean_probe_bound: Interval
    noisy_probe_bound: Interval

    @property
    def name(self) -> str:
        level = "" if self.level is None else f" {self.level:g}"
        return f"{self.kind}{level}" + (f", k = {self.k}, {self.order}" if self.transductive else "")

    @property
    def verdict(self) -> str:
        return "positive" if self.positive else "harmful"

    @property
    def disagreement(self) -> str | None:
        """The sentence that says so where definition and measurement disagree."""
        rose = self.change.low > 0
        if rose == self.positive:
            return None
        by = f"{self.change.nats:+.3f} nats, from {self.change.low:+.3f} to {self.change.high:+.3f}"
        moved = "rose" if rose else "fell" if self.change.high < 0 else "did not rise beyond its interval"
        return (
            f"{self.name}: {self.verdict} by definition (dS = {self.entropy_change_nats:.4g}), but the measured "
            f"information of a sample's features on its label {moved} ({by}; the probe's bound went from "
            f"{self.clean_probe_bound.nats:.3f} to {self.noisy_probe_bound.nats:.3f})."
        )

    def to_json(self) -> dict[str, Any]:
        return to_json(self) | {"disagreement": self.disagreement}


class SiteFeatures:
    """A model on one split: the pooled features that arrive at the noise's site, with the noise off or on."""

    def __init__(self, model: nn.Module, injector: NoiseInjector, reader: Reader, batch: int, workers: int) -> None:
        if len(injector.sites) != 1:
            names = ", ".join(site.name for site in injector.sites[:3])
            raise ValueError(f"noise.site means {len(injector.sites)} places ({names}...): name one")
        self.model = model
        self.injector = injector
        self.reader = reader
        self.batch = batch
        self.workers = workers
        self.site = injector.sites[0]
        self.entries_pooled = 0  # entries of the site's input in one pooled feature, known after a pass
        self._pooled: Tensor | None = None

    @torch.no_grad()
    def collect(self, order: np.ndarray, group: int) -> np.ndarray:
        """float64 (n, d): row i is sample i's, whatever the order it came in. Errors: ValueError if not finite."""
        device = next(self.model.parameters()).device
        preprocess = Preprocess(self.model, device, self.injector)
        module = self.model if self.site.name == IMAGE_SITE else self.model.get_submodule(self.site.name)
        handle = module.register_forward_pre_hook(self._keep)  # after the injector's: it sees the noise
        self.model.eval()
        rows: list[np.ndarray] = []
        ids: list[np.ndarray] = []
        try:
            for batch in EvaluationLoader(self.reader, order, self.batch, group, 0, 1, self.workers):
                self.injector.set_batch(batch.sample_ids.to(device), epoch=0)
                self.model(preprocess(batch.images))
                assert self._pooled is not None, f"nothing arrived at {self.site.name}"
                rows.append(self._pooled.cpu().numpy())
                ids.append(batch.sample_ids.numpy())
        finally:
            handle.remove()
        found = np.concatenate(rows)
        features = np.empty_like(found)
        features[np.concatenate(ids)] = found
        if not np.isfinite(features).all():
            sample = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise ValueError(f"the features of sample {sample} at {self.site.name} are not finite: mend the checkpoint")
        return features

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._pooled, self.entries_pooled = pool(args[0], self.site.first_token, self.site.name == IMAGE_SITE)


def pool(x: Tensor, first_token: int, image: bool) -> tuple[Tensor, int]:
    """Features float64 (B, d) of a site's input, and how many entries make one: means, so white noise stays white.

    x: (B, N, C) -> mean over the tokens that the noise touches; (B, C, H, W), or (B, H, W, C) where that is square
    -> mean over places; pictures over fields of a grid; (B, C) as it is. Errors: ValueError for other shapes.
    """
    x = x.detach().double()
    if x.ndim == 2:
        return x, 1
    if x.ndim == 3:
        return x[:, first_token:].mean(dim=1), x.shape[1] - first_token
    if x.ndim != 4:
        raise ValueError(f"noise.site gets {tuple(x.shape)}: measure at (B, N, C), (B, C, H, W) or (B, C)")
    if image:
        rows, columns = (math.gcd(side, _IMAGE_GRID) for side in x.shape[2:])
        fields = x.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
        return fields.mean(dim=(3, 5)).flatten(1), fields.shape[3] * fields.shape[5]
    places = (1, 2) if x.shape[1] == x.shape[2] != x.shape[3] else (2, 3)
    return x.mean(dim=places), x.shape[places[0]] * x.shape[places[1]]


def definition(noise: NoiseConfig, k: int, joint: np.ndarray, axes: int, entries_pooled: int) -> tuple[float, str]:
    """dS in nats, and of what: PAPER.md, section 4.

    joint: covariance of `axes` clean features and the labels (entropy.covariance_of); read for Gaussian noise alone,
    whose variance in a mean over entries is that much smaller.
    """
    level = noise.strength or 0.0
    if noise.kind == "gaussian":
        return entropy.gaussian_change(joint, axes, level**2 / entries_pooled), f"sample ({axes} features)"
    if noise.kind == "salt_and_pepper":
        return entropy.salt_and_pepper_change(level), "entry"
    if noise.kind == "circular_shift":
        return entropy.circular_shift_change(level, k), "group of k and feature"
    assert noise.kind == "optimal_q", noise.kind
    return entropy.optimal_q_change(k), "group of k and feature"


def measure(site: SiteFeatures, config: EntropyConfig) -> list[InformationRow]:
    """A row for each order in which the injector's noise is measured; one where the noise does not mix samples."""
    n = len(site.reader)
    labels = site.reader.labels_of(np.arange(n))
    noise = site.injector.config
    with site.injector.off():
        clean = site.collect(np.arange(n), 1)
    group = min((noise.group_size or site.batch) if noise.mixes_samples else 1, n)
    orders: tuple[Order, ...] = config.orders if noise.mixes_samples else ("manifest",)
    rows = []
    for order in orders:
        ids = np.arange(n)
        if order != "manifest":
            ids = class_order(labels) if order == "class" else shuffled_order(n, config.shuffle_seed)
        rows.append(_row(site, config, clean, site.collect(ids, group), order, ids, group))
    return rows


def _row(
    site: SiteFeatures,
    config: EntropyConfig,
    clean: np.ndarray,
    noisy: np.ndarray,
    order: Order,
    ids: np.ndarray,
    k: int,
) -> InformationRow:
    """Clean and noisy (n, d) on the same axes and in the same folds, so that their difference is the noise's."""
    labels, noise = site.reader.labels_of(np.arange(len(ids))), site.injector.config
    groups = np.empty(len(ids), np.int64)
    groups[ids] = np.arange(len(ids)) // k
    most = min(config.axes, entropy.most_axes(int(groups.max()) + 1, len(np.unique(labels))))
    axes = entropy.principal_axes(clean, most)
    clean, noisy = clean @ axes, noisy @ axes
    seed = config.shuffle_seed
    before, after, change = entropy.information_change(clean, noisy, labels, groups, seed)
    joint = entropy.covariance_of(clean, labels)
    entropy_change, per = definition(noise, k, joint, axes.shape[1], site.entries_pooled)
    return InformationRow(
        kind=noise.kind,
        level=noise.strength,
        k=k,
        order=order,
        class_mate_share=class_mate_share(labels[ids], k) if k > 1 else None,
        transductive=noise.mixes_samples,
        num_images=len(ids),
        axes=axes.shape[1],
        entropy_change_nats=entropy_change,
        per=per,
        positive=entropy.is_positive(entropy_change),
        label_entropy_nats=entropy.label_entropy(labels),
        clean=before,
        noisy=after,
        change=change,
        clean_probe_bound=entropy.probe_bound(clean, labels, groups, seed),
        noisy_probe_bound=entropy.probe_bound(noisy, labels, groups, seed),
    )


def caveats(rows: list[InformationRow]) -> list[str]:
    """What the definition does not say, in sentences; it stands beside every table."""
    k = max([row.k for row in rows if row.kind in LINEAR_KINDS], default=2)
    return [text.format(k=k, halving=entropy.scaling_change(0.5, k)) for text in CAVEATS]


def noises(config: EntropyConfig, own: NoiseConfig) -> Iterator[NoiseConfig]:
    """Each noise to measure: the named one or the checkpoint's own, at each level and group size.

    Errors: ValueError where there is none, or for a level that it cannot have.
    """
    noise = own if config.noise.kind == "none" else config.noise
    if noise.kind == "none":
        raise ValueError("noise.kind is none, and the checkpoint was trained without noise: name a noise to measure")
    # The level that evaluation has: that of the end of training.
    last = None if noise.strength is None else noise.strength_at(1.0)
    for level in config.levels or (last,):
        for group_size in config.group_sizes or (noise.group_size,):
            yield replace(noise, strength=level, end_strength=None, group_size=group_size, during="eval")


def measure_information(config: EntropyConfig, ranks: Ranks) -> list[InformationRow]:
    """The table of one checkpoint and split, written as JSON too. Errors: ValueError naming the option and the mend."""
    if ranks.world_size > 1:
        raise ValueError(f"entropy runs in one process, here are {ranks.world_size} ranks: start it without torchrun")
    checkpoint = open_checkpoint(config.checkpoint)
    wanted = list(noises(config, checkpoint.noise))
    data = replace(checkpoint.data, format=config.format, workers=config.workers, cache=config.cache)
    reader = open_split(config.data, data, checkpoint.augment.for_evaluation(), checkpoint.seed)
    require_classes(config.data, reader.classes, checkpoint)
    output = result_file(config.output, _default_output(config, checkpoint, wanted[0]), reader.samples_sha256)
    model = load_model(checkpoint).to(join_ranks(ranks))
    rows = []
    for noise in wanted:
        injector = NoiseInjector(model, noise, data.image_size, checkpoint.seed)
        rows += measure(SiteFeatures(model, injector, reader, config.batch, config.workers), config)
        injector.remove()
    report = _report(config, checkpoint, wanted[0], rows)
    write_json(output, {SAMPLES_KEY: reader.samples_sha256} | report)
    return rows


def _default_output(config: EntropyConfig, checkpoint: Checkpoint, noise: NoiseConfig) -> Path:
    split = load_manifest(config.data, config.cache).split
    return run_folder(checkpoint) / f"entropy_step{checkpoint.step}_{split}_{noise.kind}_{noise.site_label}.json"


def _report(
    config: EntropyConfig, checkpoint: Checkpoint, noise: NoiseConfig, rows: list[InformationRow]
) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "weights_sha256": recorded_sha256(checkpoint.folder, WEIGHTS_NAME),
        "config": to_json(config),
        "noise": to_json(noise),
        "rows": [row.to_json() for row in rows],
        "caveats": caveats(rows),
        "environment": snapshot_environment(),
    }
