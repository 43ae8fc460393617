"""Small Core ML packages made with coremltools' MIL builder, for the tests of what reads them."""

import logging
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any


@cache
def coremltools() -> ModuleType:
    """coremltools without its torch and scikit-learn frontends, which cost ten times its import."""
    hidden = {name: sys.modules.get(name) for name in ("torch", "sklearn", "transformers")}
    logging.disable(logging.WARNING)
    try:
        sys.modules.update(dict.fromkeys(hidden))
        import coremltools
    finally:
        logging.disable(logging.NOTSET)
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return coremltools


def save_package(path: Path, functions: Mapping[str, tuple[dict[str, Any], Callable[..., list[Any]]]]) -> Path:
    """``functions``: name -> (placeholders by name, body that takes the inputs by name and returns results)."""
    ct = coremltools()
    from coremltools.converters.mil.mil import Function, Program

    program = Program()
    for name, (placeholders, body) in functions.items():
        with Function(placeholders, opset_version=ct.target.iOS18) as function:
            function.set_outputs(body(**function.inputs))
        program.add_function(name, function)
    if "main" not in functions:
        program.default_function_name = next(iter(functions))
        program.export_as_multifunction = True
    elif len(functions) > 1:
        program.export_as_multifunction = True
    ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    ).save(str(path))
    return path


def tensor(shape: tuple[Any, ...], element: str, name: str) -> Any:
    coremltools()
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.program import Placeholder

    return Placeholder(shape, dtype=getattr(types, element), name=name)


def state(shape: tuple[int, ...], name: str) -> Any:
    coremltools()
    from coremltools.converters.mil.mil import types
    from coremltools.converters.mil.mil.program import StateTensorPlaceholder

    return StateTensorPlaceholder(shape, dtype=types.fp16, name=name)
