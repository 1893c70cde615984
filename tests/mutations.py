"""Mutations of the mathematics, the store and the labels. Some test must catch each of them.

    python -m tests.mutations                  # all of them; status 1 if one survives
    python -m tests.mutations objective npo    # those of files whose path has one of these words

The checkout is copied, and the copy is changed in one place at a time. A mutation names a piece of source, which must
occur exactly once, and the tests that should fail; all these tests must pass before anything is changed. If a test run
ends otherwise than with passed or failed tests (a missing test, a module that cannot be imported), this is an error of
this script, and the mutation does not count as caught.

Every test run is a fork of this process, which has imported the packages that dnpo needs, but not dnpo: these imports
take longer than most tests.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("src", "tests", "conf", "sweeps", "benchmarks", "analysis", "docs", "pyproject.toml", "README.md")
PASSED, FAILED = 0, 1  # of pytest's exit codes
LIMIT = 300  # seconds of one test run; a run that hangs counts as caught
IMPORTED = (
    *("torch", "transformers", "transformers.models.llama.modeling_llama", "pytorch_lightning", "peft"),
    *("scipy.stats", "pyarrow.parquet", "hydra", "pydantic", "pytest"),
)


class Mutation(NamedTuple):
    """One change that makes the code wrong.

    Attributes:
        what: the error that it makes.
        file: under ``src/dnpo``.
        source: a piece of it that occurs once.
        mutant: the replacement.
        tests: files or single tests under ``tests``, separated by spaces.
    """

    what: str
    file: str
    source: str
    mutant: str
    tests: str


TWO_PLAYERS = "test_optimise.py::test_steps_of_both_players_agree_with_brute_force"
ONE_STEP = "test_optimise.py::test_a_step_agrees_with_brute_force"
NAIVE_NOISE = "test_npo.py::test_values_and_gradients_equal_naive_autograd"

MUTATIONS = (
    # --- equations
    Mutation(
        "the loss pushes the margin down",
        "optimise/objective.py",
        "margin_B = beta * log_ratio_gap(policy, reference)",
        "margin_B = -beta * log_ratio_gap(policy, reference)",
        "test_objective.py",
    ),
    Mutation(
        "β is left out",
        "optimise/objective.py",
        "margin_B = beta * log_ratio_gap(policy, reference)",
        "margin_B = log_ratio_gap(policy, reference)",
        "test_objective.py",
    ),
    Mutation(
        "a hinge instead of softplus",
        "optimise/objective.py",
        "xi_min), softplus(-signed_B))",
        "xi_min), torch.relu(-signed_B))",
        "test_objective.py",
    ),
    Mutation(
        "the gap compares the chosen response with the reference's rejected one",
        "optimise/objective.py",
        "(policy.chosen_B - reference.chosen_B)",
        "(policy.chosen_B - reference.rejected_B)",
        "test_objective.py",
    ),
    Mutation(
        "the policy is moved by the noise term",
        "optimise/objective.py",
        "noise=-weighted_mean(logistic(policy.detach(), met_by_noise",
        "noise=-weighted_mean(logistic(policy, met_by_noise",
        "test_objective.py",
    ),
    Mutation(
        "the noise is moved by the policy term",
        "optimise/objective.py",
        "PairLogps(reference.chosen_B, noisy.policy_B.detach())",
        "PairLogps(reference.chosen_B, noisy.policy_B)",
        "test_objective.py",
    ),
    Mutation(
        "the noise minimises what it has to maximise",
        "optimise/objective.py",
        "noise=-weighted_mean(",
        "noise=weighted_mean(",
        "test_objective.py",
    ),
    Mutation(
        "the policy meets the draw that the noise is trained on",
        "optimise/objective.py",
        "met_by_policy = PairLogps(reference.chosen_B, noisy.policy_B.detach())",
        "met_by_policy = PairLogps(reference.chosen_B, noisy.noise_B.detach())",
        "test_objective.py",
    ),
    Mutation(
        "saturation of the other side",
        "optimise/objective.py",
        "torch.sigmoid(-margin_B)",
        "torch.sigmoid(margin_B)",
        "test_objective.py",
    ),
    Mutation(
        "soft labels take the strength for its opposite",
        "optimise/objective.py",
        "return strength_B * loss_B + (1 - strength_B) * swapped_B",
        "return (1 - strength_B) * loss_B + strength_B * swapped_B",
        "test_objectives_pairs.py",
    ),
    Mutation(
        "weights are not normalised",
        "optimise/objective.py",
        "return (value_B * (weight_B * scale)).mean()",
        "return (value_B * weight_B).mean()",
        "test_objectives_pairs.py",
    ),
    Mutation(
        "the tangent has half the slope",
        "optimise/objective.py",
        "return (within_B - u_B) / xi_min - within_B.log()",
        "return (within_B - u_B) / (2 * xi_min) - within_B.log()",
        "test_objectives_pairs.py",
    ),
    Mutation(
        "the squared loss has DPO's target for soft labels",
        "optimise/objective.py",
        "(2 * facts.strength_B - 1) / (2 * beta)",
        "facts.strength_B / (2 * beta)",
        "test_objectives_pairs.py",
    ),
    Mutation(
        "odds are not limited at certainty",
        "optimise/objective.py",
        "logp_B = logp_B.clamp(max=-1e-6)",
        "logp_B = logp_B.clamp(max=0)",
        "test_objectives_pairs.py",
    ),
    Mutation(
        "the chosen response is measured by the length of the rejected one",
        "optimise/objective.py",
        "logps.chosen_B / facts.chosen_tokens_B.clamp(min=1)",
        "logps.chosen_B / facts.rejected_tokens_B.clamp(min=1)",
        "test_objectives_pairs.py",
    ),
    Mutation(
        "the window moves within a step",
        "optimise/watch.py",
        "self.present[which] += value_B.tolist()",
        "self.recent[which] += value_B.tolist()",
        "test_objectives_watch.py",
    ),
    Mutation(
        "extrapolation towards the reference",
        "optimise/watch.py",
        "logits_NC.mul_(1 + by).sub_(frozen_NC, alpha=by)",
        "logits_NC.mul_(1 - by).add_(frozen_NC, alpha=by)",
        "test_objectives_watch.py",
    ),
    Mutation(
        "drift of rejected responses",
        "optimise/watch.py",
        "lengths = seen.packed.completions[:count]",
        "lengths = seen.packed.completions[-count:]",
        "test_objectives_watch.py",
    ),
    # --- noise
    Mutation(
        "the bound's own gradient is forgotten",
        "optimise/npo.py",
        "rest_NC.mul_(root_NC)\n",
        "rest_NC.copy_(root_NC)\n",
        NAIVE_NOISE,
    ),
    Mutation(
        "the variance term has half its gradient",
        "optimise/npo.py",
        "pull = 2 * make.max_variance",
        "pull = make.max_variance",
        NAIVE_NOISE,
    ),
    Mutation(
        "the gradient at the target has the other sign",
        "optimise/npo.py",
        "(grad_N * made.own_N * inside_N)",
        "(-grad_N * made.own_N * inside_N)",
        NAIVE_NOISE,
    ),
    Mutation(
        "the noise is standard normal whatever its bound",
        "optimise/npo.py",
        "self.draw = _Draw(rejected, math.sqrt(max_variance))",
        "self.draw = _Draw(rejected, 1.0)",
        "test_npo.py::test_every_bound_agrees_with_naive_autograd",
    ),
    Mutation(
        "a standard deviation where a variance is meant",
        "optimise/npo.py",
        "_Draw(rejected, math.sqrt(self.fixed))",
        "_Draw(rejected, self.fixed)",
        "test_npo.py::test_fixed_noise_against_brute_force test_npo.py::test_fixed_noise_has_the_stated_variance",
    ),
    Mutation(
        "both terms meet the same draw",
        "optimise/npo.py",
        "derive(seed, number, first, term)",
        "derive(seed, number, first)",
        "test_npo.py::test_the_two_terms_use_different_noise",
    ),
    Mutation(
        "all tiles of the vocabulary have the same draw",
        "optimise/npo.py",
        "derive(seed, number, first, term)",
        "derive(seed, number, term)",
        "test_npo.py::test_draws_of_different_terms_seeds_blocks_and_tiles_are_uncorrelated",
    ),
    Mutation(
        "the constant offset pushes the other way",
        "optimise/npo.py",
        "clean_B - self.shift",
        "clean_B + self.shift",
        "test_npo.py::test_offset_is_exact",
    ),
    Mutation(
        "α reaches no training",
        "optimise/parts.py",
        "alpha=self.alpha,",
        "alpha=0.1,",
        "test_npo.py::test_settings_reach_the_module",
    ),
    # --- log-probabilities
    Mutation(
        "the first token of a tile belongs to none",
        "policy/logprobs.py",
        "inside_N = (within_N >= 0)",
        "inside_N = (within_N > 0)",
        "test_logprobs.py",
    ),
    Mutation(
        "the cap's slope is forgotten",
        "policy/logprobs.py",
        "error_NC.mul_(1 - (logits_NC / self.cap).square())",
        "error_NC",
        "test_logprobs.py",
    ),
    Mutation(
        "logits are capped without being scaled back",
        "policy/logprobs.py",
        "logits_NC.div_(self.cap).tanh_().mul_(self.cap)",
        "logits_NC.div_(self.cap).tanh_()",
        "test_logprobs.py",
    ),
    Mutation(
        "the log-sum-exp forgets the tiles before",
        "policy/logprobs.py",
        "self.lse_N = torch.logaddexp(self.lse_N, logits_NC.logsumexp(-1))",
        "self.lse_N = torch.maximum(self.lse_N, logits_NC.logsumexp(-1))",
        "test_logprobs.py",
    ),
    Mutation(
        "a token is predicted from its own position",
        "policy/packing.py",
        "for place in some[len(prompt) - 1 : -1]]",
        "for place in some[len(prompt) :]]",
        "test_packing.py::test_a_row_by_hand test_logprobs.py",
    ),
    # --- packing
    Mutation(
        "a query may look one token too far back",
        "policy/packing.py",
        "(back_LL < window)",
        "(back_LL <= window)",
        "test_packing.py::test_attention_and_its_gradients_against_the_definition",
    ),
    Mutation(
        "attention sees what comes later",
        "policy/packing.py",
        "                is_causal=mask_LL is None,\n",
        "                is_causal=False,\n",
        "test_packing.py::test_attention_and_its_gradients_against_the_definition",
    ),
    Mutation(
        "positions of a response that shares its prompt begin at 0",
        "policy/packing.py",
        "positions += range(shared, len(row))",
        "positions += range(len(row) - shared)",
        "test_packing.py::test_a_row_with_a_shared_prompt_by_hand",
    ),
    Mutation(
        "a shared prompt has the gradient of one response alone",
        "policy/packing.py",
        "        if len(ctx.spread.again_X):\n",
        "        if False:\n",
        "test_packing.py::test_spread_and_gather_are_inverse test_packing.py::test_a_prompt_computed_once_counts_twice",
    ),
    # --- training
    Mutation(
        "micro-batches weigh the same whatever they hold",
        "optimise/training.py",
        "self.manual_backward(loss * (batch.share * factor))",
        "self.manual_backward(loss / len(batches))",
        "test_optimise.py::test_micro_batches_change_nothing_but_rounding",
    ),
    Mutation(
        "no gradient is clipped",
        "optimise/training.py",
        "limit = self.optimisation.clip or math.inf",
        "limit = math.inf",
        "test_optimise.py::test_clipping_bounds_the_step_and_reports_the_norm_before",
    ),
    Mutation(
        "gradients pile up from step to step",
        "optimise/training.py",
        "            optimizer.zero_grad(set_to_none=True)\n",
        "            pass\n",
        ONE_STEP,
    ),
    Mutation(
        "the learning rate stays where it began",
        "optimise/training.py",
        "            scheduler.step()\n",
        "            pass\n",
        "test_optimise.py::test_every_step_has_the_learning_rate_of_the_schedule",
    ),
    Mutation(
        "warm-up begins at 0, a step that teaches nothing",
        "optimise/parts.py",
        "return (step + 1) / (warm + 1)",
        "return step / (warm + 1)",
        "test_optimise.py::test_learning_rate_rises_linearly_then_falls_to_zero",
    ),
    Mutation(
        "a checkpoint forgets at which step it was made",
        "optimise/training.py",
        '{"policy_step": self.policy_step}',
        '{"policy_step": 0}',
        "test_optimise.py::test_a_stopped_training_ends_as_an_undisturbed_one",
    ),
    Mutation(
        "a checkpoint keeps frozen weights too",
        "optimise/training.py",
        'for n, t in checkpoint["state_dict"].items() if n in trained}',
        'for n, t in checkpoint["state_dict"].items()}',
        "test_optimise.py::test_a_checkpoint_holds_only_trained_weights",
    ),
    Mutation(
        "a killed training begins its rows again",
        "optimise/steps.py",
        'self.next = state["next"]',
        "self.next = 0",
        "test_batches.py",
    ),
    Mutation(
        "all epochs have the same order",
        "optimise/steps.py",
        'derive(seed, "epoch", epoch)',
        'derive(seed, "epoch", 0)',
        "test_batches.py",
    ),
    Mutation(
        "a last step of few rows counts like a full one",
        "optimise/steps.py",
        "rows * group // count",
        "min(batch_size * group, rows)",
        "test_batches.py",
    ),
    Mutation(
        "means over steps count steps instead of rows",
        "records.py",
        'step.get("rows", 1.0)',
        "1.0",
        "test_records.py",
    ),
    Mutation(
        "a pair has the same noise in every epoch",
        "optimise/batches.py",
        'derive(self.seed, "noise", piece.step, i)',
        'derive(self.seed, "noise", 0, i)',
        "test_optimise.py::test_every_pair_and_step_has_its_own_noise_for_any_micro_batches",
    ),
    Mutation(
        "the variance of a micro-batch weighs by pairs instead of tokens",
        "optimise/preference.py",
        "weight = pairs.rejected_share / pairs.share",
        "weight = 1.0",
        "test_optimise.py::test_micro_batches_change_nothing_but_rounding",
    ),
    Mutation(
        "errors of opposite signs pass the check at step 0",
        "optimise/preference.py",
        "return float(log_ratio_gap(policy, expected).abs().max())",
        "return abs(float(log_ratio_gap(policy, expected).mean()))",
        "test_optimise.py::test_the_gate_does_not_average",
    ),
    Mutation(
        "margins are reported without β",
        "optimise/preference.py",
        "clean_B = self.beta * log_ratio_gap(policy, reference)",
        "clean_B = log_ratio_gap(policy, reference)",
        TWO_PLAYERS,
    ),
    Mutation(
        "the reference is trained along",
        "policy/model.py",
        "frozen = copy.deepcopy(self.model).eval()",
        "frozen = self.model.eval()",
        TWO_PLAYERS,
    ),
    # --- reference
    Mutation(
        "log-probabilities are read in the order in which they were made",
        "optimise/reference.py",
        "ReferenceLogps), key=lambda row: row.pair)",
        "ReferenceLogps), key=lambda row: 0)",
        "test_reference.py::test_scores_equal_those_of_each_response_alone",
    ),
    Mutation(
        "chosen and rejected are exchanged",
        "optimise/reference.py",
        "for i, c, r in zip(these, chosen, rejected, strict=True)]",
        "for i, r, c in zip(these, chosen, rejected, strict=True)]",
        "test_reference.py::test_scores_equal_those_of_each_response_alone",
    ),
    Mutation(
        "other pairs' hidden states come back",
        "optimise/reference.py",
        "self.where[pair] = (number, starts[i], starts[i] + chosen[i], starts[i + 1])",
        "self.where[i] = (number, starts[i], starts[i] + chosen[i], starts[i + 1])",
        "test_reference.py::test_hidden_states_are_read_back_unchanged",
    ),
    Mutation(
        "a reference of other weights is taken",
        "stages/verbs.py",
        "made_by != policy.fingerprint():",
        "not made_by:",
        "test_reference.py::test_a_reference_of_other_weights_is_refused",
    ),
    # --- labels
    Mutation(
        "a tie prefers the generated response",
        "dsl/__init__.py",
        "if new.score > human.score else",
        "if new.score >= human.score else",
        "test_dsl.py",
    ),
    Mutation(
        "the lower score is chosen",
        "dsl/__init__.py",
        "if new.score > human.score else",
        "if new.score < human.score else",
        "test_dsl.py",
    ),
    Mutation(
        "pairs without a difference are kept",
        "dsl/__init__.py",
        "all(each.token_ids != old.response.token_ids for old in fixed)",
        "all(each.token_ids for old in fixed)",
        "test_dsl.py",
    ),
    Mutation(
        "a pair without a score keeps the human response whatever is asked for",
        "dsl/__init__.py",
        'return [] if self.unscored == "drop" else [Labelled(human, new)]',
        "return [Labelled(human, new)]",
        "test_dsl.py",
    ),
    # --- store and keys
    Mutation(
        "a stage's version is not in its key",
        "store/__init__.py",
        '"version": self.version,\n            "settings": self.settings,\n            "inputs": {name: stage.key',
        '"settings": self.settings,\n            "inputs": {name: stage.key',
        "test_store.py::test_key_depends_on_what_decides_the_result test_store.py::test_key_golden",
    ),
    Mutation(
        "what a stage reads is not in its key",
        "store/__init__.py",
        '"inputs": {name: stage.key for name, stage in self.inputs.items()},',
        '"inputs": sorted(self.inputs),',
        "test_store.py",
    ),
    Mutation(
        "a stage works where its result belongs, and a killed one counts as finished",
        "store/__init__.py",
        '        return self.root / stage.name / f"{stage.key}{PARTIAL}"',
        "        return self.root / stage.name / stage.key",
        "test_store.py",
    ),
    Mutation(
        "the manifest is written once the folder has its final name",
        "store/__init__.py",
        "        seal(partial, content)\n        partial.replace(self.folder(stage))\n",
        "        partial.replace(self.folder(stage))\n        seal(self.folder(stage), content)\n",
        "test_store.py::test_facts_that_cannot_be_written_leave_no_result",
    ),
    Mutation(
        "two runs compute a stage twice",
        "store/__init__.py",
        "            if not self.has(stage) and not self._fetch(stage, report.note):\n                self._compute",
        "            if True:\n                self._compute",
        "test_store.py::test_two_processes_compute_a_stage_once",
    ),
    Mutation(
        "the lock is not waited for",
        "store/__init__.py",
        "            lock.acquire()\n",
        "            pass\n",
        "test_store.py::test_two_processes_compute_a_stage_once",
    ),
    Mutation(
        "a file's name is not in the hash of its folder",
        "store/files.py",
        'digest.update(b"" if file == path else str(file.relative_to(path)).encode())',
        'digest.update(b"")',
        "test_store.py",
    ),
    Mutation(
        "neutral settings are in the key",
        "settings.py",
        "for each in setting_names(kind) if each not in gone}",
        "for each in setting_names(kind)}",
        "test_building.py",
    ),
    Mutation(
        "every setting is neutral",
        "settings.py",
        "if not field.metadata.get(CHANGES_RESULT, True)",
        "if field.metadata.get(CHANGES_RESULT, True)",
        "test_building.py",
    ),
    Mutation(
        "classes of other packages are keyed by their name alone",
        "settings.py",
        'return target.rpartition(".")[2] if target.startswith(OWN) else target',
        'return target.rpartition(".")[2]',
        "test_building.py",
    ),
    Mutation(
        "dnpo's own classes are keyed by where they lie",
        "settings.py",
        'return target.rpartition(".")[2] if target.startswith(OWN) else target',
        "return target",
        "test_building.py",
    ),
    Mutation(
        "an objective without a β is accepted",
        "optimise/parts.py",
        'beta = getattr(objective, "beta", None)',
        'beta = getattr(objective, "beta", 1.0)',
        "test_building.py",
    ),
    Mutation(
        "a stream of chance ignores what it is for",
        "seeding.py",
        'text = "/".join(map(str, (seed, *names)))',
        "text = str(seed)",
        "test_batches.py",
    ),
    # --- rows
    Mutation(
        "rows lose their order across files",
        "tables.py",
        "return [row for path in paths for row in read(path, kind)]",
        "return [row for path in sorted(paths) for row in read(path, kind)]",
        "test_records.py",
    ),
    Mutation(
        "a table is written in place, and a killed run leaves half of it",
        "tables.py",
        "    aside = disk.name_aside(path)\n    try:\n        with pq.ParquetWriter",
        "    aside = path\n    try:\n        with pq.ParquetWriter",
        "test_records.py",
    ),
    # --- generation
    Mutation(
        "all prompts draw the same",
        "generate/hf.py",
        'derive(seed, "sample", prompt.id, number)',
        'derive(seed, "sample", number)',
        "test_generate.py",
    ),
    Mutation(
        "all samples of a prompt are the same",
        "generate/hf.py",
        'derive(seed, "sample", prompt.id, number)',
        'derive(seed, "sample", prompt.id)',
        "test_generate.py",
    ),
    Mutation(
        "all tokens of a response draw the same",
        "generate/hf.py",
        "token_R1 * count",
        "token_R1 * 0",
        "test_generate.py",
    ),
    Mutation(
        "the likeliest entry of a group is taken",
        "generate/hf.py",
        "(share_RC / wait_RC).argmax(-1)",
        "share_RC.argmax(-1)",
        "test_generate.py",
    ),
    Mutation(
        "generation runs on past a stop token",
        "generate/hf.py",
        "if tokens[r] not in stops and len(completions[i]) < limits[i]]",
        "if len(completions[i]) < limits[i]]",
        "test_generate.py",
    ),
    Mutation(
        "a response may be one token over the limit",
        "generate/hf.py",
        "if tokens[r] not in stops and len(completions[i]) < limits[i]]",
        "if tokens[r] not in stops and len(completions[i]) <= limits[i]]",
        "test_generate.py",
    ),
    Mutation(
        "the temperature is ignored",
        "generate/hf.py",
        "if sampling.temperature != 1:",
        "if sampling.temperature > 99:",
        "test_generate.py",
    ),
    Mutation(
        "a prompt is read again for rows that join later",
        "generate/hf.py",
        "if self._joinable and following == rest[-1]:",
        "if self._joinable and not following:",
        "test_generate.py::test_more_copies_of_a_prompt_than_the_batch_has_rows",
    ),
    Mutation(
        "many samples of one prompt wait until the batch is empty",
        "generate/hf.py",
        "most = max(int(batch_size * FREE), 1)",
        "most = batch_size",
        "test_generate.py::test_rows_of_one_prompt_do_not_wait_for_an_empty_batch",
    ),
    Mutation(
        "a cut response that was ended counts as one that ended",
        "generate/hf.py",
        'finish: Finish = "eos" if ends else "length"',
        'finish: Finish = "eos" if completion[-1] in stops else "length"',
        "test_generate.py::test_responses_that_are_cut_may_be_ended",
    ),
    Mutation(
        "a response that was ended is a token longer than the data's limit",
        "generate/hf.py",
        "[*completion[: limit - 1], stops[0]]",
        "[*completion, stops[0]]",
        "test_generate.py::test_responses_that_are_cut_may_be_ended",
    ),
    Mutation(
        "several greedy samples are accepted",
        "generate/__init__.py",
        "if self.samples > 1 and",
        "if self.samples > 99 and",
        "test_generate.py::test_several_samples_that_would_be_equal_are_refused",
    ),
    Mutation(
        "several samples and one share a stage key",
        "generate/__init__.py",
        "if value != getattr(Ahead, name)}",
        "if value is None}",
        "test_generate.py::test_stage_keys_of_rollouts",
    ),
    Mutation(
        "the prompt is scored again for each sample",
        "policy/model.py",
        "first += [len(rows)] * len(units[unit][0])",
        "first += range(len(rows), len(rows) + len(units[unit][0]))",
        "test_generate.py::test_several_samples_are_scored_with_one_reading_of_the_prompt",
    ),
    # --- what people have
    Mutation(
        "a row of two forms that differ is read by one of them",
        "data/rows.py",
        "    _check_forms(row)\n    _refuse_half",
        "    _refuse_half",
        "test_files.py",
    ),
    Mutation(
        "characters that stand for lost ones are text",
        "data/turns.py",
        " or char in LOST for char",
        " for char",
        "test_files.py",
    ),
    Mutation(
        "the token after the vocabulary's last is one of it",
        "policy/folder.py",
        "number >= vocabulary):",
        "number > vocabulary):",
        "test_weights.py",
    ),
    Mutation(
        "what a template does with the time is not seen",
        "policy/template.py",
        "**settings) == text and not uses:",
        "**settings) == text:",
        "test_template.py",
    ),
    Mutation(
        "an overload told in words with status 200 is no refusal",
        "connection/refusals.py",
        "return next((status for status, pattern in _SAYS.items() if pattern.search(words)), 0)",
        "return 0",
        "test_endpoints.py",
    ),
    Mutation(
        "an answer decides what its own objects are equal to",
        "judges/exact/apart/testing.py",
        '        if self is other and name in ("eq", "ne"):',
        '        if isinstance(other, Remote) and name in ("eq", "ne"):',
        "test_code.py",
    ),
    Mutation(
        "code that comes with a model is in no key",
        "policy/base.py",
        'more["trust_remote_code"] = self.trust_remote_code',
        'more["trust_remote_code"] = False',
        "test_parts.py",
    ),
    # --- judges
    Mutation(
        "both orders of a comparison are the same",
        "judges/asked/questions.py",
        'yield self._question(prompt, generated, human, "ba")',
        'yield self._question(prompt, human, generated, "ba")',
        "test_questions.py",
    ),
    Mutation(
        "the first order is read as if the generated response were A",
        "judges/asked/questions.py",
        "first, second = 100.0 - values[",
        "first, second = values[",
        "test_questions.py",
    ),
    # --- statistics
    # --- rollouts
    Mutation(
        "the price raises the reward of what the reference would not say",
        "methods/ppo/equations.py",
        "(-beta * (logp_SL - reference_SL))",
        "(beta * (logp_SL - reference_SL))",
        "test_ppo.py::test_rewards_add_up_to_the_score_minus_the_log_ratio",
    ),
    Mutation(
        "the score comes at the first token",
        "methods/ppo/equations.py",
        "last_S1 = (length_S - 1).unsqueeze(-1)",
        "last_S1 = (length_S * 0).unsqueeze(-1)",
        "test_ppo.py::test_the_reward_is_the_score_at_the_end_and_a_penalty_at_every_token",
    ),
    Mutation(
        "errors are discounted by λ alone",
        "methods/ppo/equations.py",
        "delta_S + discount * trace * advantage_S",
        "delta_S + trace * advantage_S",
        "test_ppo.py::test_advantages_are_the_sum_of_later_errors",
    ),
    Mutation(
        "the larger of both losses' gains",
        "methods/ppo/equations.py",
        "-torch.minimum(ratio_N * advantage_N",
        "-torch.maximum(ratio_N * advantage_N",
        "test_ppo.py::test_ratios_are_clipped_beyond_the_limit",
    ),
    Mutation(
        "the smaller of both errors of a value",
        "methods/ppo/equations.py",
        "0.5 * torch.maximum(",
        "0.5 * torch.minimum(",
        "test_ppo.py::test_values_are_clipped_if_the_loss_is_larger",
    ),
    Mutation(
        "the divergence without its correction",
        "methods/ppo/equations.py",
        "return gap_N.expm1() - gap_N",
        "return -gap_N",
        "test_ppo.py::test_the_estimate_of_the_divergence_is_unbiased",
    ),
    Mutation(
        "responses have equal weight, however long",
        "methods/ppo/training.py",
        "share=sum(len(row.token_ids) for row in some) / sum(len(row.token_ids) for row in piece.group)",
        "share=len(some) / len(piece.group)",
        "test_ppo.py::test_the_first_gradient_equals_reinforce_with_a_baseline",
    ),
    Mutation(
        "values are learned by the policy's body too",
        "methods/ppo/training.py",
        "if weight else still_NH",
        "if weight else hidden_NH",
        "test_ppo.py::test_only_the_head_learns_values_by_default",
    ),
    Mutation(
        "returns are whitened",
        "methods/ppo/training.py",
        "returns=(advantage_SL[s, :n] + values[s]).tolist()",
        "returns=(weights[s] + values[s]).tolist()",
        "test_ppo.py::test_advantages_are_whitened_over_the_whole_rollout",
    ),
    Mutation(
        "what was seen of a rollout is seen anew after a kill",
        "methods/ppo/training.py",
        "if not path.is_file():",
        "if True:",
        "test_ppo.py::test_a_stopped_training_ends_as_an_undisturbed_one",
    ),
    Mutation(
        "an interval of 90 %",
        "stats/intervals.py",
        "LEVEL = 0.95",
        "LEVEL = 0.90",
        "test_comparisons.py::test_with_one_seed_it_is_the_t_test "
        "test_comparisons.py::test_right_and_wrong_from_end_to_end",
    ),
    Mutation(
        "a variance over n instead of n − 1",
        "stats/intervals.py",
        "0.0 if still(x) else float(x.var(ddof=1))",
        "0.0 if still(x) else float(x.var())",
        "test_comparisons.py::test_with_one_seed_it_is_the_t_test",
    ),
    Mutation(
        "Holm's correction forgets to stay monotonic",
        "stats/significance.py",
        "least = max(least, min((len(ps) - rank) * ps[i], 1.0))",
        "least = min((len(ps) - rank) * ps[i], 1.0)",
        "test_comparisons.py::test_holm_by_hand test_comparisons.py::test_holm_equals_closed_testing_with_bonferroni",
    ),
    Mutation(
        "Holm's correction becomes Bonferroni's",
        "stats/significance.py",
        "(len(ps) - rank) * ps[i]",
        "len(ps) * ps[i]",
        "test_comparisons.py::test_holm_by_hand",
    ),
    Mutation(
        "a server may return fewer samples than were asked for",
        "generate/server/reading.py",
        "    if len(choices) != asked.count:",
        "    if len(choices) > asked.count:",
        "test_engine.py::test_a_fault_is_named_with_the_setting",
    ),
    Mutation(
        "a server may cut responses for lack of context",
        "generate/server/reading.py",
        'if finish == "length" and stop is None and len(tokens) < asked.limit:',
        'if finish == "length" and stop is None and len(tokens) < 1:',
        "test_engine.py::test_a_fault_is_named_with_the_setting",
    ),
    Mutation(
        "responses of an earlier policy are kept for the next run",
        "generate/server/session.py",
        "                path.unlink(missing_ok=True)",
        "                path.touch()",
        "test_engine.py::test_an_earlier_policy_is_found",
    ),
    Mutation(
        "log-probabilities of an engine are not compared",
        "generate/server/session.py",
        "        if max(each.mean for each in judged) > server.max_mean_difference:",
        "        if max(each.mean for each in judged) > 1e9:",
        "test_engine.py::test_an_earlier_policy_is_found",
    ),
    Mutation(
        "a launched server outlives a run that is killed",
        "generate/server/warden.py",
        "        while os.read(0, 1 << 16):\n            pass\n        end(child)",
        "        while os.read(0, 1 << 16):\n            pass",
        "test_engine.py::test_a_launched_server_ends_with_the_run",
    ),
    Mutation(
        "several policies respond by a server that has one",
        "running/gate/engine.py",
        "        elif len(policies) > 1:",
        "        elif len(policies) > 99:",
        "test_engine.py::test_a_run_that_cannot_work_does_not_start",
    ),
)


class Run:
    """A test run in a copy of the checkout, in a separate process.

    Args:
        copy: the checkout's copy.
        tests: under ``tests``.
        mutation: the change in the copy during the run.
    """

    def __init__(self, copy: Path, tests: Iterable[str], mutation: Mutation | None = None) -> None:
        self.copy, self.mutation, self.started = copy, mutation, time.monotonic()
        if mutation is not None:
            self._file = copy / "src" / "dnpo" / mutation.file
            self._source = self._file.read_text(encoding="utf-8")
            self._file.write_text(self._source.replace(mutation.source, mutation.mutant), encoding="utf-8")
        self._printed = copy / "printed.txt"
        arguments = (copy, [f"tests/{test}" for test in tests], self._printed)
        self.process: BaseProcess = multiprocessing.get_context("fork").Process(target=run_tests, args=arguments)
        self.process.start()

    def end(self) -> tuple[int | None, str]:
        """Restore the copy; return pytest's exit code (None: out of time) and its output."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        if self.mutation is not None:
            self._file.write_text(self._source, encoding="utf-8")
        code = self.process.exitcode
        return None if code is None or code < 0 else code, self._printed.read_text(encoding="utf-8")


def run_tests(copy: Path, tests: list[str], printed: Path) -> None:
    """Run tests in a copy until the first fails; in a forked process, which ends with pytest's exit code."""
    import pytest

    with printed.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    source = str(copy / "src")
    os.environ |= {"PYTHONPATH": source, "DNPO_CONF": str(copy / "conf")}
    here = {"", str(ROOT), str(ROOT / "src")}
    sys.path[:] = [str(copy), source, *(path for path in sys.path if path not in here)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "dnpo")]:
        del sys.modules[name]
    sys.exit(int(pytest.main(["-x", "-q", "-rfE", "-p", "no:cacheprovider", *tests])))


def main() -> None:
    """Try all mutations, print a line for each, and fail if one survives."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=description)
    parser.add_argument("words", nargs="*", help="only mutations of files whose path has one of these words")
    parser.add_argument("--jobs", type=int, default=2, help="test runs at once (default: 2)")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if not given.words or any(word in m.file for word in given.words)]
    check_sources(chosen)
    prepare_process()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copies = [copy_checkout(Path(folder) / str(number)) for number in range(given.jobs)]
        check_tests_pass(chosen, copies[0])
        survived = try_all(chosen, copies)
    print(f"{len(chosen) - survived} of {len(chosen)} caught in {time.monotonic() - started:.0f} s")
    sys.exit(1 if survived else 0)


def check_sources(mutations: Sequence[Mutation]) -> None:
    """Refuse to begin if a mutation's piece of source does not occur exactly once."""
    for mutation in mutations:
        found = (ROOT / "src" / "dnpo" / mutation.file).read_text(encoding="utf-8").count(mutation.source)
        if found != 1:
            sys.exit(f"{mutation.file}: expected {mutation.source!r} once, found it {found} times ({mutation.what})")


def prepare_process() -> None:
    """Import what every fork needs."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    sys.dont_write_bytecode = True  # a mutant and its source may have the same time in seconds and the same size
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for name in IMPORTED:
        import_module(name)


def copy_checkout(folder: Path) -> Path:
    """Copy the files that tests need."""
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    return folder


def check_tests_pass(mutations: Sequence[Mutation], copy: Path) -> None:
    """Refuse to begin if a test fails without any mutation."""
    run = Run(copy, dict.fromkeys(test for mutation in mutations for test in mutation.tests.split()))
    run.process.join()
    code, printed = run.end()
    if code != PASSED:
        sys.exit(f"the tests do not pass without any mutation:\n{printed[-3000:]}")


def try_all(mutations: Sequence[Mutation], copies: Sequence[Path]) -> int:
    """Try all mutations, one in each copy at a time; return how many survive."""
    todo, free, survived = list(mutations), list(copies), 0
    under_way: list[Run] = []
    while todo or under_way:
        while todo and free:
            mutation = todo.pop(0)
            under_way.append(Run(free.pop(), mutation.tests.split(), mutation))
        wait([run.process.sentinel for run in under_way], timeout=1)
        for run in list(under_way):
            if not run.process.is_alive() or time.monotonic() - run.started > LIMIT:
                survived += not caught(run)
                under_way.remove(run)
                free.append(run.copy)
    return survived


def caught(run: Run) -> bool:
    """Whether a test has caught a mutation; prints the outcome."""
    code, printed = run.end()
    assert run.mutation is not None
    seconds = f"{time.monotonic() - run.started:.0f} s"
    if code == PASSED:
        print(f"SURVIVED  {run.mutation.file}: {run.mutation.what} ({run.mutation.tests}, {seconds})", flush=True)
        return False
    failure = re.search(r"^(?:FAILED|ERROR) tests/(\S+::[^\s\[]+)", printed, re.MULTILINE)
    if code is not None and (code != FAILED or failure is None):
        sys.exit(f"{run.mutation.file}: {run.mutation.what}: pytest ended with {code}:\n{printed[-3000:]}")
    by = failure.group(1) if failure is not None else "running out of time"
    print(f"caught    {run.mutation.file}: {run.mutation.what} (by {by}, {seconds})", flush=True)
    return True


if __name__ == "__main__":
    main()
