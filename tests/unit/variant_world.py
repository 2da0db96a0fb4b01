"""A model of twelve classes, and twins of ImageNet's variants that it answers."""

import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small_shards import EXACT, jpeg

from pipeline import checkpoint as ckpt
from pipeline.config import TrainConfig
from pipeline.data.loader import DataConfig
from pipeline.models import ModelConfig
from pipeline.parallel import Ranks
from pipeline.sections import to_json
from pipeline.variants import RobustnessConfig, evaluate_variants
from pipeline.variants.classes import synsets, wordnet_classes

ALONE = Ranks(0, 1, launched=False)
CLASSES = tuple(f"n{1000 * i + 7:08d}" for i in range(12))  # twelve, so that as text 10 comes before 2
SUBSET = tuple(CLASSES[i] for i in (1, 2, 4, 7, 8, 10, 11))
PICTURES = 60
SEVERITIES = "12345"
MODEL = ModelConfig(name="vit_tiny_patch16_224", options={"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8})
IMAGENET = wordnet_classes(synsets("imagenet"), "it")
WNIDS = dict(enumerate(CLASSES))
ALL = list(range(12))
SOME = [CLASSES.index(name) for name in SUBSET]


class World:
    """Sixty pictures, and a model that answers them with most of twelve classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "pool").mkdir()
        for i in range(PICTURES):
            self.picture(i).write_bytes(jpeg(i))
        torch.manual_seed(0)
        model = timm.create_model(MODEL.name, num_classes=12, img_size=32, **MODEL.options).eval()
        mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        # EXACT's evaluation: the middle, half as wide, and nothing resized.
        middles = [np.asarray(Image.open(self.picture(i)))[16:48, 16:48] for i in range(PICTURES)]
        pixels = torch.from_numpy(np.stack(middles)).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            x = (pixels - mean) / std
            features = model.forward_head(model.forward_features(x), pre_logits=True)
            weight = torch.randn(12, features.shape[1]) / features.std(0)
            model.head.weight.copy_(weight)
            model.head.bias.copy_(-weight @ features.mean(0))
            self.logits = model(x).double().numpy()
        self.weights = model.state_dict()
        self.run = self.save("run", CLASSES)

    def picture(self, i: int) -> Path:
        return self.folder / "pool" / f"{i}.jpg"

    def save(self, name: str, classes: tuple[str, ...]) -> Path:
        """A run with one checkpoint, whose logits are of `classes`."""
        config = TrainConfig(run=self.folder / name, seed=4, model=MODEL, data=DataConfig(image_size=32), augment=EXACT)
        folder = ckpt.temporary_folder(config.run, 12)
        folder.mkdir(parents=True)
        save_file(self.weights, folder / ckpt.WEIGHTS_NAME)
        ckpt.write_json(folder / ckpt.CONFIG_NAME, to_json(config) | {"classes": list(classes), "step": 12})
        ckpt.publish_generation(config.run, 12, keep=2)
        return config.run

    def labels(self, seed: int, classes: list[int]) -> np.ndarray:
        """Of the pictures, int64 (60,): for about half the model's answer among `classes`; each has one."""
        own = np.array(classes)[self.logits[:, classes].argmax(1)]
        rng = np.random.RandomState(seed)
        labels = np.where(rng.rand(PICTURES) < 0.5, own, rng.choice(classes, PICTURES))
        labels[: len(classes)] = classes
        return labels

    def counts(self, labels: np.ndarray, classes: list[int] | None = None) -> tuple[int, int]:
        """(top-1, top-5) among the columns `classes`, by counting the logits above the label's."""
        logits = self.logits if classes is None else self.logits[:, classes]
        column = labels if classes is None else np.searchsorted(classes, labels)
        own = logits[np.arange(PICTURES), column]
        gaps = np.abs(logits - own[:, None])
        assert ((gaps == 0) | (gaps > 1e-4)).all(), "choose other pictures"
        rank = (logits > own[:, None]).sum(1)
        return int((rank == 0).sum()), int((rank < 5).sum())

    def lay(self, root: Path, labels: np.ndarray, folders: dict[int, str], name: str) -> Path:
        """Pictures as <root>/<folder of the label>/<name with its number>."""
        for i, label in enumerate(labels.tolist()):
            folder = root / folders[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name.format(i + 1)).symlink_to(self.picture(i))
        return root


def evaluated(world: World, output: Path, run: Path | None = None, batch: int = 7, **sets):
    config = RobustnessConfig(checkpoint=run or world.run, batch=batch, workers=1, output=output / "found.json", **sets)
    return evaluate_variants(config, ALONE)


def counted(row) -> tuple[int, int | None]:
    return row.correct_top1, row.correct_top5


def replace_logits(world: World, logits: np.ndarray) -> World:
    twin = object.__new__(World)
    twin.logits = logits
    return twin


def lay_validation(world: World, root: Path) -> tuple[Path, np.ndarray, Path]:
    """(class folders, labels, real.json), the published names; a third of the lists is empty, others have several."""
    labels = world.labels(6, ALL)
    rng = np.random.RandomState(6)
    lists = [
        sorted({label, *rng.choice(12, i % 3).tolist()}) if i % 3 else [] for i, label in enumerate(labels.tolist())
    ]
    (root / "real.json").write_text(json.dumps(lists))
    return world.lay(root / "val", labels, WNIDS, "ILSVRC2012_val_{:08d}.JPEG"), labels, root / "real.json"


def lay_sets(world: World, root: Path) -> Path:
    """One of each layout, under its usual name."""
    world.lay(root / "v2", world.labels(1, ALL), {i: str(i) for i in ALL}, "{}.jpeg")
    world.lay(root / "imagenet-a", world.labels(2, SOME), WNIDS, "{}.jpg")
    world.lay(root / "sketch", world.labels(3, ALL), WNIDS, "sketch_{}.JPEG")
    (root / "c" / "fog").mkdir(parents=True)
    for s in SEVERITIES:
        (root / "c" / "fog" / s).symlink_to(root / "sketch")
    (root / "empty").mkdir()
    return root
