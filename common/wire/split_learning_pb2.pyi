from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SyncPurpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SYNC_PURPOSE_UNSPECIFIED: _ClassVar[SyncPurpose]
    SYNC_PURPOSE_AVERAGE: _ClassVar[SyncPurpose]
    SYNC_PURPOSE_TAKE_TURN: _ClassVar[SyncPurpose]
    SYNC_PURPOSE_END_TURN: _ClassVar[SyncPurpose]
    SYNC_PURPOSE_TAKE_HEAD: _ClassVar[SyncPurpose]
    SYNC_PURPOSE_TAKE_AVERAGE: _ClassVar[SyncPurpose]
    SYNC_PURPOSE_AWAIT_AVERAGE: _ClassVar[SyncPurpose]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_FP32: _ClassVar[Codec]
    CODEC_FP16: _ClassVar[Codec]
    CODEC_BF16: _ClassVar[Codec]
    CODEC_FP8: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]
    CODEC_INT4: _ClassVar[Codec]
    CODEC_INT3: _ClassVar[Codec]
    CODEC_INT2: _ClassVar[Codec]
    CODEC_TOPK: _ClassVar[Codec]
    CODEC_RANDTOPK: _ClassVar[Codec]

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_INT64: _ClassVar[Dtype]
    DTYPE_UINT8: _ClassVar[Dtype]
    DTYPE_UINT16: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_INT32: _ClassVar[Dtype]
SYNC_PURPOSE_UNSPECIFIED: SyncPurpose
SYNC_PURPOSE_AVERAGE: SyncPurpose
SYNC_PURPOSE_TAKE_TURN: SyncPurpose
SYNC_PURPOSE_END_TURN: SyncPurpose
SYNC_PURPOSE_TAKE_HEAD: SyncPurpose
SYNC_PURPOSE_TAKE_AVERAGE: SyncPurpose
SYNC_PURPOSE_AWAIT_AVERAGE: SyncPurpose
CODEC_UNSPECIFIED: Codec
CODEC_FP32: Codec
CODEC_FP16: Codec
CODEC_BF16: Codec
CODEC_FP8: Codec
CODEC_INT8: Codec
CODEC_INT4: Codec
CODEC_INT3: Codec
CODEC_INT2: Codec
CODEC_TOPK: Codec
CODEC_RANDTOPK: Codec
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_INT64: Dtype
DTYPE_UINT8: Dtype
DTYPE_UINT16: Dtype
DTYPE_FLOAT16: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_INT32: Dtype

class JoinRequest(_message.Message):
    __slots__ = ("oldest_version", "newest_version", "name", "codecs", "identity", "run_id", "durable", "takeover", "session")
    OLDEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEWEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    TAKEOVER_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    oldest_version: int
    newest_version: int
    name: str
    codecs: _containers.RepeatedScalarFieldContainer[Codec]
    identity: str
    run_id: str
    durable: int
    takeover: bool
    session: str
    def __init__(self, oldest_version: _Optional[int] = ..., newest_version: _Optional[int] = ..., name: _Optional[str] = ..., codecs: _Optional[_Iterable[_Union[Codec, str]]] = ..., identity: _Optional[str] = ..., run_id: _Optional[str] = ..., durable: _Optional[int] = ..., takeover: _Optional[bool] = ..., session: _Optional[str] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("welcome", "durable", "moved")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    durable: Durable
    moved: Moved
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., durable: _Optional[_Union[Durable, _Mapping]] = ..., moved: _Optional[_Union[Moved, _Mapping]] = ...) -> None: ...

class Moved(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class Durable(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "run", "client", "session", "run_id", "received", "network")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    version: int
    run: str
    client: int
    session: str
    run_id: str
    received: int
    network: str
    def __init__(self, version: _Optional[int] = ..., run: _Optional[str] = ..., client: _Optional[int] = ..., session: _Optional[str] = ..., run_id: _Optional[str] = ..., received: _Optional[int] = ..., network: _Optional[str] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("session", "epoch", "first_sequence", "batches", "samples", "first_epoch", "place")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    FIRST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    first_sequence: int
    batches: int
    samples: int
    first_epoch: int
    place: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., first_sequence: _Optional[int] = ..., batches: _Optional[int] = ..., samples: _Optional[int] = ..., first_epoch: _Optional[int] = ..., place: _Optional[int] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("sequence", "activations", "labels", "payload", "codec", "digest")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    activations: TensorSpec
    labels: TensorSpec
    payload: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    codec: CodecSpec
    digest: int
    def __init__(self, sequence: _Optional[int] = ..., activations: _Optional[_Union[TensorSpec, _Mapping]] = ..., labels: _Optional[_Union[TensorSpec, _Mapping]] = ..., payload: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., codec: _Optional[_Union[CodecSpec, _Mapping]] = ..., digest: _Optional[int] = ...) -> None: ...

class Skipped(_message.Message):
    __slots__ = ("sequence", "samples")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    samples: int
    def __init__(self, sequence: _Optional[int] = ..., samples: _Optional[int] = ...) -> None: ...

class Gradient(_message.Message):
    __slots__ = ("sequence", "gradient", "loss", "payload")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    gradient: TensorSpec
    loss: float
    payload: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    def __init__(self, sequence: _Optional[int] = ..., gradient: _Optional[_Union[TensorSpec, _Mapping]] = ..., loss: _Optional[float] = ..., payload: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("sequence", "output", "payload")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    output: TensorSpec
    payload: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    def __init__(self, sequence: _Optional[int] = ..., output: _Optional[_Union[TensorSpec, _Mapping]] = ..., payload: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ...) -> None: ...

class Weights(_message.Message):
    __slots__ = ("session", "epoch", "purpose", "samples", "tensors")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    purpose: SyncPurpose
    samples: int
    tensors: _containers.RepeatedCompositeFieldContainer[NamedTensorSpec]
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., purpose: _Optional[_Union[SyncPurpose, str]] = ..., samples: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[NamedTensorSpec, _Mapping]]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("dtype", "shape")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    dtype: Dtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dtype: _Optional[_Union[Dtype, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class NamedTensorSpec(_message.Message):
    __slots__ = ("name", "spec")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    name: str
    spec: TensorSpec
    def __init__(self, name: _Optional[str] = ..., spec: _Optional[_Union[TensorSpec, _Mapping]] = ...) -> None: ...

class CodecSpec(_message.Message):
    __slots__ = ("codec", "zstd")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    ZSTD_FIELD_NUMBER: _ClassVar[int]
    codec: Codec
    zstd: bool
    def __init__(self, codec: _Optional[_Union[Codec, str]] = ..., zstd: _Optional[bool] = ...) -> None: ...

class StreamActivationsRequest(_message.Message):
    __slots__ = ("segment", "batch", "skipped", "data")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    segment: Segment
    batch: Batch
    skipped: Skipped
    data: bytes
    def __init__(self, segment: _Optional[_Union[Segment, _Mapping]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ..., skipped: _Optional[_Union[Skipped, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class StreamActivationsResponse(_message.Message):
    __slots__ = ("applied",)
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    applied: int
    def __init__(self, applied: _Optional[int] = ...) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("segment", "batch", "gradient", "skipped", "of_gradient", "data")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    OF_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    segment: Segment
    batch: Batch
    gradient: Gradient
    skipped: Skipped
    of_gradient: bool
    data: bytes
    def __init__(self, segment: _Optional[_Union[Segment, _Mapping]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ..., gradient: _Optional[_Union[Gradient, _Mapping]] = ..., skipped: _Optional[_Union[Skipped, _Mapping]] = ..., of_gradient: _Optional[bool] = ..., data: _Optional[bytes] = ...) -> None: ...

class TrainResponse(_message.Message):
    __slots__ = ("gradient", "output", "of_output", "data")
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    OF_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    gradient: Gradient
    output: Output
    of_output: bool
    data: bytes
    def __init__(self, gradient: _Optional[_Union[Gradient, _Mapping]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., of_output: _Optional[bool] = ..., data: _Optional[bytes] = ...) -> None: ...

class SyncWeightsRequest(_message.Message):
    __slots__ = ("weights", "data")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    weights: Weights
    data: bytes
    def __init__(self, weights: _Optional[_Union[Weights, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SyncWeightsResponse(_message.Message):
    __slots__ = ("weights", "data")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    weights: Weights
    data: bytes
    def __init__(self, weights: _Optional[_Union[Weights, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("session", "epoch", "after_sequence")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    after_sequence: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., after_sequence: _Optional[int] = ...) -> None: ...

class ClientScore(_message.Message):
    __slots__ = ("head_metric", "train_loss", "score")
    HEAD_METRIC_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    head_metric: float
    train_loss: float
    score: Score
    def __init__(self, head_metric: _Optional[float] = ..., train_loss: _Optional[float] = ..., score: _Optional[_Union[Score, _Mapping]] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("samples", "metric", "loss")
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    samples: int
    metric: float
    loss: float
    def __init__(self, samples: _Optional[int] = ..., metric: _Optional[float] = ..., loss: _Optional[float] = ...) -> None: ...

class EvaluateRequest(_message.Message):
    __slots__ = ("evaluation", "batch", "client_score", "data")
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    CLIENT_SCORE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    evaluation: Evaluation
    batch: Batch
    client_score: ClientScore
    data: bytes
    def __init__(self, evaluation: _Optional[_Union[Evaluation, _Mapping]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ..., client_score: _Optional[_Union[ClientScore, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class EvaluateResponse(_message.Message):
    __slots__ = ("score", "output", "data")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    score: Score
    output: Output
    data: bytes
    def __init__(self, score: _Optional[_Union[Score, _Mapping]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("session", "class_names")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    session: str
    class_names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session: _Optional[str] = ..., class_names: _Optional[_Iterable[str]] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("session", "measurements", "failure")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    MEASUREMENTS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    session: str
    measurements: Measurements
    failure: str
    def __init__(self, session: _Optional[str] = ..., measurements: _Optional[_Union[Measurements, _Mapping]] = ..., failure: _Optional[str] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Measurements(_message.Message):
    __slots__ = ("seconds", "peak_bytes", "memory")
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class MemoryEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    seconds: _containers.ScalarMap[str, float]
    peak_bytes: int
    memory: _containers.ScalarMap[str, int]
    def __init__(self, seconds: _Optional[_Mapping[str, float]] = ..., peak_bytes: _Optional[int] = ..., memory: _Optional[_Mapping[str, int]] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ("answer_bytes", "data")
    ANSWER_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    answer_bytes: int
    data: bytes
    def __init__(self, answer_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PingResponse(_message.Message):
    __slots__ = ("oldest_version", "newest_version", "release", "received_ns", "answered_ns", "sample_bytes", "one_way", "data")
    OLDEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEWEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_NS_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_NS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ONE_WAY_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    oldest_version: int
    newest_version: int
    release: str
    received_ns: int
    answered_ns: int
    sample_bytes: int
    one_way: bool
    data: bytes
    def __init__(self, oldest_version: _Optional[int] = ..., newest_version: _Optional[int] = ..., release: _Optional[str] = ..., received_ns: _Optional[int] = ..., answered_ns: _Optional[int] = ..., sample_bytes: _Optional[int] = ..., one_way: _Optional[bool] = ..., data: _Optional[bytes] = ...) -> None: ...
