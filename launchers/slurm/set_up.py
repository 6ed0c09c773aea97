"""The script's lines before the run: they unset variables that would change its steps and check set-up commands."""

import re
import shlex
from collections.abc import Sequence

# Variables that srun reads and that would harm the script's steps: another number of tasks, a time limit of the step, output
# elsewhere. (--export, --cpu-bind, --wait and others are given as options, which override variables.)
_OF_SRUN = (
    "SLURM_EXPORT_ENV",
    "SLURM_IMMEDIATE",
    "SLURM_MULTI_PROG",
    "SLURM_NPROCS",
    "SLURM_NTASKS",
    "SLURM_REMOTE_CWD",
    "SLURM_STDERRMODE",
    "SLURM_STDINMODE",
    "SLURM_STDOUTMODE",
    "SLURM_TEST_EXEC",
    "SLURM_THREADS",
    "SLURM_TIMELIMIT",
    "SLURM_WORKING_DIR",
)
_MODULE = re.compile(r"\s*(?:module(?:\s+-\S+)*\s+(?:load|add)|ml)\s+([^|]*)")
# Errors that Tcl modules (`x.c(213):ERROR:105: ...`, `ERROR: ...`, `Module ERROR`) and Lmod print, some with a status of 0.
_SAID = (
    r"^[[:space:]]*(ERROR:|Module ERROR|Lmod has detected the following error)|"
    r":ERROR:[0-9]+:|Unable to locate a modulefile"
)
_FUNCTIONS = f"""\
load_modules() {{  # $1: a command that loads modules. Some versions of `module` fail with a status of 0.
  local before="${{LOADEDMODULES:-}}" said status name
  said="$(mktemp)" || return 1
  eval "$1" 2> "$said"; status=$?
  cat "$said" >&2
  if grep -Eq {shlex.quote(_SAID)} "$said"; then status=1; fi
  rm -f "$said"
  shift
  if [ $status -eq 0 ] && declare -F module > /dev/null && [ "$before" = "${{LOADEDMODULES:-}}" ]; then
    for name in "$@"; do
      case ":$before:" in *":$name:"*|*":${{name%%/*}}/"*|*":${{name%%/*}}:"*) ;; *) status=1;; esac
    done
  fi
  return $status
}}"""


def without_variables() -> list[str]:
    """Lines that unset what srun would read. They come before the site file's commands and variables, which are kept."""
    return [
        "",
        "# Variables of the shell that launched this: srun would prefer them to the request below.",
        "unset ${!SRUN_*}" + "".join(f" {name}" for name in _OF_SRUN),
    ]


def checked(commands: Sequence[str]) -> list[str]:
    """Each command, followed by a line that ends the job if the command failed. A continued line (``\\``) is not split.

    For a line that only loads modules, its output and the loaded modules are checked too, because some versions of `module`
    fail with a status of 0. A line with `||` handles its own failure.
    """
    found = [_FUNCTIONS] if any(_loads_modules(command) for command in commands) else []
    for command in commands:
        found.append(_loading(command) if _loads_modules(command) else command)
        if not command.endswith("\\"):
            text = f"error: the set-up command {command!r} of the site file failed; add `|| true` if that is expected"
            found.append(f"[ $? -eq 0 ] || {{ printf '%s\\n' {shlex.quote(text)} >&2; exit 1; }}")
    return found


def _loads_modules(command: str) -> bool:
    return bool(_MODULE.fullmatch(command)) and not command.endswith("\\") and "\n" not in command


def _loading(command: str) -> str:
    match = _MODULE.fullmatch(command)
    assert match is not None
    names = re.split(r"[;&#]", match[1])[0].split() if not command.lstrip().startswith("ml") else []
    plain = [name for name in names if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]*", name)]
    return " ".join(["load_modules", shlex.quote(command), *map(shlex.quote, plain)])
