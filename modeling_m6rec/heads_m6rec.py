"""Where in a row the heads read, and the likelihood of written text.

Shapes: B rows, T tokens, N targets of a row, E places of a row where a user is read, M items of a row, H = hidden_size.
"""

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from .configuration_m6rec import M6RecConfig
from .layout_m6rec import KIND_NUMBER, Layout, largest, last_index, latest, skipped, value_at
from .losses_m6rec import UNKNOWN

if TYPE_CHECKING:
    from .modeling_m6rec import M6RecForRecommendation
    from .network_m6rec import M6RecModelOutput


class Beside:
    """Picks, out of what stands beside the T tokens of rows, what stands beside those that have states.

    These are the kept tokens of a plan, or the last of the T where a cache holds the others.
    """

    def __init__(self, total: int, out: "M6RecModelOutput") -> None:
        self.total, self.tokens, self.kept = total, out.layout.valid.shape[1], out.kept

    @property
    def is_part(self) -> bool:
        """Whether a cache holds earlier tokens."""
        return self.kept is None and self.tokens < self.total

    def __call__(self, field: torch.Tensor, fill: int) -> torch.Tensor:
        """Pick from a field of up to T columns, B x T; `fill` stands where it ends or nothing is present."""
        field = functional.pad(field, (0, self.total - field.shape[1]), value=fill)
        return field[:, -self.tokens :] if self.kept is None else self.kept.of(field, fill)


def target_ends(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    """Find each target's [EOS], where it is scored: B x N, -1 where a row has fewer targets."""
    return last_index(_ends_target(ids, lay, config), lay.target - 1, largest(lay.target))


def user_places(ids: torch.Tensor, lay: Layout, config: M6RecConfig, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Find where users are read: B x E, -1 where absent.

    A source has one place for its head (the last [SEG] of [USER], else [BOS']), then one for each event (its last
    [SEG]). Places of several requests in a row are numbered on. `seen` (B x T bool) leaves out hidden tokens.
    """
    reads = _tells_user(ids, lay, config)
    # A place begins where request or event rise above all before: that holds for the kept tokens of a plan as well.
    number = (lay.request * (ids.shape[1] + 1) + lay.event) * reads
    # Neither the numbers of heads nor those of events ever fall, so that the highest of each is the latest.
    of_events = lay.event > 0
    highest = torch.maximum(*(value_at(number, latest(reads & part)) for part in (of_events, ~of_events)))
    place = (number > functional.pad(highest, (1, -1))).cumsum(1)
    return last_index(reads if seen is None else reads & seen, place - 1, largest(place))


def item_places(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    """Find the [SEG] of each given [ITEM] segment in the order of the row: B x M, -1 where absent."""
    return in_order(closes_item(ids, lay, config))


def closes_item(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    """Say which tokens are the [SEG] of a given [ITEM] segment: B x T bool."""
    return (ids == config.segment_token_id) & (lay.kind == KIND_NUMBER["item"]) & ~lay.written


def in_order(marked: torch.Tensor) -> torch.Tensor:
    """Return where the marked of B x T tokens stand, one after another: B x M, -1 where a row has fewer."""
    number = marked.cumsum(1)
    return last_index(marked, number - 1, largest(number))


def mean_log_likelihood(
    states: torch.Tensor, ids: torch.Tensor, lay: Layout, model: "M6RecForRecommendation"
) -> torch.Tensor:
    """Average the log-likelihood of what follows each target's first [TEXT], up to and including [EOS].

    Only states that predict such a token go through the writing head. Source: the paper, zero-shot scoring.

    Args:
        states: B x T x H joint states.
        ids: B x T.
        lay: Their layout.
        model: Gives the writing head.

    Returns:
        B x N; NaN for targets without written text.
    """
    written = lay.written & (lay.target > 0)
    wanted = written & functional.pad(written, (1, -1))  # all but the [TEXT] that opens it
    targets = functional.pad(torch.where(wanted, ids, UNKNOWN)[:, 1:], (0, 1), value=UNKNOWN)
    known, slots = targets != UNKNOWN, largest(lay.target)
    logits = model.write_logits(states[known]).float()
    likelihood = -functional.cross_entropy(logits, targets[known], reduction="none")
    row = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)[known]
    slot = functional.pad(lay.target[:, 1:] - 1, (0, 1))[known] + slots * row
    total = likelihood.new_zeros(len(ids) * slots).index_add(0, slot, likelihood)
    count = likelihood.new_zeros(len(ids) * slots).index_add(0, slot, torch.ones_like(likelihood))
    return (total / count).view(len(ids), slots)


def head_places(ids: torch.Tensor, lay: Layout, config: M6RecConfig, users: bool = True) -> torch.Tensor:
    """Say where `target_ends` and, unless users are not read, `user_places` may point to: B x T bool."""
    ends = _ends_target(ids, lay, config)
    return ends | _tells_user(ids, lay, config) if users else ends


def _ends_target(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    return (ids == config.eos_token_id) & (lay.target > 0)


def _tells_user(ids: torch.Tensor, lay: Layout, config: M6RecConfig) -> torch.Tensor:
    told = (lay.event > 0) | lay.source & (lay.kind == KIND_NUMBER["user"])
    told = (ids == config.segment_token_id) & told & ~skipped(lay, config)
    return told | lay.source & (ids == config.source_token_id)


__all__ = [
    "Beside",
    "closes_item",
    "head_places",
    "in_order",
    "item_places",
    "mean_log_likelihood",
    "target_ends",
    "user_places",
]
