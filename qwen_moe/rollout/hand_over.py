"""Has a server load other weights: by SGLang's own request, or by a command of the user's.

SGLang: ``POST /update_weights_from_disk`` with ``model_path`` (docs.sglang.io, native APIs). vLLM's plain server has no such
request; its development mode has ``/collective_rpc``, and a server may also be started again.
"""

import shlex
import subprocess
from pathlib import Path

from launchers.counted import counted
from qwen_moe.config.rollout import PLACE
from qwen_moe.errors import UserError
from qwen_moe.rollout.server import ServerSampler

_SHOWN = 500  # letters of what a command says


def hand_over(sampler: ServerSampler, directory: Path, reload: str) -> None:
    """Have the server of ``sampler`` load the Hugging Face directory ``directory``, by ``reload`` if it is not empty. Raises
    UserError if the server or the command says that it failed; whether it serves these weights is another question."""
    path = str(directory.absolute())
    if reload:
        _run([part.replace(PLACE, path) for part in shlex.split(reload)], sampler)
        return
    answer = sampler.ask("/update_weights_from_disk", {"model_path": path})
    if not isinstance(answer, dict) or answer.get("success") is not True:
        said = answer.get("message") if isinstance(answer, dict) else answer
        raise UserError(
            f"{sampler.server.name()} did not load {path}: {str(said)[:_SHOWN]}. It must see this directory under the same "
            f"path. {sampler.server.goes_on}"
        )


def _run(command: list[str], sampler: ServerSampler) -> None:
    def problem(text: str) -> UserError:
        return UserError(
            f"{sampler.server.name('reload')}: `{shlex.join(command)}` {text}. {sampler.server.goes_on} once it works"
        )

    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=sampler.server.seconds
        )
    except subprocess.TimeoutExpired:
        limit = f"{counted(sampler.server.seconds, 'second')} ({sampler.server.name('seconds')})"
        raise problem(f"did not end within {limit}") from None
    except OSError as error:
        raise problem(f"cannot be run: {error.strerror or error}") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-_SHOWN:]
        raise problem(f"ended with {done.returncode}: {said or 'it said nothing'}")
