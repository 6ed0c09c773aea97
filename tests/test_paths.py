"""Names that come out of files: plain ones pass, whatever leads elsewhere does not."""

from pathlib import Path

import pytest

from qwen_moe.paths import check_name, inside


@pytest.mark.parametrize(
    "name", ["a", "model-00001-of-00002.safetensors", "hf/assets/a b.png", ".metadata", "..a", "ü"]
)
def test_plain_names(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "//server/share", "..", "../a", "a/../../b", "a/..", "./a", "a//b", "a/", "C:\\a", "c:a", "a\\..\\b",
     "a\0", "a\nb", "\ud800", None, 3, ["a"], b"a"],
)  # fmt: skip
def test_names_that_lead_elsewhere(name: object) -> None:
    with pytest.raises(ValueError):
        check_name(name)


def test_links_that_lead_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").touch()
    (tmp_path / "in" / "file").touch()
    (tmp_path / "in" / "link").symlink_to("file")
    (tmp_path / "in" / "out").symlink_to("../secret")
    (tmp_path / "in" / "folder").symlink_to("..")
    assert inside(tmp_path / "in", "link").is_file()
    for name in ("out", "folder/secret"):
        with pytest.raises(ValueError, match="leads out of"):
            inside(tmp_path / "in", name)
    # The directory itself may be reached by a link.
    (tmp_path / "alias").symlink_to("in")
    assert inside(tmp_path / "alias", "file").is_file()


def test_links_in_a_circle_lead_out(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    with pytest.raises(ValueError, match="circle"):
        inside(tmp_path, "one")
