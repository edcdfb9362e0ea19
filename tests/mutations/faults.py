"""Which mistakes must the unit tests notice? Deliberate ones, each of a few characters, chosen as an adversary would.

By file of the package: (the text as it is, found there exactly once; the text with the mistake; what that breaks). And
by file the tests of tests/unit that guard it, the likeliest to notice first.

Left out: putting them in and running the tests (`run.py`); mistakes that only several processes can see, and those that
no promise forbids. Tried, and the same program in other words, whatever the input:

- `step + 1 >= warmup_steps` with `step >=` (objective_of_step): at that step the formula gives alpha itself.
- `if step >= section.warmup_steps` with `>` (learning_rate): at that step the share is 1, and min_lr is not above lr.
- `count > 1` with `> 0` (group_advantage), `count < 2` with `< 1` (loo_log_z): who is alone has 0 by the formula, too.
- `place = group` in place of its rank among the groups (both): sums are longer, and the same.
- `weight.detach()` without it (balance_loss) as long as the caller's weight has no gradient.
- `-mass.shape[1] % BLOCK` with a whole block more (sampling): zeros.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """file: in the package. original: found there once; mutated: what stands in its place. breaks: in a few words."""

    file: str
    original: str
    mutated: str
    breaks: str


_TRAJECTORY_BALANCE = (
    ("energy = sequence_log_prob - alpha", "energy = sequence_log_prob + alpha", "sign of the reference"),
    ('energy / length if policy_norm == "length" else energy', "energy", "no length in the residual"),
    (
        'sequence_log_prob / length if policy_norm == "length"',
        'sequence_log_prob / length if policy_norm != "length"',
        "S divided where it should not be, in tb_token_target",
    ),
    ("energy = policy - alpha * reference", "energy = policy - reference", "alpha is 1 in tb_token_target"),
    ("energy - alpha * psi - reward", "energy - psi - reward", "psi not times alpha"),
    ("energy - alpha * psi - reward", "energy + alpha * psi - reward", "sign of psi"),
    ("energy - alpha * psi - reward", "energy - alpha * psi + reward", "sign of the task's reward"),
    (
        "torch.where(mask, log_probs - alpha * ref_log_probs, 0.0)",
        "torch.where(mask, log_probs - ref_log_probs, 0.0)",
        "alpha is 1 in the per-token loss",
    ),
    (
        "excess - mean[:, None], 0.0).square().sum(dim=1) / count",
        "excess - mean[:, None], 0.0).square().mean(dim=1)",
        "padding in the denominator of the variance",
    ),
    ("torch.where(mask, excess - mean[:, None], 0.0)", "(excess - mean[:, None])", "padding in the variance"),
    (
        "(sequence_log_prob - old_sequence_log_prob).detach()",
        "(old_sequence_log_prob - sequence_log_prob).detach()",
        "importance ratio upside down",
    ),
    (
        "(sequence_log_prob - old_sequence_log_prob).detach()",
        "(sequence_log_prob - old_sequence_log_prob)",
        "a gradient through the importance weight",
    ),
    ("difference = difference / num_tokens", "difference = difference * num_tokens", "seq_mean is no mean"),
    (
        "0.0 if upper_only else 1.0 - clip_epsilon, 1.0",
        "1.0 - clip_epsilon if upper_only else 0.0, 1.0",
        "the two sides of the clip change places",
    ),
    (
        "1.0 - clip_epsilon, 1.0 + clip_epsilon), unclipped",
        "1.0 - clip_epsilon, 1.0 / (1.0 - clip_epsilon)), unclipped",
        "upper side of the clip",
    ),
    ("residual = log_z + partial", "residual = partial - log_z", "sign of log Z'"),
    (
        "weight.detach() * (residual.square() + spread)",
        "weight.detach() * residual.square() + spread",
        "the per-token part does not weigh",
    ),
    ("weight.detach() * (residual.square() + spread)", "(residual.square() + spread)", "no importance weight"),
    ("terms = torch.where(kept, weight", "terms = torch.where(torch.ones_like(kept), weight", "dropped ones count"),
    ("Loss(terms.sum() / num_kept,", "Loss(terms.sum() / kept.sum(),", "this micro-batch's count, not the step's"),
    ("Loss(terms.sum() / num_kept,", "Loss(terms.mean(),", "the micro-batch's size as the denominator"),
    ("return -float((weight * partial)[kept]", "return float((weight * partial)[kept]", "sign of the start value"),
    ("[kept].sum() / weight.sum())", "[kept].sum() / kept.sum())", "start value not weighted"),
    ("    weight = torch.where(kept, weight, 0.0)\n    return", "    return", "dropped ones in the start value"),
)

_LOG_Z_ESTIMATE = (
    ("others = sums.weight - member_weight", "others = sums.weight", "the response itself in leave-one-out's weight"),
    ("alone = (sums.num_kept < 2)", "alone = (sums.num_kept < 3)", "pairs count as alone"),
    (
        "-(sums.weighted - member_weight * partial.detach())",
        "-(sums.weighted - partial.detach())",
        "leave-one-out takes out what it did not add",
    ),
    (
        "torch.where(alone, -partial.detach(), estimate)",
        "torch.where(alone, partial.detach(), estimate)",
        "one alone has a residual",
    ),
    (
        "sums.weight / (sums.num_kept - 1).clamp(min=1)",
        "sums.weight / sums.num_kept.clamp(min=1)",
        "G for G - 1 in the contrastive factor",
    ),
    (
        "sums.weight / (sums.num_kept - 1).clamp(min=1)",
        "sums.num_kept / (sums.num_kept - 1).clamp(min=1)",
        "contrastive factor not weighted",
    ),
    (
        "member_weight = torch.where(kept, weight, 0.0).detach()",
        "member_weight = weight.detach()",
        "dropped ones in the group's mean",
    ),
    ("torch.where(kept, partial.detach(), 0.0)", "torch.where(kept, partial, 0.0)", "a gradient through log Z'"),
    (
        "per_group(kept.to(member_weight.dtype))\n",
        "per_group(torch.ones_like(member_weight))\n",
        "dropped ones in the group's size",
    ),
    ("_, group_index = group.unique", "_, group_index = torch.zeros_like(group).unique", "one group for all"),
    (
        "    return -(sums.weighted / sums.weight)\n",
        "    return sums.weighted / sums.weight\n",
        "sign of the group's estimate",
    ),
)

_POLICY_GRADIENT = (
    (
        "alpha * ref_sequence_log_prob - sequence_log_prob",
        "ref_sequence_log_prob - alpha * sequence_log_prob",
        "alpha on the policy",
    ),
    ('if norm == "length":\n', 'if norm != "length":\n', "rl_token and rl_traj change places"),
    ("(reward + alpha * psi).detach()", "(reward + psi).detach()", "psi not times alpha"),
    ("(reward + alpha * psi).detach()", "(reward + alpha * psi)", "a gradient through the reward"),
    (
        "per_group(reward) / count.clamp(min=1), 0.0)",
        "per_group(reward) / per_group(torch.ones_like(reward)), 0.0)",
        "dropped ones in the denominator of the mean",
    ),
    ("(per_group(centred.square()) / (count - 1)", "(per_group(centred.square()) / count", "standard deviation by G"),
    ("reward = torch.where(kept, reward, 0.0).detach()", "reward = reward.detach()", "dropped ones in the mean"),
    ("centred / (std + 1e-6)", "centred / (std + 1e-4)", "another epsilon than GRPO's"),
    ("torch.where(count > 1, centred, 0.0)", "torch.where(count > 2, centred, 0.0)", "pairs have no advantage"),
    (
        'divisor = num_tokens if score_norm == "length"',
        'divisor = num_tokens if score_norm != "length"',
        "the score's norm the other way",
    ),
    ("terms = -advantage * (of_token", "terms = advantage * (of_token", "uphill"),
    ("(of_token * log_probs).sum(dim=1) / divisor * of_response", "log_probs.sum(dim=1) / divisor", "no v without w"),
    ("/ divisor * v, sequence_ratio", "/ divisor, sequence_ratio", "no v beside w of the sequence"),
    ("* num_tokens / divisor * v", "* num_tokens / divisor", "no v beside w of the mean"),
    (
        "torch.where(mask, of_token * clipped(rho, advantage[:, None]), 0.0)",
        "torch.where(mask, clipped(rho, advantage[:, None]), 0.0)",
        "no v of a token",
    ),
    (".sum(dim=1) / divisor * of_response\n    share", ".sum(dim=1) / divisor\n    share", "no v beside tokens' w"),
    (
        "outside(sequence_ratio), bounded * v",
        "outside(sequence_ratio), sequence_ratio * v",
        "w not clipped, of the sequence",
    ),
    ("of_token * rho.detach().clamp(low, high)", "of_token * rho.detach()", "w not clipped, of tokens"),
    ("low, high = 0.0 if upper_only else 1.0 - clip_epsilon", "low, high = 1.0 - clip_epsilon", "clip: upper is both"),
    ("return -torch.minimum(rho * advantage", "return -torch.maximum(rho * advantage", "the clip protects nothing"),
    ("((rho < low) | (rho > high))", "(rho > high)", "only one side counted as clipped"),
    ("(difference.sum(dim=1) / num_tokens).exp()", "difference.mean(dim=1).exp()", "padding in seq_mean"),
    (
        "clipped(rho, advantage) * num_tokens / divisor",
        "clipped(rho, advantage) / divisor, rho",
        "seq_mean's gradient smaller by n",
    ),
    (
        "torch.where(mask, of_token * clipped(rho, advantage[:, None]), 0.0)",
        "(of_token * clipped(rho, advantage[:, None]))",
        "padding in the surrogate's value",
    ),
    (
        "torch.where(mask, outside(rho.detach()), 0.0).sum(dim=1) / num_tokens",
        "torch.where(mask, outside(rho.detach()), 0.0).mean(dim=1)",
        "padding in the share of clipped tokens",
    ),
    ("difference = ref_log_probs - log_probs", "difference = log_probs - ref_log_probs", "KL the other way round"),
    (
        "(difference.exp() - difference - 1.0).sum(dim=1) / num_tokens",
        "(difference.exp() - difference - 1.0).mean(dim=1)",
        "padding in the KL term",
    ),
)

_PRESETS = (
    ('"tb_traj": Balance("none", "none")', '"tb_traj": Balance("none", "length")', "another objective"),
    ('"tb_token_target": Balance("none", "length")', '"tb_token_target": Balance("length", "none")', "swapped norms"),
    (
        '"tb_token_score": Balance("length", "length", weight="length")',
        '"tb_token_score": Balance("length", "length")',
        "tb_token_score is la_tb",
    ),
    ("per_token=True)", "per_token=False)", "tb_token_step is la_tb"),
    (
        '"rl_traj": PolicyGradient("power", divide_by_std=False',
        '"rl_traj": PolicyGradient("power", divide_by_std=True',
        "rl_traj divides by the standard deviation",
    ),
    (
        'PolicyGradient("power_per_token", divide_by_std=False, score_norm="none")',
        'PolicyGradient("power_per_token", divide_by_std=False, score_norm="length")',
        "rl_token's score over n",
    ),
    (
        'PolicyGradient("gold", divide_by_std=True, score_norm="length")',
        'PolicyGradient("gold", divide_by_std=True, score_norm="none")',
        "GRPO without 1/n",
    ),
    ('"empo": PolicyGradient("cluster"', '"empo": PolicyGradient("majority"', "EMPO is TTRL"),
    (
        'self.policy_norm == "length" or self.per_token',
        'self.policy_norm == "length" and self.per_token',
        "who says that psi is per token",
    ),
    (
        'self.reference_norm == "length" and not self.per_token',
        'self.reference_norm == "length"',
        "the per-token loss is said to tilt",
    ),
    ('LearnedLogZ = Literal["mlp", "scalar"]', 'LearnedLogZ = Literal["mlp"]', "the scalar head is not learned"),
    ('self.reward in ("power", "power_per_token")', 'self.reward in ("power",)', "rl_token knows no alpha"),
)

_RESIDUAL = (
    ("batch.ref_log_probs.sum(dim=1),", "batch.ref_log_probs.mean(dim=1),", "S_ref is a mean"),
    ("policy_norm=objective.form.policy_norm", "policy_norm=objective.form.reference_norm", "a norm for the other"),
    ("reference_norm=objective.form.reference_norm", "reference_norm=objective.form.policy_norm", "likewise"),
    ("reward=batch.reward,", "reward=0.0,", "no task reward in the energy"),
    ("        batch.psi,\n", "        torch.zeros_like(batch.psi),\n", "no psi in the energy"),
    ("objective.alpha,", "1.0,", "alpha is 1"),
    ("clamp(max=objective.tilt_cap)", "clamp(min=objective.tilt_cap)", "the cap is a floor"),
    ('if objective.form.weight == "length"', 'if objective.form.weight == "none"', "m is n where it should be 1"),
    ("batch.old_log_probs.sum(dim=1) if", "batch.rollout_log_probs.sum(dim=1) if", "the sampler for the scorer"),
    ("clip_epsilon=rule.epsilon", "clip_epsilon=0.2", "clip_epsilon has no effect"),
    ("upper_only=rule.upper_only", "upper_only=False", "clip: upper has no effect"),
    ("ratio=rule.ratio,\n", 'ratio="seq",\n', "ratio has no effect"),
    ("ratio=rule.ratio, cap", 'ratio="seq", cap', "sampler_ratio has no effect"),
    ("cap=rule.cap", "cap=2.0", "sampler_ratio_cap has no effect"),
    ("batch), objective.sampler", "batch), objective.importance", "the rule of w for v"),
    ("sampler_weight(old, sampler,", "sampler_weight(sequence_log_prob, sampler,", "v of the policy as it is"),
    ("sampler, num_tokens = batch.rollout_log_probs", "sampler, num_tokens = batch.ref_log_probs", "the base sampled"),
)

_GROUP_BASELINE = (
    ("objective.learns_log_z or all(", "objective.learns_log_z or any(", "an estimate of cut groups"),
    (
        "return w.weight *",
        "return w.ratio *",
        "unclipped weights in the mean",
    ),
    ("v.weight * residual_weight(batch, objective)", "v.weight", "m not in the group's mean"),
    ("w.weight * v.weight", "w.weight", "v not in the group's mean"),
    ("pairs = [(log_probs.sum(dim=1), batch)", "pairs = [(log_probs.mean(dim=1), batch)", "S is a mean"),
    ('{"group": group_log_z, "loo": loo_log_z}', '{"group": group_log_z, "loo": group_log_z}', "loo is group"),
    (
        "torch.cat([batch.kept for batch in batches]),\n    )\n",
        "torch.cat([batch.kept | True for batch in batches]),\n    )\n",
        "dropped ones in log Z'",
    ),
    (
        "torch.cat([batch.kept for batch in batches]),\n        divide",
        "torch.cat([batch.kept | True for batch in batches]),\n        divide",
        "dropped ones in the advantage",
    ),
    (
        "torch.cat([batch.group for batch in batches]),\n        torch.cat([_weight_of",
        "torch.cat([torch.zeros_like(batch.group) for batch in batches]),\n        torch.cat([_weight_of",
        "one group for all",
    ),
    ("log_z=own_log_z, weight_factor=own_factor", "log_z=own_factor, weight_factor=own_log_z", "swapped"),
    ("divide_by_std=objective.form.divide_by_std", "divide_by_std=True", "every rival divides by the deviation"),
    ("advantage=own, reward=reward", "advantage=reward, reward=own", "swapped"),
    (
        "            log_probs.sum(dim=1),\n",
        "            batch.rollout_log_probs.sum(dim=1),\n",
        "a reward as old as its response: lag lowers the largest stable rate",
    ),
    (
        '"length" if objective.form.per_length else "none"',
        '"none" if objective.form.per_length else "length"',
        "rl_token and rl_traj change places",
    ),
    (
        "            batch.psi,\n            alpha,",
        "            0 * batch.psi,\n            alpha,",
        "no psi in RL's reward",
    ),
    (
        "            batch.ref_log_probs.sum(dim=1),",
        "            batch.rollout_log_probs.sum(dim=1),",
        "the sampler for the base",
    ),
    (
        "return [batch.reward for batch in batches]",
        "return [batch.psi for batch in batches]",
        "the penalty as the reward",
    ),
)

_LOSS = (
    ("v.weight * residual_weight(batch, objective) * factor", "v.weight * factor", "m is 1"),
    ("importance * v.weight * residual", "importance * residual", "no v in a balance"),
    ("_weights(v, importance * v.weight", "_weights(v, v.weight", "the whole weight without w"),
    (
        "old.sum(dim=1), sampler.sum(dim=1), num_tokens, ratio",
        "sampler.sum(dim=1), old.sum(dim=1), num_tokens, ratio",
        "v",
    ),
    ("v.weight if token_weight is None else token_weight", "v.weight", "tokens have the weight of their response"),
    ("torch.where(batch.loss_mask, token_weight, 0.0).sum", "token_weight.sum", "padding in the mean of v"),
    ("**_apart(old, batch", "**_apart(log_probs, batch", "training in the gap"),
    ('lag["lag_max"] == 0', 'lag["lag_sum"] >= 0', "other weights in the gap"),
    (
        '"kl_sum": (difference.exp() - difference - 1.0)',
        '"kl_sum": ((-difference).exp() + difference - 1.0)',
        "the KL the other way",
    ),
    (
        "residual_weight(batch, objective) * factor",
        "residual_weight(batch, objective)",
        "no contrastive factor",
    ),
    ("weight = importance * v", "weight = ratio * v", "the weight is not clipped"),
    (
        "batch.ref_log_probs, batch.loss_mask, objective.alpha)",
        "batch.ref_log_probs, batch.loss_mask, 1.0)",
        "alpha is 1 in the per-token loss",
    ),
    ("if objective.form.per_token:", "if not objective.form.per_token:", "the per-token part in the others"),
    ("batch.kept, max(num_kept, 1), spread)", "batch.kept, len(batch.kept), spread)", "the micro-batch's size"),
    ("batch.kept, max(num_kept, 1), spread)", "batch.kept, max(num_kept, 1))", "no per-token part"),
    (
        '"log_z": log_z, "residual": residual, "weight"',
        '"log_z": log_z, "residual": partial, "weight"',
        "the metrics' residual without log Z'",
    ),
    ("(importance != ratio).float()", "(importance == ratio).float()", "clip fraction the other way"),
    (
        "is not None else log_probs.detach(), objective",
        "is not None else log_probs, objective",
        "ratio without gradient",
    ),
    ("score_norm=objective.form.score_norm", 'score_norm="length"', "rl_traj over n"),
    ("upper_only=rule.upper_only", "upper_only=False", "clip: upper has no effect on rivals"),
    ("clip_epsilon=rule.epsilon", "clip_epsilon=0.2", "clip_epsilon has no effect on rivals"),
    (
        "batch.advantage,\n        batch.num_response_tokens",
        "batch.reward,\n        batch.num_response_tokens",
        "the reward for the advantage",
    ),
    ("max(num_kept, 1), columns", "max(len(terms), 1), columns", "the micro-batch's size, for rivals"),
    ("entropy.sum(dim=1) / batch.num_response_tokens", "entropy.mean(dim=1)", "padding in the entropy"),
    ("return terms.sum() / max(num_kept, 1), {", "return -terms.sum() / max(num_kept, 1), {", "entropy goes up"),
    ("return terms.sum() / max(num_kept, 1), {", "return terms.mean(), {", "the micro-batch's size, for one-shot EM"),
    ("terms + kl_coefficient * kl_terms", "terms - kl_coefficient * kl_terms", "sign of the KL term"),
    ("terms + kl_coefficient * kl_terms", "terms + kl_terms", "kl_coefficient has no effect"),
    ("return torch.where(batch.kept, terms, 0.0)", "return terms", "dropped ones in the rivals' loss"),
    ("old = log_probs if batch.old_log_probs is None else batch.old_log_probs", "old = log_probs", "no old policy"),
    (
        "torch.where(batch.loss_mask, old - batch.rollout_log_probs, 0.0)",
        "old - batch.rollout_log_probs + 1.0",
        "a step apart everywhere",
    ),
    ("if batch.old_from_sampler:", "if not batch.old_from_sampler:", "whose sampler gap exists"),
    (
        "torch.where(batch.loss_mask, difference.exp(), torch.zeros_like(difference))",
        "difference.exp()",
        "padding in the token ratio",
    ),
    ("torch.where(batch.loss_mask, log_probs, -torch.inf)", "log_probs", "padding in the highest log-prob"),
    (
        "find_loop(targets[row][mask], ref_log_probs[row][mask]",
        "find_loop(targets[row], ref_log_probs[row]",
        "loops of the prompt",
    ),
    ('"num_prompt_tokens": batch.prompt_mask.sum', '"num_prompt_tokens": (~batch.loss_mask).sum', "padding is prompt"),
    ("torch.full_like(batch.psi, torch.nan)", "torch.zeros_like(batch.psi)", "what does not exist is 0"),
    ("loop.num_tokens, loop.nats, loop.entry_nats", "loop.num_tokens, loop.entry_nats, loop.nats", "swapped"),
)

_REWARDS = (
    ("(1 if number is None else sizes[number])", "(0 if number is None else sizes[number])", "EMPO without an answer"),
    ("votes.most_common(1)[0][0]", "votes.most_common()[-1][0]", "TTRL's label is the rarest"),
    ("Counter(number for number in numbers if number is not None)", "Counter(numbers)", "no answer is voted for"),
    ("[float(answer is not None) for answer in answers]", "[float(answer is None) for answer in answers]", "no box"),
    ("return 0.0 if boxed or rollout", "return 0.0 if boxed and rollout", "psi for boxed ones"),
    ("rollout.prompt.task in exempt_tasks", "rollout.prompt.task not in exempt_tasks", "who is exempt"),
    ("divide_by_std=True", "divide_by_std=False", "FlowRL's advantage is not scaled"),
    ("(objective.reward_scale * values)", "values", "reward_scale has no effect"),
    ("if objective.reward_advantage:", "if not objective.reward_advantage:", "FlowRL's advantage elsewhere"),
    (
        "distinct_share(group, 2), distinct_share(group, 3)",
        "distinct_share(group, 3), distinct_share(group, 2)",
        "swapped",
    ),
    ("math.nan if verdict is None", "0.0 if verdict is None", "no gold answer is a wrong one"),
    ("rollout, answer is not None, psi", "rollout, answer is None, psi", "psi for boxed ones"),
    ("repeated_share(rollout.response_token_ids)", "repeated_share(rollout.prompt.token_ids)", "the prompt's"),
    ('if objective.task_reward not in (None, "none")', "if objective.task_reward", "a reward of none"),
)

_UPDATE = (
    ("float(weight[kept > 0].sum() / (kept", "float(weight.sum() / (kept", "dropped ones in the mean weight"),
    ("(kept > 0).sum().clamp(min=1))", "len(kept))", "all rollouts in the denominator"),
    (
        "batch.kept.sum() for batch in batches",
        "batch.kept.numel() * torch.ones(()) for batch in batches",
        "dropped ones in the loss's denominator",
    ),
    ("    dist.all_reduce(count, group=groups.dp)\n", "", "this rank's count, not all ranks'"),
    (
        "residual_without_log_z(batch.ref_log_probs.sum(dim=1), batch",
        "residual_without_log_z(0 * batch.psi, batch",
        "the start value not at S = S_ref",
    ),
    (
        "                        residual_weight(batch, objective),\n",
        "                        batch.kept,\n",
        "the start value not weighted",
    ),
    (
        "                        batch.kept,\n",
        "                        batch.kept | True,\n",
        "dropped ones in the start value",
    ),
    ("if kept.any() else 0.0", "if not kept.any() else 0.0", "the head starts at 0"),
)

_OBJECTIVE_OF_STEP = (
    ("(step + 1) / warmup_steps", "step / warmup_steps", "alpha's warm-up a step late"),
    ("1.0 + (section.alpha - 1.0) *", "section.alpha *", "alpha rises from 0"),
    ('section.clip == "upper"', 'section.clip != "upper"', "the two clips change places"),
    (
        "section.log_z, importance, section.tilt_cap, sampler)",
        "section.log_z, importance, None, sampler)",
        "tilt_cap has no effect",
    ),
    (
        "importance, section.kl_coefficient or 0.0, sampler)",
        "importance, 0.0, sampler)",
        "kl_coefficient has no effect",
    ),
    ("section.sampler_ratio_cap or 1.0", "2.0", "sampler_ratio_cap has no effect"),
    ("section.tilt_cap, sampler)", "section.tilt_cap)", "sampler_ratio has no effect on a balance"),
    ("section.kl_coefficient or 0.0, sampler)", "section.kl_coefficient or 0.0)", "nor on a rival"),
    ("EntropyObjective(section.kl_coefficient or 0.0)", "EntropyObjective()", "nor on one-shot EM"),
    ("section.clip_epsilon or 0.0", "0.2", "clip_epsilon has no effect"),
    ('section.ratio or "none"', '"none"', "ratio has no effect"),
)

_MICRO_BATCHES = (
    ('config.objective.truncated == "drop"', 'config.objective.truncated == "keep"', "kept and dropped change places"),
    ("layout.pp if layout.vpp else 1", "1", "interleaving needs a multiple of pp"),
    ("size = len(annotated) // config.optimizer.updates_per_rollout", "size = len(annotated)", "one update for all"),
    (
        "per_update = len(lengths) // config.optimizer.updates_per_rollout",
        "per_update = len(lengths)",
        "one update for all, packed",
    ),
    ("and not config.objective.learns_log_z", "and config.objective.learns_log_z", "groups whole where none asks"),
    ("together = estimates and groups_fit", "together = estimates or groups_fit", "likewise"),
    (
        "len(r.prompt.token_ids) + len(r.response_token_ids)",
        "len(r.response_token_ids)",
        "over the budget by the prompts",
    ),
    ("shares[groups.dp_rank]", "shares[0]", "every rank does the first one's part"),
)

_LEARNING_RATE = (
    ("return (step + 1) / section.warmup_steps", "return step / section.warmup_steps", "a first step of rate 0"),
    ("if step < section.warmup_steps:", "if step <= section.warmup_steps:", "above the peak"),
    ("num_steps - section.warmup_steps)", "num_steps)", "never decays to the end"),
    ("if step >= section.warmup_steps:", "if step >= 0:", "the floor cuts off the warm-up"),
    ("max(lr, section.min_lr", "min(lr, section.min_lr", "the floor is a ceiling"),
    ("section.log_z_lr * share", "section.log_z_lr", "the head's rate does not decay"),
    ("0.5 * (1.0 + math.cos(math.pi * progress))", "math.cos(0.5 * math.pi * progress)", "another curve"),
)

_REDUCE = (
    (
        '"policy_entropy": -sampled.sum()',
        '"policy_entropy": -every["sequence_log_prob"].sum()',
        "the policy an update later",
    ),
    ('"ref_log_prob_mean": ref.sum() / num_tokens', '"ref_log_prob_mean": ref.mean()', "per response, not per token"),
    ('"kl_per_token": (sampled - ref)', '"kl_per_token": (ref - sampled)', "sign of the KL"),
    ('"kl_per_response": (sampled - ref).mean()', '"kl_per_response": (sampled - ref).sum() / num_tokens', "per token"),
    (
        'every["lag_max"] == 0, every["old',
        'every["lag_max"] >= 0, every["old',
        "entropy of weights that did not sample",
    ),
    ('"staleness", ~same_weights', '"staleness", same_weights', "no staleness of older weights"),
    (
        '"lag_mean": every["lag_sum"].sum() / every["num_response_tokens"].sum()',
        '"lag_mean": every["lag_sum"].mean()',
        "per response",
    ),
    ('(every["num_versions"] > 1).mean()', '(every["num_versions"] >= 1).mean()', "every response is mixed"),
    ("weights.sum() ** 2 / (len(weights) * squares)", "weights.sum() ** 2 / squares", "a number, not a share"),
    ('_effective_share(kept["importance"])', '_effective_share(kept["sampler_weight"])', "no w in the whole weight"),
    ("np.quantile(lengths, 0.95)", "np.quantile(lengths, 0.5)", "the median length"),
    ("every[column][rollouts].sum() / num_tokens", "every[column][rollouts].mean()", "per response"),
    ('every["num_response_tokens"][rollouts].sum()', 'every["num_response_tokens"].sum()', "tokens of other weights"),
    ('against_sampler = every["sequence_log_prob"]', "against_sampler = old", "no staleness in the ratio"),
    (
        'np.abs(every["old_sequence_log_prob"] - every["rollout_sequence_log_prob"])',
        '(every["old_sequence_log_prob"] - every["rollout_sequence_log_prob"])',
        "gaps cancel",
    ),
    ('np.abs(every["sequence_log_prob"] - old).mean()', '(every["sequence_log_prob"] - old).mean()', "moves cancel"),
    ('column[every["kept"] > 0]', 'column[every["kept"] >= 0]', "dropped ones in the objective"),
    ('kept["rollout_index"] // settings', 'kept["rollout_index"] % settings', "who belongs to which prompt"),
    ('"residual_std": residual.std()', '"residual_std": residual.var()', "a variance"),
    ("(weight * residual).mean(),", "residual.mean(),", "not weighted"),
    ('_per_prompt(kept["log_z"] - residual', '_per_prompt(kept["log_z"] + residual', "sign of the group's estimate"),
    ('lengths.argsort(kind="stable")', '(-lengths).argsort(kind="stable")', "longest first"),
    ("1.0 - (estimate - head).var() / variance", "1.0 - (estimate - head).var()", "not a share of the variance"),
    ("inverted += (product < 0)", "inverted += (product > 0)", "the agreeing pairs"),
    ("pairs += (product != 0)", "pairs += (product == product)", "ties are pairs"),
    (
        'policy, power = kept["sampled_sequence_log_prob"]',
        'policy, power = kept["sequence_log_prob"]',
        "an update later",
    ),
    ("freedom = (counts - 1).sum()", "freedom = counts.sum()", "n for n - 1"),
    ('{"alpha": alpha, "inversion_rate"', '{"inversion_rate"', "a metric vanishes"),
    ('        "reward_mean": kept["reward"].mean(),\n', "", "a metric vanishes"),
    ('        "distinct_3": every["distinct_3"].mean(),\n', "", "a metric vanishes"),
    ("(0.05, 0.25, 0.5, 0.75, 0.95)", "(0.05, 0.25, 0.75, 0.95)", "a metric vanishes"),
    ("np.minimum(lengths, settings.tilt_cap)", "np.maximum(lengths, settings.tilt_cap)", "the cap is a floor"),
    (
        "added * counted if settings.energy_per_token",
        "added * counted if not settings.energy_per_token",
        "psi once a token",
    ),
    ("if highest > MAX_LOG_PROB", "if highest > 1.0", "a broken kernel passes"),
    ('kept["ref_sequence_log_prob"] / kept["num_response_tokens"]', 'kept["ref_sequence_log_prob"]', "not per token"),
    (
        "return finite.mean() if len(finite)",
        "return finite.sum() / len(values) if len(finite)",
        "prompts without answer",
    ),
    ('kept["clipped"].mean()', 'kept["clipped"].max()', "not a fraction"),
    ('kept["advantage"].std()', 'kept["advantage"].std(ddof=1)', "another denominator"),
    ('"eos_fraction": 1.0 - every["truncated"].mean()', '"eos_fraction": every["truncated"].mean()', "the cut ones"),
    ("LENGTH_QUARTERS = 4", "LENGTH_QUARTERS = 3", "thirds, and a metric vanishes"),
)

_ALARM = (
    (
        "losses[:-LOSS_RECENT_STEPS][:LOSS_BASELINE_STEPS]",
        "losses[:LOSS_BASELINE_STEPS]",
        "recent steps among the first",
    ),
    (' and line.get("alpha") == alpha', "", "losses at another alpha"),
    ("else usual, LOSS_FLOOR)", "else usual, 0.0)", "ten times nothing rings"),
    ("gap <= bound", "gap < bound", "rings at the bound"),
    ('any(line.get("num_rollouts_kept") != 0', 'all(line.get("num_rollouts_kept") != 0', "one empty step rings"),
    ("cut.change > thresholds.truncated_rise", "cut.now > thresholds.truncated_rise", "a level, not a rise"),
    ("longer.change > math.log(thresholds.length_rise)", "longer.change > thresholds.length_rise", "no logarithm"),
    ("statistics.median(recent)", "max(recent)", "one noisy loss rings"),
    ("cut.change > 0)", "cut.change < 0)", "a run that is cut less has diverged"),
    ("first[0] if usual > thresholds.loss_growth * first[0] else usual", "usual", "a spoilt start is the usual"),
    ("shorter.change < math.log(thresholds.length_fall)", "shorter.change < thresholds.length_fall", "no logarithm"),
)

_LENGTH_SHIFT = (
    ("abs(self.change) > NUM_ERRORS", "self.change > NUM_ERRORS", "falls are never significant"),
    ("NUM_ERRORS = 5.0", "NUM_ERRORS = 2.0", "noise rings"),
    ("before.var(ddof=1)", "before.std(ddof=1)", "a deviation for a variance"),
    ("/ len(part) for part in (first, recent))", "for part in (first, recent))", "noise of one step, not of a mean"),
    ("MIN_DEGREES / (num_prompts - 1)", "MIN_DEGREES / num_prompts", "n for n - 1"),
    ("max(BASELINE_STEPS, 2 * enough)", "max(BASELINE_STEPS, enough)", "fewer first steps"),
    ("np.mean([line[error] ** 2", "np.mean([line[error]", "an error for its square"),
    ("GROSS_RISE if names is TRUNCATED", "GROSS_RISE if names is not TRUNCATED", "swapped thresholds"),
    ("lines[-num_recent:]", "lines[:num_recent]", "the first steps for the recent ones"),
)

_TRAP = (
    (
        "alpha * (max_response_tokens * loop_nats + entry_nats)",
        "alpha * max_response_tokens * loop_nats + entry_nats",
        "entry not times alpha",
    ),
    ("counted * (tilt + bonus)", "counted * (tilt - bonus)", "sign of psi"),
    ("alpha * (max_response_tokens * loop_nats", "alpha * (counted * loop_nats", "the cap on what a loop costs"),
    ("kept & ~looping)", "kept)", "lambda of the loops as well"),
    ("tilts.effective.sum() / len(names)", "tilts.effective.mean()", "prompts without ordinary ones left out"),
    ("known.mean() >= MIN_PROMPT_SHARE", "known.mean() > MIN_PROMPT_SHARE", "half is not enough"),
    ("tilt=-np.where(", "tilt=np.where(", "sign of lambda"),
    (
        'columns["ref_sequence_log_prob"] + bonus * counted',
        'columns["ref_sequence_log_prob"] + bonus * lengths',
        "psi beyond the cap",
    ),
    ("min(tilt_cap, max_response_tokens)", "max(tilt_cap, max_response_tokens)", "a cap beyond the limit"),
    ('(columns["log_z"][first] - lam)', '(lam - columns["log_z"][first])', "sign of the gap"),
    ("bonus=bonus[loops],", "", "no psi on the loops"),
)

_LOOPS = (
    ("-(-max_response_tokens // LIMIT_SHARE)", "max_response_tokens // LIMIT_SHARE", "a token too few"),
    ("costs[num_tokens // 2 :].mean()", "costs.mean()", "the price of the entry in the rate"),
    ("max(float(costs.sum()) - num_tokens * nats, 0.0)", "float(costs.sum()) - num_tokens * nats", "a negative entry"),
    ("len(tokens) // MIN_TURNS) + 1)", "len(tokens) // MIN_TURNS))", "the longest period left out"),
    ("max(MIN_TURNS * period, min_tokens) - period", "max(MIN_TURNS * period, min_tokens)", "a turn too many"),
    ("int(lengths.argmax())", "int(lengths.argmin())", "the shortest run"),
    ("-ref_log_probs[start : start + num_tokens]", "-ref_log_probs[: num_tokens]", "the costs of other tokens"),
)

_TILT = (
    ('alpha * columns["psi"] + np.where', 'columns["psi"] + np.where', "psi not times alpha"),
    ('columns["reward"], 0.0)', '0.0, columns["reward"])', "the reward of the rivals"),
    ("np.log(group_size[present])", "np.log(np.bincount(prompt_index))", "ordinary ones for all in the mean"),
    ("prompt_index, weight**2, len(present)", "prompt_index, weight, len(present)", "effective samples"),
    ("largest(excess / counted)", "largest(excess)", "where the root is looked for"),
    (
        "exponent = excess - lam[prompt_index] * counted",
        "exponent = excess - lam[prompt_index]",
        "lambda once a response",
    ),
)

_REALISED_ALPHA = (
    ("self._count - 1 - (self._square > 0)", "self._count - 1", "a degree of freedom"),
    ("median < stop_at if stop_at > 1", "median <= stop_at if stop_at > 1", "reached is beyond"),
    ("lines[-WINDOW_STEPS:]", "lines[:WINDOW_STEPS]", "the first steps"),
    ("+ [1.0] * missing", "", "steps without an estimate are left out"),
    ("(num_prompts - 1) / num_prompts * np.square", "1.0 / num_prompts * np.square", "no jackknife"),
    ("1.0 - unexplained / np.square(explained).sum()", "1.0 - unexplained", "not a share"),
    ("0.0 - slope", "slope", "sign of lambda"),
    ("half_width / scale[0]", "half_width", "the interval in another unit"),
    ("MIN_SPREAD).any():", "MIN_SPREAD).all():", "a reward that only some prompts have"),
    (">= MIN_R2]", ">= 0.0]", "a collapse has reached alpha"),
)

_PROMPT_STATISTICS = (
    ("means.std(ddof=1)", "means.std()", "n for n - 1"),
    ("/ np.sqrt(len(means))", "", "a deviation for an error"),
    ('np.log(np.maximum(every["num_response_tokens"], 1.0))', 'np.log1p(every["num_response_tokens"])', "off by one"),
    ('every["rollout_index"] // responses', 'every["rollout_index"] % responses', "who belongs to which prompt"),
)

_REPETITION = (
    ("1.0 - len(set(grams)) / len(grams)", "len(set(grams)) / len(grams)", "the distinct share"),
    ("n: int = 4", "n: int = 3", "another n"),
    (
        "[gram for response in responses for gram in ngrams(response, n)]",
        "ngrams([token for response in responses for token in response], n)",
        "n-grams across responses",
    ),
)

_COUNTS = (
    ("if num_responses - num_correct < k", "if num_responses - num_correct <= k", "pass@k is 1 too soon"),
    (
        "range(num_responses - num_correct + 1, num_responses + 1)",
        "range(num_responses - num_correct, num_responses)",
        "off by one",
    ),
    ("if len(votes) == largest]", "if len(votes) >= 1]", "every answer is the most common"),
    ("[:k]:\n", ":\n", "maj@k of all"),
    (
        "math.hypot(*errors) / len(errors)",
        "math.hypot(*errors) / math.sqrt(len(errors))",
        "error of the mean over tasks",
    ),
    ("/ (len(values) - 1) / len(values))", "/ len(values) / len(values))", "n for n - 1"),
    ("if 1 << power <= fewest]", "if 1 << power < fewest]", "pass@k for the largest k vanishes"),
    ("num_tokens / num_responses,", "num_tokens / len(questions),", "tokens per question"),
    ('"policy_entropy": -sum(', '"policy_entropy": sum(', "sign"),
    ("and None not in errors", "", "an error where one is unknown"),
)

_CONFIG_RULES = (
    (
        'value if c.objective.preset == "flow_rl" else otherwise',
        'otherwise if c.objective.preset == "flow_rl" else value',
        "FlowRL's defaults elsewhere",
    ),
    (
        "(isinstance(form, PolicyGradient) and form.powers)",
        "isinstance(form, PolicyGradient)",
        "alpha accepted by GRPO",
    ),
    (
        '"mlp" if c.rollout.responses_per_prompt == 1',
        '"mlp" if c.rollout.responses_per_prompt <= 2',
        "pairs learn log Z'",
    ),
    ('return "seq" if _balances(c) else "token"', 'return "seq"', "GRPO's ratio is of the sequence"),
    ("updates_per_rollout == 1 and starts_as_old", "updates_per_rollout == 1", "replayed rollouts are not weighed"),
    ('"objective.alpha", _for_flow_rl(1.0, 4.0)', '"objective.alpha", _for_flow_rl(1.0, 2.0)', "alpha's default"),
    ('"objective.psi", 0.0', '"objective.psi", -0.5', "psi's default"),
    ('"objective.psi_exempt_tasks", ["creative"]', '"objective.psi_exempt_tasks", []', "a default"),
    ('"objective.log_z_detach", True', '"objective.log_z_detach", False', "the head trains the policy"),
    ('"objective.tilt_cap", None, _tilts', '"objective.tilt_cap", None, _balances', "a cap that has no effect"),
    (
        '"objective.reward_scale", _for_flow_rl(15.0, 1.0)',
        '"objective.reward_scale", _for_flow_rl(1.0, 15.0)',
        "swapped",
    ),
    (
        '"objective.kl_coefficient", 0.0, lambda c: not _has',
        '"objective.kl_coefficient", 0.0, lambda c: _has',
        "who has it",
    ),
    ('"objective.clip_epsilon", 0.2', '"objective.clip_epsilon", 0.1', "a default"),
    ('"objective.clip", "two_sided"', '"objective.clip", "upper"', "a default"),
    (
        '"optimizer.min_lr", 0.0, lambda c: c.optimizer.lr_decay != "constant"',
        '"optimizer.min_lr", 0.0, lambda c: True',
        "accepted and ignored",
    ),
    (
        '"precision.fp8_format", "hybrid", lambda c: c.precision.dtype == "fp8"',
        '"precision.fp8_format", "hybrid", lambda c: True',
        "accepted and ignored",
    ),
    (
        '"parallel.micro_batch_size", None, _pads',
        '"parallel.micro_batch_size", None, lambda c: True',
        "accepted and ignored",
    ),
    ('"evaluation.samples", 3, _has_engine', '"evaluation.samples", 3, lambda c: True', "accepted and ignored"),
    ('"evaluation.num_responses", 4', '"evaluation.num_responses", 1', "a default"),
    (
        '"metrics.wandb_project", "megatron_powerflow", lambda c: c.metrics.wandb != "off"',
        '"metrics.wandb_project", "megatron_powerflow", lambda c: True',
        "accepted and ignored",
    ),
    (
        "prompts_per_step % optimizer.updates_per_rollout",
        "prompts_per_step < optimizer.updates_per_rollout",
        "groups cut",
    ),
    (
        "steps >= optimizer.max_skipped_steps",
        "steps > optimizer.max_skipped_steps",
        "an alarm that never stops the run",
    ),
    (
        "if not alone and rollout.responses_per_prompt == 1",
        "if alone and rollout.responses_per_prompt == 1",
        "who is refused",
    ),
    ("1 < stop_at <= alpha", "1 < stop_at < alpha", "alpha itself is refused"),
    ("optimizer.min_lr > optimizer.lr", "optimizer.min_lr < optimizer.lr", "a floor above the peak"),
    ("0 <= beta < 1 for", "0 <= beta <= 1 for", "a beta of 1"),
    ('if ratio == "token" and isinstance', 'if ratio == "seq_mean" and isinstance', "who is refused"),
    ('objective.sampler_ratio == "token" and of_response', "of_response", "who is refused"),
    ("_has_engine(c) or _weighs_sampler(c)", "_has_engine(c)", "w and v both lead from the sampler"),
)

_CONFIG_FILE = (
    ("elif not applies(config) and value is not None", "elif not applies(config) and value", "0 and false are ignored"),
    ("if applies(config) and value is None", "if applies(config) and not value", "0 and false become the default"),
    ("    conflicts += contradictions(config)\n", "", "contradictions pass"),
    ("if not any(key in text for key in wrong)]", "if not wrong]", "contradictions beside a wrong type are not said"),
    (" if not any(key in text for key in wrong)]", "]", "what only a wrong value contradicts is said"),
    (
        "merge(OmegaConf.create(values), OmegaConf.from_dotlist(list(overrides)))",
        "merge(OmegaConf.from_dotlist(list(overrides)), OmegaConf.create(values))",
        "overrides override nothing",
    ),
    ("resolve=True)", "resolve=False)", "keys refer to nothing"),
    ("siblings, n=1)", "siblings[:1], n=1)", "no likely key"),
)

_CONFIG_TEXT = (
    ("elif isinstance(value, list):", "elif isinstance(value, tuple):", "resolvers in lists"),
    ('"${" in INTERPOLATION.sub("", text)', '"${" in INTERPOLATION.sub("${", text)', "every interpolation is refused"),
    ('if "${" in INTERPOLATION', 'if "${oc.env:" in INTERPOLATION', "nested resolvers pass"),
    ('number = counts.get(event.anchor or "", 1)', "number = 1", "aliases count once"),
    ("if anchor:", "if not anchor:", "anchors are not counted"),
    ("if key in path or", "if", "circles"),
    ("total > MAX_VALUES", "total > MAX_VALUES**2", "bombs of aliases"),
    ("for key in leaves) > MAX_CHARACTERS", "for key in leaves) > MAX_CHARACTERS**3", "bombs of interpolations"),
    ("if len(open_nodes) >= MAX_DEPTH", "if len(open_nodes) >= MAX_VALUES", "depth"),
)

_FIRST_BATCH = (
    ("gap > bound:", "gap < bound:", "who is refused"),
    ("bound is not None and gap", "gap", "replayed rollouts"),
    ('[~np.isfinite(columns["ref', '[np.isfinite(columns["ref', "which responses"),
    ("prompt_ids[index // size]", "prompt_ids[index % size]", "which prompt"),
    ("[same].sum() / num_tokens", "[same].sum() / len(rows)", "the mean over tokens"),
    ('columns["num_response_tokens"][same].sum()', 'columns["num_response_tokens"].sum()', "tokens of other weights"),
)

_REDACTION = (
    ("len(secret) >= SHORTEST:", "len(secret) > 99:", "by value"),
    ("reverse=True", "reverse=False", "the rest of a longer secret stays"),
    ("_IN_URL.sub(rf", "_BEARER.sub(rf", "by place"),
    (
        "token|secret|password|passwd|credentials?)$",
        "secret|password|passwd|credentials?)$",
        "tokens of the environment",
    ),
)

_OPERATIONS = (
    (
        "(self.gate.format(layer=layer, expert=expert), self.up.format(layer=layer, expert=expert))",
        "(self.up.format(layer=layer, expert=expert), self.gate.format(layer=layer, expert=expert))",
        "gate and up swapped in both directions",
    ),
    (
        "for name in (self.q, self.k, self.v))",
        "for name in (self.q, self.v, self.k))",
        "keys and values swapped in both directions",
    ),
    (
        "return self.tp_rank * step, (self.tp_rank + 1) * step",
        "return (self.tp_size - 1 - self.tp_rank) * step, (self.tp_size - self.tp_rank) * step",
        "ranks backwards",
    ),
    (
        ".unflatten(0, (last - first, rows))",
        ".unflatten(0, (rows, last - first)).transpose(0, 1)",
        "heads interleaved",
    ),
    (
        "torch.cat(parts, dim=1).flatten(0, 1)",
        "torch.cat([part.flatten(0, 1) for part in parts], dim=0)",
        "[q; k; v] without groups",
    ),
    (
        "whole.split([per_group * head_dim, head_dim, head_dim], dim=1)",
        "whole.split([head_dim, head_dim, per_group * head_dim], dim=1)",
        "slices of q, k, v",
    ),
    ("return (joined(shards, 1),)", "return (joined(shards, 0),)", "row-parallel shards stacked"),
    (
        "[half[0] for half in halves], 0), joined([half[1]",
        "[half[1] for half in halves], 0), joined([half[0]",
        "up for gate",
    ),
    (
        "starts[part], total = total, total + part_shape[0]",
        "starts[part], total = 0, total + part_shape[0]",
        "all at row 0",
    ),
    ("(min(start, vocab_size), min(stop, vocab_size))", "(start, min(stop, vocab_size))", "rows that are not there"),
    ("joined(shards, 0)[: shape.architecture.vocab_size]", "joined(shards, 0)", "padding rows exported"),
    ("real.new_zeros((stop", "real.new_ones((stop", "padding rows are not 0"),
    (
        "a.num_attention_heads * (a.mla.v_head_dim if a.mla else a.head_dim)",
        "a.num_attention_heads * a.head_dim",
        "width of attention, latent",
    ),
    (
        "_required(a.mla).nope_head_dim + _required(a.mla).v_head_dim)",
        "_required(a.mla).nope_head_dim + _required(a.mla).rope_head_dim)",
        "width of keys and values",
    ),
    ("kv_rows = architecture.num_query_groups", "kv_rows = architecture.num_attention_heads", "no grouped queries"),
    ("(first + rows[0], first + rows[1])", "(first + rows[0], first + rows[1] - first)", "a slice of a fused tensor"),
    (
        "columns=shape.part(width(shape.architecture, self.inputs))",
        "columns=(0, shape.part(width(shape.architecture, self.inputs))[1])",
        "columns of lower ranks, too",
    ),
)

_PACKING = (
    ("targets[row, : len(whole) - 1] = whole[1:]", "targets[row, : len(whole)] = whole", "labels are not rolled"),
    ("slice(len(prompt) - 1, len(whole) - 1)", "slice(len(prompt), len(whole))", "off by one"),
    ("prompt_mask[row, : len(prompt)] = True", "prompt_mask[row, : len(prompt) - 1] = True", "the prompt's last token"),
    ("kept = ~truncated if drop_truncated", "kept = truncated if drop_truncated", "the complete ones are dropped"),
    ('rollout.finish_reason == "length"', 'rollout.finish_reason == "eos"', "who is cut"),
    (
        "torch.tensor([rollout.slot for rollout",
        "torch.tensor([rollout.prompt.index for rollout",
        "one group of a prompt that came twice",
    ),
    ("rollout.slot * responses_per_prompt", "rollout.prompt.index * responses_per_prompt", "one row for two rollouts"),
    (
        "sorted(annotated, key=lambda a: (-a.num_tokens,",
        "sorted(annotated, key=lambda a: (a.num_tokens,",
        "short first",
    ),
    ("sorted(bin, key=lambda a: (-a.num_tokens,", "sorted(bin, key=lambda a: (a.num_tokens,", "short first, packed"),
    ("(ordered if uniform else part)", "part", "not alike where the pipeline interleaves"),
    ("positions = -(-length // multiple) * multiple", "positions = length // multiple * multiple", "rows too short"),
    ("max(-(-num_tokens // rule.total_multiple), 1)", "-(-num_tokens // rule.total_multiple)", "a dummy of no tokens"),
    ("pieces[2 * cp_size - 1 - cp_rank]])", "pieces[2 * cp_size - 2 - cp_rank]])", "context ranks share pieces"),
    ("first_key + (piece + 1) * length", "first_key + piece * length", "queries do not see themselves"),
    ("torch.cat(held).argsort()", "torch.cat(held)", "the order of keys, the other way"),
    ("held[-1] + number * row", "held[-1] + number * size", "tokens of other rows"),
    ("torch.tensor([item.psi for item", "torch.tensor([item.reward for item", "the reward for psi"),
    ("held[-1] < length", "held[-1] <= length", "padding is a token"),
    ("max(totals) if uniform else total", "total", "streams not alike where the pipeline interleaves"),
)

_BINS = (
    (
        "return self.max_tokens // self.total_multiple * self.total_multiple",
        "return self.max_tokens",
        "over the budget",
    ),
    (
        "return -(-num_tokens // self.sequence_multiple)",
        "return num_tokens // self.sequence_multiple",
        "room too small",
    ),
    ("self.linear * num_tokens + self.quadratic * num_tokens**2", "self.linear * num_tokens", "no quadratic term"),
    ("2.0 * active_weights(a)", "active_weights(a)", "one FLOP a weight"),
    ("(a.head_dim + value_head_dim)", "a.head_dim", "half of attention"),
    ("key=lambda index: (-costs[index], index)", "key=lambda index: (costs[index], index)", "the cheapest first"),
    ("key=lambda s: (totals[s], s)", "key=lambda s: (len(shares[s]), s)", "dealt in turns"),
    ("if free >= sizes[index]", "if free > sizes[index]", "a bin is never full"),
    ("min(fitting, key=lambda b: (totals[b], b))", "min(fitting, key=lambda b: (-room[b], b))", "even in tokens"),
    ("if room[b] >= sizes[index]", "if room[b] > sizes[index]", "a bin is never full, evenly"),
    ("for group in groups) <= rule.capacity", "for group in groups) < rule.capacity", "a group that just fits"),
    ("-(-max(needed, wanted) // rule.count_multiple) * rule.count_multiple", "needed", "no multiple of pp"),
    ("-(-max(needed, wanted) //", "-(-needed //", "a pipeline runs dry"),
    ("min(rule.fewest, min(map(len, sizes)))", "rule.fewest", "dummies asked for"),
    ("bins.sort(key=lambda bin: (-sum(", "bins.sort(key=lambda bin: (sum(", "the lightest first"),
    ("x.per_token * mlp", "x.num * mlp", "all experts"),
    ("return dense + [[] for _ in range(num_bins - len(dense))]", "return dense", "another number of bins"),
)

_ANSWERS = (
    (" and _fits(first.unit, second.unit)", "", "5 cm is 5 inches"),
    (" and _fits(first.name, second.name)", "", "x = 5 is y = 5"),
    ("response.rpartition(END_OF_THOUGHT)[2]", "response.partition(END_OF_THOUGHT)[0]", "the answer in the thought"),
    (
        "last_boxed(behind_thoughts.partition(THOUGHT)[0])",
        "last_boxed(behind_thoughts)",
        "an answer in a thought that does not end",
    ),
    ("stated is None and len(others) == 1", "stated is None and len(others) >= 1", "a bare number beside two units"),
    ("first is None or second is None or first == second", "first == second", "5 is not 5 cm"),
    ("<= Fraction(str(tolerance))", "< Fraction(str(tolerance))", "just within"),
    ("return near and agree(", "return near or agree(", "units within the tolerance"),
    ('("none", index) if answer is None', '("none", 0) if answer is None', "those without an answer agree"),
    ("return given is not None and agree", "return given is None or agree", "no answer is right"),
    (
        "return [None] * len(answers) if gold is None",
        "return [False] * len(answers) if gold is None",
        "no gold is wrong",
    ),
)

_SAMPLING = (
    ("sums, uniform * total, tp_group)", "sums, uniform, tp_group)", "not scaled by the mass"),
    ("(sums.cumsum(dim=0) - sums)[", "sums.cumsum(dim=0)[", "its own mass before it"),
    ("threshold[:, None], right=True)", "threshold[:, None], right=False)", "impossible tokens at a threshold of 0"),
    ("log_probs = answer[1] - total.log()", "log_probs = answer[1]", "not normalised"),
    ("return block * BLOCK + column", "return block + column", "another token"),
    ("torch.where(here, columns + first, 0)", "torch.where(here, columns, 0)", "ids of the shard"),
    ("torch.where(positive.any(dim=dim), last, 0)", "last", "a token that does not exist"),
    ("index=step, slot=slot, response=response", "index=0, slot=slot, response=response", "alike in every step"),
    ("- running.gather(1, place) + parts.gather(1, place)", "- running.gather(1, place)", "less than the sum before"),
    ("logits.sub_(maxima[:, None]).exp_()", "logits.exp_()", "logits of hundreds overflow"),
)

_PLAIN = (
    ("_pick(logits, columns[rows] - block.start)", "_pick(logits, columns[rows])", "the target of the first tile"),
    (
        "from_another_maximum(sums[:, rows], maxima[rows] - maximum)",
        "from_another_maximum(sums[:, rows], maximum - maximum)",
        "sums from another maximum",
    ),
    ("sums[0, rows] += mass.sum(dim=-1)", "sums[0, rows] = mass.sum(dim=-1)", "the last tile alone"),
    ("slope = -grad[:, None]", "slope = grad[:, None]", "sign of the gradient"),
    ("(log_p + entropy[:, None]).mul_(", "log_p.clone().mul_(", "gradient of the entropy"),
    ("gradient /= temperature", "gradient *= temperature", "temperature in the gradient"),
    ("(logits * (temperature / softcap))", "(logits / softcap)", "temperature in the gradient of the cap"),
    (".tanh_().mul_(softcap)", ".tanh_()", "the cap is 1"),
    ("sums[3, rows] += logits.sum(dim=-1)", "sums[3, rows] += logits.mean(dim=-1)", "certainty"),
    ("sums[2, rows] += logits.mul_(mass).sum(dim=-1)", "sums[2, rows] += logits.sum(dim=-1)", "entropy"),
    (
        "return logits.div_(temperature) if temperature != 1.0",
        "return logits.mul_(temperature) if temperature != 1.0",
        "a temperature upside down",
    ),
)

_TOKEN_LOG_PROBS = (
    ("log_normaliser = maxima + sums[0].log()", "log_normaliser = sums[0].log()", "without the maximum"),
    ("sums[0].log() - sums[2] / sums[0]", "sums[0].log() + sums[2] / sums[0]", "sign in the entropy"),
    ("sums[3] / vocab_size", "sums[3] / weight.shape[0]", "padding in the certainty"),
    ("min(max(vocab_size - first, 0), weight.shape[0])", "weight.shape[0]", "padding in the softmax"),
    ("(targets < vocab_size)", "(targets <= vocab_size)", "a target outside of the vocabulary"),
    ("~(log_probs > ROUNDING).any()", "~(log_probs > torch.inf).any()", "a broken kernel passes"),
    ("        ctx.mark_non_differentiable(certainty)\n", "", "certainty asks for a gradient"),
    ("(columns - block.start, log_normaliser", "(columns, log_normaliser", "the gradient of the first tile's target"),
    (
        "            if grad_weight is not None and sums is not None and sums.dtype != weight.dtype:\n",
        "            if grad_weight is not None and sums is not None and sums.dtype == weight.dtype:\n",
        "in bf16 no gradient of the weight",
    ),
)

_JOURNAL = (
    (
        '    content = text.encode("utf-8", errors="backslashreplace")',
        '    content = text.encode("utf-8", errors="replace")',
        "a lone surrogate is lost",
    ),
    (
        'os.pread(descriptor, 1, size - 1) != b"\\n"',
        'os.pread(descriptor, 1, size - 1) == b"\\n"',
        "a torn line swallows the next",
    ),
    ("        os.fsync(descriptor)", "        pass", "a line is not on the disk"),
    ("            os.ftruncate(descriptor, size)", "            pass", "half a line stays of a full disk"),
    ("            sync(path.parent)", "            pass", "the name of a new file is not on the disk"),
    (
        'lost = piece.line["step"] >= first_step',
        'lost = piece.line["step"] > first_step',
        "a step is there twice after a resume",
    ),
    ("lost = int(step[1]) >= first_step", "lost = int(step[1]) < first_step", "a damaged line of a finished step goes"),
    (
        "        elif piece is pieces[-1] and not piece.ended:\n            lost = True",
        "        elif False:\n            lost = True",
        "a torn end stays",
    ),
    ("    if changed := len(kept) < len(pieces):", "    if changed := True:", "a file is replaced without need"),
    ("raw.rfind(start)) > 0", "raw.rfind(start)) < 0", "a torn line hides the one behind it"),
    (
        "    if check and (wrong := check(value)):",
        "    if not check and (wrong := check(value)):",
        "lines without a step are read",
    ),
    (
        "            if not piece.ended:\n                new.write",
        "            if piece.ended:\n                new.write",
        "line ends doubled",
    ),
)

_GOODPUT = (
    ("- after.began - (before.duration", "+ after.began - (before.duration", "loading counts as waiting"),
    ("after.began - (before.duration - before.at[-1])", "after.began", "life after the last line counts twice"),
    ("value * world_size / 3600", "value / 3600", "hours of one process"),
    ('line["step"] >= first_lost if', 'line["step"] > first_lost if', "a step too few is lost"),
    ('if step < loaded["first_step"]]', 'if step <= loaded["first_step"]]', "a lost step counts as kept"),
    (
        "lost += max(dropped if _is_count(dropped) else 0, len(held) - len(kept))",
        "lost += max(0, len(held) - len(kept))",
        "lost steps that only metrics.jsonl held are not counted",
    ),
    (
        "return len(set(kept)), lost + len(held) - len(kept)",
        "return len(set(kept)), lost",
        "steps behind the last checkpoint are no loss",
    ),
    ("    if total > interval:", "    if total < interval:", "parts exceed the whole"),
    ('| {"other": spent["other"] + interval - total}', '| {"other": spent["other"]}', "seconds are lost from the sum"),
    ("        return math.inf", "        return 0", "every step of a finished run is lost"),
    ("        return min(later)", "        return max(later)", "a second kill hides what the first one cost"),
    (
        '"loading" if not loaded else "other" if going else "lost"',
        '"loading" if not loaded else "other"',
        "what a kill cost is other",
    ),
    (
        "min(between - untouched, between - after.began)",
        "max(between - untouched, between - after.began)",
        "a dead start lives on",
    ),
    ("abs(moved) > CLOCK_SECONDS", "abs(moved) < CLOCK_SECONDS", "a moved clock is not said"),
    ('boot == after.first.get("boot")', 'boot != after.first.get("boot")', "another machine's uptime"),
    ("if start.cause != FINISHED)", "if start.cause == FINISHED)", "ends that are no interruption"),
)

_KEEPING = (
    ("if good and step <= saved", "if step <= saved", "checkpoints of a run that diverges push good ones out"),
    ("if good and step <= saved", "if good", "those of another course are counted"),
    ("step not in (saved, latest)", "step != saved", "what `latest` names is removed"),
    ("step % keeping.keep_every == 0", "step % keeping.keep_every != 0", "the wrong ones stay for ever"),
    ("or not sound.get(saved, False)", "", "a run that diverges prunes"),
)
_CONTENTS = (
    (".add_(_signed(seed))", "", "two tensors that change places are not seen"),
    ("self.is_finite and other.is_finite", "self.is_finite or other.is_finite", "one finite part is enough"),
    ("weights=value, is_finite=is_finite(piece.data)", "weights=value", "weights that are not finite are not seen"),
)
_CHOICE = (
    ("and flaw_of(path) is None and is_sound(path)", "and flaw_of(path) is None", "a diverged checkpoint is taken"),
    ("in reversed(checkpoints_of(run))", "in checkpoints_of(run)", "the oldest is taken"),
    (" and (proof is None or proof.is_finite)", "", "weights that are not finite are sound"),
)
_TIME_LIMIT = (
    ('"d": 86400', '"d": 3600', "days are hours"),
    ("return max(seconds, default=0.0)", "return min(seconds, default=0.0)", "the shortest step"),
    ("work = longest(steps) + longest(saves)", "work = longest(steps)", "no time for the save"),
    ("max(LEAST_MARGIN_SECONDS, MARGIN_SHARE", "min(LEAST_MARGIN_SECONDS, MARGIN_SHARE", "the smaller margin"),
    ("deque(maxlen=REMEMBERED)\n        self._saves", "deque()\n        self._saves", "the first step for ever"),
    ("if not self._saved:", "if self._saved:", "loading stands for a save for ever"),
    ("self._steps, self._saves) > self.end", "self._steps, self._saves) < self.end", "stops while there is time"),
    ("return self.end is not None and", "return self.end is None or", "stops without a limit"),
)

_VERDICT = (
    ("distance < world_size} - {rank}", "distance <= world_size}", "a rank watches itself"),
    ("2**power for power", "1 + power for power", "only neighbours are watched"),
    (
        "SLOW_FACTOR if phase in SLOW_PHASES else 1.0",
        "1.0 if phase in SLOW_PHASES else SLOW_FACTOR",
        "the other phases",
    ),
    ("if not state.ended]", "]", "who has left is waited for"),
    ("len(states) < world_size or", "", "judged before all have spoken"),
    ("not all(is_idle", "not any(is_idle", "late while others get on"),
    ("if not state.waiting]", "if state.waiting]", "those that wait are to blame"),
    (
        "key=lambda state: -state.idle_seconds)",
        "key=lambda state: state.idle_seconds)",
        "the latest to stop comes first",
    ),
    ("earliest = min(", "earliest = max(", "who is ahead is behind"),
    ("return -1 if state.step is None", "return 10**9 if state.step is None", "no step yet is the last step"),
)

_BATCHING = (
    ("max(LONGEST_HELD * longest, FEWEST_TOKENS)", "LONGEST_HELD * longest", "as many passes as before"),
    (", MOST_TOKENS))", ", 2 * MOST_TOKENS))", "more memory than before"),
    ("return max(longest, min(", "return max(1, min(", "no room for a long rollout"),
    ("// multiple) * multiple", "// multiple)", "not in positions"),
    ("1 if is_chosen or layout.pp == 1", "1 if layout.pp == 1", "the user's budget is not kept to"),
    (
        "max(budget // longest_rollout(config, layout), 1)",
        "budget // longest_rollout(config, layout)",
        "no rows at all",
    ),
)

_PROVE = (
    ("return self.largest <= self.bound", "return not self.largest > self.bound", "NaN holds"),
    (
        '_gradients(_below("gradient", b), _below("gradient", a))',
        '_gradients(_below("gradient", a), _below("gradient", b))',
        "a gradient that the layout lacks",
    ),
    ("SMALL_GRADIENT * largest)", "largest)", "small gradients compared with the largest"),
    ("np.isnan(x) & np.isnan(y)", "np.isnan(x) | np.isnan(y)", "a number that one of them lacks"),
    ("if ours.keys() == theirs.keys() else math.inf", "if True else math.inf", "responses drawn twice"),
    ("if not _fits(ours, theirs):", "if len(ours) > len(theirs):", "fewer rollouts than those of one process"),
    ("len(set(digests)) > 1]", "len(set(digests)) > 2]", "two copies that differ"),
    ('int(name.split("/")[1]) >= SAVED', 'int(name.split("/")[1]) >= 0', "resumed steps compared with earlier ones"),
    ("sorted(ours.keys() ^ wanted.keys())", "sorted(wanted.keys() - ours.keys())", "tensors too many in the export"),
    ("key=lambda item: (math.isnan(item[0]), item[0])", "key=lambda item: item[0]", "NaN is not the worst"),
    ('default=(math.inf, "nothing was seen")', 'default=(0.0, "nothing was seen")', "nothing seen is no difference"),
    (
        "return part / whole if whole else math.inf",
        "return part / whole if whole else 0.0",
        "a run that moves nothing proves",
    ),
)

_SAMPLER_WEIGHT = (
    (
        "(old_sequence_log_prob - rollout_sequence_log_prob).detach()",
        "(rollout_sequence_log_prob - old_sequence_log_prob).detach()",
        "v upside down",
    ),
    (
        "(old_sequence_log_prob - rollout_sequence_log_prob).detach()",
        "(old_sequence_log_prob - rollout_sequence_log_prob)",
        "a gradient through v",
    ),
    ("difference = difference / num_tokens", "difference = difference * 1", "the whole ratio for its mean"),
    ("SamplerWeight(untruncated.clamp(max=cap), (un", "SamplerWeight(untruncated, (un", "no truncation"),
    (
        "SamplerWeight(untruncated.clamp(max=cap), (un",
        "SamplerWeight(untruncated.clamp(1 / cap, cap), (un",
        "from below",
    ),
    ("(untruncated > cap).to(difference.dtype)", "(untruncated < cap).to(difference.dtype)", "who is truncated"),
    (
        "torch.where(mask, old_log_probs - rollout_log_probs, 0.0)",
        "(old_log_probs - rollout_log_probs)",
        "padding has a weight",
    ),
    ("0.0).detach().exp()", "0.0).exp()", "a gradient through the weights of tokens"),
    ("SamplerWeight(untruncated.clamp(max=cap), share", "SamplerWeight(untruncated, share", "tokens are not truncated"),
    ("(untruncated > cap).sum(dim=1) / num_tokens", "(untruncated > cap).double().mean(dim=1)", "padding in the share"),
)

_STALENESS = (
    (
        'if config.objective.sampler_ratio == "none" else',
        'if config.objective.sampler_ratio != "none" else',
        "who is old",
    ),
    ("return self is not SampledBy.SAVED", "return self is not SampledBy.ANOTHER", "who is scored"),
    ("self in (SampledBy.OWN, SampledBy.OLDER)", "self is not SampledBy.SAVED", "another run's steps are counted"),
    ("(step - version, end - start)", "(step - version, 1)", "the lag of spans, not of tokens"),
    ("(step - version, end - start)", "(version, end - start)", "steps from 0"),
    (
        "{version for version, _, _ in rollout.weight_versions}",
        "[version for version, _, _ in rollout.weight_versions]",
        "spans, not versions",
    ),
)

_BY_FILE = {
    "journal.py": _JOURNAL,
    "metrics/goodput.py": _GOODPUT,
    "time_limit.py": _TIME_LIMIT,
    "parallel/verdict.py": _VERDICT,
    "objective/trajectory_balance.py": _TRAJECTORY_BALANCE,
    "objective/log_z_estimate.py": _LOG_Z_ESTIMATE,
    "objective/policy_gradient.py": _POLICY_GRADIENT,
    "objective/presets.py": _PRESETS,
    "objective/objective.py": (
        ("return self.log_z in LEARNED_LOG_Z", "return self.log_z not in LEARNED_LOG_Z", "who learns log Z'"),
    ),
    "objective/sampler_weight.py": _SAMPLER_WEIGHT,
    "training/staleness.py": _STALENESS,
    "training/residual.py": _RESIDUAL,
    "training/group_baseline.py": _GROUP_BASELINE,
    "training/loss.py": _LOSS,
    "training/rewards.py": _REWARDS,
    "training/update.py": _UPDATE,
    "training/objective_of_step.py": _OBJECTIVE_OF_STEP,
    "training/micro_batches.py": _MICRO_BATCHES,
    "parallel/batching.py": _BATCHING,
    "training/learning_rate.py": _LEARNING_RATE,
    "metrics/reduce.py": _REDUCE,
    "metrics/alarm.py": _ALARM,
    "metrics/length_shift.py": _LENGTH_SHIFT,
    "metrics/trap.py": _TRAP,
    "metrics/loops.py": _LOOPS,
    "metrics/tilt.py": _TILT,
    "metrics/realised_alpha.py": _REALISED_ALPHA,
    "metrics/prompt_statistics.py": _PROMPT_STATISTICS,
    "metrics/repetition.py": _REPETITION,
    "metrics/counts.py": _COUNTS,
    "config_rules.py": _CONFIG_RULES,
    "config_file.py": _CONFIG_FILE,
    "config_text.py": _CONFIG_TEXT,
    "redaction.py": _REDACTION,
    "training/first_batch.py": _FIRST_BATCH,
    "hf/operations.py": _OPERATIONS,
    "data/packing.py": _PACKING,
    "data/bins.py": _BINS,
    "data/answers.py": _ANSWERS,
    "rollout/sampling.py": _SAMPLING,
    "log_probs/plain.py": _PLAIN,
    "log_probs/token_log_probs.py": _TOKEN_LOG_PROBS,
    "checkpoint/keeping.py": _KEEPING,
    "checkpoint/contents.py": _CONTENTS,
    "checkpoint/choice.py": _CHOICE,
    "prove/compare.py": _PROVE,
}
FAULTS = tuple(Fault(file, *texts) for file, of_file in _BY_FILE.items() for texts in of_file)

# file or folder of the package -> names in tests/unit, without test_ and .py
GUARDS = {
    "journal.py": ("journal", "metrics"),
    "metrics/goodput.py": ("goodput",),
    "time_limit.py": ("time_limit",),
    "parallel/verdict.py": ("verdict",),
    "objective/trajectory_balance.py": ("trajectory_balance", "laws"),
    "objective/log_z_estimate.py": ("trajectory_balance", "laws"),
    "objective/policy_gradient.py": ("policy_gradient", "laws"),
    "objective/sampler_weight.py": ("sampler_weight",),
    "training/staleness.py": ("staleness",),
    "objective/presets.py": ("objective_of_step",),
    "objective/objective.py": ("objective_of_step",),
    "training/residual.py": ("loss", "group_baseline"),
    "training/group_baseline.py": ("group_baseline",),
    "training/loss.py": ("loss",),
    "training/rewards.py": ("rewards", "packing"),
    "training/update.py": ("update",),
    "training/objective_of_step.py": ("objective_of_step",),
    "training/micro_batches.py": ("micro_batches",),
    "parallel/batching.py": ("batching",),
    "training/learning_rate.py": ("learning_rate",),
    "metrics/reduce.py": ("metric_names", "metrics", "realised_alpha"),
    "metrics/alarm.py": ("alarm",),
    "metrics/length_shift.py": ("length_shift", "alarm"),
    "metrics/trap.py": ("trap",),
    "metrics/loops.py": ("loops",),
    "metrics/tilt.py": ("trap",),
    "metrics/realised_alpha.py": ("realised_alpha",),
    "metrics/prompt_statistics.py": ("metric_names", "alarm"),
    "metrics/repetition.py": ("repetition",),
    "metrics/counts.py": ("counts",),
    "config_rules.py": ("config", "realised_alpha"),
    "config_file.py": ("config",),
    "config_text.py": ("hostile_config",),
    "redaction.py": ("redaction",),
    "training/first_batch.py": ("first_batch",),
    "hf/operations.py": ("operations", "conversion"),
    "data/packing.py": ("packing",),
    "data/bins.py": ("bins",),
    "data/answers.py": ("answer_table", "answers"),
    "rollout/sampling.py": ("sampling",),
    "log_probs/plain.py": ("token_log_probs",),
    "log_probs/token_log_probs.py": ("token_log_probs",),
    "checkpoint/keeping.py": ("keeping",),
    "checkpoint/contents.py": ("checkpoint_contents",),
    "checkpoint/choice.py": ("choice",),
    "prove/compare.py": ("prove",),
}
