"""What does one PowerFlow step look like without us? Hugging Face and PyTorch alone, one process: the thing to beat.

    HF generate -> HF forward of the reference -> HF forward and backward of the LA-TB loss -> AdamW

What somebody would write with care in an afternoon: KV cache, padded micro-batches, logits of the response tokens only.
Left out: everything else (layouts, checkpoints, metrics, other objectives). Imports nothing of megatron_powerflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.rollout import hf_generate

HEAD_LR = 1e-3  # Adam's, of a head that nobody scaled
Row = tuple[Sequence[int], Sequence[int]]  # prompt, response


class PlainStep:
    """Policy, frozen reference, learned log Z' head (its prompt pool detached) and their optimizers, in fp32."""

    def __init__(self, model: Path, *, alpha: float, lr: float, micro_batch_size: int) -> None:
        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() for _ in range(2)
        )
        self.reference.requires_grad_(False)
        self.alpha, self.micro_batch_size = alpha, micro_batch_size
        width = self.policy.config.hidden_size
        layers = [nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width)]
        layers += [nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 1)]
        self.head = nn.Sequential(*layers)
        nn.init.zeros_(self.head[-1].weight)
        self.calibrated = False
        settings = {"betas": (0.9, 0.95), "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=lr, **settings)
        self.head_optimizer = torch.optim.AdamW(self.head.parameters(), lr=HEAD_LR, **settings)

    def write(self, prompts: Sequence[Sequence[int]], num_responses: int, num_tokens: int) -> list[Row]:
        """The responses of each prompt in turn, all of num_tokens tokens."""
        written = hf_generate(self.policy, prompts, num_responses, num_tokens).tolist()
        return [(prompts[i // num_responses], response) for i, response in enumerate(written)]

    @torch.no_grad()
    def score_reference(self, rows: Sequence[Row]) -> Tensor:
        """[B] fp32 sequence log-probs under the frozen model."""
        return torch.cat([self._forward(self.reference, part)[0] for part in self._parts(rows)])

    def update(self, rows: Sequence[Row], ref_sequence_log_probs: Tensor) -> tuple[float, float]:
        """One optimizer update: (loss before it, norm of the policy's gradient before clipping)."""
        lengths = torch.tensor([len(response) for _, response in rows])
        if not self.calibrated:  # so that the mean residual is 0 while policy and reference are one
            start = (self.alpha - 1) * (ref_sequence_log_probs / lengths).mean()
            nn.init.constant_(self.head[-1].bias, float(start))
            self.calibrated = True
        loss, begin = 0.0, 0
        for part in self._parts(rows):
            here = slice(begin, begin + len(part))
            sequence_log_probs, pool = self._forward(self.policy, part)
            log_z = self.head(pool.detach()).squeeze(1)
            residual = log_z + (sequence_log_probs - self.alpha * ref_sequence_log_probs[here]) / lengths[here]
            share = residual.square().sum() / len(rows)  # Eq. 10, arXiv 2603.18363, w = 1, psi = 0
            share.backward()
            loss, begin = loss + share.item(), begin + len(part)
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        for optimizer in (self.optimizer, self.head_optimizer):
            optimizer.step()
            optimizer.zero_grad()
        return loss, float(norm)

    def _parts(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        return [rows[start : start + self.micro_batch_size] for start in range(0, len(rows), self.micro_batch_size)]

    def _forward(self, network: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """([b] sequence log-probs, [b, H] mean hidden state of the prompt); padding stands on the right."""
        longest = max(len(prompt) + len(response) for prompt, response in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        prompt_mask, predicts = torch.zeros(2, len(rows), longest, dtype=torch.bool)
        for row, (prompt, response) in enumerate(rows):
            whole = len(prompt) + len(response)
            tokens[row, :whole] = torch.tensor([*prompt, *response])
            prompt_mask[row, : len(prompt)] = True
            predicts[row, len(prompt) - 1 : whole - 1] = True
        # causal attention: what stands behind a token changes nothing, so the padding needs no mask
        hidden = network.base_model(tokens, use_cache=False).last_hidden_state
        logits = network.get_output_embeddings()(hidden[predicts])
        chosen = logits.log_softmax(-1).gather(1, tokens.roll(-1, dims=1)[predicts][:, None]).squeeze(1)
        sequence = chosen.new_zeros(tokens.shape).masked_scatter(predicts, chosen).sum(dim=1)
        pool = (hidden * prompt_mask[..., None]).sum(dim=1) / prompt_mask.sum(dim=1, keepdim=True)
        return sequence, pool
