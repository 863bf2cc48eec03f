"""What processes that step parts of weights cannot do is refused before a model is loaded."""

import pytest

from hybrid import HybridConfig, InputError
from hybrid.distributed import ALONE, World
from hybrid.rewards import make_reward
from hybrid.setup import check_world


class Cut(World):
    """As FSDP2 and ZeRO are to those who ask."""

    cuts, whole = True, False

    def __init__(self, engine):
        self.engine, self.size = engine, 2


SELF_PLAY = {"type": "self_play", "reward": {"type": "length_window", "min": 1, "max": 2}}
GRADIENT = {"type": "mixture", "controller": "gradient",
            "components": [{"type": "length_window", "min": 1, "max": 2}, {"type": "diversity", "n": 2}]}  # fmt: skip
REFUSED = [
    ({"model": {"precision": "float16"}}, "model.precision float16"),
    ({"model": {"compile": True}}, "model.compile"),
    ({"reward": SELF_PLAY}, "self_play against itself"),
    ({"reward": {"type": "weighted_sum", "components": [SELF_PLAY]}}, "self_play against itself"),
    ({"reward": GRADIENT}, "mixture's controllers gradient"),
]


def check(sections, world):
    config = HybridConfig.from_dict(sections)
    check_world(config, world, None if config.reward is None else make_reward(config.reward))


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
@pytest.mark.parametrize(("sections", "said"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_parts_of_weights_are_refused_what_needs_whole_ones(sections, said, engine):
    with pytest.raises(InputError, match=f"distributed.engine {engine} .*{said}.* ddp"):
        check(sections, Cut(engine))
    check(sections, ALONE)


@pytest.mark.parametrize(
    ("engine", "name"),
    [("fsdp2", "adafactor"), ("deepspeed", "adafactor"), ("fsdp2", "sgd_32bit"), ("deepspeed", "sgd_8bit"),
     ("deepspeed", "adagrad")],
)  # fmt: skip
def test_parts_of_weights_are_refused_optimizers_that_do_not_step_them(engine, name):
    config = {"optimizer": {"NAME": name, "momentum": 0.9}}
    with pytest.raises(InputError, match=f"optimizer '{name}' .* distributed.engine {engine} .*: adamw, "):
        check(config, Cut(engine))
    check(config, ALONE)


def test_weights_in_bfloat16_go_with_fsdp2_and_not_with_zero():
    check({"model": {"dtype": "bfloat16"}}, Cut("fsdp2"))
    with pytest.raises(InputError, match=r"model\.dtype bfloat16"):
        check({"model": {"dtype": "bfloat16"}}, Cut("deepspeed"))


def test_a_named_opponent_and_a_mixture_by_a_metric_need_no_weights(stories):
    check({"reward": {**SELF_PLAY, "opponent": stories}}, Cut("fsdp2"))
    check({"reward": {**GRADIENT, "controller": "balance"}}, Cut("fsdp2"))
