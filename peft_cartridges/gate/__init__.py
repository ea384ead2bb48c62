"""The gate: whether a request is one for a cartridge, told from the request's words alone."""

from .gate import GATE_FILE, Gate, Request, any_accepts, load_gate
from .prompts import GENERAL_REQUESTS, TEXT_QUESTIONS

__all__ = ["GATE_FILE", "GENERAL_REQUESTS", "TEXT_QUESTIONS", "Gate", "Request", "any_accepts", "load_gate"]
