"""The trainer on a real model: the loop, its steps, and what it refuses before a model is loaded."""

import json
from dataclasses import replace

import pytest
import torch
from whole_run import weights

from hybrid import (
    HybridConfig,
    HybridTrainer,
    InputError,
    KLConfig,
    Policy,
    PPOConfig,
    Reference,
    SamplingConfig,
    SFTConfig,
)
from hybrid.config import ModelConfig, RunConfig
from hybrid.core import RunStopped
from hybrid.data import DataConfig
from hybrid.evaluate import EvalConfig
from hybrid.mixing import Alternate
from hybrid.objectives import GradientConfig

ROWS = [
    {"prompt": f"Tell me about {who}.", "target": f"Once there was {who}. {rest}"}
    for who in ("a dog", "the cat", "Lily", "Tom", "a bird", "the sun")
    for rest in ("It was happy.", "It was a very sad day and it rained.")
]
CONFIG = HybridConfig(
    data=DataConfig(eval_fraction=0.25),
    sampling=SamplingConfig(max_new_tokens=12),
    sft=SFTConfig(batch_size=4),
    ppo=PPOConfig(batch_size=4, minibatch_size=2, epochs=2),
    mixing={"cycles": 2, "sft_steps_per_cycle": 2, "ppo_steps_per_cycle": 1},
    optimizer={"lr": 1e-3},
    eval=EvalConfig(num_prompts=3),
)


def num_letters(response):
    return float(len(response))


def make(stories, tmp_path=None, reward=num_letters, rows=ROWS, **changes):
    config = replace(CONFIG, **changes)
    if tmp_path is not None:
        config = replace(config, run=RunConfig(output=str(tmp_path / "run")), reward={"type": "sentiment_lexicon"})
        reward = None
    return HybridTrainer(stories, train_data=rows, reward=reward, config=config)


def test_training_by_hand_is_sft_step_rollout_ppo_step(stories):
    trainer = make(stories)
    batch = next(trainer.loader)
    sft = trainer.sft_step(batch)
    rollout = trainer.rollout(batch)
    ppo = trainer.ppo_step(rollout)
    assert len(rollout) == len(batch) == 4
    assert rollout.score.tolist() == [float(len(response)) for response in rollout.responses]
    assert ppo["reward"] == pytest.approx(rollout.score.mean().item())
    assert sft["loss"] == pytest.approx(sft["nll"])


def test_every_statistic_of_the_spec_is_there(stories):
    trainer = make(stories)
    metrics = trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
    assert set(metrics) >= {
        "policy_loss", "value_loss", "loss", "approx_kl", "policy_clip_fraction", "value_clip_fraction", "ratio_mean",
        "ratio_max", "entropy", "kl", "kl_coef", "reward", "reward_std", "return_mean", "return_var", "value_mean",
        "value_error", "explained_variance", "response_length", "eos_share", "grad_norm", "lr", "tokens_per_second",
        "seconds_generate", "seconds_score", "seconds_update", "skipped_updates",
    }  # fmt: skip


def test_before_any_update_ratio_is_one_and_kl_zero_exactly(stories):
    trainer = make(stories, ppo=PPOConfig(batch_size=4, minibatch_size=4, epochs=1))
    metrics = trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1.0
    assert metrics["approx_kl"] == metrics["kl"] == 0.0


@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_optimizer_steps_are_epochs_times_minibatches_whatever_the_microbatches(stories, microbatch_size):
    trainer = make(stories, ppo=PPOConfig(batch_size=4, minibatch_size=2, epochs=3, microbatch_size=microbatch_size))
    steps = []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
    assert len(steps) == 3 * 2


def test_microbatches_change_no_sft_step(stories):
    trained = []
    for size in (None, 1, 3):
        trainer = make(stories, sft=SFTConfig(batch_size=4, microbatch_size=size))
        trainer.sft_step(next(trainer.loader))
        trained.append(weights(trainer))
    # AdamW's first step is lr * sign(gradient) where a gradient is tiny: compare to a part of that step.
    for other in trained[1:]:
        assert ((other - trained[0]).abs() > 1e-6).float().mean() < 1e-3


def test_packing_trains_on_the_same_tokens(stories):
    plain, packed = (make(stories, sft=SFTConfig(batch_size=4, packing=packing)) for packing in (False, True))
    losses = [trainer.sft_step(next(trainer.loader))["loss"] for trainer in (plain, packed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_sft_step_leaves_the_value_head_bit_identical(stories):
    trainer = make(stories)
    trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
    before = {name: x.clone() for name, x in trainer.policy.value_head.state_dict().items()}
    assert before["linear.weight"].any(), "a PPO step must have moved it"
    trainer.sft_step(next(trainer.loader))
    assert all(torch.equal(x, before[name]) for name, x in trainer.policy.value_head.state_dict().items())


def test_phase_factors_scale_the_one_learning_rate(stories):
    trainer = make(
        stories,
        sft=SFTConfig(batch_size=4, lr_factor=0.5),
        ppo=PPOConfig(batch_size=4, minibatch_size=4, epochs=1, lr_factor=2.0),
    )
    assert trainer.sft_step(next(trainer.loader))["lr"] == pytest.approx(0.5e-3)
    assert trainer.ppo_step(trainer.rollout(next(trainer.prompts)))["lr"] == pytest.approx(2e-3)


def test_the_old_trl_step_learns_from_lists(stories):
    trainer = HybridTrainer(stories, config=replace(CONFIG, data=DataConfig()))
    queries = [torch.tensor([1, 5, 6]), torch.tensor([1, 7])]
    responses = [torch.tensor([8, 9, 2]), torch.tensor([10, 11, 12, 13])]
    before = weights(trainer)
    metrics = trainer.step(queries, responses, [1.0, torch.tensor(0.5)])
    assert metrics["reward"] == 0.75
    assert metrics["eos_share"] == 0.5
    assert metrics["response_length"] == 3.5
    assert not torch.equal(weights(trainer), before)


def test_step_takes_a_score_per_token(stories):
    trainer = HybridTrainer(stories, config=replace(CONFIG, data=DataConfig()))
    responses = [torch.tensor([8, 9, 2]), torch.tensor([10, 11])]
    metrics = trainer.step([torch.tensor([1, 5])] * 2, responses, [torch.ones(3), torch.zeros(2)])
    assert metrics["reward"] == 1.5


def test_beta_moves_after_the_epochs_by_the_kl_just_seen(stories):
    trainer = make(stories, kl=KLConfig(coef=0.2, adaptive=True, target=6.0, horizon=100))
    metrics = trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
    assert metrics["kl_coef"] == 0.2
    assert trainer.kl.coef == pytest.approx(0.2 * (1 - 0.2 * 4 / 100))  # KL 0 is clipped to -0.2


def test_target_kl_stops_the_epochs(stories):
    config = PPOConfig(batch_size=4, minibatch_size=4, epochs=50, target_kl=1e-4)
    trainer = make(stories, ppo=config)
    steps = []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
    assert len(steps) == 2  # the first has KL 0, the second sees the first's change


def test_a_kl_in_the_loss_leaves_the_reward_to_the_score(stories):
    trainer = make(stories, kl=KLConfig(kind="k3", coef=0.1, in_loss=True))
    trainer.sft_step(next(trainer.loader))
    rollout = trainer.rollout(next(trainer.prompts))
    torch.testing.assert_close(rollout.reward.sum(1), rollout.score)
    assert trainer.ppo_step(rollout)["kl_loss"] > 0


def test_several_references_are_summed(stories):
    policy = Policy.from_pretrained(stories)
    references = [Reference.from_policy(policy), Reference.from_pretrained(stories, weight=0.5)]
    trainer = HybridTrainer(
        policy, train_data=ROWS, reward=num_letters, config=replace(CONFIG, references=()), reference=references,
        tokenizer=make(stories).tokenizer,
    )  # fmt: skip
    trainer.sft_step(next(trainer.loader))
    rollout = trainer.rollout(next(trainer.prompts))
    expected = sum(w * (rollout.old_logprob - r) for w, r in zip((1.0, 0.5), rollout.ref_logprob, strict=True))
    torch.testing.assert_close(rollout.kl, expected)


def test_a_non_finite_update_is_skipped_and_too_many_stop_the_run(stories):
    trainer = make(stories, gradient=GradientConfig(max_skipped=2))
    rollout = trainer.rollout(next(trainer.prompts))
    broken = replace(rollout, reward=rollout.reward * float("nan"))
    before = weights(trainer)
    with pytest.raises(RunStopped, match="2 updates in a row"):
        trainer.ppo_step(broken)
    assert torch.equal(weights(trainer), before)


def test_train_writes_a_run_and_the_same_seed_gives_the_same_run(stories, tmp_path):
    runs = []
    for name in ("first", "second"):
        trainer = make(stories, tmp_path / name)
        trainer.train()
        rows = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
        runs.append(
            [{k: v for k, v in row.items() if not k.startswith(("seconds", "elapsed", "tokens_per"))} for row in rows]
        )
    assert [row["phase"] for row in runs[0]] == ["eval", "sft", "sft", "ppo", "sft", "sft", "ppo", "eval"]
    assert runs[0] == runs[1]


def test_a_runs_config_reads_back_as_itself(stories, tmp_path):
    trainer = make(stories, tmp_path)
    trainer.train()
    assert HybridConfig.from_file(trainer.folder / "config.yaml") == trainer.config


def test_run_training_is_sft_then_rl(stories, tmp_path):
    trainer = make(stories, tmp_path)
    trainer.run_training(supervised_epochs=1, rl_epochs=1)
    rows = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    # 9 training examples in batches of 4 are 3 steps.
    assert [row["phase"] for row in rows] == ["eval", *["sft"] * 3, *["ppo"] * 3, "eval"]


def test_train_for_epochs_takes_as_many_cycles_as_they_need(stories, tmp_path):
    trainer = make(stories, tmp_path)
    trainer.train(epochs=2)
    rows = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["phase"] == "sft" for row in rows) == 6


def test_evaluation_draws_the_same_every_time_and_changes_nothing(stories):
    trainer = make(stories)
    trainer.sft_step(next(trainer.loader))
    before = weights(trainer)
    first = trainer.evaluate()
    trainer.rollout(next(trainer.prompts))
    assert trainer.evaluate() == first
    assert torch.equal(weights(trainer), before)


def test_generate_answers_each_text(stories):
    assert len(make(stories).generate(["Who is Lily?", "Once upon a time"])) == 2


def test_generate_disturbs_no_training(stories):
    first, second = make(stories), make(stories)
    second.generate(["Who is Lily?"])
    assert first.rollout(next(first.prompts)).responses == second.rollout(next(second.prompts)).responses


def test_generating_from_no_text_gives_no_text(stories):
    assert make(stories).generate([]) == []


@pytest.mark.parametrize(("call", "given"), [("generate", "hello"), ("rollout", "hello"), ("rollout", ROWS[0])])
def test_one_text_or_row_in_place_of_a_list_is_refused(stories, call, given):
    with pytest.raises(InputError, match="list"):
        getattr(make(stories), call)(given)


def test_columns_as_a_torch_loader_yields_them_are_rows(stories):
    trainer = make(stories)
    columns = {name: [row[name] for row in ROWS[:3]] for name in ("prompt", "target")}
    assert trainer.rollout(columns).prompts == tuple(row["prompt"] for row in ROWS[:3])
    assert trainer.sft_step(columns)["num_tokens"] > 0


def test_a_frame_is_its_rows_and_not_its_columns_names(stories):
    import pandas

    assert make(stories).rollout(pandas.DataFrame(ROWS[:2])).prompts == tuple(row["prompt"] for row in ROWS[:2])


def test_a_plain_model_and_a_named_reference_will_do(stories):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories)
    trainer = HybridTrainer(model, train_data=ROWS, reward=num_letters, config=CONFIG, reference=stories)
    assert (trainer.rollout(next(trainer.prompts)).kl == 0).all()


def test_a_strategy_without_a_known_end_is_evaluated_last_too(stories):
    class Open(Alternate):
        num_steps = None

    trainer = make(stories)
    trainer.strategy = Open(cycles=1, sft_steps_per_cycle=1, ppo_steps_per_cycle=0)
    before = trainer.evaluate()
    assert trainer.train()["sft_loss"] < before["sft_loss"]


def test_a_run_that_is_stopped_keeps_what_it_has_learnt(stories, tmp_path):
    trainer = make(stories, tmp_path)
    trainer.rollout = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch.equal(weights(HybridTrainer(trainer.folder / "export", config=CONFIG)), weights(trainer))
    assert (trainer.folder / "report.html").is_file()


def test_the_runs_config_says_what_was_given_in_code(stories, tmp_path):
    config = replace(CONFIG, run=RunConfig(output=tmp_path / "run"), mixing={"cycles": 1, "ppo_steps_per_cycle": 0})
    trainer = HybridTrainer(stories, train_data=ROWS, reward=num_letters, config=config)
    trainer.train()
    saved = HybridConfig.from_file(tmp_path / "run" / "config.yaml")
    assert saved.model.name == stories
    assert saved.reward.endswith(":num_letters")


def test_save_and_load_give_the_same_policy(stories, tmp_path):
    trainer = make(stories)
    trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
    trainer.save(tmp_path / "saved")
    again = HybridTrainer(tmp_path / "saved", train_data=ROWS, reward=num_letters, config=CONFIG)
    assert torch.equal(weights(again), weights(trainer))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_run_that_goes_on_from_a_checkpoint_equals_the_uninterrupted_one(stories, tmp_path, name):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    changes = {
        "optimizer": {"name": name, "lr": 1e-3},
        "scheduler": {"name": "cosine"},
        "kl": KLConfig(coef=0.2, adaptive=True, horizon=100),
    }
    whole, again = make(stories, **changes), make(stories, **changes)
    cycle = lambda t: (t.sft_step(next(t.loader)), t.ppo_step(t.rollout(next(t.prompts))))  # noqa: E731
    cycle(whole)
    whole.save_checkpoint(tmp_path / "step-2")
    again.load_checkpoint(tmp_path / "step-2")
    for one, other in zip(cycle(whole), cycle(again), strict=True):
        timed = ("seconds", "tokens_per")
        assert {k: v for k, v in one.items() if not k.startswith(timed)} == {
            k: v for k, v in other.items() if not k.startswith(timed)
        }
    assert torch.equal(weights(whole), weights(again))
    assert whole.kl.coef == again.kl.coef


NESTED = {
    "type": "weighted_sum",
    "components": [
        {"type": "sentiment_lexicon", "weight": 2, "postprocess": {"type": "ema_normalize", "decay": 0.9}},
        {
            "type": "min",
            "name": "shape",
            "components": [
                {"type": "length_window", "min": 2, "max": 6, "postprocess": {"type": "ema_normalize"}},
                {
                    "type": "python",
                    "function": "test_trainer:num_letters",
                    "postprocess": {"type": "scale", "mul": 0.1},
                },
            ],
        },
    ],
}


def test_every_component_of_a_nested_reward_is_logged_and_its_state_resumed(stories, tmp_path):
    whole, again = make(stories, reward=NESTED), make(stories, reward=NESTED)
    cycle = lambda t: (t.sft_step(next(t.loader)), t.ppo_step(t.rollout(next(t.prompts))))[1]  # noqa: E731
    cycle(whole)
    whole.save_checkpoint(tmp_path / "step-2")
    again.load_checkpoint(tmp_path / "step-2")
    running = whole.reward.state_dict()["reward"]["sentiment_lexicon"]["postprocess"][0]
    assert running["mean"] is not None and running["var"] != 1.0
    assert again.reward.state_dict() == whole.reward.state_dict()
    one, other = cycle(whole), cycle(again)
    for name in ("sentiment_lexicon", "shape", "shape/length_window", "shape/python"):
        for key in ("raw_mean", "raw_std", "score_mean", "weighted_mean", "weighted_std", "invalid", "timeouts"):
            assert one[f"reward/{name}/{key}"] == other[f"reward/{name}/{key}"]
        assert one[f"seconds_reward/{name}"] >= 0
    weighted = one["reward/sentiment_lexicon/weighted_mean"] + one["reward/shape/weighted_mean"]
    assert weighted == pytest.approx(one["reward"], abs=1e-6)
    assert torch.equal(weights(whole), weights(again))


def test_an_evaluation_leaves_the_rewards_running_means_alone(stories):
    trainer = make(stories, reward=NESTED)
    trainer.rollout(next(trainer.prompts))
    before = trainer.reward.state_dict()
    assert trainer.evaluate()["num_prompts"] > 0
    assert trainer.reward.state_dict() == before


def test_a_trainer_without_data_can_be_saved_and_loaded_too(stories, tmp_path):
    one, two = (HybridTrainer(stories, config=replace(CONFIG, data=DataConfig())) for _ in range(2))
    given = [torch.tensor([1, 5])] * 2, [torch.tensor([8, 9, 2]), torch.tensor([10, 11])], [1.0, 0.0]
    one.step(*given)
    one.save_checkpoint(tmp_path / "state")
    two.load_checkpoint(tmp_path / "state")
    assert one.step(*given)["loss"] == two.step(*given)["loss"]
    assert torch.equal(weights(one), weights(two))


def test_the_scheduler_spans_the_optimizer_steps_of_both_phases(stories):
    trainer = make(stories, scheduler={"name": "linear"})
    # 2 cycles of 2 SFT steps and one rollout of 2 epochs of 2 minibatches.
    assert trainer.updater.num_updates == 2 * (2 + 2 * 2)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_bfloat16_autocast_trains_float32_weights(stories):
    trainer = make(stories, model=ModelConfig(precision="bfloat16"))
    before = weights(trainer)
    trainer.sft_step(next(trainer.loader))
    metrics = trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
    assert weights(trainer).dtype == torch.float32
    assert not torch.equal(weights(trainer), before)
    assert metrics["skipped_updates"] == 0


def test_a_prompt_that_leaves_no_room_to_answer_is_refused(stories):
    with pytest.raises(InputError, match="leaves no room"):
        make(stories, sampling=SamplingConfig(max_new_tokens=500))


def test_a_model_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(InputError, match="not found"):
        HybridTrainer(str(tmp_path / "nothing"), train_data=ROWS, reward=num_letters)


def test_training_without_data_says_what_to_give(stories):
    with pytest.raises(InputError, match="train_data"):
        HybridTrainer(stories, reward=num_letters).train()


def test_a_rollout_without_a_reward_says_what_to_give(stories):
    with pytest.raises(InputError, match="reward"):
        HybridTrainer(stories, train_data=ROWS).rollout(["Hello"])


def test_every_call_of_train_has_the_whole_schedule(stories):
    trainer = make(
        stories, mixing={"strategy": "sequential", "sft_steps": 3, "ppo_steps": 0}, scheduler={"name": "linear"}
    )
    rates = []
    step = trainer.sft_step
    trainer.sft_step = lambda batch: (metrics := step(batch), rates.append(metrics["lr"]))[0]
    trainer.train()
    trainer.train()
    assert rates == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3] * 2)


def test_an_evaluation_leaves_out_what_the_reward_skips(stories):
    skipped = []

    def choosy(response):
        skipped.append(len(skipped))
        if skipped[-1] % 2:
            raise ValueError("no score")
        return 1.0

    spec = {"type": "python", "function": choosy, "on_error": "skip"}
    trainer = make(stories, reward=spec, eval=EvalConfig(num_prompts=3, batch_size=1))
    assert trainer.evaluate()["num_prompts"] == 2
