"""The rollout section: what a run samples from its own model, and how the answers are rewarded."""

import re
import shlex
from typing import TYPE_CHECKING, Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from launchers.counted import counted
from qwen_moe.config.fields import (
    Finite,
    GivenPath,
    NonNegativeInt,
    OptionalSize,
    PositiveFloat,
    PositiveInt,
    Section,
    Size,
)

if TYPE_CHECKING:
    from qwen_moe.config.run import RunConfig

ServerKind = Literal["vllm", "sglang"]
PLACE = "{directory}"  # in the command that reloads a server


def wrong_address(url: str) -> str:
    """What is wrong with the address of a server, with the fix; empty if nothing is."""
    example = "give one such as http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        host, _ = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError as error:  # a port that is no number, half a bracket, a host that no name server can know
        return f"{url!r} is no address ({error}): {example}"
    if parts.username is not None or parts.password is not None:
        return "has a user name or a password in its address, which would not be sent: leave it out"
    odd = not url.isascii() or re.search(r"[\s\x00-\x1f\x7f?#]", url)
    if parts.scheme not in ("http", "https") or not host or odd:
        return f"{url!r} is no address: {example}"
    return ""


def wrong_variable(name: str) -> str:
    """What is wrong with the name of the environment variable of an API key; empty if nothing is."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*|", name):
        return ""
    return (
        "is not the name of an environment variable, such as VLLM_API_KEY (it is not shown here, in case it is the key "
        "itself): put the key into a variable, and give the variable's name"
    )


class ServerConfig(Section):
    """A server that samples the answers of objective grpo: ``url``, the name ``model`` under which it serves the model, and
    its ``kind``. Every episode's weights are written as a Hugging Face directory, which the server is told to load.

    ``reload``: the command that has it loaded, with ``{directory}`` in the place of its path; without one, SGLang's own
    request. ``seconds``: to wait for an answer, or for the command. ``tries``: of a request. ``at_once``: requests at a
    time. ``key_variable``: the environment variable with the server's API key; empty if it asks for none. ``check``: greedy
    answers whose log-probabilities are compared with the model's after each hand-over; on average they may be ``gap`` nats a
    token apart.
    """

    url: str
    model: str
    kind: ServerKind = "vllm"
    reload: str = ""
    seconds: PositiveFloat = 600.0
    tries: Size = 6
    at_once: Size = 16
    key_variable: str = ""
    check: OptionalSize = 8
    gap: PositiveFloat = 0.1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if wrong := wrong_address(self.url):
            raise ValueError(f"url {wrong}")
        if wrong := wrong_variable(self.key_variable):
            raise ValueError(f"key_variable {wrong}")
        if not self.model:
            raise ValueError("model is empty: give the name under which the server serves the model")
        if self.reload and PLACE not in self.reload:
            raise ValueError(
                f"reload {self.reload!r} does not say which directory to load: put {PLACE} where its path belongs"
            )
        try:
            shlex.split(self.reload)
        except ValueError as error:
            raise ValueError(
                f"reload {self.reload!r} cannot be split into words ({error}): correct its quotes"
            ) from None
        if self.kind == "vllm" and not self.reload:
            raise ValueError(
                "vLLM's server has no standard request that loads other weights: give reload, a command with "
                f"{PLACE} that has this server load a directory (docs/grpo.md has one), or use kind sglang"
            )
        return self


class RolloutConfig(Section):
    """Answers that objective grpo learns from, in episodes: ``queries_per_episode`` queries get ``samples`` answers each
    from the weights at the episode's begin, and ``updates_per_episode`` optimizer steps learn from equal parts of them.

    ``queries``: JSON lines as `qwen-moe rollout` reads them, or `tasks:KIND:COUNT`; with ``chat`` a prompt is a user's
    message. ``variances``: a folder of rollouts; queries with the highest variance of rewards there come first, otherwise
    every pass is shuffled. ``rewards``: as in `qwen-moe rollout`, with ``reward_weights`` (1 each), and ``reward_model``, a
    checkpoint or Hugging Face directory, whose score counts ``reward_model_weight``. A reward fails if it throws, takes
    longer than ``reward_seconds`` or gives no finite number: ``on_reward_failure``.

    ``flat_groups``: answers to a query whose rewards are all equal say nothing; they are left out of the loss and its
    weights, or kept with advantages of 0. ``truncated``: the same for answers that reached ``max_new_tokens``. ``replay``:
    training uses the experts that sampling used. ``old_log_probs``: the ratio compares with what the trainer computes at the
    episode's begin, or with what the sampler computed. ``batch``: answers sampled at a time by a process. ``held_out``:
    queries that greedy answers are measured on, every ``held_out_interval`` episodes. ``server``: samples in place of the
    processes that train, and does not say which experts tokens took.
    """

    queries: tuple[str, ...] = Field(min_length=1)
    chat: bool = True
    episodes: PositiveInt
    queries_per_episode: Size = 256
    samples: Annotated[Size, Field(ge=2)] = 8
    updates_per_episode: Size = 1
    max_new_tokens: Size = 1024
    variances: GivenPath | None = None
    rewards: tuple[str, ...] = ()
    reward_weights: tuple[Finite, ...] = ()
    reward_model: GivenPath | None = None
    reward_model_weight: Finite = 1.0
    on_reward_failure: Literal["error", "zero"] = "error"
    reward_seconds: PositiveFloat = 10.0
    reward_memory_mib: Size = 4096
    flat_groups: Literal["leave out", "keep"] = "leave out"
    truncated: Literal["keep", "leave out"] = "keep"
    replay: bool = True
    old_log_probs: Literal["trainer", "sampler"] = "trainer"
    batch: Size = 256
    held_out: tuple[str, ...] = ()
    held_out_interval: NonNegativeInt = 10
    server: ServerConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.rewards and self.reward_model is None:
            raise ValueError("there is no reward: give rewards, such as [exact], or reward_model")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights has {counted(len(self.reward_weights), 'number')} and rewards "
                f"{counted(len(self.rewards), 'name')}: give one for "
                "each, or none"
            )
        if self.queries_per_episode % self.updates_per_episode:
            raise ValueError(
                f"queries_per_episode {self.queries_per_episode} is not a multiple of updates_per_episode "
                f"{self.updates_per_episode}: each update learns from the same number of queries"
            )
        return self

    @property
    def queries_per_update(self) -> int:
        return self.queries_per_episode // self.updates_per_episode


def check_samples(config: "RunConfig") -> None:
    """Raise ValueError unless a run with the section rollout learns from its own samples, and can sample them."""
    assert config.rollout is not None
    kind = config.objective.kind
    if config.objective.reads != "samples":
        raise ValueError(f"the section rollout is for objective.kind grpo, and objective.kind is {kind}: leave it out")
    given = {
        "data.train": config.data.train,
        "data.prepare": config.data.prepare,
        "data.validation": config.data.validation,
        "data.validation_sets": config.data.validation_sets,
        "training.epochs": config.training.epochs,
    }
    if named := [name for name, value in given.items() if value]:
        raise ValueError(f"{named[0]} is not read by objective.kind {kind}: leave it out")
    if config.data.tokenizer is None:
        raise ValueError("data.tokenizer is missing: sampled answers are read and rewarded as text")
    if config.rollout.server is not None:
        _check_server(config)
    elif config.precision.compute == "fp8":
        raise ValueError(
            "objective.kind grpo samples from the model that it trains, in bf16 or wider: set precision.compute to bf16"
        )


def _check_server(config: "RunConfig") -> None:
    assert config.rollout is not None
    if config.rollout.replay and config.model.moe_layers:
        raise ValueError(
            "rollout.replay is true, but rollout.server does not say which experts its tokens took, so training chooses "
            "them anew: set rollout.replay to false (sampler_gap_mean in the record says what that changes)"
        )
    if config.balance.bias_update_rate:
        raise ValueError(
            "balance.bias_update_rate gives experts a selection bias, which the Hugging Face directories that "
            "rollout.server loads cannot store: leave it out, or leave rollout.server out"
        )
