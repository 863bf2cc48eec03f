"""The loop: supervised and PPO steps on one policy, with one optimizer."""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.config import HybridConfig
from hybrid.core import Batch, InputError, Rollout
from hybrid.data import Loader
from hybrid.evaluate import evaluate_rewards, evaluate_sft
from hybrid.loop import Progress, run
from hybrid.mixing import Sequential, Strategy, make_strategy
from hybrid.models import Policy
from hybrid.resume import load_checkpoint, resumable, write_checkpoint
from hybrid.rewards import make_reward
from hybrid.rollout import (
    Ids,
    SamplingConfig,
    assemble,
    collect,
    from_lists,
    kl_controller,
    respond,
    response_texts,
)
from hybrid.run import filled_folder, open_run_folder
from hybrid.setup import (
    ReferenceLike,
    build_loaders,
    build_policy,
    build_references,
    encoded_corpus,
    load_tokenizer,
    model_context,
    random_streams,
    read_examples_of,
    resolved,
)
from hybrid.steps import (
    Divisors,
    Updater,
    minibatches,
    over_updates,
    ppo_batch_loss,
    rollout_metrics,
    sft_batch_loss,
    split,
    with_advantages,
)

__all__ = ["HybridTrainer"]

Metrics = dict[str, float]


class HybridTrainer:
    """Supervised fine-tuning and PPO on one language model. Owns the policy, its optimizer and its references.

        trainer = HybridTrainer("gpt2", train_data="reviews.jsonl", reward=my_function)
        trainer.train()

    or, by hand:

        for batch in trainer.loader:                # endless
            trainer.sft_step(batch)
            rollout = trainer.rollout(batch)
            trainer.ppo_step(rollout)

    policy_or_name: a `Policy`, a transformers model, or a model's folder or hub name; the config's where None.
    tokenizer: the model's own where None.
    train_data, eval_data: a file, a hub name, a datasets.Dataset or a list of dicts; the config's where None.
    reward: a spec, a function or a `Reward`; the config's where None.
    reference: a `Reference`, a policy to copy, a model's name, or several; the config's (a frozen copy of the
        policy) where None.
    Everything that can be refused is refused before a model is loaded (InputError).
    Seeds torch's global generator with `config.run.seed`.
    """

    def __init__(
        self,
        policy_or_name: Policy | nn.Module | str | Path | None = None,
        tokenizer: Any = None,
        train_data: Any = None,
        reward: Any = None,
        config: HybridConfig | None = None,
        eval_data: Any = None,
        reference: ReferenceLike | Sequence[ReferenceLike] | None = None,
    ):
        config = resolved(config or HybridConfig(), policy_or_name, train_data, eval_data, reward)
        source = config.model.name if policy_or_name is None else policy_or_name
        if source is None:
            raise InputError("HybridTrainer needs a model: give policy_or_name, or the config's model.name")
        torch.manual_seed(config.run.seed)
        self.strategy = make_strategy(config.mixing)
        self.reward = None if config.reward is None else make_reward(config.reward)
        self.folder = None if config.run.output is None else open_run_folder(config.run.output)
        examples = read_examples_of(config, train_data, eval_data)
        context = model_context(source)
        self.tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
        self.corpus = encoded_corpus(config, self.tokenizer, *examples, context=context)
        # A bare prompt goes through the template that the data's prompts went through, in later commands too.
        self.config = replace(config, data=replace(config.data, template=self.corpus.prompt_template))
        for other in config.references:
            if other.model is not None and reference is None:
                model_context(other.model)
        self.policy = build_policy(source, config.model)
        if config.sft.packing:
            self.policy.backbone.check_packing()
        self.references = build_references(reference, config.references, self.policy)
        if self.reward is not None:
            self.reward.setup(self.policy.device)
        self.updater = Updater(
            self.policy,
            config.optimizer,
            config.scheduler,
            config.gradient,
            num_updates=self.num_updates(self.strategy),
        )
        self.kl = kl_controller(config.kl)
        self.sampler, self.shuffler, self.speaker = random_streams(config.run.seed, self.policy.device)
        self._loaders: tuple[Loader, Loader] | None = None
        self.num_steps = 0  # of the loop, SFT and PPO steps together
        self._left: tuple[Strategy, Progress] | None = None  # of a resumed run

    # The loop

    def train(self, epochs: float | None = None) -> Metrics:
        """Run the configured mixture, for `epochs` passes over the data where given. Returns the last evaluation.

        Of a resumed run this is what it had left.
        """
        if self._left is not None:
            left, self._left = self._left, None
            return run(self, *left)
        if epochs is None:
            return run(self, self.strategy)
        return run(self, self.strategy.for_epochs(epochs, *self._steps_per_epoch()))

    def run_training(self, supervised_epochs: float = 1, rl_epochs: float = 1) -> Metrics:
        """SFT for some passes over the examples, then PPO for some passes over their prompts."""
        sft_steps, ppo_steps = self._steps_per_epoch()
        return run(self, Sequential(math.ceil(supervised_epochs * sft_steps), math.ceil(rl_epochs * ppo_steps)))

    @classmethod
    def resume(cls, folder: str | Path, **given: Any) -> "HybridTrainer":
        """The trainer of a run that was stopped or killed, as its newest whole checkpoint has it.

            HybridTrainer.resume("runs/reviews").train()

        takes the steps that the run had left, and the same ones. Broken checkpoints are skipped with a warning.
        given: what the run was given in code and its config.yaml cannot hold: train_data, reward, reference ...
        Raises InputError where there is no run or no whole checkpoint.
        """
        folder = Path(folder)
        config, checkpoint = resumable(folder)
        # The folder holds a run, which a new one would be refused.
        trainer = cls(config=replace(config, run=replace(config.run, output=None, trackers=())), **given)
        trainer.config = replace(trainer.config, run=config.run)
        trainer.folder = folder
        state = load_checkpoint(trainer, checkpoint)["progress"]
        spec = state.pop("strategy")
        trainer._left = (trainer.strategy if spec is None else make_strategy(spec)), Progress(**state)
        return trainer

    # The steps

    def sft_step(self, batch: Batch | Sequence[Any]) -> Metrics:
        """One supervised optimizer step on a batch (or on examples as in `train_data`)."""
        began = time.perf_counter()
        config = self.config.sft
        batch = self.corpus.batch(batch).to(self.policy.device)
        if not batch.num_tokens:
            raise InputError("sft_step: the batch has no target token to train on")
        self.policy.train()
        loss_of = partial(sft_batch_loss, self.policy, config=config, num_tokens=batch.num_tokens)
        metrics = self._update(split(batch, config.microbatch_size), loss_of, config.lr_factor)
        return {
            **metrics,
            "perplexity": math.exp(min(metrics["nll"], 700.0)),
            "num_tokens": float(batch.num_tokens),
            "tokens_per_second": int(batch.attention_mask.bool().sum()) / (time.perf_counter() - began),
        }

    def rollout(self, prompts: Batch | Sequence[Any]) -> Rollout:
        """Answer the prompts (a batch, texts, or examples as in `train_data`) and score the answers."""
        if self.reward is None:
            raise InputError("PPO needs a reward: give HybridTrainer(reward=...) or the config's `reward`")
        if not self.config.sampling.temperature:
            raise InputError("a rollout needs sampling.temperature > 0: PPO learns from what was drawn")
        with self.autocast():
            return collect(
                self.policy,
                self.references,
                self.reward,
                self.corpus.encoded(prompts),
                tokenizer=self.tokenizer,
                sampling=self.config.sampling,
                generator=self.sampler,
                **self._collect_options(),
            )

    def ppo_step(self, rollout: Rollout) -> Metrics:
        """All PPO epochs over one rollout, then the KL coefficient's update.

        The metrics of the optimizer steps are averaged (`ratio_max`: the maximum, `skipped_updates`: the sum).
        """
        began = time.perf_counter()
        config, kl = self.config.ppo, self.config.kl
        ppo_loss = partial(ppo_batch_loss, kl_loss_coef=self.kl.coef if kl.in_loss else 0.0, kl_kind=kl.kind)
        self.policy.eval()  # dropout off: the ratios compare log-probs
        rollout = with_advantages(rollout, config)
        steps: list[Metrics] = []
        for rows in minibatches(len(rollout), config, self.shuffler):
            minibatch = rollout[rows.to(self.policy.device)]
            divisors = Divisors.of(minibatch, config)
            loss_of = partial(ppo_loss, self.policy, config=config, divisors=divisors)
            steps.append(self._update(split(minibatch, config.microbatch_size), loss_of, config.lr_factor))
            if config.target_kl is not None and steps[-1]["approx_kl"] > config.target_kl:
                break
        metrics = rollout_metrics(rollout) | over_updates(steps) | {"kl_coef": self.kl.coef}
        self.kl.update(metrics["kl"], len(rollout))
        seconds = {**rollout.seconds, "update": time.perf_counter() - began}
        return {
            **metrics,
            **{f"seconds_{part}": taken for part, taken in seconds.items()},
            "tokens_per_second": rollout.num_tokens / sum(seconds.values()),
        }

    def step(
        self,
        queries: Sequence[Ids],
        responses: Sequence[Ids],
        scores: Sequence[float] | Sequence[Tensor] | Tensor,
    ) -> Metrics:
        """Learn from responses that you generated and scored yourself.

        queries, responses: one 1-D id tensor or list of ids each.   scores: a number for each response, or for
        each a tensor with a score per token.
        """
        eos_ids = self.policy.backbone.eos_ids(self.tokenizer)
        given = from_lists(queries, responses, scores, eos_ids=eos_ids, device=self.policy.device)
        with self.autocast():
            rollout = assemble(
                self.policy,
                self.references,
                *given,
                temperature=self.config.sampling.temperature,
                **self._collect_options(),
            )
        return self.ppo_step(rollout)

    # Looking at the policy

    def generate(self, texts: Sequence[str], sampling: SamplingConfig | None = None) -> list[str]:
        """One response for each text, which goes through the data's prompt template first."""
        if isinstance(texts, str):
            raise InputError(f"generate takes a list of texts, got one: [{texts!r}] is a list of one")
        examples, size = [self.corpus.prompt(text) for text in texts], self.config.eval.batch_size
        answers: list[str] = []
        with self.autocast():
            for start in range(0, len(examples), size):
                *_, responses = respond(
                    self.policy, examples[start : start + size], tokenizer=self.tokenizer,
                    sampling=sampling or self.config.sampling, generator=self.speaker,
                )  # fmt: skip
                answers += response_texts(self.tokenizer, responses)
        return answers

    def evaluate(self) -> Metrics:
        """The held-out measures of `hybrid.evaluate`, on the same prompts with the same draws every time."""
        return self.evaluation()[0]

    def evaluation(self) -> tuple[Metrics, list[dict[str, Any]]]:
        """What `evaluate` measures, and the responses that it measured, a row each."""
        config, examples = self.config.eval, self.corpus.eval
        metrics: Metrics = {}
        rows: list[dict[str, Any]] = []
        with self.autocast():
            if examples:
                metrics = evaluate_sft(self.policy, examples[: config.num_examples], batch_size=config.batch_size)
            if examples and self.reward is not None:
                rewards, rows = evaluate_rewards(
                    self.policy, self.references, self.reward, examples[: config.num_prompts],
                    tokenizer=self.tokenizer, sampling=self.config.sampling,
                    batch_size=config.batch_size, seed=config.seed,
                )  # fmt: skip
                metrics |= rewards
        return metrics, rows

    def save(self, folder: str | Path) -> None:
        """Write policy and tokenizer as a plain transformers folder, the value head beside them."""
        self.policy.save_pretrained(folder, tokenizer=self.tokenizer)

    def save_checkpoint(self, folder: str | Path) -> None:
        """Write everything that the next step depends on: weights, optimizer, scheduler, counters, random streams."""
        with filled_folder(folder) as temporary:
            write_checkpoint(self, temporary)

    def load_checkpoint(self, folder: str | Path) -> None:
        """Go on from a checkpoint of a trainer that was made alike; the steps that follow are the same, bit for bit."""
        load_checkpoint(self, Path(folder))

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 computation where `model.precision` says so; the weights keep their dtype."""
        enabled = self.config.model.precision == "bfloat16"
        return torch.autocast(self.policy.device.type, dtype=torch.bfloat16, enabled=enabled)

    # Wiring

    @property
    def loader(self) -> Loader:
        """Endless batches of training examples, for `sft_step` and `rollout`."""
        return self._both_loaders()[0]

    @property
    def prompts(self) -> Loader:
        """Endless batches of `ppo.batch_size` examples, whose prompts `train` rolls out."""
        return self._both_loaders()[1]

    def _both_loaders(self) -> tuple[Loader, Loader]:
        if self._loaders is None:
            self._loaders = build_loaders(self.config, self.corpus)
        return self._loaders

    def _collect_options(self) -> dict[str, Any]:
        """What `collect` and `assemble` take from the config alike."""
        config = self.config
        return {
            "score": config.score,
            "kl_coef": 0.0 if config.kl.in_loss else self.kl.coef,
            "kl_kind": config.kl.kind,
            "microbatch_size": config.ppo.microbatch_size or config.ppo.minibatch_size,
        }

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one optimizer of both phases."""
        return self.updater.optimizer

    def _update(self, microbatches: Sequence[Any], loss_of: Any, lr_factor: float) -> Metrics:
        def autocast_loss(rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
            with self.autocast():
                return loss_of(rows)

        return self.updater(microbatches, autocast_loss, lr_factor=lr_factor)

    def num_updates(self, strategy: Strategy) -> int | None:
        """Optimizer steps of a strategy's run; None where not known."""
        return strategy.num_updates({"sft": 1, "ppo": self.config.ppo.num_updates})

    def _steps_per_epoch(self) -> tuple[int, int]:
        return len(self.loader), len(self.prompts)
