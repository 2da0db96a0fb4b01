"""One pass of a model over a split: every picture once, over any number of ranks.

The headline is per image: no noise, so that a picture's answer does not change with the batch, the order or the other
pictures. What does change with them (a noise that mixes samples) is called transductive and stands with its protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipeline.accuracy import Accuracy, Order, accuracy_of
from pipeline.answers import Answers, answers_of, joined
from pipeline.data.batch import Batch, Reader
from pipeline.data.loader import EvaluationLoader
from pipeline.data.order import class_mate_share, class_order, shuffled_order
from pipeline.models import Preprocess
from pipeline.noise.inject import NoiseInjector
from pipeline.parallel import Ranks
from pipeline.precision import whole_float32


class Interrupted(Exception):
    """A pass that was given up, by all ranks: its counts mean nothing."""


class Evaluator:
    """A model, its preprocessing and its noise on one split; every rank gets the answers of all."""

    def __init__(
        self,
        model: nn.Module,
        injector: NoiseInjector,
        reader: Reader,
        batch: int,
        workers: int,
        half_dtype: torch.dtype | None = None,
        columns: np.ndarray | None = None,
    ) -> None:
        """half_dtype: of autocast, as in training; None computes in the weights' own format.

        columns: int64 (classes of the split,), the logits' columns that they are, in their order, where the split has
        some of the model's classes alone (ImageNet-A and -R). Errors: ValueError where they are not one for each class.
        """
        if columns is not None:
            _check_columns(columns, len(reader.classes))
        self.model = model
        self.injector = injector
        self.reader = reader
        self.batch = batch
        self.workers = workers
        self.half_dtype = half_dtype
        self.device = next(model.parameters()).device
        self.preprocess = Preprocess(model, self.device, injector)
        self.columns = None if columns is None else torch.from_numpy(columns).to(self.device)
        self._last_column = -1 if columns is None else int(columns.max())

    def per_image(self, ranks: Ranks, still_wanted: Callable[[], bool] = lambda: True) -> Accuracy:
        """The count of `alone`."""
        return accuracy_of(self.alone(ranks, still_wanted), "per_image", where=self.name_of)

    def alone(self, ranks: Ranks, still_wanted: Callable[[], bool] = lambda: True) -> Answers:
        """To every picture, with the noise off, whatever was trained with it: none depends on another picture.

        still_wanted and errors: as `answers`.
        """
        with self.injector.off():
            return self.answers(np.arange(len(self.reader)), 1, ranks, still_wanted)

    def with_noise(self, order: Order, seed: int, ranks: Ranks, by_class: np.ndarray | None = None) -> Accuracy:
        """The injector's noise, in the manifest's order, in class order or shuffled.

        by_class: sample ids, int64 (n,), class after class; None takes them by id within a class.
        """
        ids = np.arange(len(self.reader))
        labels = self.reader.labels_of(ids)
        if order == "class":
            ids = class_order(labels) if by_class is None else by_class
        elif order == "shuffled":
            ids = shuffled_order(len(labels), seed)
        noise = self.injector.config
        group = (noise.group_size or self.batch) if noise.mixes_samples else 1
        name = f"{noise.kind}_{noise.site_label}_{order}_k{group}"
        share = class_mate_share(labels[ids], group) if group > 1 else None
        answers = self.answers(ids, group, ranks)
        transductive = noise.mixes_samples
        return accuracy_of(answers, name, noise.describe(), order, group, share, transductive, self.name_of)

    @property
    def name_of(self) -> Callable[[int], str] | None:
        """What near ties are called, for accuracy_of; None in 16 bits, of whose rounding no bound is known."""
        return self.reader.where if self.half_dtype is None else None

    @torch.no_grad()
    def answers(
        self, ids: np.ndarray, group: int, ranks: Ranks, still_wanted: Callable[[], bool] = lambda: True
    ) -> Answers:
        """One pass over `ids` with the injector as it stands: each picture once over all ranks, all on every rank.

        ids: int64 (n,), in the order in which groups of `group` are formed; the answers come in that of sample ids.
        still_wanted: asked before each batch, by all ranks equally often, so it may be a collective that gives the same
        answer everywhere.
        Errors: Interrupted where it is not; ValueError for pictures without labels, or logits that are not finite.
        """
        self._check_labels(ids)
        was_training = self.model.training
        self.model.eval()
        loader = EvaluationLoader(self.reader, ids, self.batch, group, ranks.rank, ranks.world_size, self.workers)
        try:
            with whole_float32(self.half_dtype):
                own = joined(self._in_rounds(loader, still_wanted), len(ids))
        finally:
            self.model.train(was_training)
        return _gathered(own, ids, self.device, ranks)

    def _in_rounds(self, loader: EvaluationLoader, still_wanted: Callable[[], bool]) -> Iterator[Answers]:
        """Of this rank's batches, in as many rounds as any rank has."""
        batches = iter(loader)
        for _ in range(loader.most_batches):
            if not still_wanted():
                raise Interrupted
            if (batch := next(batches, None)) is not None:
                yield self._answers_to(batch)

    def _answers_to(self, batch: Batch) -> Answers:
        sample_ids, labels = batch.sample_ids.to(self.device), batch.labels.to(self.device)
        self.injector.set_batch(sample_ids, epoch=0)
        with torch.autocast(self.device.type, self.half_dtype, enabled=self.half_dtype is not None):
            logits = self.model(self.preprocess(batch.images))
        if self.columns is not None:
            if self._last_column >= (known := logits.shape[1]):
                raise ValueError(f"columns name class {self._last_column} of a model that has {known}: count from 0")
            logits = logits[:, self.columns]
        assert logits.shape[1] == len(self.reader.classes), f"{logits.shape[1]} logits, not one a class"
        return answers_of(logits, labels, sample_ids)

    def _check_labels(self, ids: np.ndarray) -> None:
        """Errors: ValueError where there is no picture, or one whose label is no class."""
        if not len(ids):
            raise ValueError("there is no picture to evaluate: name data that has some of the checkpoint's classes")
        labels = self.reader.labels_of(ids)
        wrong = (labels < 0) | (labels >= len(self.reader.classes))
        if wrong.any():
            first = self.reader.where(int(ids[wrong].min()))
            raise ValueError(
                f"{first}: {int(wrong.sum())} of {len(ids)} pictures, this one first, have no label: an accuracy needs "
                "one for each, so write the shards again from labelled pictures"
            )


def _check_columns(columns: np.ndarray, classes: int) -> None:
    if not len(columns):
        raise ValueError("the data has none of the model's classes: evaluate a model that knows some of them")
    named = len(set(columns.tolist()))
    if columns.min() < 0 or not named == len(columns) == classes:
        raise ValueError(f"{named} of the model's classes stand for the {classes} of the data: name one for each")


def _gathered(own: Answers, ids: np.ndarray, device: torch.device, ranks: Ranks) -> Answers:
    """All ranks' answers, in the order of sample ids, on every rank: columns with zeros elsewhere are summed."""
    in_order = np.sort(ids)
    assert np.isin(own.sample_ids, in_order).all(), "a picture was evaluated that was not asked for"
    place = np.searchsorted(in_order, own.sample_ids)
    seen = torch.from_numpy(np.bincount(place, minlength=len(ids)))
    columns = []
    for values in own.columns():
        column = np.zeros(len(ids), values.dtype)
        column[place] = values
        columns.append(torch.from_numpy(column))
    summed = [_summed(column, device, ranks).numpy() for column in (seen, *columns)]
    missed, repeated = int((summed[0] == 0).sum()), int((summed[0] > 1).sum())
    assert not missed and not repeated, f"{len(ids)} pictures exactly once: {missed} were missed, {repeated} repeated"
    return Answers(*summed[1:])


def _summed(column: torch.Tensor, device: torch.device, ranks: Ranks) -> torch.Tensor:
    if ranks.world_size == 1:
        return column
    column = column.to(device)
    dist.all_reduce(column)
    return column.cpu()
