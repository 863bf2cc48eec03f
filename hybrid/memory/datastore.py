"""A datastore: the hidden state before every token of a text, and the token, in a folder that is read where it lies."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from hybrid.core import InputError, first_line
from hybrid.functional import nearest, squared_distance
from hybrid.memory.memory import tokenizer_name
from hybrid.run import disk_errors, filled_folder

__all__ = ["Datastore", "DatastoreInfo", "KeyDtype", "Search", "check_place", "filled_datastore", "trunk_name"]

META, KEYS, VALUES, INDEX = "meta.json", "keys.bin", "values.bin", "index.faiss"
KeyDtype = Literal["float16", "float32"]
Search = Literal["exact", "faiss"]
# faiss learns its cells from so many keys, and looks into so many of them for a query.
TRAINED_ON, PROBED = 100_000, 32
# The keys whose nearest other one is looked for, to know how far apart they are.
MEASURED = 256


@dataclass(frozen=True)
class DatastoreInfo:
    """What a datastore's meta.json says: what it was made with, by whose hidden states, and how much is in it."""

    model: str  # the name that the model was loaded by
    trunk: str  # `trunk_name` of it
    tokenizer: str  # `tokenizer_name` of its tokenizer
    hidden_size: int
    dtype: KeyDtype  # of the keys
    count: int = 0
    distance: float = 0.0  # squared, of a key to the nearest other one: the mean over some

    def __post_init__(self) -> None:
        if self.dtype not in get_args(KeyDtype):
            raise InputError(f"dtype must be one of {', '.join(get_args(KeyDtype))}, got {self.dtype!r}")

    @classmethod
    def of(cls, model: str, trunk: nn.Module, tokenizer: Any, *, hidden_size: int, dtype: KeyDtype = "float16") -> Self:
        """Of a model's datastore that is still empty."""
        return cls(model, trunk_name(trunk), tokenizer_name(tokenizer), hidden_size, dtype)


class Datastore:
    """N keys, hidden states, and their values, the tokens that came behind them. Reads, and never writes, its folder.

    keys: (N, D) float16 or float32, and values: (N,) int32, both mapped from the disk.
    Raises InputError where the folder holds none, or one that is empty or not whole.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / META).is_file():
            raise InputError(
                f"{str(folder)!r} holds no datastore: it has no {META}; hybrid datastore MODEL DATA DIR makes one"
            )
        with disk_errors(f"read the datastore {str(folder)!r}"):
            text = (self.folder / META).read_text("utf-8")
        try:
            self.info = DatastoreInfo(**json.loads(text))
        except (ValueError, TypeError) as error:
            names = ", ".join(f.name for f in fields(DatastoreInfo))
            raise InputError(f"{str(self.folder / META)!r} must be a JSON object of {names}: {error}") from error
        if not self.info.count:
            raise InputError(f"the datastore {str(folder)!r} is empty")
        self._bytes = {KEYS: len(self) * self.info.hidden_size * self.dtype.itemsize, VALUES: len(self) * 4}
        for file, size in self._bytes.items():
            path = self.folder / file
            if not path.is_file() or path.stat().st_size != size:
                raise InputError(f"the datastore {str(folder)!r} is not whole: {file} must be of {size:,} bytes")

    def __len__(self) -> int:
        return self.info.count

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.info.dtype)
        return found

    @cached_property
    def keys(self) -> Tensor:
        size = len(self) * self.info.hidden_size
        mapped = torch.from_file(str(self.folder / KEYS), shared=False, size=size, dtype=self.dtype)
        return mapped.view(len(self), self.info.hidden_size)

    @cached_property
    def values(self) -> Tensor:
        return torch.from_file(str(self.folder / VALUES), shared=False, size=len(self), dtype=torch.int32)

    @property
    def has_index(self) -> bool:
        """Whether faiss can search it."""
        return (self.folder / INDEX).is_file()

    def nearest(self, queries: Tensor, k: int, search: Search = "exact") -> tuple[Tensor, Tensor]:
        """(squared distance, value) of the k nearest keys of each query, the nearest first: (R, D) -> (R, k) each.

        search: faiss looks into the cells next to a query only and may miss some of them; distances are exact.
        """
        squared, index = nearest(queries, self.keys, k) if search == "exact" else self._by_cells(queries, k)
        return squared, self.values[index.cpu()].long().to(queries.device)

    def _by_cells(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        _, found = self._index.search(queries.float().cpu().contiguous().numpy(), k)
        index = torch.from_numpy(found).to(queries.device)
        # The cells next to a query may hold less than k.
        few = (index < 0).any(1)
        if few.any():
            index[few] = nearest(queries[few], self.keys, k)[1]
        squared, order = squared_distance(queries, self.keys, index).sort(dim=1, stable=True)
        return squared, index.gather(1, order)

    @cached_property
    def _index(self) -> Any:
        faiss = _faiss()
        try:
            index = faiss.read_index(str(self.folder / INDEX))
        except RuntimeError as error:
            raise InputError(f"{str(self.folder / INDEX)!r} cannot be read by faiss: {first_line(error)}") from error
        index.nprobe = PROBED
        return index

    def check_search(self, k: int, search: Search) -> None:
        """Refuse (InputError) more neighbours than there are, and a search that is not prepared."""
        if not 1 <= k <= len(self):
            raise InputError(f"k must lie in [1, {len(self)}], the size of the datastore {str(self.folder)!r}, got {k}")
        if search == "faiss":
            _faiss()
            if not self.has_index:
                raise InputError(
                    f"search 'faiss' needs an index, and {str(self.folder)!r} has none: make it with hybrid datastore "
                    "--index, or take search exact"
                )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse (InputError) a tokenizer by which its values would be other tokens."""
        if (name := tokenizer_name(tokenizer)) != self.info.tokenizer:
            raise InputError(
                f"the datastore {str(self.folder)!r} is of another tokenizer: {self.info.tokenizer!r}, that of "
                f"{self.info.model!r}, and this one is {name!r}; make one with this model"
            )

    def check_trunk(self, trunk: nn.Module) -> None:
        """Refuse (InputError) a model whose hidden states are not those of the keys."""
        if (name := trunk_name(trunk)) != self.info.trunk:
            raise InputError(
                f"the datastore {str(self.folder)!r} is of another model: {self.info.trunk!r}, that of "
                f"{self.info.model!r} as it was then, and this one, with its weights, adapter and dtype, is {name!r}; "
                "make one with this model"
            )


@contextmanager
def filled_datastore(folder: str | Path, info: DatastoreInfo, *, index: bool = False) -> Iterator[Callable[..., None]]:
    """Gives `add(keys, values)`, (n, D) and (n,), which appends; the folder is there, whole, when the block ends well.

    index: prepare it for faiss as well.   A datastore that is there already is replaced.
    Raises InputError where the folder holds something else, and for keys that are not finite in `info.dtype`.
    """
    folder, count = Path(folder), 0
    dtype = getattr(torch, info.dtype)
    check_place(folder)
    if index:
        _faiss()
    with filled_folder(folder, stale=(INDEX,)) as temporary, disk_errors(f"write the datastore {str(folder)!r}"):
        with (temporary / KEYS).open("wb") as keys_file, (temporary / VALUES).open("wb") as values_file:

            def add(keys: Tensor, values: Tensor) -> None:
                nonlocal count
                keys = keys.detach().to("cpu", dtype).contiguous()
                if not keys.isfinite().all():
                    raise InputError(f"a hidden state is not finite in {info.dtype}; take --dtype float32")
                keys_file.write(keys.numpy().tobytes())
                values_file.write(values.to("cpu", torch.int32).contiguous().numpy().tobytes())
                count += len(values)

            yield add
        _write_info(temporary, replace(info, count=count))
        if count:
            store = Datastore(temporary)
            _write_info(temporary, replace(store.info, distance=_distance(store)))
            if index:
                _write_index(store)


def check_place(folder: Path) -> None:
    """Refuse (InputError) to write a datastore over something else."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / META).is_file():
        raise InputError(f"cannot write a datastore to {str(folder)!r}: it holds something else; name a new folder")


def trunk_name(trunk: nn.Module) -> str:
    """A hash of names, shapes, dtypes and 64 numbers of each tensor: an optimizer step gives another one."""
    digest = hashlib.sha256()
    for name, x in trunk.state_dict().items():
        flat = x.detach().reshape(-1)
        number = min(64, len(flat))
        picked = torch.arange(number, device=flat.device) * (len(flat) - 1) // max(number - 1, 1)
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        digest.update(flat[picked].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _write_info(folder: Path, info: DatastoreInfo) -> None:
    (folder / META).write_text(json.dumps(asdict(info), indent=2) + "\n", "utf-8")


def _distance(store: Datastore) -> float:
    some = torch.arange(0, len(store), max(1, len(store) // MEASURED))[:MEASURED]
    squared, _ = nearest(store.keys[some].float(), store.keys, min(2, len(store)))
    return float(squared[:, -1].mean())


def _write_index(store: Datastore) -> None:
    """Cells of keys, each key kept as bytes: what faiss searches in place of the keys themselves."""
    faiss = _faiss()
    # As many as make a cell about as large as there are cells; faiss wants 39 keys to learn one.
    cells = max(1, min(round(len(store) ** 0.5), len(store) // 39))
    made = faiss.index_factory(store.info.hidden_size, f"IVF{cells},SQ8")
    sample = torch.arange(0, len(store), max(1, len(store) // TRAINED_ON))
    made.train(store.keys[sample].float().numpy())
    for part in store.keys.split(TRAINED_ON):
        made.add(part.float().numpy())
    faiss.write_index(made, str(store.folder / INDEX))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise InputError("search 'faiss' needs faiss: pip install 'hybrid-trainer[datastore]'") from error
    return faiss
