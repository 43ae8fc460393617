"""manifest.json as types. The JSON schema in runtime_bindings/schema is generated from here; FORMAT.md explains it."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = [
    "FORMAT_MAJOR",
    "FORMAT_VERSION",
    "FileRecord",
    "Manifest",
    "Model",
    "Place",
    "Provenance",
    "Sampling",
    "Target",
    "Weight",
    "first_fault",
]

FORMAT_VERSION = "1.0"
FORMAT_MAJOR = 1

MODEL_SIZES = (
    "model_type", "vocabulary_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim",
    "tied",
)  # fmt: skip

Count = Annotated[int, Field(ge=1, le=1 << 40)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
TargetName = Annotated[str, Field(pattern="^(onnx|executorch|coreml)$")]
SchemeName = Literal["int4", "int8", "fp32"]


class Closed(BaseModel):
    """An immutable object that refuses unknown keys and converts nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong, behind the key where it stands: ``'targets.onnx.path': Field required``."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    return f"'{key}': {first['msg']}" if key else str(first["msg"])


class Sampling(Closed):
    """generation_config.json's defaults; only the keys that it states."""

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None


class Model(Closed):
    """The model's sizes and its stop ids."""

    model_type: str
    vocabulary_size: Count
    hidden_size: Count
    intermediate_size: Count
    layers: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    context_length: Count
    trained_context_length: Count
    tied: bool
    stop_ids: list[TokenId]
    bos_id: TokenId | None = None
    pad_id: TokenId | None = None
    sampling: Sampling


class Scheme(Closed):
    """The scheme of each class of tensors, and the columns of a group of int4 as asked for, where there is any int4.

    ``bits_per_weight`` counts the store's bytes, scales included.
    """

    name: SchemeName
    linears: SchemeName
    embedding: SchemeName
    head: SchemeName
    vectors: Literal["fp32"] = "fp32"
    group: Count | None = None
    bits_per_weight: Annotated[float, Field(gt=0, le=32)]


class Target(Closed):
    """One artifact: its file or folder, the packages that run it with their version ranges, and its limits."""

    path: str
    runtime: dict[str, str]
    longest_call: Count
    rows: Count
    notes: list[str]


class FileRecord(Closed):
    """A file's sha256 and size in bytes."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0)]


class Provenance(Closed):
    """What the bundle was made from and with; ``accepted`` names what of the checkpoint was ignored on request.

    ``adapter_sha256``: of the adapter that was merged into the weights, where there was one; ``checkpoint_sha256`` is
    over the merged weights.
    """

    checkpoint_sha256: Sha256
    adapter_sha256: Sha256 | None = None
    accepted: list[str] = Field(default_factory=list)
    pocketlm: str
    libraries: dict[str, str]


class Place(Closed):
    """A weight in one artifact: the artifact's own entry and the first of its rows there."""

    entry: str
    first_row: Annotated[int, Field(ge=0)] = 0


class Weight(Closed):
    """A weight by its Hugging Face name. ``sha256``: of its content, whatever the packing: see FORMAT.md.

    ``group``: how many columns share a scale, of an int4 weight and of no other.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"properties": {"scheme": {"const": "int4"}, "group": {"type": "integer"}}, "required": ["group"]},
                {"properties": {"scheme": {"enum": ["int8", "fp32"]}, "group": {"type": "null"}}},
            ]
        }
    )

    scheme: SchemeName
    group: Count | None = None
    sha256: Sha256
    shape: list[Count]
    places: dict[TargetName, Place]

    @model_validator(mode="after")
    def _group_is_int4s(self) -> Self:
        if (self.scheme == "int4") != (self.group is not None):
            raise ValueError("an int4 weight states the columns of a group, and no other does")
        return self


class Manifest(Closed):
    """The whole of manifest.json."""

    format_version: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    model: Model
    scheme: Scheme
    targets: dict[TargetName, Target]
    files: dict[str, FileRecord]
    provenance: Provenance
    weights: dict[str, Weight]

    def model_sha256(self) -> str:
        """The identity of the model, whatever its artifacts: over its sizes, and over each weight by its content.

        Two exports of the same integers have the same, in other targets or for another context length too.
        """
        identity = {
            "model": self.model.model_dump(mode="json", include=set(MODEL_SIZES)),
            "weights": {
                name: weight.model_dump(mode="json", exclude={"places"}) for name, weight in self.weights.items()
            },
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sampling_defaults(sampling: Sampling) -> Mapping[str, object]:
    """The stated keys only."""
    return sampling.model_dump(exclude_none=True)
