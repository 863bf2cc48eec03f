"""A datastore's folder: what was added is what is found, and what is not whole or another's is refused."""

import json
import sys

import pytest
import torch
from tiny import tiny_model

from hybrid.core import InputError
from hybrid.functional import nearest
from hybrid.memory import Datastore, DatastoreInfo, filled_datastore
from hybrid.memory.datastore import trunk_name


class Words:
    """As much of a tokenizer as gives it a name."""

    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


TRUNK = torch.nn.Linear(4, 4)


def written(folder, keys, values, dtype="float16", **options):
    info = DatastoreInfo.of("some/model", TRUNK, Words("a", "b"), hidden_size=keys.shape[1], dtype=dtype)
    with filled_datastore(folder, info, **options) as add:
        for part, tokens in zip(keys.split(7), values.split(7), strict=True):
            add(part, tokens)
    return Datastore(folder)


@pytest.fixture
def keys():
    return torch.randn(50, 4, generator=torch.Generator().manual_seed(0))


VALUES = torch.arange(50) * 3


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_was_added_in_parts_is_there_in_order(tmp_path, keys, dtype):
    store = written(tmp_path / "store", keys, VALUES, dtype)
    assert len(store) == 50
    assert torch.equal(store.keys, keys.to(getattr(torch, dtype)))
    assert store.values.tolist() == VALUES.tolist()
    assert sorted(file.name for file in store.folder.iterdir()) == ["keys.bin", "meta.json", "values.bin"]


def test_the_nearest_come_with_their_values(tmp_path, keys):
    store = written(tmp_path / "store", keys, VALUES, "float32")
    queries = keys[[3, 41]] + 0.001
    squared, values = store.nearest(queries, 5)
    expected, index = nearest(queries, keys, 5)
    assert torch.equal(squared, expected) and values.tolist() == VALUES[index].tolist()
    assert values[:, 0].tolist() == [9, 123]


def test_a_store_knows_how_far_apart_its_keys_are(tmp_path, keys):
    store = written(tmp_path / "store", keys, VALUES, "float32")
    others = torch.cdist(keys, keys).fill_diagonal_(torch.inf).amin(1).square()
    assert store.info.distance == pytest.approx(float(others.mean()), rel=1e-5)
    assert Datastore(store.folder).info == store.info
    assert written(tmp_path / "one", keys[:1], VALUES[:1]).info.distance == 0


def test_a_store_of_nothing_is_refused(tmp_path, keys):
    with pytest.raises(InputError, match="store' is empty"):
        written(tmp_path / "store", keys[:0], VALUES[:0])


def test_reading_changes_nothing_on_the_disk(tmp_path, keys):
    store = written(tmp_path / "store", keys, VALUES, "float32")
    before = (store.folder / "keys.bin").read_bytes()
    store.keys.zero_()
    assert (store.folder / "keys.bin").read_bytes() == before


def test_a_second_one_replaces_the_first_with_its_index(tmp_path, keys):
    folder = tmp_path / "store"
    written(folder, keys, VALUES)
    (folder / "index.faiss").write_text("of the first")
    assert len(written(folder, keys[:9], VALUES[:9])) == 9
    assert not (folder / "index.faiss").exists()


def test_a_writer_that_fails_leaves_what_was_there(tmp_path, keys):
    folder = tmp_path / "store"
    written(folder, keys, VALUES)
    with pytest.raises(InputError, match="not finite in float16; take --dtype float32"):
        written(folder, keys * 1e6, VALUES)
    assert len(Datastore(folder)) == 50
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_folder_of_something_else_is_not_written_to(tmp_path, keys):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds something else"):
        written(tmp_path, keys, VALUES)


def spoil(store, **changes):
    meta = store.folder / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 0}, "is empty"),
        ({"count": 51}, "is not whole: keys.bin must be of 408 bytes"),
        ({"hidden_size": 8}, "is not whole: keys.bin"),
        ({"dtype": "float64"}, "dtype must be one of float16, float32, got 'float64'"),
        ({"colour": "red"}, r"meta\.json' must be a JSON object of model, trunk"),
    ],
)
def test_a_store_that_is_empty_or_not_whole_is_refused(tmp_path, keys, changes, said):
    store = written(tmp_path / "store", keys, VALUES)
    spoil(store, **changes)
    with pytest.raises(InputError, match=said):
        Datastore(store.folder)


def test_a_missing_or_broken_store_is_refused(tmp_path, keys):
    with pytest.raises(InputError, match=r"holds no datastore.*hybrid datastore MODEL DATA DIR"):
        Datastore(tmp_path / "none")
    store = written(tmp_path / "store", keys, VALUES)
    (store.folder / "values.bin").unlink()
    with pytest.raises(InputError, match=r"values.bin must be of 200 bytes"):
        Datastore(store.folder)
    (store.folder / "meta.json").write_text("{")
    with pytest.raises(InputError, match="must be a JSON object"):
        Datastore(store.folder)


def test_more_neighbours_than_keys_are_refused_by_name(tmp_path, keys):
    store = written(tmp_path / "store", keys, VALUES)
    store.check_search(50, "exact")
    with pytest.raises(InputError, match=r"k must lie in \[1, 50\], the size of the datastore .*store', got 51"):
        store.check_search(51, "exact")


def test_another_tokenizer_is_refused_by_name(tmp_path, keys):
    store = written(tmp_path / "store", keys, VALUES)
    store.check_tokenizer(Words("a", "b"))
    with pytest.raises(InputError, match=r"of another tokenizer: .*some/model"):
        store.check_tokenizer(Words("b", "a"))


def test_another_model_is_refused_by_name(tmp_path, keys):
    store = written(tmp_path / "store", keys, VALUES)
    store.check_trunk(TRUNK)
    with pytest.raises(InputError, match=r"of another model: .*some/model' as it was then"):
        store.check_trunk(torch.nn.Linear(4, 4))


def test_one_small_step_of_an_optimizer_gives_a_trunk_another_name():
    trunk = tiny_model("llama").get_decoder()
    first = trunk_name(trunk)
    assert trunk_name(tiny_model("llama").get_decoder()) == first
    with torch.no_grad():
        for x in trunk.parameters():
            x.add_(1e-6)
    assert trunk_name(trunk) != first
    assert trunk_name(tiny_model("llama").bfloat16().get_decoder()) != first


def test_every_number_of_a_small_tensor_is_in_its_trunks_name():
    layer = torch.nn.Linear(3, 5)
    first = trunk_name(layer)
    for x in layer.parameters():
        for i in range(x.numel()):
            with torch.no_grad():
                before = float(x.flatten()[i])
                x.view(-1)[i] += 1.0
                assert trunk_name(layer) != first
                x.view(-1)[i] = before
    assert trunk_name(layer) == first


# faiss


def test_without_faiss_what_needs_it_says_what_to_install(tmp_path, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    store = written(tmp_path / "store", keys, VALUES)
    for needing in (lambda: store.check_search(5, "faiss"), lambda: written(tmp_path / "b", keys, VALUES, index=True)):
        with pytest.raises(InputError, match=r"needs faiss: pip install 'hybrid-trainer\[datastore\]'"):
            needing()
    assert not (tmp_path / "b").exists()


def test_a_store_without_an_index_is_not_searched_by_faiss(tmp_path, keys):
    pytest.importorskip("faiss")
    with pytest.raises(InputError, match="has none: make it with hybrid datastore --index"):
        written(tmp_path / "store", keys, VALUES).check_search(5, "faiss")


def test_faiss_finds_what_exact_search_finds_at_the_same_distances(tmp_path):
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(4000, 16, generator=generator)
    store = written(tmp_path / "store", keys, torch.arange(4000), "float32", index=True)
    store.check_search(10, "faiss")
    queries = keys[:200] + 0.3 * torch.randn(200, 16, generator=generator)
    squared, exact = store.nearest(queries, 10)
    fast_squared, fast = store.nearest(queries, 10, "faiss")
    hits = (fast.unsqueeze(2) == exact.unsqueeze(1)).any(2)
    # 32 of 63 cells are looked into, which leaves some out.
    assert 0.9 < hits.float().mean() < 1
    # Values are indices here: where both found the same key, they say the same distance to the last bit.
    for row in range(200):
        of = dict(zip(exact[row].tolist(), squared[row].tolist(), strict=True))
        found = dict(zip(fast[row].tolist(), fast_squared[row].tolist(), strict=True))
        assert all(of[i] == found[i] for i in of.keys() & found.keys())
    assert (fast_squared.diff(dim=1) >= 0).all()


def test_cells_with_too_few_keys_are_no_answer(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    from hybrid.memory import datastore

    monkeypatch.setattr(datastore, "PROBED", 1)
    keys = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    store = written(tmp_path / "store", keys, torch.arange(400), "float32", index=True)
    squared, values = store.nearest(keys[:5], 400, "faiss")
    assert torch.equal(squared, store.nearest(keys[:5], 400)[0])
    assert torch.equal(values.sort(1).values, torch.arange(400).expand(5, -1))
