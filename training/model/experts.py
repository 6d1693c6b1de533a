"""Mixture of Flow: above shared foundation layers, the actions take the few experts of a layer that a router chooses.

The router reads the last token of the prefix in the understanding stream, the first that has seen the images, the state
and the whole instruction. The state token stands before the instruction and keeps the shared feed-forward.

Source: arXiv 2601.12993, section 5.1.2; what it leaves open is settled in docs/decisions/0029-mixture-of-flow.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onbeat.training.config import DecoderConfig, ExpertsConfig
from onbeat.training.model.feed_forward import GatedFeedForward

# B observations, R routed rows (observations, or every action token), T tokens of a row, W width of the action stream,
# H width of the understanding stream, E experts of a layer, K of them chosen, L layers that have experts.


class Route(NamedTuple):
    """One layer's choice. logits (R, E); chosen (R, K) int64, the best first; weights (R, K), each row's sum is 1."""

    logits: Tensor
    chosen: Tensor
    weights: Tensor


class Routing(NamedTuple):
    """What the routers did for each observation, averaged over its tokens where every token is routed.

    probabilities: (L, B, E) of all experts, with their gradient. use: (L, B, E), share of the choices that fell on each
    expert. entropy: (L, B) of the probabilities, in nats, at most log E. The last two carry no gradient.
    """

    probabilities: Tensor
    use: Tensor
    entropy: Tensor


class Scores(nn.Linear):
    """Scores of a layer's experts (..., E), in float32 at least, whatever surrounds them: coarser types make ties."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(width, experts, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        kind = torch.promote_types(input.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(kind), self.weight.to(kind))


class Router(Scores):
    """What the prefix says. token: what the action token says, where every token is routed by itself."""

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig) -> None:
        super().__init__(config.und.width, experts.count)
        self.token = Scores(config.gen.width, experts.count) if experts.routing == "token" else None


class Experts(nn.ModuleList):
    """The experts of one layer. touch_all: a gradient for every weight, zero for those not chosen, as is needed where
    several processes add their gradients; else weights that are not chosen have none."""

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig) -> None:
        super().__init__(GatedFeedForward(config.gen) for _ in range(experts.count))
        self.touch_all = False

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """The weighted sum of the chosen experts of x (R, T, W), each computed for the rows that chose it alone."""
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self):
            rows, place = (route.chosen == index).nonzero(as_tuple=True)
            if len(rows):
                mixed.index_add_(0, rows, expert(x[rows]) * route.weights[rows, place, None, None].to(x.dtype))
            elif self.touch_all and self.training:
                mixed = mixed + sum(0.0 * weight.sum() for weight in expert.parameters())
        return mixed


def choose(logits: Tensor, top_k: int) -> Route:
    """The top_k experts of each row of logits (R, E), their probabilities renormalised to a sum of 1.

    One expert alone has the weight 1 whatever the router says: there the gradient of its probability stands in.
    """
    best = logits.topk(top_k, dim=-1)
    weights = best.values.softmax(-1)
    if top_k == 1:
        probability = logits.softmax(-1).gather(-1, best.indices)
        weights = weights + (probability - probability.detach())
    return Route(logits, best.indices, weights)


def summarise(routes: Sequence[Route], batch: int) -> Routing:
    """The routes of all layers with experts for `batch` observations; rows of one observation are neighbours."""
    logits = torch.stack([route.logits for route in routes]).unflatten(1, (batch, -1))
    chosen = torch.stack([route.chosen for route in routes]).unflatten(1, (batch, -1))
    probabilities = logits.softmax(-1)
    entropy = -(probabilities * logits.log_softmax(-1)).sum(-1).mean(-1).detach()
    use = F.one_hot(chosen, logits.shape[-1]).to(logits.dtype).mean((2, 3))
    return Routing(probabilities.mean(2), use, entropy)


def balance_loss(routing: Routing, use: Tensor) -> Tensor:
    """Each observation's part in the load-balancing loss, (B,): E sum_e use_e probability_e, mean over layers.

    use: (L, E), the mean of `routing.use` over all observations of a step, on all processes. The mean of the parts over
    them is 1 where the load is even, and up to E where one expert takes all. Source: arXiv 2101.03961, eq. 4.
    """
    experts = routing.use.shape[-1]
    return experts * (routing.probabilities * use[:, None]).sum(-1).mean(0)
