"""State files: what goes in comes out bit for bit, what cannot is refused, what is broken is named."""

import collections
import functools
import json
import math
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid.core import InputError
from hybrid.run.state_file import load_state, save_state

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128, torch.complex32),
]
STATE = {"a": [1, 2.5, "x"], "b": (torch.arange(3), {0: None}), "c": np.arange(4.0)}


def round_trip(folder, state):
    save_state(folder / "state", state)
    return load_state(folder / "state")


def same(a, b):
    """Equal bit for bit, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return [*map(type, a)] == [*map(type, b)] and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return struct.pack("d", a) == struct.pack("d", b) if isinstance(a, float) else a == b


def raw(tensor):
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def tensor_of(dtype, shape):
    """Random bits, nan payloads among them."""
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (math.prod(shape) * size,), dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (), (5,)], ids=str)
def test_tensor_of_any_type_comes_back_bit_for_bit(tmp_path, dtype, shape):
    torch.manual_seed(0)
    tensor = tensor_of(dtype, shape)
    assert same(round_trip(tmp_path, tensor), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)], ids=str)
def test_empty_tensor_keeps_its_type_and_shape(tmp_path, dtype, shape):
    assert same(round_trip(tmp_path, torch.empty(shape, dtype=dtype)), torch.empty(shape, dtype=dtype))


WHOLE = torch.arange(24.0).reshape(4, 6)
VIEWS = {
    "transposed": WHOLE.t(),
    "strided": WHOLE[:, ::2],
    "row": WHOLE[1],
    "element": WHOLE[2, 3],
    "expanded": WHOLE[:1].expand(3, 6),
    "conjugate": torch.tensor([1 + 2j, -0.0 - 1j]).conj(),
    "channels last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_view_comes_back_as_what_it_shows(tmp_path, view):
    assert same(round_trip(tmp_path, view), view)


def test_file_of_a_view_is_no_larger_than_the_view(tmp_path):
    save_state(tmp_path / "state", torch.zeros(100_000)[:10])
    assert (tmp_path / "state.safetensors").stat().st_size < 1000


def test_tensors_that_share_memory_come_back_equal_and_apart(tmp_path):
    state = {"whole": WHOLE, "again": WHOLE, "row": WHOLE[0], "flat": WHOLE.view(-1), "rest": WHOLE[1:]}
    loaded = round_trip(tmp_path, state)
    assert same(loaded, state)
    loaded["whole"].zero_()
    assert same({**loaded, "whole": WHOLE}, state)


def test_loaded_tensor_does_not_depend_on_its_file(tmp_path):
    loaded = round_trip(tmp_path, torch.arange(1000))
    (tmp_path / "state.safetensors").write_bytes(b"")
    assert torch.equal(loaded, torch.arange(1000))


PLAIN = {
    "nothing": None,
    "booleans": [True, False],
    "one in each type": [1, 1.0, True, "1", (1,), np.int64(1), np.float64(1), np.bool_(True), torch.tensor(1)],
    "integers": [0, -1, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**64), 3**99, -(7**9000)],
    "floats": [0.0, -0.0, 0.1, 5e-324, 1.7976931348623157e308, 2.0**53, math.nan, -math.nan, math.inf, -math.inf],
    "nan payload": struct.unpack(">d", bytes.fromhex("7ff8dead0000beef"))[0],
    "texts": ["", "é🎉", "\x00\n\u2028", "half \ud83d", "two halves \ud83d\ude00", '"\\'],
    "tuples in lists": ([], (), [()], ([],), ((1,), [1])),
    "integer keys": {0: "a", -1: "b", 2**70: "c"},
    "mixed keys": {0: "int", "0": "str", "$tuple": [1], "": None, "\ud800": 1},
    "key like a word of the file": {"$tensor": "0"},
    "reserved words as values": ["$int", {"a": "$float"}],
    "order of keys": {"b": 1, "a": 2, "c": {1: 0, 0: 1}},
    "empty": {},
}


@pytest.mark.parametrize("state", PLAIN.values(), ids=PLAIN)
def test_plain_value_comes_back_with_its_type(tmp_path, state):
    assert same(round_trip(tmp_path, state), state)


ARRAYS = {
    "float": np.array([[0.1, -0.0], [np.nan, np.inf]]),
    "fortran order": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "strided": np.arange(10)[::3],
    "big-endian": np.array([1, 2], dtype=">u4"),
    "zero-dimensional": np.array(3, dtype=np.int8),
    "empty": np.empty((0, 2), dtype=np.float16),
    "text": np.array(["a", "bé"]),
    "bytes": np.array([b"a", b"bcd"]),
    "times": np.array(["2026-01-01", "NaT"], dtype="M8[s]"),
    "complex": np.array([1 - 2j]),
    "boolean": np.array([True, False]),
    "scalars": [np.float32(0.1), np.uint8(255), np.bool_(False), np.str_(""), np.datetime64("NaT"), np.float64("nan")],
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_numpy_comes_back_bit_for_bit(tmp_path, array):
    assert same(round_trip(tmp_path, array), array)


def test_loaded_array_can_be_written(tmp_path):
    loaded = round_trip(tmp_path, np.zeros(3))
    loaded[0] = 1
    assert loaded.tolist() == [1, 0, 0]


def test_random_nest_comes_back(tmp_path):
    draw = random.Random(0)
    leaves = [*PLAIN.values(), *ARRAYS.values(), *VIEWS.values()]

    def nest(depth):
        if depth == 0:
            return draw.choice(leaves)
        kind = draw.choice(["list", "tuple", "dict"])
        items = [nest(depth - 1) for _ in range(draw.randrange(5))]
        if kind == "dict":
            return {draw.choice([index, f"k{index}", f"${index}"]): item for index, item in enumerate(items)}
        return items if kind == "list" else tuple(items)

    state = [nest(4) for _ in range(5)]
    assert same(round_trip(tmp_path, state), state)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_streams_go_on_where_they_were(tmp_path, seed):
    stream, old, new = random.Random(seed), np.random.RandomState(seed), np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    # An odd number of normals leaves one over, which is part of the state.
    stream.gauss(0, 1), old.normal(), new.random(dtype=np.float32), torch.randn(3, generator=generator)
    state = {
        "random": stream.getstate(),
        "numpy": old.get_state(),
        "generator": new.bit_generator.state,
        "torch": generator.get_state(),
        "global": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
    }
    loaded = round_trip(tmp_path, state)
    assert same(loaded, state)
    expected = stream.gauss(0, 1), old.normal(), new.random(dtype=np.float32), torch.randn(3, generator=generator)
    stream.setstate(loaded["random"])
    old.set_state(loaded["numpy"])
    new.bit_generator.state = loaded["generator"]
    generator.set_state(loaded["torch"])
    actual = stream.gauss(0, 1), old.normal(), new.random(dtype=np.float32), torch.randn(3, generator=generator)
    assert all(map(same, expected, actual))


def trained(make, *, num_steps, load=None):
    """Weights and optimizer state after some steps, from the start or from a state (weights, optimizer)."""
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 64)  # 8192 weights: enough for 8-bit states
    optimizer = make(model.parameters())
    if load is not None:
        model.load_state_dict(load["model"])
        optimizer.load_state_dict(load["optimizer"])
    for step in range(num_steps):
        # A gradient that depends on the weights, so that a difference would grow.
        loss = (model(torch.full((4, 128), 0.1)) - 1 - step % 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}


def bitsandbytes(name, **arguments):
    return lambda parameters: getattr(pytest.importorskip("bitsandbytes").optim, name)(parameters, **arguments)


OPTIMIZERS = {
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "Adam, tensor lr": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(1e-2)),
    "SGD": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=1e-3, centered=True),
    "Adafactor": functools.partial(torch.optim.Adafactor, lr=1e-2),
    "Adagrad": functools.partial(torch.optim.Adagrad, lr=1e-2),
    "bnb AdamW8bit": bitsandbytes("AdamW8bit", lr=1e-2),
    "bnb Lion8bit": bitsandbytes("Lion8bit", lr=1e-3),
    "bnb AdamW": bitsandbytes("AdamW", lr=1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_state_comes_back_and_goes_on_the_same(tmp_path, make):
    state = trained(make, num_steps=2)
    loaded = round_trip(tmp_path, state)
    assert same(loaded, state)
    assert same(trained(make, num_steps=2, load=loaded), trained(make, num_steps=2, load=state))


def test_bitsandbytes_keeps_eight_bits_here(tmp_path):
    state = round_trip(tmp_path, trained(OPTIMIZERS["bnb AdamW8bit"], num_steps=1))["optimizer"]["state"]
    # bitsandbytes 0.50 keeps them one level deeper than 0.49.
    quantized = state[0].get("__bnb_optimizer_quant_state__", state[0])
    assert quantized["state1"].dtype is torch.uint8
    assert {"qmap1", "absmax1"} <= quantized.keys()


def test_scheduler_state_comes_back(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    first = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    second = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for scheduler in (first, second):
        state = scheduler.state_dict()
        assert same(round_trip(tmp_path, state), state)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


OBJECTS = {
    "object": Evil(),
    "function": len,
    "class": int,
    "set": {1},
    "bytes": b"x",
    "ordered dict": collections.OrderedDict(a=1),
    "default dict": collections.defaultdict(int),
    "named tuple": collections.namedtuple("Point", "x")(1),
    "complex": 1j,
    "path": Path("x"),
    "parameter": torch.nn.Parameter(torch.zeros(1)),
    "gradient": torch.zeros(1, requires_grad=True),
    "sparse": torch.eye(2).to_sparse(),
    "meta": torch.empty(1, device="meta"),
    "array of objects": np.array([Evil()], dtype=object),
    "array of records": np.zeros(1, dtype=[("a", "i4")]),
    "matrix": np.ma.masked_array([1.0]),
    "dtype": torch.float32,
    "generator": torch.Generator(),
}


@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS)
def test_anything_else_is_refused_by_its_place(tmp_path, value):
    with pytest.raises(InputError, match=r"cannot save state\['a'\]\[1\]\[0\]"):
        save_state(tmp_path / "state", {"a": [0, {0: value}]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", [True, 1.0, None, (1, 2), np.int64(1)], ids=repr)
def test_key_that_is_neither_text_nor_integer_is_refused(tmp_path, key):
    with pytest.raises(InputError, match=r"cannot save state\['a'\]: a key must be"):
        save_state(tmp_path / "state", {"a": {key: 1}})


def test_state_that_holds_itself_is_refused(tmp_path):
    state = []
    state.append(state)
    with pytest.raises(InputError, match="holds itself"):
        save_state(tmp_path / "state", state)


@pytest.fixture
def saved(tmp_path):
    save_state(tmp_path / "state", STATE)
    return tmp_path


def refused(folder, name):
    with pytest.raises(InputError) as caught:
        load_state(folder / "state")
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_any_flipped_bit_of_the_structure_is_refused(saved):
    path = saved / "state.json"
    whole = path.read_bytes()
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << index % 8]) + whole[index + 1 :])
        refused(saved, "state.json")


def test_any_flipped_bit_of_the_tensor_header_is_refused(saved):
    path = saved / "state.safetensors"
    whole = path.read_bytes()
    for index in range(8 + int.from_bytes(whole[:8], "little")):
        # The blanks that fill it up mean nothing.
        if whole[index : index + 1] != b" ":
            path.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << index % 8]) + whole[index + 1 :])
            refused(saved, "")


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_cut_off_file_is_refused_by_name(saved, name):
    whole = (saved / name).read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        (saved / name).write_bytes(whole[:length])
        refused(saved, name)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_missing_file_is_refused_by_name(saved, name):
    (saved / name).unlink()
    assert "No such file" in refused(saved, name)


def rewrite(folder, change):
    """The file of tensors, changed, with the digest that fits."""
    from safetensors import safe_open

    path = folder / "state.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda tensors: tensors.pop("0"), "no tensor 0"),
        (lambda tensors: tensors.update(evil=torch.zeros(1)), "nothing refers to its tensor evil"),
        (lambda tensors: tensors.update({"0": torch.arange(4)}), r"tensor 0 is torch.int64 \[4\], written was"),
        (lambda tensors: tensors.update({"0": torch.zeros(3)}), "tensor 0 is torch.float32"),
        (lambda tensors: tensors.update({"1": torch.zeros(31, dtype=torch.uint8)}), "31 bytes are not <f8"),
    ],
    ids=["missing", "extra", "shape", "type", "array"],
)
def test_file_with_other_tensors_is_refused_by_name(saved, change, fault):
    rewrite(saved, change)
    with pytest.raises(InputError, match=rf"state.safetensors' is broken: .*{fault}"):
        load_state(saved / "state")


def test_structure_of_another_save_is_refused(saved):
    structure = (saved / "state.json").read_bytes()
    save_state(saved / "state", {**STATE, "a": []})
    (saved / "state.json").write_bytes(structure)
    assert "not what was written with state.safetensors" in refused(saved, "state.json")


CRAFTED = [
    "1",
    "{}",
    "[]",
    '{"format": 1}',
    '{"format": 1, "state": {"$eval": "print(1)"}}',
    '{"format": 1, "state": {"$int": 3}}',
    '{"format": 1, "state": {"$int": "xyz"}}',
    '{"format": 1, "state": {"$float": "00"}}',
    '{"format": 1, "state": {"$tuple": 3}}',
    '{"format": 1, "state": {"$dict": [[{}, 1]]}}',
    '{"format": 1, "state": {"$scalar": "0000000000000000", "dtype": "O"}}',
    '{"format": 1, "state": {"$scalar": "00", "dtype": "<f8"}}',
    '{"format": 1, "state": {"$tensor": "0", "dtype": "load", "shape": [1]}}',
    '{"format": 1, "state": {"$tensor": "0", "dtype": "float32", "shape": ["a"]}}',
    '{"format": 1, "state": {"$tensor": ["0"], "dtype": "float32", "shape": [1]}}',
    '{"format": 1, "state": {"$array": "0", "dtype": "O", "shape": [1]}}',
    '{"format": 1, "state": {"$array": "0", "dtype": "<f4", "shape": [99999999999999]}}',
    '{"format": 2, "state": 1}',
    '{"format": 1, "state": ' + "[" * 100_000 + "]" * 100_000 + "}",
]


@pytest.mark.parametrize("text", CRAFTED, ids=range(len(CRAFTED)))
def test_crafted_structure_is_refused_and_runs_nothing(tmp_path, text):
    import hashlib

    digest = hashlib.sha256(text.encode()).hexdigest()
    save_file({"0": torch.zeros(1)}, tmp_path / "state.safetensors", metadata={"structure_sha256": digest})
    (tmp_path / "state.json").write_text(text)
    refused(tmp_path, "state.")


def test_newer_format_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid.run.state_file.FORMAT", 2)
    save_state(tmp_path / "state", 1)
    monkeypatch.undo()
    assert "format 2, known: 1; update hybrid-trainer" in refused(tmp_path, "state.json")


def test_same_state_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        save_state(tmp_path / name, STATE)
    for end in ("json", "safetensors"):
        assert (tmp_path / f"one.{end}").read_bytes() == (tmp_path / f"two.{end}").read_bytes()


def test_stem_with_a_dot_is_kept(tmp_path):
    save_state(tmp_path / "state.v1", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"state.v1.json", "state.v1.safetensors"}


def test_structure_is_plain_json(saved):
    assert json.loads((saved / "state.json").read_bytes())["state"]["a"] == [1, 2.5, "x"]
