"""ExecuTorch's profile: an ETDump, of XNNPACK's operators and of the kernels beside the delegate.

Matrices are meant for XNNPACK's delegate; attention, caches and quantized embeddings have kernels of their own. A
fallback is a product or a softmax that runs beside both, in ExecuTorch's portable kernels.
"""

import re
from pathlib import Path

from pocketlm.artifact import Artifact
from pocketlm.measuring import etdump
from pocketlm.results import OperatorTime

__all__ = ["read_operators"]

WRITTEN_FOR = re.compile(r"^(llama::|embedding_(byte|4bit)\b)")
HEAVY = re.compile(r"^(aten::)?(_log_softmax|_softmax|addmm|baddbmm|bmm|convolution|linear|matmul|mm)\b")


def read_operators(profile: Path, artifact: Artifact, features: str) -> list[OperatorTime]:  # noqa: ARG001
    """Its operators by name, those of the delegate marked as XNNPACK's."""
    return [_judged(operator) for operator in etdump.read_etdump(profile)]


def _judged(operator: etdump.OperatorTime) -> OperatorTime:
    beside = not operator.delegated
    return OperatorTime(
        name=operator.name if beside else f"XNNPACK {operator.name}",
        calls=operator.calls,
        seconds=operator.seconds,
        delegated=operator.delegated or WRITTEN_FOR.match(operator.name) is not None,
        fallback="in a portable kernel, outside the delegate" if beside and HEAVY.match(operator.name) else None,
    )
