"""Cartridges on the Hugging Face Hub: their cards, pushing and pulling them, finding and composing them."""

from ..hub_errors import HubError
from .base_model import check_base_model, identify_base_model
from .card_facts import BaseIdentity, CardFacts, Metric, Part, current_package_versions, load_facts, save_facts
from .compose_cartridges import compose
from .discovery import list_cartridges
from .load import load_cartridge
from .model_card import CARD_TAGS, build_model_card, write_model_card
from .pull import pull_cartridge
from .push import Push, push_cartridge

__all__ = [
    "CARD_TAGS",
    "BaseIdentity",
    "CardFacts",
    "HubError",
    "Metric",
    "Part",
    "Push",
    "build_model_card",
    "check_base_model",
    "compose",
    "current_package_versions",
    "identify_base_model",
    "list_cartridges",
    "load_cartridge",
    "load_facts",
    "pull_cartridge",
    "push_cartridge",
    "save_facts",
    "write_model_card",
]
