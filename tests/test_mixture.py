"""A run whose reward learns its weights: towards what helps, and on from a checkpoint as if nothing had happened."""

import json
import shutil
import zlib
from itertools import pairwise

import pytest
import torch
from tiny import tiny_model
from whole_run import crash, logged_rows, weights

from hybrid import HybridConfig, HybridTrainer, Learner, Policy
from hybrid.core import InputError
from hybrid.models import response_stats


def even(response):
    """The share of the words that end in an even digit: about a half of what an untrained policy says."""
    words = response.split()
    return sum(word[-1] in "02468" for word in words) / max(len(words), 1)


def against(response):
    return -even(response)


def noise(response):
    return zlib.crc32(response.encode()) % 1000 / 1000


def other_noise(response):
    return zlib.crc32(b"other" + response.encode()) % 1000 / 1000


def of(function, name):
    return {"type": "python", "function": function, "name": name}


ROWS = [{"prompt": f"the w{i} w{i + 1}", "target": "w4 w18 w30"} for i in range(48)]
HELPS, HURTS = of(even, "helps"), of(against, "hurts")


def learner(tokenizer, controller, components=(HELPS, HURTS), *, data=ROWS, seed=0, lr=1e-2, size=16, **settings):
    config = {
        "sampling": {"max_new_tokens": 6},
        "ppo": {"batch_size": size, "minibatch_size": 8, "epochs": 1},
        "data": {"eval_fraction": 0.67},
        "eval": {"num_prompts": max(size, 32), "batch_size": max(size, 32), "every": 1},
        "kl": {"coef": 0.0},
        "optimizer": {"lr": lr},
        "run": {"seed": seed},
    }
    reward = {"type": "mixture", "controller": controller, "components": [*components], **settings}
    return Learner(Policy(tiny_model()), tokenizer, data, reward, HybridConfig.from_dict(config))


def learnt(made, num_steps):
    """The weights before each of so many PPO steps with an evaluation behind each, and after the last."""
    course = [list(made.reward.weights)]
    made.evaluate()
    made.reward.evaluated()
    for _ in range(num_steps):
        made.ppo_step(made.rollout(made.corpus.train))
        made.evaluate()
        made.reward.evaluated()
        course.append(list(made.reward.weights))
    return course


def test_what_helps_gets_the_weight_and_what_hurts_loses_it(tokenizer):
    made = learner(tokenizer, "hedge", metric=of(even, "m"))
    assert learnt(made, 4)[-1][0] > 0.6
    # A control: the other way round.
    made = learner(tokenizer, "hedge", metric=of(against, "m"))
    assert learnt(made, 4)[-1][0] < 0.4


@pytest.mark.parametrize(("metric", "grows"), [(even, True), (against, False)])
def test_meta_raises_the_component_whose_gradient_agrees_with_the_metrics(tokenizer, metric, grows):
    """Of 128 responses: a cosine of 0.3, give or take 0.1."""
    many = [{**row, "prompt": f"{row['prompt']} w{i}"} for row in ROWS for i in range(8)]
    made = learner(tokenizer, "meta", data=many, metric=of(metric, "m"), rows=128, eta=0.5, size=128)
    course = learnt(made, 3)
    steps = [(after[0] > before[0]) is grows for before, after in pairwise(course)]
    assert all(steps), course
    assert abs(course[-1][0] - 0.5) > 0.1


def test_what_helps_gets_the_weight_beside_noise(tokenizer):
    made = learner(tokenizer, "hedge", (HELPS, of(noise, "noise")), metric=of(even, "m"), eta=0.5)
    assert learnt(made, 4)[-1][0] > 0.65


def test_exp3_finds_what_helps_by_trying(tokenizer):
    made = learner(tokenizer, "exp3", metric=of(even, "m"), eta=0.4, lr=3e-2)
    course = learnt(made, 10)
    assert course[-1][0] > 0.6
    tried = {tuple(w) for w in course}
    assert len(tried) > 5, "the weights moved"


def test_meta_foresees_what_a_step_along_a_component_does_to_the_held_out_loss(tokenizer):
    """loss(theta + e g_i) - loss(theta) = -e <g_i, g>: by one more forward, and a gradient of our own."""
    made = learner(tokenizer, "meta", metric="sft_loss", eta=0.5)
    rollout = made.rollout(made.corpus.train)
    gram = made.reward._gram(rollout, held_out=True)
    cosines = gram[:-1, -1] / (gram.diagonal()[:-1] * gram[-1, -1]).sqrt()
    assert made.reward._gains == pytest.approx(cosines.tolist())
    assert made.reward.weights[0] == pytest.approx(float((0.5 * cosines).softmax(0)[0]))
    batch, parameters = made.batch(made.corpus.eval[:16]), list(made.policy.backbone.parameters())

    def loss():
        logprob, trained = made.policy.batch_logprob(batch)
        return -(logprob.double().sum() / trained.sum())

    scores = torch.tensor(rollout.components["helps"])
    advantage = (scores - scores.mean()) / scores.std(correction=0)
    hidden = made.policy.backbone(rollout.input_ids, rollout.attention_mask)
    logprob = response_stats(made.policy.backbone, hidden, rollout.input_ids, rollout.mask).logprob
    g = torch.autograd.grad((advantage * logprob.sum(1)).sum() / rollout.num_tokens, parameters)
    with torch.no_grad():
        step, found = 1e-3, []
        for sign in (1, -1):
            torch._foreach_add_(parameters, g, alpha=sign * step)
            found.append(float(loss()))
            torch._foreach_add_(parameters, g, alpha=-sign * step)
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(-float(gram[0, -1]), rel=0.02)
    assert abs(gram[0, -1]) > 0.01


@pytest.mark.parametrize("controller", ["hedge", "exp3", "meta"])
def test_where_neither_helps_the_weights_stay_near_their_start(tokenizer, controller):
    components = (of(noise, "noise"), of(other_noise, "other"))
    metric = of(lambda response: zlib.crc32(b"m" + response.encode()) % 1000 / 1000, "m")
    course = learnt(learner(tokenizer, controller, components, metric=metric, eta=0.1), 4)
    assert all(abs(w[0] - 0.5) < 0.15 for w in course)


def test_balance_gives_each_component_the_same_spread(tokenizer):
    loud = of(lambda response: 50 * noise(response), "loud")
    made = learner(tokenizer, "balance", (of(other_noise, "quiet"), loud), floor=0.0)
    rollout = made.rollout(made.corpus.train)
    raw = [torch.tensor(rollout.components[name]).std(correction=0) for name in ("quiet", "loud")]
    shares = [w * float(x) for w, x in zip(made.reward.weights, raw, strict=True)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-5)
    assert rollout.reward_metrics["reward/loud/weight"] == made.reward.weights[1] < 0.05


def test_gradient_gives_the_shortest_combination_of_the_policy_gradients(tokenizer):
    made = learner(tokenizer, "gradient", (HELPS, of(noise, "noise")), floor=0.0, rows=8)
    state = torch.get_rng_state()
    rollout = made.rollout(made.corpus.train)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in made.policy.parameters())
    gram = made.reward._gram(rollout)
    w = torch.tensor(made.reward.weights, dtype=torch.float64)
    assert w @ gram @ w <= min(gram.diagonal().min(), gram.mean()) + 1e-12
    # By a loop over the rows: the gradient of sum_b A_b sum_t log pi / tokens.
    by_hand = []
    for name in ("helps", "noise"):
        scores = torch.tensor(rollout.components[name][:8])
        advantage = (scores - scores.mean()) / scores.std(correction=0)
        total = 0
        for b in range(8):
            ids = rollout.input_ids[b][rollout.attention_mask[b]]
            n = int(rollout.mask[b].sum())
            logits = made.policy.backbone.model(ids[None]).logits[0, -n - 1 : -1]
            total = total + advantage[b] * logits.log_softmax(1).gather(1, ids[-n:, None]).sum()
        mean = total / int(rollout.mask[:8].sum())
        parameters = list(made.policy.backbone.parameters())
        by_hand.append(torch.cat([g.flatten() for g in torch.autograd.grad(mean, parameters)]).double())
    expected = torch.stack([torch.stack([x @ y for y in by_hand]) for x in by_hand])
    torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("controller", ["hedge", "exp3", "balance", "gradient", "meta"])
def test_an_evaluation_by_hand_leaves_everything_as_it_was(tokenizer, controller):
    metric = {"metric": of(even, "m")} if controller in ("hedge", "exp3", "meta") else {}
    made = learner(tokenizer, controller, **metric)
    learnt(made, 1)
    before = [p.detach().clone() for p in made.policy.parameters()]
    state, random = made.reward.state_dict()["reward"], torch.get_rng_state()
    first = made.evaluation()
    assert made.evaluation() == first
    after = made.reward.state_dict()["reward"]
    for name in ("weights", "moments", "gains", "arm", "mean_before", "largest_rise"):
        assert after[name] == state[name], name
    assert torch.equal(after["random"], state["random"])
    assert all(after["held"][name] is x for name, x in state["held"].items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(p, x) for p, x in zip(made.policy.parameters(), before, strict=True))
    if metric:
        assert first[0]["reward/metric/raw_mean"] == pytest.approx(sum(map(even, texts(first))) / 32)


def texts(evaluation):
    return [row["response"] for row in evaluation[1]]


def test_without_held_out_data_the_run_is_refused(tokenizer):
    reward = {"type": "mixture", "components": [HELPS, HURTS], "metric": of(even, "m")}
    with pytest.raises(InputError, match="learns its weights from held-out data"):
        Learner(Policy(tiny_model()), tokenizer, ROWS, reward, HybridConfig())
    targetless = [{"prompt": "the w1"}, {"prompt": "the w2"}, {"prompt": "the w3"}]
    config = HybridConfig.from_dict({"data": {"eval_fraction": 0.34}})
    loss = {"type": "mixture", "controller": "meta", "components": [HELPS, HURTS], "metric": "sft_loss"}
    with pytest.raises(InputError, match="the held-out examples have no target"):
        Learner(Policy(tiny_model()), tokenizer, targetless, loss, config)


def test_a_missing_metric_is_told_before_a_model_is_looked_for():
    reward = {"type": "mixture", "components": [HELPS, HURTS]}
    with pytest.raises(InputError, match="mixture without a held-out metric"):
        Learner("no/such/model", None, ROWS, reward, HybridConfig())


COMPONENTS = [
    {"type": "length_window", "min": 25, "max": 30, "unit": "chars", "weight": 2},
    {"type": "python", "function": "builtins:len", "name": "len", "postprocess": {"type": "ema_normalize"}},
]
LONG = {"type": "length_window", "min": 60, "max": 80, "unit": "chars"}


def run_config(stories, tmp_path, name, reward, **sections):
    """A run of 6 steps, SFT and PPO, that evaluates and saves after every second."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Tell me about day {i}.", "target": f"It was a good day, number {i}."} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"name": stories},
        "data": {"train": str(data), "eval_fraction": 0.34},
        "reward": {"type": "mixture", "components": COMPONENTS, "eta": 1.0, **reward},
        "sampling": {"max_new_tokens": 8},
        "mixing": {"cycles": 3, "sft_steps_per_cycle": 1, "ppo_steps_per_cycle": 1},
        "optimizer": {"lr": 1e-3},
        "sft": {"batch_size": 2},
        "ppo": {"batch_size": 4, "minibatch_size": 2, "epochs": 1},
        "eval": {"num_prompts": 4, "every": 1},
        "checkpoint": {"every": 2},
        "run": {"output": str(tmp_path / name)},
    }
    return HybridConfig.from_dict(values | sections)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("controller", "metric"),
    [
        ("hedge", LONG), ("exp3", LONG), ("balance", None), ("gradient", None), ("meta", LONG),
        ("meta", "sft_loss"),
    ],
)  # fmt: skip
def test_a_run_that_died_and_goes_on_equals_the_uninterrupted_one(stories, tmp_path, controller, metric):
    reward = {"controller": controller, "floor": 0.001, **({"metric": metric} if metric else {})}
    whole = HybridTrainer(config=run_config(stories, tmp_path, "whole", reward))
    whole.train()
    crash(HybridTrainer(config=run_config(stories, tmp_path, "part", reward)), 5)
    shutil.copytree(tmp_path / "part", tmp_path / "copy")
    resumed = HybridTrainer.resume(tmp_path / "part")
    resumed.train()
    rows = logged_rows(tmp_path / "whole")
    assert logged_rows(tmp_path / "part") == rows
    assert torch.equal(weights(resumed), weights(whole))
    course = [row["reward/len/weight"] for row in rows if row["phase"] == "ppo"]
    assert len(course) == 3 and len(set(course)) > 1, "they are logged every step, and they moved"
    # A control: other weights in the checkpoint make another run.
    other = HybridTrainer.resume(tmp_path / "copy")
    other.reward.weights, other.reward._moments[0].mean = [0.9, 0.1], 3.0
    other.train()
    assert logged_rows(tmp_path / "copy") != rows


@pytest.mark.slow
def test_the_gradients_of_an_adapter_lead_as_well(stories, tmp_path, needs_peft):
    reward = {"controller": "gradient", "rows": 4}
    model = {"model": {"name": stories, "lora": {"rank": 2}}}
    made = HybridTrainer(config=run_config(stories, tmp_path, "run", reward, **model))
    made.train()
    assert made.reward.weights != [2 / 3, 1 / 3]
