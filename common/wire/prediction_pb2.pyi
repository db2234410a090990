from common.wire import split_learning_pb2 as _split_learning_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InspectRequest(_message.Message):
    __slots__ = ("oldest_version", "newest_version")
    OLDEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEWEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    oldest_version: int
    newest_version: int
    def __init__(self, oldest_version: _Optional[int] = ..., newest_version: _Optional[int] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("version", "run", "run_id", "network", "classes", "activations", "output", "batch_size")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    version: int
    run: str
    run_id: str
    network: str
    classes: int
    activations: _containers.RepeatedScalarFieldContainer[int]
    output: _containers.RepeatedScalarFieldContainer[int]
    batch_size: int
    def __init__(self, version: _Optional[int] = ..., run: _Optional[str] = ..., run_id: _Optional[str] = ..., network: _Optional[str] = ..., classes: _Optional[int] = ..., activations: _Optional[_Iterable[int]] = ..., output: _Optional[_Iterable[int]] = ..., batch_size: _Optional[int] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("run_id", "network", "codec", "client")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    network: str
    codec: str
    client: int
    def __init__(self, run_id: _Optional[str] = ..., network: _Optional[str] = ..., codec: _Optional[str] = ..., client: _Optional[int] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("prediction", "batch", "data")
    PREDICTION_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    prediction: Prediction
    batch: _split_learning_pb2.Batch
    data: bytes
    def __init__(self, prediction: _Optional[_Union[Prediction, _Mapping]] = ..., batch: _Optional[_Union[_split_learning_pb2.Batch, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PredictResponse(_message.Message):
    __slots__ = ("output", "data")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    output: _split_learning_pb2.Output
    data: bytes
    def __init__(self, output: _Optional[_Union[_split_learning_pb2.Output, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...
