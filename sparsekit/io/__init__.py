"""Checkpoints: safetensors, compressed, atomic."""

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint, write_atomically

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint", "write_atomically"]
