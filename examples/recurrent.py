"""An LSTM learns a text by truncated back-propagation, then PPO makes it cheerful.  recurrent.py TEXT FOLDER [CELL]"""

import sys
from pathlib import Path

import hybrid
from hybrid.demo import demo_tokenizer
from hybrid.models import new_recurrent


def main(text: str, folder: str, cell: str = "lstm", updates: int = 300, iterations: int = 10) -> None:
    speeches = [{"text": speech} for speech in Path(text).read_text("utf-8").split("\n\n") if speech.strip()]
    tokenizer = demo_tokenizer((row["text"] for row in speeches), vocab_size=512)
    fresh = new_recurrent(Path(folder) / "fresh", tokenizer, cell=cell, hidden_size=192, tie_word_embeddings=True)
    # A recurrent model has no longest text: none is left out for its length.
    data = {"text": "text", "max_length": 100_000}

    config = {"data": data, "objectives": {"tbptt": {"streams": 16, "window": 48}}, "optimizer": {"lr": 4e-3}}
    trainer = hybrid.HybridTrainer(fresh, train_data=speeches, config=hybrid.HybridConfig.from_dict(config))
    for number in range(updates):
        metrics = trainer.batch_step({"tbptt": 1.0})
        if number % 50 == 0 or number == updates - 1:
            print(f"update {number + 1}: perplexity {metrics['perplexity']:.1f}", flush=True)
    trainer.save(Path(folder) / "taught")

    # Held close to the model that the text has made.
    config = {"data": data, "sampling": {"max_new_tokens": 24}, "ppo": {"batch_size": 16}, "optimizer": {"lr": 5e-4}}
    trainer = hybrid.HybridTrainer(
        Path(folder) / "taught", train_data=speeches, reward={"type": "sentiment_lexicon"},
        config=hybrid.HybridConfig.from_dict(config),
    )  # fmt: skip
    for number in range(iterations):
        metrics = trainer.ppo_step(trainer.rollout(next(trainer.prompts)))
        print(f"PPO {number + 1}: reward {metrics['reward']:.2f}  KL {metrics['kl']:.3f}", flush=True)
    print(trainer.generate(["First Citizen:"])[0])
    trainer.save(Path(folder) / "cheerful")


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:6]))
