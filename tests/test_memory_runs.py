"""Runs with a memory: composed with any strategy, resumed bit for bit. Runs without one stay what they are."""

from dataclasses import dataclass

import pytest
import torch
from tiny import tiny_model
from whole_run import crash, logged_rows, weights

from hybrid import HybridConfig, HybridTrainer, InputError, Policy
from hybrid.cli import main
from hybrid.memory import Memory, example_key, read_memory, register_memory
from hybrid.memory.shots import shot_ids
from hybrid.mixing import make_strategy, strategy_names
from hybrid.run import read_jsonl

ROWS = [{"prompt": f"the w{i} w{i + 1}", "target": f"was good w{i} w{i + 1} w{i + 2}"} for i in range(8)]
PTX = [{"text": f"it is a w{i} and a fine w{i + 2} w{i + 3}"} for i in range(6)]
PPO = {"batch_size": 4, "minibatch_size": 4, "epochs": 2, "samples_per_prompt": 2}
IMPORTANCE = {"importance": "token"}
EMBEDDER = {"embedder": "memory_case:numbers"}
MEMORIES = {
    "classes": {"type": "experience", "choose": "classes", "uniform": 0.25},
    "learnability": {"type": "experience", "unseen": 0.5},
    "due": {"type": "experience", "choose": "due"},
    "stale": {"type": "experience", "staleness": 2},
    "shots": {"type": "experience", "success": 0.4, "unseen": 0.5, "shots": 2, "shots_tokens": 30, **EMBEDDER},
    "markov": {"type": "markov"},
    "progress": {"type": "markov", "prefer": "progress", "uniform": 0.25},
}


def score(response):
    return sum(map(ord, response)) % 101 / 100


def trainer_of(tokenizer, folder=None, *, memory=None, resume=False, rows=ROWS, **sections):
    values = {
        "data": {"template": "none"},
        "ptx_data": {"text": "text"},
        "sampling": {"max_new_tokens": 6},
        "sft": {"batch_size": 3},
        "optimizer": {"lr": 1e-2},
        "checkpoint": {"every": 1},
        "mixing": {"strategy": "blend", "coefs": {"ppo": 1.0, "sft": 0.5}, "steps": 4},
        "memory": memory or {},
        **sections,
        "ppo": PPO | (IMPORTANCE if (memory or {}).get("staleness") else {}) | sections.get("ppo", {}),
        "run": {"output": None if folder is None else str(folder)},
    }
    given = {"policy_or_name": Policy(tiny_model("llama", seed=1)), "tokenizer": tokenizer, "train_data": rows}
    given |= {"ptx_data": PTX, "reward": score}
    if resume:
        return HybridTrainer.resume(folder, **given)
    return HybridTrainer(config=HybridConfig.from_dict(values), **given)


@pytest.mark.parametrize("name", MEMORIES)
def test_a_run_that_died_goes_on_with_the_same_steps(name, tokenizer, tmp_path):
    whole = trainer_of(tokenizer, tmp_path / "whole", memory=MEMORIES[name])
    whole.train()
    crash(trainer_of(tokenizer, tmp_path / "part", memory=MEMORIES[name]), 3)
    resumed = trainer_of(tokenizer, tmp_path / "part", resume=True)
    assert resumed.num_steps == 2
    resumed.train()
    assert torch.equal(weights(resumed), weights(whole))
    assert logged_rows(tmp_path / "part") == logged_rows(tmp_path / "whole")
    assert resumed.memory.state_dict() == whole.memory.state_dict() == read_memory(tmp_path / "part")


def test_a_resumed_memory_that_forgot_would_be_seen(tokenizer, tmp_path):
    """The control of the test above: without its state the same run goes another way."""
    sections = {
        "memory": {"type": "experience", "choose": "due", "uniform": 0.0},
        "mixing": {"strategy": "objective", "objective": "ppo", "steps": 6},
    }
    whole = trainer_of(tokenizer, **sections)
    whole.train()
    crash(trainer_of(tokenizer, tmp_path / "part", **sections), 5)
    resumed = trainer_of(tokenizer, tmp_path / "part", resume=True)
    resumed.memory.records.clear()
    resumed.train()
    assert not torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("strategy", strategy_names())
def test_it_composes_with_every_strategy(strategy, tokenizer):
    # One of them compares the responses to a prompt.
    ppo = {"advantage": "group"} if strategy == "prefix_rft" else {}
    trainer = trainer_of(tokenizer, memory=MEMORIES["classes"], ppo=ppo)
    trainer.strategy = make_strategy({"strategy": strategy}).for_epochs(2.0, len(trainer.loader), len(trainer.prompts))
    trainer.train()
    assert torch.isfinite(weights(trainer)).all()
    own = {example_key(example) for example in trainer.corpus.train}
    assert set(trainer.memory.records) <= own
    assert bool(trainer.memory.records) == trainer.strategy.rolls_out or "sft" in trainer.strategy.objectives


def test_a_run_without_a_memory_rolls_out_what_its_loader_draws(tokenizer):
    trainer, other = trainer_of(tokenizer), trainer_of(tokenizer)
    for _ in range(3):
        assert list(trainer.next_prompts()) == list(next(other.prompts).examples)
    rollout = trainer.rollout(trainer.next_prompts())
    assert trainer.objectives["ppo"].learnt(rollout) is rollout and trainer.memory is None


def test_a_memory_that_only_watches_changes_no_weight(tokenizer):
    plain = trainer_of(tokenizer)
    plain.train()
    runs = [trainer_of(tokenizer, memory={"type": kind, "uniform": 1.0}) for kind in ("experience", "markov")]
    for run in runs:
        run.train()
        assert torch.equal(weights(run), weights(plain))
    chooses = trainer_of(tokenizer, memory={"type": "experience", "unseen": 0.0})
    chooses.train()
    assert not torch.equal(weights(chooses), weights(plain))


def test_what_a_step_found_is_remembered_and_logged(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path / "run", memory={"type": "experience", "success": 0.5})
    seen = []
    rollout = trainer.rollout
    trainer.rollout = lambda prompts, **options: seen.append(rollout(prompts, **options)) or seen[-1]
    trainer.train()
    (first, second, *_), records = seen, trainer.memory.records
    # Two passes over 8 prompts: every one twice, two responses each.
    assert {example_key(e) for r in (first, second) for e in r.examples} == set(records)
    scores = {}
    for each in seen:
        for example, value in zip(each.examples, each.score.tolist(), strict=True):
            scores.setdefault(example_key(example), []).append(value)
    for key, record in records.items():
        assert record.attempts == len(scores[key])
        assert record.best[0].score == max(scores[key])
        assert record.sft_loss is not None
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "joint"]
    names = [f"memory/{name}" for name in ("easy", "medium", "hard", "unseen")]
    assert all(sum(row[name] for name in names) == pytest.approx(1) for row in rows)
    assert [row["memory/unseen"] for row in rows][:2] == [0.5, 0.0]
    assert [row["memory/revisits"] for row in rows][:3] == [0.0, 0.0, 1.0]


def test_the_supervised_loss_of_each_prompt_is_its_own(tokenizer):
    trainer = trainer_of(tokenizer, memory={"type": "experience"})
    batch = trainer.batch(trainer.corpus.train[:3])
    logprob, trained = trainer.policy.batch_logprob(batch)
    trainer.sft_step(batch)
    for row, example in enumerate(trainer.corpus.train[:3]):
        found = trainer.memory.records[example_key(example)].sft_loss
        assert found == pytest.approx(float(-logprob[row][trained[row]].mean().detach()), rel=1e-5)


def other_tokenizer(tokenizer):
    """One with another word, which the data do not have."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace('"w70"', '"v70"'))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def test_a_memory_is_not_taken_to_another_tokenizer(tokenizer, tmp_path):
    trainer_of(tokenizer, tmp_path / "run", memory={"type": "experience"}).train()
    begun = trainer_of(tokenizer, memory={"type": "experience", "path": str(tmp_path / "run")})
    assert begun.memory.records and begun.memory.began == 4
    begun.train()
    assert begun.memory.step == 8
    other = other_tokenizer(tokenizer)
    with pytest.raises(InputError, match="this memory is of another tokenizer"):
        trainer_of(other, memory={"type": "experience", "path": str(tmp_path / "run")}).memory  # noqa: B018
    with pytest.raises(InputError, match="this memory is of another kind: 'experience', and the run's is 'markov'"):
        trainer_of(tokenizer, memory={"type": "markov", "path": str(tmp_path / "run")}).memory  # noqa: B018
    with pytest.raises(InputError, match="holds no memory"):
        trainer_of(tokenizer, memory={"type": "experience", "path": str(tmp_path)}).memory  # noqa: B018


def test_another_tokenizer_is_refused_at_the_start_of_a_run_and_on_resume(tokenizer, tmp_path):
    other = other_tokenizer(tokenizer)
    for memory in ({"type": "markov"}, {"type": "experience"}):
        folder = tmp_path / memory["type"]
        crash(trainer_of(tokenizer, folder, memory=memory), 3)
        begun = trainer_of(other, memory={**memory, "path": str(folder)})
        with pytest.raises(InputError, match="this memory is of another tokenizer"):
            begun.train()
        assert begun.num_steps == 0
        with pytest.raises(InputError, match="this memory is of another tokenizer"):
            trainer_of(other, folder, resume=True)


def test_a_memory_without_a_reward_is_refused(tokenizer):
    config = HybridConfig.from_dict({"memory": {"type": "markov"}})
    with pytest.raises(InputError, match="memory chooses prompts by their scores, and reward is missing"):
        config.check_training(make_strategy({}))


# Stale rows in PPO


def stale_trainer(tokenizer, staleness, sampling=None, **ppo):
    memory = {"type": "experience", "staleness": staleness, "replay_share": 0.5, "uniform": 1.0}
    sections = {} if sampling is None else {"sampling": sampling}
    return trainer_of(tokenizer, memory=memory, ppo={**IMPORTANCE, **ppo}, **sections)


def test_with_staleness_0_ppo_is_what_it_was_bit_for_bit(tokenizer):
    plain = trainer_of(tokenizer, ppo=IMPORTANCE)
    plain.train()
    runs = {staleness: stale_trainer(tokenizer, staleness) for staleness in (0, 2)}
    for run in runs.values():
        run.train()
    assert torch.equal(weights(runs[0]), weights(plain))
    assert not torch.equal(weights(runs[2]), weights(plain))


def test_a_row_beyond_the_staleness_is_never_used(tokenizer):
    trainer = stale_trainer(tokenizer, 2)
    used = []
    stale = trainer.memory.stale
    trainer.memory.stale = lambda number: used.append((trainer.memory.step, stale(number))) or used[-1][1]
    trainer.strategy = make_strategy({"strategy": "objective", "objective": "ppo", "steps": 6})
    trainer.train()
    ages = [step - row.step for step, visits in used for visit in visits for row in visit.rows]
    assert set(ages) == {1, 2} and used[0][1] == []
    assert all(sum(len(visit.rows) for visit in visits) == 4 for _, visits in used[1:])


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_stale_rows_stand_behind_the_fresh_ones_scored_by_the_policy_of_now(tokenizer, advantage):
    trainer = stale_trainer(tokenizer, 3, advantage=advantage)
    old = trainer.rollout(trainer.next_prompts())
    trainer.ppo_step(old)
    fresh = trainer.rollout(trainer.next_prompts())
    joined = trainer.objectives["ppo"].learnt(fresh)
    assert len(joined) == len(fresh) + 4 and joined.advantage is not None
    assert torch.equal(joined.score[: len(fresh)], fresh.score)
    groups = joined.group.tolist()
    assert not set(groups[: len(fresh)]) & set(groups[len(fresh) :])
    for row in range(len(fresh), len(joined)):
        ids = joined.input_ids[row][joined.attention_mask[row]].tolist()
        match = [i for i in range(len(old)) if old.input_ids[i][old.attention_mask[i]].tolist() == ids]
        assert match
        drawn = joined.sampling_logprob[row][joined.mask[row]]
        assert any(torch.equal(drawn, old.sampling_logprob[i][old.mask[i]]) for i in match)
        # The policy has moved since: its log-probs are not those that were drawn with, nor those of the old rollout.
        assert not torch.allclose(joined.old_logprob[row][joined.mask[row]], drawn, atol=1e-3)


def test_stale_rows_are_scored_in_the_window_that_they_were_drawn_in(tokenizer):
    trainer = stale_trainer(tokenizer, 3, sampling={"max_new_tokens": 6, "decoder": {"type": "markov", "window": 3}})
    trainer.rollout(trainer.next_prompts())
    joined = trainer.objectives["ppo"].learnt(trainer.rollout(trainer.next_prompts()))
    assert joined.window == 3 and len(joined) > 8
    # Nothing was learnt in between: the policy of now is the one that drew.
    torch.testing.assert_close(joined.old_logprob, joined.sampling_logprob, atol=2e-5, rtol=2e-5)
    _, metrics = trainer.objectives["ppo"].term(joined).loss_of(joined)
    assert float(metrics["ratio_max"]) == pytest.approx(1, abs=1e-4)  # other rows share a forward


def test_the_importance_weight_is_the_policy_of_now_over_the_one_that_drew(tokenizer):
    trainer = stale_trainer(tokenizer, 3, importance_cap=1.5)
    trainer.ppo_step(trainer.rollout(trainer.next_prompts()))
    joined = trainer.objectives["ppo"].learnt(trainer.rollout(trainer.next_prompts()))
    term = trainer.objectives["ppo"].term(joined)
    _, metrics = term.loss_of(joined)
    expected = (joined.old_logprob - joined.sampling_logprob).exp()  # the metric is of the weights before the cap
    assert float(metrics["importance_mean"]) == pytest.approx(float(expected[joined.mask].mean()), rel=1e-5)
    assert float((expected[joined.mask] - 1).abs().max()) > 1e-3


def test_stale_rows_without_a_correction_are_refused(tokenizer):
    memory = {"type": "experience", "staleness": 2}
    with pytest.raises(InputError, match=r"memory\.staleness = 2 .* needs\s+ppo\.importance"):
        trainer_of(tokenizer, memory=memory, ppo={"importance": None}).train()
    with pytest.raises(InputError, match=r"score\.whiten takes a rollout's scores against each other"):
        trainer_of(tokenizer, memory=memory, score={"whiten": True}).train()


def test_the_rollouts_of_a_step_that_draws_again_are_not_taken_for_earlier_ones(tokenizer):
    again = {**IMPORTANCE, "advantage": "group", "samples_per_prompt": 2, "resample": 1}
    with pytest.raises(InputError, match=r"ppo\.resample = 1 makes several rollouts of a step"):
        trainer_of(tokenizer, memory={"type": "experience", "staleness": 2}, ppo=again).train()


# What is imitated


def replay_trainer(tokenizer, **settings):
    blend = {"strategy": "blend", "coefs": {"ppo": 1.0, "replay": 0.1}, "steps": 3}
    return trainer_of(tokenizer, memory={"type": "experience"}, mixing=blend, objectives={"replay": settings})


def test_the_best_kept_responses_are_weighed_by_how_much_better_they_are(tokenizer):
    trainer = replay_trainer(tokenizer, share=1.0)
    trainer.rollout(trainer.next_prompts())
    rollout = trainer.rollout(trainer.next_prompts())
    rows = trainer.objectives["replay"].learnt(rollout)
    records = {record.best[0].response: record for record in trainer.memory.records.values()}
    assert len(rows)
    for row in range(len(rows)):
        response = tuple(rows.input_ids[row, rows.prompt_length :][rows.mask[row]].tolist())
        weight = records[response].best[0].score - records[response].score
        assert weight > 0
        assert rows.advantage[row][rows.mask[row]].tolist() == pytest.approx([weight] * int(rows.mask[row].sum()))
    loss, _ = trainer.objectives["replay"].term(rows).loss_of(rows)
    expected = -(rows.advantage * rows.old_logprob)[rows.mask].sum() / rows.mask.sum()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    unweighted = -rows.old_logprob[rows.mask].mean()
    assert float(loss.detach()) != pytest.approx(float(unweighted), rel=1e-2)


def test_by_the_value_head_the_weight_is_what_it_did_not_expect(tokenizer):
    trainer = replay_trainer(tokenizer, share=1.0, baseline="value")
    torch.nn.init.normal_(trainer.policy.value_head.linear.weight, std=0.05)
    rows = trainer.objectives["replay"].learnt(trainer.rollout(trainer.next_prompts()))
    expected = (rows.score - rows.old_value[:, 0]).clamp(min=0)
    assert torch.allclose(rows.advantage[:, 0], expected) and (expected > 0).all()


def test_a_run_with_replay_raises_the_likelihood_of_what_was_kept(tokenizer):
    runs = {}
    for coef in (0.0, 1.0):
        trainer = replay_trainer(tokenizer)
        coefs = {"ppo": 1.0, "replay": coef} if coef else {"ppo": 1.0}
        trainer.strategy = make_strategy({"strategy": "blend", "coefs": coefs, "steps": 4})
        trainer.train()
        kept = [record.best[0] for record in replay_best(tokenizer)]
        runs[coef] = likelihood(trainer, kept)
    assert runs[1.0] > runs[0.0]


def replay_best(tokenizer):
    """What a run has kept after its first rollout, which both of the runs begin with."""
    trainer = replay_trainer(tokenizer)
    trainer.rollout(trainer.next_prompts())
    return [r for r in trainer.memory.records.values() if r.best[0].score > r.score and r.best[0].score >= 0.5]


def likelihood(trainer, kept):
    from hybrid.objectives.earlier import rescored

    rows = rescored(kept, trainer, (), trainer.rollout(trainer.next_prompts()), None, {})
    return float(rows.old_logprob[rows.mask].mean())


def test_replay_without_a_memory_that_keeps_responses_is_refused(tokenizer):
    for memory, said in (({}, "there is none"), ({"type": "markov"}, "MarkovMemory keeps no responses")):
        trainer = trainer_of(
            tokenizer, memory=memory, mixing={"coefs": {"replay": 1.0, "ppo": 1.0}, "strategy": "blend"}
        )
        with pytest.raises(InputError, match=f"{said}: set memory.type=experience"):
            trainer.train()
    trainer = trainer_of(tokenizer, memory={"type": "experience"}, ppo={"advantage": "group"},
                         mixing={"coefs": {"replay": 1.0, "ppo": 1.0}, "strategy": "blend"},
                         objectives={"replay": {"baseline": "value"}})  # fmt: skip
    with pytest.raises(InputError, match=r"objectives\.replay\.baseline 'value' asks a value head"):
        trainer.train()


def test_the_command_shows_a_runs_memory(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    for kind in ("experience", "markov"):
        trainer_of(tokenizer, tmp_path / kind, memory={"type": kind}).train()
        assert main(["memory", str(tmp_path / kind)]) == 0
        out = capsys.readouterr().out
        assert "the w0 w1" in out and ("medium" in out if kind == "experience" else "worth" in out)
    assert main(["memory", str(tmp_path)]) == 2
    assert "holds no memory" in capsys.readouterr().err


# One of a stranger's


@register_memory("backwards")
@dataclass
class Backwards(Memory):
    """Takes what the loader drew from behind, and counts."""

    start: int = 0

    def __post_init__(self):
        self.count = self.start

    def pick(self, drawn, step):
        return drawn[::-1]

    def visited(self, visits, step):
        self.count += len(visits)

    def rows(self):
        return [{"count": self.count}]

    def load_rows(self, rows, header):
        self.count = rows[0]["count"]


def test_a_strangers_memory_is_one_class(tokenizer, tmp_path, capsys):
    whole = trainer_of(tokenizer, tmp_path / "whole", memory={"type": "backwards", "start": 3})
    whole.train()
    assert whole.memory.count == 3 + 4 * 4
    crash(trainer_of(tokenizer, tmp_path / "part", memory={"type": "backwards", "start": 3}), 3)
    resumed = trainer_of(tokenizer, tmp_path / "part", resume=True)
    resumed.train()
    assert resumed.memory.count == 19 and torch.equal(weights(resumed), weights(whole))
    assert main(["memory", str(tmp_path / "part")]) == 0
    assert "memory backwards, 1 rows" in capsys.readouterr().out
    plain = trainer_of(tokenizer)
    plain.train()
    assert not torch.equal(weights(plain), weights(whole))


# Shots


SHOTS = {
    "type": "experience",
    "success": 0.0,
    "unseen": 0.0,
    "uniform": 1.0,
    "shots": 2,
    "shots_tokens": 30,
    **EMBEDDER,
}


def shot_run(tokenizer, folder=None, **sections):
    """A trainer whose memory has seen every prompt."""
    hybrid = trainer_of(tokenizer, folder, memory=SHOTS | sections.pop("memory", {}), **sections)
    for _ in range(3):
        hybrid.rollout(hybrid.next_prompts())
    return hybrid


def seen(rollout):
    """The tokens of each prompt as the policy saw it."""
    ids, mask = (x[:, : rollout.prompt_length] for x in (rollout.input_ids, rollout.attention_mask.bool()))
    return [tuple(row[there].tolist()) for row, there in zip(ids, mask, strict=True)]


def test_the_nearest_good_answers_stand_in_the_prompt_that_the_policy_saw_and_is_trained_on(tokenizer):
    hybrid = shot_run(tokenizer)
    known = {key: record.best for key, record in hybrid.memory.records.items()}
    picked = hybrid.next_prompts()
    rollout = hybrid.rollout(picked)
    for prompt, example in zip(seen(rollout), rollout.examples, strict=True):
        own = hybrid.corpus.prompt(example.prompt).prompt_ids
        front = prompt[: len(prompt) - len(own)]
        assert prompt[len(front) :] == own
        shots = {shot_ids(best[0], 2) for key, best in known.items() if key != example_key(example)}
        assert front in {a + b for a in shots for b in shots}
    # Old log-probs are those of the response behind that very prompt, which is what PPO's first ratio says.
    first = hybrid.ppo_step(rollout)
    assert first["sampling_gap_max"] < 1e-4
    # A prompt is known by itself, and its text is what rewards and reports read.
    assert hybrid.memory.records.keys() == {example_key(hybrid.corpus.prompt(row["prompt"])) for row in ROWS}
    assert set(rollout.prompts) <= {row["prompt"] for row in ROWS}


def test_evaluation_and_generate_see_shots_too(tokenizer, monkeypatch):
    from hybrid import measured

    hybrid, asked = shot_run(tokenizer), []
    answered = measured.respond
    monkeypatch.setattr(measured, "respond", lambda engine, e, **given: asked.extend(e) or answered(engine, e, **given))
    hybrid.generate(["the w40 w41"])
    assert asked[0].num_shots > 0
    bare = hybrid.corpus.prompt("the w40 w41")
    assert asked[0].prompt_ids[asked[0].num_shots :] == bare.prompt_ids


def test_a_run_with_hints_and_shots_trains_on_both(tokenizer):
    hybrid = shot_run(tokenizer, mixing={"strategy": "hint", "steps": 3, "sft_coef": 0.1})
    hybrid.train()
    assert hybrid.num_steps == 3
    assert hybrid.memory.records.keys() == {example_key(hybrid.corpus.prompt(row["prompt"])) for row in ROWS}


def test_shots_that_leave_no_room_to_answer_are_refused_before_the_first_step(tokenizer):
    hybrid = trainer_of(tokenizer, memory={**SHOTS, "shots_tokens": 60})
    with pytest.raises(InputError, match=r"leaves no room for sampling\.max_new_tokens"):
        hybrid.train()
    assert hybrid.num_steps == 0
