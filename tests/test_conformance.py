"""What every mixing strategy and every objective has to keep, whoever wrote it: registering one is enough to have it
tested.

Those of other packages are found by their entry points in the groups `hybrid.strategy` and `hybrid.objective`, or by
importing the module that registers them: `pytest tests/test_conformance.py -p my_package.my_strategy`.
"""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from whole_run import crash, logged_rows, weights

from hybrid import DataConfig, HybridConfig, HybridTrainer, Policy, PPOConfig, SamplingConfig, SFTConfig
from hybrid.config import RunConfig
from hybrid.core import IGNORE, Batch
from hybrid.data import pack
from hybrid.evaluate import EvalConfig
from hybrid.mixing import Plan, make_strategy, strategy_names
from hybrid.objectives import PreferencesConfig, objective_class, objective_names, with_advantages
from hybrid.run import CheckpointConfig, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = strategy_names()
every_strategy = pytest.mark.parametrize("name", STRATEGIES)
every_objective = pytest.mark.parametrize("name", objective_names())
ROWS = [{"prompt": f"the w{i} w{i + 1}", "target": f"was good w{i} w{i + 1} w{i + 2}"} for i in range(8)]
PAIRS = [
    {"prompt": f"the w{i} w{i + 1}", "chosen": f"was good w{i} w{i + 3}", "rejected": f"was bad w{i + 2}"}
    for i in range(8)
]
# The tiny model of an objective that cannot learn on just any.
FITTING = {"tbptt": "lstm"}
# What compares the responses to a prompt.
COMPARING = ("hpt", "luffy", "prefix_rft", "srft")
PTX = [{"text": f"it is a w{i} and a fine w{i + 2} w{i + 3}"} for i in range(6)]


def score(response):
    """In [0, 1], and 0 for some responses: what a gate needs to have both kinds of prompts."""
    return float("1" in response)


def trainer_of(name, tokenizer, folder=None, *, epochs=2.0, resume=False, reward=score, family="llama", **sections):
    """A trainer with a short run of the strategy, on a tiny model that is always the same."""
    config = HybridConfig(
        data=DataConfig(template="none"),
        ptx_data=DataConfig(text="text"),
        preference_data=DataConfig(template="none"),
        preferences=PreferencesConfig(batch_size=3),
        sampling=SamplingConfig(max_new_tokens=6),
        sft=SFTConfig(batch_size=3),
        ppo=PPOConfig(batch_size=4, minibatch_size=2, epochs=2),
        optimizer={"lr": 1e-2},
        eval=EvalConfig(num_prompts=2),
        checkpoint=CheckpointConfig(every=1),
        run=RunConfig(output=None if folder is None else str(folder)),
    )
    given = {
        "policy_or_name": Policy(tiny_model(family, seed=1)), "tokenizer": tokenizer, "train_data": ROWS,
        "ptx_data": PTX, "preference_data": PAIRS, "reward": reward,
    }  # fmt: skip
    if resume:
        return HybridTrainer.resume(folder, **given)
    config = replace(config, **sections)
    config = replace(config, ppo=compared(config.ppo) if name in COMPARING else config.ppo)
    trainer = HybridTrainer(config=config, **given)
    trainer.strategy = short(name, trainer, epochs)
    return trainer


def compared(ppo):
    """The same number of responses, two to each prompt, measured against each other."""
    several = {} if ppo.samples_per_prompt > 1 else {"batch_size": ppo.batch_size // 2, "samples_per_prompt": 2}
    return replace(ppo, advantage="group", **several)


def short(name, trainer, epochs=2.0):
    """The strategy with its defaults, as long as so many passes over the data take."""
    return make_strategy({"strategy": name}).for_epochs(epochs, len(trainer.loader), len(trainer.prompts))


class Watched:
    """Records the steps of a trainer's run, in order: (kind, rollout or None, rows that PPO learns from)."""

    def __init__(self, trainer, monkeypatch):
        self.steps, self.plans = [], []
        take = trainer.take

        def watched(plan, rollout=None, batches=None, *, rows=None):
            self.plans.append(plan)
            self.steps.append((plan.kind, rollout, rows))
            return take(plan, rollout, batches, rows=rows)

        monkeypatch.setattr(trainer, "take", watched)


@every_strategy
def test_its_spec_makes_it_again(name):
    strategy = make_strategy({"strategy": name})
    spec = strategy.spec()
    assert spec["strategy"] == name
    assert make_strategy(json.loads(json.dumps(spec))) == strategy


@every_strategy
def test_a_run_takes_the_steps_that_it_says(name, tokenizer, monkeypatch):
    trainer = trainer_of(name, tokenizer)
    strategy = trainer.strategy
    watched = Watched(trainer, monkeypatch)
    before = weights(trainer).clone()
    trainer.train()
    kinds = [kind for kind, *_ in watched.steps]
    assert kinds and {name for plan in watched.plans for name in plan.coefs} <= strategy.objectives
    assert trainer.num_steps == len(kinds)
    if strategy.num_steps is not None:
        assert len(kinds) == strategy.num_steps
    assert torch.isfinite(weights(trainer)).all() and not torch.equal(weights(trainer), before)


@every_strategy
def test_the_scheduler_is_given_at_least_the_optimizer_steps_that_come(name, tokenizer, monkeypatch):
    trainer = trainer_of(name, tokenizer)
    expected, made = trainer.num_updates(trainer.strategy), []
    step = trainer.updater.optimizer.step
    monkeypatch.setattr(trainer.updater.optimizer, "step", lambda *args: (made.append(1), step(*args))[1])
    trainer.train()
    assert expected is None or len(made) <= expected
    assert trainer.strategy.num_steps is None or len(made) == expected


@every_strategy
def test_training_leaves_the_strategy_that_was_given_as_it_was(name, tokenizer):
    trainer = trainer_of(name, tokenizer)
    before = json.dumps(trainer.strategy.state_dict())
    trainer.train()
    assert json.dumps(trainer.strategy.state_dict()) == before


@every_strategy
def test_a_supervised_step_leaves_the_value_head_bit_identical(name, tokenizer, monkeypatch):
    trainer = trainer_of(name, tokenizer)
    heads = []
    sft_step = trainer.sft_step

    def sft(batch):
        before = [p.detach().clone() for p in trainer.policy.value_head.parameters()]
        metrics = sft_step(batch)
        heads.append(all(map(torch.equal, before, trainer.policy.value_head.parameters())))
        return metrics

    monkeypatch.setattr(trainer, "sft_step", sft)
    trainer.train()
    assert all(heads) and (heads or trainer.strategy.rolls_out)


@every_strategy
def test_every_prompt_of_a_rollout_goes_to_exactly_one_branch(name, tokenizer, monkeypatch):
    trainer = trainer_of(name, tokenizer, ppo=PPOConfig(batch_size=4, minibatch_size=4, epochs=1, samples_per_prompt=2))
    watched = Watched(trainer, monkeypatch)
    trainer.train()
    for _, rollout, rows in watched.steps:
        if rows is None:  # no rollout, or PPO learns from all of it
            continue
        assert len(rows.unique()) == len(rows) and set(rows.tolist()) <= set(range(len(rollout)))
        learnt = set(rollout.group[rows].tolist())
        left_out = set(rollout.group[[row for row in range(len(rollout)) if row not in set(rows.tolist())]].tolist())
        assert not learnt & left_out, "a prompt's responses were parted"


@every_strategy
def test_the_first_ratio_of_every_rollout_is_one(name, tokenizer, monkeypatch):
    trainer = trainer_of(name, tokenizer, ppo=PPOConfig(batch_size=4, minibatch_size=4, epochs=1))
    watched, found = Watched(trainer, monkeypatch), []
    rollout_step = trainer.rollout_step

    def stepped(*args, **kwargs):
        metrics = rollout_step(*args, **kwargs)
        whole = watched.steps[-1][2] is None and "ppo" in watched.plans[-1].coefs
        if "ratio_max" in metrics:
            # Other rows than were scored together meet in other products: rounding of float32.
            found.append(metrics["ratio_max"] == 1.0 if whole else abs(metrics["ratio_max"] - 1) < 1e-5)
        return metrics

    monkeypatch.setattr(trainer, "rollout_step", stepped)
    trainer.train()
    assert all(found) and (found or not trainer.strategy.rolls_out)


@every_strategy
def test_microbatches_change_nothing(name, tokenizer):
    runs = []
    for size in (None, 1):
        ppo = PPOConfig(batch_size=4, minibatch_size=2, epochs=2, microbatch_size=size)
        # SGD is linear in the gradient: a rounding difference stays one, which Adam's first steps blow up.
        sections = {"optimizer": {"name": "sgd", "lr": 1e-2}}
        trainer = trainer_of(name, tokenizer, ppo=ppo, sft=SFTConfig(batch_size=3, microbatch_size=size), **sections)
        trainer.train()
        runs.append(weights(trainer))
    assert torch.allclose(*runs, atol=1e-5)


@every_strategy
def test_the_token_that_pads_changes_nothing(name, tokenizer):
    runs = []
    for pad in ("</s>", "w9"):
        other = copy.deepcopy(tokenizer)
        other.pad_token = pad
        trainer = trainer_of(name, other)
        trainer.train()
        runs.append(weights(trainer))
    assert torch.equal(*runs)


@every_strategy
@pytest.mark.parametrize("token_weight", ["p", "p(1-p)", "markov"])
def test_it_composes_with_any_token_weight(name, tokenizer, token_weight, monkeypatch):
    runs = []
    for weight in ("one", token_weight):
        trainer = trainer_of(name, tokenizer, sft=SFTConfig(batch_size=3, token_weight=weight))
        watched = Watched(trainer, monkeypatch)
        trainer.train()
        runs.append(weights(trainer))
    supervised = any(plan.coefs.keys() & {"sft", "ptx"} for plan in watched.plans)
    assert torch.isfinite(runs[1]).all()
    assert torch.equal(*runs) == (not supervised)


@every_strategy
def test_a_run_that_died_goes_on_with_the_same_steps(name, tokenizer, tmp_path):
    whole = trainer_of(name, tokenizer, tmp_path / "whole")
    whole.train()
    trainer = trainer_of(name, tokenizer, tmp_path / "part")
    number = (whole.num_steps + 1) // 2
    crash(trainer, number + 1)

    resumed = trainer_of(name, tokenizer, tmp_path / "part", resume=True)
    assert resumed.num_steps == number
    resumed.train()
    assert torch.equal(weights(resumed), weights(whole))
    assert logged_rows(tmp_path / "part") == logged_rows(tmp_path / "whole")


@every_strategy
def test_prompts_and_padding_are_never_learnt_by_imitation(name, tokenizer):
    trainer = trainer_of(name, tokenizer)
    strategy = trainer.strategy
    examples = strategy.prompts(next(trainer.prompts).examples, 0)
    source = iter(trainer.ptx_loader) if "ptx" in strategy.objectives else strategy.supervised(trainer, examples)
    batch = next(source, None)
    if batch is None:
        return  # nothing is learnt by imitation here
    assert (batch.labels[~batch.attention_mask.bool()] == IGNORE).all()
    if not strategy.needs_ptx:
        for row, example in zip(batch.labels.tolist(), batch.examples, strict=True):
            start = len(example.prompt_ids) - example.num_hint
            assert set(row[:start]) <= {IGNORE}


# Objectives


def trainer_for(name, tokenizer, folder=None, *, steps=None, settings=None, **options):
    """A trainer that objective `name` can learn in: with two responses to a prompt, of unlike scores, and its heads.

    steps: of a run of it alone.   settings: its own.
    """
    options.setdefault("ppo", PPOConfig(batch_size=4, minibatch_size=4, epochs=2, samples_per_prompt=2))
    mixing = {} if steps is None else {"mixing": {"strategy": "objective", "objective": name, "steps": steps}}
    small = {"tbptt": {"streams": 3, "window": 5}}
    objectives = {name: small.get(name, {}) | (settings or {})} if own(name) else {}
    options["family"] = FITTING.get(name, "llama")
    if objective_class(name).needs_memory:
        options.setdefault("memory", {"type": "experience"})
    options["ppo"] = compared(options["ppo"]) if name in COMPARING else options["ppo"]
    trainer = trainer_of("alternate", tokenizer, folder, reward=unlike, objectives=objectives, **mixing, **options)
    if steps is not None and not options.get("resume"):
        trainer.strategy = make_strategy(mixing["mixing"])
    return trainer


def unlike(response):
    """Another score for nearly every other response."""
    return sum(map(ord, response)) % 101 / 100


def own(name):
    """Whether the objective has its settings in the config's `objectives`."""
    return name not in vars(HybridConfig())


def rows_of(name, trainer):
    """Rows that the objective may learn from: its own, or a rollout's."""
    if objective_class(name).rolls_out:
        rollout = trainer.rollout(next(trainer.prompts))
        return trainer.objectives[name].learnt(with_advantages(rollout, trainer.config.ppo))
    return trainer.objectives.next_rows([name])[name]


def gradient(trainer, *terms):
    """The gradient of the terms' sum, one number for each parameter's entry; 0 where there is none."""
    trainer.policy.zero_grad(set_to_none=True)
    for term in terms:
        loss, _ = term.loss_of(term.rows)
        (term.coef * loss).backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trainer.policy.parameters()]
    )


@every_objective
def test_the_losses_of_parts_add_up_to_that_of_the_whole(name, tokenizer):
    trainer = trainer_for(name, tokenizer)
    term = trainer.objectives[name].term(rows_of(name, trainer))
    whole, _ = term.loss_of(term.rows)
    parts = [term.loss_of(term.rows[i : i + 1])[0] for i in range(len(term.rows))]
    assert torch.allclose(sum(parts), whole, rtol=1e-5, atol=1e-6)


@every_objective
def test_packed_rows_have_the_loss_of_the_same_examples_one_a_row(name, tokenizer):
    trainer = trainer_for(name, tokenizer)
    rows = rows_of(name, trainer)
    if not isinstance(rows, Batch):
        return
    packed = pack(rows.examples, max_length=64, pad_id=0)
    assert len(packed) < len(rows)
    losses = [term.loss_of(term.rows)[0] for term in map(trainer.objectives[name].term, (rows, packed))]
    assert torch.allclose(*losses, rtol=1e-5, atol=1e-6)


@every_objective
def test_a_term_names_its_objective_and_carries_its_coefficient(name, tokenizer):
    trainer = trainer_for(name, tokenizer)
    objective = trainer.objectives[name]
    term = objective.term(rows_of(name, trainer), 0.25)
    assert term.name in (name, objective.label)
    assert (term.coef, term.lr_factor) == (0.25, objective.lr_factor)


@every_objective
@pytest.mark.parametrize("other", ["sft", "ppo"])
def test_the_gradient_of_a_sum_is_the_sum_of_the_gradients(name, other, tokenizer):
    trainer = trainer_for(name, tokenizer)
    one, another = ((trainer.objectives[each], rows_of(each, trainer)) for each in (name, other))
    terms = [one[0].term(one[1], 0.3), another[0].term(another[1], 0.7)]
    apart = gradient(trainer, terms[0]) + gradient(trainer, terms[1])
    assert torch.allclose(gradient(trainer, *terms), apart, rtol=1e-4, atol=1e-7)


@every_objective
def test_a_run_of_it_alone_learns_and_says_its_loss(name, tokenizer, tmp_path):
    trainer = trainer_for(name, tokenizer, tmp_path / "run", steps=2)
    before = weights(trainer).clone()
    trainer.train()
    assert torch.isfinite(weights(trainer)).all() and not torch.equal(weights(trainer), before)
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["phase"] != "eval"]
    assert [row["phase"] for row in rows] == [name, name]
    assert all(isinstance(row["loss"], float) for row in rows)


@every_objective
def test_a_run_of_it_that_died_goes_on_with_the_same_steps(name, tokenizer, tmp_path):
    whole = trainer_for(name, tokenizer, tmp_path / "whole", steps=4)
    whole.train()
    crash(trainer_for(name, tokenizer, tmp_path / "part", steps=4), 3)
    resumed = trainer_for(name, tokenizer, tmp_path / "part", steps=4, resume=True)
    assert resumed.num_steps == 2
    resumed.train()
    assert torch.equal(weights(resumed), weights(whole))
    assert logged_rows(tmp_path / "part") == logged_rows(tmp_path / "whole")


@every_objective
def test_microbatches_of_it_change_nothing(name, tokenizer):
    if not own(name):
        return  # the strategies' tests have those
    runs = []
    for size in (None, 1):
        # SGD is linear in the gradient: a rounding difference stays one, which Adam's first steps blow up.
        settings, optimizer = {"microbatch_size": size}, {"name": "sgd", "lr": 1e-2}
        trainer = trainer_for(name, tokenizer, steps=2, settings=settings, optimizer=optimizer)
        trainer.train()
        runs.append(weights(trainer))
    assert torch.allclose(*runs, atol=1e-5)


# Published baselines that are settings of `ppo`.
BASELINES = {
    "gspo": {"ratio": "sequence", "aggregation": "sequence_mean", "clip": 3e-3, "clip_high": 4e-3},
    "dapo": {"clip_high": 0.28, "resample": 2},
}
every_baseline = pytest.mark.parametrize("settings", BASELINES.values(), ids=BASELINES)


def baseline(settings, tokenizer, folder=None, *, size=None, **options):
    ppo = PPOConfig(batch_size=3, samples_per_prompt=2, minibatch_size=3, epochs=2, microbatch_size=size)
    ppo = replace(ppo, advantage="group", **settings)
    return trainer_for("ppo", tokenizer, folder, steps=4, ppo=ppo, **options)


@every_baseline
def test_a_run_of_a_baseline_that_died_goes_on_with_the_same_steps(settings, tokenizer, tmp_path):
    whole = baseline(settings, tokenizer, tmp_path / "whole")
    before = weights(whole).clone()
    whole.train()
    crash(baseline(settings, tokenizer, tmp_path / "part"), 3)
    resumed = baseline(settings, tokenizer, tmp_path / "part", resume=True)
    assert resumed.num_steps == 2
    resumed.train()
    assert torch.equal(weights(resumed), weights(whole)) and not torch.equal(weights(whole), before)
    assert logged_rows(tmp_path / "part") == logged_rows(tmp_path / "whole")


@every_baseline
def test_microbatches_of_a_baseline_change_nothing(settings, tokenizer):
    runs = []
    for size in (None, 1):
        trainer = baseline(settings, tokenizer, size=size, optimizer={"name": "sgd", "lr": 1e-2})
        trainer.train()
        runs.append(weights(trainer))
    assert torch.allclose(*runs, atol=1e-5)


@every_objective
def test_beside_ppo_each_loss_and_coefficient_is_logged(name, tokenizer):
    trainer = trainer_for(name, tokenizer)
    if objective_class(name).rolls_out:
        return
    metrics = trainer.take(Plan(0, {"ppo": 1.0, name: 0.1}), trainer.rollout(next(trainer.prompts)))
    assert {"ppo_loss", f"{objective_class(name).label or name}_loss"} <= metrics.keys()


def test_two_that_call_themselves_the_same_are_told_apart(tokenizer):
    metrics = trainer_of("alternate", tokenizer).batch_step({"sft": 0.5, "ptx": 0.5})
    assert {"sft_loss", "ptx_loss"} <= metrics.keys()


@pytest.mark.slow
def test_a_strategy_from_outside_is_put_through_this_suite(tmp_path):
    (tmp_path / "outside.py").write_text(
        "from dataclasses import dataclass\n"
        "from hybrid.mixing import Plan, register_strategy\n"
        "from hybrid.mixing.order import Sequential\n\n\n"
        "@register_strategy('ppo_first')\n"
        "@dataclass(frozen=True)\n"
        "class PPOFirst(Sequential):\n"
        "    def plan(self, step, metrics):\n"
        "        if step >= self.num_steps:\n"
        "            return None\n"
        "        return Plan(0, ppo_coef=1.0) if step < self.ppo_steps else Plan(1, sft_coef=1.0)\n"
    )
    command = [sys.executable, "-m", "pytest", __file__, "-p", "outside", "-k", "ppo_first and (spec or run)", "-vv"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "test_its_spec_makes_it_again[ppo_first] PASSED" in done.stdout
    assert "test_a_run_takes_the_steps_that_it_says[ppo_first] PASSED" in done.stdout


@pytest.mark.slow
def test_an_objective_from_outside_is_put_through_this_suite(tmp_path):
    (tmp_path / "outside.py").write_text((ROOT / "examples" / "custom_objective.py").read_text())
    command = [sys.executable, "-m", "pytest", __file__, "-p", "outside", "-k", "modest", "-vv"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "test_a_run_of_it_alone_learns_and_says_its_loss[modest] PASSED" in done.stdout
