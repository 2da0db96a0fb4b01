"""A model on a split that answers to any order of its pictures: by its tail on kept features, or by whole passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.answers import Answers, answers_of, joined
from pipeline.audit.cut import Stage, first_stage, stages_of
from pipeline.audit.features import Features, bytes_of, check_room
from pipeline.data.batch import Reader
from pipeline.data.loader import EvaluationLoader
from pipeline.data.order import evaluation_batches
from pipeline.models import Preprocess
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector, site_shapes
from pipeline.precision import whole_float32

Tell = Callable[[str], None]
_Answered = Iterator[tuple[np.ndarray, Tensor]]  # sample ids int64 (B,), logits (B, classes)


@dataclass(frozen=True)
class Passes:
    """How pictures go through a model."""

    image_size: int
    seed: int
    """Of the noise: the checkpoint's."""
    batch: int
    workers: int
    scratch: Path
    """The folder whose disk holds the features."""
    keep_features: bool = True
    """Else every protocol is a pass through the whole model."""


@contextlib.contextmanager
def respondent_of(
    model: nn.Module, reader: Reader, sites: Sequence[str], passes: Passes, tell: Tell
) -> Iterator[ModelRespondent]:
    """The model, without any noise of its own, ready for noises at `sites` (as NoiseConfig.site names them).

    tell hears what is kept, and why where nothing is. Errors: ValueError for a site that there is not or logits that
    are not finite, OSError where the disk has no room.
    """
    respondent = ModelRespondent(model, reader, passes, tell)
    try:
        respondent.prepare(sites)
        yield respondent
    finally:
        respondent.close()


class ModelRespondent:
    """protocols.Respondent, in float32."""

    def __init__(self, model: nn.Module, reader: Reader, passes: Passes, tell: Tell) -> None:
        self.model = model.eval()
        self.reader = reader
        self.passes = passes
        self.tell = tell
        self.labels = reader.labels_of(np.arange(len(reader)))
        self.device = next(model.parameters()).device
        self.plain_logits = torch.empty(0)
        self.stages: tuple[Stage, ...] = ()
        self.places: dict[str, int] = {}  # NoiseConfig.site -> the stage before which its features were kept
        self._features: Features | None = None
        self._injector: NoiseInjector | None = None

    @torch.no_grad()
    def answers(self, noise: NoiseConfig, order: np.ndarray) -> Answers:
        """As protocols.Respondent has it; a noise at a site that was not prepared goes by whole passes."""
        injector = self._attached(noise)
        group = noise.group_size or self.passes.batch
        place = self.places.get(noise.site)
        passes = self._whole(order, group, injector) if place is None else self._tail(place, order, group, injector)
        injector.enabled = True
        try:
            with whole_float32():
                return joined((self._answers_to(ids, logits) for ids, logits in passes), len(order))
        finally:
            injector.enabled = False

    @torch.no_grad()
    def prepare(self, sites: Sequence[str]) -> None:
        """The clean pass: plain logits of every picture, and its features before each site where the model is known."""
        self._find_places(sites)
        logits: Tensor | None = None
        loader = self._loader(np.arange(len(self.reader)), 1)
        preprocess = Preprocess(self.model, self.device, NoiseInjector(self.model, NoiseConfig(), 0, 0))
        with whole_float32():
            for batch in loader:
                x, ids = preprocess(batch.images), batch.sample_ids.numpy()
                if not self.places:
                    answer = self.model(x)
                else:
                    answer = self._begin(x, ids) if logits is None else self._keep(x, ids)
                if logits is None:
                    logits = torch.empty(len(self.reader), answer.shape[1])
                logits[batch.sample_ids] = answer.float().cpu()
        assert logits is not None, "a split has pictures"
        self.plain_logits = logits

    def close(self) -> None:
        """Lets the features go, and takes the noise off the model."""
        if self._features is not None:
            self._features.close()
        if self._injector is not None:
            self._injector.remove()
        self._features, self._injector, self.places = None, None, {}

    def _attached(self, noise: NoiseConfig) -> NoiseInjector:
        """The noise on the model, alone. It stays, switched off, for the next k: to find its place anew costs more than
        the tail's pass over a few hundred pictures.
        """
        if self._injector is None or replace(self._injector.config, group_size=noise.group_size) != noise:
            if self._injector is not None:
                self._injector.remove()
            self._injector = NoiseInjector(self.model, noise, self.passes.image_size, self.passes.seed)
        self._injector.config = noise
        return self._injector

    def _find_places(self, sites: Sequence[str]) -> None:
        modules = {site: tuple(self._modules_of(site)) for site in sites}
        if not self.passes.keep_features:
            return
        stages = stages_of(self.model, {name for names in modules.values() for name in names})
        for site, names in modules.items():
            if stages is None:
                why = f"the parts of a {type(self.model).__name__} are not known"
            elif (place := first_stage(stages, names)) is None:
                why = "nothing comes before it"
            else:
                self.stages, self.places[site] = stages, place
                continue
            self.tell(f"no features are kept for {site} ({why}): each protocol there passes through the whole model")

    def _modules_of(self, site: str) -> Iterator[str]:
        patterns = NoiseConfig(site=site).site_patterns
        yield from site_shapes(self.model, patterns, self.passes.image_size)

    def _begin(self, x: Tensor, ids: np.ndarray) -> Tensor:
        """As _keep, of the first batch: it shows what room is needed, and whether the parts are the model, to the bit.

        Where they are not, no features are kept.
        """
        found, y = {}, x
        for number, stage in enumerate(self.stages):
            if number in self.places.values():
                found[number] = y
            y = stage.run(y)
        shapes = {place: tuple(features.shape[1:]) for place, features in found.items()}
        needed = bytes_of(len(self.reader), list(shapes.values()))
        at = ", ".join(f"{site} {shapes[place]}" for site, place in self.places.items())
        self.tell(
            f"features of {len(self.reader):,} pictures before {at}: {needed / 1e9:,.2f} GB in {self.passes.scratch}"
        )
        check_room(self.passes.scratch, needed)
        self._features = Features(len(self.reader), shapes, self.passes.scratch)
        for place, features in found.items():
            self._features.put(place, ids, features)
        whole = self.model(x)
        if not torch.equal(y, whole) or not all(torch.equal(self._run(place, ids), whole) for place in shapes):
            self.close()
            self.tell(
                f"WARNING: the parts of this {type(self.model).__name__} do not give what the whole model gives: no "
                "features are kept, each protocol passes through the whole model"
            )
        return whole

    def _keep(self, x: Tensor, ids: np.ndarray) -> Tensor:
        """Logits (B, classes) of preprocessed pictures x (B, 3, H, W); their features are kept on the way."""
        assert self._features is not None
        for number, stage in enumerate(self.stages):
            if number in self.places.values():
                self._features.put(number, ids, x)
            x = stage.run(x)
        return x

    def _run(self, place: int, ids: np.ndarray) -> Tensor:
        """Logits (B, classes) from kept features."""
        assert self._features is not None
        x = self._features.get(place, ids).to(self.device)
        for stage in self.stages[place:]:
            x = stage.run(x)
        return x

    def _tail(self, place: int, order: np.ndarray, group: int, injector: NoiseInjector) -> _Answered:
        for ids in evaluation_batches(order, self.passes.batch, group, rank=0, world_size=1):
            injector.set_batch(torch.from_numpy(ids).to(self.device), epoch=0)
            yield ids, self._run(place, ids)

    def _whole(self, order: np.ndarray, group: int, injector: NoiseInjector) -> _Answered:
        preprocess = Preprocess(self.model, self.device, injector)
        for batch in self._loader(order, group):
            injector.set_batch(batch.sample_ids.to(self.device), epoch=0)
            yield batch.sample_ids.numpy(), self.model(preprocess(batch.images))

    def _loader(self, order: np.ndarray, group: int) -> EvaluationLoader:
        return EvaluationLoader(self.reader, order, self.passes.batch, group, 0, 1, self.passes.workers)

    def _answers_to(self, ids: np.ndarray, logits: Tensor) -> Answers:
        return answers_of(logits, torch.from_numpy(self.labels[ids]), torch.from_numpy(ids))
