"""The command ``python -m jobs`` as a user calls it: printed files, submission to stand-ins on PATH, bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from string import Template

import pytest
import yaml

from jobs.__main__ import main

REPOSITORY = Path(__file__).parents[2]
AWKWARD = ["--note", 'it\'s "so" $HOME $(id) `id` \\ \\\\ ; # & $$ ${local_rank} é', "--empty", "", "--glob", "*"]


def run_jobs(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def write_stand_in(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def recorded(path: Path) -> list[str]:
    return path.read_text().split("\0")[:-1]


def as_torchrun_passes_on(words: list[str]) -> list[str]:
    """torch/distributed/elastic/utils/api.py, ``macros.substitute``."""
    return [Template(word).safe_substitute(local_rank="0") for word in words]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "runs of it's" / "A_b 100%j"


@pytest.fixture
def manifests(tmp_path: Path) -> list[str]:
    words = []
    for split in ("train", "val"):
        path = tmp_path / "the shards" / f"{split}.manifest.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        words += [f"--{split}", str(path)]
    return words


def slurm_words(run_folder: Path, manifests: list[str], *more: str) -> list[str]:
    return ["slurm", "demo", "--run", str(run_folder), *manifests, "--gpus-per-node", "8", *more]


def local_words(run_folder: Path, manifests: list[str], *more: str) -> list[str]:
    words = ["local", "demo", "--run", str(run_folder), *manifests]
    return [*words, "--gpus-per-node", "0", "--processes", "2", *more]


def kubernetes_words(*more: str) -> list[str]:
    paths = ["--run", "/data/runs/A_b", "--train", "/data/in 1k/t.json", "--val", "/data/in 1k/v.json"]
    rest = [
        "--nodes",
        "3",
        "--gpus-per-node",
        "8",
        "--image",
        "registry.example/noisynn:1",
        "--volume-claim",
        "imagenet",
    ]
    return ["kubernetes", "demo", *paths, *rest, *more]


def train_words(run: Path | str, manifests: list[str], *extra: str) -> list[str]:
    paths = ["--run", str(run), "--data.train", manifests[1], "--data.val", manifests[3]]
    return ["-m", "--", "pipeline", "train", "demo", *paths, *extra]


# ---- help and printed files


@pytest.mark.parametrize("kind", ["local", "slurm", "kubernetes"])
def test_help_names_every_shared_option(kind: str) -> None:
    done = run_jobs([kind, "--help"])
    assert done.returncode == 0, done.stderr
    for option in ("RECIPE", "--run", "--train", "--val", "--nodes", "--gpus-per-node", "--submit"):
        assert option in done.stdout
    assert "bare --" in " ".join(done.stdout.replace("│", "").split())


def test_the_command_needs_no_torch() -> None:
    code = "import sys, jobs.__main__, jobs.training as t; print(t.known_recipes()); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


@pytest.mark.parametrize("make_words", [slurm_words, local_words])
def test_it_prints_a_script_that_bash_accepts_and_writes_nothing(make_words, run_folder, manifests) -> None:
    done = run_jobs(make_words(run_folder, manifests, "--", *AWKWARD))
    assert done.returncode == 0, done.stderr
    checked = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert not run_folder.exists()


def test_slurm_directives(run_folder, manifests) -> None:
    options = ["--nodes", "4", "--partition", "gpu", "--time", "1-00:00:00", "--account", "lab", "--memory", "200G"]
    text = run_jobs(slurm_words(run_folder, manifests, *options)).stdout
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    log = str(run_folder).replace("%", "%%") + "/launch/slurm-%j.out"  # only the job's number is filled in by Slurm
    expected = ["--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=64", '--time="1-00:00:00"']
    expected += ['--partition="gpu"', '--account="lab"', '--mem="200G"', f'--output="{log}"']
    assert {*expected, "--open-mode=append", "--requeue"} <= set(directives)
    assert "--signal=B:USR1@300" in directives  # five minutes before the limit
    assert "--shutdown-seconds 280" in text
    first_command = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    last_directive = max(i for i, line in enumerate(text.splitlines()) if line.startswith("#SBATCH"))
    assert last_directive < first_command, "sbatch stops reading directives at the first command"


# ---- the filled Slurm script, run


def run_slurm_script(script: str, folder: Path, *, resolvable: bool = True, **environment: str) -> Path:
    """Runs a script on stand-ins for two nodes; what each node's agent was called with lies in the returned folder."""
    record, path = folder / "record", folder / "stand-ins"
    record.mkdir()
    write_stand_in(path / "scontrol", '[[ $* == "show hostnames n[1-2]" ]] || exit 1\nprintf "n1\\nn2\\n"')
    write_stand_in(path / "getent", f"exit {0 if resolvable else 2}")
    write_stand_in(path / "hostname", "echo first-host")
    loop = 'for node in 0 1; do SLURM_NODEID=$node "$@"; done'
    write_stand_in(path / "srun", f'printf "%s\\0" "$@" > "$RECORD/srun"\nwhile [[ $1 == -* ]]; do shift; done\n{loop}')
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(
        ["bash", "-s"],
        input=script,
        env={"PATH": f"{path}:{os.environ['PATH']}", "RECORD": str(record), "SLURM_CPUS_PER_TASK": "64"}
        | slurm
        | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return record


def recording_python(folder: Path) -> Path:
    body = 'printf "%s\\0" "$@" > "$RECORD/agent-$SLURM_NODEID"\nenv -0 > "$RECORD/environment-$SLURM_NODEID"'
    return write_stand_in(folder / "my env" / "python", body)


def test_slurm_script_starts_one_agent_a_node_with_every_word_intact(tmp_path, run_folder, manifests) -> None:
    python = recording_python(tmp_path)
    options = ["--nodes", "2", "--python", str(python), "--network-interface", "ib0", "--", *AWKWARD]
    script = run_jobs(slurm_words(run_folder, manifests, *options)).stdout
    record = run_slurm_script(script, tmp_path, SLURM_RESTART_COUNT="3")

    srun = recorded(record / "srun")
    assert {"--kill-on-bad-exit=0", "--wait=60", "--mpi=none"} <= set(srun)
    port = 10000 + 123456 % 20000
    watched = ["-m", "jobs.agent", "--shutdown-seconds", "280", "--", str(python)]
    torchrun = [*watched, "-m", "jobs.torchrun", "--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d"]
    torchrun += [f"--rdzv-endpoint=n1:{port}", "--rdzv-id=123456-3"]
    for node in (0, 1):
        agent = recorded(record / f"agent-{node}")
        assert agent[: len(torchrun)] == torchrun
        assert as_torchrun_passes_on(agent[len(torchrun) :]) == train_words(run_folder, manifests, *AWKWARD)
        environment = dict(item.split("=", 1) for item in recorded(record / f"environment-{node}"))
        assert environment["PET_RDZV_CONF"].startswith(f"is_host={1 - node},")
        assert environment["SRUN_CPUS_PER_TASK"] == "64"
        assert environment["NCCL_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"] == "ib0"
        assert Path(environment["PWD"]) == REPOSITORY
        assert (environment["PYTHONPATH"], environment["PYTHONSAFEPATH"]) == (str(REPOSITORY), "1")
        assert environment["PET_SIGNALS_TO_HANDLE"].endswith("SIGUSR1")
        assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "270"


def test_slurm_script_falls_back_to_the_hostname_and_takes_a_port(tmp_path, run_folder, manifests) -> None:
    words = slurm_words(run_folder, manifests, "--nodes", "2", "--python", str(recording_python(tmp_path)))
    script = run_jobs([*words, "--port", "29500"]).stdout
    agent = recorded(run_slurm_script(script, tmp_path, resolvable=False) / "agent-1")
    assert "--rdzv-endpoint=first-host:29500" in agent
    assert "--rdzv-id=123456-0" in agent


def test_a_cpu_run_under_slurm_hides_gpus_and_shares_the_cores(tmp_path, run_folder, manifests) -> None:
    words = [word if word != "8" else "0" for word in slurm_words(run_folder, manifests, "--nodes", "2")]
    script = run_jobs([*words, "--processes", "4", "--python", str(recording_python(tmp_path))]).stdout
    assert "--gpus-per-node" not in script.split("set -euo pipefail")[0].split("\n", 2)[2]
    record = run_slurm_script(script, tmp_path)
    environment = dict(item.split("=", 1) for item in recorded(record / "environment-0"))
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("", "16")
    assert "NCCL_DEBUG" not in environment


# ---- submission


def test_slurm_submits_and_never_overwrites(tmp_path, run_folder, manifests) -> None:
    sbatch = write_stand_in(
        tmp_path / "bin" / "sbatch", f'printf "%s\\0" "$@" > "{tmp_path}/record"\necho "42;cluster"'
    )
    path = f"{sbatch.parent}:{os.environ['PATH']}"
    for number in (1, 2):
        done = run_jobs(slurm_words(run_folder, manifests, "--submit"), PATH=path)
        assert done.returncode == 0, done.stderr
        script = run_folder / "launch" / str(number) / "slurm.sh"
        assert recorded(tmp_path / "record") == ["--parsable", str(script)]
        assert "submitted job 42" in done.stdout
    assert sorted(path.name for path in (run_folder / "launch").iterdir()) == ["1", "2"]
    assert os.access(script, os.X_OK)


def test_a_refusal_of_sbatch_is_one_line(tmp_path, run_folder, manifests) -> None:
    sbatch = write_stand_in(tmp_path / "bin" / "sbatch", "printf 'sbatch: error:\\n invalid partition\\n' >&2; exit 1")
    done = run_jobs(slurm_words(run_folder, manifests, "--submit"), PATH=f"{sbatch.parent}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: `sbatch") and "invalid partition" in done.stderr
    assert done.stderr.count("\n") == 1


def test_local_becomes_torchrun(tmp_path, run_folder, manifests) -> None:
    python = write_stand_in(tmp_path / "my env" / "python", f'printf "%s\\0" "$@" > "{tmp_path}/record"\nexit 7')
    done = run_jobs(local_words(run_folder, manifests, "--python", str(python), "--submit", "--", *AWKWARD))
    assert done.returncode == 7, done.stderr  # the run's own status
    words = recorded(tmp_path / "record")
    watched = ["-m", "jobs.agent", "--shutdown-seconds", "310", "--", str(python)]
    assert words[:10] == [*watched, "-m", "jobs.torchrun", "--standalone", "--nproc-per-node=2"]
    assert as_torchrun_passes_on(words[10:]) == train_words(run_folder, manifests, *AWKWARD)
    assert (run_folder / "launch" / "1" / "local.sh").is_file()


def test_kubernetes_applies_the_written_file(tmp_path) -> None:
    kubectl = write_stand_in(tmp_path / "bin" / "kubectl", f'printf "%s\\0" "$@" > "{tmp_path}/record"')
    path = f"{kubectl.parent}:{os.environ['PATH']}"
    words = kubernetes_words("--namespace", "ml", "--launch-folder", str(tmp_path / "here"), "--submit")
    done = run_jobs(words, PATH=path)
    assert done.returncode == 0, done.stderr
    written = tmp_path / "here" / "1" / "kubernetes.yaml"
    assert recorded(tmp_path / "record") == ["apply", "--namespace", "ml", "-f", str(written)]
    assert [document["kind"] for document in yaml.safe_load_all(written.read_text())] == ["Service", "Job"]


# ---- bad input


Refused = Callable[..., None]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Asserts one line on standard error that holds the given texts, exit status 2, and nothing on standard output."""

    def check(words: list[str], *expected: str) -> None:
        status = main(words)
        done = capsys.readouterr()
        assert status == 2, done.out + done.err
        assert done.err.startswith("error: ") and done.err.count("\n") == 1
        assert not set("╭│╰─") & set(done.err)
        for text in expected:
            assert text in done.err
        assert done.out == ""

    return check


def test_bad_input_ends_the_process_with_status_2() -> None:
    done = run_jobs(["slurm", "demo"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--nodes", "0"], ["--nodes", "1 or more"]),
        (["--nodes", "two"], ["--nodes", "two"]),
        (["--gpus-per-node", "-1"], ["--gpus-per-node"]),
        (["--gpus-per-node", "0"], ["--processes"]),
        (["--processes", "2"], ["--processes"]),
        (["--time", "48:00"], ["--time", "48:00:00"]),
        (["--time", "00:00:10"], ["--time", "00:01:00"]),
        (["--partition", "gpu\n#SBATCH --uid=0"], ["--partition", "line break"]),
        (["--partition", ""], ["--partition", "empty"]),
        (["--port", "80"], ["--port", "1024"]),
        (["--cpus-per-node", "0"], ["--cpus-per-node"]),
        (["--run", "a\\b"], ["--run", "backslash"]),
        (["--run", "a:b"], ["--run", "colon"]),
        (["--restarts", "-1"], ["--restarts"]),
        (["--train", "https://me:word@host/t.json"], ["--train", "password"]),
        (["--walltime", "3"], ["--walltime"]),
        (["--", "--run", "elsewhere"], ["--run", "before the --"]),
        (["--", "--data.val=x"], ["--data.val", "--val"]),
        (["--", "--x", "a\nb"], ["options after --", "line break"]),
    ],
)
def test_bad_slurm_input_is_one_line(changes, expected, run_folder, manifests, refused: Refused) -> None:
    refused([*slurm_words(run_folder, manifests), *changes], *expected)
    assert not run_folder.exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--name", "My_Run"], ["--name", "'my-run' would do"]),
        (["--name", "x" * 64], ["--name", "at most 61"]),
        (["--run", "/data/___"], ["--name", "run-1"]),
        (["--run", "/scratch/a"], ["--run", "--mount-path"]),
        (["--run", "/data/../a"], ["--run", "--mount-path"]),
        (["--train", "shards/t.json"], ["--train", "--mount-path"]),
        (["--memory", "much"], ["--memory", "16Gi"]),
        (["--volume-claim", "My Claim"], ["--volume-claim"]),
        (["--image", "a b"], ["--image"]),
        (["--restarts", "-1"], ["--restarts"]),
    ],
)
def test_bad_kubernetes_input_is_one_line(changes, expected, refused: Refused) -> None:
    refused([*kubernetes_words(), *changes], *expected)


def test_local_refuses_a_missing_manifest_and_several_machines(tmp_path, run_folder, manifests, refused) -> None:
    missing = str(tmp_path / "none.json")
    refused(local_words(run_folder, [*manifests[:3], missing], "--submit"), "--val", missing, "data_prep")
    refused(local_words(run_folder, manifests, "--nodes", "2"), "--nodes", "slurm or kubernetes")
    assert not run_folder.exists()


def test_a_missing_scheduler_is_said_before_anything_is_written(
    tmp_path, run_folder, manifests, refused, monkeypatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(slurm_words(run_folder, manifests, "--submit"), "`sbatch`", "leave --submit out")
    words = kubernetes_words("--launch-folder", str(tmp_path / "here"), "--submit")
    refused(words, "`kubectl`")
    assert not run_folder.exists() and not (tmp_path / "here").exists()


def test_a_run_folder_that_cannot_be_made(tmp_path, manifests, refused) -> None:
    (tmp_path / "file").write_text("")
    refused(local_words(tmp_path / "file" / "run", manifests, "--submit"), str(tmp_path / "file"))


def test_kubernetes_asks_where_to_write(refused) -> None:
    words = kubernetes_words("--mount-path", "/nowhere", "--run", "/nowhere/r", "--train", "/nowhere/t")
    refused([*words, "--val", "/nowhere/v", "--submit"], "--launch-folder")


def test_an_unknown_recipe_is_answered_with_the_nearest(refused) -> None:
    refused(["slurm", "dem", "--run", "r", "--train", "t", "--val", "v", "--gpus-per-node", "8"], "'dem'", "demo")


def test_missing_options_and_kind_are_one_line(refused) -> None:
    refused(["slurm", "demo"], "--run", "--train")
    refused(["cloud"], "local", "kubernetes")
    refused([])


def test_traceback_on_request(run_folder, manifests) -> None:
    done = run_jobs(slurm_words(run_folder, manifests, "--nodes", "0"), NOISYNN_TRACEBACK="1")
    assert done.returncode == 1 and "Traceback" in done.stderr
