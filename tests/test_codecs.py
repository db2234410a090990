"""Codecs: what comes out is within each one's stated error, what is sent has its stated size, and a
payload that is not one is refused by name."""

import contextlib
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from common.codecs import CODECS, Codec, Encoded, integers, parse
from common.codecs import zstd as zstd_codec
from common.codecs.bits import pack, packed_size, room, unpack
from common.errors import ConfigError, WireError

PLAIN = [*CODECS, "topk:0.03", "topk:1", "randtopk:0.5:0.3"]
NAMES = [*PLAIN, *(f"{name}+zstd" for name in CODECS)]
INTS = {"int8": 8, "int4": 4, "int3": 4, "int2": 2}  # bits that an element takes
SHAPE = (2, 3, 5, 2)  # 60 elements, 30 a sample, 20 a channel
TINY, MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
REGIMES = ("relu", "signed", "negative", "zeros", "equal", "spike", "denormal", "huge", "ends")


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def values(shape: tuple[int, ...], regime: str = "relu", seed: int = 0) -> Tensor:
    g = seeded(seed)
    x = torch.randn(shape, generator=g)
    channel = torch.randint(-30, 31, (1, shape[1], *[1] * (len(shape) - 2)), generator=g)
    match regime:
        case "relu":
            return x.relu()
        case "signed":
            return torch.ldexp(x, channel)  # channels of very different size
        case "negative":
            return -x.abs()
        case "zeros":
            return torch.zeros(shape)
        case "equal":
            return torch.full(shape, 0.3)
        case "spike":
            flat = torch.zeros(math.prod(shape))
            flat[int(torch.randint(len(flat), (1,), generator=g))] = 7.0
            return flat.view(shape)
        case "denormal":
            return x * 1e-42
        case "huge":
            return x.sign() * 1e38
    ends = torch.tensor([0.0, -0.0, 1e-45, -1e-45, TINY, 1e-7, 65_520.0, 1e5, 1e38, MOST, -MOST, 1.0])
    return ends[torch.randint(len(ends), shape, generator=g)]


shapes = st.tuples(*[st.integers(1, 5)] * 4) | st.tuples(*[st.integers(1, 9)] * 2)
tensors = st.builds(values, shapes, st.sampled_from(REGIMES), st.integers(0, 2**20))


def encoded(name: str, x: Tensor, seed: int = 0, training: bool = True) -> Encoded:
    return parse(name).encode(x, seeded(seed), training)


def there_and_back(name: str, x: Tensor, seed: int = 0, training: bool = True) -> Tensor:
    return parse(name).decode(encoded(name, x, seed, training))


def sent(payload: Encoded) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in payload.tensors)


def per_channel(scale: Tensor, x: Tensor) -> Tensor:
    return scale.double().view(1, -1, *[1] * (x.dim() - 2)).expand(x.shape)


# ---------------------------------------------------------------- what comes out


def most_error(name: str, x: Tensor, payload: Encoded) -> Tensor:
    """The codec's stated bound, of each element, in double precision."""
    magnitude = x.double().abs()
    match name:
        case "fp32":
            return torch.zeros_like(magnitude)
        case "fp16":
            return torch.maximum((magnitude * 2**-11).clamp(min=2**-25), magnitude - 65_504)
        case "bf16":
            return (magnitude * 2**-8).clamp(min=2**-134)
        case "fp8":
            return torch.maximum(magnitude / 16, payload.tensors[0].double() / 1024) * (1 + 1e-6)
        case "int8":
            return per_channel(payload.tensors[0], x) / 2 * (1 + 1e-4)
    return per_channel(payload.tensors[0], x) * (1 + 1e-5)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "fp8", *INTS])
@given(x=tensors, seed=st.integers(0, 9), training=st.booleans())
def test_an_element_comes_out_within_its_codecs_error(
    name: str, x: Tensor, seed: int, training: bool
) -> None:
    payload = encoded(name, x, seed, training)
    y = parse(name).decode(payload)
    assert (y.dtype, y.shape) == (torch.float32, x.shape)
    assert bool((y[x == 0] == 0).all()), "zeros stay zeros"
    assert bool(((y.double() - x.double()).abs() <= most_error(name, x, payload)).all())


@pytest.mark.parametrize("name", ["topk:0.03", "topk", "topk:0.5", "topk:1", "randtopk:0.3:0.2"])
@given(x=tensors, training=st.booleans())
def test_the_largest_come_out_and_the_others_are_zero(name: str, x: Tensor, training: bool) -> None:
    payload = encoded(name, x, training=training)
    ours, theirs = parse(name).decode(payload).flatten(1).double(), x.flatten(1).double()
    index = payload.tensors[0].long()
    kept = max(1, round(float(name.split(":")[1] if ":" in name else 0.1) * theirs.shape[1]))
    assert index.shape == (len(x), kept)
    mask = torch.zeros_like(theirs, dtype=torch.bool).scatter_(1, index, True)
    error = (ours - theirs).abs()
    assert bool((error <= torch.where(mask, (theirs.abs() * 2**-8).clamp(min=2**-134), theirs.abs())).all())
    assert not ours[~mask].any()
    if name.startswith("topk") or not training:
        wanted = theirs.abs().sort(1, descending=True).values[:, :kept]
        assert torch.equal(theirs.abs()[mask].view(-1, kept).sort(1, descending=True).values, wanted)


@pytest.mark.parametrize("name", CODECS)
@given(x=tensors, training=st.booleans())
def test_zstd_changes_nothing_in_what_comes_out(name: str, x: Tensor, training: bool) -> None:
    assert torch.equal(
        there_and_back(f"{name}+zstd", x, training=training), there_and_back(name, x, training=training)
    )


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("shape", [(33, 4, 41, 43), (300, 1000), (2, 2, 300, 500)])
def test_in_how_many_chunks_a_tensor_is_worked_on_is_of_no_account(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = values(shape, "signed")
    payload = encoded(name, x)
    y = parse(name).decode(payload)
    assert bool(((y.double() - x.double()).abs() <= most_error(name, x, payload)).all())
    for chunk in (1, 10_000, 2**30):
        monkeypatch.setattr(integers, "_CHUNK", chunk)
        assert all(map(torch.equal, encoded(name, x).tensors, payload.tensors))
        assert torch.equal(parse(name).decode(payload), y)


def test_a_scale_is_a_channels_own() -> None:
    x = torch.tensor([1e-6, 1.0, 1e6]).view(1, 3, 1, 1) * torch.rand(4, 3, 6, 6, generator=seeded())
    y = there_and_back("int8", x)
    error = (y - x).flatten(2).norm(dim=(0, 2)) / x.flatten(2).norm(dim=(0, 2))
    assert bool((error < 0.005).all())


@pytest.mark.parametrize(
    ("name", "levels", "signed_levels"), [("int8", 255, 127), ("int4", 15, 7), ("int3", 7, 3)]
)
def test_a_tensor_without_negative_values_has_all_the_levels(
    name: str, levels: int, signed_levels: int
) -> None:
    x = values(SHAPE, "relu")
    scale, signed, _ = encoded(name, x).tensors
    assert (scale * levels).tolist() == pytest.approx(x.amax((0, 2, 3)).tolist())
    assert signed.tolist() == [0]
    x[0, 0, 0, 0] = -0.001  # one is enough, for the whole tensor
    scale, signed, _ = encoded(name, x).tensors
    assert (scale * signed_levels).tolist() == pytest.approx(x.amax((0, 2, 3)).tolist())
    assert signed.tolist() == [1]


def test_a_channel_of_zeros_beside_others_stays_zero() -> None:
    x = values(SHAPE, "signed")
    x[:, 1] = 0
    for name in (*INTS, "fp8"):
        assert not there_and_back(name, x)[:, 1].any(), name


@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
@pytest.mark.parametrize("regime", ["relu", "signed"])
def test_rounding_at_random_has_the_right_mean(name: str, regime: str) -> None:
    x, draws = values(SHAPE, regime, seed=3), 2000
    payload, generator = encoded(name, x), seeded(11)
    codec = parse(name)
    mean = sum(codec.decode(codec.encode(x, generator, True)).double() for _ in range(draws)) / draws
    scale = per_channel(payload.tensors[0], x)
    fraction = (x.double() / scale) % 1
    standard_error = scale * (fraction * (1 - fraction) / draws).sqrt()
    assert bool(((mean - x).abs() <= 5 * standard_error + 1e-4 * scale).all())


def test_neighbours_are_rounded_independently() -> None:
    x = torch.full((1, 1, 100, 100), 0.5 / 15)
    x[0, 0, 0, 0] = 1  # makes the scale 1 / 15, and the others half of it
    up = (there_and_back("int4", x).flatten()[1:] > 0).double()
    for distance in (1, 2, 3, 4, 5):
        product = (up[distance:] - 0.5) * (up[:-distance] - 0.5)
        assert abs(float(product.mean())) < 5 * 0.25 / 100


def test_int8_is_rounded_to_the_nearest_and_draws_nothing() -> None:
    generator = seeded()
    before = generator.get_state()
    parse("int8").encode(values(SHAPE), generator, True)
    assert torch.equal(generator.get_state(), before)
    assert not parse("int8").chance


def test_every_fp8_code_is_what_torch_takes_it_for() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(1, 254)
    ours = parse("fp8").decode(Encoded((1, 254), [torch.ones(1), codes]))
    assert torch.equal(ours, codes.view(torch.float8_e4m3fn).float())


def test_randtopk_draws_as_a_draw_without_replacement_does() -> None:
    x = torch.arange(1.0, 401.0).expand(3000, 1, 400).contiguous()  # the 40 largest are the last
    index = encoded("randtopk:0.1:0.1", x, seed=1).tensors[0].long()
    mass = torch.full((400,), 0.1 / 360)
    mass[360:] = 0.9 / 40
    drawn = torch.multinomial(mass.expand(3000, 400), 40, generator=seeded(2))
    outside, theirs = (index < 360).double().mean(), (drawn < 360).double().mean()
    assert abs(float(outside - theirs)) < 0.005
    assert 0.18 < float(outside) < 0.20
    often = torch.bincount(index[index < 360].flatten(), minlength=360).double()
    assert 0.7 < float(often.var() / often.mean()) < 1.3, "none is preferred: counts vary as chance has it"


def test_randtopk_is_topk_at_evaluation_and_without_alpha() -> None:
    x = values((4, 3, 9, 9))
    plain = encoded("topk:0.2", x).tensors
    for name, training in (("randtopk:0.2:0.3", False), ("randtopk:0.2:0", True)):
        assert all(map(torch.equal, encoded(name, x, training=training).tensors, plain))
    assert not torch.equal(encoded("randtopk:0.2:0.3", x).tensors[0], plain[0])


def test_of_equals_those_that_come_first_are_kept() -> None:
    x = torch.tensor([[1.0, 3.0, -3.0, 3.0, 2.0, 3.0], [0, 0, 0, 0, 0, -9.0]]).view(2, 1, 6)
    assert encoded("topk:0.5", x).tensors[0].tolist() == [[1, 2, 3], [0, 1, 5]]


# ---------------------------------------------------------------- what is sent


def stated_size(name: str, shape: tuple[int, ...]) -> int:
    n, d = math.prod(shape), math.prod(shape[1:])
    kind, _, k = name.partition(":")
    if kind in INTS:
        return -(-n * INTS[kind] // 8) + 4 * shape[1] + 1
    if kind.endswith("topk"):
        return shape[0] * max(1, round(float(k.split(":")[0] or 0.1) * d)) * 4
    return {"fp32": 4 * n, "fp16": 2 * n, "bf16": 2 * n, "fp8": n + 4}[kind]


@pytest.mark.parametrize("name", PLAIN)
@given(x=tensors)
def test_a_payload_has_its_codecs_size_exactly(name: str, x: Tensor) -> None:
    sizes = parse(name).sizes(tuple(x.shape))
    assert sent(encoded(name, x)) == stated_size(name, tuple(x.shape)) == sizes.least == sizes.most
    assert sizes.opened == sizes.most


@pytest.mark.parametrize("name", CODECS)
@given(x=tensors)
def test_a_compressed_payload_is_within_its_bound(name: str, x: Tensor) -> None:
    sizes = parse(f"{name}+zstd").sizes(tuple(x.shape))
    inner = stated_size(name, tuple(x.shape))
    assert sizes.opened == inner
    assert 1 <= sent(encoded(f"{name}+zstd", x)) <= sizes.most <= inner * 257 / 256 + 64


def test_what_is_not_compressible_is_within_its_bound() -> None:
    noise = torch.randint(0, 2**30, (4, 1, 300, 300), generator=seeded(), dtype=torch.int32)
    payload = encoded("fp32+zstd", noise.view(torch.float32))
    assert 0.9 * noise.numel() * 4 < sent(payload) <= parse("fp32+zstd").sizes(payload.shape).most


def test_zeros_are_compressed_away() -> None:
    assert sent(encoded("int4+zstd", torch.zeros(64, 4, 32, 32))) < 100


def test_indices_take_two_bytes_as_long_as_they_fit() -> None:
    for elements, dtype in ((2**16, torch.uint16), (2**16 + 1, torch.int32)):
        x = torch.zeros(1, elements)
        x[0, -1] = -5
        payload = encoded("topk:0.00001", x)
        assert payload.tensors[0].dtype == dtype
        assert int(there_and_back("topk:0.00001", x).argmin()) == elements - 1


@pytest.mark.parametrize("name", NAMES)
def test_equal_generators_make_equal_payloads(name: str) -> None:
    x = values((4, 3, 31, 33), "signed")
    one, two, other = (encoded(name, x, seed).tensors for seed in (5, 5, 6))
    assert all(map(torch.equal, one, two))
    if parse(name).chance:
        assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_encoding_changes_neither_its_input_nor_other_chance(name: str) -> None:
    x = values(SHAPE, "signed").requires_grad_()
    before, state = x.detach().clone(), torch.random.get_rng_state()
    payload = encoded(name, x)
    parse(name).decode(payload)
    assert torch.equal(x, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(tensor.requires_grad for tensor in payload.tensors)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_changes_no_payload(name: str) -> None:
    payload = encoded(name, values(SHAPE, "signed"))
    copies = [tensor.clone() for tensor in payload.tensors]
    first = parse(name).decode(payload)
    assert torch.equal(parse(name).decode(payload), first)
    assert all(map(torch.equal, payload.tensors, copies))


@pytest.mark.parametrize("name", NAMES)
def test_how_a_tensor_lies_in_memory_is_of_no_account(name: str) -> None:
    x = values(SHAPE, "signed")
    theirs = encoded(name, x).tensors
    for same in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).clone().transpose(2, 3)):
        ours = encoded(name, same).tensors
        assert all(map(torch.equal, ours, theirs))
        assert all(tensor.is_contiguous() for tensor in ours), "ready to be sent"


# ---------------------------------------------------------------- bits


def test_a_byte_holds_neighbours_the_first_in_the_lowest_bits() -> None:
    four, two = torch.tensor([1, 2, 15, 0], dtype=torch.uint8), torch.tensor([1, 2, 3, 0], dtype=torch.uint8)
    assert pack(four, 4).tolist() == [0x21, 0x0F]
    assert pack(two, 2).tolist() == [0b00_11_10_01]


def test_int3_refuses_codes_that_it_cannot_have_made() -> None:
    codec, x = parse("int3"), values(SHAPE)
    *rest, codes = codec.encode(x, seeded(), True).tensors
    codes[-1] = 0x81
    with pytest.raises(WireError, match="int3: codes: 8 came; they are at most 7"):
        codec.decode(Encoded(SHAPE, [*rest, codes]))


@pytest.mark.parametrize("bits", [2, 4, 8])
@given(count=st.integers(1, 200), seed=st.integers(0, 99))
def test_codes_come_out_as_they_were_packed(bits: int, count: int, seed: int) -> None:
    codes = room(count, bits, torch.device("cpu"))
    codes[:count] = torch.randint(0, 2**bits, (count,), generator=seeded(seed))
    packed = pack(codes, bits)
    assert len(packed) == packed_size(count, bits) == math.ceil(count * bits / 8)
    assert torch.equal(unpack(packed, bits), codes)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 29, 59])
def test_values_that_are_no_numbers_are_not_encoded(name: str, value: float, place: int) -> None:
    x = values(SHAPE)
    x.view(-1)[place] = value
    with pytest.raises(WireError, match="NaN or infinite values; lower the learning rate"):
        encoded(name, x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (5,), (0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0), (1,) * 9])
def test_a_shape_without_elements_or_channels_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(WireError, match="is not \\(batch, channels"):
        encoded(name, torch.zeros(shape))
    with pytest.raises(WireError, match="is not \\(batch, channels"):
        parse(name).sizes(shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_type_is_refused(name: str) -> None:
    with pytest.raises(WireError, match=r"encodes torch.float32; this is torch.float64"):
        encoded(name, torch.zeros(SHAPE, dtype=torch.float64))


def refusal(name: str, *payload: Tensor, shape: Sequence[int] = SHAPE) -> str:
    with pytest.raises(WireError) as caught:
        parse(name).decode(Encoded(tuple(shape), payload))
    said = str(caught.value)
    assert len(said) < 200
    assert "\n" not in said
    return said


@pytest.mark.parametrize("name", NAMES)
def test_too_few_and_too_many_tensors_are_refused(name: str) -> None:
    tensors = encoded(name, values(SHAPE)).tensors
    assert f"{len(tensors) - 1} tensors came; {len(tensors)} were due" in refusal(name, *tensors[1:])
    assert f"{len(tensors) + 1} tensors came" in refusal(name, *tensors, tensors[0])


@pytest.mark.parametrize("name", PLAIN)
def test_a_tensor_of_another_shape_or_type_is_refused(name: str) -> None:
    tensors = list(encoded(name, values(SHAPE)).tensors)
    for place, tensor in enumerate(tensors):
        flat = tensor.flatten()
        for wrong in (flat[:-1], torch.cat([flat, flat[:1]]), tensor[None], tensor.double(), tensor.bool()):
            assert "came; torch." in refusal(name, *tensors[:place], wrong, *tensors[place + 1 :])


@pytest.mark.parametrize("name", [*NAMES, "topk:0.5+zstd"])
def test_the_payload_of_another_shape_is_refused(name: str) -> None:
    tensors = encoded(name, values(SHAPE)).tensors
    refusal(name, *tensors, shape=(4, 6, 10, 9))


@pytest.mark.parametrize("name", NAMES)
def test_a_declared_size_is_judged_without_memory_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, huge = parse(name), (2**10, 2**6, 2**7, 2**7)  # 2^30 elements
    layout = codec.layout(huge)

    def nothing(*_: object, **__: object) -> Tensor:
        raise AssertionError("memory was asked for before the sizes were judged")

    monkeypatch.setattr(torch, "empty", nothing)
    monkeypatch.setattr(torch, "zeros", nothing)
    declared = [(slot.dtype, slot.shape) for slot in layout]
    codec.judge(huge, declared)
    assert codec.sizes(huge).most == sum(slot.dtype.itemsize * math.prod(slot.shape) for slot in layout)
    dtype, shape = declared[-1]
    for wrong in ((shape[0] + 1, *shape[1:]), (0, *shape[1:]), (-1, *shape[1:]), (), (*shape, 1)):
        with pytest.raises(WireError, match="came;"):
            codec.judge(huge, [*declared[:-1], (dtype, wrong)])
    with pytest.raises(WireError, match="is not"):
        codec.judge((2**40, 2**40), declared)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_floats_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    (x,) = encoded(name, values(SHAPE)).tensors
    x = x.clone()
    x[1, 2, 4, 1] = value
    assert refusal(name, x) == f"{name}: NaN or infinite values; lower the learning rate or check the data"


@pytest.mark.parametrize("code", [127, 255])
def test_an_fp8_code_that_is_no_number_is_refused(code: int) -> None:
    scale, codes = encoded("fp8", values(SHAPE)).tensors
    codes[1, 2, 4, 1] = code
    assert refusal("fp8", scale, codes).startswith("fp8: codes: NaN")


@pytest.mark.parametrize("name", ["fp8", *INTS])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-45, MOST, 3e38])
def test_a_scale_that_no_tensor_can_have_is_refused(name: str, value: float) -> None:
    scale, *rest = encoded(name, values(SHAPE, "negative")).tensors
    scale[-1] = value
    if name == "int2" and value == 3e38:
        return  # of signed int2 the scale is the largest value itself
    assert "a scale of" in refusal(name, scale, *rest)


@pytest.mark.parametrize("name", INTS)
def test_a_sign_that_is_none_is_refused(name: str) -> None:
    scale, _, codes = encoded(name, values(SHAPE)).tensors
    assert "signed: 2 came; it is 0 or 1" in refusal(name, scale, torch.tensor([2], dtype=torch.uint8), codes)


@pytest.mark.parametrize("name", INTS)
def test_a_code_that_no_signed_tensor_has_is_refused(name: str) -> None:
    scale, signed, codes = encoded(name, values(SHAPE, "signed")).tensors
    codes[3] = 0
    assert "codes: 0 came" in refusal(name, scale, signed, codes)


@pytest.mark.parametrize("name", INTS)
@given(seed=st.integers(0, 999))
def test_whatever_codes_are_accepted_come_out_finite(name: str, seed: int) -> None:
    for regime in ("ends", "huge", "relu"):
        scale, signed, codes = encoded(name, values(SHAPE, regime, seed)).tensors
        codes = torch.randint(0, 256, codes.shape, generator=seeded(seed), dtype=torch.uint8)
        try:
            assert parse(name).decode(Encoded(SHAPE, [scale, signed, codes])).isfinite().all()
        except WireError:
            assert signed.tolist() == [1] or name == "int3"


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        ([3, 7, 30], "indices: 0 to 30 of 30"),
        ([3, 7, 65_535], "indices: 0 to 65535 of 30"),
        ([3, 7, 7], "they do not ascend"),
        ([7, 3, 29], "they do not ascend"),
    ],
)
def test_indices_out_of_range_or_order_are_refused(indices: list[int], says: str) -> None:
    index = torch.tensor([[0, 1, 2], indices]).to(torch.uint16)
    assert says in refusal("topk", index, torch.ones(2, 3, dtype=torch.bfloat16))


def test_a_negative_index_is_refused() -> None:
    wide = (1, 2**16 + 1)
    index = torch.tensor([[-1]], dtype=torch.int32)
    said = refusal("topk:0.00001", index, torch.ones(1, 1, dtype=torch.bfloat16), shape=wide)
    assert said == "topk:1e-05: indices: -1 to -1 of 65537"


def test_a_kept_value_that_is_no_number_is_refused() -> None:
    index, kept = encoded("topk", values(SHAPE)).tensors
    kept[1, 2] = math.nan
    assert "values: NaN or infinite" in refusal("topk", index, kept)


# ---------------------------------------------------------------- frames that are none, and bombs


def frame_of(raw: bytes, **options: int) -> Tensor:
    named = {zstd_codec.zstd.CompressionParameter[name]: value for name, value in options.items()}
    return torch.frombuffer(bytearray(zstd_codec.zstd.compress(raw, options=named)), dtype=torch.uint8)


def test_a_frame_that_declares_another_size_is_refused_before_it_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nothing(*_: object, **__: object) -> object:
        raise AssertionError("the frame was opened")

    monkeypatch.setattr(zstd_codec.zstd, "ZstdDecompressor", nothing)
    assert parse("fp32").sizes(SHAPE).most == 240
    bomb = frame_of(bytes(2_000_000))
    assert len(bomb) < 300, "no longer than an honest frame may be"
    assert "a frame of 2000000 decompressed bytes came; 240 were due" in refusal("fp32+zstd", bomb)
    assert "a frame of 239 decompressed" in refusal("fp32+zstd", frame_of(bytes(239)))
    unsaid = frame_of(bytes(2_000_000), content_size_flag=0)
    assert "a frame of None decompressed" in refusal("fp32+zstd", unsaid)


def test_a_bomb_that_lies_about_its_size_is_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb, honest = frame_of(bytes(400_000)), frame_of(bytes(240))
    info = zstd_codec.zstd.get_frame_info(honest.numpy().data)
    monkeypatch.setattr(zstd_codec.zstd, "get_frame_info", lambda _: info)
    assert "does not hold the 240 bytes" in refusal("fp32+zstd", bomb)


def test_a_frame_with_its_size_changed_is_refused() -> None:
    bomb, honest = frame_of(bytes(70_000)), frame_of(bytes(240))
    assert bomb[4] >> 6 == 2, "its size is 4 bytes from the sixth on"
    bomb[5:9] = torch.tensor([240, 0, 0, 0])
    assert zstd_codec.zstd.get_frame_info(bomb.numpy().data).decompressed_size == 240
    assert "not a zstd frame" in refusal("fp32+zstd", bomb)
    assert parse("fp32+zstd").decode(Encoded(SHAPE, [honest])).shape == SHAPE


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.99])
def test_a_frame_that_is_cut_off_is_refused(kept: float) -> None:
    (frame,) = encoded("fp32+zstd", values(SHAPE)).tensors
    refusal("fp32+zstd", frame[: int(kept * len(frame))])


def test_a_frame_without_its_end_is_refused_though_its_contents_are_there() -> None:
    frame = frame_of(bytes(240), checksum_flag=1)
    assert "does not hold the 240 bytes that it declares" in refusal("fp32+zstd", frame[:-2])


def test_more_than_one_frame_is_refused() -> None:
    (frame,) = encoded("fp32+zstd", torch.zeros(SHAPE)).tensors
    for more in (frame, torch.zeros(1, dtype=torch.uint8)):
        assert "or is not alone" in refusal("fp32+zstd", torch.cat([frame, more]))


def test_what_is_no_frame_is_refused() -> None:
    for seed in range(20):
        noise = torch.randint(0, 256, (100,), generator=seeded(seed), dtype=torch.uint8)
        assert "not a zstd frame" in refusal("fp32+zstd", noise)


def test_a_frame_that_needs_much_memory_beside_its_contents_is_refused() -> None:
    shape = (8, 1, 256, 256)
    frame = frame_of(bytes(8 * 256 * 256 * 4), window_log=21)
    assert "not a zstd frame: " in refusal("fp32+zstd", frame, shape=shape)


def test_what_is_in_a_frame_is_judged_too() -> None:
    x = values(SHAPE)
    x[0, 0, 0, 0] = math.nan
    assert "fp32: NaN or infinite" in refusal("fp32+zstd", frame_of(x.numpy().tobytes()))


@given(place=st.integers(0, 10**6), value=st.integers(0, 255), name=st.sampled_from(NAMES))
def test_a_payload_with_a_changed_byte_is_decoded_or_refused(place: int, value: int, name: str) -> None:
    tensors = [tensor.clone() for tensor in encoded(name, values(SHAPE, "signed")).tensors]
    raw = [tensor.view(-1).view(torch.uint8) for tensor in tensors]
    part = raw[place % len(raw)]
    part[place % len(part)] = value
    with contextlib.suppress(WireError):
        assert parse(name).decode(Encoded(SHAPE, tensors)).isfinite().all()


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("int4", "int4"),
        ("topk", "topk:0.1"),
        ("topk:0.05", "topk:0.05"),
        ("randtopk:0.05", "randtopk:0.05:0.1"),
        ("randtopk:0.05:0.2+zstd", "randtopk:0.05:0.2+zstd"),
        ("fp16+zstd", "fp16+zstd"),
    ],
)
def test_a_name_gives_its_codec(name: str, called: str) -> None:
    codec = parse(name)
    assert codec.name == called
    assert isinstance(codec, Codec)
    assert parse(called).name == called


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "",
            "choose fp32, fp16, bf16, fp8, int8, int4, int3, int2, topk[:K], randtopk[:K][:ALPHA]; each with",
        ),
        ("int5", "codec 'int5': choose fp32"),
        ("INT4", "choose fp32"),
        ("zstd", "choose fp32"),
        ("+zstd", "choose fp32"),
        ("int4+lz4", "choose fp32"),
        ("int4+zstd+zstd", "choose fp32"),
        ("int4:3", "too many values; its form is int4"),
        ("topk:1:2", "too many values; its form is topk[:K]"),
        ("topk:", "not a number; its form is topk[:K]"),
        ("topk:ten", "not a number"),
        ("topk:0", "topk: k 0.0 must be above 0 and at most 1"),
        ("topk:1.5", "topk: k 1.5"),
        ("topk:nan", "topk: k nan"),
        ("randtopk:0.1:1", "alpha 1.0"),
        ("randtopk:0.1:-0.1", "alpha -0.1"),
        ("randtopk:2", "k 2.0"),
    ],
)
def test_a_name_that_is_none_is_refused_with_what_there_is(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(name)
    assert says in str(caught.value)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regime", REGIMES)
def test_a_gpu_encodes_and_decodes_as_the_cpu_does(name: str, regime: str) -> None:
    x = values((5, 3, 7, 9), regime)
    codec = parse(name)
    ours, theirs = codec.encode(x.cuda(), seeded(), False), encoded(name, x, training=False)
    y = codec.decode(Encoded(ours.shape, [tensor.cuda() for tensor in ours.tensors]))
    assert y.device.type == "cuda"
    assert torch.allclose(y.cpu(), codec.decode(theirs), rtol=1e-5, atol=0) or codec.chance
    codec.encode(x.cuda(), torch.Generator("cuda").manual_seed(0), True)
