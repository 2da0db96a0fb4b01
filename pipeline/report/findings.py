"""What finished runs and their evaluations found, read and checked against each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.accuracy import Accuracy
from pipeline.checkpoint import CONFIG_NAME, WEIGHTS_NAME, latest_generation, recorded_sha256
from pipeline.config import TrainConfig
from pipeline.evaluate import EvaluateConfig
from pipeline.intervals import Interval
from pipeline.metrics import METRICS_NAME
from pipeline.sections import from_json

GROUP_SIZE = 10  # part of the names in results.json


@dataclass(frozen=True)
class Run:
    """A finished run: its configuration, what its results.json says, and its lines of metrics."""

    folder: Path
    generation: Path
    config: TrainConfig
    results: dict[str, Any]
    accuracy: Accuracy
    metrics: list[dict[str, float]]
    num_classes: int

    @property
    def logged(self) -> list[dict[str, float]]:
        """The lines with a training loss."""
        return [line for line in self.metrics if "train/loss" in line]

    @property
    def validated(self) -> list[dict[str, float]]:
        """The lines with a validation."""
        return [line for line in self.metrics if "val/top1" in line]

    @property
    def throughput(self) -> tuple[float, float]:
        """(images a second, share of time waiting for data) over all logged windows, each weighed by its length."""
        images = seconds = waited = 0.0
        last = 0.0
        for line in self.metrics:
            if "train/loss" in line:
                window = (line["step"] - last) * self.config.global_batch
                images += window
                seconds += window / line["train/images_per_second"]
                waited += window / line["train/images_per_second"] * line["train/data_wait_share"]
            last = line["step"]  # a validation begins a new window too
        return images / seconds, waited / seconds


def percent(share: float | None, digits: int = 2) -> str:
    """A share from 0 to 1 as text; nothing for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"


@dataclass(frozen=True)
class Evaluation:
    """One JSON of `python -m pipeline evaluate`: per image, and one noise in both orders."""

    path: Path
    config: EvaluateConfig
    environment: dict[str, str]
    per_image: Accuracy
    class_ordered: Accuracy
    shuffled: Accuracy


@dataclass(frozen=True)
class Row:
    """One accuracy of the report. `key` is its top-1's name in results.json."""

    key: str
    label: str
    accuracy: Accuracy
    num_classes: int

    @property
    def interval(self) -> Interval:
        """95 %, Wilson's."""
        return self.accuracy.top1_interval

    @property
    def top5(self) -> float | None:
        """None where five answers or fewer are all there are."""
        return self.accuracy.top5 if self.num_classes > 5 else None

    def also(self, name: str) -> str:
        """The key of another figure of the same row."""
        return self.key.replace("top1", name)


@dataclass(frozen=True)
class Findings:
    """Everything the report is made of, read and checked against each other."""

    pretrain: Run
    finetune: Run
    last_block: Evaluation
    official_place: Evaluation

    @property
    def rows(self) -> list[Row]:
        """The headline first."""
        classes = self.pretrain.num_classes
        rows = [Row("top1_per_image", "per image, noise off", self.last_block.per_image, classes)]
        for suffix, place, evaluation in (
            ("", "last block, all tokens", self.last_block),
            ("_official_place", "official place", self.official_place),
        ):
            key = f"k{GROUP_SIZE}{suffix}"
            rows += [
                Row(f"top1_class_ordered_{key}", f"{place}, class order", evaluation.class_ordered, classes),
                Row(f"top1_shuffled_{key}", f"{place}, shuffled", evaluation.shuffled, classes),
            ]
        label = "fine-tuned, per image, noise off"
        return [*rows, Row("finetune_top1", label, self.finetune.accuracy, self.finetune.num_classes)]

    @property
    def environments(self) -> dict[str, dict[str, str]]:
        return {
            "pretraining": self.pretrain.results["environment"],
            "fine-tuning": self.finetune.results["environment"],
            "last block": self.last_block.environment,
            "official place": self.official_place.environment,
        }

    @property
    def logdir(self) -> Path:
        """The nearest folder that holds both runs: what TensorBoard is pointed at."""
        other = self.finetune.folder.resolve().parents
        return next(path for path in self.pretrain.folder.resolve().parents if path in other)

    @property
    def meaning(self) -> str:
        """What the table says, in one sentence."""
        ordered, shuffled = self.last_block.class_ordered, self.last_block.shuffled
        return (
            f"The figures with noise are transductive (they depend on the other pictures of a group of {GROUP_SIZE}): "
            f"in class order, where {percent(ordered.class_mate_share, 1)} of a picture's group mates are of its own "
            f"class, the answers rest on those mates too (shuffled, {percent(shuffled.class_mate_share, 1)} are); "
            f"a picture on its own gets the per-image {percent(self.last_block.per_image.top1)}."
        )


def read_findings(pretrain: Path, finetune: Path, last_block: Path, official_place: Path) -> Findings:
    """Two run folders and the two evaluations of the first one's latest checkpoint.

    Errors: FileNotFoundError, ValueError, naming the file and the mend.
    """
    trained = read_run(pretrain)
    evaluations = [_read_evaluation(path, trained) for path in (last_block, official_place)]
    _check_sites(*evaluations)
    counts = [(e.per_image.correct_top1, e.per_image.num_images) for e in evaluations]
    if counts[0] != counts[1]:
        raise ValueError(
            f"{last_block} has {counts[0][0]} of {counts[0][1]} pictures right per image, {official_place} has "
            f"{counts[1][0]} of {counts[1][1]}: evaluate both again, on the same data"
        )
    return Findings(trained, read_run(finetune), *evaluations)


def _read_json(path: Path, keys: Sequence[str], mend: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: {mend}")
    try:
        body = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {mend}") from error
    if not isinstance(body, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): {mend}")
    if missing := [key for key in keys if key not in body]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: {mend}")
    return body


def read_run(folder: Path) -> Run:
    """A finished run. Errors: FileNotFoundError, ValueError, naming the file and the mend."""
    mend = "train there to the end (the same command goes on), or name another run folder"
    path = folder / "results.json"
    keys = ("per_image", "steps", "world_size", "engine", "strategy", "noise", "environment")
    results = _read_json(path, (*keys, "noise_description", "num_train_images", "num_eval_images"), mend)
    generation = latest_generation(folder)
    if generation is None:
        raise FileNotFoundError(f"{folder} holds no finished checkpoint: {mend}")
    saved = _read_json(generation / CONFIG_NAME, ("classes", "step"), mend)
    if saved["step"] != results["steps"]:
        raise ValueError(f"{path} is of step {results['steps']}, the latest checkpoint of step {saved['step']}: {mend}")
    config = from_json(TrainConfig, _read_json(folder / CONFIG_NAME, (), mend), str(folder / CONFIG_NAME))
    metrics = list(_read_metrics(folder / METRICS_NAME, mend))
    accuracy = _accuracy(results["per_image"], path, mend)
    return Run(folder, generation, config, results, accuracy, metrics, len(saved["classes"]))


def _read_metrics(path: Path, mend: str) -> Iterator[dict[str, float]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: {mend}")
    seen: set[str] = set()
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            line["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged: {mend}") from error
        seen |= line.keys()
        yield line
    wanted = ("train/loss", "train/epoch", "train/images_per_second", "train/data_wait_share", "val/top1")
    if missing := [tag for tag in wanted if tag not in seen]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: {mend}")


def _read_evaluation(path: Path, pretrain: Run) -> Evaluation:
    mend = "write it again with `python -m pipeline evaluate --output`"
    body = _read_json(path, ("checkpoint", "weights_sha256", "config", "accuracies", "environment"), mend)
    evaluated = Path(body["checkpoint"])
    if evaluated.resolve() != pretrain.generation.resolve():
        raise ValueError(
            f"{path} is of the checkpoint {evaluated}, the latest of the pretraining is {pretrain.generation}: {mend}"
        )
    if body["weights_sha256"] != recorded_sha256(pretrain.generation, WEIGHTS_NAME):
        raise ValueError(f"{path} is of earlier weights than those that {pretrain.generation} holds now: {mend}")
    config = from_json(EvaluateConfig, body["config"], f"{path}: config")
    found = {a.order: a for a in (_accuracy(item, path, mend) for item in body["accuracies"])}
    if missing := {"manifest", "class", "shuffled"} - found.keys():
        raise ValueError(f"{path} has no result in {' and '.join(sorted(missing))} order: {mend} and a --noise.kind")
    for order in ("class", "shuffled"):
        if found[order].group_size != GROUP_SIZE:
            k = found[order].group_size
            raise ValueError(f"{path} is of groups of {k}: {mend} and --noise.group-size {GROUP_SIZE}")
    return Evaluation(path, config, body["environment"], found["manifest"], found["class"], found["shuffled"])


def _accuracy(body: Any, path: Path, mend: str) -> Accuracy:
    if not isinstance(body, dict):
        raise ValueError(f"{path} is damaged (an accuracy is no object): {mend}")
    try:
        return Accuracy.from_json(body, str(path))
    except ValueError as error:
        raise ValueError(f"{error}: {mend}") from error


def _check_sites(last: Evaluation, official: Evaluation) -> None:
    """The names in results.json say where the noise is, so it must be there."""
    noise = last.config.noise
    if noise.spare_prefix_tokens or not noise.site.startswith("blocks.") or noise.site.count(".") != 1:
        raise ValueError(
            f"{last.path} has the noise {noise.describe()}: evaluate again with it at the last `blocks.N` "
            "and --noise.no-spare-prefix-tokens"
        )
    place = official.config.noise
    if not place.spare_prefix_tokens or place.site != f"{noise.site}.attn":
        raise ValueError(
            f"{official.path} has the noise {place.describe()}: evaluate again with it at {noise.site}.attn "
            "and --noise.spare-prefix-tokens"
        )
