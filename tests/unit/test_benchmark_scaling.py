"""benchmarks scaling: the projection against closed forms, efficiency by hand, the command, and bad input."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
from benchmark_runs import quiet, refused

from benchmarks import __main__ as command
from benchmarks import scaling
from benchmarks.harness import Row, Spread, Timing, read_rows
from benchmarks.projection import BACKWARD_SHARE, Network, all_reduce_seconds, project
from benchmarks.scaling import GPUS, ScalingOptions, interval_of, summarise_turns

VIT_B = 4 * 86_567_656
NETWORK = Network()
STEP = 0.060


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    quiet(monkeypatch)


# ---- projection ----


def test_one_gpu_sends_nothing():
    assert all_reduce_seconds(VIT_B, 1, NETWORK) == 0
    assert project(STEP, VIT_B, 1, NETWORK) == (1, 0, 0, STEP, 1)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_within_a_node_it_is_the_ring_s_closed_form(gpus):
    expected = 2 * (gpus - 1) / gpus * VIT_B / 450e9 + 2 * (gpus - 1) * 3e-6
    assert all_reduce_seconds(VIT_B, gpus, NETWORK) == pytest.approx(expected)


def test_between_nodes_each_link_carries_its_part():
    inside = 2 * 7 / 8 * VIT_B / 450e9 + 14 * 3e-6
    between = 2 * 3 / 4 * (VIT_B / 8) / 50e9 + 6 * 10e-6
    assert all_reduce_seconds(VIT_B, 32, NETWORK) == pytest.approx(inside + between)
    one_a_node = replace(NETWORK, gpus_per_node=1)
    assert all_reduce_seconds(VIT_B, 4, one_a_node) == pytest.approx(2 * 3 / 4 * VIT_B / 50e9 + 6 * 10e-6)


def test_many_nodes_without_latency_approach_twice_the_bytes():
    plain = Network(gpus_per_node=1, latency_us=0)
    assert all_reduce_seconds(VIT_B, 2**20, plain) == pytest.approx(2 * VIT_B / 50e9, rel=1e-5)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("nbytes", [1e6, VIT_B, 4e9])
def test_more_gpus_are_never_more_efficient(overlap, nbytes):
    network = replace(NETWORK, overlap=overlap)
    found = [project(STEP, nbytes, gpus, network) for gpus in (1, *GPUS)]
    for fewer, more in itertools.pairwise(found):
        assert more.efficiency <= fewer.efficiency and more.all_reduce_seconds > fewer.all_reduce_seconds
    assert all(0 < one.efficiency <= 1 for one in found)


@pytest.mark.parametrize(
    ("name", "better"),
    [("node_gigabytes_per_second", 900), ("gigabytes_per_second", 100), ("latency_us", 1), ("overlap", 1.0)],
)
def test_a_better_network_is_never_worse(name, better):
    for gpus in GPUS:
        plain = project(STEP, 4e9, gpus, NETWORK)
        assert project(STEP, 4e9, gpus, replace(NETWORK, **{name: better})).step_seconds <= plain.step_seconds


def test_the_limits():
    nothing_hidden = replace(NETWORK, overlap=0)
    one = project(STEP, VIT_B, 64, nothing_hidden)
    assert one.step_seconds == pytest.approx(STEP + one.all_reduce_seconds) and one.exposed_seconds > 0
    hidden = project(10.0, VIT_B, 64, NETWORK)  # a backward pass so long that only the last bucket is left
    buckets = math.ceil(VIT_B / 25e6)
    assert hidden.exposed_seconds == pytest.approx(hidden.all_reduce_seconds / buckets)
    ideal = Network(node_latency_us=0, latency_us=0, node_gigabytes_per_second=1e12, gigabytes_per_second=1e12)
    assert project(STEP, VIT_B, 512, ideal).efficiency == pytest.approx(1, abs=1e-9)
    partly = project(STEP, 40e9, 8, NETWORK)
    assert partly.exposed_seconds == pytest.approx(partly.all_reduce_seconds - 0.9 * BACKWARD_SHARE * STEP)


def test_gpus_of_part_of_a_node_are_refused():
    with pytest.raises(ValueError, match="12 GPUs are no whole nodes of 8: give a multiple"):
        all_reduce_seconds(1, 12, NETWORK)


# ---- measured ----


def row(ranks: int, seconds: float, steps: int) -> Row:
    own = Timing("trainer ddp", 1, ranks * 32 * steps, seconds, seconds)
    one = Spread(*[own.items_per_second] * 3)
    wall = Spread(seconds, seconds, seconds)
    return Row("train", "step", "trainer ddp", "", "images", 1, one, wall, wall, one, "trainer ddp", None, (own,))


def test_efficiency_is_formed_turn_by_turn():
    seconds = {1: [2.0, 4.0, 2.0], 2: [2.5, 4.0, 4.0]}
    turns = {ranks: [row(ranks, value, 10) for value in values] for ranks, values in seconds.items()}
    alone, both = summarise_turns(turns, steps=10)
    assert alone.efficiency == (1, 1, 1) and alone.interval == (1, 1)
    assert both.efficiency == (0.8, 0.5, 1.0)
    assert both.step_seconds == (0.4, 0.25, 0.4) and both.images_per_second.max == 2 * 32 * 10 / 2.5
    mean, half = 2.3 / 3, 4.302653 * math.sqrt(0.19 / 3 / 3)  # t of 2 degrees; variance 0.19 / 3
    assert both.interval == pytest.approx((mean - half, mean + half), rel=1e-5)
    assert interval_of([1.0, 0.9]) is None


def words(output, *more) -> list[str]:
    return ["scaling", "--output", str(output), *map(str, more)]


def test_a_given_step_is_projected_with_its_assumptions(tmp_path, capsys):
    output = tmp_path / "scaling.jsonl"
    given = ["--step-seconds", 0.06, "--model", "vit_base_patch16_224", "--image-size", 224, "--overlap", 0.5]
    assert command.main(words(output, *given)) == 0
    rows = read_rows(output)
    assert [one["gpus"] for one in rows] == list(GPUS)
    network = replace(NETWORK, overlap=0.5)
    elements = 86_567_656 - 1000 * 769 + 10 * 769  # timm's ViT-B with ten classes
    for one in rows:
        assert (one["part"], one["step_from"], one["gradient_bytes"]) == ("projected", "given", 4 * elements)
        assert one["efficiency"] == project(0.06, 4 * elements, one["gpus"], network).efficiency
        assert one["network"]["overlap"] == 0.5 and len(one["assumptions"]) == 5 and one["environment"]["torch"]
    text = capsys.readouterr().out
    assert "from a step of 60 ms (given) and 343.2 MB of gradients, assuming that" in text
    assert all(assumption in text for assumption in network.assumptions)


def test_what_is_measured_is_kept_and_projected_from(tmp_path, capsys, monkeypatch):
    started = []

    def run_ranks(job, ranks, threads, on_gpus):
        started.append((ranks, job.runs.name, (job.engines, job.rounds, threads)))
        return [row(ranks, 2.0 if ranks == 1 else 2.5, job.steps)]

    monkeypatch.setattr(scaling, "run_ranks", run_ranks)
    monkeypatch.setattr(scaling, "shard_digits", lambda folder, times: folder)
    output = tmp_path / "scaling.jsonl"
    assert command.main(words(output, "--ranks", 1, 2, "--rounds", 3, "--strategy", "zero1")) == 0
    assert [ranks for ranks, _, _ in started] == [1, 2, 1, 2, 1, 2]
    assert len({name for _, name, _ in started}) == 6  # no start goes on from another's checkpoints
    assert {rest for _, _, rest in started} == {(("trainer zero1",), 1, 1)}
    alone, both, *projected = read_rows(output)
    assert (alone["part"], both["ranks"], both["n"]) == ("measured", 2, 3)
    assert both["efficiency"]["median"] == 0.8 and both["interval"] == pytest.approx([0.8, 0.8])
    assert {one["exposed_seconds"] > 0 for one in projected} == {True}
    assert (projected[0]["step_from"], projected[0]["step_seconds"]) == ("measured here on 1 rank", 0.2)
    assert "0.8 (0.8 to 0.8)" in capsys.readouterr().out


def test_the_ranks_at_hand_are_powers_of_two(monkeypatch):
    for count, expected in ((8, (1, 2, 4, 8)), (6, (1, 2, 4)), (1, (1,))):
        monkeypatch.setattr(scaling.torch.cuda, "device_count", lambda count=count: count)
        assert scaling.ranks_at_hand() == expected


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ranks", 0, 2], "--ranks 0 2: numbers from 1"),
        (["--ranks", 2, 2], "each once"),
        (["--strategy", "fsdp"], "--strategy fsdp: ddp, zero1"),
        (["--step-seconds", 0], "--step-seconds 0.0: above 0"),
        (["--step-seconds", "nan"], "--step-seconds nan: above 0"),
        (["--gradient-bytes", -4], "--gradient-bytes -4: above 0"),
        (["--gpus", 12], "12 GPUs are no whole nodes of 8: give a multiple"),
        (["--overlap", 1.5], "--overlap 1.5: a share"),
        (["--latency-us", -1], "--latency-us -1.0: at least 0"),
        (["--gigabytes-per-second", 0], "--gigabytes-per-second 0.0: above 0"),
        (["--rounds", 0], "--rounds 0: at least 1"),
        (["--model", "vit_tiny_patch99"], "unknown to timm"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, more, said):
    output = tmp_path / "out.jsonl"
    assert said in refused(capsys, *words(output, *more))
    assert not output.exists()


def test_options_say_the_network_s_own_defaults():
    assert ScalingOptions().network == NETWORK
    assert json.dumps(NETWORK.assumptions)
