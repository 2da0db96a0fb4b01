"""From a template to a submitted file: quoting, writing without ever overwriting, running the scheduler's own tool."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from jobs.snapshot import COMMIT_NAME, commit_of, copy_code, describe_commit

CODE_FOLDER = Path(os.path.abspath(__file__)).parent.parent  # abspath: resolving links breaks automounted home folders
TEMPLATES = Path(__file__).parent / "templates"
PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]*@")
DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")


class Quoted(str):
    """Text made safe for the place where it stands in a template."""


@dataclass(frozen=True)
class Place:
    """Where a job finds its files."""

    folder: Path  # of the job file and the logs: <launch folder>/<n> of a job that is submitted
    code: Path  # a copy made when it was submitted; the working tree, where a job file is only printed
    commit: str


@dataclass(frozen=True)
class Launch:
    """A job file to fill, and how it is handed over."""

    kind: str  # local, slurm, kubernetes: the file is called <kind><suffix>
    suffix: str
    fill: Callable[[Place], str]
    folder: Path  # in which each launch gets a numbered folder
    tool: str  # the program that must be on PATH to submit it
    submit: Callable[[Path], None]
    configuration: dict[str, Any]  # what was asked for, as configuration.json
    snapshot: bool = True  # whether the job runs a copy of this code: a container's image has its own

    def printed(self) -> str:
        """The file as it would be, running the working tree."""
        return self.fill(Place(self.folder, CODE_FOLDER, commit_of(CODE_FOLDER)))


def quote_shell(value: str) -> Quoted:
    """Quotes a word for bash."""
    return Quoted(shlex.quote(value))


def quote_sbatch(value: str) -> Quoted:
    """Quotes a word for an ``#SBATCH`` line.

    sbatch parses those itself and, unlike a shell, takes a backslash as an escape inside single quotes too: so double
    quotes, with backslash and double quote escaped (slurm: src/sbatch/opt.c, ``_get_argument``).
    """
    return Quoted('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"')


def quote_yaml(value: str) -> Quoted:
    """Quotes a YAML scalar. A JSON string is one; non-ASCII stays as it is (YAML knows no surrogate pairs)."""
    return Quoted(json.dumps(value, ensure_ascii=False))


def quote_kubernetes_argument(value: str) -> Quoted:
    """Quotes an item of a container's ``command``: Kubernetes expands ``$(NAME)`` there, and reads ``$$`` as ``$``."""
    return quote_yaml(value.replace("$", "$$"))


def as_printable(value: str) -> Quoted:
    """Text for a comment, or a name made here: as it is, but for what could end the line."""
    return Quoted("".join(character if character.isprintable() else "?" for character in value))


def render(template: str, **values: Any) -> str:
    """Fills ``templates/<template>``; a name without a value is an error, and so is text that no filter has quoted."""

    def refuse_unquoted(value: Any) -> Any:
        if isinstance(value, jinja2.Undefined):
            return str(value)  # raises, with the name
        assert isinstance(value, (Quoted, int)), f"{template}: {value!r} reaches the file without being quoted"
        return value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=refuse_unquoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        shell=quote_shell,
        sbatch=quote_sbatch,
        yaml=quote_yaml,
        argument=quote_kubernetes_argument,
        printable=as_printable,
    )
    return environment.get_template(template).render(**values)


def option_name(field: str) -> str:
    """The command line's name of a dataclass field."""
    return "--" + field.replace("_", "-")


def require_printable(options: Any) -> None:
    """Refuses empty text and control characters in any text option: a newline would end a directive or a comment.

    Raises:
        ValueError: naming the option.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            require_printable(value)
        elif isinstance(value, str):
            if not value.strip():
                raise ValueError(f"{option_name(field.name)}: the value is empty; leave it out or give one")
            require_printable_text(option_name(field.name), value)


def require_printable_text(option: str, value: str) -> None:
    """Refuses a line break, control character or undecodable byte, and a URL with a password."""
    if PASSWORD_IN_URL.search(value):
        raise ValueError(f"{option}: a password in a URL would be written into the job file; give it by environment")
    if not value.isprintable():
        raise ValueError(
            f"{option}: {value!r} holds a line break or another character that cannot be printed; remove it"
        )


def require_import_path(option: str, folder: Path) -> None:
    """Refuses a folder that cannot stand in PYTHONPATH, where the copy of the code must."""
    if ":" in str(folder):
        raise ValueError(f"{option}: {folder} holds a colon, at which Python splits its path; choose another folder")


def duration_seconds(option: str, text: str) -> int:
    """Reads ``[days-]hours:minutes:seconds``, the one form that Slurm and a reader understand alike (48:00 is minutes).

    Raises:
        ValueError: another form, or less than a minute.
    """
    match = DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{option}: {text!r} is no duration; write hours:minutes:seconds, such as 48:00:00")
    days, hours, minutes, seconds = (int(match[part] or 0) for part in ("days", "hours", "minutes", "seconds"))
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total < 60:
        raise ValueError(f"{option}: {text} is too short to start in; give at least 00:01:00")
    return total


def require_port(port: int) -> None:
    """Refuses a port that an ordinary user cannot open."""
    if not 1024 <= port <= 65535:
        raise ValueError(f"--port: {port} is outside 1024 to 65535; leave the option out or choose one inside")


def write_launch(launch: Launch) -> Path:
    """Writes `<folder>/<n>/` with the first free n: job file, code, commit and configuration. Returns the job file.

    The temporary folder holds the number while it is filled, and the final name is looked at only then, so two launches
    at once never take the same one.
    """
    launch.folder.mkdir(parents=True, exist_ok=True)
    temporary, final = _claim(launch.folder)
    try:
        code = final / "code" if launch.snapshot else CODE_FOLDER
        if launch.snapshot:
            copy_code(CODE_FOLDER, temporary / "code")
        commit = describe_commit(CODE_FOLDER)
        (temporary / COMMIT_NAME).write_text(commit, encoding="utf-8", errors="surrogateescape")
        configuration = json.dumps(launch.configuration, indent=1, ensure_ascii=False) + "\n"
        (temporary / "configuration.json").write_text(configuration, encoding="utf-8")
        script = temporary / f"{launch.kind}{launch.suffix}"
        script.write_text(launch.fill(Place(final, code, commit_of(CODE_FOLDER))), encoding="utf-8")
        if launch.suffix == ".sh":
            script.chmod(script.stat().st_mode | 0o111)
        os.sync()  # hundreds of small files, of which none may be torn under the final name
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final / script.name


def _claim(folder: Path) -> tuple[Path, Path]:
    number = 0
    while True:
        number += 1
        final = folder / str(number)
        temporary = folder / f".{number}.tmp"
        if final.exists():
            continue
        try:
            temporary.mkdir()
        except FileExistsError:  # of a launch that was killed, or is still writing
            continue
        if not final.exists():
            return temporary, final
        temporary.rmdir()


def require_tool(launch: Launch) -> None:
    """Refuses to submit where the scheduler's program is missing.

    Raises:
        ValueError: with the way to submit from another machine.
    """
    if shutil.which(launch.tool) is None:
        raise ValueError(
            f"{launch.kind}: `{launch.tool}` is not on PATH, so nothing was written or submitted; run this where it "
            f"is, or leave --submit out, save what it prints and submit that file there"
        )


def run_tool(command: Sequence[str]) -> str:
    """Runs a scheduler's program and returns its standard output.

    Raises:
        ValueError: it failed; the message holds what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise ValueError(f"`{shlex.join(command)}` failed with status {done.returncode}: {said}")
    return done.stdout.strip()
