"""A run's configuration: typed, frozen, nested, every field described; `root.py` holds the whole."""

from maxllm.config.data import BatchConfig as BatchConfig
from maxllm.config.data import CleanConfig as CleanConfig
from maxllm.config.data import DataConfig as DataConfig
from maxllm.config.data import TokenizerConfig as TokenizerConfig
from maxllm.config.dpo import DpoConfig as DpoConfig
from maxllm.config.generation import GenerationConfig as GenerationConfig
from maxllm.config.lora import LoraConfig as LoraConfig
from maxllm.config.mesh import MeshConfig as MeshConfig
from maxllm.config.mesh import Offload as Offload
from maxllm.config.model import Activation as Activation
from maxllm.config.model import ModelConfig as ModelConfig
from maxllm.config.model import RopeScaling as RopeScaling
from maxllm.config.optimizer import OptimizerConfig as OptimizerConfig
from maxllm.config.ppo import PpoConfig as PpoConfig
from maxllm.config.reward import RewardConfig as RewardConfig
from maxllm.config.root import Config as Config
from maxllm.config.run import RunConfig as RunConfig
from maxllm.config.run import StartConfig as StartConfig
