"""What a rollout holds: log-probs, values, KL and rewards of the right tokens."""

import pytest
import torch
from tiny import tiny_model, tiny_policy

from hybrid.core import Encoded, InputError
from hybrid.functional import entropy, full_kl, token_logprob
from hybrid.models import Policy, Reference
from hybrid.rewards import RewardError, make_reward
from hybrid.rollout import SamplingConfig, ScoreConfig, assemble, collect, from_lists
from hybrid.rollout.collect import shaped_score

CLOSE = {"atol": 2e-5, "rtol": 2e-5}  # float32 sums in another order
SEED = 3


@pytest.fixture
def policy():
    return tiny_policy(value_std=1.0)


@pytest.fixture
def other():
    return Reference.from_policy(Policy(tiny_model("llama", seed=1)))


def examples():
    prompts = [(5, 6, 7), (8,), (9, 10)]
    return [Encoded(p, (-100,) * len(p), p, f"prompt {i}", f"target {i}", {"row": i}) for i, p in enumerate(prompts)]


def rolled(policy, references, tokenizer, **options):
    options = {"sampling": SamplingConfig(max_new_tokens=24, temperature=1.3), **options}
    reward = make_reward(lambda response: float(len(response.split())))
    generator = torch.Generator().manual_seed(SEED)
    return collect(policy, references, reward, examples(), tokenizer=tokenizer, generator=generator, **options)


def full_logits(backbone, rollout):
    """The logits that predict each response token, from one plain forward of each row without any padding."""
    rows = []
    for ids, seen, mask in zip(rollout.input_ids, rollout.attention_mask, rollout.mask, strict=True):
        logits = backbone.model(ids[seen].unsqueeze(0)).logits[0] / rollout.temperature
        length = int(mask.sum())
        rows.append(logits[-length - 1 : -1])
    return rows


def test_log_probs_entropies_and_values_are_those_of_each_row_alone(policy, other, tokenizer):
    rollout = rolled(policy, [other], tokenizer)
    with torch.no_grad():
        for i, (mine, theirs) in enumerate(
            zip(full_logits(policy.backbone, rollout), full_logits(other.backbone, rollout), strict=True)
        ):
            mask = rollout.mask[i]
            labels = rollout.input_ids[i, rollout.prompt_length :][mask]
            torch.testing.assert_close(rollout.old_logprob[i][mask], token_logprob(mine, labels), **CLOSE)
            torch.testing.assert_close(rollout.ref_logprob[0, i][mask], token_logprob(theirs, labels), **CLOSE)
            torch.testing.assert_close(rollout.entropy[i][mask], entropy(mine), **CLOSE)


def test_nothing_stands_outside_the_mask(policy, other, tokenizer):
    rollout = rolled(policy, [other], tokenizer, kl_coef=0.1)
    assert not rollout.mask.all(), "the seed must give rows of different lengths"
    for x in (
        rollout.old_logprob,
        rollout.old_value,
        rollout.kl,
        rollout.reward,
        rollout.entropy,
        rollout.ref_logprob[0],
    ):
        assert (x[~rollout.mask] == 0).all()


def test_policy_equal_to_its_reference_has_kl_zero_exactly(policy, tokenizer):
    for kind in ("k1", "k2", "k3", "full"):
        rollout = rolled(policy, [Reference.from_policy(policy)], tokenizer, kl_kind=kind)
        assert (rollout.kl == 0).all(), kind


def test_the_kls_of_several_references_are_summed_by_weight(policy, other, tokenizer):
    third = Reference.from_policy(Policy(tiny_model("llama", seed=2)), weight=0.5)
    one, two, both = (rolled(policy, refs, tokenizer) for refs in ([other], [third], [other, third]))
    torch.testing.assert_close(both.kl, one.kl + two.kl)
    assert both.ref_logprob.shape[0] == 2


def test_kind_full_is_the_exact_kl(policy, other, tokenizer):
    rollout = rolled(policy, [other], tokenizer, kl_kind="full")
    with torch.no_grad():
        mine, theirs = full_logits(policy.backbone, rollout)[0], full_logits(other.backbone, rollout)[0]
    torch.testing.assert_close(rollout.kl[0][rollout.mask[0]], full_kl(mine, theirs), **CLOSE)


def test_reward_is_the_kl_penalty_plus_the_score_on_the_last_token(policy, other, tokenizer):
    rollout = rolled(policy, [other], tokenizer, kl_coef=0.1)
    for i in range(len(rollout)):
        expected = -0.1 * rollout.kl[i]
        expected[int(rollout.mask[i].sum()) - 1] += rollout.score[i]
        torch.testing.assert_close(rollout.reward[i], expected)


def test_microbatches_change_nothing(policy, other, tokenizer):
    whole, parts = rolled(policy, [other], tokenizer), rolled(policy, [other], tokenizer, microbatch_size=2)
    torch.testing.assert_close(parts.old_logprob, whole.old_logprob, **CLOSE)
    torch.testing.assert_close(parts.kl, whole.kl, **CLOSE)


def scores_in_turn(*values):
    """A reward that gives its values to the rows in turn, and skips where the value is no number."""
    return make_reward({"type": "python", "function": lambda responses: list(values), "on_error": "skip"})


def test_a_response_that_the_reward_skips_is_left_out(policy, other, tokenizer):
    def rollout_with(reward):
        generator = torch.Generator().manual_seed(SEED)
        sampling = SamplingConfig(max_new_tokens=24)
        return collect(policy, [other], reward, examples(), tokenizer=tokenizer, sampling=sampling, generator=generator)

    whole, part = rollout_with(scores_in_turn(1.0, 2.0, 3.0)), rollout_with(scores_in_turn(1.0, None, 3.0))
    assert part.score.tolist() == [1.0, 3.0]
    assert part.prompts == ("prompt 0", "prompt 2")
    assert part.responses == (whole.responses[0], whole.responses[2])
    assert torch.equal(part.input_ids, whole.input_ids[[0, 2]])
    torch.testing.assert_close(part.old_logprob, whole.old_logprob[[0, 2]], **CLOSE)
    assert part.reward_metrics["reward/python/invalid"] == 1


def test_a_rollout_whose_responses_are_all_skipped_is_an_error(policy, tokenizer):
    with pytest.raises(RewardError, match="'python' skipped all 3 responses"):
        collect(policy, [], scores_in_turn(None, None, None), examples(), tokenizer=tokenizer)


def test_a_skipped_response_leaves_its_group_smaller(policy, tokenizer):
    reward = scores_in_turn(1.0, None, 3.0, 4.0, None, None)
    rollout = collect(policy, [], reward, examples(), tokenizer=tokenizer, samples_per_prompt=2)
    assert rollout.group.tolist() == [0, 1, 1]
    assert rollout.score.tolist() == [1.0, 3.0, 4.0]


def test_the_log_probs_of_a_skipped_response_are_left_out_with_it(policy, tokenizer):
    rollout = collect(policy, [], scores_in_turn(1.0, None, 3.0), examples(), tokenizer=tokenizer)
    torch.testing.assert_close(rollout.sampling_logprob, rollout.old_logprob, atol=1e-5, rtol=0)


def test_every_prompt_is_answered_as_often_as_asked(policy, tokenizer):
    rollout = rolled(policy, [], tokenizer, samples_per_prompt=3)
    assert rollout.prompts == ("prompt 0",) * 3 + ("prompt 1",) * 3 + ("prompt 2",) * 3
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(rollout.responses)) > 3


def test_group_and_sampling_log_probs_go_with_their_rows_and_device(policy, tokenizer):
    rollout = rolled(policy, [], tokenizer, samples_per_prompt=2)
    rows = torch.tensor([5, 0, 3])
    assert rollout[rows].group.tolist() == [2, 0, 1]
    assert torch.equal(rollout[rows].sampling_logprob, rollout.sampling_logprob[rows])
    moved = rollout.to("meta")
    assert moved.group.is_meta
    assert moved.sampling_logprob.is_meta


def test_log_probs_of_plain_sampling_are_the_old_ones(policy, tokenizer):
    rollout = rolled(policy, [], tokenizer, sampling=SamplingConfig(max_new_tokens=24, temperature=0.7))
    assert rollout.mask.sum() > 20
    torch.testing.assert_close(rollout.sampling_logprob, rollout.old_logprob, atol=1e-5, rtol=0)


@pytest.mark.parametrize("restricted", [{"top_k": 3}, {"top_p": 0.5}])
def test_log_probs_of_restricted_sampling_are_larger_than_the_old_ones(policy, tokenizer, restricted):
    rollout = rolled(policy, [], tokenizer, sampling=SamplingConfig(max_new_tokens=24, temperature=1.3, **restricted))
    assert (rollout.sampling_logprob > rollout.old_logprob)[rollout.mask].all()


def test_the_reward_reads_a_hint_together_with_the_response(policy, tokenizer):
    seen = []
    reward = make_reward(lambda response: seen.append(response) or 0.0)
    prompt = tuple(tokenizer.convert_tokens_to_ids(["the", "good", "sad"]))
    hinted = [Encoded(prompt, (-100,) * 3, prompt, "the", "good sad happy", {}, num_hint=n) for n in (0, 2)]
    rollout = collect(policy, [], reward, hinted, tokenizer=tokenizer, sampling=SamplingConfig(max_new_tokens=4))
    own = tokenizer.batch_decode([ids[3:][m] for ids, m in zip(rollout.input_ids, rollout.mask, strict=True)])
    assert seen == list(rollout.responses)
    assert (seen[0], seen[1]) == (own[0], f"good sad {own[1]}")


def test_the_reward_sees_response_target_prompt_and_row(policy, tokenizer):
    seen = []

    def reward(responses, targets, prompts, items):
        seen.extend(zip(targets, prompts, (item["row"] for item in items), strict=True))
        return [0.0] * len(responses)

    collect(policy, [], make_reward(reward), examples(), tokenizer=tokenizer)
    assert seen == [(f"target {i}", f"prompt {i}", i) for i in range(3)]


def test_a_prompt_without_room_for_the_answer_is_refused(policy, tokenizer):
    with pytest.raises(InputError, match="leaves no room"):
        rolled(policy, [], tokenizer, sampling=SamplingConfig(max_new_tokens=62))


def test_responses_longer_than_the_context_are_refused(policy):
    given = from_lists([[5] * 10], [[6] * 60], [1.0], eos_ids=[2])
    with pytest.raises(InputError, match="context is 64"):
        assemble(policy, [], *given)


def test_dropout_is_off_whatever_mode_the_policy_was_in(tokenizer):
    policy = Policy(tiny_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5))
    policy.train()
    first = rolled(policy, [], tokenizer).old_logprob
    policy.train()
    assert torch.equal(rolled(policy, [], tokenizer).old_logprob, first)


def score_cases():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    return torch.tensor([3.0, -5.0]), mask, torch.tensor([True, False])


def test_scores_are_scaled_clipped_and_then_charged_for_a_missing_eos():
    score, mask, ended = score_cases()
    shaped = shaped_score(score, mask, ended, ScoreConfig(scale=0.5, clip=2.0, missing_eos_penalty=1.0))
    assert shaped.tolist() == [1.5, -3.0]


def test_whitened_scores_have_mean_zero_and_variance_one():
    score, mask, ended = score_cases()
    shaped = shaped_score(score, mask, ended, ScoreConfig(whiten=True))
    torch.testing.assert_close(shaped, torch.tensor([1.0, -1.0]) / 2**0.5)


def test_the_penalty_of_per_token_scores_falls_on_the_last_token():
    _, mask, ended = score_cases()
    shaped = shaped_score(torch.ones(2, 3) * mask, mask, ended, ScoreConfig(missing_eos_penalty=2.0))
    assert shaped.tolist() == [[1, 1, 0], [1, 1, -1]]


def test_rows_with_the_same_query_are_one_group_whatever_their_padding(policy):
    # 0 is what the padding is filled with, and may be a token.
    given = from_lists([[5, 6], [0, 5], [5], [5, 6], [5]], [[7]] * 5, [1.0] * 5, eos_ids=[2])
    group = assemble(policy, [], *given).group.tolist()
    assert (group[0] == group[3], group[2] == group[4], len(set(group))) == (True, True, 3)


def test_log_probs_that_are_given_stand_beside_their_tokens(policy):
    drawn = [[-1.0, -2.0], torch.tensor([-3.0])]
    given = from_lists([[5], [6]], [[7, 8], [9]], [1.0, 2.0], eos_ids=[2], logprobs=drawn)
    assert assemble(policy, [], *given).sampling_logprob.tolist() == [[-1.0, -2.0], [-3.0, 0.0]]


def test_without_given_log_probs_a_rollout_knows_none(policy):
    assert assemble(policy, [], *from_lists([[5]], [[7]], [1.0], eos_ids=[2])).sampling_logprob is None


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        ([[-1.0]], "as many logprobs as responses, 2, got 1"),
        ([[-1.0], [-1.0]], r"logprobs\[0\] must be one per token of responses\[0\] \(2,\)"),
        ([[-1.0, float("-inf")], [-1.0]], r"logprobs\[0\] must be finite"),
    ],
)
def test_log_probs_that_do_not_fit_are_refused(logprobs, message):
    with pytest.raises(InputError, match=message):
        from_lists([[5], [6]], [[7, 8], [9]], [1.0, 2.0], eos_ids=[2], logprobs=logprobs)


def test_lists_of_responses_give_the_same_rollout_as_collect(policy, other, tokenizer):
    rollout = rolled(policy, [other], tokenizer, kl_coef=0.1)
    queries = [torch.tensor(e.prompt_ids) for e in examples()]
    responses = [ids[mask] for ids, mask in zip(rollout.input_ids[:, 3:], rollout.mask, strict=True)]
    given = from_lists(queries, responses, rollout.score.tolist(), eos_ids=[2])
    again = assemble(policy, [other], *given, temperature=1.3, kl_coef=0.1)
    torch.testing.assert_close(again.reward, rollout.reward, **CLOSE)
    assert torch.equal(again.mask, rollout.mask)
    assert torch.equal(again.ended, rollout.ended)


@pytest.mark.parametrize(
    ("queries", "responses", "scores", "message"),
    [
        ([[5]], [[6], [7]], [1.0], "as many queries as responses"),
        ([[5]], [[]], [1.0], r"responses\[0\]"),
        ([[5]], [[6]], [float("nan")], r"scores\[0\] must be finite"),
        ([[5]], [[6, 7]], [torch.ones(3)], r"scores\[0\] must be one number or one per token"),
    ],
)
def test_lists_that_do_not_fit_are_refused(queries, responses, scores, message):
    ids = [torch.tensor(q, dtype=torch.long) for q in queries], [torch.tensor(r, dtype=torch.long) for r in responses]
    with pytest.raises(InputError, match=message):
        from_lists(*ids, scores, eos_ids=[2])
