"""The names of the torchtune config writer, which is lacuna.experiment now."""

from lacuna.experiment.generator import generate
from torchtune_config_writer.builder import TorchtuneConfigBuilder

__all__ = ["TorchtuneConfigBuilder", "generate"]
