"""Training a cartridge by self-study, in TRL's style."""

from .self_study_config import SelfStudyConfig
from .self_study_trainer import SelfStudyTrainer

__all__ = ["SelfStudyConfig", "SelfStudyTrainer"]
