"""The base model's licence, from a folder and from the cache, and where there is none to tell."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from peft_cartridges.hub.base_license import read_base_license
from tests.hub.local_hub import LocalHub


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: of-our-own\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlanguage: en\n---\n", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("---\njust words\n---\n", None),
        ("# No metadata\n", None),
        (b"\xff\xfe", None),
        (None, None),
    ],
)
def test_a_folder(tmp_path: Path, card: str | bytes | None, expected: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert read_base_license(str(tmp_path)) == expected


def test_the_cache_is_asked_and_the_hub_is_not(hub: LocalHub) -> None:
    commit = hub.add_repo("org/base", {"README.md": b"---\nlicense: mit\n---\n"})
    assert read_base_license("org/base") is None
    assert hub.requests == []
    hf_hub_download("org/base", "README.md")
    hub.requests.clear()
    assert read_base_license("org/base") == read_base_license("org/base", commit) == "mit"
    assert read_base_license("org/base", "0" * 40) is None
    assert hub.requests == []


def test_without_a_name_there_is_none() -> None:
    assert read_base_license(None) is None and read_base_license("not a name") is None
