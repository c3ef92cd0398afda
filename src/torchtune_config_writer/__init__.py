"""The names of the torchtune config writer, which is lacuna.experiment now."""

from lacuna.experiment.builder import TorchtuneConfigBuilder
from lacuna.experiment.generator import generate

__all__ = ["TorchtuneConfigBuilder", "generate"]
