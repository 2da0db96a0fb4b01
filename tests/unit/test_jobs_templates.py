"""The parts of ``jobs`` by themselves: the Kubernetes file, names, quoting of any text, numbering of files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from string import Template
from typing import Any

import jinja2
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import kubernetes, launch, local, slurm, training
from jobs.kubernetes import (
    KubernetesBenchmarkOptions,
    KubernetesDataPrepOptions,
    KubernetesOptions,
    KubernetesResources,
)
from jobs.launch import Launch, Place
from jobs.local import LocalBenchmarkOptions, LocalDataPrepOptions
from jobs.slurm import SlurmBenchmarkOptions, SlurmDataPrepOptions, SlurmOptions, SlurmResources
from jobs.training import TrainingOptions
from jobs.work import BenchmarkOptions, DataPrepOptions, work_of

PRINTABLE = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" ")).filter(str.isprintable)
EXTRA = st.lists(PRINTABLE.filter(lambda word: word.split("=", 1)[0] not in training.SET_HERE), max_size=4)
PLACE = Place(Path("/runs/launch"), Path("/code"), "0123+changes")


def kubernetes_documents(extra: list[str] | None = None, **changes: Any) -> list[dict[str, Any]]:
    train: dict[str, Any] = {"recipe": "demo", "run": "/data/runs/A_b", "train": "/data/t.json", "val": "/data/v.json"}
    training_changes = {name: changes.pop(name) for name in ("nodes", "gpus_per_node", "processes") if name in changes}
    counts: dict[str, Any] = {"nodes": 3, "gpus_per_node": 8} | training_changes
    base = {"image": "registry.example/noisynn:1", "volume_claim": "imagenet"} | changes
    options = KubernetesOptions(TrainingOptions(**train, **counts), KubernetesResources(**base))
    return list(yaml.safe_load_all(kubernetes.plan(options, extra or [], "python -m jobs").fill(PLACE)))


def as_kubernetes_expands(words: list[str], index: int) -> list[str]:
    """kubernetes: third_party/forked/golang/expansion: ``$$`` is ``$``, ``$(NAME)`` a variable, the rest stays."""
    expanded = []
    for word in words:
        out, at = "", 0
        while at < len(word):
            if word.startswith("$$", at):
                out, at = out + "$", at + 2
            elif word.startswith("$(JOB_COMPLETION_INDEX)", at):
                out, at = out + str(index), at + len("$(JOB_COMPLETION_INDEX)")
            else:
                assert not word.startswith("$(", at), f"a variable of the user's would be expanded in {word!r}"
                out, at = out + word[at], at + 1
        expanded.append(out)
    return expanded


def as_torchrun_passes_on(words: list[str]) -> list[str]:
    return [Template(word).safe_substitute(local_rank="0") for word in words]


def as_sbatch_reads(text: str) -> str:
    """slurm: src/sbatch/opt.c, ``_get_argument``: one word of an ``#SBATCH`` line."""
    out, at, quote = "", 0, ""
    while at < len(text) and (quote or not text[at].isspace()):
        character = text[at]
        if character == "\\":
            at += 1
            out += text[at]
        elif quote and character == quote:
            quote = ""
        elif not quote and character in "\"'":
            quote = character
        elif not quote and character == "#":
            break
        else:
            out += character
        at += 1
    return out


def test_service_gives_the_first_pod_a_name_that_all_pods_use() -> None:
    service, job = kubernetes_documents(namespace="ml")
    pod = job["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"  # the string: YAML's null would make an ordinary Service
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["metadata"]["name"] == pod["spec"]["subdomain"] == job["metadata"]["name"] == "a-b"
    assert service["metadata"]["namespace"] == job["metadata"]["namespace"] == "ml"
    assert "--master-addr=a-b-0.a-b" in pod["spec"]["containers"][0]["command"]
    assert service["spec"]["ports"][0]["port"] == 29500


def test_job_is_indexed_and_bounded() -> None:
    spec = kubernetes_documents(nodes=3, restarts=2, time="01:00:00")[1]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 3
    assert spec["backoffLimit"] == 12
    assert spec["activeDeadlineSeconds"] == 3600
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["enableServiceLinks"] is False


def test_pod_has_gpus_shared_memory_and_the_volume() -> None:
    pod = kubernetes_documents(memory="200Gi", cpus_per_node=64, work_folder="/src")[1]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"] == {
        "requests": {"cpu": 64, "memory": "200Gi"},
        "limits": {"nvidia.com/gpu": 8, "memory": "200Gi"},
    }
    assert container["workingDir"] == "/src"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"] == "imagenet"
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}


def test_a_cpu_job_asks_for_no_gpu() -> None:
    pod = kubernetes_documents(gpus_per_node=0, processes=4)[1]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert "resources" not in container and "tolerations" not in pod
    assert {"name": "CUDA_VISIBLE_DEVICES", "value": ""} in container["env"]
    assert "--nproc-per-node=4" in container["command"]


def test_pod_command_names_its_rank_and_nothing_else_is_expanded() -> None:
    extra = ["--x", "$(HOME) $$ ${local_rank} $JOB"]
    command = kubernetes_documents(extra)[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    words = as_kubernetes_expands(command, index=2)
    watched = ["python", "-m", "jobs.agent", "--shutdown-seconds=100", "--"]
    assert words[:8] == [*watched, "python", "-m", "jobs.torchrun"]
    assert {"--nnodes=3", "--nproc-per-node=8", "--node-rank=2", "--rdzv-backend=static"} <= set(words)
    assert as_torchrun_passes_on(words)[-2:] == extra


@pytest.mark.parametrize(
    ("run_name", "name"),
    [("s16", "s16"), ("A_b", "a-b"), ("2026.run", "run-2026-run"), ("-é-x-", "x"), ("x" * 80, "x" * 61)],
)
def test_a_run_folders_name_is_made_to_fit(run_name: str, name: str) -> None:
    assert kubernetes.job_name(None, run_name, nodes=8) == name


@given(PRINTABLE, st.integers(1, 10_000))
def test_a_made_name_is_always_allowed(run_name: str, nodes: int) -> None:
    try:
        name = kubernetes.job_name(None, run_name, nodes)
    except ValueError as error:
        assert "--name" in str(error)
    else:
        assert kubernetes.DNS_LABEL.fullmatch(name)
        assert len(f"{name}-{nodes - 1}") <= 63
        assert kubernetes.job_name(name, run_name, nodes) == name


@given(EXTRA)
@settings(deadline=None, max_examples=60)  # a busy machine fills a template in 300 ms
def test_any_printable_word_reaches_the_trainer_through_kubernetes(extra: list[str]) -> None:
    command = kubernetes_documents(extra)[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    passed_on = as_torchrun_passes_on(as_kubernetes_expands(command, index=0))
    assert passed_on[len(passed_on) - len(extra) :] == extra


@given(EXTRA, PRINTABLE.filter(str.strip), PRINTABLE.filter(str.strip))
@settings(deadline=None, max_examples=60)  # a busy machine fills a template in 300 ms
def test_any_printable_word_reaches_the_trainer_through_slurm(extra: list[str], name: str, partition: str) -> None:
    run = "/runs/" + re.sub(r"[\\/.:]", "_", name)
    train = TrainingOptions("demo", run, "/t", "/v", gpus_per_node=8)
    options = SlurmOptions(train, SlurmResources(partition=partition))
    text = slurm.plan(options, extra, f"python -m jobs {name}").fill(PLACE)
    words = shlex.split(text.split("train=(\n")[1].split("\n)\n")[0])
    paths = ["--run", run, "--data.train", "/t", "--data.val", "/v"]
    assert as_torchrun_passes_on(words) == ["-m", "--", "pipeline", "train", "demo", *paths, *extra]
    directives = dict(
        line[10:].split("=", 1) for line in text.splitlines() if line.startswith("#SBATCH --") and "=" in line
    )
    assert as_sbatch_reads(directives["partition"]) == partition
    assert as_sbatch_reads(directives["job-name"]) == f"noisynn-{Path(run).name}"


@given(EXTRA, PRINTABLE.filter(str.strip), st.sampled_from(["slurm", "local", "kubernetes"]))
@settings(deadline=None, max_examples=60)  # a busy machine fills a template in 300 ms
def test_any_printable_word_reaches_data_prep(extra: list[str], out: str, scheduler: str) -> None:
    extra = [word for word in extra if not word.startswith(("--task", "--num-tasks", "--out", "--split"))]
    words = ["shard", "--split=val", "--out", out, *extra]
    work = DataPrepOptions("/launch", tasks=4)
    spread, last = ["data_prep", *words, "--num-tasks", "4"], ["data_prep", "finalize", "--out", out, "--split", "val"]
    if scheduler == "kubernetes":
        options = KubernetesDataPrepOptions(work, KubernetesResources("image", "claim"))
        document = yaml.safe_load(kubernetes.plan_work(options, words, "python -m jobs").fill(PLACE))
        command = as_kubernetes_expands(document["spec"]["template"]["spec"]["containers"][0]["command"], 0)
        assert command[command.index("data_prep") + 1 :] == ["python", out, "val", *spread]
        return
    launched = (
        slurm.plan_work(SlurmDataPrepOptions(work), words, f"python -m jobs {out}")
        if scheduler == "slurm"
        else local.plan_work(LocalDataPrepOptions(work), words, f"python -m jobs {out}")
    )
    arrays = re.findall(r"^ *words=\(\n(.*?)\n *\)$", launched.fill(PLACE), flags=re.S | re.M)
    assert [shlex.split(array) for array in arrays] == [spread, last]


@pytest.mark.parametrize("scheduler", ["slurm", "local", "kubernetes"])
def test_a_grid_is_spread_over_tasks_that_share_one_file(scheduler: str) -> None:
    work = BenchmarkOptions("/launch", tasks=3, gpus=1)
    extra = ["accuracy", "--seeds", "3", "--output", "/results/accuracy.jsonl"]
    if scheduler == "kubernetes":
        options = KubernetesBenchmarkOptions(work, KubernetesResources("image", "claim"))
        document = yaml.safe_load(kubernetes.plan_work(options, extra, "python -m jobs").fill(PLACE))
        assert document["spec"]["completions"] == 3
        found = document["spec"]["template"]["spec"]["containers"][0]["command"][2:]
    else:
        launched = (
            slurm.plan_work(SlurmBenchmarkOptions(work), extra, "python -m jobs")
            if scheduler == "slurm"
            else local.plan_work(LocalBenchmarkOptions(work), extra, "python -m jobs")
        )
        (array,) = re.findall(r"^ *words=\(\n(.*?)\n *\)$", launched.fill(PLACE), flags=re.S | re.M)
        found = shlex.split(array)
    assert found == ["benchmarks", *extra, "--num-tasks", "3"]
    (call,) = slurm.submissions(work_of(work, extra, "/launch"), Path("/launch/job.sh"))
    assert call[2] == "--array=0-2"
    with pytest.raises(ValueError, match="`noise` is one task's work, only `accuracy` is divided"):
        work_of(work, ["noise"], "/launch")


@given(PRINTABLE.filter(str.strip))
@settings(deadline=None, max_examples=60)  # a busy machine fills a template in 300 ms
def test_any_folder_reaches_python_and_sbatch(name: str) -> None:
    folder = Path("/runs/" + re.sub(r"[\\/.:]", "_", name))
    place = Place(folder, folder / "code", "0123")
    options = SlurmBenchmarkOptions(BenchmarkOptions(str(folder)))
    text = slurm.plan_work(options, ["draws"], "python -m jobs").fill(place)
    directive = re.search(r"^#SBATCH --output=(.*)$", text, flags=re.M)
    assert directive is not None
    assert as_sbatch_reads(directive[1]) == str(folder).replace("%", "%%") + "/slurm-%j.out"
    exported = re.search(r"^export PYTHONPATH=(.*)\$\{PYTHONPATH:", text, flags=re.M)
    assert exported is not None and shlex.split(exported[1]) == [f"{folder}/code"]
    words = re.search(r"^words=\(\n(.*?)\n\)$", text, flags=re.S | re.M)
    assert words is not None and shlex.split(words[1]) == ["benchmarks", "draws", "--output", f"{folder}/draws.jsonl"]


def test_urls_stay_and_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = TrainingOptions("demo", "runs/a", "s3://bucket/t.json", "~/v", gpus_per_node=1)
    absolute = training.with_absolute_paths(options)
    assert (absolute.run, absolute.train) == (f"{tmp_path}/runs/a", "s3://bucket/t.json")
    assert absolute.val == str(Path.home() / "v")


def test_unquoted_text_and_missing_names_do_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.j2").write_text("{{ name }}")
    monkeypatch.setattr(launch, "TEMPLATES", tmp_path)
    with pytest.raises(AssertionError, match="without being quoted"):
        launch.render("t.j2", name="x")
    with pytest.raises(jinja2.UndefinedError):
        launch.render("t.j2")


def empty_launch(folder: Path) -> Launch:
    return Launch("slurm", ".sh", lambda place: f"{place.folder}\n", folder, "sbatch", lambda path: None, {})


def test_numbers_skip_finished_and_half_written_launches(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / ".2.tmp").mkdir()  # of a launch that was killed, or is still writing
    written = launch.write_launch(empty_launch(tmp_path))
    assert written == tmp_path / "3" / "slurm.sh" and written.read_text() == f"{tmp_path}/3\n"
    assert not any((tmp_path / "1").iterdir())


def test_a_launch_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        target.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(launch, "copy_code", full)
    with pytest.raises(OSError, match="disk full"):
        launch.write_launch(empty_launch(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "seconds"), [("48:00:00", 172_800), ("1-00:00:30", 86_430), ("00:01:00", 60)])
def test_durations(text: str, seconds: int) -> None:
    assert launch.duration_seconds("--time", text) == seconds


@pytest.mark.parametrize("text", ["48", "48:00", "1-00", "00:60:00", "-1:00:00", "00:00:59", "two days"])
def test_refused_durations(text: str) -> None:
    with pytest.raises(ValueError, match="--time"):
        launch.duration_seconds("--time", text)
