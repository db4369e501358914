"""The lambdas of one row of a D-ODE solver, by least squares (arXiv:2309.16421 Eq. 14).

A student's row takes y to y' + sum_j lambda_j·v_j, which is affine in the lambdas (table.py). They are those that come
nearest to the teacher's state,

    lambda* = argmin ‖ y_teacher - y' - sum_j lambda_j·v_j ‖²

one number per direction for all pixels and images together. Arrays may be NumPy's, JAX's or PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.base.typing import Data
from diffusion_distill.solvers.pairing import directions
from diffusion_distill.solvers.rows import Registers, after, combine
from diffusion_distill.solvers.table import Table


class Fit(NamedTuple):
    """Fitted lambdas.

    Attributes:
      lambdas: in the paper's convention, [rows, D]; 0 where a row has no direction.
      plain: root mean square distance of each row's state from its target before its lambdas act, [rows].
      fitted: the same afterwards, [rows].
      result: the student's last state, [batch, ...].
      asked: the lambdas of least squares, [rows, D]; of rows whose lambdas are 0 for it, beyond the bound.
    """

    lambdas: Array
    plain: Array
    fitted: Array
    result: Data
    asked: Array


def fit_row(
    row: Table, registers: Registers, x_hat: Data, target: Data, largest: float
) -> tuple[Registers, Data, Data, Data, Data]:
    """One row of the student after its call, with the lambdas that come nearest to a target.

    Args:
      row: of a table with directions.
      registers: what the network saw, [batch, ...], and the memories.
      x_hat: the network's output there.
      target: the teacher's state, [batch, ...].
      largest: a row one of whose lambdas is larger in size, or not finite, keeps 0.

    Returns:
      (registers after it, lambdas [D], distance before them, distance with them, lambdas asked for [D]).
    """
    plain, *memories = after(row, registers, x_hat)
    xp, operands = namespace(plain), (*registers, x_hat)
    columns = [combine(weights, operands) for weights in directions(row).weights]
    asked = least_squares(columns, target - plain)
    lambdas = xp.where(xp.all(xp.abs(asked) <= largest), asked, xp.zeros_like(asked))
    moved = plain + combine(lambdas, columns)
    before, behind = (xp.sqrt(xp.mean((target - state) ** 2)) for state in (plain, moved))
    return (moved, *memories), lambdas, before, behind, asked


def least_squares(columns: Sequence[Data], target: Data) -> Array:
    """The x [D] that minimises ‖target - sum_j x_j·column_j‖; columns that depend on those before get 0.

    By Gram-Schmidt orthogonalisation, done twice, whose sums run over devices as they are; squaring the problem
    instead (normal equations) would lose half of the digits.
    """
    xp = namespace(target)
    least = 30 * xp.finfo(target.dtype).eps
    dot = lambda a, b: xp.sum(a * b)  # noqa: E731  (not a matrix product, which accelerators round)
    basis, factors, projections = [], [], []
    for column in columns:
        rest, along = column, [xp.zeros((), dtype=target.dtype)] * len(basis)
        for _ in range(2):
            for i, q in enumerate(basis):
                step = dot(q, rest)
                rest, along[i] = rest - step * q, along[i] + step
        norm, whole = xp.sqrt(dot(rest, rest)), xp.sqrt(dot(column, column))
        kept = norm > least * whole
        scale = xp.where(kept, norm, xp.ones_like(norm))
        basis.append(xp.where(kept, rest / scale, xp.zeros_like(rest)))
        factors.append([*along, scale])
    for q in basis:
        step = dot(q, target)
        target = target - step * q
        projections.append(step)
    solution = [xp.zeros((), dtype=target.dtype)] * len(columns)
    for j in reversed(range(len(columns))):
        above = sum((factors[i][j] * solution[i] for i in range(j + 1, len(columns))), start=0.0)
        solution[j] = (projections[j] - above) / factors[j][j]
    return xp.stack(solution)
