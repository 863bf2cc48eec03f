"""Objective tbptt: windows side by side, a state that is carried and is a constant."""

import pytest
import torch
from preference_trainer import trainer_on
from tiny import tiny_model

from hybrid import InputError
from hybrid.core import IGNORE, Batch
from hybrid.mixing import make_strategy
from hybrid.objectives import SFTConfig, sft_batch_loss

LONG = [{"text": " ".join(f"w{(7 * i + i * i) % 60}" for i in range(40))}]
SEVERAL = [{"text": " ".join(f"w{(5 * n + i * i) % 60}" for i in range(9 + n))} for n in range(5)]
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64


def learner(tokenizer, rows=LONG, cell="lstm", **settings):
    """A trainer in float64 on an LSTM, or another model, whose training data are the texts."""
    model = tiny_model(cell, std=0.4, seed=1).double()
    return trainer_on(tokenizer, rows, model=model, objectives={"tbptt": {"streams": 1, "window": 8} | settings})


def nll(trainer, windows):
    """The sum over a window's tokens, and its gradient."""
    objective = trainer.objectives["tbptt"]
    trainer.policy.zero_grad(set_to_none=True)
    loss, _ = objective.loss_of(windows)(windows)
    loss.backward()
    return float(loss.detach()) * windows.num_tokens


def gradient(policy):
    return torch.cat([p.grad.flatten() for p in policy.backbone.parameters() if p.grad is not None])


def whole_nll(trainer, example):
    """The same of a text in one forward."""
    ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), labels)
    loss, _ = sft_batch_loss(trainer.policy, batch, SFTConfig())
    return float(loss.detach()) * batch.num_tokens


@pytest.mark.parametrize("cell", ["lstm", "gru", "slots"])
def test_a_texts_windows_have_the_loss_that_it_has_in_one_piece(cell, tokenizer):
    trainer = learner(tokenizer, cell=cell)
    (text,) = trainer.corpus.train
    assert len(text.input_ids) == 41
    rows, total = trainer.objectives["tbptt"].rows(), 0.0
    for _ in range(5):
        windows = next(rows)
        total += nll(trainer, windows)
    assert windows.batch.input_ids[0, -1] == tokenizer.eos_token_id
    assert total == pytest.approx(whole_nll(trainer, text), rel=1e-10)


def test_without_the_carried_state_the_loss_is_another(tokenizer):
    trainer = learner(tokenizer)
    objective, rows = trainer.objectives["tbptt"], trainer.objectives["tbptt"].rows()
    nll(trainer, next(rows))
    second = next(rows)
    carried = nll(trainer, second)
    objective._before = None
    assert abs(nll(trainer, second) - carried) > 1e-3


def test_the_gradient_stops_at_the_windows_beginning(tokenizer):
    trainer = learner(tokenizer)
    rows, backbone = trainer.objectives["tbptt"].rows(), trainer.policy.backbone
    nll(trainer, next(rows))
    nll(trainer, windows := next(rows))
    ours = gradient(trainer.policy)
    ids = torch.tensor([trainer.corpus.train[0].input_ids])
    one = torch.ones(1, 8, dtype=torch.long)
    for detached in (True, False):
        _, state = backbone.carried(ids[:, :8], one)
        if detached:
            state = state.map(torch.Tensor.detach)
        hidden, _ = backbone.carried(ids[:, 8:16], one, state)
        logprob = (hidden @ backbone.head_weight.T).log_softmax(-1)
        trainer.policy.zero_grad(set_to_none=True)
        (-logprob.gather(2, ids[:, 9:17].unsqueeze(2)).sum() / windows.num_tokens).backward()
        same = torch.allclose(gradient(trainer.policy), ours, rtol=1e-8, atol=1e-10)
        assert same == detached


def test_streams_read_all_texts_side_by_side_and_start_anew_with_each(tokenizer):
    trainer = learner(tokenizer, SEVERAL, streams=3, window=4)
    objective, texts = trainer.objectives["tbptt"], trainer.corpus.train
    rows, read, hidden = objective.rows(), [[], [], []], [[], [], []]
    num_windows = (sum(len(e.input_ids) for e in texts) - 1) // 3 // 4
    for number in range(num_windows):
        windows = next(rows)
        before = objective._before
        assert (before is None) == (number == 0)
        of, _ = trainer.policy.backbone.carried(
            windows.batch.input_ids[:, :-1], windows.batch.attention_mask[:, :-1], before
        )
        nll(trainer, windows)
        for stream in range(3):
            read[stream] += windows.batch.input_ids[stream, :-1].tolist()
            hidden[stream] += list(of[stream].detach())
    order = [token for stream in read for token in stream]
    alone = {}
    for e in texts:
        ids = torch.tensor([e.input_ids])
        states = trainer.policy.backbone(ids, torch.ones_like(ids)).detach()[0]
        alone |= {e.input_ids[: n + 1]: states[n] for n in range(len(e.input_ids))}
    checked = 0
    for stream in range(3):
        for place in range(len(read[stream])):
            # Back to the text's beginning, where it lies in this stream.
            ends = [i for i in range(place) if read[stream][i] == tokenizer.eos_token_id]
            start = ends[-1] + 1 if ends else 0
            known = alone.get(tuple(read[stream][start : place + 1]))
            if known is not None:
                torch.testing.assert_close(hidden[stream][place], known, **EXACT)
                checked += 1
    assert checked > 20 and len(order) == 3 * 4 * num_windows


def test_nothing_predicts_a_texts_first_token(tokenizer):
    trainer = learner(tokenizer, SEVERAL, streams=2, window=20)
    windows = next(trainer.objectives["tbptt"].rows())
    after_eos = windows.batch.input_ids[:, :-1] == tokenizer.eos_token_id
    assert after_eos.any() and (windows.batch.labels[:, 1:][after_eos] == IGNORE).all()
    assert windows.num_tokens == 2 * 20 - int(after_eos.sum())


def test_epochs_are_shuffled_anew_and_start_from_no_state(tokenizer):
    trainer = learner(tokenizer, SEVERAL, streams=1, window=10)
    objective, rows = trainer.objectives["tbptt"], trainer.objectives["tbptt"].rows()
    epochs = []
    for _ in range(2):
        ids = []
        for number in range(objective._num_windows):
            windows = next(rows)
            assert (objective._before is None) == (number == 0)
            nll(trainer, windows)
            ids += windows.batch.input_ids[0].tolist()
        epochs.append(ids)
    assert epochs[0] != epochs[1]


def test_the_state_is_in_what_is_saved_and_without_it_the_next_loss_is_another(tokenizer):
    first, second, third = (learner(tokenizer) for _ in range(3))
    rows = first.objectives["tbptt"].rows()
    for _ in range(2):
        nll(first, next(rows))
    state = first.objectives["tbptt"].state_dict()
    second.objectives["tbptt"].load_state_dict(state)
    third.objectives["tbptt"].load_state_dict(state | {"state": None})
    wanted = nll(first, next(rows))
    losses = [nll(trainer, next(trainer.objectives["tbptt"].rows())) for trainer in (second, third)]
    assert losses[0] == wanted and abs(losses[1] - wanted) > 1e-3


def test_rows_by_hand_go_on_from_the_streams(tokenizer):
    trainer = learner(tokenizer, SEVERAL, streams=2)
    assert trainer.batch_step({"tbptt": 1.0}, {"tbptt": SEVERAL[:2]})["nll"] > 0
    with pytest.raises(InputError, match="has 2 streams, got 3 rows"):
        trainer.batch_step({"tbptt": 1.0}, {"tbptt": SEVERAL[:3]})


def test_a_run_of_it_learns_a_long_text_by_heart(tokenizer):
    trainer = trainer_on(
        tokenizer, LONG, model=tiny_model("lstm", seed=1), optimizer={"lr": 2e-2},
        objectives={"tbptt": {"streams": 2, "window": 5}},
    )  # fmt: skip
    trainer.strategy = make_strategy({"strategy": "objective", "objective": "tbptt", "steps": 120})
    before = whole_nll(trainer, trainer.corpus.train[0])
    trainer.train()
    assert whole_nll(trainer, trainer.corpus.train[0]) < 0.3 * before


def test_what_cannot_be_carried_is_refused(tokenizer):
    with pytest.raises(InputError, match="LlamaForCausalLM has none to carry"):
        learner(tokenizer, cell="llama").objectives["tbptt"]
    with pytest.raises(InputError, match="have 41 tokens, too few for 8 streams with a window of 64"):
        next(learner(tokenizer, streams=8, window=64).objectives["tbptt"].rows())
    for setting, message in (({"streams": 0}, "streams must be >= 1, got 0"), ({"window": 1}, "window must be >= 2")):
        with pytest.raises(InputError, match=f"objectives.tbptt: {message}"):
            learner(tokenizer, **setting)
