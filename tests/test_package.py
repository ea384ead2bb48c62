"""The package as a whole: what importing it costs, and what it exports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import peft_cartridges


def test_import_registers_the_tuner_and_loads_nothing_heavier() -> None:
    program = (
        "import sys, peft_cartridges\n"
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as mapping\n"
        "assert mapping['CARTRIDGE'] is peft_cartridges.CartridgeModel\n"
        "print(sorted({'trl', 'datasets', 'vllm', 'gradio', 'matplotlib', 'liger_kernel'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(peft_cartridges, name).__doc__ for name in peft_cartridges.__all__)
    assert set(peft_cartridges.__all__) <= set(dir(peft_cartridges))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = peft_cartridges.nothing


@pytest.mark.parametrize("command", [["-m", "peft_cartridges"], ["-c", "import sys; sys.argv[0] = 'bin/cartridges'; "
    "from peft_cartridges.cli import main; main(['list', '--help'])"]])  # fmt: skip
def test_the_command_says_nothing_of_other_libraries(command: list[str]) -> None:
    options = [] if "-c" in command else ["--version"]
    done = subprocess.run([sys.executable, *command, *options], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr
