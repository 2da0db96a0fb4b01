"""Run by itself: evaluate_ranks.py FOLDER. Evaluates small timm models in 1 to 4 ranks; a JSON line a pass in FOLDER.

Forks the ranks from one process that has imported everything: a start by torchrun costs ten seconds of imports.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "unit")]

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from numbers_reader import InMemoryPictures  # noqa: E402

from pipeline.accuracy import accuracy_of  # noqa: E402
from pipeline.evaluator import Evaluator, Interrupted  # noqa: E402
from pipeline.noise.config import NoiseConfig  # noqa: E402
from pipeline.noise.inject import NoiseInjector  # noqa: E402
from pipeline.parallel import Ranks  # noqa: E402

N, SIDE, CLASSES = 211, 16, 7  # a prime: nothing divides it
MOST_RANKS = 4
# (batch, workers): a rank may have no batch, or one of one picture.
PASSES = [(1, 0), (7, 3), (64, 1), (N + 1, 2)]


class Pictures(InMemoryPictures):
    """Coarse random pictures."""

    classes = tuple("abcdefg")

    def __init__(self) -> None:
        rng = np.random.RandomState(0)
        self.labels = rng.randint(0, CLASSES, N).astype(np.int64)
        self.pixels = rng.randint(0, 256, (N, 4, 4, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)


def model_of(name: str, reader: Pictures) -> torch.nn.Module:
    """A timm model without training, with a head that has learned the pictures a little."""
    torch.manual_seed(0)
    sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 48, "num_heads": 3, "depth": 2}
    model = timm.create_model(name, num_classes=CLASSES, **(sizes if name.startswith("vit") else {})).eval()
    x = (torch.from_numpy(reader.pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True).double()
        middle = features.mean(0)
        features = features - middle
        wanted = torch.nn.functional.one_hot(torch.from_numpy(reader.labels), CLASSES).double()
        ridge = 3e-2 * features.square().mean() * N * torch.eye(features.shape[1]).double()
        head = torch.linalg.solve(features.T @ features + ridge, features.T @ wanted)
        # The last class's weights are another's but for a rounding: whoever is answered one of them is a near tie.
        head[:, -1] = head[:, -2] * (1 + 2.0**-23 * torch.randn(len(head)).double())
        model.get_classifier().weight.copy_(20 * head.T)
        model.get_classifier().bias.copy_(-20 * middle @ head)
    return model


def one_pass(name: str, reader: Pictures, batch: int, workers: int, order: int, ranks: Ranks) -> dict:
    model = model_of(name, reader)
    own = Evaluator(model, NoiseInjector(model, NoiseConfig(), SIDE, 0), reader, batch, workers)
    ids = np.arange(N) if order == 0 else np.random.RandomState(order).permutation(N)
    answers = own.answers(ids, 1, ranks)
    ties = [tie.sample_id for tie in accuracy_of(answers, "x", where=own.name_of).near_ties]
    columns = {field.name: getattr(answers, field.name).tolist() for field in dataclasses.fields(answers)}
    if ranks.world_size > 1:
        everywhere: list = [None] * ranks.world_size
        dist.all_gather_object(everywhere, columns)
        assert all(other == columns for other in everywhere), "a rank has other answers"
    what = {"model": name, "ranks": ranks.world_size, "batch": batch, "workers": workers, "order": order}
    return what | {"top1": answers.top1, "top5": answers.top5, "near_ties": ties, "columns": columns}


def given_up(reader: Pictures, ranks: Ranks) -> bool:
    """Whether all ranks leave a pass together that one of them does not want any more."""
    model = model_of("vit_tiny_patch16_224", reader)
    asked = torch.zeros(1)

    def still_wanted() -> bool:
        asked.add_(1)
        wanted = torch.tensor(int(ranks.rank != 1 or asked.item() < 3))
        dist.all_reduce(wanted, dist.ReduceOp.MIN)
        return bool(wanted)

    try:
        own = Evaluator(model, NoiseInjector(model, NoiseConfig(), SIDE, 0), reader, 10, 0)
        own.alone(ranks, still_wanted)
    except Interrupted:
        return asked.item() == 3
    return False


def live(rank: int, world_size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(rank, world_size, launched=True)
    if world_size > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    reader, found = Pictures(), []
    for name in ("vit_tiny_patch16_224", "resnet10t"):
        for order, (batch, workers) in enumerate(PASSES):
            found.append(one_pass(name, reader, batch, workers, order, ranks))
    if world_size == 3:
        assert given_up(reader, ranks)
    if rank == 0:
        (folder / f"{world_size}.json").write_text(json.dumps(found))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(folder: Path) -> int:
    for world_size in range(1, MOST_RANKS + 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(world_size):
            if (pid := os.fork()) == 0:
                status = 1
                try:
                    live(rank, world_size, port, folder)
                    status = 0
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            pids.append(pid)
        if any([os.waitpid(pid, 0)[1] for pid in pids]):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
