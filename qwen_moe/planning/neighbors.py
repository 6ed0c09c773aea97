"""Finds the layouts that differ from a given one in one field."""

from collections.abc import Iterator, Sequence

from qwen_moe.planning.layouts import Choice
from qwen_moe.planning.times import StepTime
from qwen_moe.sharding.layout import RunLayout

Timed = tuple[StepTime, Choice, RunLayout]
_SINGLE = ("recompute", "micro_batch", "sharding", "tp", "ep", "etp", "precision")


class Neighbors:
    """The layouts of a search. A schedule and its stages count as one field, as do a kind of cp and its exchange. A change
    from or to pp 1 changes the schedule with it, and a change of cp its kind."""

    def __init__(self, found: Sequence[Timed]) -> None:
        self._found = found
        self._place = {choice: place for place, (_, choice, _) in enumerate(found)}
        choices = self._place
        self._values = {name: {getattr(choice, name) for choice in choices} for name in (*_SINGLE, "pp", "cp")}
        self._schedules = {(choice.schedule, choice.per_rank) for choice in choices}
        self._kinds = {(choice.cp_kind, choice.cp_ulysses) for choice in choices}

    def of(self, choice: Choice) -> list[Timed]:
        """``choice``, if it was found, and all that differ from it in one field, fastest first."""
        places = {self._place[other] for other in self._around(choice) if other in self._place}
        return sorted((self._found[place] for place in sorted(places)), key=lambda timed: timed[0].total)

    def _around(self, choice: Choice) -> Iterator[Choice]:
        for name in _SINGLE:
            yield from (choice.changed(**{name: value}) for value in self._values[name])
        for schedule, per_rank in self._schedules:
            yield choice.changed(schedule=schedule, per_rank=per_rank)
            for pp in self._values["pp"]:
                if (pp == 1) != (choice.pp == 1) or (schedule, per_rank) == (choice.schedule, choice.per_rank):
                    yield choice.changed(pp=pp, schedule=schedule, per_rank=per_rank)
        for kind, ulysses in self._kinds:
            for cp in self._values["cp"]:
                yield choice.changed(cp=cp, cp_kind=kind, cp_ulysses=ulysses)
