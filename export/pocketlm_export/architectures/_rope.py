"""The rotary position embedding of config.json, in either spelling and of every rope type.

Formulas and precedence follow transformers 5's ``modeling_rope_utils``: a non-empty ``rope_scaling`` wins over
``rope_parameters``, inside it ``rope_type`` over ``type``, and its ``rope_theta`` over the one at the top.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pocketlm.errors import UnsupportedError
from pocketlm_export.fields import Fields
from pocketlm_export.graph.rotary import (
    LongRotary,
    Rotary,
    default_frequencies,
    linear_frequencies,
    llama3_frequencies,
    longrope_frequencies,
    longrope_scale,
    yarn_frequencies,
    yarn_scale,
)

__all__ = ["LARGEST_NUMBER", "RopeDefaults", "read_rope", "read_rotary"]

# Ten times beyond what any released model has; what is larger is an error of whoever wrote the file.
LARGEST_THETA = 1e11
LARGEST_NUMBER = 1e5


@dataclass(frozen=True, slots=True)
class RopeDefaults:
    """What a class of transformers assumes. ``partial``: which part of a head rotates; None for a class that rotates
    all of it. ``original_context``: the class's own, which wins over what the rope's object says. ``aliases``: older
    names of rope types; ``kinds``: the types that the class takes; ``neutral``: keys that it never reads."""

    theta: float = 10_000.0
    partial: float | None = None
    original_context: int | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    neutral: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Rope:
    """A rope's object, with what it does not say itself."""

    fields: Fields
    theta: float
    width: int
    context: int
    original: int

    def factor(self, default: float | None = None) -> float:
        return self.fields.number("factor", default, least=1, most=LARGEST_NUMBER)

    def stretch(self) -> float:
        """``factor``, or how many times the original context the model was made for."""
        return self.factor(max(1.0, self.context / self.original))


def read_rotary(
    fields: Fields, head_dim: int, context_length: int, defaults: RopeDefaults = RopeDefaults()
) -> Rotary | LongRotary:
    """The rotation of heads of ``head_dim``; ``context_length`` is the longest that the model was made for.

    Raises :class:`CheckpointError` or :class:`UnsupportedError` naming the key.
    """
    theta = fields.number("rope_theta", defaults.theta, least=1, most=LARGEST_THETA)
    scaling, parameters = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    rope = scaling or parameters or Fields({}, fields.source)
    inner = rope.integer("original_max_position_embeddings", context_length)
    outer = fields.integer("original_max_position_embeddings", defaults.original_context or inner)
    partial = fields.number("partial_rotary_factor", 1.0 if defaults.partial is None else defaults.partial, most=1)
    return read_rope(rope, head_dim, context_length, outer, theta, partial, defaults)


def read_rope(
    rope: Fields,
    head_dim: int,
    context_length: int,
    original_context: int,
    theta: float,
    partial: float = 1.0,
    defaults: RopeDefaults = RopeDefaults(),
) -> Rotary | LongRotary:
    """The rotation that one object of the file asks for; its own ``rope_theta`` and ``partial_rotary_factor`` win over
    those given."""
    kind = _kind(rope, defaults)
    theta = rope.number("rope_theta", theta, least=1, most=LARGEST_THETA)
    partial = rope.number("partial_rotary_factor", partial, most=1)
    rope.integer("original_max_position_embeddings", original_context)
    if defaults.partial is None:
        # transformers' other classes ignore the key where the type is the default one, and fail where it isn't.
        if partial != 1 and kind != "default":
            raise rope.refuse("partial_rotary_factor", f"is {partial:g}: this class rotates whole heads")
        partial = 1.0
    width = int(head_dim * partial)
    if width % 2 or not width:
        raise rope.refuse("partial_rotary_factor", f"is {partial:g}: {width} of {head_dim} elements can't be rotated")
    rotary = READERS[kind](_Rope(rope, theta, width, context_length, original_context))
    unread = [key for key in rope.unread() if key not in defaults.neutral]
    if unread:
        raise rope.refuse(unread[0], f"has no meaning for rope type {kind!r}")
    return rotary


def _kind(rope: Fields, defaults: RopeDefaults) -> str:
    kind, older = rope.value("rope_type"), rope.value("type")
    if kind is not None and older is not None and kind != older:
        raise rope.refuse("rope_type", f"is {kind!r} but 'type' is {older!r}: which one was meant?")
    kind = older if kind is None else kind
    kind = "default" if kind is None else kind
    if isinstance(kind, str):
        kind = defaults.aliases.get(kind, kind)
    if kind not in defaults.kinds:
        raise UnsupportedError(
            f"{rope.source}: rope type {str(kind)[:40]!r} is not supported; supported: {', '.join(defaults.kinds)}"
        )
    return str(kind)


def _default(rope: _Rope) -> Rotary:
    return Rotary(default_frequencies(rope.theta, rope.width))


def _linear(rope: _Rope) -> Rotary:
    return Rotary(linear_frequencies(rope.theta, rope.width, rope.factor()))


def _dynamic(rope: _Rope) -> Rotary:
    # Theta grows only beyond the model's own context, which no export exceeds.
    rope.factor()
    return _default(rope)


def _llama3(rope: _Rope) -> Rotary:
    low, high = (rope.fields.number(key, most=LARGEST_NUMBER) for key in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise rope.fields.refuse("high_freq_factor", f"must be greater than low_freq_factor ({low}), not {high}")
    return Rotary(llama3_frequencies(rope.theta, rope.width, rope.factor(), low, high, rope.original))


def _yarn(rope: _Rope) -> Rotary:
    fields = rope.fields
    if "factor" not in fields:  # null is 'as far as the context', absent an error: transformers' own rule
        raise fields.refuse("factor", "is missing")
    factor = rope.stretch()
    if rope.theta <= 1:
        raise fields.refuse("rope_theta", f"must be greater than 1 for rope type 'yarn', not {rope.theta:g}")
    fast, slow = fields.number("beta_fast", 32, most=LARGEST_NUMBER), fields.number("beta_slow", 1, most=LARGEST_NUMBER)
    if fast < slow:
        raise fields.refuse("beta_fast", f"must be at least beta_slow ({slow:g}), not {fast:g}")
    multipliers = [fields.number(key, 0.0, least=0, most=LARGEST_NUMBER) for key in ("mscale", "mscale_all_dim")]
    scale = fields.number("attention_factor", yarn_scale(factor, *multipliers), most=LARGEST_NUMBER)
    truncate = fields.flag("truncate", True)
    return Rotary(yarn_frequencies(rope.theta, rope.width, factor, rope.original, fast, slow, truncate), scale)


def _longrope(rope: _Rope) -> LongRotary:
    fields, factor = rope.fields, rope.stretch()
    if rope.original < 2:
        raise fields.refuse("original_max_position_embeddings", "must be at least 2 for rope type 'longrope'")
    scale = fields.number("attention_factor", longrope_scale(factor, rope.original), most=LARGEST_NUMBER)
    short, long = (
        Rotary(
            longrope_frequencies(rope.theta, rope.width, fields.numbers(key, rope.width // 2, most=LARGEST_NUMBER)),
            scale,
        )
        for key in ("short_factor", "long_factor")
    )
    return LongRotary(short, long, rope.original)


READERS: Mapping[str, Callable[[_Rope], Rotary | LongRotary]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
