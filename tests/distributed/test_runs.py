"""Whole runs on several processes: what they leave behind, how they go on, and how they end."""

import json
import shutil

import pytest
import torch
import yaml
from launched import FAULTY, LOADED, forked, needs, python, sections, torchrun
from test_resume import assert_equal_runs, config
from whole_run import logged_rows

from hybrid import HybridConfig, HybridTrainer
from hybrid.run import CHECKPOINTS

EVERY = {"every": 3, "keep_last": None}


def written(stories, folder, name, **others):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config(stories, folder, name, **others)))
    return str(path)


def train(*arguments, engine="ddp"):
    return forked(2, "-m", "hybrid", "train", *arguments, engine=engine)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(stories, runs):
    """The folder of a run on two processes that nobody disturbed, by its engine; it keeps all its checkpoints."""
    made = {}

    def of(engine):
        needs(engine)
        if engine not in made:
            path = written(stories, runs, f"whole-{engine}", checkpoint=EVERY, **sections(engine))
            own = python("-m", "hybrid", "train", path, "--nproc", "2") if engine == "ddp" else None
            made[engine] = own or train(path, engine=engine)
        assert made[engine].returncode == 0, made[engine].stderr[-3000:]
        return runs / f"whole-{engine}", made[engine]

    return of


@pytest.mark.slow
def test_a_run_on_two_processes_is_the_run_of_one(stories, runs, whole):
    folder, done = whole("ddp")
    assert done.stdout.count("data: 9 training examples") == 1
    assert "2 processes by ddp" in done.stdout
    HybridTrainer(config=HybridConfig.from_file(written(stories, runs, "one", checkpoint=EVERY))).train()
    one, many = logged_rows(runs / "one"), logged_rows(folder)
    assert [row.keys() for row in one] == [row.keys() for row in many]
    for before, after in zip(one, many, strict=True):
        # Adam makes more of a rounding with every step.
        near = 1e-5 if before["step"] <= 2 else 0.05
        for name, x in before.items():
            if isinstance(x, float) and "gap" not in name:
                assert after[name] == pytest.approx(x, rel=near, abs=near), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in (runs / "one").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_run_that_failed_goes_on_as_the_one_that_did_not(stories, runs, whole, engine):
    folder, _ = whole(engine)
    cut = written(stories, runs, f"cut-{engine}", checkpoint=EVERY, **sections(engine))
    failed = forked(2, FAULTY, cut, "raise", "1", "5", engine=engine)
    assert failed.returncode != 0
    assert "process 1 failed" in failed.stderr
    assert "the data are cursed" in failed.stderr
    again = train("--resume", str(runs / f"cut-{engine}"), engine=engine)
    assert again.returncode == 0, again.stderr[-3000:]
    assert_equal_runs(folder, runs / f"cut-{engine}")


def state_of(checkpoint, runs, engine, count):
    """What a run that goes on from a checkpoint, in a copy of its folder, begins with."""
    run = runs / f"copy-{checkpoint.parents[1].name}"
    if not run.exists():
        (run / CHECKPOINTS).mkdir(parents=True)
        shutil.copytree(checkpoint, run / CHECKPOINTS / checkpoint.name)
        shutil.copy(checkpoint / "config.yaml", run)
    file = runs / f"{run.name}-{engine}-{count}.pt"
    named = sections(engine)["distributed"]
    overrides = [f"distributed.{key}={value}" for key, value in named.items()]
    done = forked(count, LOADED, str(run), str(file), *overrides, engine=engine)
    assert done.returncode == 0, done.stderr
    return torch.load(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "engine", "count"),
    [("fsdp2", "ddp", 3), ("fsdp2", "deepspeed-2", 2), ("deepspeed-3", "fsdp2", 2)],
)
def test_a_checkpoint_goes_on_with_any_engine_on_any_number(runs, whole, source, engine, count):
    needs(engine)
    checkpoint = whole(source)[0] / CHECKPOINTS / "step-6"
    assert (checkpoint / "shards" / ".metadata").is_file() == (source == "fsdp2")
    one, many = state_of(checkpoint, runs, "auto", 1), state_of(checkpoint, runs, engine, count)
    assert one["state"].keys() == many["state"].keys()
    assert len(one["state"]) > 10
    for number, of in one["state"].items():
        assert of.keys() == many["state"][number].keys()
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(many["state"][number][k])) for k, x in of.items())
    assert all(torch.equal(x, many["weights"][name]) for name, x in one["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("die", ""),
        ("hang", "process 1 has stood still for 6 seconds (distributed.timeout) at "),
        ("stop", "process 1 has not been heard of for 6 seconds (distributed.timeout)"),
        ("memory", "while other processes wait for this one: set sft.microbatch_size lower"),
    ],
)
def test_the_end_of_one_process_is_the_end_of_all_and_the_run_goes_on(stories, runs, fault, said):
    name = f"after-{fault}"
    path = written(stories, runs, name, checkpoint=EVERY, **sections("ddp", timeout=6.0))
    failed = (torchrun if fault == "hang" else forked)(2, FAULTY, path, fault, "1", "5")
    assert failed.returncode != 0
    assert said in failed.stderr
    if fault != "die":
        return
    again = train("--resume", str(runs / name))
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads((runs / name / "finished.json").read_text())["step"] == 9


@pytest.mark.slow
def test_all_processes_take_smaller_microbatches_where_one_ran_out_of_memory(stories, runs, whole):
    path = written(stories, runs, "less", sft={"batch_size": 8, "microbatch_size": 2})
    done = forked(2, FAULTY, path, "memory-once", "1", "4")
    assert done.returncode == 0, done.stderr
    assert "out of memory with 2 sft rows at a time; from here on 1" in done.stderr
    assert len(logged_rows(runs / "less")) == len(logged_rows(whole("ddp")[0]))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_step(stories, runs, whole):
    path = written(stories, runs, "term", checkpoint=EVERY)
    stopped = forked(2, FAULTY, path, "term", "1", "5")
    assert "stopped by SIGTERM after step 5" in stopped.stderr
    again = train("--resume", str(runs / "term"))
    assert again.returncode == 0, again.stderr[-3000:]
    assert_equal_runs(whole("ddp")[0], runs / "term")
