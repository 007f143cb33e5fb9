"""Sequence-classification models as reward models: one score for the prompt and the whole response."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textenv.models.encoding import added_tokens, check_ids, encode, end_with
from textenv.rewards.base import ResponseBatch, Scores
from textenv.state import position_ids


class RewardModel:
    """A frozen classifier as a reward. The score is its only output, or the log-odds of one label.

    With `tokenizer=None` the model takes the policy's token ids. With its own tokenizer it takes the decoded text.
    Decoders then see the reward model's end token where the response ended with a stop token, and only there. Encoders
    see the tokens that their tokenizer puts around a text at every response, as in their training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        label: str | None = None,
        name: str = "reward_model",
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.part_names = (name,)
        self.label = _label_index(model, label)

    @torch.no_grad()
    def __call__(self, batch: ResponseBatch) -> Scores:
        """Scores of B finished responses."""
        state = batch.state
        if self.tokenizer is None and reads_every_position(self.model):
            outputs = self._outputs(state.input_ids, state.attention_mask)
        else:
            outputs = self._outputs(*self._encode(batch))
        scores = log_odds(outputs.float(), self.label)
        return Scores(scores, {self.name: scores})

    def _outputs(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if reads_every_position(self.model):
            return last_token_scores(self.model, input_ids, attention_mask)
        return self.model(input_ids=input_ids, attention_mask=attention_mask.long()).logits

    def _encode(self, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
        """Right-padded ids and mask, both [B, T]. Raises ValueError for a text that the model cannot read."""
        tokenizer, config = self.tokenizer or batch.tokenizer, self.model.config.get_text_config()
        rows = self._own_ids(batch) if self.tokenizer is None else encode(tokenizer, batch.texts)
        if not reads_every_position(self.model):
            _, end = added_tokens(tokenizer)
            rows = [ids if not end or ids[-len(end) :] == end else [*ids, *end] for ids in rows]
        elif tokenizer.eos_token_id is not None:
            stopped = batch.stopped.tolist()
            rows = [end_with(tokenizer, ids) if stop else ids for ids, stop in zip(rows, stopped, strict=True)]
        check_ids(tokenizer, rows, config.vocab_size, lambda i: f"reward {self.name!r}: {batch.describe_row(i)}")
        if not all(rows):
            empty = batch.describe_row(rows.index([]))
            raise ValueError(f"reward {self.name!r} has no text to score in {empty}; use prompts with some text.")
        width = max(map(len, rows))
        limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or width)
        if width > limit:
            raise ValueError(
                f"reward {self.name!r} takes {limit} tokens, and a prompt with its response has {width} "
                f"({max(batch.texts, key=len)[:60]!r}...); lower max_prompt_tokens or max_new_tokens."
            )
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, ids in enumerate(rows):
            input_ids[index, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            mask[index, : len(ids)] = True
        return input_ids.to(self.model.device), mask.to(self.model.device)

    def _own_ids(self, batch: ResponseBatch) -> list[list[int]]:
        """The policy's ids of prompts and responses, without padding."""
        ids, mask = batch.state.input_ids.cpu(), batch.state.attention_mask.cpu()
        return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def reads_every_position(model: PreTrainedModel) -> bool:
    """Whether the model is a decoder with a linear head `score` on its hidden states, as GPT-2 and Llama have."""
    return "score" in dict(model.named_children())


def last_token_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The head's output at the last real token of each row, with padding on either side.

    The classifiers of Transformers find that token by comparing ids with the pad id, which fails if the pad token is
    also the end token. Here the mask decides.

    input_ids: int64 [B, T]; attention_mask: [B, T], true or 1 = real. Returns [B, labels].
    """
    hidden = model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        use_cache=False,
    ).last_hidden_state  # [B, T, H]
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask.long() * positions).argmax(1)  # [B]
    return model.score(hidden[torch.arange(len(last), device=last.device), last])  # type: ignore[operator]


def log_odds(outputs: Tensor, label: int | None) -> Tensor:
    """The single output, or `log p(label) − log (1 − p(label))`.

    outputs: [B, labels]. Returns [B].
    """
    if label is None:
        return outputs[:, 0]
    others = torch.cat([outputs[:, :label], outputs[:, label + 1 :]], 1)
    return outputs[:, label] - others.logsumexp(1)


def _label_index(model: PreTrainedModel, label: str | None) -> int | None:
    names = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}
    if model.config.num_labels == 1:
        return None
    for index, name in names.items():
        if label == name:
            return index
    raise ValueError(
        f"the reward model has {model.config.num_labels} labels ({sorted(names.values())}), and reward_label is "
        f"{label!r}; name the label whose log-odds are the score, as in reward_label='{names[max(names)]}'."
    )
