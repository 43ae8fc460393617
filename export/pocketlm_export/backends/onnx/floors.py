"""The oldest release of ONNX Runtime that is right on what was emitted; each was run on the releases around it."""

import onnx_ir as ir

__all__ = ["runtime_floor"]

Release = tuple[int, int, int]

BASE: Release = (1, 23, 2)  # 1.22 refuses the opset and uint8 GatherBlockQuantized
WINDOW: Release = (1, 24, 1)  # 1.23.2's GroupQueryAttention means another width by local_window_size
LARGE_GROUPS: Release = (1, 24, 3)  # QMoE computes something else in blocks of more than 32 columns before
ROUTER_WEIGHTS: Release = (1, 25, 0)  # QMoE's input
WHOLE_ROW_GROUPS: Release = (1, 31, 0)  # QMoE refuses rows of a single block before


def runtime_floor(model: ir.Model) -> str:
    """As ``1.2.3``."""
    return ".".join(map(str, max(_floor(node) for node in model.graph)))


def _floor(node: ir.Node) -> Release:
    match node.op_type:
        case "GroupQueryAttention" if node.attributes.get_int("local_window_size", -1) != -1:
            return WINDOW
        case "QMoE":
            floors = [BASE]
            block, scales = node.attributes.get_int("block_size", 0), node.inputs[3]
            assert scales is not None and scales.shape is not None
            if block > 32:
                floors.append(LARGE_GROUPS)
            if block and scales.shape[-1] == 1:
                floors.append(WHOLE_ROW_GROUPS)
            if len(node.inputs) > 14:
                floors.append(ROUTER_WEIGHTS)
            return max(floors)
        case _:
            return BASE
