"""The rollout section: what a run samples from its own model, and how the answers are rewarded."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from qwen_moe.config.fields import Finite, GivenPath, NonNegativeInt, PositiveFloat, PositiveInt, Section, Size


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
    queries that greedy answers are measured on, every ``held_out_interval`` episodes.
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.rewards and self.reward_model is None:
            raise ValueError("there is no reward: give rewards, such as [exact], or reward_model")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} numbers and rewards {len(self.rewards)} names: give one for "
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
