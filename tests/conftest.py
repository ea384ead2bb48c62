"""What all tests share: no network, one thread (the models are tiny), and the marker that the support table reads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "supports(section, what, on=, refused=False): a part of docs/supported.md; see tests/support_table.py",
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
