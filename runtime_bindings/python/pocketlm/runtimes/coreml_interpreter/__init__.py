"""A reference interpreter of Core ML packages (``.mlpackage`` with an mlProgram) on numpy.

It reads the written files itself and shares no code with what writes them. It shows what a package says, in float32,
float64 or rounded to fp16 after every operator; it never claims to be the Neural Engine, and its speed means nothing.
"""

from .interpreter import InputDescription, Interpreter, Request
from .program import TensorType
from .tensors import PrecisionName

__all__ = ["InputDescription", "Interpreter", "PrecisionName", "Request", "TensorType"]
