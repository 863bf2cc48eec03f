"""The recurrent models against loops of their formulas, and what a state must and must not see."""

from importlib.metadata import version

import pytest
import recurrent_loops
import torch
from tiny import CELLS, tiny_model

from hybrid.models.recurrent.configuration_recurrent import RecurrentConfig
from hybrid.models.recurrent.modeling_recurrent import RecurrentForCausalLM

SETTINGS = {**CELLS, "gru_slots": {**CELLS["slots"], "cell": "gru"}}
EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64
every_cell = pytest.mark.parametrize("cell", SETTINGS)


def model_of(cell, **options):
    return tiny_model("lstm", std=0.4, hidden_size=8, vocab_size=20, **{**SETTINGS[cell], **options}).double()


def states(out):
    return [x for layer in out.state.layers for x in layer]


@pytest.fixture
def ids():
    return torch.randint(3, 20, (3, 7), generator=torch.Generator().manual_seed(0))


@every_cell
@torch.no_grad()
def test_hidden_states_are_those_of_a_loop_over_the_formulas(cell, ids):
    model = model_of(cell)
    ours = model.model(ids[:2]).last_hidden_state
    for row in range(2):
        torch.testing.assert_close(ours[row], recurrent_loops.hidden_states(model, ids[row].tolist()), **EXACT)


@every_cell
@torch.no_grad()
def test_a_padded_token_moves_no_state_wherever_it_stands(cell, ids):
    model = model_of(cell)
    alone = [model.model(ids[row : row + 1, :4], use_cache=True) for row in range(3)]
    rows, mask = torch.full((3, 6), 9), torch.zeros(3, 6, dtype=torch.bool)
    for row, columns in enumerate(([2, 3, 4, 5], [0, 1, 2, 3], [0, 2, 3, 5])):
        rows[row, columns], mask[row, columns] = ids[row, :4], True
    together = model.model(rows, mask, use_cache=True)
    for row in range(3):
        torch.testing.assert_close(together.last_hidden_state[row][mask[row]], alone[row].last_hidden_state[0], **EXACT)
        for ours, theirs in zip(states(together), states(alone[row]), strict=True):
            torch.testing.assert_close(ours[row], theirs[0], **EXACT)
    assert together.last_hidden_state[~mask].eq(0).all()
    unmasked = model.model(rows, use_cache=True)  # the control: here the padding is read
    assert not torch.allclose(states(unmasked)[0], states(together)[0], atol=1e-3)


@every_cell
@torch.no_grad()
def test_a_state_goes_on_token_by_token_or_in_pieces_behind_padding(cell, ids):
    model, mask = model_of(cell), torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    whole = model.model(ids, mask, use_cache=True)
    for pieces in ([2, 3, 2], [1] * 7):
        state, hidden = None, []
        for piece, of_mask in zip(ids.split(pieces, 1), mask.split(pieces, 1), strict=True):
            out = model.model(piece, of_mask, state=state, use_cache=True)
            state = out.state
            hidden.append(out.last_hidden_state)
        torch.testing.assert_close(torch.cat(hidden, 1), whole.last_hidden_state, **EXACT)
        for ours, theirs in zip(states(out), states(whole), strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
        assert state.seen == 7


@every_cell
@torch.no_grad()
def test_the_first_segment_goes_on_and_the_others_start_anew(cell, ids):
    model = model_of(cell)
    before = model.model(ids[:1, :3], use_cache=True).state
    segments = torch.tensor([[1, 1, 2, 2, 3, 3, 3]])
    packed = model.model(ids[:1], segments, state=before, use_cache=True)
    went_on = model.model(ids[:1, :2], state=before).last_hidden_state
    torch.testing.assert_close(packed.last_hidden_state[:, :2], went_on, **EXACT)
    for start, end in ((2, 4), (4, 7)):
        alone = model.model(ids[:1, start:end], use_cache=True)
        torch.testing.assert_close(packed.last_hidden_state[:, start:end], alone.last_hidden_state, **EXACT)
    for ours, theirs in zip(states(packed), states(alone), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    fresh = model.model(ids[:1, :2]).last_hidden_state
    assert not torch.allclose(fresh, went_on, atol=1e-3)


@every_cell
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generate_takes_the_state_and_gives_what_whole_forwards_give(cell, how, ids):
    if "num_beams" in how and version("transformers").startswith("5.0."):
        pytest.skip("transformers 5.0 reorders no state in beam search, and we refuse it")
    model, mask = model_of(cell), torch.ones_like(ids)
    mask[0, :3] = 0
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        answers.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **how))
    assert torch.equal(*answers) and answers[0].shape[1] > 8
    if not how:  # greedy: the padded prompt's answer is that of the prompt alone
        alone = model.generate(ids[:1, 3:], attention_mask=mask[:1, 3:], max_new_tokens=8)
        assert answers[0][0, 3 : 3 + alone.shape[1]].tolist() == alone[0].tolist()


def test_beams_that_would_mix_up_their_states_are_refused(ids, monkeypatch):
    from transformers.generation import utils

    monkeypatch.setattr(utils, "ALL_CACHE_NAMES", ["past_key_values"], raising=False)  # as transformers 5.0
    model = model_of("lstm")
    with pytest.raises(ValueError, match="does not reorder a recurrent model's state"):
        model.generate(ids, num_beams=2, max_new_tokens=2)
    assert model.generate(ids, num_beams=2, max_new_tokens=2, use_cache=False).shape[1] > 7


@every_cell
def test_generate_goes_on_from_a_state_that_is_given(cell, ids):
    model = model_of(cell)
    whole = model.generate(ids, max_new_tokens=5, min_new_tokens=5)
    with torch.no_grad():
        state = model(ids[:, :4], use_cache=True).state
    assert torch.equal(model.generate(ids, state=state, max_new_tokens=5, min_new_tokens=5), whole)


def test_the_loss_of_labels_is_the_cross_entropy_of_the_next_token(ids):
    model, labels = model_of("lstm"), ids.clone()
    labels[:, :3] = -100
    out = model(ids, labels=labels)
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted, check_dtype=False)
    assert model(ids, logits_to_keep=2).logits.shape == (3, 2, 20)


@every_cell
def test_dropout_acts_in_training_only_and_a_gradient_comes_in_either_mode(cell, ids):
    model = model_of(cell, dropout=0.5)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model(ids).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if cell in ("lstm", "gru"):  # cuDNN's backward asks for it, and PPO trains in eval mode
        assert model.model.layers[0].cell.training and not model.model.training
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)


def test_weights_begin_as_torchs_cells_with_an_open_forget_gate():
    model = RecurrentForCausalLM(RecurrentConfig(hidden_size=16, memory_slots=4, num_hidden_layers=2))
    for cell, end in ((model.model.layers[0].cell, "_l0"), (model.model.layers[1].cell, "")):
        bias, weight = getattr(cell, "bias_ih" + end), getattr(cell, "weight_hh" + end)
        assert bias.tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 32
        assert getattr(cell, "bias_hh" + end).eq(0).all() and 0.2 < weight.abs().max() <= 0.25
    tied = RecurrentForCausalLM(RecurrentConfig(hidden_size=16, tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("cell", CELLS)
def test_a_saved_model_is_the_same_again(cell, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    model = model_of(cell)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is RecurrentForCausalLM
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **EXACT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cell": "rnn"}, "cell must be one of lstm, gru, got 'rnn'"),
        ({"hidden_size": 0}, "hidden_size must be >= 1, got 0"),
        ({"memory_slots": 2}, r"memory_slots must be 0 \(no memory\) or >= 3, got 2"),
        ({"dropout": 1.0}, "dropout must lie in"),
    ],
)
def test_what_cannot_be_built_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RecurrentConfig(**settings)


def test_a_mask_of_another_shape_and_two_kinds_of_input_are_refused(ids):
    model = model_of("lstm").model
    with pytest.raises(ValueError, match=r"attention_mask must be \(3, 7\)"):
        model(ids, torch.ones(3, 9))
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=torch.zeros(3, 7, 8))


def test_weights_that_are_loaded_are_not_begun_anew(tmp_path):
    model = RecurrentForCausalLM(RecurrentConfig(vocab_size=9, hidden_size=8, memory_slots=4, memory_width=3))
    interface = model.model.layers[-1].interface
    assert interface.bias[3] == 4.0 and torch.equal(interface.weight[:3], interface.weight[21:24])
    with torch.no_grad():
        interface.bias.fill_(7.0)
        interface.weight[:3] = 1.0
    model.save_pretrained(tmp_path)
    again = RecurrentForCausalLM.from_pretrained(tmp_path).model.layers[-1].interface
    assert torch.equal(again.bias, interface.bias) and torch.equal(again.weight, interface.weight)
