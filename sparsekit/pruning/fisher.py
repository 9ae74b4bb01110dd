"""The empirical Fisher matrix F = lambda I + 1/m sum g g^T of a model's weights, and its inverse in bounded memory.

Gradients g are means over mini-batches. :class:`BlockFisher` keeps the inverse of its diagonal blocks, layer group by
layer group; :class:`LowRankFisher` keeps m vectors, from which products with the whole inverse follow. All of it runs on
PyTorch's threads (``torch.get_num_threads()``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor, nn

from ._progress import track

Batches = Iterable[tuple[Tensor, Tensor]]
LossFn = Callable[[Tensor, Tensor], Tensor]


def gradients(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Batches,
    loss_fn: LossFn,
    count: int,
    description: str = "gradients",
) -> Iterator[dict[str, Tensor]]:
    """The gradients of ``count`` mini-batches, one after the other: ``{name: of the weight's shape}``.

    The model runs in eval mode, so that BatchNorm's statistics stay, and has its modes back afterwards. No ``grad`` is
    touched. Frozen weights have gradients too.

    Args:
        model: whose loss it is.
        weights: Parameters of ``model``, by name.
        batches: ``(inputs, targets)``, the same ones whenever they are iterated.
        loss_fn: of (outputs, targets), the mean over the batch.
        count: how many.
        description: for the progress bar.

    Raises:
        TypeError: ``batches`` can be iterated only once.
        ValueError: ``batches`` has fewer than ``count``, or a loss is not finite.
    """
    if iter(batches) is batches:
        raise TypeError("batches must be iterable again and again, as a list or a DataLoader is, got an iterator")
    modes = {module: module.training for module in model.modules()}
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    done = 0
    try:
        model.eval()
        for weight in frozen:
            weight.requires_grad_(True)
        for inputs, targets in track(islice(batches, count), count, description):
            with torch.enable_grad():
                loss = loss_fn(model(inputs), targets)
                grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            if not loss.detach().isfinite():
                raise ValueError(f"loss_fn must give finite losses, got {loss.detach().item()} on batch {done}")
            done += 1
            yield {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), grads)}
    finally:
        for module, mode in modes.items():
            module.training = mode
        for weight in frozen:
            weight.requires_grad_(False)
    if done < count:
        raise ValueError(f"batches must hold at least {count} mini-batches, one for every gradient, got {done}")


class BlockFisher:
    """Inverses of the diagonal blocks of F: consecutive weights of a layer, in row-major order, make a block.

    Inverses are in float64, since entries of the size of 1 / lambda make up for each other. Several gradients at a time go
    in by the Woodbury identity, which gives what one Sherman-Morrison step after the other gives:
    F^-1 <- F^-1 - F^-1 G^T (m I + G F^-1 G^T)^-1 G F^-1 (WoodFisher, arXiv 2004.14340, equation 10).

    Args:
        weights: ``{name: weight}`` of the layers, for shapes and dtype.
        block: weights in a block.
        dampening: lambda.
        count: m, how many gradients will be added.

    Example:
        >>> import torch
        >>> from sparsekit.pruning.fisher import BlockFisher
        >>> fisher = BlockFisher({"fc": torch.zeros(1, 2)}, block=2, dampening=1.0, count=1)
        >>> fisher.add([{"fc": torch.tensor([[1.0, 0.0]])}])
        >>> fisher.diagonal("fc")
        tensor([[0.5000, 1.0000]])
    """

    AT_ONCE = 8  # gradients
    BLOCKS_AT_ONCE = 1 << 16  # weights' worth of blocks that share a batched product: their operands stay in the cache

    def __init__(self, weights: Mapping[str, Tensor], block: int, dampening: float, count: int):
        self.count = count
        self.inverse: dict[str, Tensor] = {}
        for name, weight in weights.items():
            size = min(block, weight.numel())
            identity = torch.eye(size, dtype=torch.float64, device=weight.device) / dampening
            self.inverse[name] = identity.expand(-(-weight.numel() // size), size, size).clone()
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        self._dtypes = {name: weight.dtype for name, weight in weights.items()}

    @staticmethod
    def bytes_for(weight: Tensor, block: int) -> int:
        """What a layer takes."""
        size = min(block, weight.numel())
        return -(-weight.numel() // size) * size * size * 8

    @torch.no_grad()
    def add(self, grads: Iterable[Mapping[str, Tensor]]) -> None:
        """Add gradients, each ``{name: of the weight's shape}``."""
        grads = list(grads)
        for name, inverse in self.inverse.items():
            # [blocks, size, gradients]
            columns = torch.stack([self._blocks(name, grad[name]) for grad in grads], 2)
            at_once = max(1, self.BLOCKS_AT_ONCE // inverse.shape[1])
            for part, g in zip(inverse.split(at_once), columns.split(at_once)):
                product = part @ g
                inner = g.mT @ product
                inner.diagonal(dim1=1, dim2=2).add_(self.count)
                root = torch.linalg.cholesky(inner)
                rows = torch.linalg.solve_triangular(root, product.mT, upper=False)
                part.baddbmm_(rows.mT, rows, alpha=-1)

    def diagonal(self, name: str) -> Tensor:
        """The diagonal of F^-1, of the weight's shape."""
        return self._unblock(name, self.inverse[name].diagonal(dim1=1, dim2=2))

    def solve(self, name: str, x: Tensor) -> Tensor:
        """F^-1 x, both of the weight's shape."""
        return self._unblock(name, (self.inverse[name] @ self._blocks(name, x).unsqueeze(2)).squeeze(2))

    def _blocks(self, name: str, x: Tensor) -> Tensor:
        """``[blocks, size]``, with zeros behind the last weight."""
        blocks, size, _ = self.inverse[name].shape
        flat = x.reshape(-1).double()
        return torch.nn.functional.pad(flat, (0, blocks * size - flat.numel())).view(blocks, size)

    def _unblock(self, name: str, x: Tensor) -> Tensor:
        shape = self._shapes[name]
        return x.reshape(-1)[: shape.numel()].reshape(shape).to(self._dtypes[name])


class LowRankFisher:
    """F^-1 of all weights at once, by the vectors v_i = F_(i-1)^-1 g_i: static M-FAC (arXiv 2107.03356, section 3).

    F^-1 x = x / lambda - sum_i v_i (v_i^T x) / (m + g_i^T v_i), in O(d m) memory and time, in float64.

    Args:
        weights: ``{name: weight}``, for shapes and dtype.
        dampening: lambda.
        count: m, how many gradients will be added.

    Example:
        >>> import torch
        >>> from sparsekit.pruning.fisher import LowRankFisher
        >>> fisher = LowRankFisher({"fc": torch.zeros(1, 2)}, dampening=1.0, count=1)
        >>> fisher.add([{"fc": torch.tensor([[1.0, 0.0]])}])
        >>> fisher.diagonal("fc")
        tensor([[0.5000, 1.0000]])
    """

    def __init__(self, weights: Mapping[str, Tensor], dampening: float, count: int):
        self.dampening, self.count = dampening, count
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        self._dtypes = {name: weight.dtype for name, weight in weights.items()}
        size = sum(weight.numel() for weight in weights.values())
        device = next(iter(weights.values())).device
        # [m, d], and [m]
        self._vectors = torch.empty(count, size, dtype=torch.float64, device=device)
        self._denominators = torch.empty(count, dtype=torch.float64, device=device)
        self._added = 0

    @staticmethod
    def bytes_for(weights: Iterable[Tensor], count: int) -> int:
        """What so many gradients take."""
        return sum(count * weight.numel() * 8 for weight in weights)

    @torch.no_grad()
    def add(self, grads: Iterable[Mapping[str, Tensor]]) -> None:
        """Add gradients, each ``{name: of the weight's shape}``."""
        for grad in grads:
            g = self._flat(grad)
            v = self._product(g)
            self._vectors[self._added] = v
            self._denominators[self._added] = self.count + g @ v
            self._added += 1

    def diagonal(self, name: str) -> Tensor:
        """The diagonal of F^-1, of the weight's shape."""
        at, shape = self._place(name)
        vectors = self._vectors[: self._added, at : at + shape.numel()]
        total = torch.zeros(shape.numel(), dtype=vectors.dtype, device=vectors.device)
        for vector, denominator in zip(vectors, self._denominators):
            total.addcmul_(vector, vector / denominator)
        return (1 / self.dampening - total).reshape(shape).to(self._dtypes[name])

    def solve_all(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F^-1 x, both ``{name: of the weight's shape}``."""
        product = self._product(self._flat(x))
        parts = product.split([shape.numel() for shape in self._shapes.values()])
        return {n: part.reshape(shape).to(self._dtypes[n]) for (n, shape), part in zip(self._shapes.items(), parts)}

    def _product(self, x: Tensor) -> Tensor:
        vectors = self._vectors[: self._added]
        factors = (vectors @ x) / self._denominators[: self._added]
        return x / self.dampening - factors @ vectors

    def _flat(self, x: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([x[name].reshape(-1).double() for name in self._shapes])

    def _place(self, name: str) -> tuple[int, torch.Size]:
        at = 0
        for other, shape in self._shapes.items():
            if other == name:
                return at, shape
            at += shape.numel()
        raise KeyError(name)
