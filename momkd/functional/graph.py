"""Attention over the neighbours of a graph."""

from __future__ import annotations

from torch import Tensor

from momkd import ops
from momkd.functional import _validate as check
from momkd.graph import Edges


def graph_attention(
    x_l: Tensor,
    x_r: Tensor,
    att: Tensor,
    edges: Edges,
    *,
    negative_slope: float = 0.2,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The message passing of GATv2: every node attends to the nodes that it hears from, and to itself.

    e_ij = a_h · LeakyReLU(x_l[j] + x_r[i]); α_ij = softmax over the in-neighbours j of i and i itself;
    out_i = Σ_j drop(α_ij) x_l[j]. Nothing of size edges × channels is stored.

    Args:
        x_l: (N, H·C) of the sources (the messages), any float dtype; heads lie one after the other.
        x_r: (N, H·C) of the targets.
        att: (H, C), the vector a of each head.
        edges: the graph of N nodes, see `momkd.graph`; a ragged batch is one graph.
        negative_slope: of the LeakyReLU.
        dropout_p: probability of dropping a weight α; 0 ≤ p < 1.
        seed: of the dropout: an int or an int64 scalar tensor; None draws one from torch's generator.
        backend: None for the best that can run, or a name of `momkd.dispatch.BACKENDS`.

    Returns:
        (N, H·C) in the dtype of x_l. A node without neighbours gives x_l of its own. Gradients reach x_l, x_r and att.

    Raises:
        ValueError, BackendError: as in `gated_attention_pool`.

    Source: Brody, Alon and Yahav, ICLR 2022, equation 7; as PyG's GATv2Conv with self-loops, before its bias.

    Example:
        >>> edges = momkd.graph.knn(torch.rand(50, 2), k=8)
        >>> graph_attention(torch.randn(50, 32), torch.randn(50, 32), torch.randn(2, 16), edges).shape
        torch.Size([50, 32])
    """
    check.shape("att", att, (None, None), "(H, C)")
    width = att.shape[0] * att.shape[1]
    check.shape("x_l", x_l, (None, width), "(N, H*C)")
    check.shape("x_r", x_r, (x_l.shape[0], width), "(N, H*C)")
    check.floating("x_l", x_l)
    if edges.num_nodes != x_l.shape[0]:
        raise ValueError(f"edges: expected a graph of N = {x_l.shape[0]} nodes, got {edges.num_nodes}")
    check.same_device("x_l", x_l, x_r=x_r, att=att, edges=edges.offsets)
    check.fraction("dropout_p", dropout_p, below_one=True)
    x_l, x_r, att = check.autocast(x_l, x_r, att)  # type: ignore[assignment]
    drawn = check.seed(seed, x_l.device) if dropout_p > 0 else None
    lists = list(edges.tensors())
    out: Tensor = ops.graph_attention(x_l, x_r, att, lists, negative_slope, dropout_p, drawn, backend or "")[0]
    return out
