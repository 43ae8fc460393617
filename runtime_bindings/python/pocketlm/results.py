"""Results of measuring and replaying as types: one format for every device and kind.

The JSON schema in runtime_bindings/schema is generated from here; FORMAT.md explains it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from pocketlm.errors import InputError
from pocketlm.manifest import Closed, Sha256, TargetName, first_fault
from pocketlm.strict_json import is_version_of, parse_object

__all__ = [
    "FORMAT_VERSION",
    "AnyResult",
    "BenchResult",
    "BenchRun",
    "BenchSettings",
    "DeviceRecord",
    "Divergence",
    "Energy",
    "Figure",
    "Figures",
    "Instructions",
    "Memory",
    "OperatorTime",
    "Peak",
    "Profile",
    "ReplayLimits",
    "ReplayResult",
    "ReplayRun",
    "Resident",
    "Result",
    "Run",
    "RuntimeRecord",
    "Sample",
    "SessionRecord",
    "SubjectBundle",
    "Top1",
    "Unavailable",
    "read_result",
]

FORMAT_VERSION = "1.0"
FORMAT_MAJOR = 1
LARGEST_RESULT = 256 << 20

Count = Annotated[int, Field(ge=0, le=1 << 62)]
Seconds = Annotated[float, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class SubjectBundle(Closed):
    """The bundle: its folder's name, and the sha256 of its manifest."""

    name: str
    manifest_sha256: Sha256


class DeviceRecord(Closed):
    """``address``: as ``--device`` takes it; ``emulated``: its speed and memory mean nothing; ``facts``: what it tells
    of itself, null where it doesn't."""

    address: str
    emulated: bool
    facts: dict[str, str | int | float | None]

    @property
    def kind(self) -> str:
        """``host``, ``qemu``, ``adb`` or ``ios``."""
        return self.address.partition(":")[0]


class RuntimeRecord(Closed):
    """The runtime by PocketLM's name, and the version and build that its libraries state."""

    name: TargetName
    version: str
    build: str


class Run(Closed):
    """What ran where. ``files``: sha256 of the artifact's files; ``cores``: those it was held to, null for all;
    ``threads``: null for the runtime's default."""

    device: DeviceRecord
    runtime: RuntimeRecord
    files: dict[str, Sha256]
    threads: Annotated[int, Field(ge=1)] | None
    cores: list[Count] | None
    packed: bool


class BenchSettings(Closed):
    """``depth`` tokens filled the cache, then ``prompt_tokens`` were prefilled and ``new_tokens`` generated."""

    prompt_tokens: Annotated[int, Field(ge=1)]
    new_tokens: Annotated[int, Field(ge=2)]
    depth: Count


class Resident(Closed):
    """Bytes at one moment; ``highest``: the most that both together ever were, by the kernel's own count."""

    anonymous: Count
    file_backed: Count
    highest: Count


class Peak(Closed):
    """Bytes; each is the highest of its own, and they need not have occurred at one moment."""

    resident: Count
    anonymous: Count
    file_backed: Count


class Memory(Closed):
    """Of the measuring process at four moments, and its peaks; null where the system doesn't split memory."""

    before_load: Resident | None
    loaded: Resident | None
    first_token: Resident | None
    decoded: Resident | None
    load_peak: Peak | None
    generation_peak: Peak | None
    peak: Peak | None


class Energy(Closed):
    """Joules that ``method`` counted, of all that ran meanwhile; all null where the platform counts none."""

    method: str | None
    prefill_joules: NotNegative | None
    decode_joules: NotNegative | None

    @model_validator(mode="after")
    def _no_figure_without_a_method(self) -> Self:
        if self.method is None and (self.prefill_joules is not None or self.decode_joules is not None):
            raise ValueError("joules need the method that counted them")
        return self


class Sample(Closed):
    """One repetition: a fresh process. ``cold``: the artifact was dropped from the page cache before it was loaded.

    ``decode_seconds``: the intervals between the new tokens, one fewer than tokens. ``load_average``: of one minute,
    before the load. ``others_cores``: how many cores other processes kept busy from the load on.
    """

    cold: bool
    import_seconds: Seconds
    check_seconds: Seconds
    load_seconds: Seconds
    depth_seconds: Seconds
    first_token_seconds: Seconds
    prefill_seconds: Seconds
    decode_seconds: Annotated[list[Seconds], Field(min_length=1)]
    tokens_sha256: Sha256
    memory: Memory
    energy: Energy
    load_average: NotNegative | None
    others_cores: NotNegative | None


class Figure(Closed):
    """The median of the repetitions, and the ends of its 95 % interval by the percentile bootstrap over them."""

    median: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.median <= self.high:
            raise ValueError("the median lies outside its interval")
        return self


class Figures(Closed):
    """Over the repetitions; null: not measured. Seconds; tokens a second; bytes; joules a token.

    ``peak_*`` are the process's, libraries and all; ``added_*`` what it held after decoding beyond what it held before
    loading. ``cold_*`` are those of the repetitions that began with an empty page cache, all others those of the rest.
    """

    import_seconds: Figure | None
    check_seconds: Figure | None
    load_seconds: Figure | None
    cold_load_seconds: Figure | None
    depth_seconds: Figure | None
    first_token_seconds: Figure | None
    cold_first_token_seconds: Figure | None
    prefill_tokens_per_second: Figure | None
    decode_tokens_per_second: Figure | None
    peak_resident: Figure | None
    peak_anonymous: Figure | None
    peak_file_backed: Figure | None
    added_anonymous: Figure | None
    added_file_backed: Figure | None
    prefill_joules_per_token: Figure | None
    decode_joules_per_token: Figure | None


class Instructions(Closed):
    """Of an emulated CPU, in prefill and in decode alone; a count is not a time."""

    prefill: Count
    decode: Count
    per_prompt_token: NotNegative
    per_decode_token: NotNegative


class Top1(Closed):
    """The share of ``positions`` at which the runtime's most likely token is the recorded one, where it is fed the
    recorded tokens: those of the golden replay in a bench; null for a ``reason``."""

    agreement: Share | None
    positions: Count
    reason: str | None

    @model_validator(mode="after")
    def _figure_or_reason(self) -> Self:
        if (self.agreement is None) == (self.reason is None):
            raise ValueError("needs either an agreement or the reason why there is none")
        return self

    @property
    def words(self) -> str:
        """For people."""
        if self.agreement is None:
            return f"first choices: not compared: {self.reason}"
        return f"first choices: {self.agreement:.1%} of {self.positions} are the golden replay's"


class OperatorTime(Closed):
    """All calls of one operator of one kind. ``delegated``: a kernel that the artifact was written for ran it.
    ``fallback``: why that was the wrong kernel, null where it was not."""

    name: str
    calls: Count
    seconds: Seconds
    delegated: bool
    fallback: str | None


class Profile(Closed):
    """What really ran, of a process of its own: the runtime's own profile slows it.

    ``delegated_share``: of the operators' time, that in kernels that the artifact was written for.
    """

    operators: list[OperatorTime]
    delegated_share: Share | None

    @property
    def fallbacks(self) -> list[str]:
        """Each operator that ran in the wrong kernel, with the reason."""
        return [f"{operator.name}: {operator.fallback}" for operator in self.operators if operator.fallback]


class BenchRun(Run):
    """One runtime on one device at one depth.

    ``noisy``: what disturbed it, in words; empty if nothing is known to have. ``tokens_sha256``: of the new tokens'
    ids as JSON without spaces; null if the repetitions differ. An emulated device has ``instructions``, and neither
    samples nor figures.
    """

    settings: BenchSettings
    features: str | None
    governor: str | None
    noisy: list[str]
    samples: list[Sample]
    figures: Figures
    tokens_sha256: Sha256 | None
    top1: Top1
    instructions: Instructions | None
    profile: Profile | None

    @model_validator(mode="after")
    def _emulation_has_no_speed(self) -> Self:
        measured = any(figure is not None for _, figure in self.figures)
        if self.device.emulated and (self.samples or measured or self.profile is not None):
            raise ValueError("an emulated device has neither speed nor memory")
        if not self.device.emulated and not self.samples:
            raise ValueError("no samples")
        return self


class Result(Closed):
    """What every kind of result begins with. ``date``: in UTC, to the second; ``command``: what made it."""

    format_version: Annotated[str, Field(pattern=r"^1\.\d+$")]
    date: str
    command: str
    pocketlm: str
    bundle: SubjectBundle

    def to_json(self) -> str:
        """The text of the file."""
        return self.model_dump_json(indent=1) + "\n"


class BenchResult(Result):
    """What ``pocketlm bench --json`` writes."""

    kind: Literal["bench"]
    runs: Annotated[list[BenchRun], Field(min_length=1)]


class SessionRecord(Closed):
    """What was replayed. ``recorded_by``: null for the golden session, which is the float64 reference's."""

    name: str
    recorded_by: RuntimeRecord | None
    sequences: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]


class Divergence(Closed):
    """A step whose most likely token, ``chosen``, is not the ``recorded`` one; sequences and steps count from 1.

    ``margin``: at least how far the recorded logits have ``chosen`` below ``recorded``, over their deviation. ``wide``:
    more than noise explains; else it is a near tie.
    """

    sequence: Annotated[int, Field(ge=1)]
    step: Annotated[int, Field(ge=1)]
    recorded: Count
    chosen: Count
    margin: NotNegative
    wide: bool


class ReplayLimits(Closed):
    """The widest ``margin`` of a near tie, and the largest ``drift`` of a margin, over the deviation; the largest
    ``mean_kl`` in nats; null: not judged. ``certified``: from the certificate of the bundle; else nobody has measured
    how large noise is."""

    margin: NotNegative
    drift: NotNegative | None
    mean_kl: NotNegative | None
    certified: bool


class ReplayRun(Run):
    """One runtime on one device, fed the recorded tokens.

    ``largest_drift``: over the steps, at least how far the margin of the recorded choice is from what it was, over the
    deviation. ``mean_kl``: over the steps, in nats; null if no distribution was recorded. Both are null if a logit is
    not finite. ``failures``: why it did not pass; ``notes``: what was not judged, and why.
    """

    top1: Top1
    first_divergence: Divergence | None
    widest_divergence: Divergence | None
    largest_drift: NotNegative | None
    mean_kl: NotNegative | None
    limits: ReplayLimits
    passed: bool
    failures: list[str]
    notes: list[str]

    @model_validator(mode="after")
    def _passes_without_failures(self) -> Self:
        if self.passed == bool(self.failures):
            raise ValueError("a run passes if, and only if, nothing failed")
        return self


class Unavailable(Closed):
    """What could not be replayed, and why; ``runtime`` null: the device is not there at all."""

    address: str
    runtime: TargetName | None
    reason: str


class ReplayResult(Result):
    """What ``pocketlm replay --json`` writes."""

    kind: Literal["replay"]
    session: SessionRecord
    runs: list[ReplayRun]
    unavailable: list[Unavailable]


AnyResult = BenchResult | ReplayResult
KINDS: Mapping[str, type[AnyResult]] = {"bench": BenchResult, "replay": ReplayResult}


def read_result(path: Path) -> AnyResult:
    """The result in the file at ``path``.

    Raises :class:`InputError` naming the file and the key, for a malformed one and for one of another format's version.
    """
    content = _read_object(path)
    version = content.get("format_version")
    if not is_version_of(FORMAT_MAJOR, version):
        raise InputError(
            f"{path}: 'format_version' is {version!r:.20}; this release reads results of {FORMAT_MAJOR}.x: "
            "measure again, or use a matching release"
        )
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{path}: 'kind' is {kind!r:.40}; valid: {', '.join(KINDS)}")
    try:
        return KINDS[kind].model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_RESULT:
            raise InputError(f"{path}: too large for a result")
        return parse_object(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not a valid JSON object: {str(error)[:100]}") from error
