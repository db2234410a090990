"""Codecs: how activations and gradients are made small for the wire. Pure functions; nothing here sends.

codec = parse("int4+zstd")
encoded = codec.encode(z, generator, training=True)  # .tensors, to be sent as they are
z = codec.decode(encoded)  # float32, of encoded.shape
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace

from common.codecs.base import Codec, Encoded, Parcel, Sizes, Slot
from common.codecs.floats import bf16, fp8, fp16, fp32
from common.codecs.integers import int2, int3, int4, int8
from common.codecs.sparse import randtopk, topk
from common.codecs.zstd import compressed
from common.errors import ConfigError

CODECS: Mapping[str, Callable[..., Codec]] = {
    maker.__name__: maker for maker in (fp32, fp16, bf16, fp8, int8, int4, int3, int2, topk, randtopk)
}
_ZSTD, _FEEDBACK = "+zstd", "+ef"

__all__ = ["CODECS", "Codec", "Encoded", "Parcel", "Sizes", "Slot", "parse", "split"]


def parse(name: str) -> Codec:
    """The codec of a name as `int4`, `topk:0.05`, `randtopk:0.05:0.1` (k, alpha), `int4+zstd`, `topk+ef`.

    Raises ConfigError for a name that is none, and for values that the codec does not take.
    """
    kind, values, zstd, feedback = split(name)
    if kind not in CODECS:
        raise ConfigError(
            f"codec {name[:40]!r}: choose {', '.join(map(_usage, CODECS))}; each with {_ZSTD}, {_FEEDBACK}"
        )
    if len(values) > len(inspect.signature(CODECS[kind]).parameters):
        raise ConfigError(f"codec {name[:40]!r}: too many values; its form is {_usage(kind)}")
    if feedback and kind == "fp32":
        raise ConfigError(f"codec {name[:40]!r}: fp32 takes nothing away; leave {_FEEDBACK} out")
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        raise ConfigError(f"codec {name[:40]!r}: not a number; its form is {_usage(kind)}") from None
    codec = CODECS[kind](*numbers)
    if zstd:
        codec = compressed(codec)
    return replace(codec, name=codec.name + _FEEDBACK, feedback=True) if feedback else codec


def split(name: str) -> tuple[str, list[str], bool, bool]:
    """A codec's kind and values, whether it is compressed, whether with error feedback. Judges nothing."""
    rest, feedback = name.removesuffix(_FEEDBACK), name.endswith(_FEEDBACK)
    plain, zstd = rest.removesuffix(_ZSTD), rest.endswith(_ZSTD)
    kind, *values = plain.split(":")
    return kind, values, zstd, feedback


def _usage(kind: str) -> str:
    return kind + "".join(
        f"[:{parameter.upper()}]" for parameter in inspect.signature(CODECS[kind]).parameters
    )
