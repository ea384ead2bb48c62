"""What a practitioner would do instead of a cartridge, each as a `System` of the same size where it has one."""

from .bench import Bench
from .registry import BASELINES, get_baseline, list_baselines, register_baseline

__all__ = ["BASELINES", "Bench", "get_baseline", "list_baselines", "register_baseline"]
