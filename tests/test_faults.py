"""What can go wrong around a run - kills, disks, damaged and hostile files, a second run - ends well, end to end."""

import json
import os
import pickle
import random
import re
import shutil
import time
from contextlib import suppress
from itertools import count

import pytest
from faults import Forks, remount, small_disk
from test_resume import assert_equal_runs, config

from hybrid import HybridConfig, HybridTrainer
from hybrid.cli import main
from hybrid.core import InputError
from hybrid.resume import resumable, trained_config, write_checkpoint
from hybrid.run import CHECKPOINTS, Checkpoints
from hybrid.run.checkpoints import _write_manifest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

# The thirty: HYBRID_KILLS=30 pytest tests/test_faults.py -k moments; every file operation: 200, -k last_step.
KILLS = int(os.environ.get("HYBRID_KILLS", "5"))
TURNS = {"cycles": 3, "sft_steps_per_cycle": 2, "ppo_steps_per_cycle": 1}
MIXTURES = {
    # One step of SFT alone, seven of both losses, one of PPO alone.
    "joint": {"strategy": "joint", "steps": 9, "mu": 1.0, "schedule": "linear", "final_mu": 0.0},
    # A strategy that remembers.
    "turns": {**TURNS, "curriculum": "reward", "target_reward": 2.0},
    # Reference log-probs that are computed once, a reward model, and loaders of two kinds.
    "preferences": {"strategy": "blend", "steps": 9, "coefs": {"dpo": 1.0, "kto": 0.5, "reward_model": 0.5}},
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture
def folder(forks):
    """A new folder among those where the forks' file operations count."""
    folder = forks.folder / f"test-{len(list(forks.folder.iterdir()))}"
    folder.mkdir()
    return folder


def written(stories, folder, name, **sections):
    """The config file of a run of nine steps into folder / name that saves after each step."""
    settings = {
        "optimizer": {"name": "adamw_8bit", "lr": 1e-3},
        "checkpoint": {"every": 1},
        "eval": {"num_prompts": 3, "every": 4},
    }
    file = folder / f"{name.replace('/', '-')}.json"
    file.write_text(json.dumps(config(stories, folder, name, **settings | sections)))
    return file


def written_pairs(folder):
    """A file of pairs of answers."""
    rows = [{"prompt": f"Was day {i} good?", "chosen": f"Yes, day {i} was.", "rejected": f"No {i}."} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def whole(stories, forks):
    """The folder of a run that nobody disturbed, and the seconds that it took."""
    return uninterrupted(stories, forks, forks.folder, "whole")


def uninterrupted(stories, forks, folder, name, **sections):
    file, began = written(stories, folder, name, **sections), time.perf_counter()
    status, said = forks.run("train", file)
    assert status == 0, said
    return folder / name, time.perf_counter() - began


def ends_well(forks, run, whole):
    """Resumes the run; afterwards it is the uninterrupted one, and nothing unfinished is in its folder."""
    status, said = forks.run("train", "--resume", run)
    assert status == 0, said
    assert_as_if_undisturbed(run, whole)


def assert_as_if_undisturbed(run, whole):
    assert_equal_runs(run, whole)
    for name in names(run / CHECKPOINTS):
        Checkpoints.verify(run / CHECKPOINTS / name)
    found, expected = ({path.relative_to(each) for path in each.rglob("*")} for each in (run, whole))
    assert {path for path in found if path.parts[0] != CHECKPOINTS} == {
        path for path in expected if path.parts[0] != CHECKPOINTS
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def wait_for(path):
    while not path.exists():
        time.sleep(0.005)


# Kills


@pytest.mark.slow
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_run_killed_at_random_moments_equals_the_uninterrupted_one(stories, forks, folder, mixture):
    sections = {"mixing": MIXTURES[mixture]}
    if mixture == "preferences":
        sections |= {"data": {"train": str(written_pairs(folder)), "eval_fraction": 0.25}}
    whole, seconds = uninterrupted(stories, forks, folder, "whole", **sections)
    draw, kills = random.Random(mixture), 0
    for number in count():
        run, status = folder / f"run-{number}", None
        file = written(stories, folder, run.name, **sections)
        while status != 0:
            moment = draw.uniform(0, seconds) if kills < KILLS / len(MIXTURES) else None
            resumes = (run / "config.yaml").exists()
            status, said = forks.run("train", *(["--resume", run] if resumes else [file]), kill_after=moment)
            assert status in (0, -9), said
            kills += status == -9
        assert_as_if_undisturbed(run, whole)
        if kills >= KILLS / len(MIXTURES):
            break


@pytest.mark.slow
def test_a_last_step_killed_before_any_of_its_file_operations_is_taken_again(stories, forks, folder, whole):
    """From the log's row to the checkpoint, the old one's deletion, the evaluation, the export and the report."""
    process = forks.start("train", written(stories, folder, "start"))
    wait_for(folder / "start" / CHECKPOINTS / "step-8")
    os.kill(process, 9)
    assert forks.wait()[0] == -9
    for number in range(0, 1000, max(1, 200 // KILLS)):
        run = folder / str(number)
        shutil.copytree(folder / "start", run)
        status, said = forks.run("train", "--resume", run, kill_before=number)
        assert status in (0, -9), said
        ends_well(forks, run, whole[0])
        if status == 0:
            break
        shutil.rmtree(run)
    assert 50 < number < 1000


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_begins_again(stories, forks, folder, whole):
    process = forks.start("train", written(stories, folder, "run"))
    wait_for(folder / "run" / "config.yaml")
    os.kill(process, 9)
    forks.wait()
    assert not (folder / "run" / CHECKPOINTS / "step-1").exists()
    ends_well(forks, folder / "run", whole[0])


# Disks


FULL = {
    "checkpoint": ("4m", 1, r"save the checkpoint '.*step-3'"),
    "log": ("16k", 0, r"write to '.*(metrics|samples)\.jsonl'"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "every", "what"), FULL.values(), ids=FULL)
def test_a_full_disk_ends_the_run_by_name_and_with_room_it_goes_on(stories, forks, folder, whole, size, every, what):
    with small_disk(folder / "disk", size) as disk:
        status, said = forks.run("train", written(stories, folder, "disk/run", checkpoint={"every": every}))
        assert status == 2, said
        assert re.search(f"hybrid: cannot {what}: .*No space left on device", said), said
        assert "Traceback" not in said
        kept = [] if every == 0 else ["step-1", "step-2"]
        assert names(disk / "run" / CHECKPOINTS) == kept
        for name in kept:
            Checkpoints.verify(disk / "run" / CHECKPOINTS / name)
        assert remount(disk, "size=50m")
        ends_well(forks, disk / "run", whole[0])


@pytest.mark.slow
def test_a_disk_that_turns_read_only_ends_the_run_by_name(stories, forks, folder, whole):
    run = folder / "run"
    run.mkdir()
    with small_disk(run / CHECKPOINTS, "50m") as disk:
        forks.start("train", written(stories, folder, "run"))
        wait_for(disk / "step-2")
        # It cannot be done while a file is being written.
        while not remount(disk, "ro"):
            time.sleep(0.01)
        status, said = forks.wait()
        assert status == 2, said
        assert re.search(r"hybrid: cannot save to '.*checkpoints/step-\d': Read-only file system", said), said
        assert resumable(run)[1] is not None
        assert main(["train", "--resume", str(run)]) == 2
        assert remount(disk, "rw")
        ends_well(forks, run, whole[0])


@pytest.mark.slow
def test_a_file_that_may_not_be_so_large_ends_the_run_by_name(stories, forks, folder):
    status, said = forks.run("train", written(stories, folder, "run"), file_limit=1_000_000)
    assert status == 2, said
    assert re.search(r"hybrid: cannot save the checkpoint '.*step-1': .*File too large", said), said
    assert names(folder / "run" / CHECKPOINTS) == []


# Files


@pytest.fixture
def damaged(whole, folder):
    """A copy of the whole run, and every file of its newest checkpoint."""
    run = folder / "run"
    shutil.copytree(whole[0], run)
    return run, [path for path in sorted((run / CHECKPOINTS / "step-9").rglob("*")) if path.is_file()]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE = {"flipped bit": flipped, "cut off": lambda data: data[:-2], "empty": lambda data: b""}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_to_any_file_of_a_checkpoint_is_told_by_name_and_the_one_before_is_used(damaged, damage):
    run, files = damaged
    assert len(files) == 10
    for file in files:
        data = file.read_bytes()
        file.write_bytes(damage(data))
        with pytest.warns(UserWarning, match=f"skipped a broken checkpoint: .*step-9/?.*{re.escape(file.name)}"):
            assert resumable(run)[1] == run / CHECKPOINTS / "step-8"
        file.write_bytes(data)


class Evil:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def signed(checkpoint):
    """Makes the manifest fit the files, as one who wants to harm would."""
    (checkpoint / "manifest.json").unlink()
    _write_manifest(checkpoint, 9, {})


# Files that some loader somewhere unpickles, and the one that each would stand for.
PICKLES = {
    "model/pytorch_model.bin": "model/model.safetensors",
    "model/adapter_model.bin": "model/model.safetensors",
    "model/value_head.pt": "model/value_head.safetensors",
    "state.pt": "state.safetensors",
    "optimizer.pt": "state.safetensors",
}


@pytest.mark.slow
def test_a_pickle_put_into_a_checkpoint_is_refused_by_name_and_not_loaded(damaged, capsys):
    run, files = damaged
    checkpoint = run / CHECKPOINTS / "step-9"
    for file in [*files, *(checkpoint / name for name in PICKLES)]:
        data = file.read_bytes() if file.exists() else None
        file.write_bytes(pickle.dumps(Evil(run / "mark")))
        for command in (["generate", str(checkpoint), "Tell me"], ["eval", str(checkpoint)]):
            assert main(command) == 2
            assert file.name in capsys.readouterr().err
        with pytest.warns(UserWarning, match=f"skipped a broken checkpoint: .*{re.escape(file.name)}"):
            assert resumable(run)[1] == run / CHECKPOINTS / "step-8"
        file.unlink() if data is None else file.write_bytes(data)
    assert not (run / "mark").exists()


@pytest.mark.slow
def test_a_pickle_in_a_checkpoint_whose_manifest_was_made_to_fit_runs_nothing(damaged):
    run, files = damaged
    checkpoint = run / CHECKPOINTS / "step-9"
    shutil.copytree(checkpoint, run / "as it was")
    names = {file.relative_to(checkpoint).as_posix() for file in files} - {"manifest.json"}
    for name in [*names, *PICKLES]:
        (checkpoint / PICKLES.get(name, name)).unlink()
        (checkpoint / name).write_bytes(pickle.dumps(Evil(run / "mark")))
        signed(checkpoint)
        for load in (lambda: HybridTrainer.resume(run), lambda: HybridTrainer(config=trained_config(checkpoint))):
            # Or nobody reads it.
            with suppress(InputError):
                load()
        shutil.rmtree(checkpoint)
        shutil.copytree(run / "as it was", checkpoint)
    assert not (run / "mark").exists()


REMOTE = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel", "AutoTokenizer": ["evil.A", None]}


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_that_a_model_brings_along_is_not_run_and_not_asked_about(
    stories, tmp_path, monkeypatch, capsys, model_type
):
    model = tmp_path / "model"
    shutil.copytree(stories, model)
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((model / name).read_text()) | {"auto_map": REMOTE}
        settings |= {"model_type": model_type} if name == "config.json" else {"tokenizer_class": "EvilTokenizer"}
        (model / name).write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    assert main(["generate", str(model), "Tell me"]) == 2
    assert "contains custom code" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


# Two runs


@pytest.mark.slow
def test_a_second_run_into_a_folder_and_a_resume_of_a_run_that_goes_on_are_refused(
    stories, forks, folder, whole, capsys
):
    file = written(stories, folder, "run")
    forks.start("train", file)
    wait_for(folder / "run" / CHECKPOINTS / "step-1")
    for command, reason in [
        (["train", file], "already holds a run"),
        (["train", "--resume", folder / "run"], "another run is writing"),
    ]:
        assert main(list(map(str, command))) == 2
        assert reason in capsys.readouterr().err
    assert forks.wait()[0] == 0
    assert_as_if_undisturbed(folder / "run", whole[0])


@pytest.mark.slow
def test_of_two_runs_that_begin_at_once_the_second_is_refused_and_changes_nothing(stories, tmp_path):
    settings = config(
        stories, tmp_path, "run", mixing={"cycles": 1, "sft_steps_per_cycle": 1, "ppo_steps_per_cycle": 0}
    )
    first, second = (
        HybridTrainer(
            config=HybridConfig.from_dict(settings | {"run": {"output": settings["run"]["output"], "seed": seed}})
        )
        for seed in (0, 1)
    )
    first.train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run"):
        second.train()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


# Disk use


def used(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_run_keeps_k_checkpoints_and_has_one_more_while_it_saves(stories, tmp_path, monkeypatch):
    settings = config(
        stories,
        tmp_path,
        "run",
        checkpoint={"every": 1, "keep_last": 2, "keep_best": 1},
        eval={"num_prompts": 3, "every": 2, "metric": "kl", "mode": "min"},
    )
    folder, seen = tmp_path / "run" / CHECKPOINTS, []

    def watched(trainer, temporary, **options):
        write_checkpoint(trainer, temporary, **options)
        seen.append(used(folder))

    monkeypatch.setattr("hybrid.loop.write_checkpoint", watched)
    HybridTrainer(config=HybridConfig.from_dict(settings)).train()
    sizes = [used(path) for path in folder.iterdir()]
    assert len(sizes) == 3
    assert used(folder) == sum(sizes)
    # The counts in state.json have more digits or fewer.
    assert max(sizes) < 1.01 * min(sizes)
    assert max(seen) < 4 * 1.01 * max(sizes)
    assert max(seen) > 3 * min(sizes)
