"""The nine protocols on logits that are linear in the features, so that every answer can be worked out by hand."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sign_flips import flipped

from pipeline.answers import Answers, answers_of
from pipeline.audit.protocols import (
    Settings,
    averaged,
    round_robin,
    run_protocols,
    running_mean,
    victims_among_others,
)
from pipeline.audit.rows import Row, faults
from pipeline.audit.table import remarks
from pipeline.data.order import class_mate_share, class_order, shuffled_order
from pipeline.intervals import mcnemar, mean_interval, wilson
from pipeline.noise.config import NoiseConfig

N, CLASSES = 120, 6
NOISE = NoiseConfig("optimal_q", site="blocks.0", during="eval")
SETTINGS = Settings(ks=(4, 10), shuffles=3, victims=30)


class Linear:
    """A Respondent whose logits the noise mixes as it would mix the features."""

    def __init__(self, labels: np.ndarray, logits: np.ndarray) -> None:
        self.labels = labels
        self.plain_logits = torch.from_numpy(logits)

    def answers(self, noise: NoiseConfig, order: np.ndarray) -> Answers:
        ids = torch.from_numpy(order)
        mixed = torch.from_numpy(mix(self.plain_logits[ids].numpy(), noise))
        return answers_of(mixed, torch.from_numpy(self.labels)[ids], ids)


def mix(logits: np.ndarray, noise: NoiseConfig) -> np.ndarray:
    parts = []
    for start in range(0, len(logits), noise.group_size):
        group = logits[start : start + noise.group_size]
        if len(group) == 1:
            parts.append(group)
        elif noise.kind == "optimal_q":
            parts.append((group + group.sum(0)) / (len(group) + 1))
        else:
            parts.append((1 - noise.strength) * group + noise.strength * np.roll(group, -1, 0))
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def respondent() -> Linear:
    rng = np.random.RandomState(1)
    labels = rng.permutation(np.arange(N) % CLASSES).astype(np.int64)
    return Linear(labels, rng.normal(size=(N, CLASSES)) + 0.8 * np.eye(CLASSES)[labels])


@pytest.fixture(scope="module")
def rows(respondent) -> list[Row]:
    twin = answers_of(respondent.plain_logits.roll(1, 0), torch.from_numpy(respondent.labels), torch.arange(N))
    return run_protocols(respondent, [NOISE], SETTINGS, class_order(respondent.labels), twin)


def one(rows: list[Row], protocol: int, k: int = 1) -> Row:
    (found,) = [row for row in rows if (row.protocol, row.k) == (protocol, k)]
    return found


def right(respondent: Linear, order: np.ndarray, noise: NoiseConfig) -> np.ndarray:
    return mix(respondent.plain_logits.numpy()[order], noise).argmax(1) == respondent.labels[order]


def test_every_protocol_stands_in_its_order(rows):
    assert [(row.protocol, row.k) for row in rows] == [
        *((1, 1), (2, 1)),
        *((protocol, k) for protocol in (3, 4, 5, 6, 7, 8) for k in (4, 10)),
        (9, 1),
    ]
    assert all(row.transductive == (row.k > 1) for row in rows)


def test_noise_off_and_k_1_are_the_plain_count(rows, respondent):
    plain = int((respondent.plain_logits.numpy().argmax(1) == respondent.labels).sum())
    assert N / 3 < plain < N
    assert one(rows, 1).counts == one(rows, 2).counts == (plain,)
    assert one(rows, 1).interval == wilson(plain, N)
    assert one(rows, 2).differing == 0 and faults(rows) == []


@pytest.mark.parametrize("k", [4, 10])
def test_class_order_is_the_mixing_written_out(rows, respondent, k):
    order = np.argsort(respondent.labels, kind="stable")
    expected = right(respondent, order, replace(NOISE, group_size=k))
    row, plain = one(rows, 3, k), one(rows, 1)
    assert row.counts == (int(expected.sum()),)
    assert row.value > plain.value  # else this would show nothing
    assert row.class_mates == 1.0  # twenty of a class: 4 and 10 divide them
    before = respondent.plain_logits.numpy()[order].argmax(1) == respondent.labels[order]
    assert row.p == pytest.approx(flipped(expected, before, k), rel=1e-9)


@pytest.mark.parametrize("k", [4, 10])
def test_shuffled_gives_a_count_for_each_seed_and_student_s_interval(rows, respondent, k):
    orders = [shuffled_order(N, seed) for seed in range(3)]
    expected = [int(right(respondent, order, replace(NOISE, group_size=k)).sum()) for order in orders]
    row = one(rows, 4, k)
    assert row.counts == tuple(expected) and len(set(expected)) > 1
    assert row.value == pytest.approx(np.mean(expected) / N)
    assert row.interval == mean_interval([count / N for count in expected])
    before = respondent.plain_logits.numpy().argmax(1) == respondent.labels
    for order, p in zip(orders, row.seed_ps, strict=True):
        after = right(respondent, order, replace(NOISE, group_size=k))
        assert p == pytest.approx(flipped(after, before[order], k), rel=1e-9)
    assert row.spread == (min(expected) / N, max(expected) / N)
    assert row.class_mates == pytest.approx(np.mean([class_mate_share(respondent.labels[o], k) for o in orders]))


def test_voting_is_the_mean_of_plain_logits(rows, respondent):
    order = np.argsort(respondent.labels, kind="stable")
    means = respondent.plain_logits.numpy()[order].reshape(-1, 10, CLASSES).mean(1).repeat(10, axis=0)
    assert one(rows, 6, 10).counts == (int((means.argmax(1) == respondent.labels[order]).sum()),)
    voted, noisy = means.argmax(1) == respondent.labels[order], right(respondent, order, replace(NOISE, group_size=10))
    assert one(rows, 3, 10).p_voting == pytest.approx(flipped(voted, noisy, 10), rel=1e-9)
    before = respondent.plain_logits.numpy()[order].argmax(1) == respondent.labels[order]
    assert one(rows, 6, 10).p == pytest.approx(flipped(voted, before, 10), rel=1e-9)
    assert one(rows, 6, 10).noise is None and one(rows, 6, 10).transductive


def test_an_average_over_a_last_smaller_group_is_its_own():
    logits = torch.tensor([[1.0, 0], [3, 0], [5, 8]])
    assert averaged(logits, 2).tolist() == [[2, 0], [2, 0], [5, 8]]


def test_the_official_figure_is_the_mean_over_batches_of_the_accuracy_so_far(rows, respondent):
    assert running_mean(np.array([1, 1, 0, 0, 1], bool), 2) == pytest.approx((2 / 2 + 2 / 4 + 3 / 5) / 3)
    order = np.argsort(respondent.labels, kind="stable")
    answered, so_far, means = right(respondent, order, replace(NOISE, group_size=10)), 0, []
    for batch in range(N // 10):
        so_far += answered[10 * batch : 10 * batch + 10].sum()
        means.append(so_far / (10 * batch + 10))
    assert one(rows, 8, 10).value == pytest.approx(np.mean(means))
    assert one(rows, 8, 10).interval is None and one(rows, 8, 10).counts == ()


def test_any_k_in_a_row_are_of_k_classes_up_to_the_number_of_classes(rows, respondent):
    order = round_robin(respondent.labels, class_order(respondent.labels))
    assert sorted(order.tolist()) == list(range(N))
    labels = respondent.labels[order]
    assert all(len(set(labels[i : i + CLASSES])) == CLASSES for i in range(N - CLASSES + 1))
    assert one(rows, 5, 4).class_mates == 0.0 and one(rows, 5, 4).remark == ""
    assert one(rows, 5, 10).class_mates > 0 and "more pictures in a group than classes" in one(rows, 5, 10).remark


def test_round_robin_leaves_out_classes_that_are_used_up():
    labels = np.array([0, 0, 0, 0, 1, 2, 2])
    assert labels[round_robin(labels, class_order(labels))].tolist() == [0, 1, 2, 0, 2, 0, 0]


def test_a_victim_stands_among_others_of_one_class(respondent):
    order = victims_among_others(respondent.labels, 4, 30, seed=0)
    groups = order.reshape(30, 4)
    assert len(set(groups[:, 0].tolist())) == 30  # no victim twice
    for victim, *mates in groups.tolist():
        assert len({*mates}) == 3
        assert len({int(respondent.labels[mate]) for mate in mates}) == 1
        assert respondent.labels[mates[0]] != respondent.labels[victim]
    assert not np.array_equal(order, victims_among_others(respondent.labels, 4, 30, seed=1))
    assert len(victims_among_others(respondent.labels, 4, 10_000, seed=0)) == 4 * N


def test_victims_answered_as_their_mates_are_counted_beside_the_plain_answers(rows, respondent):
    order = victims_among_others(respondent.labels, 10, 30, 0)
    logits = respondent.plain_logits.numpy()
    swayed, off, only_swayed = 0, 0, 0
    for group in order.reshape(-1, 10):
        theirs = respondent.labels[group[1]]
        with_noise = (logits[group[0]] * 2 + logits[group[1:]].sum(0)).argmax() == theirs
        without = logits[group[0]].argmax() == theirs
        swayed, off, only_swayed = swayed + with_noise, off + without, only_swayed + (with_noise and not without)
    row = one(rows, 7, 10)
    assert (row.counts, row.beside, row.n) == ((swayed,), off, 30) and swayed > off
    assert row.beside_interval == wilson(off, 30) and row.class_mates == 0.0
    assert row.p == mcnemar(only_swayed, only_swayed - (swayed - off))


def test_victims_are_sought_among_all_pictures():
    """Only the last class has mates for another, so its own pictures are no victims: whatever the draw, two remain."""
    labels = np.array([0] * 50 + [1] * 2)
    for seed in range(5):
        order = victims_among_others(labels, 4, 2, seed)
        assert order.reshape(2, 4)[:, 0].tolist() in ([50, 51], [51, 50])


def test_small_classes_and_classes_that_are_used_up_are_remarked_on():
    labels = np.array([0] * 9 + [1] * 3 + [2] * 9)
    settings = Settings(ks=(5, 3, 2, 3), shuffles=1, victims=2)
    assert settings.ks == (2, 3, 5)
    found = run_protocols(Linear(labels, np.eye(3)[labels]), [NOISE], settings, class_order(labels))
    for protocol in (3, 6, 8):
        assert [one(found, protocol, k).remark for k in (2, 3)] == ["", ""]
        assert one(found, protocol, 5).remark == "classes of fewer than k pictures: groups mix classes"
    assert one(found, 5, 2).class_mates == 0 and one(found, 5, 2).remark == ""
    assert one(found, 5, 3).class_mates > 0 and "the smaller classes are used up" in one(found, 5, 3).remark
    assert "more pictures in a group than classes" in one(found, 5, 5).remark
    assert "3, 6, 8, k = 5: classes of fewer than k pictures: groups mix classes." in remarks(found)


def test_an_interval_of_shares_stays_within_0_and_1():
    row = Row(4, "shuffled", 2, "shuffled", counts=(10, 10, 8), n=10)
    assert mean_interval(row.values).high > 1 and row.interval.high == 1.0 and 0 < row.interval.low < 1


def test_no_class_with_enough_mates_is_said_and_not_run():
    labels = np.array([0] * 6 + [1] * 2)
    settings = Settings(ks=(4, 8), victims=9)
    found = run_protocols(Linear(labels, np.eye(2)[labels]), [NOISE], settings, class_order(labels))
    assert one(found, 7, 4).n == 2  # the two of class 1 alone have a class of three beside them
    row = one(found, 7, 8)
    assert not row.was_run and row.value is None and row.remark == "not run: no other class has 7 pictures"


def test_the_twin_is_compared_on_the_same_pictures(rows, respondent):
    own = respondent.plain_logits.numpy().argmax(1) == respondent.labels
    twin = np.roll(respondent.plain_logits.numpy(), 1, 0).argmax(1) == respondent.labels
    row = one(rows, 9)
    assert row.counts == (int(twin.sum()),)
    assert row.p == mcnemar(int((own & ~twin).sum()), int((twin & ~own).sum()))
    without = run_protocols(respondent, [NOISE], SETTINGS, class_order(respondent.labels))
    assert one(without, 9).remark.startswith("not run") and without[:-1] == rows[:-1]


class Broken(Linear):
    """At k = 1 no identity."""

    def answers(self, noise, order):
        found = super().answers(noise, order)
        if noise.group_size > 1:
            return found
        predicted = found.predicted.copy()
        predicted[:3] = (predicted[:3] + 1) % CLASSES
        return replace(found, predicted=predicted)


def test_a_k_1_that_is_no_identity_is_a_fault(respondent):
    broken = Broken(respondent.labels, respondent.plain_logits.numpy())
    found = run_protocols(broken, [NOISE], SETTINGS, class_order(respondent.labels))
    assert one(found, 2).differing == 3
    (line,) = faults(found)
    assert line.startswith("FAULT: optimal_q at blocks.0") and "3 of 120 answers differ" in line


def test_a_near_tie_that_rounding_turns_is_no_fault_but_is_told(respondent):
    logits = respondent.plain_logits.numpy().copy()
    logits[:3] = 1.0  # the first three pictures have nothing but ties
    found = run_protocols(Broken(respondent.labels, logits), [NOISE], SETTINGS, class_order(respondent.labels))
    assert one(found, 2).differing == 0 and one(found, 2).remark.startswith("3 more differ")
    assert faults(found) == []


def test_several_noises_have_their_own_rows(respondent):
    noises = [NOISE, NoiseConfig("circular_shift", 0.3, "blocks.1", "eval")]
    found = run_protocols(respondent, noises, SETTINGS, class_order(respondent.labels))
    assert [row.site for row in found if (row.protocol, row.k) == (3, 10)] == ["blocks.0", "blocks.1"]
    order = np.argsort(respondent.labels, kind="stable")
    shift = [row for row in found if (row.protocol, row.k, row.site) == (3, 10, "blocks.1")]
    assert shift[0].counts == (int(right(respondent, order, replace(noises[1], group_size=10)).sum()),)
    assert len([row for row in found if row.protocol in (1, 9)]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": ()}, "ks is empty"),
        ({"ks": (10, 0)}, "ks has 0"),
        ({"ks": (1,)}, "ks has 1: a group mixes at least 2"),
        ({"shuffles": 0}, "shuffles is 0"),
        ({"victims": 0}, "victims is 0"),
        ({"shuffle_seed": -1}, "shuffle_seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_fewer_pictures_than_k_and_noises_that_mix_nothing_are_refused(respondent):
    order = class_order(respondent.labels)
    with pytest.raises(ValueError, match=r"there are 120 pictures, fewer than k = 500: .*--ks"):
        run_protocols(respondent, [NOISE], Settings(ks=(2, 500)), order)
    for noise in (NoiseConfig("gaussian", 0.1, during="eval"), replace(NOISE, during="train")):
        with pytest.raises(ValueError, match="noises that mix pictures at inference"):
            run_protocols(respondent, [noise], SETTINGS, order)


def test_the_core_runs_where_little_is_installed():
    """The smallest GPU environment has torch, timm and numpy, and none of these."""
    missing = ("scipy", "tyro", "jinja2", "matplotlib", "rich", "tensorboard")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        "import numpy as np, torch\n"
        "from pipeline.answers import answers_of\n"
        "from pipeline.audit.protocols import Settings, run_protocols\n"
        "from pipeline.audit.verdict import verdict\n"
        "from pipeline.noise.config import NoiseConfig\n"
        "class Plain:\n"
        "    labels, plain_logits = np.arange(12) % 2, torch.eye(2)[torch.arange(12) % 2]\n"
        "    def answers(self, noise, order):\n"
        "        ids = torch.from_numpy(order)\n"
        "        return answers_of(self.plain_logits[ids], torch.from_numpy(self.labels)[ids], ids)\n"
        "noise = NoiseConfig('optimal_q', site='x', during='eval')\n"
        "rows = run_protocols(Plain(), [noise], Settings((2,)), np.argsort(Plain.labels, kind='stable'))\n"
        "print(len(verdict(rows)), [row.to_json()['interval'] for row in rows if row.protocol == 4])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[[1.0, 1.0]]")
