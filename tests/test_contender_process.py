"""Contenders that take turns: what is measured, and what becomes of one that does other work or ends."""

import pytest

from benchmarks.contender_process import Failed, by_turns
from benchmarks.contenders.protocol import RolloutJob

JOB = RolloutJob("model", [[1, 2], [3, 4]], response_length=2, device="cpu", engine="ours", precision="float32")


class Process:
    """A contender that gives these answers, one for each round."""

    def __init__(self, name, *answers):
        self.name, self.job, self.answers = name, JOB, iter(answers)

    def iteration(self):
        answer = next(self.answers)
        if isinstance(answer, Failed):
            raise answer
        return answer


GOOD = {"counts": JOB.counts, "seconds": {"all": 1.0}}


def test_the_first_round_is_not_measured():
    assert by_turns([Process("ours", {**GOOD, "seconds": {"all": 9.0}}, GOOD, GOOD)], 2, 1e9) == {"ours": [GOOD, GOOD]}


def test_a_contender_that_makes_fewer_tokens_ends_the_run():
    fewer = {**GOOD, "counts": {**JOB.counts, "tokens": 3}}
    with pytest.raises(SystemExit, match=r"trl-1.12.0 did other work: .*'tokens': 3.*'tokens': 4"):
        by_turns([Process("ours", GOOD), Process("trl-1.12.0", fewer)], 0, 1e9)


def test_a_contender_that_ends_is_left_out_with_its_last_words(capsys):
    ended = Process("trl-1.12.0", GOOD, Failed("out of memory"))
    assert by_turns([Process("ours", GOOD, GOOD), ended], 1, 1e9) == {"ours": [GOOD]}
    assert capsys.readouterr().out == "trl-1.12.0 is left out: out of memory\n"


def test_no_round_begins_that_would_end_after_the_deadline(capsys):
    assert by_turns([Process("ours", GOOD, GOOD, GOOD)], 2, 0.0) == {"ours": [GOOD]}
    assert "stopped after 1 rounds" in capsys.readouterr().out
