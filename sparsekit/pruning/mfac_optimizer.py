"""M-FAC's optimizer: SGD along the inverse Fisher matrix of the last gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ._checks import check_not_negative, check_steps


class MFACOptimizer(torch.optim.Optimizer):
    """M-FAC, dynamic (Frantar et al., arXiv 2107.03356, section 4): steps along F^-1 g, F = lambda I + 1/m G^T G.

    G holds the last m gradients, of all parameters together, as rows; those that are not there yet count as zeros. By the
    Woodbury identity, F^-1 g = (g - G^T (m lambda I + G G^T)^-1 G g) / lambda; G G^T is kept up to date, so that a step
    costs O(d m + m^3) and the memory is m gradients, and those of one parameter in float64. As in the authors' code, weight
    decay is a part of the gradient, and with a momentum of b the step is an average, v <- b v + (1 - b) F^-1 g.

    F^-1 mixes the entries of all weights. While masks stay, pruned weights get no step; where a pruner changes masks, call
    :func:`sparsekit.keep_zeros` once.

    Args:
        params: as of any optimizer.
        lr: step size; the published 1e-3 goes with ``dampening`` 1e-6 and momentum 0.9.
        gradients: m.
        dampening: lambda.
        momentum: b, in [0, 1).
        weight_decay: as of SGD.
        memory: bytes that the m gradients of ``params`` may take; ``math.inf`` for all there is.

    Raises:
        MemoryError: they take more than ``memory``; the message says how much.
        TypeError, ValueError: a setting is out of range.

    Example:
        >>> import torch, sparsekit as sk
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = sk.pruning.MFACOptimizer(model.parameters(), lr=0.01, gradients=4, dampening=0.1)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        gradients: int = 32,
        dampening: float = 1e-6,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        memory: float = 8e9,
    ):
        check_not_negative(lr, "lr")
        check_steps(gradients, "gradients", least=1)
        check_not_negative(dampening, "dampening")
        if dampening == 0:
            raise ValueError("dampening must be positive, got 0")
        check_not_negative(momentum, "momentum")
        if momentum >= 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        check_not_negative(weight_decay, "weight_decay")
        if not memory >= 0:
            raise ValueError(f"memory must be a number of bytes, at least 0, got {memory}")
        self._gram: Tensor | None = None
        self._known: list[Tensor] = []  # the rows that it is of
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        # In defaults, which copies and pickles keep.
        self.defaults |= {"gradients": gradients, "dampening": dampening}
        needed = gradients * sum(p.nbytes for group in self.param_groups for p in group["params"])
        if needed > memory:
            raise MemoryError(
                f"gradients = {gradients} take {needed:,} bytes, but memory = {memory:,.0f}; choose fewer, or "
                "allow more memory"
            )

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._gram, self._known = None, []  # computed anew

    @property
    def gradients(self) -> int:
        """m."""
        return self.defaults["gradients"]

    @property
    def dampening(self) -> float:
        """lambda."""
        return self.defaults["dampening"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; parameters without a gradient count as having a zero one, and stay where they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(step=0, gradients=p.new_zeros(self.gradients, p.numel()))
        number = self.state[parameters[0]]["step"] % self.gradients
        rows = [self.state[p]["gradients"] for p in parameters]
        decays = {p: group["weight_decay"] for group in self.param_groups for p in group["params"]}
        for p, row in zip(parameters, rows):
            row[number] = 0 if p.grad is None else p.grad.add(p, alpha=decays[p]).reshape(-1)
            self.state[p]["step"] += 1
        products = self._products(rows, number)
        factors = self._factors(products)
        directions = {}
        for p, row in zip(parameters, rows):
            if p.grad is not None:
                directions[p] = ((row[number] - factors.to(row.dtype) @ row) / self.dampening).view_as(p)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, directions[p], group)
        return loss

    def _products(self, rows: list[Tensor], number: int) -> Tensor:
        """G g for the newest gradient g, ``[m]``, of which G G^T gets a row and a column."""
        # State may have been cleared, loaded, or masked since.
        if len(rows) != len(self._known) or any(a is not b for a, b in zip(rows, self._known)):
            self._known = rows
            self._gram = sum(row.double() @ row.double().T for row in rows)
        # In double: m lambda may be far below the rounding errors of float.
        products = sum(row.double() @ row[number].double() for row in rows)
        self._gram[number] = self._gram[:, number] = products
        return products

    def _factors(self, products: Tensor) -> Tensor:
        """(m lambda I + G G^T)^-1 G g, ``[m]``."""
        inner = self._gram.clone()
        inner.diagonal().add_(self.gradients * self.dampening)
        return torch.cholesky_solve(products.unsqueeze(1), torch.linalg.cholesky(inner)).squeeze(1)

    def _move(self, p: Tensor, direction: Tensor, group: dict) -> None:
        if group["momentum"]:
            state = self.state[p]
            buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
            direction = buffer.mul_(group["momentum"]).add_(direction, alpha=1 - group["momentum"])
        p.add_(direction, alpha=-group["lr"])
