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

CODE_FOLDER = Path(os.path.abspath(__file__)).parent.parent  # abspath: resolving links breaks automounted home folders
TEMPLATES = Path(__file__).parent / "templates"
DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")


class Quoted(str):
    """Text made safe for the place where it stands in a template."""


@dataclass(frozen=True)
class Launch:
    """One filled job file and how it is handed over."""

    kind: str  # local, slurm, kubernetes: the file is called <kind>-<n><suffix>
    suffix: str
    text: str
    folder: Path  # where the file is written
    tool: str  # the program that must be on PATH to submit it
    submit: Callable[[Path], None]


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
    """Refuses a line break, control character or undecodable byte."""
    if not value.isprintable():
        raise ValueError(
            f"{option}: {value!r} holds a line break or another character that cannot be printed; remove it"
        )


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


def write_launch_file(launch: Launch) -> Path:
    """Writes ``<folder>/<kind>-<n><suffix>`` with the first free n, and returns its path.

    The temporary name holds the number while the file is written, and the final name is looked at only then, so two
    launches at once never take the same one.
    """
    launch.folder.mkdir(parents=True, exist_ok=True)
    mode = 0o777 if launch.suffix == ".sh" else 0o666  # less the user's umask
    number = 0
    while True:
        number += 1
        final = launch.folder / f"{launch.kind}-{number}{launch.suffix}"
        if final.exists():
            continue
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        except FileExistsError:
            continue
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(launch.text)
                stream.flush()
                os.fsync(stream.fileno())
            if not final.exists():
                temporary.rename(final)
                return final
        finally:
            temporary.unlink(missing_ok=True)


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
