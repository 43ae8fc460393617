"""A written .pte opened for verification: parsed, checked, executed in float64, and rebuilt for the real runtime.

Nothing here comes from the writer; both know ExecuTorch's schemas alone.
"""
