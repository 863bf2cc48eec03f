"""The loop: supervised and PPO steps on one policy, with one optimizer."""

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor, nn

from hybrid.config import HybridConfig
from hybrid.core import Batch, Encoded, InputError, Rollout
from hybrid.corpus import encoded_corpus
from hybrid.data import Loader
from hybrid.evaluate import evaluate_responses, evaluate_sft
from hybrid.loop import Progress, run
from hybrid.mixing import Sequential, Strategy, make_strategy, passes
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
    Loaders,
    ReferenceLike,
    build_loaders,
    build_models,
    load_tokenizer,
    model_context,
    random_streams,
    read_examples_of,
    resolved,
)
from hybrid.steps import (
    Term,
    Updater,
    autocast,
    check_groups,
    minibatches,
    over_updates,
    ppo_term,
    rollout_metrics,
    sft_term,
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
    tokenizer: the model's own where None; or a model's name.
    train_data, eval_data, ptx_data: a file, a hub name, a datasets.Dataset, a frame, a list of dicts (docs/data.md);
        the config's where None. ptx_data is the second data set, which strategy `ptx` trains on.
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
        ptx_data: Any = None,
    ):
        config = resolved(config, policy_or_name, train_data, eval_data, reward, ptx_data)
        source = config.model.name if policy_or_name is None else policy_or_name
        if source is None:
            raise InputError("HybridTrainer needs a model: give policy_or_name, or the config's model.name")
        torch.manual_seed(config.run.seed)
        self.strategy = make_strategy(config.mixing)
        self.reward = None if config.reward is None else make_reward(config.reward)
        self.folder = None if config.run.output is None else open_run_folder(config.run.output)
        examples = read_examples_of(config, train_data, eval_data, ptx_data, self.reward)
        context = model_context(source)
        self.tokenizer = load_tokenizer(source, tokenizer)
        self.corpus = encoded_corpus(config, self.tokenizer, *examples, context=context)
        # A bare prompt goes through the template that the data's prompts went through, in later commands too.
        self.config = replace(config, data=replace(config.data, template=self.corpus.prompt_template))
        for other in config.references:
            if other.model is not None and reference is None:
                model_context(other.model)
        self.policy, self.references = build_models(source, reference, config, self.tokenizer)
        if self.reward is not None:
            self.reward.setup(self.policy.device)
        self.updater = Updater(
            self.policy, config.optimizer, config.scheduler, config.gradient,
            num_updates=self.num_updates(self.strategy), precision=config.model.precision,
        )  # fmt: skip
        self.kl = kl_controller(config.kl)
        self.sampler, self.shuffler, self.speaker = random_streams(config.run.seed, self.policy.device)
        self.num_steps = 0  # of the loop, SFT and PPO steps together
        self.begun = False  # whether the run in its folder is its own
        self.stopped_by: Signals | None = None  # what ended the last run before its end
        self._left: tuple[Strategy, Progress] | None = None  # of a resumed run

    # The loop

    def train(self, epochs: float | None = None) -> Metrics:
        """Run the configured mixture, for `epochs` passes over the data where given. Returns the last evaluation.

        Of a resumed run this is what it had left, whose length cannot be given.
        """
        if self._left is not None:
            if epochs is not None:
                raise InputError(f"a resumed run takes the steps that it had left: train(), not train({epochs!r})")
            left, self._left = self._left, None
            return run(self, *left)
        if epochs is None:
            return run(self, self.strategy)
        return run(self, self.strategy.for_epochs(passes("epochs", epochs), len(self.loader), len(self.prompts)))

    def run_training(self, supervised_epochs: float = 1, rl_epochs: float = 1) -> Metrics:
        """SFT for some passes over the examples, then PPO for some passes over their prompts."""
        sft = passes("supervised_epochs", supervised_epochs) * len(self.loader)
        ppo = passes("rl_epochs", rl_epochs) * len(self.prompts)
        return run(self, Sequential(math.ceil(sft), math.ceil(ppo)))

    @classmethod
    def resume(cls, folder: str | Path, overrides: Sequence[str] = (), **given: Any) -> "HybridTrainer":
        """The trainer of a run that was stopped or killed, as its newest whole checkpoint has it.

            HybridTrainer.resume("runs/reviews").train()

        takes the steps that the run had left: all, before its first checkpoint. Warns of a broken one, and skips it.
        overrides: `section.key=value` as if edited in the run's config.yaml; see `resumable` for what may change.
        given: what the run was given in code and its config.yaml cannot hold: train_data, reward, reference ...
        Raises InputError where there is no run, where it still goes on, and where no checkpoint of it is whole.
        """
        config, checkpoint = resumable(Path(folder), overrides)
        # The folder holds a run, which a new one would be refused.
        trainer = cls(config=replace(config, run=replace(config.run, output=None, trackers=())), **given)
        trainer.config = replace(trainer.config, run=config.run)
        trainer.folder, trainer.begun = Path(folder), True
        if checkpoint is not None:
            state = load_checkpoint(trainer, checkpoint)["progress"]
            strategy = make_strategy(spec) if (spec := state.pop("strategy")) else copy.deepcopy(trainer.strategy)
            strategy.load_state_dict(state.pop("memory"))
            trainer._left = strategy, Progress(**state)
        return trainer

    # The steps

    def sft_step(self, batch: Batch | Sequence[Any]) -> Metrics:
        """One supervised optimizer step on a batch (or on examples as in `train_data`)."""
        began = time.perf_counter()
        batch = self.corpus.batch(batch).to(self.policy.device)
        metrics = self.updater([self._sft_term(batch)], lr_factor=self.config.sft.lr_factor)
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
                samples_per_prompt=self.config.ppo.samples_per_prompt,
                generator=self.sampler,
                allow_gap=self.config.ppo.importance is not None,
                **self._collect_options(),
            )

    def ppo_step(self, rollout: Rollout) -> Metrics:
        """All PPO epochs over one rollout, then the KL coefficient's update.

        The metrics of the optimizer steps are averaged (`ratio_max`: the maximum, `skipped_updates`: the sum).
        """
        return self.joint_step(rollout)

    def joint_step(
        self,
        rollout: Rollout,
        batches: Iterator[Batch] | None = None,
        *,
        sft_coef: float = 0.0,
        ppo_coef: float = 1.0,
        rows: Tensor | None = None,
    ) -> Metrics:
        """A PPO step whose every update also learns from a supervised batch, where `batches` has one.

            loss = ppo_coef * L_PPO(minibatch) + sft_coef * L_SFT(next(batches))

        The learning rate's factor is the mean of the two phases', weighted by the coefficients.
        rows: of the rollout, those that PPO learns from; None: all. The rollout's metrics are of all.
        """
        began = time.perf_counter()
        config = self.config.ppo
        batches = batches if batches is not None and sft_coef else iter(())
        learnt = with_advantages(rollout if rows is None else rollout[rows.to(self.policy.device)], config)
        factors = {"ppo": config.lr_factor, "sft": self.config.sft.lr_factor}
        steps: list[Metrics] = []
        for picked in minibatches(len(learnt), config, self.shuffler):
            terms: list[Term[Any]] = [self._ppo_term(learnt[picked.to(self.policy.device)], ppo_coef)]
            terms += [self._sft_term(self.corpus.batch(batch), sft_coef) for batch in islice(batches, 1)]
            weights = sum(term.coef for term in terms)
            lr_factor = sum(term.coef / weights * factors[term.name] for term in terms)
            steps.append(self.updater(terms, lr_factor=lr_factor))
            if config.target_kl is not None and steps[-1]["approx_kl"] > config.target_kl:
                break
        whole = learnt if rows is None else with_advantages(rollout, config)
        metrics = rollout_metrics(whole) | over_updates(steps) | {"kl_coef": self.kl.coef}
        if math.isfinite(metrics["kl"]):  # else its updates were skipped, and it says nothing
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
        logprobs: Sequence[Tensor | Sequence[float]] | None = None,
    ) -> Metrics:
        """Learn from responses that you generated and scored yourself.

        queries, responses: one 1-D id tensor or list of ids each.   scores: a number for each response, or for
        each a tensor with a score per token.   logprobs: for each response those that its tokens were drawn with,
        for `ppo.importance`.   Responses to the same query are a group, for `ppo.advantage`.
        """
        eos_ids = self.policy.backbone.eos_ids(self.tokenizer)
        given = from_lists(queries, responses, scores, eos_ids=eos_ids, logprobs=logprobs, device=self.policy.device)
        with self.autocast():
            rollout = assemble(
                self.policy,
                self.references,
                *given,
                temperature=self.config.sampling.temperature,
                **self._collect_options(),
            )
        check_groups(rollout, self.config.ppo)
        return self.ppo_step(rollout)

    # Looking at the policy

    def generate(self, texts: Sequence[str], sampling: SamplingConfig | None = None) -> list[str]:
        """One response for each text, which goes through the data's prompt template first."""
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise InputError(f"generate takes a list of texts, got {texts!r:.60}; [text] is a list of one")
        sampling = sampling or self.config.sampling
        examples, size = [self.corpus.prompt(text) for text in texts], self.config.eval.batch_size
        answers: list[str] = []
        with self.autocast():
            for start in range(0, len(examples), size):
                *_, responses = respond(
                    self.policy, examples[start : start + size], tokenizer=self.tokenizer,
                    sampling=sampling, generator=self.speaker,
                )  # fmt: skip
                answers += response_texts(self.tokenizer, responses, stop=sampling.stop)
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
            if examples and (self.reward is not None or config.text_metrics):
                of_responses, rows = evaluate_responses(
                    self.policy, self.references, self.reward, examples[: config.num_prompts],
                    tokenizer=self.tokenizer, sampling=config.sampling(self.config.sampling),
                    text_metrics=config.text_metrics, batch_size=config.batch_size, seed=config.seed,
                )  # fmt: skip
                metrics |= of_responses
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
        """Computation in `model.precision`; the weights keep their dtype."""
        return autocast(self.config.model.precision, self.policy.device)

    @property
    def loader(self) -> Loader:
        """Endless batches of the training examples with a target (without any, of all): for `sft_step`, `rollout`."""
        return self._loaders.train

    @property
    def prompts(self) -> Loader:
        """Endless batches of `ppo.batch_size` examples, whose prompts `train` rolls out."""
        return self._loaders.prompts

    @property
    def ptx_loader(self) -> Loader:
        """Endless batches of the second data set. Raises InputError where there is none."""
        if self._loaders.ptx is None:
            raise InputError("there is no second data set: give HybridTrainer(ptx_data=...) or the config's ptx_data")
        return self._loaders.ptx

    def batches_of(self, examples: Sequence[Encoded]) -> list[Batch]:
        """The examples in batches of `sft.batch_size`."""
        size = self.config.sft.batch_size
        return [self.corpus.batch(examples[i : i + size]) for i in range(0, len(examples), size)]

    @cached_property
    def _loaders(self) -> Loaders:
        return build_loaders(self.config, self.corpus)

    def _collect_options(self) -> dict[str, Any]:
        """What `collect` and `assemble` take from the config alike."""
        config = self.config
        size = config.ppo.microbatch_size or config.ppo.minibatch_size
        return {
            "score": config.score,
            "kl_coef": 0.0 if config.kl.in_loss else self.kl.coef,
            "kl_kind": config.kl.kind,
            "microbatch_size": min(size, self.updater.row_limits.get("ppo", size)),  # as PPO's: first ratios are 1
        }

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one optimizer of both phases."""
        return self.updater.optimizer

    def _sft_term(self, batch: Batch, coef: float = 1.0) -> Term[Batch]:
        return sft_term(self.policy, batch.to(self.policy.device), self.config.sft, coef, autocast=self.autocast)

    def _ppo_term(self, minibatch: Rollout, coef: float) -> Term[Rollout]:
        kl = self.config.kl
        kl_loss_coef = self.kl.coef if kl.in_loss else 0.0
        return ppo_term(
            self.policy, minibatch, self.config.ppo, coef,
            kl_loss_coef=kl_loss_coef, kl_kind=kl.kind, autocast=self.autocast,
        )  # fmt: skip

    def num_updates(self, strategy: Strategy) -> int | None:
        """Optimizer steps of a strategy's run; None where not known."""
        rollout = self.config.ppo.num_updates
        return strategy.num_updates({"sft": 1, "ppo": rollout, "joint": rollout})
