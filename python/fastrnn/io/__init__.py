"""Models on disk.

Reading a file never runs anything that the file names: classes come from a fixed table, and every
tensor is checked against what the model needs before any of it is allocated.
"""

from fastrnn.io.atomic import atomic_write
from fastrnn.io.safetensors import load, read_metadata, read_tensors, save, write_tensors

__all__ = ["atomic_write", "load", "read_metadata", "read_tensors", "save", "write_tensors"]
