"""500 draws: damage of every file that is read, odd values of every option and of every key of a recipe. Each answer is a
result or one message within seconds; never a traceback, never another number in silence.

A failure is shown with the command that repeats it. `QWEN_MOE_FUZZ_SEED=N` draws others, `QWEN_MOE_FUZZ_TIMES=10` ten
times as many.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.damage import strategy
from tests.fuzz.draws import Draw, Fuzz
from tests.fuzz.options import BASE, judge_options, option_draws, override_draws
from tests.fuzz.server import HEAVY, Server
from tests.fuzz.targets import TARGETS
from tests.fuzz.world import build

SEED = os.environ.get("QWEN_MOE_FUZZ_SEED", "1")
TIMES = int(os.environ.get("QWEN_MOE_FUZZ_TIMES", "1"))
OF_A_FILE, OF_A_VERB, OF_SETTINGS = 9, 7, 90

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzz]:
    server = Server(HEAVY)
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        yield Fuzz(build(folder / "world", server), folder)
    finally:
        server.close()


def _all_right(name: str, draws: st.SearchStrategy[Any], count: int, judge: Callable[[Any], str | None]) -> None:
    """Judge ``count`` draws and show all that were answered wrongly. Not shrunk: a draw is small, and costs a second."""
    wrong: list[str] = []

    @seed(f"{SEED} {name}")
    @settings(
        max_examples=count * TIMES,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(draws)
    def each(draw: Any) -> None:
        problem = judge(draw)
        if problem is not None:
            wrong.append(f"{problem}\n    {draw.repeat()}")

    each()
    assert not wrong, f"seed {SEED}: {len(wrong)} of {count * TIMES} draws\n" + "\n".join(wrong)


def _file_draws(target: str) -> st.SearchStrategy[Draw]:
    return st.builds(
        Draw,
        target=st.just(target),
        reader=st.sampled_from(TARGETS[target].readers),
        file=st.integers(0, 20),
        damage=strategy(TARGETS[target].form),
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_is_noticed(fuzz: Fuzz, target: str) -> None:
    _all_right(target, _file_draws(target), OF_A_FILE, fuzz.judge)


@pytest.mark.parametrize("verb", BASE, ids=" ".join)
def test_an_odd_option_is_answered(fuzz: Fuzz, verb: tuple[str, ...]) -> None:
    _all_right(" ".join(verb), option_draws(verb), OF_A_VERB, lambda draw: judge_options(fuzz, draw))


def test_an_odd_setting_is_answered(fuzz: Fuzz) -> None:
    _all_right("settings", override_draws(), OF_SETTINGS, lambda draw: judge_options(fuzz, draw))


def test_there_are_500_draws() -> None:
    assert len(TARGETS) * OF_A_FILE + len(BASE) * OF_A_VERB + OF_SETTINGS >= 500
