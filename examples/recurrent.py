"""An LSTM learns a text by truncated back-propagation, then PPO makes it cheerful.  recurrent.py TEXT FOLDER [CELL]"""

import sys
from pathlib import Path

import hybrid
from hybrid.demo import demo_tokenizer
from hybrid.models import new_recurrent


def main(text: str, folder: str, cell: str = "lstm", updates: int = 300, iterations: int = 5) -> None:
    speeches = [{"text": speech} for speech in Path(text).read_text("utf-8").split("\n\n") if speech.strip()]
    tokenizer = demo_tokenizer((row["text"] for row in speeches), vocab_size=512)
    model = new_recurrent(folder, tokenizer, cell=cell, hidden_size=192, tie_word_embeddings=True)
    config = hybrid.HybridConfig.from_dict(
        {
            # A recurrent model has no longest text: none is left out for its length.
            "data": {"text": "text", "max_length": 100_000, "eval_fraction": 0.05},
            "objectives": {"tbptt": {"streams": 16, "window": 48}},
            "sampling": {"max_new_tokens": 24},
            "ppo": {"batch_size": 16, "minibatch_size": 8},
            "optimizer": {"lr": 4e-3},
            "eval": {"num_prompts": 32},
        }
    )
    trainer = hybrid.HybridTrainer(model, train_data=speeches, reward={"type": "sentiment_lexicon"}, config=config)
    for number in range(updates):
        metrics = trainer.batch_step({"tbptt": 1.0})
        if number % 50 == 0 or number == updates - 1:
            print(f"update {number + 1}: perplexity {metrics['perplexity']:.1f}", flush=True)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-3
    for number in range(iterations):
        metrics = trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
        print(f"PPO {number + 1}: reward {metrics['reward']:.2f}  KL {metrics['kl']:.3f}", flush=True)
    print(trainer.generate(["First Citizen:"])[0])
    trainer.save(Path(folder) / "trained")


if __name__ == "__main__":
    given = sys.argv[1:4]
    main(*given, *map(int, sys.argv[4:6]))
