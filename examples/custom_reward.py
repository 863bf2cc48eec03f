"""A reward type of your own among built-in ones, and what a log of it holds.  custom_reward.py"""

from dataclasses import dataclass

from hybrid import make_reward, register_reward
from hybrid.rewards import Reward


@register_reward("hedging")
@dataclass
class Hedging(Reward):
    """The share of the given hedges that the response avoids; 0 to 1."""

    hedges: list[str]

    def _score_one(self, response, target, prompt, item):
        return 1 - sum(hedge in response.lower() for hedge in self.hedges) / len(self.hedges)


def main() -> None:
    reward = make_reward(
        {
            "type": "product",
            "components": [
                {"type": "hedging", "hedges": ["maybe", "perhaps"]},
                {"type": "jaccard", "name": "agreement"},
                # Any function will do, of one sample or of a batch.
                lambda response: float(response.endswith(".")),
            ],
        }
    )
    responses = ["Paris is the capital.", "Perhaps Paris, maybe Rome.", "Paris"]
    output = reward.score(responses, [["Paris is the capital.", "The capital is Paris."]] * 3)
    for response, score in zip(responses, output, strict=True):
        print(f"{score:.2f}  {response}")
    for name, value in output.metrics().items():
        if name.endswith("raw_mean"):
            print(f"{name} = {value:.2f}")


if __name__ == "__main__":
    main()
