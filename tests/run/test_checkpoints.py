"""Checkpoints: whole or not there, whatever happens; broken ones are named; disk use stays bounded."""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings

import pytest
import torch
from faults import remount, small_disk

from hybrid.core import InputError
from hybrid.run.checkpoints import Checkpoints
from hybrid.run.state_file import load_state, save_state

SIZE = 5000  # bytes of the large file of a small checkpoint


def writer(step, size=SIZE):
    """Two files, one in a folder, that tell the step."""

    def write(folder):
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_bytes(step.to_bytes(2, "little") * (size // 2))
        (folder / "state.txt").write_text(f"step {step}\n")

    return write


def filled(folder, *steps, **options):
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, writer(step))
    return checkpoints


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_all_whole(folder):
    for path in folder.glob("step-*"):
        Checkpoints.verify(path)
        step = int(path.name.removeprefix("step-"))
        assert (path / "state.txt").read_text() == f"step {step}\n"


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_newest_is_the_highest_step(tmp_path, no_warnings):
    assert filled(tmp_path, 9, 10, 100, 20, keep_last=None).newest() == tmp_path / "step-100"


def test_save_returns_the_folder_with_what_was_written(tmp_path):
    folder = Checkpoints(tmp_path / "new" / "checkpoints").save(40, writer(40))
    assert folder == tmp_path / "new" / "checkpoints" / "step-40"
    assert (folder / "state.txt").read_text() == "step 40\n"


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "empty"])
def test_no_checkpoint_is_none(tmp_path, make, no_warnings):
    make(tmp_path / "checkpoints")
    assert Checkpoints(tmp_path / "checkpoints").newest() is None


def test_manifest_tells_step_metrics_versions_and_files(tmp_path):
    metrics = {"reward": torch.tensor(0.5), "loss": float("nan"), "count": 3}
    folder = Checkpoints(tmp_path).save(7, writer(7), metrics)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["step"] == 7
    assert manifest["metrics"] == {"reward": 0.5, "loss": None, "count": 3.0}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"].keys() == {"torch", "transformers", "hybrid-trainer"}
    assert {name: facts["size"] for name, facts in manifest["files"].items()} == {
        "model/weights.bin": SIZE,
        "state.txt": 7,
    }


def test_verify_gives_the_manifest(tmp_path):
    assert Checkpoints.verify(Checkpoints(tmp_path).save(7, writer(7), {"reward": 1}))["metrics"] == {"reward": 1}


def test_state_comes_back_from_a_checkpoint(tmp_path):
    state = {"rng": torch.get_rng_state(), "step": 3}
    folder = Checkpoints(tmp_path).save(3, lambda folder: save_state(folder / "state", state))
    loaded = load_state(folder / "state")
    assert torch.equal(loaded["rng"], state["rng"])
    assert loaded["step"] == 3


# What can happen to a checkpoint, and the name that the message must give.
DAMAGE = {
    "cut off": (lambda folder: os.truncate(folder / "model/weights.bin", 100), "model/weights.bin"),
    "longer": (lambda folder: (folder / "state.txt").write_text("step 20\nmore"), "state.txt"),
    "changed": (lambda folder: (folder / "state.txt").write_text("step 21\n"), "state.txt"),
    "missing": (lambda folder: (folder / "model/weights.bin").unlink(), "model/weights.bin"),
    "extra": (lambda folder: (folder / "model/evil.pkl").touch(), "model/evil.pkl"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_text(""), "manifest.json"),
    "link": (lambda folder: (folder / "link").symlink_to("state.txt"), "link"),
    "link in place": (
        lambda folder: (
            shutil.move(folder / "state.txt", folder.parent),
            (folder / "state.txt").symlink_to("../state.txt"),
        ),
        "state.txt",
    ),
    "folder in place": (lambda folder: ((folder / "state.txt").unlink(), (folder / "state.txt").mkdir()), "state.txt"),
}


@pytest.mark.parametrize(("damage", "name"), DAMAGE.values(), ids=DAMAGE)
def test_broken_file_is_refused_by_name(tmp_path, damage, name):
    folder = Checkpoints(tmp_path).save(20, writer(20))
    damage(folder)
    with pytest.raises(InputError, match=f"step-20.*{name}"):
        Checkpoints.verify(folder)


@pytest.mark.parametrize(("damage", "name"), DAMAGE.values(), ids=DAMAGE)
def test_newest_skips_a_broken_checkpoint_with_a_warning_that_names_the_file(tmp_path, damage, name):
    checkpoints = filled(tmp_path, 10, 20)
    damage(tmp_path / "step-20")
    with pytest.warns(UserWarning, match=f"skipped a broken checkpoint: .*step-20.*{name}") as caught:
        assert checkpoints.newest() == tmp_path / "step-10"
    assert caught[0].filename == __file__


def test_any_flipped_bit_of_any_file_is_refused_by_name(tmp_path):
    folder = Checkpoints(tmp_path).save(20, writer(20, size=50), {"reward": 0.125})
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        text = json.loads(whole) if path.name == "manifest.json" else None
        for index in range(len(whole)):
            flipped = whole[:index] + bytes([whole[index] ^ 1 << index % 8]) + whole[index + 1 :]
            path.write_bytes(flipped)
            try:
                Checkpoints.verify(folder)
            except InputError as error:
                assert path.name in str(error)
            else:
                # Another kind of blank between two words of the manifest says the same.
                assert text is not None
                assert json.loads(flipped) == text
        path.write_bytes(whole)


def test_no_whole_checkpoint_is_none_with_a_warning_for_each(tmp_path):
    checkpoints = filled(tmp_path, 10, 20)
    for name in names(tmp_path):
        (tmp_path / name / "state.txt").unlink()
    with pytest.warns(UserWarning) as caught:
        assert checkpoints.newest() is None
    assert len(caught) == 2


def test_newer_format_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid.run.checkpoints.FORMAT", 2)
    folder = Checkpoints(tmp_path).save(1, writer(1))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"manifest.json' has format 2, known: 1; update"):
        Checkpoints.verify(folder)


def test_checkpoint_of_a_newer_format_is_never_skipped(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path, 10)
    monkeypatch.setattr("hybrid.run.checkpoints.FORMAT", 2)
    checkpoints.save(20, writer(20))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"step-20.*has format 2, known: 1; update"):
        checkpoints.newest()


@pytest.mark.parametrize("name", [".DS_Store", "model/._weights.bin", "Thumbs.db", "model/desktop.ini"])
def test_what_file_managers_leave_lying_about_is_not_of_the_checkpoint(tmp_path, name, no_warnings):
    checkpoints = filled(tmp_path, 10, 20)
    (tmp_path / "step-20" / name).write_text("litter")
    assert checkpoints.newest() == tmp_path / "step-20"


def test_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    checkpoints = filled(tmp_path, 10)
    shutil.copytree(tmp_path / "step-10", tmp_path / "step-99")
    with pytest.warns(UserWarning, match="step-99' holds the checkpoint of step 10"):
        assert checkpoints.newest() == tmp_path / "step-10"


def test_other_names_in_the_folder_are_left_alone(tmp_path, no_warnings):
    others = ["step-1x", "step-", "step-007", "notes.txt", ".hidden", ".step-x-y"]
    for name in others:
        (tmp_path / name).mkdir()
    assert filled(tmp_path, 1, 2, 3, keep_last=1).newest() == tmp_path / "step-3"
    assert names(tmp_path) == sorted([*others, "step-3"])


def test_keep_last_keeps_the_highest_steps(tmp_path):
    filled(tmp_path, 8, 9, 10, 11, keep_last=2)
    assert names(tmp_path) == ["step-10", "step-11"]


def test_keep_last_none_keeps_all(tmp_path):
    filled(tmp_path, *range(5), keep_last=None)
    assert len(names(tmp_path)) == 5


REWARDS = {1: 0.1, 2: 0.9, 3: 0.4, 4: 0.9, 5: float("nan"), 6: 0.2}


@pytest.mark.parametrize(
    ("mode", "keep_best", "kept", "best"),
    [("max", 1, [2, 6], 2), ("max", 2, [2, 4, 6], 2), ("max", 3, [2, 3, 4, 6], 2), ("min", 2, [1, 6], 1)],
)
def test_keep_best_keeps_the_best_beside_the_newest(tmp_path, mode, keep_best, kept, best):
    checkpoints = Checkpoints(tmp_path, keep_last=1, best=("reward", mode), keep_best=keep_best)
    for step, reward in REWARDS.items():
        checkpoints.save(step, writer(step), {"reward": reward})
    assert names(tmp_path) == [f"step-{step}" for step in kept]
    assert checkpoints.best() == tmp_path / f"step-{best}"


def test_best_of_checkpoints_without_the_metric_is_none(tmp_path):
    assert filled(tmp_path, 1, 2, best=("reward", "max")).best() is None


def test_best_that_is_broken_gives_the_next_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, best=("reward", "max"), keep_best=2)
    for step, reward in REWARDS.items():
        checkpoints.save(step, writer(step), {"reward": reward})
    (tmp_path / "step-2" / "state.txt").write_text("step 3\n")
    with pytest.warns(UserWarning, match="step-2"):
        assert checkpoints.best() == tmp_path / "step-4"


def test_broken_checkpoint_takes_no_place_of_a_whole_one(tmp_path):
    checkpoints = filled(tmp_path, 1, 2, 3, keep_last=3)
    (tmp_path / "step-3" / "state.txt").unlink()
    checkpoints.keep_last = 2
    checkpoints.save(4, writer(4))
    assert names(tmp_path) == ["step-2", "step-3", "step-4"]


def test_checkpoint_just_saved_is_kept_below_a_higher_step(tmp_path):
    filled(tmp_path, 40, 30, keep_last=1)
    assert names(tmp_path) == ["step-30", "step-40"]


def test_nothing_is_deleted_before_the_new_one_is_whole(tmp_path):
    checkpoints = filled(tmp_path, 1, 2, keep_last=1, best=("reward", "max"))

    def write(folder):
        assert names(tmp_path)[-1] == "step-2"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        checkpoints.save(3, write)
    assert names(tmp_path) == ["step-2"]


@pytest.mark.parametrize("keep_last", [1, 3])
def test_disk_use_of_k_checkpoints_is_k_times_the_size_of_one(tmp_path, keep_last):
    def used(folder):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    one = used(filled(tmp_path / "one", 10).folder)
    assert used(filled(tmp_path / "many", *range(10, 22), keep_last=keep_last).folder) == keep_last * one


def test_same_step_is_replaced_as_a_whole(tmp_path):
    checkpoints = filled(tmp_path, 1, 2)
    (tmp_path / "step-2" / "extra").touch()
    (tmp_path / "step-2" / "manifest.json").unlink()
    checkpoints.save(2, writer(2))
    assert names(tmp_path) == ["step-1", "step-2"]
    assert_all_whole(tmp_path)


def test_what_a_killed_save_has_left_is_cleaned_by_the_next(tmp_path, no_warnings):
    checkpoints = filled(tmp_path, 1)
    for name in (".step-2-ab_cd12", ".step-1-deleted", ".step-1-before"):
        shutil.copytree(tmp_path / "step-1", tmp_path / name)
    assert checkpoints.newest() == tmp_path / "step-1"
    checkpoints.save(3, writer(3))
    assert names(tmp_path) == ["step-1", "step-3"]


def test_checkpoint_that_was_moved_aside_still_counts_and_goes_back(tmp_path, no_warnings):
    checkpoints = filled(tmp_path, 1, 2)
    (tmp_path / "step-2").rename(tmp_path / ".step-2-before")
    assert checkpoints.newest() == tmp_path / ".step-2-before"
    checkpoints.save(3, writer(3))
    assert names(tmp_path) == ["step-2", "step-3"]


def test_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path, 1, keep_last=1)

    remove = shutil.rmtree

    def refuse(path, **options):
        if path.name == ".step-1-deleted":
            raise OSError(errno.EACCES, "Permission denied")
        remove(path, **options)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="cannot delete .* step 1"):
        patch.setattr("hybrid.run.checkpoints.shutil.rmtree", refuse)
        checkpoints.save(2, writer(2))
    assert names(tmp_path) == [".step-1-deleted", "step-2"]
    checkpoints.save(3, writer(3))
    assert names(tmp_path) == ["step-3"]


@pytest.mark.parametrize(
    "options",
    [{"keep_last": 0}, {"keep_best": 0}, {"best": ("reward", "most")}],
    ids=str,
)
def test_bad_option_is_refused_by_name(tmp_path, options):
    with pytest.raises(InputError, match=next(iter(options))):
        Checkpoints(tmp_path, **options)


def test_negative_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step must be"):
        Checkpoints(tmp_path).save(-1, writer(1))


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", [2, 3], ids=["replaced", "new"])
@pytest.mark.parametrize("place", ["write", "manifest", "fsync", "rename"])
def test_full_disk_names_the_checkpoint_and_leaves_the_older_ones_whole(tmp_path, monkeypatch, place, step):
    checkpoints = filled(tmp_path, 1, 2)

    def full(*args, **kwargs):
        raise NO_SPACE

    with monkeypatch.context() as patch:
        if place == "manifest":
            patch.setattr("hybrid.run.checkpoints._write_manifest", full)
        elif place == "fsync":
            patch.setattr("os.fsync", full)
        elif place == "rename":
            rename = type(tmp_path).rename
            new = f"step-{step}"
            # Only the move of the new folder to its place: the last that can go wrong.
            patch.setattr(
                type(tmp_path),
                "rename",
                lambda path, target: (
                    full() if target.name == new and "before" not in path.name else rename(path, target)
                ),
            )
        with pytest.raises(InputError, match=rf"cannot save the checkpoint '.*step-{step}': No space left"):
            checkpoints.save(step, full if place == "write" else writer(step))
    assert names(tmp_path) == ["step-1", "step-2"]
    assert_all_whole(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("what", ["tensors", "bytes"])
def test_disk_that_is_really_full_leaves_the_older_checkpoints_whole(tmp_path, what):
    def write(folder):
        if what == "tensors":
            save_state(folder / "state", {"weights": torch.zeros(100_000)})
        else:
            (folder / "state.bin").write_bytes(bytes(400_000))

    with small_disk(tmp_path / "disk", "1m") as disk:
        checkpoints = Checkpoints(disk / "checkpoints")
        checkpoints.save(1, write)
        checkpoints.save(2, write)
        with pytest.raises(InputError, match=r"cannot save the checkpoint '.*step-3': .*No space left"):
            checkpoints.save(3, write)
        assert names(disk / "checkpoints") == ["step-1", "step-2"]
        assert Checkpoints.verify(disk / "checkpoints" / "step-1")["step"] == 1
        assert checkpoints.newest() == disk / "checkpoints" / "step-2"
        # With room again, the same save succeeds.
        shutil.rmtree(disk / "checkpoints" / "step-1")
        checkpoints.save(3, write)
        assert checkpoints.newest() == disk / "checkpoints" / "step-3"


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_read_only_disk_is_refused_and_still_read(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        checkpoints = filled(disk / "checkpoints", 1, 2)
        assert remount(disk, "ro")
        with pytest.raises(InputError, match=r"cannot save to '.*step-3': Read-only file system"):
            checkpoints.save(3, writer(3))
        assert checkpoints.newest() == disk / "checkpoints" / "step-2"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission_is_refused(tmp_path):
    checkpoints = filled(tmp_path, 1)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match=r"step-2': Permission denied"):
            checkpoints.save(2, writer(2))
        assert checkpoints.newest() == tmp_path / "step-1"
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_folder_that_even_root_cannot_create_is_refused():
    with pytest.raises(InputError, match="cannot save to '/proc/checkpoints/step-1'"):
        Checkpoints("/proc/checkpoints").save(1, writer(1))


def in_child(body):
    """Run in a forked process, which imports nothing anew. Returns its id."""
    with warnings.catch_warnings():
        # Python 3.12 warns of threads, which torch may have; the child uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(0)
    return child


def killed_before(number, body):
    """Run `body` in a child that is killed (-9) before the file operation of that number; False if it got through."""
    operations = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}

    def child():
        left = number

        def count(event, args):
            nonlocal left
            if event in operations:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        body()

    return os.WIFSIGNALED(os.waitpid(in_child(child), 0)[1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("step", [2, 3], ids=["replaced", "new"])
def test_save_killed_before_any_of_its_file_operations_leaves_whole_checkpoints(tmp_path, step, no_warnings):
    filled(tmp_path / "start", 1, 2)
    folder = tmp_path / "run"
    for number in range(1000):
        shutil.copytree(tmp_path / "start", folder)
        checkpoints = Checkpoints(folder)
        was_killed = killed_before(number, lambda: Checkpoints(folder).save(step, writer(step)))
        assert_all_whole(folder)
        newest = checkpoints.newest()
        assert Checkpoints.verify(newest)["step"] in (2, step)
        checkpoints.save(4, writer(4))
        assert len(names(folder)) == 2
        assert_all_whole(folder)
        shutil.rmtree(folder)
        if not was_killed:
            break
    assert 20 < number < 1000
    assert newest.name == f"step-{step}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_process_killed_at_random_moments_leaves_a_whole_newest_checkpoint(tmp_path, no_warnings):
    moment = random.Random(0)
    last = 0
    for _ in range(6):
        reader, sender = os.pipe()

        def save_for_ever(start=last, sender=sender):
            checkpoints = Checkpoints(tmp_path, keep_last=2)
            for step in range(start + 1, 60_000):
                checkpoints.save(step, writer(step, size=200_000))
                os.write(sender, b".")

        child = in_child(save_for_ever)
        os.close(sender)
        finished = sum(len(os.read(reader, 1)) for _ in range(moment.randrange(1, 4)))
        time.sleep(moment.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        finished += len(os.read(reader, 1000))
        os.close(reader)
        newest = Checkpoints(tmp_path).newest()
        step = int(newest.name.removeprefix("step-"))
        # The one whose end was not told may be there already.
        assert step in (last + finished, last + finished + 1)
        assert_all_whole(tmp_path)
        last = step
    Checkpoints(tmp_path, keep_last=2).save(last + 1, writer(last + 1))
    assert names(tmp_path) == sorted([f"step-{last}", f"step-{last + 1}"])
