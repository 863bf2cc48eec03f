"""A nested state as two files, one of tensors and one of JSON: nothing in them can run code."""

import hashlib
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hybrid.core import InputError

__all__ = ["load_state", "save_state"]

FORMAT = 1
DIGEST = "structure_sha256"

# What every safetensors knows from 0.5 on. A tensor of another type is stored as its bytes.
_STORED = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
# Numbers, strings, bytes and times; objects, records and other libraries' types are not among them.
_NUMPY_KINDS = "biufcSUmM"


def save_state(file_stem: str | Path, state: Any) -> None:
    """Write a state as FILE_STEM.safetensors and FILE_STEM.json; `load_state` gives it back bit for bit.

    state: any nest of dicts (keys str or int), lists, tuples, int, float, bool, str, None, torch tensors, and
    numpy arrays and scalars. Tensors that share memory are written each on its own.
    Refuses (InputError) all else by its place in the state: objects, functions, subclasses of the types above
    (an OrderedDict, a Parameter), tensors that require a gradient. Write into a `filled_folder` to be safe
    from a crash. Raises OSError or SafetensorError where the disk does.
    """
    tensor_file, json_file = _files(file_stem)
    tensors: dict[str, torch.Tensor] = {}
    try:
        structure = _Encoder(tensors).encoded(state, "state")
        text = json.dumps({"format": FORMAT, "state": structure}, allow_nan=False).encode("ascii")
    except RecursionError:
        raise InputError("cannot save the state: it holds itself, or nests too deep") from None
    # The digest ties the two files together: a changed structure, or one of another save, is found.
    save_file(tensors, tensor_file, metadata={DIGEST: hashlib.sha256(text).hexdigest()})
    json_file.write_bytes(text)


def load_state(file_stem: str | Path) -> Any:
    """What `save_state` was given, the tensors on the CPU, each with memory of its own.

    Refuses (InputError), by name, a file that is missing, cut off, of another save or of a newer format, and
    tensors that are missing, left over or of another shape. A changed number inside a tensor is not seen
    here: the manifest of a checkpoint has the hash of each file.
    """
    tensor_file, json_file = _files(file_stem)
    try:
        text = json_file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the state file {str(json_file)!r}: {error.strerror}") from error
    try:
        with safe_open(tensor_file, framework="pt") as file:
            digest = (file.metadata() or {}).get(DIGEST)
            # A copy, since what is read from a file shares the file's memory.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the state file {str(tensor_file)!r}: {error}") from error
    if hashlib.sha256(text).hexdigest() != digest:
        raise InputError(
            f"the state file {str(json_file)!r} is broken: it is not what was written with {tensor_file.name}"
        )
    try:
        document = json.loads(text)
        if document["format"] == FORMAT:
            decoder = _Decoder(tensors)
            state = decoder.decoded(document["state"])
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, struct.error) as error:
        where = tensor_file if isinstance(error, _TensorError) else json_file
        raise InputError(f"the state file {str(where)!r} is broken: {error}") from error
    if document["format"] != FORMAT:
        raise InputError(
            f"the state file {str(json_file)!r} has format {document['format']!r}, known: {FORMAT}; "
            "update hybrid-trainer"
        )
    if tensors.keys() != decoder.used:
        extra = ", ".join(sorted(tensors.keys() - decoder.used))
        raise InputError(f"the state file {str(tensor_file)!r} is broken: nothing refers to its tensor {extra}")
    return state


class _TensorError(ValueError):
    """The fault lies in the file of tensors."""


def _files(file_stem: str | Path) -> tuple[Path, Path]:
    stem = Path(file_stem)
    return stem.with_name(f"{stem.name}.safetensors"), stem.with_name(f"{stem.name}.json")


class _Encoder:
    """The state as JSON. What JSON has no word for becomes an object with one key that starts with a $.

    tensors: filled with what goes to the other file, named by number.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        self.memory: set[int] = set()

    def encoded(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return value if _is_unicode(value) else {"$str": value.encode("utf-8", "surrogatepass").hex()}
        if kind is int:
            # Python reads no decimal number of more than 4300 digits, and other readers stop at 64 bits.
            return value if value.bit_length() < 64 else {"$int": format(value, "x")}
        if kind is float:
            # JSON has no nan and no inf, and a nan has a sign and a payload.
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind is list:
            return [self.encoded(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [self.encoded(item, f"{path}[{index}]") for index, item in enumerate(value)]}
        if kind is dict:
            return self._dict(value, path)
        if kind is torch.Tensor:
            return self._tensor(value, path)
        return self._numpy(value, path)

    def _dict(self, value: dict[Any, Any], path: str) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise InputError(f"cannot save {path}: a key must be a str or an int, got {key!r}")
        items = [(key, self.encoded(item, f"{path}[{key!r}]")) for key, item in value.items()]
        if all(type(key) is str and not key.startswith("$") and _is_unicode(key) for key in value):
            return dict(items)
        return {"$dict": [[self.encoded(key, path), item] for key, item in items]}

    def _tensor(self, value: torch.Tensor, path: str) -> Any:
        if value.requires_grad:
            raise InputError(f"cannot save {path}: the tensor requires a gradient; save its .detach()")
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise InputError(f"cannot save {path}: only a dense tensor with data can be saved, got {value.layout}")
        stored = value.resolve_conj().resolve_neg().cpu().contiguous()
        if stored.dtype not in _STORED:
            stored = stored.reshape(-1).view(torch.uint8)
        # safetensors refuses views, and tensors that share their memory.
        storage = stored.untyped_storage()
        if storage.nbytes() != stored.nbytes or storage.data_ptr() in self.memory:
            stored = stored.clone()
        self.memory.add(stored.untyped_storage().data_ptr())
        dtype = str(value.dtype).removeprefix("torch.")
        return {"$tensor": self._named(stored), "dtype": dtype, "shape": list(value.shape)}

    def _numpy(self, value: Any, path: str) -> Any:
        import numpy as np

        is_array = type(value) is np.ndarray
        if not is_array and not (isinstance(value, np.generic) and type(value) is value.dtype.type):
            raise InputError(
                f"cannot save {path}: {type(value).__module__}.{type(value).__qualname__} is not among "
                "dict, list, tuple, int, float, bool, str, None, torch.Tensor, numpy array or scalar"
            )
        if value.dtype.kind not in _NUMPY_KINDS:
            raise InputError(f"cannot save {path}: numpy's {value.dtype} may hold objects; save a list instead")
        # As an array, since a scalar's own type is wrong for an empty text.
        array = np.asarray(value)
        data, dtype = array.tobytes(), array.dtype.str
        if not is_array:
            return {"$scalar": data.hex(), "dtype": dtype}
        stored = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return {"$array": self._named(stored), "dtype": dtype, "shape": list(value.shape)}

    def _named(self, tensor: torch.Tensor) -> str:
        name = str(len(self.tensors))
        self.tensors[name] = tensor
        return name


class _Decoder:
    """The way back. used: the names of the tensors that were referred to."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        self.used: set[str] = set()
        self.words: dict[str, Callable[[dict[str, Any]], Any]] = {
            "$str": lambda value: bytes.fromhex(value["$str"]).decode("utf-8", "surrogatepass"),
            "$int": lambda value: int(value["$int"], 16),
            "$float": lambda value: struct.unpack(">d", bytes.fromhex(value["$float"]))[0],
            "$tuple": lambda value: tuple(map(self.decoded, value["$tuple"])),
            "$dict": lambda value: {self.decoded(key): self.decoded(item) for key, item in value["$dict"]},
            "$tensor": self._tensor,
            "$array": lambda value: self._array(self._stored(value["$array"]).numpy().tobytes(), value),
            "$scalar": lambda value: self._array(bytes.fromhex(value["$scalar"]), {"shape": [], **value})[()],
        }

    def decoded(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.decoded(item) for item in value]
        if not isinstance(value, dict):
            return value
        word = next(iter(value), "")
        if word.startswith("$"):
            return self.words[word](value)
        return {key: self.decoded(item) for key, item in value.items()}

    def _tensor(self, value: dict[str, Any]) -> torch.Tensor:
        dtype, shape = getattr(torch, value["dtype"]), value["shape"]
        stored = self._stored(value["$tensor"])
        if dtype not in _STORED and stored.dtype is torch.uint8:
            # An empty tensor cannot be viewed, only made.
            stored = stored.view(dtype).reshape(shape) if stored.numel() else torch.empty(shape, dtype=dtype)
        if stored.dtype is not dtype or list(stored.shape) != shape:
            raise _TensorError(
                f"tensor {value['$tensor']} is {stored.dtype} {list(stored.shape)}, written was {dtype} {shape}"
            )
        return stored

    def _array(self, data: bytes, value: dict[str, Any]) -> Any:
        import numpy as np

        dtype, shape = np.dtype(value["dtype"]), value["shape"]
        if dtype.kind not in _NUMPY_KINDS or math.prod(shape) * dtype.itemsize != len(data):
            raise _TensorError(f"{len(data)} bytes are not {value['dtype']} {shape}")
        return np.ndarray(shape, dtype, bytearray(data))

    def _stored(self, name: str) -> torch.Tensor:
        if name not in self.tensors:
            raise _TensorError(f"it has no tensor {name}")
        self.used.add(name)
        return self.tensors[name]


def _is_unicode(text: str) -> bool:
    """False with half a surrogate pair: two halves in a row would come back from JSON as one character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
