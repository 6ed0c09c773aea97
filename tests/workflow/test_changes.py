"""How a changed setting is named: the one that differs, not the list around it."""

from qwen_moe.workflow.state import differences


def test_of_a_list_of_sections_only_what_differs_is_named() -> None:
    filters = [{"kind": "length", "only": []}, {"kind": "words", "only": ["a", "b"], "settings": {"least": 4}}]
    other = [filters[0], {"kind": "words", "only": ["a"], "settings": {"least": 5}}]
    assert differences({"filters": filters}, {"filters": other}) == [
        "filters.2.only was ['a', 'b'], is now ['a']; filters.2.settings.least was 4, is now 5"
    ]


def test_lists_of_other_lengths_and_kinds_are_named_whole() -> None:
    assert differences({"f": [{"a": 1}]}, {"f": [{"a": 1}, {"b": 2}]}) == [
        "f was [{'a': 1}], is now [{'a': 1}, {'b': 2}]"
    ]
    assert differences({"f": [{"a": 1}]}, {"f": []}) == ["f was [{'a': 1}], is now []"]
    assert differences({"f": [1]}, {"f": [2]}) == ["f was [1], is now [2]"]
    assert differences({"f": [{"a": 1}]}, {"f": [{"a": 1}]}) == []
