"""What both ends of a prediction know: how activations go up, and how outputs come back."""

from dataclasses import replace
from typing import Any, NamedTuple

from common.codecs.travel import Travel
from common.ended import Ended
from common.methods.base import Tail
from common.nets.heads import Shape
from common.wire.codec import BatchSpec


class Exchange(NamedTuple):
    """up: what batches must be, and their codec. down: likewise of outputs, a sample's of this shape."""

    up: BatchSpec
    down: BatchSpec
    output_shape: Shape


def exchange(ended: Ended[Any], codec: str = "") -> Exchange:
    """codec: what activations travel as, where not as in the run. Raises ConfigError for what is no codec.

    Logits come back as they are, for they are small; what a client's own last layers take, as in the run.
    """
    run, trained = ended.run, Travel.of(ended.run.codec, ended.run.seed)
    travel = Travel.of([f"activations={codec}"], run.seed) if codec else trained
    up = BatchSpec(ended.net.cut_shape, run.batch_size, run.class_count, labels=False, travel=travel)
    back = trained if ended.method.tail is Tail.LAST else Travel()
    return Exchange(up, replace(up, travel=back), ended.output_shape)
