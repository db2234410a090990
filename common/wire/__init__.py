"""Tensors to protobuf messages and back. Knows bytes; knows no sockets, no threads."""
