"""maxllm: the whole life of a LLaMA model in JAX. Import the module you use; nothing is re-exported here."""

__version__ = "0.1.0"
