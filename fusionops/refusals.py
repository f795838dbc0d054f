"""Why no kernel of a kind can run a spec, on whatever device: reasons that the backends share."""

from __future__ import annotations

from collections.abc import Collection

from fusionops.spec import Direction, FusionSpec, Merge


def merge_reasons(spec: FusionSpec, merge: Merge, dtype: str | None, floating: Collection[str]) -> list[str]:
    """Of kernels that merge and do no more: of one dtype, or with None of all, but then nothing that needs arithmetic
    on dtypes other than `floating`.
    """
    reasons = _general_reasons(spec, merge)
    if spec.contraction is not None:
        reasons.append("the spec contracts, needs a merge alone")
    kinds = [source.dtype for source in spec.sources]
    if dtype and {spec.dtype, *kinds} != {dtype}:
        reasons.append(f"dtypes are {', '.join(kinds)} to {spec.dtype}, needs {dtype}")
    plain = spec.activation is None and all(source.is_plain for source in spec.sources)
    same = {*kinds} == {spec.dtype} and spec.dtype in floating
    if dtype is None and not plain and not (merge is Merge.CONCAT and same):
        reasons.append(f"a merge that is more than a plain {merge} needs sources of one floating dtype")
    return reasons


def contraction_reasons(spec: FusionSpec, merge: Merge, dtype: str) -> list[str]:
    """Of kernels that contract what they merge, all in one dtype."""
    reasons = _general_reasons(spec, merge)
    if spec.dtype != dtype:
        reasons.append(f"dtype is {spec.dtype}, needs {dtype}")
    if spec.precision is not None and spec.dtype != "float32":
        reasons.append(f"precision is {spec.precision}, which is for float32, and dtype is {spec.dtype}")
    return reasons


def _general_reasons(spec: FusionSpec, merge: Merge) -> list[str]:
    reasons = []
    if spec.direction is not Direction.FPROP:
        reasons.append(f"direction is {spec.direction}, needs fprop")
    if spec.merge is not merge:
        reasons.append(f"merge is {spec.merge}, needs {merge}")
    every = (*spec.sources, spec.residual) if spec.residual else spec.sources
    asked = [name for name in ("scale", "shift", "activation") if any(getattr(source, name) for source in every)]
    return reasons + [f"a source has {name}, which no kernel applies yet" for name in asked]
