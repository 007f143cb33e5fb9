"""Sequence-classification models as reward models, alone or as an ensemble: one score for a prompt and its response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textenv.config import MEAN, MIN, check_combine
from textenv.models.comparison import bound, largest_difference, sample_texts
from textenv.models.encoding import added_tokens, check_ids, encode, end_with
from textenv.models.language_model import find_backbone, hidden_states, position_limit
from textenv.models.probe import Refusal
from textenv.rewards.base import ResponseBatch, Reward, Scores, WeightedSum
from textenv.state import in_batches, left_aligned

REMEDY = "Use a reward model of another architecture, or a function as the reward."
DISAGREEMENT = "disagreement"  # the part of an ensemble's scores that holds the std over its members


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

    def __call__(self, batch: ResponseBatch) -> Scores:
        """Scores of B finished responses."""
        scores = log_odds(self.outputs(batch), self.label, self.model.config.problem_type)
        return Scores(scores, {self.name: scores})

    @torch.no_grad()
    def outputs(self, batch: ResponseBatch) -> Tensor:
        """All outputs of the model for B finished responses, float32 [B, labels]."""
        if self.tokenizer is None and reads_every_position(self.model):
            ids, mask = batch.state.input_ids, batch.state.attention_mask
        else:
            ids, mask = self._encode(batch)
        outputs = in_batches(lambda rows: self._outputs(ids[rows], mask[rows]), mask.sum(1), batch.tokens_per_pass)
        return outputs.float()

    def _outputs(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if reads_every_position(self.model):
            return last_token_scores(self.model, input_ids, attention_mask)
        ids, length = left_aligned(input_ids, attention_mask)  # encoders are trained on texts that start in column 0
        mask = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
        # Some models count positions, or look for the last token, by the pad token.
        pad = self.model.config.get_text_config().pad_token_id
        ids = ids if pad is None else ids.where(mask, pad)
        return self.model(input_ids=ids, attention_mask=mask.long()).logits

    def check(self, width: int) -> None:
        """Raise ValueError if the model scores a text in a batch otherwise than its own forward scores it alone.

        width: the most tokens of a text.
        """
        refuse = Refusal(self.model, f"reward {self.name!r}")
        pad = self.model.config.get_text_config().pad_token_id
        with torch.no_grad():
            texts = sample_texts(self.model.config.get_text_config().vocab_size, width, 0, self.model.device)
            # No pad token inside: the model's own forward would take it for the end of the text.
            ids = (
                texts.input_ids if pad is None else texts.input_ids.where(texts.input_ids != pad, 1 if pad == 0 else 0)
            )
            scores = refuse.failing(lambda: self._outputs(ids, texts.attention_mask)).float()
            rows = [ids[row, mask][None] for row, mask in enumerate(texts.attention_mask)]
            alone = refuse.failing(lambda: torch.cat([self.model(input_ids=row).logits for row in rows])).float()
        if scores.shape != alone.shape or not bool(scores.isfinite().all()):
            raise refuse(
                f"it gives outputs of shape {tuple(scores.shape)} that are not one finite row per text", REMEDY
            )
        if largest_difference(scores, alone) > max(bound(self.model.dtype), 3e-4):
            raise refuse("its scores of a text depend on the other texts of a batch", REMEDY)

    def _encode(self, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
        """Right-padded ids and mask, both [B, T]. Raises ValueError for a text that the model cannot read."""
        tokenizer, config = self.tokenizer or batch.tokenizer, self.model.config.get_text_config()
        rows = batch.ids if self.tokenizer is None else encode(tokenizer, batch.texts)
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
        limit = min(tokenizer.model_max_length, position_limit(self.model) or width)
        if width > limit:
            longest = batch.describe_row([len(ids) for ids in rows].index(width))
            raise ValueError(
                f"reward {self.name!r} takes {limit} tokens, and a prompt with its response has {width}: {longest}; "
                "lower max_prompt_tokens or max_new_tokens."
            )
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for index, ids in enumerate(rows):
            input_ids[index, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            mask[index, : len(ids)] = True
        return input_ids.to(self.model.device), mask.to(self.model.device)


class RewardEnsemble:
    """K frozen reward models as one reward, or one model with K heads (`has_heads`).

    The score is the members' mean, their least score, or mean − κ · std; std is over the K members, without a
    correction. A policy that exploits an error of one member gains less from the last two (Coste et al. 2024, "Reward
    Model Ensembles Help Mitigate Overoptimization"). Errors that all members share stay, and members that share a body
    share many (Eisenstein et al. 2023, "Helping or Herding?"). The std is reported as the part "disagreement".
    """

    def __init__(
        self, models: Sequence[RewardModel], *, combine: float | str = MEAN, name: str = "reward_ensemble"
    ) -> None:
        """combine: "mean", "min", or κ. Raises ValueError for fewer than two members."""
        check_combine(combine, "combine")
        self.models, self.combine, self.name = tuple(models), combine, name
        members = sum(
            len(reward.model.config.id2label or {}) if has_heads(reward.model) else 1 for reward in self.models
        )
        if members < 2:
            raise ValueError(f"an ensemble needs two members or more, got {members}; give the reward model itself.")
        if name == DISAGREEMENT:
            raise ValueError(f"a reward is named {name!r}, which is the key of its std; give it another name.")
        self.part_names = (name, DISAGREEMENT)

    def __call__(self, batch: ResponseBatch) -> Scores:
        """Scores of B finished responses."""
        members = self.member_scores(batch)
        scores = combined(members, self.combine)
        return Scores(scores, {self.name: scores, DISAGREEMENT: members.std(1, correction=0)})

    def member_scores(self, batch: ResponseBatch) -> Tensor:
        """The score of each member for B finished responses, float32 [B, K]."""
        return torch.cat([_member_scores(reward, batch) for reward in self.models], 1)


def _member_scores(reward: RewardModel, batch: ResponseBatch) -> Tensor:
    """The scores of all heads of a model with heads, otherwise its score. [B, heads]."""
    outputs, config = reward.outputs(batch), reward.model.config
    return outputs if has_heads(reward.model) else log_odds(outputs, reward.label, config.problem_type)[:, None]


def combined(members: Tensor, combine: float | str) -> Tensor:
    """One score from those of K members: their mean, their least, or mean − κ · std. members: [B, K]; returns [B]."""
    if combine == MIN:
        return members.amin(1)
    mean = members.mean(1)
    return mean if isinstance(combine, str) else mean - combine * members.std(1, correction=0)


def member_name(index: int) -> str:
    """The name of a member: of a head's label, or of a model's folder."""
    return f"member-{index}"


def has_heads(model: PreTrainedModel) -> bool:
    """Whether a classifier's outputs are K scores of an ensemble, by its labels: member-0, ..., member-(K - 1)."""
    labels: dict[Any, str] = dict(model.config.id2label or {})
    return len(labels) > 1 and labels == {index: member_name(index) for index in range(len(labels))}


def reward_models(reward: Reward) -> Iterator[RewardModel]:
    """The models among the members of a reward."""
    if isinstance(reward, WeightedSum):
        for _, member in reward.members:
            yield from reward_models(member)
    if isinstance(reward, RewardEnsemble):
        yield from reward.models
    if isinstance(reward, RewardModel):
        yield reward


def reads_every_position(model: PreTrainedModel) -> bool:
    """Whether the model is a decoder with a linear head `score` on its hidden states, as GPT-2 and Llama have."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def last_token_scores(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The head's output at the last real token of each row, with padding on either side.

    The classifiers of Transformers find that token by comparing ids with the pad id, which fails if the pad token is
    also the end token. Here the mask decides.

    input_ids: int64 [B, T]; attention_mask: [B, T], true or 1 = real. Returns [B, labels].
    """
    ids, length = left_aligned(input_ids, attention_mask)
    last = hidden_states(find_backbone(model), ids, (length - 1).clamp_min(0)[:, None])[:, 0]  # [B, H]
    return model.score(last)  # type: ignore[operator]


def log_odds(outputs: Tensor, label: int | None, problem_type: str | None = None) -> Tensor:
    """The single output, or the log-odds of one label: `log p(label) − log (1 − p(label))`.

    problem_type: how the model was trained, as in its configuration. With "multi_label_classification" p is the sigmoid
    of the label's own output, so the output is the log-odds; a "regression" output is taken as it is; otherwise p is
    a softmax over the labels. outputs: [B, labels]. Returns [B].
    """
    if label is None:
        return outputs[:, 0]
    if problem_type in ("multi_label_classification", "regression"):
        return outputs[:, label]
    others = torch.cat([outputs[:, :label], outputs[:, label + 1 :]], 1)
    return outputs[:, label] - others.logsumexp(1)


def linear_head(reward: RewardModel | RewardEnsemble) -> nn.Linear:
    """The score of a decoder as a linear head on its last hidden state, with a bias; of an ensemble, the first model's.

    With two labels the log-odds of one are a difference of outputs, which is linear. With more they are not; the
    closest linear head is the label's output minus the mean of the others. A label that was trained by itself
    (`problem_type`) is its own output. An ensemble's K heads give their mean, whatever `combine` is.
    """
    model = reward.models[0] if isinstance(reward, RewardEnsemble) else reward
    score: Any = model.model.score
    outputs, label = score.out_features, model.label
    if isinstance(reward, RewardEnsemble) and has_heads(model.model):
        mix = torch.full((1, outputs), 1.0 / outputs)
    else:
        alone = label is None or model.model.config.problem_type in ("multi_label_classification", "regression")
        mix = torch.zeros(1, outputs) if alone else torch.full((1, outputs), -1.0 / (outputs - 1))
        mix[0, label or 0] = 1.0
    mix = mix.to(score.weight)
    head = nn.Linear(score.in_features, 1, device=score.weight.device)
    with torch.no_grad():
        head.weight.copy_(mix @ score.weight)
        head.bias.zero_() if score.bias is None else head.bias.copy_(mix[0] @ score.bias)
    return head


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
