"""Linear forms in a table's registers and x_hat: what the rows of a solver are written in.

    Y            the register in which the network is evaluated
    X_HAT        the network's newest output
    form + form, form - form, number * form, form / number

Everything a solver does between two calls of the network is such a form, so a builder reads like the paper, and what
cancels (eps = (y - alpha·x_hat)/sigma in a sum with y, where alpha is near 0) cancels here, in float64 on the host.
Coefficients may also be arrays, or traced by JAX: steps.py makes forms of levels that are known only on the device.
"""

from __future__ import annotations

from diffusion_distill.base.arrays import Array
from diffusion_distill.process.levels import Level
from diffusion_distill.process.noising import step_coefficients


class Form(dict[str, Array]):
    """Coefficients by the names of what they multiply."""

    __array_ufunc__ = None  # NumPy arrays leave array * form to the form

    def __add__(self, other: Form) -> Form:
        return Form({name: self.get(name, 0.0) + other.get(name, 0.0) for name in {**self, **other}})

    def __sub__(self, other: Form) -> Form:
        return self + (-1.0) * other

    def __mul__(self, factor: Array) -> Form:
        return Form({name: factor * value for name, value in self.items()})

    __rmul__ = __mul__

    def __truediv__(self, factor: Array) -> Form:
        return Form({name: value / factor for name, value in self.items()})


def register(name: str) -> Form:
    """The form that is a register's value."""
    return Form({name: 1.0})


Y, X_HAT, ZERO = register("y"), register("x_hat"), Form()


def eps_hat(level: Level, y: Form = Y, x_hat: Form = X_HAT) -> Form:
    """The noise estimate (y - alpha·x_hat) / sigma at the level at which the network was asked."""
    return (y - level.alpha * x_hat) / level.sigma


def move(t: Level, s: Level, output: str, estimate: Form, y: Form = Y) -> Form:
    """The DDIM step from level t to s of y along an estimate of 'x_hat' or of 'eps'."""
    from_y, along = move_coefficients(t, s, output)
    return from_y * y + along * estimate


def move_coefficients(t: Level, s: Level, output: str) -> tuple[Array, Array]:
    """(factor of y, factor of the estimate) of the DDIM step, written in 'x_hat' or in 'eps'."""
    if output == "x_hat":
        return step_coefficients(t, s)
    ratio = s.alpha / t.alpha
    return ratio, s.sigma - ratio * t.sigma


def estimate(output: str, level: Level) -> Form:
    """The network's newest output as 'x_hat' or as 'eps', at the level at which it was asked."""
    return X_HAT if output == "x_hat" else eps_hat(level)
