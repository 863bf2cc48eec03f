"""The learner: one policy, one optimizer, and each step that a person writes by hand."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from hybrid.config import HybridConfig
from hybrid.core import Batch, InputError, Labelled, Pairs, Rollout
from hybrid.corpus import encoded_corpus
from hybrid.distributed import connect
from hybrid.functional import PreferenceKind
from hybrid.host import RunHost
from hybrid.measured import Measured
from hybrid.mixing import Plan, Strategy, make_strategy
from hybrid.models import Policy
from hybrid.objectives import (
    Objectives,
    Term,
    Updater,
    check_decoder,
    check_groups,
    log_names,
    objective_class,
    objective_names,
    over_updates,
    rollout_metrics,
    shares,
    with_advantages,
)
from hybrid.rewards import Unjudged, make_reward
from hybrid.rollout import (
    Answered,
    CollectOptions,
    Ids,
    assemble,
    collect,
    from_lists,
    kl_controller,
    make_engine,
)
from hybrid.run import open_run_folder
from hybrid.setup import (
    ReferenceLike,
    build_models,
    check_world,
    load_tokenizer,
    model_context,
    random_streams,
    read_examples_of,
    resolved,
)

__all__ = ["Learner"]

Metrics = dict[str, float]


class Learner(Measured):
    """Supervised fine-tuning and PPO on one language model. Owns the policy, its optimizer and its references.

        learner = Learner("gpt2", train_data="reviews.jsonl", reward=my_function)
        for batch in learner.loader:                # endless
            learner.sft_step(batch)
            rollout = learner.rollout(batch)
            learner.ppo_step(rollout)

    A step is a sum of terms, one for each objective in it:

        learner.batch_step({"sft": 1.0})                            # one update, on the objective's own rows
        learner.rollout_step(rollout, {"ppo": 1.0, "sft": 0.1})     # every update that PPO makes of a rollout
        learner.preference_step([{"prompt": ..., "chosen": ..., "rejected": ...}, ...])
        learner.update([learner.objectives["sft"].term(batch)])     # by hand

    policy_or_name: a `Policy`, a transformers model, or a model's folder or hub name; the config's where None.
    tokenizer: the model's own where None; or a model's name.
    train_data, eval_data, ptx_data, preference_data: a file, a hub name, a datasets.Dataset, a frame, a list of dicts
        (docs/data.md); the config's where None. ptx_data is the second data set, which objective `ptx` trains on;
        preference_data what objectives of preferences learn from, where that is not the training data.
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
        preference_data: Any = None,
    ):
        config = resolved(config, policy_or_name, train_data, eval_data, reward, ptx_data, preference_data)
        source = config.model.name if policy_or_name is None else policy_or_name
        if source is None:
            raise InputError(f"{type(self).__name__} needs a model: give policy_or_name, or the config's model.name")
        self.world = connect(config.distributed)
        torch.manual_seed(config.run.seed)
        self.strategy = make_strategy(config.mixing)
        self.reward = None if config.reward is None else make_reward(config.reward)
        check_world(config, self.world, self.reward)
        output = config.run.output
        self.folder = None if output is None else self.world.once(lambda: open_run_folder(output))
        examples = read_examples_of(config, train_data, eval_data, ptx_data, preference_data, self.reward)
        context = model_context(source)
        self.tokenizer = load_tokenizer(source, tokenizer)
        config.check_decoders(context, self.tokenizer)
        self.corpus = encoded_corpus(config, self.tokenizer, examples, context=context)
        # A bare prompt goes through the template that the data's prompts went through, in later commands too.
        config = replace(config, data=replace(config.data, template=self.corpus.prompt_template))
        if self.corpus.has_own_preferences:
            config = replace(config, preference_data=self.corpus.preference_config)
        self.config = config
        wants = [objective_class(name) for name in {*self.strategy.objectives, *config.objectives}]
        scores = any(objective.needs_reward_head for objective in wants)
        self.reward_template = self.corpus.reward_template() if scores else None
        for other in config.references:
            if other.model is not None and reference is None:
                model_context(other.model)
        self.policy, self.references = build_models(source, reference, config, self.tokenizer)
        for decoder in config.decoders:
            decoder.check_policy(self.policy)
        if scores:
            self.policy.add_reward_head()
        if (reward := self.reward) is not None:
            self.world.main(lambda: reward.setup(self.policy.device))
        self.world.wrap(self.policy)
        self.updater = Updater(
            self.policy, config.optimizer, config.scheduler, config.gradient,
            num_updates=self.num_updates(self.strategy), precision=config.model.precision,
            world=self.world,
        )  # fmt: skip
        self.engine = make_engine(self.policy, config.rollout, self.world)
        self.kl = kl_controller(config.kl)
        self.sampler, self.shuffler, self.speaker = random_streams(config.run.seed, self.policy.device)
        self.objectives = Objectives(self, lambda: vars(self.config))
        if reward is not None:
            self.world.main(lambda: reward.attach(RunHost(self)))
        self.num_steps = 0  # of the loop, of all kinds together
        self.begun = False  # whether the run in its folder is its own

    # The steps

    def update(self, terms: Sequence[Term[Any]]) -> Metrics:
        """One optimizer step whose loss is the sum of the terms."""
        return self.updater(terms)

    def batch_step(self, coefs: Mapping[str, float], rows: Mapping[str, Any] | None = None) -> Metrics:
        """One update of objectives that need no rollout.

            loss = sum over names of coefs[name] * L_name(rows[name])

        rows: a batch, or what makes one (examples as in `train_data`), by name; where it has none, the objective's own.
        """
        began = time.perf_counter()
        given = dict(rows or {})
        given |= self.objectives.next_rows(name for name in coefs if name not in given)
        terms = self._terms({name: given[name] for name in coefs}, coefs)
        metrics = self.update(terms)
        if "nll" in metrics:
            metrics["perplexity"] = math.exp(min(metrics["nll"], 700.0))
        seen = sum(int(term.rows.attention_mask.bool().sum()) for term in terms)
        return {
            **metrics,
            "num_tokens": float(sum(term.rows.num_tokens for term in terms)),
            "tokens_per_second": seen / (time.perf_counter() - began),
        }

    def rollout_step(
        self,
        rollout: Rollout,
        coefs: Mapping[str, float],
        batches: Mapping[str, Iterator[Batch]] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Metrics:
        """All the updates that PPO makes of a rollout, then the KL coefficient's update.

            loss = sum over names of coefs[name] * L_name(the minibatch, or next(batches[name]))

        batches: what the objectives that do not roll out learn from, one for each update; of one that has come to its
            end nothing is learnt any more. Where it has none, the objective's own rows.
        rows: of the rollout, those that are learnt from; None: all. The rollout's metrics are of all.
        Those of the updates are averaged (`ratio_max`: the maximum, `skipped_updates`: the sum).
        """
        began = time.perf_counter()
        config = self.config.ppo
        check_decoder(coefs, rollout.decoder, rollout.window)
        chosen = with_advantages(rollout if rows is None else rollout[rows.to(self.policy.device)], config)
        learnt = {name: self.objectives[name].learnt(chosen) for name in coefs if self.objectives[name].rolls_out}
        steps: list[Metrics] = []
        for picked in shares({name: len(some) for name, some in learnt.items()}, len(chosen), config, self.shuffler):
            of = self.objectives.next_rows((name for name in coefs if name not in learnt), batches)
            of |= {name: learnt[name][some] for name, some in picked.items() if len(some)}
            if not of:
                continue
            steps.append(self.update(self._terms({name: of[name] for name in coefs if name in of}, coefs)))
            # Of several objectives that have one each is told apart by its name.
            drift = max((x for name, x in steps[-1].items() if name.endswith("approx_kl")), default=0.0)
            if config.target_kl is not None and drift > config.target_kl:
                break
        whole = rollout if "ppo" not in learnt else chosen if rows is None else with_advantages(rollout, config)
        metrics = rollout_metrics(whole) | over_updates(steps) | {"kl_coef": self.kl.coef}
        if math.isfinite(metrics["kl"]):  # else its updates were skipped, and it says nothing
            self.kl.update(metrics["kl"], len(rollout))
        seconds = {**rollout.seconds, "update": time.perf_counter() - began}
        return {
            **metrics,
            **{f"seconds_{part}": taken for part, taken in seconds.items()},
            "tokens_per_second": rollout.num_tokens / sum(seconds.values()),
        }

    def take(
        self,
        plan: Plan,
        rollout: Rollout | None = None,
        batches: Mapping[str, Iterator[Batch]] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Metrics:
        """The step of a plan, with the rollout that it begins with; see `rollout_step` for `batches` and `rows`.

        What has names of its own goes by them: a subclass that changes `sft_step` or `joint_step` changes the run.
        """
        coefs, batches = plan.coefs, batches or {}
        if rollout is None:
            if plan.kind == "sft":
                return self.sft_step(plan.examples or next(self.loader))
            return self.batch_step(coefs, {"sft": plan.examples} if plan.examples else None)
        if coefs.keys() <= {"ppo", "sft"}:
            sft = batches.get("sft", self.loader) if "sft" in coefs else None
            return self.joint_step(rollout, sft, sft_coef=plan.sft_coef, ppo_coef=plan.ppo_coef, rows=rows)
        return self.rollout_step(rollout, coefs, batches, rows=rows)

    def sft_step(self, batch: Batch | Iterable[Any]) -> Metrics:
        """One supervised optimizer step on a batch (or on examples as in `train_data`)."""
        return self.batch_step({"sft": 1.0}, {"sft": batch})

    def preference_step(self, pairs: Pairs | Labelled | Iterable[Any], kind: str = "dpo") -> Metrics:
        """One optimizer step of objective `kind` (dpo, kto, reward_model) on pairs, or rows as in the preferences.

        Its settings are the config's `objectives.KIND`.
        """
        if kind not in objective_names() and kind in get_args(PreferenceKind):
            raise InputError(
                f"kind is an objective's name; for that loss set objectives.dpo.kind={kind} with kind 'dpo'"
            )
        return self.batch_step({kind: 1.0}, {kind: pairs})

    def ppo_step(self, rollout: Rollout) -> Metrics:
        """All PPO epochs over one rollout; see `rollout_step`."""
        return self.rollout_step(rollout, {"ppo": 1.0})

    def joint_step(
        self,
        rollout: Rollout,
        batches: Iterator[Batch] | None = None,
        *,
        sft_coef: float = 0.0,
        ppo_coef: float = 1.0,
        rows: Tensor | None = None,
    ) -> Metrics:
        """A PPO step whose every update also learns from a supervised batch, where `batches` has one."""
        sft = {} if batches is None or not sft_coef else {"sft": batches}
        return self.rollout_step(rollout, {"ppo": ppo_coef} | dict.fromkeys(sft, sft_coef), sft, rows=rows)

    def rollout(
        self, prompts: Any, *, scored: bool = True, repeated: bool = False, answered: Answered | None = None
    ) -> Rollout:
        """Answer the prompts (a batch, texts, or examples as in `train_data`) and score the answers.

        scored: False: nobody is asked, all scores are 0.   repeated, answered: see `collect`.
        """
        reward = self.reward if scored else Unjudged()
        if reward is None:
            raise InputError("a rollout needs a reward: give HybridTrainer(reward=...) or `reward`, or scored=False")
        self.config.check_rollout(self.strategy)
        with self.world.gathered(), self.autocast():
            rollout = collect(
                self.policy, self.references, reward, self.corpus.encoded(prompts), tokenizer=self.tokenizer,
                sampling=self.config.sampling, samples_per_prompt=self.config.ppo.samples_per_prompt, repeated=repeated,
                generator=self.sampler, engine=self.engine, answered=answered,
                allow_gap=self.config.ppo.importance is not None, **self._collect_options(),
            )  # fmt: skip
            self.world.main(lambda: reward.after_rollout(rollout))
        return self.remembered(rollout) if reward is self.reward else rollout

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
        decoder = self.config.sampling.search
        with self.world.gathered(), self.autocast():
            rollout = assemble(
                self.policy,
                self.references,
                *given,
                temperature=self.config.sampling.temperature,
                decoder=decoder.name if decoder.is_policy else "sample",
                window=decoder.policy_window,
                world=self.world,
                **self._collect_options(),
            )
        check_groups(rollout, self.config.ppo)
        return self.ppo_step(rollout)

    # What the objectives take from it

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one optimizer of all objectives."""
        return self.updater.optimizer

    def num_updates(self, strategy: Strategy) -> int | None:
        """Optimizer steps of a strategy's run; None where not known."""
        rollout = self.config.ppo.num_updates
        return strategy.num_updates({"sft": 1, "ppo": rollout, "joint": rollout})

    def _terms(self, rows: Mapping[str, Any], coefs: Mapping[str, float]) -> list[Term[Any]]:
        terms, called = [], log_names(coefs)
        for name, given in rows.items():
            objective = self.objectives[name]
            placed = given.to(self.policy.device) if hasattr(given, "to") else objective.rows_of(given)
            terms.append(replace(objective.term(placed, coefs[name]), name=called[name]))
        return terms

    def _collect_options(self) -> CollectOptions:
        return self.config.collect_options(self.kl.coef, self.updater.row_limits.get("ppo"))
